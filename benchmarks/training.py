"""Time the training part of a step alone, with no engine: seconds, MFU and peak memory of optimizer steps.

    python benchmarks/training.py --model-shape 1.7b --completion-tokens 4032 --completions 64           # one GPU
    torchrun --nproc-per-node 2 benchmarks/training.py --model-shape 8b --completion-tokens 4032 --sharding fsdp2
    python benchmarks/training.py --device cpu --model-shape tiny --completion-tokens 100 --completions 16  # no GPU

The trainer is the real one, in bfloat16 over weights of `--dtype`; weights and completions are random. MFU is of 6
operations for each parameter and token, and attention, recomputation not counted, against the device's dense bfloat16
peak. An adapter's (`--lora-rank`) leaves out what computes the gradients of the weights that are not trained.
`--profile` prints what the GPU's time goes to in one step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, TrainerCallback

from shoal import GRPOConfig
from shoal.bench.shapes import SHAPES, qwen3_config, shape_name
from shoal.bench.step import FSDP2_ENVIRONMENT
from shoal.bench.step_report import step_flops
from shoal.bench.step_run import StepRun, trainer_arguments
from shoal.bench.step_settings import StepSettings, make_dataset, reward
from shoal.observe.summary import versions
from shoal.placement.gpu_kinds import find_gpu_kind
from shoal.testing import tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer
from shoal.trainer.attention import VARLEN, register_varlen, varlen_kernel
from shoal.trainer.blocks import find_blocks
from shoal.types import Sequence

_PROFILE_ROWS = 30


class RandomCompletionsTrainer(ReferenceTrainer):
    """Trains on random tokens, of the lengths that the settings say."""

    bench: StepSettings

    def _write_batch(self, number: int) -> list[Sequence]:
        step, settings = self.state.global_step, self.bench
        random = np.random.default_rng([settings.seed, step])
        vocabulary = SHAPES[settings.model_shape].vocabulary
        return [
            Sequence(
                token_ids=random.integers(3, vocabulary, settings.prompt_tokens + length),
                prompt_length=settings.prompt_tokens,
                advantage=float(random.normal()),
                rollout_logprobs=np.full(length, -np.log(vocabulary), np.float32),
                in_loss=True,
            )
            for length in settings.lengths(step)
        ]


class Profiler(TrainerCallback):  # type: ignore[misc]
    """Looks at one step after the warm-up, which is slower for it, and prints what took the device's time."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin before the step."""
        if state.global_step == self._step:
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print after it."""
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            averages = self._profile.key_averages()
            print(averages.table(sort_by="self_cuda_time_total", row_limit=_PROFILE_ROWS, max_name_column_width=90))
            self._profile = None


def main() -> None:
    """Train, and print the figures."""
    arguments = _arguments()
    if os.environ.get("RANK", "0") == "0":
        logging.basicConfig(format="%(message)s")
        logging.getLogger("shoal").setLevel(logging.INFO)  # what the trainer chooses, and when
    settings = StepSettings(
        model_shape=shape_name(arguments.model_shape),
        device=arguments.device,
        layout="colocated" if arguments.device == "cuda" else "dedicated",
        num_ranks=int(os.environ.get("WORLD_SIZE", "1")),
        num_prompts=arguments.completions // 8,
        completion_tokens=arguments.completion_tokens,
        is_ragged=arguments.ragged,
        steps=arguments.steps,
        warmup_steps=arguments.warmup_steps,
        sharding=arguments.sharding,
        checkpoints=not arguments.no_checkpoints,
        max_tokens_per_micro_batch=arguments.max_tokens_per_micro_batch,
    )
    if settings.sharding == "fsdp2":
        os.environ.update(FSDP2_ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-training-") as folder:
        found = _train(settings, arguments, Path(folder))
    if os.environ.get("RANK", "0") == "0":
        _report(settings, arguments, found)


def _train(settings: StepSettings, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    values = trainer_arguments(StepRun(parts=(settings,)), folder / "out") | {
        "per_device_train_batch_size": settings.completions_per_rank,
        "max_tokens_per_micro_batch": settings.max_tokens_per_micro_batch,
        "vllm_devices": "colocate" if settings.device == "cuda" else "cpu",
        "vllm_importance_sampling_correction": False,
        "torch_compile": arguments.compile == "whole",
        "regional_compilation": {"no": False, "blocks": True}.get(arguments.compile),
        "recompute_num_layers": arguments.recompute_num_layers,
        "model_init_kwargs": None,
    }
    if settings.device == "cuda":
        values |= {"vllm_enable_sleep_mode": False}
    adapter = LoraConfig(r=arguments.lora_rank, target_modules="all-linear") if arguments.lora_rank else None
    trainer: Any = RandomCompletionsTrainer(
        model=_random_model(settings, arguments.dtype, arguments.attention),
        reward_funcs=reward,
        args=GRPOConfig(**values),
        train_dataset=make_dataset(settings),
        processing_class=tiny_tokenizer(),
        peft_config=adapter,
    )
    trainer.bench = settings
    if arguments.profile:
        trainer.add_callback(Profiler(settings.warmup_steps))
    # It is held until training is over.
    others = torch.empty(int(arguments.others_gib * 2**30), dtype=torch.uint8, device=trainer.args.device)
    try:
        trainer.train()
    finally:
        trainer.close()
    seconds = [entry["seconds/train"] for entry in trainer.state.log_history if "seconds/train" in entry]
    return {
        "train_s": seconds[settings.warmup_steps + int(arguments.profile) :],
        "tokens_of_a_pass": trainer._limit.tokens,
        "recomputed": sum(block.gradient_checkpointing for block in find_blocks(trainer.model)),
        "is_fused": trainer._logprobs.is_fused,
        "attention": trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation,
        **(_memory(others.nbytes) if settings.device == "cuda" else {"peak_bytes": None}),
    }


def _memory(others_bytes: int) -> dict[str, int]:
    """Return what torch's allocator used and took of the GPU, and how often it had to give all back to find room."""
    stats = torch.cuda.memory_stats()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - others_bytes,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() - others_bytes,
        "alloc_retries": stats["num_alloc_retries"],
        "device_allocs": stats["num_device_alloc"],
    }


