"""The estimate of a trainer's memory against what real optimizer steps of `GRPOTrainer` allocate on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from shoal import GRPOConfig
from shoal.placement.architecture import architecture_from_config
from shoal.placement.trainer_memory import TrainerSetup, estimate_trainer_memory
from shoal.testing import tiny_tokenizer
from shoal.testing.trainer import MadeUpTrainer

NUM_SEQUENCES, LENGTH, PROMPT = 8, 96, 1
MICRO_BATCH = NUM_SEQUENCES // 2 * LENGTH
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
}
TOLERANCE = 0.15


def _peak(prof: profile) -> int:
    """Return the most bytes that were allocated at once since the profiler began."""
    now = most = 0
    for event in prof.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _trainer(tmp_path: Any, model: Any, *, bf16: bool, checkpoints: bool, lora: bool, keeps_logits: bool) -> Any:
    from peft import LoraConfig

    has_setting = "fused_logprobs" in {declared.name for declared in fields(GRPOConfig)}
    if not keeps_logits and not has_setting:
        pytest.skip("this version always keeps logits")
    fused: dict[str, Any] = {"fused_logprobs": not keeps_logits} if has_setting else {}
    trainer = MadeUpTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=bf16,
            gradient_checkpointing=checkpoints,
            per_device_train_batch_size=NUM_SEQUENCES,
            num_generations=2,
            max_completion_length=LENGTH - PROMPT,
            max_tokens_per_micro_batch=MICRO_BATCH,
            max_steps=2,
            save_strategy="no",
            **fused,
        ),
        train_dataset=Dataset.from_list([{"prompt": letter} for letter in "abcdefgh"]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.lengths = ((PROMPT, LENGTH - PROMPT),) * NUM_SEQUENCES
    return trainer


def _measure(train: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        train()
    return _peak(prof)


@pytest.mark.parametrize(
    ("family", "bf16", "checkpoints", "lora", "keeps_logits"),
    [
        ("qwen3", False, True, False, True),
        ("llama", False, False, False, True),
        ("qwen3", True, True, False, True),
        ("llama", False, True, True, True),
        ("qwen3", False, True, False, False),
    ],
    ids=["checkpoints", "keeps everything", "bf16", "adapter", "fused"],
)
def test_the_estimate_is_within_15_percent_of_what_steps_allocate(
    family: str, bf16: bool, checkpoints: bool, lora: bool, keeps_logits: bool, tmp_path: Any
) -> None:
    config = CONFIG_MAPPING[family](**SHAPE, tie_word_embeddings=True, max_position_embeddings=2048)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = AutoModelForCausalLM.from_config(config)
        trainer = _trainer(tmp_path, model, bf16=bf16, checkpoints=checkpoints, lora=lora, keeps_logits=keeps_logits)
        # The weights exist before the profiler looks; gradients, moments and all the rest do not.
        weights = sum(value.nbytes for value in trainer.model.parameters())
        measured = weights + _measure(trainer.train)
    finally:
        torch.set_num_threads(before)
    setup = TrainerSetup(
        method="lora" if lora else "full",
        lora_rank=8,
        precision="bf16" if bf16 else "fp32",
        checkpoints=checkpoints,
        compiled=False,
        micro_batch_tokens=MICRO_BATCH,
        is_masked=True,
        keeps_logits=keeps_logits,
    )
    found = estimate_trainer_memory(architecture_from_config(config.to_dict()), setup)
    print(f"{family}: measured {measured / 1e6:.1f} MB, estimated {found.total / 1e6:.1f} MB; {found}")
    assert found.weights == weights
    assert found.total == pytest.approx(measured, rel=TOLERANCE)
    # And the part that is not the same for every trainer by itself: what a step adds to weights and optimizer.
    assert found.total - found.resting == pytest.approx(measured - found.resting, rel=TOLERANCE)
