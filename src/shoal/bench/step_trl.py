"""TRL's half of the step benchmark: `python -m shoal.bench.step_trl ANSWER FOLDER RUN [URL]`, on every rank.

Written against TRL 1.16. With a URL it asks the server that was started there (`vllm_mode="server"`); without, it makes
the engine in its own processes (`"colocate"`), or on CPUs generates with transformers. Ragged lengths go through
`rollout_func`, which asks TRL's own engine or client for every completion by itself.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoal.bench.step_child import StepClock, StepTimes
from shoal.bench.step_run import StepPlace, StepRun, trainer_arguments
from shoal.bench.step_settings import make_dataset, reward
from shoal.bench.step_trl_server import SERVER_TIMEOUT_S

_AT_ONCE = 256


def trl_arguments(run: StepRun, output_dir: Path, url: str) -> dict[str, Any]:
    """Return the fields of TRL's `GRPOConfig`."""
    settings = run.common
    micro = settings.trl_micro_batch
    values = trainer_arguments(run, output_dir) | {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.completions_per_rank // micro,
        "vllm_importance_sampling_correction": False,
    }
    if settings.device == "cpu":
        return values | {"use_vllm": False, "generation_kwargs": {"min_new_tokens": run.longest_completion}}
    values |= {"use_vllm": True, "generation_kwargs": {"ignore_eos": True}}
    if url:
        return values | {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": SERVER_TIMEOUT_S}
    share = settings.gpu_memory_utilization
    return values | {
        "vllm_mode": "colocate",
        "vllm_tensor_parallel_size": settings.tensor_parallel_size,
        "vllm_max_model_length": settings.prompt_tokens + run.longest_completion,
        "vllm_enable_sleep_mode": settings.sleeps,
        **({} if share is None else {"vllm_gpu_memory_utilization": share}),
    }


def main() -> None:
    """Train, the times written down after every step."""
    from trl import GRPOConfig

    answer, folder, run = Path(sys.argv[1]), Path(sys.argv[2]), StepRun.from_json(sys.argv[3])
    url = sys.argv[4] if len(sys.argv) > 4 else ""
    times = StepTimes()
    trainer: Any = timed_trainer_class()(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=GRPOConfig(**trl_arguments(run, folder / "trl", url)),
        train_dataset=make_dataset(run.common),
    )
    trainer.bench, trainer.times = run, times
    if run.common.device == "cpu":
        times.notes.append("TRL generated with transformers: it has no vLLM on CPUs")
    trainer.add_callback(_RestClock(times, trainer.args.device, answer))
    trainer.train()


class _RestClock(StepClock):
    """Counts as training what is left of a step: TRL does not time it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step's seconds, and what is left of them."""
        super().on_step_end(args, state, control, **kwargs)
        phases = self._times.phases
        self._times.phase("train", self._times.step_s[-1] - phases["generate"][-1] - phases["publish"][-1])


def timed_trainer_class() -> type:
    """Return TRL's trainer with its weight sync and its generation timed. A function: TRL may not be installed."""
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
        bench: StepRun
        times: StepTimes

        def _generate(self, prompts: list[Any]) -> Any:
            began = time.monotonic()
            trainer: Any = self
            _hold_to(trainer, self.bench.place(trainer.state.global_step))
            if trainer.use_vllm and trainer.state.global_step != trainer._last_loaded_step:
                trainer.vllm_generation.sync_weights()
                trainer._last_loaded_step = trainer.state.global_step
            synced = time.monotonic()
            found = super()._generate(prompts)
            self.times.phase("publish", synced - began)
            self.times.phase("generate", time.monotonic() - synced)
            self.times.tokens.append(sum(map(len, found[1])) * self.accelerator.num_processes)
            return found

    return TimedTrainer


def _hold_to(trainer: Any, place: StepPlace) -> None:
    """Have TRL generate as if the part of this step were all that it trains on.

    TRL 1.16 reads these when it generates: `rollout_func` in `_generate` alone (its constructor only warns), the
    generation's `max_completion_length` into the sampling parameters of engine and server, the trainer's own in losses.
    """
    trainer.rollout_func = _ragged_rollouts(place) if place.part.is_ragged else None
    trainer.max_completion_length = place.part.completion_tokens
    if trainer.use_vllm:
        trainer.vllm_generation.max_completion_length = place.part.completion_tokens


def _ragged_rollouts(place: StepPlace) -> Any:
    """Return a `rollout_func` that has each completion of a step written to its own length."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        lengths = place.lengths[first : first + len(prompts)]
        prompt_ids = trainer.processing_class(prompts, add_special_tokens=False)["input_ids"]
        generation = trainer.vllm_generation
        if generation.mode == "server":
            found = _from_server(generation.vllm_client, prompt_ids, lengths)
        else:
            found = _from_engine(generation, prompt_ids, lengths)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids for ids, _ in found],
            "logprobs": [logprobs for _, logprobs in found],
        }

    return rollout


def _from_server(client: Any, prompt_ids: list[list[int]], lengths: list[int]) -> list[tuple[list[int], list[float]]]:
    def one(index: int) -> tuple[list[int], list[float]]:
        answer = client.generate(
            prompts=[prompt_ids[index]],
            n=1,
            temperature=1.0,
            max_tokens=lengths[index],
            generation_kwargs={"ignore_eos": True},
        )
        return answer["completion_ids"][0], [values[0] for values in answer["logprobs"][0]]

    with ThreadPoolExecutor(min(_AT_ONCE, len(prompt_ids))) as threads:
        return list(threads.map(one, range(len(prompt_ids))))


def _from_engine(
    generation: Any, prompt_ids: list[list[int]], lengths: list[int]
) -> list[tuple[list[int], list[float]]]:
    from vllm import SamplingParams

    if generation.enable_sleep_mode:
        generation.llm.wake_up(tags=["kv_cache"])
    outputs = generation.llm.generate(
        [{"prompt_token_ids": ids} for ids in prompt_ids],
        [SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0) for length in lengths],
        use_tqdm=False,
    )
    if generation.enable_sleep_mode:
        generation.llm.sleep(level=2)
        generation._llm_weights_sleeping = True
    return [
        (
            list(output.outputs[0].token_ids),
            [next(iter(values.values())).logprob for values in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


if __name__ == "__main__":
    main()
