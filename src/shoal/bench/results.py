"""What a run of the weights benchmark found: the table on its way, and one JSON object at the end."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from shoal.bench.settings import BenchSettings
from shoal.observe.files import replace_file
from shoal.observe.summary import versions
from shoal.types import PublishReport

_MS = 1e3
_NAME_WIDTH = 44
_COLUMN = 14

Value: TypeAlias = bool | float | int | None


FIGURES = (
    "proven", "control_caught", "wire_ms", "total_ms", "total_running_ms", "proof_ms", "raw_p2p_ms", "raw_broadcast_ms",
    "raw_copy_ms", "vllm_native_ms", "vllm_native_total_ms", "extra_bytes_trainer", "extra_bytes_engine", "num_bytes",
    "num_tensors", "gb_per_s", "num_running",
)  # fmt: skip


@dataclass(slots=True)
class Results:
    """Filled in stage by stage; what a stage could not find stays None, and `reasons` says why.

    Attributes:
        settings: What was measured.
        device_names: Of the trainer's and the engines' devices.
        path: Where they are stored, again after every stage; None for nowhere.
        values: The figures, by name.
        samples: The raw values behind them.
        reasons: Why a figure is missing, by the figure's name.
    """

    settings: BenchSettings
    device_names: Sequence[str]
    path: Path | None = None
    values: dict[str, Value] = field(default_factory=lambda: dict.fromkeys(FIGURES))
    samples: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def median(self, name: str, seconds: Sequence[float]) -> float:
        """Record the median of samples in seconds as the figure `name`, in milliseconds."""
        value = self.keep(name, seconds)
        self.values[name] = value
        return value

    def keep(self, name: str, seconds: Sequence[float]) -> float:
        """Record samples in seconds; return their median in milliseconds."""
        self.samples[name] = [round(value * _MS, 4) for value in seconds]
        return round(statistics.median(self.samples[name]), 4)

    def missing(self, names: Sequence[str], reason: str) -> None:
        """Record why figures are missing, those that were found before left alone."""
        self.reasons.update({name: reason for name in names if self.values[name] is None})

    def publishes(self, prefix: str, reports: Sequence[PublishReport]) -> None:
        """Keep where the time of each publish went."""
        for phase in reports[0].phases:
            self.samples[f"{prefix}_{phase}_ms"] = [round(report.phases[phase] * _MS, 4) for report in reports]

    def rate(self, milliseconds: float) -> float:
        """Return GB/s at which all bytes of a publish were sent in that time."""
        num_bytes = self.values["num_bytes"]
        return float(num_bytes or 0) / milliseconds / 1e6

    def store(self) -> None:
        """Write what there is so far.

        Raises:
            OSError: It cannot be written.
        """
        if self.path is not None:
            store(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return everything, of plain JSON types."""
        return {
            "benchmark": "weights",
            **self.values,
            "backend": self.settings.backend,
            "layout": self.settings.layout,
            "settings": asdict(self.settings),
            "versions": {**versions(), **_nccl_version()},
            "devices": list(self.device_names),
            "platform": platform.platform(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "samples": self.samples,
            "reasons": self.reasons,
        }


def default_path(settings: BenchSettings) -> Path:
    """Return where the results go unless the user says otherwise."""
    date = datetime.now(UTC).date().isoformat()
    return Path("benchmarks/results") / f"{date}-weights-{settings.model_shape}-{settings.layout}.json"


def store(path: Path, data: Mapping[str, Any]) -> None:
    """Write the results; whatever ends this process meanwhile, the file is the old one or the new one.

    Raises:
        OSError: They cannot be written.
    """
    replace_file(path, lambda part: part.write_text(json.dumps(data, indent=2) + "\n"))


def header() -> str:
    """Return the table's head."""
    return f"{'':<{_NAME_WIDTH}}{'measured':>{_COLUMN}}  to compare with"


def row(name: str, measured: str, compare: str = "") -> str:
    """Return a line of the table."""
    return f"{name:<{_NAME_WIDTH}}{measured:>{_COLUMN}}  {compare}".rstrip()


def milliseconds(value: float) -> str:
    """Write a time."""
    return f"{value:,.1f} ms"


def times(value: float, other: Value, what: str) -> str:
    """Write how two times compare, where the other is known."""
    return f"{value / other:.2f} x {what}" if other else ""


def _nccl_version() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {"nccl": ".".join(map(str, version))}
