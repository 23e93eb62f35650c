"""What the terminal view shows: plain records, filled by the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine, as shown.

    Attributes:
        name: Such as `"engine-0"`.
        state: In one or two words, such as `"starting"`, `"idle"`, `"generating"`.
        running: Samples it is writing now.
        done_tokens: Completion tokens it wrote so far.
        tokens_per_s: Its rate of late; None when unknown.
        weight_version: Version of the weights it holds; None before the first publish.
        log_path: Its log file, if it has one.
        detail: What it is doing in its own words, such as `"loading weights"`.
    """

    name: str
    state: str
    running: int = 0
    done_tokens: int = 0
    tokens_per_s: float | None = None
    weight_version: int | None = None
    log_path: Path | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewState:
    """A moment of a run.

    Attributes:
        step: Finished optimizer steps.
        num_steps: How many there will be.
        elapsed_s: Seconds since training began, engine start-up left out.
        phase: What is going on, such as `"generate"`.
        reward: Mean reward of the last finished step; None before the first.
        reward_history: Mean reward of each finished step.
        tokens_per_s: Completion tokens per second of generation, all engines together; None when unknown.
        engines: The engines.
        metrics: The last step's metrics.
        seconds_per_step: None before the first step.
        time_left_s: None when unknown.
    """

    step: int
    num_steps: int
    elapsed_s: float
    phase: str
    reward: float | None = None
    reward_history: tuple[float | None, ...] = ()
    tokens_per_s: float | None = None
    engines: tuple[EngineView, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    seconds_per_step: float | None = None
    time_left_s: float | None = None
