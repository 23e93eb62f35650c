"""What a vLLM server says of itself on `/metrics`, read from Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shoal.types import EngineReport

_RUNNING = "num_requests_running"
_WAITING = "num_requests_waiting"
_KV_USAGE = "kv_cache_usage_perc"
_PREEMPTIONS = "num_preemptions_total"
_READ = "prompt_tokens_total"
_WRITTEN = "generation_tokens_total"

# One search for all of them: the page has some hundred lines, most of them histograms.
_LINE = re.compile(
    rf"^vllm:({_RUNNING}|{_WAITING}|{_KV_USAGE}|{_PREEMPTIONS}|{_READ}|{_WRITTEN})(?:\{{[^\n]*\}})? ([^\s]+)",
    re.MULTILINE,
)


def parse_metrics(text: str) -> EngineReport | None:
    """Return what the page says, the data-parallel engines of a server taken together; None if it is not vLLM's."""
    values: dict[str, list[float]] = {}
    try:
        for name, value in _LINE.findall(text):
            values.setdefault(name, []).append(float(value))
        return _report(values)
    except (ValueError, OverflowError):
        return None


def _report(values: Mapping[str, list[float]]) -> EngineReport | None:
    if _RUNNING not in values or _WAITING not in values:
        return None
    usage = values.get(_KV_USAGE, [0.0])
    has_tokens = _READ in values and _WRITTEN in values
    return EngineReport(
        running=round(sum(values[_RUNNING])),
        waiting=round(sum(values[_WAITING])),
        kv_usage=sum(usage) / len(usage),
        num_preemptions=round(sum(values.get(_PREEMPTIONS, [0.0]))),
        num_tokens=round(sum(values[_READ]) + sum(values[_WRITTEN])) if has_tokens else None,
    )
