"""Optimizer steps of a real trainer, and what its optimizer saw; with torchrun, on several processes, in any sharding.

    python one_step.py CASES.json FOLDER

The rollouts are the exact engine's, their logprobs moved a little, as another engine's would differ. They come from a
copy of the model as it is before the first step: a sharded model cannot be asked by one process alone.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from shoal import GRPOConfig
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer, reference_rollouts
from shoal.trainer.rollouts import Rollouts
from shoal.types import MicroBatch, Rollout, ScoredGroup

LEARNING_RATE = 0.5
# One prompt is long: two processes then get very different numbers of sequences, and one of them needs fillers.
PROMPTS = ("x" * 60, "abc", "hello", "z")
# So many that about half of the completions end before they are cut.
STOP_TOKENS = list(range(2, 60))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to take.

    Attributes:
        name: Of its results.
        settings: Of the run, besides the common ones.
        moved: Whether the policy has left its reference when the step begins.
        ends: Whether completions may end before they are cut.
        equal: A prompt, by its place, whose completions all get the same reward; None for none.
        broken: What is done wrong: `micro_batch_mean`, `rank_mean`, `drops_one`, a key of `FAILING`, or None.
        dtype: Of the weights.
        fsdp2: Entries of the FSDP plugin of accelerate; None for no FSDP.
        lora: Whether an adapter is trained: None, `lora`, or `qlora` over weights of 4 bits.
        resume: The checkpoint to go on from, `CASE/checkpoint-N`.
        save: Whether the trained model is saved at the end, in `final`.
        device: What is trained on. On GPUs accelerate shards by itself, as its environment says; `fsdp2` is for CPUs.
    """

    name: str
    settings: dict[str, Any]
    moved: bool = False
    ends: bool = True
    equal: int | None = None
    broken: str | None = None
    dtype: str = "float64"
    fsdp2: dict[str, Any] | None = None
    lora: str | None = None
    resume: str | None = None
    save: bool = False
    device: Literal["cpu", "cuda"] = "cpu"


def make_model(*, ends: bool = True, dtype: str = "float64", lora: str | None = None) -> Any:
    """The policy before anything."""
    model = tiny_model(dtype=getattr(torch, dtype))
    if lora is not None:
        model = adapted(quantised(model) if lora == "qlora" else model)
    if ends:
        model.generation_config.eos_token_id = STOP_TOKENS
    return model


def quantised(model: Any) -> Any:
    """The same model with weights of 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        # In a group of processes, the first one alone would write with the model's own save_pretrained.
        model.config.save_pretrained(folder)
        save_file({name: value.detach() for name, value in model.named_parameters()}, f"{folder}/model.safetensors")
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=model.dtype, bnb_4bit_quant_storage=model.dtype
            ),
        )


def adapted(model: Any) -> Any:
    """The model under an adapter that changes it already."""
    from peft import LoraConfig, get_peft_model

    kind = model.dtype
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = (0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)).to(kind)
    return model


def move(model: Any) -> None:
    """Move all weights a little, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


def spoil(model: Any) -> None:
    """Leave in the weights what ranks other than 0 have of a model that rank 0 alone has loaded: anything."""
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(7.0)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Anything that differs between completions."""
    return [sum(ids) / (100.0 * len(ids)) for ids in completion_ids]


def equal_reward(place: int) -> Any:
    """The same reward for all completions of one prompt."""

    def reward_but_one(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [
            0.5 if prompt == PROMPTS[place] else value
            for prompt, value in zip(prompts, reward(completion_ids), strict=True)
        ]

    return reward_but_one


def failing_reward(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
    """Passes the check before training, fails in it."""
    if trainer_state is not None:
        raise ValueError("this reward fails in training")
    return [0.0] * len(completion_ids)


def fails_on_a_group(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
    """Fails on the second prompt."""
    if prompts[0] == PROMPTS[1]:
        raise ValueError("this reward fails on a group")
    return reward(completion_ids)


def fails_on_a_sample(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
    """Fails on the middle one of the second prompt's three completions."""
    rewards = reward(completion_ids)
    return [rewards[0], float("nan"), *rewards[2:]] if prompts[0] == PROMPTS[1] else rewards


