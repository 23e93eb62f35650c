"""Scored groups become training sequences and metrics without losing or inventing anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import GRPOConfig
from shoal.trainer.groups import group_metrics, judge, merge_logged, num_tokens, training_sequences
from shoal.types import Prompt, Rollout, ScoredGroup

rewards_or_none = st.floats(-10, 10) | st.just(float("nan"))


@st.composite
def steps(draw: st.DrawFn) -> tuple[ScoredGroup, ...]:
    """P groups of K completions with F rewards each, some of them missing."""
    num_prompts, num_completions, num_functions = (draw(st.integers(1, 4)) for _ in range(3))
    groups = []
    for row in range(num_prompts):
        lengths = draw(st.lists(st.integers(1, 5), min_size=num_completions, max_size=num_completions))
        values = draw(
            st.lists(
                st.lists(rewards_or_none, min_size=num_functions, max_size=num_functions),
                min_size=num_completions,
                max_size=num_completions,
            )
        )
        groups.append(
            make_group(row, values, lengths=lengths, ended=[draw(st.booleans()) for _ in range(num_completions)])
        )
    return tuple(groups)


def make_group(
    row: int, rewards: list[list[float]], *, lengths: list[int] | None = None, ended: list[bool] | None = None
) -> ScoredGroup:
    """A group whose token ids say where they stand."""
    lengths, ended = lengths or [2] * len(rewards), ended or [True] * len(rewards)
    rollouts = tuple(
        Rollout(
            token_ids=np.arange(100 * row + 10 * sample, 100 * row + 10 * sample + length, dtype=np.int32),
            rollout_logprobs=-np.arange(length, dtype=np.float32) - sample,
            finish_reason="stop" if ended[sample] else "length",
            weight_version=3,
            engine="engine-0",
        )
        for sample, length in enumerate(lengths)
    )
    return ScoredGroup(
        prompt=Prompt(row=row, prompt="p", token_ids=tuple(range(1000, 1001 + row)), columns={}),
        rollouts=rollouts,
        completions=("c",) * len(rollouts),
        rewards=np.array(rewards, dtype=np.float64),
        extras={},
    )


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", **settings)


@given(groups=steps(), masked=st.booleans())
@settings(deadline=None)
def test_each_completion_becomes_one_sequence_in_order(groups: tuple[ScoredGroup, ...], masked: bool) -> None:
    args = config(mask_truncated_completions=masked)
    judged = judge(groups, [1.0] * groups[0].rewards.shape[1], args)
    sequences = iter(training_sequences(judged, args))
    for row, group in enumerate(groups):
        for sample, rollout in enumerate(group.rollouts):
            sequence = next(sequences)
            assert sequence.token_ids.tolist() == [*group.prompt.token_ids, *rollout.token_ids.tolist()]
            assert sequence.token_ids.dtype == np.int64 and sequence.prompt_length == row + 1
            assert sequence.completion_length == len(rollout.token_ids)
            assert sequence.rollout_logprobs.tolist() == rollout.rollout_logprobs.tolist()
            assert sequence.advantage == judged.advantages.advantages[row, sample]
            assert sequence.in_loss == (not masked or rollout.finish_reason == "stop")
    assert next(sequences, None) is None


@given(groups=steps())
@settings(deadline=None)
def test_metrics_are_those_of_all_completions_of_the_step(groups: tuple[ScoredGroup, ...]) -> None:
    num_functions = groups[0].rewards.shape[1]
    names = [f"f{index}" for index in range(num_functions)]
    judged = judge(groups, [1.0] * num_functions, config())
    found = group_metrics(judged, names)

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    ended = [len(rollout.token_ids) for rollout in rollouts if rollout.finish_reason == "stop"]
    expected = {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended) if ended else 0,
        "completions/min_terminated_length": min(ended, default=0),
        "completions/max_terminated_length": max(ended, default=0),
    }
    columns: dict[str, list[float]] = {
        f"rewards/{name}": [float(row[index]) for group in groups for row in group.rewards]
        for index, name in enumerate(names)
    }
    for name, column in columns.items():
        known = [value for value in column if value == value]
        expected[f"{name}/mean"] = sum(known) / len(known) if known else float("nan")
        expected[f"{name}/std"] = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    totals = [float(np.nansum(row)) for group in groups for row in group.rewards if not np.isnan(row).all()]
    expected["reward"] = sum(totals) / len(totals) if totals else float("nan")
    expected["reward_std"] = float(np.std(totals, ddof=1)) if len(totals) > 1 else 0.0
    assert found.keys() == {*expected, "frac_reward_zero_std"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


def test_groups_that_teach_nothing_are_a_share_of_all_groups() -> None:
    groups = [make_group(0, [[0.1], [0.1], [0.1]]), make_group(1, [[0.0], [1.0], [0.0]])]
    judged = judge(groups, [1.0], config())
    assert group_metrics(judged, ["f"])["frac_reward_zero_std"] == 0.5
    assert judged.advantages.advantages[0].tolist() == [0.0, 0.0, 0.0]


def test_weights_and_scaling_of_rewards_follow_the_settings() -> None:
    groups = [make_group(0, [[1.0, 0.0], [0.0, 1.0]])]
    assert judge(groups, [3.0, 1.0], config(scale_rewards="none")).advantages.advantages.tolist() == [[1.0, -1.0]]
    assert judge(groups, [1.0, 3.0], config(scale_rewards="none")).advantages.advantages.tolist() == [[-1.0, 1.0]]
    scaled = judge(groups, [3.0, 1.0], config()).advantages.advantages[0]
    assert scaled == pytest.approx(np.array([1.0, -1.0]) / (np.sqrt(2.0) + 1e-4))


def test_prompts_are_counted_once_for_each_completion() -> None:
    groups = [make_group(0, [[0.0]] * 2, lengths=[3, 4]), make_group(2, [[0.0]] * 2, lengths=[1, 1])]
    assert num_tokens(groups) == (1 + 3) + (1 + 4) + (3 + 1) + (3 + 1)


def test_what_rewards_log_is_averaged_by_name() -> None:
    assert merge_logged([("a", 1.0), ("b", 5.0), ("a", 2.0)]) == {"a": 1.5, "b": 5.0}
    assert merge_logged([]) == {}
