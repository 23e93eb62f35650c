"""A conversation's gradient is that of the policy's own tokens, given all that was said before each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shoal import GRPOConfig
from shoal.algorithm.objective import grpo_objective
from shoal.testing import tiny_model
from shoal.trainer.forward import packed_logprobs
from shoal.trainer.groups import judge, training_sequences
from shoal.trainer.step import micro_batches_of_rank, objective_settings
from shoal.types import Prompt, Rollout, ScoredGroup, Sequence

# Each piece with who wrote it; two conversations and a plain completion, as three samples of one prompt.
TALKS: list[list[tuple[list[int], bool]]] = [
    [([20, 21, 22], True), ([90, 91, 92, 93, 94, 95], False), ([30, 31], True)],
    [([40], True), ([96, 97], False), ([41, 42], True), ([98], False)],
    [([50, 51, 52, 53], True)],
]
PROMPT = (5, 6, 7)
REWARDS = [1.0, 0.0, 0.4]
SETTINGS: dict[str, Any] = {"vllm_importance_sampling_clip_max": 1.2}


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **SETTINGS | settings)


def group() -> ScoredGroup:
    """The conversations, with logprobs of the engine that are a little off and nonsense where it wrote nothing."""
    random = np.random.default_rng(0)
    rollouts = []
    model = tiny_model(dtype=torch.float64)
    for talk in TALKS:
        ids = [token for tokens, _ in talk for token in tokens]
        by_policy = np.array([mine for tokens, mine in talk for _ in tokens])
        logprobs = all_logprobs(model, ids).detach().numpy() + random.normal(0, 0.1, len(ids))
        rollouts.append(
            Rollout(
                token_ids=np.array(ids, dtype=np.int32),
                rollout_logprobs=np.where(by_policy, logprobs, 0.0).astype(np.float32),
                finish_reason="stop",
                weight_version=0,
                engine="e",
                by_policy=None if by_policy.all() else by_policy,
            )
        )
    return ScoredGroup(
        prompt=Prompt(row=0, prompt="p", token_ids=PROMPT, columns={}),
        rollouts=tuple(rollouts),
        completions=("c",) * 3,
        rewards=np.array(REWARDS)[:, None],
        extras={},
    )


def all_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)[range(len(ids)), ids]


def shoal_gradient(sequences: list[Sequence], max_tokens: int, **settings: Any) -> dict[str, torch.Tensor]:
    model, args = tiny_model(dtype=torch.float64), config(**settings)
    for micro_batch in micro_batches_of_rank(
        sequences, loss_type=args.loss_type, rank=0, num_ranks=1, max_tokens=max_tokens
    ):
        policy = packed_logprobs(model, micro_batch, temperature=1.0, keeps_logits=True).logprobs
        grpo_objective(
            micro_batch, policy, old_logprobs=None, ref_logprobs=None, settings=objective_settings(args)
        ).loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


def formula_gradient(scored: ScoredGroup, *, masked: bool, loss_type: str, level: str) -> dict[str, torch.Tensor]:
    """The papers' formula over the tokens of each conversation that count."""
    model = tiny_model(dtype=torch.float64)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    marks = [
        np.ones(len(rollout.token_ids), bool) if rollout.by_policy is None or not masked else rollout.by_policy
        for rollout in scored.rollouts
    ]
    num_tokens = sum(int(mark.sum()) for mark in marks)
    loss = torch.zeros((), dtype=torch.float64)
    for advantage, rollout, mark in zip(advantages, scored.rollouts, marks, strict=True):
        policy = all_logprobs(model, rollout.token_ids.tolist())[torch.from_numpy(mark)]
        gap = policy.detach() - torch.from_numpy(rollout.rollout_logprobs[mark]).double()
        correction = gap.sum().exp() * (gap.sum().exp() <= SETTINGS["vllm_importance_sampling_clip_max"])
        log_ratio = policy - policy.detach()
        ratio = (log_ratio.mean().expand_as(log_ratio) if level == "sequence" else log_ratio).exp()
        token_loss = -advantage * ratio * correction
        loss = loss + (token_loss.sum() / num_tokens if loss_type == "dapo" else token_loss.mean() / 3)
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


def largest_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((gradients[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_only_what_the_policy_wrote_has_a_gradient(loss_type: str, level: str, max_tokens: int) -> None:
    scored = group()
    sequences = training_sequences(judge([scored], [1.0], config()), config())
    found = shoal_gradient(sequences, max_tokens, loss_type=loss_type, importance_sampling_level=level)
    expected = formula_gradient(scored, masked=True, loss_type=loss_type, level=level)
    assert largest_error(found, expected) < 1e-5
    # The controls: tokens of the environment do have a gradient when nothing says whose they are.
    unmarked = [replace(sequence, by_policy=None) for sequence in sequences]
    blind = shoal_gradient(unmarked, max_tokens, loss_type=loss_type, importance_sampling_level=level)
    assert largest_error(blind, expected) > 1e-2
    everything = formula_gradient(scored, masked=False, loss_type=loss_type, level=level)
    assert largest_error(everything, expected) > 1e-2


def test_the_engines_logprobs_of_an_environments_tokens_do_not_matter() -> None:
    sequences = training_sequences(judge([group()], [1.0], config()), config())
    spoilt = [
        replace(s, rollout_logprobs=np.where(s.is_target, s.rollout_logprobs, np.float32(-50.0))) for s in sequences
    ]
    before, after = shoal_gradient(sequences, 1000), shoal_gradient(spoilt, 1000)
    assert all(torch.equal(before[name], after[name]) for name in before)
    also = [replace(s, rollout_logprobs=s.rollout_logprobs - np.float32(0.05)) for s in sequences]
    assert any(not torch.equal(before[name], value) for name, value in shoal_gradient(also, 1000).items())
