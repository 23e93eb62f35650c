"""The reference stays what the policy was."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig

from shoal import GRPOConfig
from shoal.errors import ConfigError
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


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_copy_computes_in_the_policys_precision(make_trainer: Any, spoilt: bool) -> None:
    trainer = make_trainer(bf16=True, beta=0.1, max_steps=1)
    if spoilt:
        trainer._reference._autocast = nullcontext
    trainer.train()
    distance = trainer.state.log_history[0]["kl"]
    assert distance > 1e-6 if spoilt else distance == 0


def test_an_adapter_stays_trainable_while_it_is_disabled() -> None:
    policy: Any = add_adapter(tiny_model(), LoraConfig(task_type="CAUSAL_LM"), config())
    trainable = [value for value in policy.parameters() if value.requires_grad]
    _, context = ReferencePolicy(policy).model(policy, policy)
    with context:
        assert trainable and all(value.requires_grad for value in trainable)
    with policy.disable_adapter():
        assert not any(value.requires_grad for value in trainable)


def test_a_model_that_zero_3_has_divided_is_loaded_again_and_not_copied() -> None:
    policy, again = tiny_model(), tiny_model(seed=1)
    policy.model.norm.weight.ds_id = 0
    with pytest.raises(ConfigError, match="Pass the model's path"):
        ReferencePolicy(policy)
    model, _ = ReferencePolicy(policy, reload=lambda: again).model(policy, policy)
    assert model is again and not any(value.requires_grad for value in again.parameters())


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