FAILING = {"reward": failing_reward, "group": fails_on_a_group, "sample": fails_on_a_sample}


class OneStepTrainer(ReferenceTrainer):
    """Keeps the groups it trained on and counts micro-batches; `broken` spoils the loss."""

    broken: str | None = None
    fsdp2: dict[str, Any] | None = None
    written: dict[Any, tuple[ScoredGroup, ...]]

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and have it shard: of itself, it leaves FSDP out on CPUs (`check_sharding`)."""
        super().create_accelerator_and_postprocess()
        if self.fsdp2 is not None:
            settings = {"state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "transformer_based_wrap"} | self.fsdp2
            if settings.get("cpu_offload"):
                settings["cpu_offload"] = CPUOffloadPolicy(pin_memory=False)  # there is no GPU to pin it for
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
            if self.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(self.accelerator.mixed_precision)
            # Each new view of the state is filled in from accelerate's lower one, so both must say so.
            for state in (self.accelerator.state, PartialState()):
                state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    def _start_rollouts(self) -> Rollouts:
        return reference_rollouts(self, self.writer)

    def score(self, prompts: Any, *, seed_step: int, **keywords: Any) -> tuple[ScoredGroup, ...]:
        if seed_step not in self.written:
            groups = super().score(prompts, seed_step=seed_step, **keywords)
            self.written[seed_step] = tuple(
                replace(group, rollouts=tuple(map(_disagreeing, group.rollouts))) for group in groups
            )
        self.groups = self.written[seed_step]
        self.all_groups = [*getattr(self, "all_groups", []), self.groups]
        return self.groups

    def compute_loss(self, model: Any, inputs: MicroBatch, *args: Any, **keywords: Any) -> torch.Tensor:
        self.micro_batches = [*getattr(self, "micro_batches", []), inputs]
        if self.broken == "micro_batch_mean":
            counts = (inputs.loss_weights != 0).float()
            inputs = replace(inputs, loss_weights=counts / counts.sum().clamp(min=1))
        # Not the first: it is a completion that the correction for the engine's logprobs has masked.
        if self.broken == "drops_one" and self.args.process_index == 0 and len(self.micro_batches) == 2:
            inputs = replace(inputs, loss_weights=torch.zeros_like(inputs.loss_weights))
        loss = super().compute_loss(model, inputs, *args, **keywords)
        return loss / self.args.world_size if self.broken == "rank_mean" else loss


class KeepGradients(TrainerCallback):  # type: ignore[misc]
    """Copies the gradients at the last moment before the optimizer uses them."""

    gradients: dict[str, torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.gradients is None:
            self.gradients = {
                plain_name(name): whole(value.grad)
                for name, value in model.named_parameters()
                if value.requires_grad and value.grad is not None  # DeepSpeed has taken its step already
            }


def plain_name(name: str) -> str:
    """The parameter's name without what wrappers put into it."""
    return name.removeprefix("module.").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def whole(value: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU of all of a tensor that may be in parts, and on a GPU. All ranks call it."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().to("cpu", copy=True)
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().to("cpu", copy=True)


def meet_for_deepspeed() -> dict[str, Any]:
    """Have the processes meet over gloo, and return what tells transformers that they have.

    Of itself, accelerate has DeepSpeed's processes meet on GPUs only; on CPUs each takes itself for the only one, which
    `check_sharding` refuses.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo" if "LOCAL_RANK" in os.environ else None)
    return {"use_configured_state": True}


def take_step(case: Case, output_dir: Path, written: dict[Any, Any] | None = None) -> dict[str, Any]:
    """Take the step, or as many as the settings say, and return what happened.

    Args:
        case: What to do.
        output_dir: Of the run.
        written: The groups of each step that other cases with the same prompts, sampling and copy have had written.
    """
    model = make_model(ends=case.ends, dtype=case.dtype, lora=case.lora)
    writer, kept = copy.deepcopy(model), KeepGradients()
    if (case.fsdp2 or {}).get("cpu_ram_efficient_loading") and os.environ.get("RANK", "0") != "0":
        spoil(model)
    settings = {
        "output_dir": str(output_dir),
        "report_to": "none",
        # accelerate leaves DeepSpeed out where the CPU is asked for
        "use_cpu": case.device == "cpu" and "deepspeed" not in case.settings,
        "bf16": False,
        "num_generations": 3,
        "max_completion_length": 6,
        "shuffle_dataset": False,
        "max_steps": 1,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "disable_tqdm": False,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": 12
        // (int(os.environ.get("WORLD_SIZE", "1")) * int(case.settings.get("gradient_accumulation_steps", 1))),
    }
    if case.device == "cpu":
        for name in ("FSDP", "DEEPSPEED"):  # accelerate leaves them behind, and would shard the next case so too
            os.environ.pop(f"ACCELERATE_USE_{name}", None)
        if "deepspeed" in case.settings:
            settings["accelerator_config"] = meet_for_deepspeed()
    trainer_type = type("CaseTrainer", (OneStepTrainer,), {"broken": case.broken, "fsdp2": case.fsdp2})
    trainer = trainer_type(
        model=model,
        reward_funcs=FAILING.get(str(case.broken), reward if case.equal is None else equal_reward(case.equal)),
        args=GRPOConfig(**settings | case.settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tiny_tokenizer(),
        callbacks=[kept],
    )
    trainer.writer, trainer.written = writer, {} if written is None else written
    if case.moved:
        move(model)
        move(writer)
    before = {name: whole(value) for name, value in model.named_parameters() if value.requires_grad}
    try:
        trainer.train(None if case.resume is None else str(output_dir.parent / case.resume))
        if case.save:
            trainer.save_model(str(output_dir / "final"))
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        trainer.close()
    after = {plain_name(name): whole(value) for name, value in trainer.model.named_parameters() if value.requires_grad}
    return {
        "groups": [_as_plain(group) for group in getattr(trainer, "groups", ())],
        "gradients": kept.gradients,
        "changes": {name: after[name] - value for name, value in before.items()},
        "num_micro_batches": len(trainer.micro_batches),
        "num_fillers": sum(not bool(batch.loss_weights.any()) for batch in trainer.micro_batches),
        "log": trainer.state.log_history[0],
        "all_groups": [[_as_plain(group) for group in groups] for groups in getattr(trainer, "all_groups", ())],
        "weights": after,
        "zero_stage": trainer.model_wrapped.zero_optimization_stage() if "deepspeed" in case.settings else None,
        "logs": trainer.state.log_history,
    }


def _disagreeing(rollout: Rollout) -> Rollout:
    """The same completion from an engine whose logprobs are a little off; how, follows from the tokens."""
    random = np.random.default_rng(rollout.token_ids.tolist())
    noise = random.normal(0.0, 0.2, len(rollout.token_ids)).astype(np.float32)
    return replace(rollout, rollout_logprobs=rollout.rollout_logprobs + noise)


def _as_plain(group: ScoredGroup) -> dict[str, Any]:
    return {
        "prompt": list(group.prompt.token_ids),
        "completions": [rollout.token_ids.tolist() for rollout in group.rollouts],
        "rollout_logprobs": [torch.from_numpy(rollout.rollout_logprobs).double() for rollout in group.rollouts],
        "was_cut": [rollout.finish_reason == "length" for rollout in group.rollouts],
        "rewards": group.rewards[:, 0].tolist(),
    }


def main() -> None:
    """Take every step of the list."""
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    written: dict[str, dict[Any, Any]] = {}
    for entry in cases:
        case = Case(**entry)
        # What decides about a step's completions, besides its number.
        kind = repr([case.dtype, case.lora, case.moved, case.ends, case.settings.get("temperature"), case.broken])
        result = take_step(case, folder / "runs" / case.name, written.setdefault(kind, {}))
        torch.save(result, folder / f"{case.name}.{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
