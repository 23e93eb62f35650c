"""Run every layout of a host, one command after the other, and compare with what was expected.

What fails, hangs or is not there leaves its figures empty, with the reason, and the next one begins.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from shoal.bench.children import StageError
from shoal.bench.launch import run_to_end
from shoal.bench.layouts import (
    EXPECTED_NO_SLOWER_THAN,
    EXPECTED_PUBLISH_MS,
    EXPECTED_ROLLOUT_SCALING,
    MachineLayout,
    Part,
    Work,
    commands_for,
)
from shoal.bench.results import store
from shoal.observe.summary import versions

_MARK = "SHOAL_BENCHMARK"
_SETTLE_S = 15.0  # a killed engine's processes end one after another
_POLL_S = 0.2
_STEP_TRAINERS = 2  # the step benchmark bounds each of its trainers by itself


@dataclass(slots=True, kw_only=True)
class LayoutResult:
    """What was found of one layout.

    Attributes:
        layout: The layout.
        figures: What each part answered, by part.
        reasons: Why a part answered nothing.
        left_behind: Processes that were still there after a part.
    """

    layout: MachineLayout
    figures: dict[Part, Mapping[str, Any]] = field(default_factory=dict)
    reasons: dict[Part, str] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)

    @property
    def publish_ms(self) -> float | None:
        """Milliseconds of a whole publish."""
        return self._figure("weights", "total_ms")

    @property
    def share_of_raw(self) -> float | None:
        """Seconds of the wire alone, over those of the publish's wire."""
        ours = self._figure("weights", "wire_ms")
        raw = self._figure("weights", "raw_p2p_ms") or self._figure("weights", "raw_copy_ms")
        return raw / ours if raw and ours else None

    @property
    def scaling(self) -> float | None:
        """Tokens a second of all engines, over as many times those of one."""
        many, one = self._figure("rollouts", "tokens_per_s"), self._figure("rollouts_one", "tokens_per_s")
        return many / one / self.layout.num_engines if many and one else None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step."""
        return self._figure("step", "step_s")

    def to_dict(self) -> dict[str, Any]:
        """Return everything, of plain JSON types."""
        return {
            "layout": asdict(self.layout) | {"name": self.layout.name},
            "publish_ms": self.publish_ms,
            "share_of_raw": self.share_of_raw,
            "proven": self.figures.get("weights", {}).get("proven"),
            "rollout_scaling": self.scaling,
            "step_s": self.step_s,
            "phases": self.figures.get("step", {}).get("phases"),
            "peak_bytes": self.figures.get("step", {}).get("peak_bytes"),
            "trl_step_s": self._figure("step", "trl_step_s"),
            "left_behind": self.left_behind,
            "reasons": self.reasons,
            "figures": {part: dict(figures) for part, figures in self.figures.items()},
        }

    def _figure(self, part: Part, name: str) -> float | None:
        value = self.figures.get(part, {}).get(name)
        return float(value) if isinstance(value, int | float) else None


def run_layouts(
    layouts: Sequence[MachineLayout], work: Work, folder: Path, device_names: Sequence[str]
) -> list[LayoutResult]:
    """Run every layout, print and store; `summary.json` is written again after each, so that nothing found is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    results: list[LayoutResult] = []
    for layout in layouts:
        _say(f"== {layout.name}")
        result = LayoutResult(layout=layout)
        results.append(result)
        for part, command in commands_for(layout, work, folder).items():
            _run_part(result, part, command, work, folder)
        for line in describe(result, work):
            _say(line)
        store(folder / "summary.json", _summary(results, work, device_names))
    _say("== expected and found")
    for line in compare(results, work):
        _say(line)
    _say(json.dumps(_summary(results, work, device_names)))
    return results


