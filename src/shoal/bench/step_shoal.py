"""Shoal's half of the step benchmark: `python -m shoal.bench.step_shoal ANSWER FOLDER RUN`, on every rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal import GRPOConfig, GRPOTrainer
from shoal.algorithm.seeds import sample_seed
from shoal.bench.step_child import StepClock, StepTimes
from shoal.bench.step_run import StepRun, trainer_arguments
from shoal.bench.step_settings import StepSettings, make_dataset, reward
from shoal.rollout.collector import GroupRequest
from shoal.types import Prompt, SamplingSettings, ScoredGroup

_ROLLOUT_TIMEOUT_S = 1800.0


class FixedWorkTrainer(GRPOTrainer):
    """Has every completion written to the length that the settings say, whatever the model would end it with."""

    bench: StepRun
    times: StepTimes

    def score(
        self, prompts: Sequence[Prompt], *, num_generations: int, temperature: float, seed_step: int
    ) -> tuple[ScoredGroup, ...]:
        """Have prompts completed and judged."""
        rollouts, step = self.rollouts, self.state.global_step
        assert rollouts is not None, "engines run by the time that something is scored"
        place = self.bench.place(step)
        lengths, most = place.lengths, place.part.completion_tokens
        index = {prompt.row: number * num_generations for number, prompt in enumerate(prompts)}
        request = GroupRequest(
            prompts=tuple(prompts),
            num_generations=num_generations,
            sampling=SamplingSettings(temperature=temperature, max_tokens=most, stop_token_ids=()),
            seed=lambda prompt, sample: sample_seed(self.args.seed, seed_step, prompt.row, sample),
            step=step,
            max_tokens=lambda prompt, sample: lengths[index[prompt.row] + sample],
        )
        groups = rollouts.collect(request, timeout_s=_ROLLOUT_TIMEOUT_S)
        self.times.tokens.append(sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts))
        return groups


def shoal_config(run: StepRun, output_dir: Path) -> GRPOConfig:
    """Return the settings of the run."""
    settings = run.common
    values = trainer_arguments(run, output_dir) | {
        "per_device_train_batch_size": settings.completions_per_rank,
        "max_tokens_per_micro_batch": settings.max_tokens_per_micro_batch,
        "vllm_devices": _devices(settings),
        "vllm_num_engines": settings.num_engines,
        "vllm_tensor_parallel_size": settings.tensor_parallel_size,
        "vllm_gpu_memory_utilization": settings.gpu_memory_utilization,
        "vllm_enable_sleep_mode": settings.sleeps,
        # Kept, and not dropped where ratios of random weights leave the bounds: the work must not depend on it.
        "vllm_importance_sampling_correction": False,
    }
    return GRPOConfig(**values)


def main() -> None:
    """Train, the times written down after every step."""
    answer, folder, run = Path(sys.argv[1]), Path(sys.argv[2]), StepRun.from_json(sys.argv[3])
    times = StepTimes()
    trainer: Any = FixedWorkTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=shoal_config(run, folder / "shoal"),
        train_dataset=make_dataset(run.common),
    )
    trainer.bench, trainer.times = run, times
    trainer.add_callback(StepClock(times, trainer.args.device, answer))
    try:
        trainer.train()
    finally:
        trainer.close()


def _devices(settings: StepSettings) -> str:
    if settings.device == "cpu":
        return "cpu"
    if settings.layout == "colocated":
        return "colocate"
    return ",".join(f"cuda:{index}" for index in settings.engine_devices)


if __name__ == "__main__":
    main()
