"""Run the demo: judge, train, judge again, and leave everything that a run should leave."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.config import GRPOConfig
from shoal.demo.checkpoint import ensure_checkpoint
from shoal.demo.task import MAX_COMPLETION_LENGTH, NUM_HELD_OUT, TASK, held_out_dataset, is_correct, training_dataset
from shoal.errors import ConfigError
from shoal.observe.report import write_report
from shoal.observe.statistics import Interval, mean_interval, paired_difference_interval
from shoal.observe.summary import RunSummary, versions, write_summary
from shoal.trainer.grpo_trainer import GRPOTrainer
from shoal.trainer.progress import ProgressCallback
from shoal.types import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What may be chosen.

    Attributes:
        output_dir: Emptied first if an earlier demo made it.
        steps: Optimizer steps.
        seed: Of the run: prompts' order and samples.
        num_held_out: Questions of the judging.
        model: A checkpoint's folder; None for the packaged SmolLM2-135M-Instruct.
    """

    output_dir: Path
    steps: int
    seed: int
    num_held_out: int = NUM_HELD_OUT
    model: Path | None = None


def run_demo(settings: DemoSettings) -> RunSummary:
    """Run it; see the README for what it shows and leaves."""
    began = time.monotonic()
    _clear(settings.output_dir)
    with ProgressCallback() as progress:
        progress.message(f"Task: {TASK}")
        model = settings.model or ensure_checkpoint()
        progress.message(f"Model: {model} ({time.monotonic() - began:.0f} s)")
        trainer = GRPOTrainer(
            model=str(model),
            reward_funcs=is_correct,
            args=demo_config(settings),
            train_dataset=training_dataset(),
            eval_dataset=held_out_dataset(settings.num_held_out),
        )
        try:
            progress.attach(trainer)
            trainer.evaluate()
            before = _rewards(trainer.last_evaluation)
            progress.message(f"Held-out answers right before training: {_percent(mean_interval(before))}")
            trainer.train()
            trainer.evaluate()
            after = _rewards(trainer.last_evaluation)
            with trainer.ledger.phase("checkpoint"):
                trainer.save_model(str(settings.output_dir / "model"))
            summary = _summary(trainer, before, after, total_s=time.monotonic() - began)
        finally:
            trainer.close()
        write_summary(settings.output_dir / "summary.json", summary)
        report = write_report(settings.output_dir)
        for line in _result(before, after, summary, report):
            progress.message(line)
    return summary


def demo_config(settings: DemoSettings) -> GRPOConfig:
    """Return the demo's settings: 64 completions of a few tokens a step, so that two CPU cores do."""
    values: dict[str, Any] = {
        "output_dir": str(settings.output_dir),
        "max_steps": settings.steps,
        "seed": settings.seed,
        "num_generations": 8,
        "per_device_train_batch_size": 64,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3,
        "max_grad_norm": 1.0,
        "eval_temperature": 0.0,
        "num_generations_eval": 1,
        "logging_steps": 1,
        "log_completions": True,
        "num_completions_to_print": 0,  # the progress view has the terminal; the report shows some
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return GRPOConfig(**values)


def _rewards(groups: Sequence[ScoredGroup]) -> list[float]:
    return [float(np.nanmean(group.rewards)) for group in groups]


def _summary(trainer: GRPOTrainer, before: list[float], after: list[float], *, total_s: float) -> RunSummary:
    rollouts, publisher = trainer.rollouts, trainer.publisher
    assert rollouts is not None and publisher is not None, "the engines run until the summary is made"
    phases = trainer.ledger.seconds()
    return RunSummary(
        reward_before=float(np.mean(before)),
        reward_after=float(np.mean(after)),
        reward_ci95=paired_difference_interval(before, after).half_width,
        num_engines=len(rollouts.fleet.engines),
        num_steps=int(trainer.state.global_step),
        num_publishes=publisher.num_publishes,
        num_publishes_proven=publisher.num_proven,
        seconds=phases | {"other": max(0.0, total_s - sum(phases.values()))},
        versions=versions(),
        settings=trainer.args.to_sanitized_dict(),
    )


def _result(before: list[float], after: list[float], summary: RunSummary, report: Path) -> list[str]:
    difference = paired_difference_interval(before, after)
    return [
        "",
        f"Held-out answers right  before {_percent(mean_interval(before))}   after {_percent(mean_interval(after))}",
        f"Difference {_points(difference)} points (95 % interval), {len(before)} questions, answered greedily",
        f"{summary.num_publishes_proven} of {summary.num_publishes} publishes of weights proven on "
        f"{summary.num_engines} engines; {sum(summary.seconds.values()):.0f} s in all",
        f"Report: {report}",
    ]


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} % ± {100 * interval.half_width:.1f}"


def _points(interval: Interval) -> str:
    return f"{100 * interval.value:+.1f} ± {100 * interval.half_width:.1f}"


def _clear(folder: Path) -> None:
    """Empty the folder of an earlier demo; refuse to touch anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in ("metrics.jsonl", "summary.json", "engines")):
        raise ConfigError(
            f"{folder} is not empty and was not made by the demo, so it is left alone. Choose another --output-dir."
        )
    shutil.rmtree(folder)