def _random_model(settings: StepSettings, dtype: str, attention: str | None) -> Any:
    """Return the model made on the spot: to read one of 8B from a disk would take longer than to train it."""
    kernel = varlen_kernel() if settings.device == "cuda" else None
    if kernel is not None:
        register_varlen(kernel)
    device = torch.device(
        settings.device, int(os.environ.get("LOCAL_RANK", "0")) if settings.device == "cuda" else None
    )
    torch.manual_seed(settings.seed)
    with device:
        return AutoModelForCausalLM.from_config(
            qwen3_config(SHAPES[settings.model_shape]),
            dtype=getattr(torch, dtype),
            attn_implementation=attention or ("sdpa" if kernel is None else VARLEN),
        )


def _report(settings: StepSettings, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    kind = find_gpu_kind(device)
    flops = step_flops(settings, trains_matrices=not arguments.lora_rank)
    seconds = statistics.median(found["train_s"])
    mfu = None if kind is None else flops / (seconds * settings.num_ranks * kind.flops)
    print(
        f"{settings.model_shape}, {settings.num_completions} completions of {settings.completion_tokens} tokens: "
        f"{seconds:.2f} s a step, MFU " + ("not known for this device" if mfu is None else f"{mfu:.1%}")
    )
    data = {"benchmark": "training", "train_s_median": seconds, "mfu": mfu, "training_flops": flops} | found
    data |= {"settings": vars(arguments), "device": device, "versions": versions(), "platform": platform.platform()}
    print(json.dumps(data))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model-shape", default="1.7b", help="one of shoal.bench.shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--completions", type=int, default=64, help="of a step, a multiple of 8")
    parser.add_argument("--completion-tokens", type=int, default=1024, help="after prompts of 64")
    parser.add_argument("--ragged", action="store_true", help="16 tokens to as many")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup-steps", type=int, default=1)
    parser.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--max-tokens-per-micro-batch", type=int, default=None)
    parser.add_argument("--no-checkpoints", action="store_true", help="keep all activations")
    parser.add_argument("--recompute-num-layers", type=int, default=None, help="Shoal's default: what memory asks for")
    parser.add_argument(
        "--compile", choices=("no", "blocks", "whole"), default=None, help="what torch.compile is given"
    )
    parser.add_argument("--others-gib", type=float, default=0.0, help="of the GPU's memory, as an engine beside has it")
    parser.add_argument("--lora-rank", type=int, default=0, help="train an adapter of all linear layers")
    parser.add_argument("--attention", help="transformers' name (default: torch's variable-length kernel on GPUs)")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
