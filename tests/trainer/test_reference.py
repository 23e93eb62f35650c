"""The reference stays what the policy was."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

from shoal import GRPOConfig
from shoal.testing import tiny_model
from shoal.trainer.model import add_adapter
from shoal.trainer.reference import ReferencePolicy


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False} | settings)


def test_a_references_weights_stay_when_the_policy_is_trained() -> None:
    policy = tiny_model()
    reference = ReferencePolicy(policy)
    with torch.no_grad():
        policy.lm_head.weight += 1.0
    model, _ = reference.model(policy, policy)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), tiny_model().lm_head.weight)
    assert not any(value.requires_grad for value in model.parameters()) and not model.training


def test_an_adapters_reference_is_the_model_below_it() -> None:
    ids = torch.tensor([[5, 6, 7]])
    policy: Any = add_adapter(tiny_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False), config())
    model, context = ReferencePolicy(policy).model(policy, policy)
    with torch.no_grad():
        with context:
            reference = model(input_ids=ids).logits
        trained = policy(input_ids=ids).logits
        assert torch.equal(reference, tiny_model()(input_ids=ids).logits)
    assert not torch.equal(trained, reference)
