"""Show a run as it goes: engines starting, steps, rewards, what each engine is doing, time left."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from shoal.observe.terminal import ProgressView
from shoal.observe.view_state import EngineView, ViewState
from shoal.rollout.health import State
from shoal.wire.plan import SlicePlan

if TYPE_CHECKING:
    from shoal.trainer.grpo_trainer import GRPOTrainer

logger = logging.getLogger(__name__)

_REFRESH_S = 0.5
_STATE_WORDS = {
    State.STARTING: "restarting",
    State.STALE: "waiting for weights",
    State.SUSPECT: "not answering",
    State.ASLEEP: "asleep",
    State.DEAD: "lost",
}


def print_start_progress(stages: Sequence[tuple[str, str]], elapsed_s: float) -> None:
    """Keep one line on the terminal up to date; elsewhere, say only when all engines are ready."""
    waiting = [name for name, stage in stages if stage != "ready"]
    text = f"{len(stages) - len(waiting)} of {len(stages)} engines ready after {elapsed_s:.0f} s"
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}{' ' if waiting else chr(10)}")
        sys.stderr.flush()
    elif not waiting:
        sys.stderr.write(text + "\n")


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """A transformers callback that feeds a `ProgressView`; use it as a context manager around the run.

    Args:
        view: What to draw on.
    """

    def __init__(self, view: ProgressView | None = None) -> None:
        self._view = view or ProgressView()
        self._lock = threading.Lock()
        self._trainer: GRPOTrainer | None = None
        self._began: float | None = None
        self._first_step = 0
        self._step = 0
        self._rewards: list[float | None] = []
        self._metrics: dict[str, float | None] = {}
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True, name="progress")

    def attach(self, trainer: GRPOTrainer) -> None:
        """Follow this trainer."""
        self._trainer = trainer
        trainer.engine_start_progress = self._show_start
        trainer.remove_callback(PrinterCallback)  # prints every log as a dictionary; the view shows the same
        trainer.add_callback(self)

    def message(self, text: str) -> None:
        """Print a line."""
        with self._lock:
            self._view.message(text)

    def __enter__(self) -> ProgressCallback:
        self._view.__enter__()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._ticker.join(timeout=5.0)
        self._view.__exit__(kind, error, trace)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        self._first_step = self._step = int(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take up a step's numbers."""
        if logs is not None and ("reward" in logs or "loss" in logs):
            self._step = int(state.global_step)
            if "reward" in logs:  # no completions are written for a step that trains on former ones
                self._rewards.append(logs["reward"])
            self._metrics = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            self._show(state)

    def _tick(self) -> None:
        while not self._ended.wait(_REFRESH_S):
            if self._began is not None and self._trainer is not None:
                self._show(self._trainer.state)

    def _show(self, state: Any) -> None:
        with self._lock:
            self._view.update(self._view_state(state))

    def _show_start(self, stages: Sequence[tuple[str, str]], elapsed_s: float) -> None:
        engines = [
            EngineView(
                name=name, state="ready" if stage == "ready" else "starting", detail="" if stage == "ready" else stage
            )
            for name, stage in stages
        ]
        with self._lock:
            self._view.starting_engines(engines, elapsed_s=elapsed_s)

    def _view_state(self, state: Any) -> ViewState:
        elapsed = time.monotonic() - self._began if self._began is not None else 0.0
        num_done = self._step - self._first_step
        engines = self._engines()
        per_step = elapsed / num_done if num_done else None
        return ViewState(
            step=self._step,
            num_steps=int(state.max_steps),
            elapsed_s=elapsed,
            phase="generate" if any(engine.running for engine in engines) else "train",
            reward=self._rewards[-1] if self._rewards else None,
            reward_history=tuple(self._rewards),
            tokens_per_s=self._metrics.get("rollout/tokens_per_s"),
            engines=engines,
            metrics=self._metrics,
            seconds_per_step=per_step,
            time_left_s=per_step * (int(state.max_steps) - self._step) if per_step is not None else None,
        )

    def _engines(self) -> tuple[EngineView, ...]:
        rollouts = self._trainer.rollouts if self._trainer is not None else None
        if rollouts is None:
            return ()
        return tuple(
            EngineView(
                name=load.name,
                state=_STATE_WORDS.get(load.state) or ("generating" if load.running else "idle"),
                running=load.running,
                done_tokens=load.done_tokens,
                weight_version=rollouts.version,
                log_path=log_path,
            )
            for load, log_path in zip(rollouts.loads(), rollouts.log_paths(), strict=True)
        )


def log_plans(plans: Sequence[SlicePlan]) -> None:
    """Say how each worker takes its weights, and which of them vLLM has to process again each time."""
    for plan in plans:
        in_place = {piece.target for piece in plan.slices} - set(plan.reloaded)
        names = f" ({', '.join(plan.reloaded[:3])}{', ...' if len(plan.reloaded) > 3 else ''})" if plan.reloaded else ""
        logger.info(
            "%s: %d slices, %d parameters written in place, %d through vLLM's reload%s",
            plan.worker,
            len(plan.slices),
            len(in_place),
            len(plan.reloaded),
            names,
        )
