"""TRL's half of the step benchmark: `python -m shoal.bench.step_trl ANSWER FOLDER SETTINGS [URL]`, on every rank.

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
from shoal.bench.step_settings import StepSettings, make_dataset, reward, trainer_arguments
from shoal.bench.step_trl_server import SERVER_TIMEOUT_S

_AT_ONCE = 256


def trl_arguments(settings: StepSettings, output_dir: Path, url: str) -> dict[str, Any]:
    """Return the fields of TRL's `GRPOConfig`."""
    micro = settings.trl_micro_batch
    values = trainer_arguments(settings, output_dir) | {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.completions_per_rank // micro,
        "vllm_importance_sampling_correction": False,
    }
    if settings.device == "cpu":
        length = settings.completion_tokens
        return values | {"use_vllm": False, "generation_kwargs": {"min_new_tokens": length}}
    values |= {"use_vllm": True, "generation_kwargs": {"ignore_eos": True}}
    if url:
        return values | {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": SERVER_TIMEOUT_S}
    share = settings.gpu_memory_utilization
    return values | {
        "vllm_mode": "colocate",
        "vllm_tensor_parallel_size": settings.tensor_parallel_size,
        "vllm_max_model_length": settings.prompt_tokens + settings.completion_tokens,
        "vllm_enable_sleep_mode": settings.sleeps,
        **({} if share is None else {"vllm_gpu_memory_utilization": share}),
    }


def main() -> None:
    """Train and write down the times."""
    from trl import GRPOConfig

    answer, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), StepSettings.from_json(sys.argv[3])
    url = sys.argv[4] if len(sys.argv) > 4 else ""
    times = StepTimes()
    trainer: Any = _timed_trainer_class()(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=GRPOConfig(**trl_arguments(settings, folder / "trl", url)),
        train_dataset=make_dataset(settings),
        rollout_func=_ragged_rollouts(settings) if settings.is_ragged else None,
    )
    trainer.times = times
    if settings.device == "cpu":
        times.notes.append("TRL generated with transformers: it has no vLLM on CPUs")
    trainer.add_callback(StepClock(times, trainer.args.device))
    trainer.train()
    times.phases["train"] = [
        total - times.phases["generate"][index] - times.phases["publish"][index]
        for index, total in enumerate(times.step_s)
    ]
    times.write(answer, trainer.args.device)


def _timed_trainer_class() -> type:
    """Return TRL's trainer with its weight sync and its generation timed. A function: TRL may not be installed."""
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
        times: StepTimes

        def _generate(self, prompts: list[Any]) -> Any:
            began = time.monotonic()
            trainer: Any = self
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


def _ragged_rollouts(settings: StepSettings) -> Any:
    """Return a `rollout_func` that has each completion written to its own length."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        lengths = settings.lengths(trainer.state.global_step)[first : first + len(prompts)]
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
