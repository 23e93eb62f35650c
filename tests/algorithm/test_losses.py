"""The table of losses: token weights and the clipped surrogate, values and gradients, against explicit loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.losses import LOSSES, LossSettings
from shoal.algorithm.losses.clipped import clipped_surrogate

PLAIN = LossSettings(epsilon=0.2, epsilon_high=0.28, delta=None, importance_sampling_level="token")
TWO_SIDED = LossSettings(epsilon=0.2, epsilon_high=0.28, delta=3.0, importance_sampling_level="token")
GSPO = LossSettings(epsilon=0.2, epsilon_high=0.28, delta=None, importance_sampling_level="sequence")

step = st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12)
token = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2), st.integers(0, 2))


def weights(loss_type: str, sequences: list[tuple[int, bool]]) -> np.ndarray:
    """Token weights of sequences given as (length, in the loss)."""
    lengths = np.array([length for length, _ in sequences], dtype=np.int64)
    return LOSSES[loss_type].token_weights(lengths, np.array([inside for _, inside in sequences], dtype=np.bool_))


def naive(
    old: list[float], policy: list[float], advantages: list[float], index: list[int], how: LossSettings
) -> list[float]:
    """The clipped surrogate, token by token."""
    losses = []
    for n in range(len(old)):
        members = (
            [n] if how.importance_sampling_level == "token" else [i for i in range(len(old)) if index[i] == index[n]]
        )
        ratio = math.exp(sum(policy[i] - old[i] for i in members) / len(members))
        clipped = min(max(ratio, 1 - how.epsilon), 1 + how.epsilon_high)
        bounded = ratio if how.delta is None else min(ratio, how.delta)
        losses.append(-min(bounded * advantages[n], clipped * advantages[n]))
    return losses


@settings(deadline=None, max_examples=80)
@given(st.lists(token, max_size=10), st.sampled_from([PLAIN, TWO_SIDED, GSPO]))
def test_the_clipped_surrogate_agrees_with_a_loop(
    tokens: list[tuple[float, float, float, int]], how: LossSettings
) -> None:
    old, policy, advantages = ([t[i] for t in tokens] for i in range(3))
    index = sorted(t[3] for t in tokens)
    result = clipped_surrogate(
        torch.tensor(policy, dtype=torch.float64),
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(index, dtype=torch.long),
        3,
        how,
    )
    expected = torch.tensor(naive(old, policy, advantages, index, how), dtype=torch.float64)
    torch.testing.assert_close(result.token_loss, expected, rtol=1e-9, atol=1e-12)


def gradient_at(ratio: float, advantage: float, how: LossSettings) -> float:
    """The gradient of one token's loss to its logprob."""
    policy = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    index = torch.zeros(1, dtype=torch.long)
    loss = clipped_surrogate(policy, zero, torch.tensor([advantage], dtype=torch.float64), index, 1, how).token_loss
    return torch.autograd.grad(loss.sum(), policy)[0].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "how", "expected"),
    [
        (1.1, 2.0, PLAIN, -2.2),  # within the bounds: ratio times advantage
        (1.27, 2.0, PLAIN, -2.54),  # below 1 + epsilon_high, though above 1 + epsilon
        (1.3, 2.0, PLAIN, 0.0),  # too likely already
        (0.7, 2.0, PLAIN, -1.4),  # a good token may come back however far it fell
        (0.7, -2.0, PLAIN, 0.0),  # unlikely enough
        (5.0, -2.0, PLAIN, 10.0),  # a bad token that became likely is pushed down without bound
        (5.0, -2.0, TWO_SIDED, 0.0),  # ... except with delta
        (2.9, -2.0, TWO_SIDED, 5.8),
    ],
)
def test_the_gradient_is_the_ratio_times_the_advantage_inside_the_bounds_and_zero_outside(
    ratio: float, advantage: float, how: LossSettings, expected: float
) -> None:
    assert gradient_at(ratio, advantage, how) == pytest.approx(expected, abs=1e-12)


def test_the_sequence_level_gradient_is_shared_by_the_tokens_of_the_sequence() -> None:
    policy = torch.tensor([-0.9, -1.1, -1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.1, -1.2], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    result = clipped_surrogate(policy, old, advantages, torch.tensor([0, 0, 1]), 2, GSPO)
    result.token_loss.sum().backward()  # type: ignore[no-untyped-call]
    first, second = math.exp(0.05), math.exp(0.2)
    torch.testing.assert_close(result.ratio.detach(), torch.tensor([first, first, second], dtype=torch.float64))
    assert policy.grad is not None
    # two tokens, each with ratio = exp(mean), whose derivative to either logprob is ratio / 2
    torch.testing.assert_close(policy.grad, torch.tensor([-first, -first, -3 * second], dtype=torch.float64))


def test_clipping_is_reported_only_where_it_takes_the_gradient_away() -> None:
    ratios = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    result = clipped_surrogate(ratios.log(), torch.zeros(5), advantages, torch.zeros(5, dtype=torch.long), 1, PLAIN)
    assert result.clipped_low.tolist() == [False, True, False, False, False]
    assert result.clipped_high.tolist() == [False, False, True, False, False]


@settings(deadline=None)
@given(step)
def test_dapo_weights_are_one_over_the_tokens_in_the_loss(sequences: list[tuple[int, bool]]) -> None:
    total = sum(length for length, inside in sequences if inside)
    expected = [1 / total if inside and length else 0.0 for length, inside in sequences]
    assert weights("dapo", sequences).tolist() == expected


@settings(deadline=None)
@given(step)
def test_grpo_weights_give_every_sequence_of_the_step_the_same_say(sequences: list[tuple[int, bool]]) -> None:
    result = weights("grpo", sequences)
    for weight, (length, inside) in zip(result, sequences, strict=True):
        assert weight * length == pytest.approx(1 / len(sequences) if inside and length else 0.0)


def test_masked_sequences_count_in_the_mean_of_grpo_but_not_in_that_of_dapo() -> None:
    sequences = [(4, True), (6, False)]
    assert weights("grpo", sequences).tolist() == [1 / 8, 0]
    assert weights("dapo", sequences).tolist() == [1 / 4, 0]


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("sequences", [[], [(3, False)], [(0, True), (0, True)]])
def test_a_step_without_a_token_in_the_loss_has_weights_of_zero(
    loss_type: str, sequences: list[tuple[int, bool]]
) -> None:
    assert weights(loss_type, sequences).tolist() == [0.0] * len(sequences)