def describe(result: LayoutResult, work: Work) -> list[str]:
    """Write what was found of one layout."""
    figures = result.to_dict()
    share, trl = figures["share_of_raw"], figures["trl_step_s"]
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in (figures["phases"] or {}).items())
    lines = []
    if result.publish_ms is not None:
        raw = "" if share is None else f", {share:.0%} of the raw rate"
        proven = "proven" if figures["proven"] else "NOT PROVEN"
        lines.append(f"publish of {work.weights_shape}: {result.publish_ms:.1f} ms{raw}, {proven}")
    if "rollouts" in result.figures:
        rate = result.figures["rollouts"].get("tokens_per_s")
        lines.append(f"rollouts: {rate} tokens/s" + (f", {result.scaling:.2f} of linear" if result.scaling else ""))
    if result.step_s is not None:
        beside = "" if trl is None else f"; TRL {trl:.2f} s"
        peak = f"peak {figures['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"step of {work.step_shape}: {result.step_s:.2f} s ({phases}), {peak}{beside}")
    lines += [f"no {part}: {reason}" for part, reason in result.reasons.items()]
    lines.append(f"LEFT BEHIND: {', '.join(result.left_behind)}" if result.left_behind else "no process left behind")
    return lines


def compare(results: Sequence[LayoutResult], work: Work) -> list[str]:
    """Write each expectation beside what was found."""
    lines = []
    for result in results:
        if result.scaling is not None:
            lines.append(_line(f"{result.layout.name}: rollouts", result.scaling, ">=", EXPECTED_ROLLOUT_SCALING, ""))
        most = EXPECTED_PUBLISH_MS.get((result.layout.name, work.weights_shape))
        if most is not None and result.publish_ms is not None:
            lines.append(_line(f"{result.layout.name}: publish", result.publish_ms, "<=", most, " ms"))
    reference = next((other.step_s for other in results if other.layout.name == EXPECTED_NO_SLOWER_THAN), None)
    for result in results:
        if reference is not None and result.step_s is not None and result.layout.name != EXPECTED_NO_SLOWER_THAN:
            lines.append(_line(f"{result.layout.name}: step", result.step_s, "<=", reference, " s"))
    return lines or ["nothing that was run has an expectation"]


def _line(what: str, found: float, sign: str, expected: float, unit: str) -> str:
    is_met = found >= expected if sign == ">=" else found <= expected
    return f"{what} {found:.3g}{unit}, expected {sign} {expected:.3g}{unit}: {'met' if is_met else 'MISSED'}"


def _run_part(result: LayoutResult, part: Part, command: Sequence[str], work: Work, folder: Path) -> None:
    _say(f"$ {shlex.join(command)}")
    mark = uuid.uuid4().hex
    log = folder / f"{result.layout.name}-{part}.log"
    timeout_s = float(work.timeout_s * (_STEP_TRAINERS + 1 if part == "step" else 1))

    def note() -> None:
        result.left_behind += left_behind(mark)

    try:
        run_to_end(command, log, timeout_s=timeout_s, environment={**os.environ, _MARK: mark}, on_end=note)
        result.figures[part] = last_json(log)
    except StageError as error:
        result.reasons[part] = str(error)
    for process in _marked(mark):  # what a time-out could not end, or what left its group: the GPUs must be free
        with suppress(psutil.NoSuchProcess):
            process.kill()


def last_json(log: Path) -> dict[str, Any]:
    """Return the JSON object that a command's last line is.

    Raises:
        StageError: It is none.
    """
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                break
            if isinstance(found, dict):
                return found
    raise StageError(f"it printed no JSON object; see {log}")


def left_behind(mark: str, settle_s: float | None = None) -> list[str]:
    """Return processes, by number and name, that carry this mark in their environment after a while."""
    deadline = time.monotonic() + (_SETTLE_S if settle_s is None else settle_s)
    while True:
        found = [f"{process.pid} {process.name()}" for process in _marked(mark)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_S)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                process.name()
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _summary(results: Sequence[LayoutResult], work: Work, device_names: Sequence[str]) -> dict[str, Any]:
    return {
        "benchmark": "many_gpus",
        "layouts": [result.to_dict() for result in results],
        "expected_and_found": compare(results, work),
        "work": asdict(work),
        "devices": list(device_names),
        "versions": versions(),
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _say(text: str) -> None:
    print(text, flush=True)
