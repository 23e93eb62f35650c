"""The objective: against loops in float64, independent of how a step is cut, deaf to what does not count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.losses import LOSSES, LossSettings
from shoal.algorithm.metrics import merge_metrics, named_metrics, pack_metrics, unpack_metrics
from shoal.algorithm.objective import CorrectionSettings, Objective, ObjectiveSettings, grpo_objective
from shoal.errors import ConfigError
from shoal.types import MicroBatch

CORRECTION = CorrectionSettings(mode="token_truncate", clip_min=None, clip_max=1.5)
SETTINGS = ObjectiveSettings(
    loss_type="dapo",
    loss=LossSettings(epsilon=0.2, epsilon_high=0.28, delta=None, importance_sampling_level="token"),
    beta=0.1,
    use_bias_correction_kl=True,
    correction=CORRECTION,
)
VARIANTS = [
    SETTINGS,
    dataclasses.replace(SETTINGS, loss_type="grpo", use_bias_correction_kl=False),
    dataclasses.replace(
        SETTINGS,
        loss_type="grpo",
        loss=dataclasses.replace(SETTINGS.loss, importance_sampling_level="sequence", delta=2.0),
        correction=CorrectionSettings(mode="sequence_mask", clip_min=0.4, clip_max=3.0),
    ),
    dataclasses.replace(SETTINGS, correction=None),
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence with all its logprobs, float64 on the policy's side as in a reference run."""

    policy: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    rollout: torch.Tensor
    advantage: float
    in_loss: bool


def make_rows(lengths: Sequence[int], in_loss: Sequence[bool], seed: int) -> list[Row]:
    """Sequences with logprobs that differ by some tenths, one engine logprob of the step missing."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, inside in zip(lengths, in_loss, strict=True):
        old = -2 * torch.rand(length, generator=generator, dtype=torch.float64)
        near = old + 0.3 * torch.randn(3, length, generator=generator, dtype=torch.float64)
        advantage = torch.randn(1, generator=generator, dtype=torch.float64).float().item()
        rows.append(Row(near[0], old, near[1], near[2].float(), advantage, inside))
    rows[0].rollout[0] = math.nan
    return rows


def token_weights(rows: Sequence[Row], loss_type: str) -> list[float]:
    """Weights of the whole step, rounded to the float32 that micro-batches hold."""
    lengths = torch.tensor([len(row.policy) for row in rows]).numpy()
    inside = torch.tensor([row.in_loss for row in rows]).numpy()
    return torch.from_numpy(LOSSES[loss_type].token_weights(lengths, inside)).float().tolist()


def micro_batch(rows: Sequence[Row], weights: Sequence[float]) -> MicroBatch:
    """A micro-batch of which only the parts that the objective reads are meaningful."""
    index = torch.cat([torch.full((len(row.policy),), i) for i, row in enumerate(rows)])
    unused = torch.zeros(len(index), dtype=torch.long)
    return MicroBatch(
        input_ids=unused,
        position_ids=unused,
        predictor_positions=unused,
        target_ids=unused,
        sequence_index=index,
        num_sequences=len(rows),
        advantages=torch.tensor([row.advantage for row in rows])[index],
        rollout_logprobs=torch.cat([row.rollout for row in rows]),
        loss_weights=torch.tensor(weights)[index],
    )


def objective(
    rows: Sequence[Row], weights: Sequence[float], how: ObjectiveSettings, policies: Sequence[torch.Tensor]
) -> Objective:
    """The objective of some sequences as one micro-batch, with gradients to `policies`."""
    return grpo_objective(
        micro_batch(rows, weights),
        torch.cat(list(policies)),
        old_logprobs=torch.cat([row.old for row in rows]),
        ref_logprobs=torch.cat([row.ref for row in rows]) if how.beta else None,
        settings=how,
        entropy=torch.cat([-row.old for row in rows]),
    )


def naive_loss(rows: Sequence[Row], how: ObjectiveSettings) -> float:
    """The loss of the whole step, with loops over sequences and tokens."""
    low, high = 1 - how.loss.epsilon, 1 + how.loss.epsilon_high
    total = 0.0
    for row, weight in zip(rows, token_weights(rows, how.loss_type), strict=True):
        length = len(row.policy)
        logs = [(p - o).item() for p, o in zip(row.policy, row.old, strict=True)]
        gaps = [0.0 if r.isnan() else (o - r.double()).item() for o, r in zip(row.old, row.rollout, strict=True)]
        for n in range(length):
            log_ratio = sum(logs) / length if how.loss.importance_sampling_level == "sequence" else logs[n]
            ratio = math.exp(log_ratio)
            bounded = ratio if how.loss.delta is None else min(ratio, how.loss.delta)
            cost = -min(bounded * row.advantage, min(max(ratio, low), high) * row.advantage)
            if how.correction is not None:
                gap = sum(gaps) if how.correction.mode.startswith("sequence") else gaps[n]
                trust, lower = math.exp(gap), how.correction.clip_min or 0.0
                upper = how.correction.clip_max or math.inf
                inside = lower <= trust <= upper
                cost *= trust if inside else 0.0 if how.correction.mode.endswith("mask") else upper
            far = (row.ref[n] - row.policy[n]).item()
            cost += how.beta * (math.exp(far) - far - 1) * (ratio if how.use_bias_correction_kl else 1)
            total += weight * cost
    return total


def gradients(
    rows: Sequence[Row],
    parts: Sequence[Sequence[int]],
    loss_of_part: Callable[[list[int], list[torch.Tensor]], torch.Tensor],
) -> tuple[float, list[torch.Tensor]]:
    """Sum the losses of the parts of a step, and give the gradient to each sequence's logprobs."""
    policies = [row.policy.clone().requires_grad_() for row in rows]
    loss = torch.stack([loss_of_part(list(part), policies) for part in parts]).sum()
    return loss.item(), list(torch.autograd.grad(loss, policies))


step = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(step, st.integers(0, 10**6), st.sampled_from(VARIANTS))
def test_the_loss_agrees_with_loops(sequences: list[tuple[int, bool, int]], seed: int, how: ObjectiveSettings) -> None:
    rows = make_rows([s[0] for s in sequences], [s[1] for s in sequences], seed)
    loss = objective(rows, token_weights(rows, how.loss_type), how, [row.policy for row in rows]).loss
    assert loss.item() == pytest.approx(naive_loss(rows, how), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(step, st.integers(0, 10**6), st.sampled_from(VARIANTS))
def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(
    sequences: list[tuple[int, bool, int]], seed: int, how: ObjectiveSettings
) -> None:
    rows = make_rows([s[0] for s in sequences], [s[1] for s in sequences], seed)
    weights = token_weights(rows, how.loss_type)
    parts = [[i for i, s in enumerate(sequences) if s[2] == part] for part in range(3)]

    def loss(part: list[int], policies: list[torch.Tensor]) -> torch.Tensor:
        return objective([rows[i] for i in part], [weights[i] for i in part], how, [policies[i] for i in part]).loss

    whole = gradients(rows, [range(len(rows))], loss)
    cut = gradients(rows, [part for part in parts if part], loss)
    assert cut[0] == pytest.approx(whole[0], rel=1e-12, abs=1e-13)
    for mine, theirs in zip(cut[1], whole[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_mean_per_micro_batch_does_depend_on_how_the_step_is_cut() -> None:
    """The control: what the weights with one denominator avoid."""
    rows = make_rows([1, 6, 2], [True] * 3, seed=0)

    def loss(part: list[int], policies: list[torch.Tensor]) -> torch.Tensor:
        mine = [rows[i] for i in part]
        return objective(mine, token_weights(mine, "dapo"), SETTINGS, [policies[i] for i in part]).loss / num_parts

    num_parts = 1
    whole = gradients(rows, [[0, 1, 2]], loss)
    num_parts = 2
    cut = gradients(rows, [[0], [1, 2]], loss)
    assert not torch.allclose(cut[1][0], whole[1][0], rtol=0.1)


def test_before_any_update_the_gradient_is_that_of_plain_policy_gradient() -> None:
    rows = make_rows([3, 2], [True, True], seed=1)
    policy = torch.cat([row.policy for row in rows]).requires_grad_()
    how = dataclasses.replace(SETTINGS, beta=0.0, correction=None)
    batch = micro_batch(rows, token_weights(rows, "dapo"))
    loss = grpo_objective(batch, policy, old_logprobs=None, ref_logprobs=None, settings=how).loss
    expected = -(batch.loss_weights.double() * batch.advantages)
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], expected, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-6)


def test_without_old_logprobs_the_correction_is_from_the_policy() -> None:
    rows = [Row(torch.tensor([-1.0]), torch.tensor([-9.0]), torch.zeros(1), torch.tensor([-1.25]), 1.0, True)]
    how = dataclasses.replace(SETTINGS, beta=0.0)
    policy = rows[0].policy.clone().requires_grad_()
    result = grpo_objective(micro_batch(rows, [1.0]), policy, old_logprobs=None, ref_logprobs=None, settings=how)
    assert result.loss.item() == pytest.approx(-math.exp(0.25))
    # the correction is a weight: it has no gradient of its own
    assert torch.autograd.grad(result.loss, policy)[0].item() == pytest.approx(-math.exp(0.25))


@pytest.mark.parametrize("poison", [math.nan, -math.inf, -1e30])
@pytest.mark.parametrize("how", VARIANTS)
def test_tokens_that_do_not_count_have_no_influence_whatever_they_are(how: ObjectiveSettings, poison: float) -> None:
    rows = make_rows([2, 3], [True, False], seed=3)
    spoilt = [rows[0], Row(rows[1].policy + poison, rows[1].old, rows[1].ref + poison, rows[1].rollout, 1.0, False)]
    weights = token_weights(rows, how.loss_type)
    results = []
    for variant in (rows, spoilt):
        policies = [row.policy.clone().requires_grad_() for row in variant]
        result = objective(variant, weights, how, policies)
        results.append((result.loss.item(), torch.autograd.grad(result.loss, policies), named_metrics(result.metrics)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1][0], results[1][1][0])
    assert results[1][1][1].tolist() == [0, 0, 0]
    assert results[0][2] == results[1][2]


@settings(deadline=None, max_examples=30)
@given(step, st.integers(0, 10**6), st.sampled_from(VARIANTS))
def test_merged_metrics_do_not_depend_on_how_the_step_is_cut(
    sequences: list[tuple[int, bool, int]], seed: int, how: ObjectiveSettings
) -> None:
    rows = make_rows([s[0] for s in sequences], [s[1] for s in sequences], seed)
    weights = token_weights(rows, how.loss_type)
    whole = objective(rows, weights, how, [row.policy for row in rows]).metrics
    each = [objective([r], [w], how, [r.policy]).metrics for r, w in zip(rows, weights, strict=True)]
    assert named_metrics(merge_metrics(each)) == pytest.approx(named_metrics(whole), rel=1e-9, abs=1e-12)


def test_metrics_have_the_known_values_under_trls_names() -> None:
    rows = [
        Row(
            policy=torch.tensor([-1.0, -1.0, -1.0]).double(),
            old=torch.tensor([-1.0, -1.5, -0.5]).double(),
            ref=torch.tensor([-1.0, -1.0, -2.0]).double(),
            rollout=torch.tensor([-1.25, math.nan, -1.5]),
            advantage=1.0,
            in_loss=True,
        ),
        Row(*(torch.zeros(1).double(),) * 3, rollout=torch.tensor([-7.0]), advantage=1.0, in_loss=False),
    ]
    how = dataclasses.replace(SETTINGS, use_bias_correction_kl=False)
    named = named_metrics(objective(rows, token_weights(rows, "dapo"), how, [row.policy for row in rows]).metrics)
    assert named == pytest.approx(
        {
            "entropy": 1.0,
            "kl": math.exp(-1) / 3,
            "clip_ratio/low_mean": 0.0,
            "clip_ratio/high_mean": 1 / 3,
            "clip_ratio/region_mean": 1 / 3,
            "sampling/sampling_logp_difference/mean": (0.25 + 1.0) / 2,
            "sampling/sampling_logp_difference/max": 1.0,
            "sampling/importance_sampling_ratio/min": 1.0,
            "sampling/importance_sampling_ratio/mean": (math.exp(0.25) + 1 + 1.5) / 3,
            "sampling/importance_sampling_ratio/max": 1.5,
        }
    )


def test_sequence_ratios_are_counted_once_a_sequence() -> None:
    rows = make_rows([1, 5], [True, True], seed=0)
    rows = [dataclasses.replace(row, rollout=row.old.float() - gap) for row, gap in zip(rows, (0.5, 0.0), strict=True)]
    metrics = objective(rows, [0.1, 0.1], VARIANTS[2], [row.policy for row in rows]).metrics
    assert metrics.num_ratios.item() == metrics.num_clips.item() == 2
    mean = named_metrics(metrics)["sampling/importance_sampling_ratio/mean"]
    assert mean == pytest.approx((math.exp(0.5) + 1) / 2, rel=1e-5)


def test_what_was_not_measured_is_not_logged() -> None:
    rows = make_rows([2], [False], seed=0)
    how = dataclasses.replace(SETTINGS, beta=0.0)
    metrics = objective(rows, [0.0], how, [row.policy for row in rows]).metrics
    assert named_metrics(metrics) == {}


def test_metrics_survive_being_packed_for_an_all_reduce() -> None:
    rows = make_rows([3, 2], [True, True], seed=5)
    metrics = objective(rows, token_weights(rows, "dapo"), SETTINGS, [row.policy for row in rows]).metrics
    packed = pack_metrics(metrics)
    assert packed.sums.dtype == packed.mins.dtype == packed.maxs.dtype == torch.float64
    assert (packed.sums.shape, packed.mins.shape, packed.maxs.shape) == ((11,), (1,), (2,))
    assert unpack_metrics(packed) == metrics


AGAINST_ENGINE = dataclasses.replace(SETTINGS, correction=None, old_from="rollout", beta=0.0)


def test_the_engines_logprobs_can_be_the_old_ones() -> None:
    rows = make_rows([3, 5], [True, True], seed=1)
    rows = [dataclasses.replace(row, rollout=torch.where(row.rollout.isnan(), 0.1, row.rollout)) for row in rows]
    batch = micro_batch(rows, [0.1, 0.2])
    policy = torch.cat([row.policy for row in rows])

    def loss(how: ObjectiveSettings, old: torch.Tensor | None) -> Objective:
        return grpo_objective(batch, policy, old_logprobs=old, ref_logprobs=None, settings=how)

    found = loss(AGAINST_ENGINE, None)
    plain = dataclasses.replace(AGAINST_ENGINE, old_from="policy")
    assert found.loss == loss(plain, batch.rollout_logprobs).loss
    assert found.loss != loss(plain, None).loss  # the control
    # What is logged as the gap between trainer and engine is still that.
    gap = (policy - batch.rollout_logprobs).abs().max().item()
    assert found.metrics.logprob_difference_max.item() == pytest.approx(gap)


def test_a_token_without_the_engines_logprob_counts_as_agreeing() -> None:
    (row,) = make_rows([4], [True], seed=2)
    unknown = dataclasses.replace(row, rollout=torch.full((4,), torch.nan))
    same = dataclasses.replace(row, rollout=row.policy.float())
    losses = [
        grpo_objective(
            micro_batch([each], [0.25]), each.policy, old_logprobs=None, ref_logprobs=None, settings=AGAINST_ENGINE
        ).loss.item()
        for each in (unknown, same)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != 0


def test_two_ways_to_account_for_the_engine_contradict_each_other() -> None:
    rows = make_rows([1], [True], seed=0)
    corrected = dataclasses.replace(AGAINST_ENGINE, correction=CORRECTION)
    for how, old in ((corrected, None), (AGAINST_ENGINE, rows[0].old)):
        with pytest.raises(ConfigError, match="old_logprobs"):
            grpo_objective(micro_batch(rows, [1.0]), rows[0].policy, old_logprobs=old, ref_logprobs=None, settings=how)


def test_a_loss_that_does_not_exist_is_refused() -> None:
    rows = make_rows([1], [True], seed=0)
    with pytest.raises(ConfigError, match=r"loss_type='ppo' is not a loss\. Use one of dapo, grpo"):
        objective(rows, [1.0], dataclasses.replace(SETTINGS, loss_type="ppo"), [rows[0].policy])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_beta_and_the_reference_logprobs_must_agree(beta: float) -> None:
    rows = make_rows([1], [True], seed=0)
    with pytest.raises(ConfigError, match=f"beta={beta}"):
        grpo_objective(
            micro_batch(rows, [1.0]),
            rows[0].policy,
            old_logprobs=None,
            ref_logprobs=None if beta else rows[0].ref,
            settings=dataclasses.replace(SETTINGS, beta=beta),
        )
