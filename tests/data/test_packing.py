"""Packing plans: everything exactly once, budgets kept, ranks in step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.packing import balance, first_fit_decreasing, plan_micro_batches

quick = settings(deadline=None, max_examples=100)
lengths_of_step = st.lists(st.integers(1, 100), max_size=30)
budget = st.integers(1, 120)


@quick
@given(lengths_of_step, budget)
def test_first_fit_holds_every_sequence_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = first_fit_decreasing(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens
    # No two of them would fit into one, or first-fit would have put them there.
    totals = sorted(sum(lengths[i] for i in batch) for batch in batches)
    assert len(totals) < 2 or totals[0] + totals[1] > max_tokens


def test_a_sequence_over_the_budget_is_alone() -> None:
    assert first_fit_decreasing([3, 50, 4, 1], max_tokens=8) == [[1], [0, 2, 3]]


@quick
@given(lengths_of_step, st.integers(1, 6))
def test_balanced_ranks_differ_by_no_more_than_one_sequence(lengths: list[int], num_ranks: int) -> None:
    ranks = balance(lengths, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(i for rank in ranks for i in rank) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in rank) for rank in ranks]
    assert max(totals) - min(totals) <= max(lengths, default=0)


def test_dealing_sequences_out_in_turn_would_not_balance() -> None:
    lengths = [100, 1] * 10
    in_turn = [sum(lengths[rank::2]) for rank in range(2)]
    assert max(in_turn) - min(in_turn) > 100  # the control of the test above


@quick
@given(lengths_of_step, st.integers(1, 6), budget)
def test_a_plan_holds_every_sequence_once_with_as_many_micro_batches_for_every_rank(
    lengths: list[int], num_ranks: int, max_tokens: int
) -> None:
    plan = plan_micro_batches(lengths, num_ranks, max_tokens)
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    for rank in plan:
        for batch in rank:
            assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= max_tokens


@quick
@given(lengths_of_step, st.integers(1, 6), budget)
def test_a_rank_gets_a_filler_only_when_its_other_micro_batches_cannot_be_split(
    lengths: list[int], num_ranks: int, max_tokens: int
) -> None:
    for rank in plan_micro_batches(lengths, num_ranks, max_tokens):
        assert all(batch for batch in rank) or all(len(batch) <= 1 for batch in rank)


@quick
@given(lengths_of_step, st.integers(1, 6), budget)
def test_a_plan_has_no_more_micro_batches_than_the_fullest_rank_needs(
    lengths: list[int], num_ranks: int, max_tokens: int
) -> None:
    needed = [len(first_fit_decreasing([lengths[i] for i in rank], max_tokens)) for rank in balance(lengths, num_ranks)]
    assert len(plan_micro_batches(lengths, num_ranks, max_tokens)[0]) == max(1, *needed)


def test_micro_batches_are_alike_instead_of_full_but_for_the_last() -> None:
    lengths = [574] * 256
    assert [len(batch) for batch in first_fit_decreasing(lengths, 49_152)] == [85, 85, 85, 1]
    assert [len(batch) for batch in plan_micro_batches(lengths, num_ranks=1, max_tokens=49_152)[0]] == [64] * 4
    # The budget goes first: the longest to the emptier one, in turn, would come to 3 + 2 + 2 and 3 + 2.
    assert plan_micro_batches([3, 3, 2, 2, 2], num_ranks=1, max_tokens=6) == (((0, 1), (2, 3, 4)),)


def test_a_rank_without_sequences_gets_fillers() -> None:
    assert plan_micro_batches([5, 5], num_ranks=3, max_tokens=10) == (((0,),), ((1,),), ((),))


def test_a_rank_with_few_long_sequences_keeps_pace_with_one_that_has_many() -> None:
    plan = plan_micro_batches([9, 3, 3, 3], num_ranks=2, max_tokens=3)
    assert plan == (((0,), (), ()), ((1,), (2,), (3,)))


@quick
@given(lengths_of_step, st.integers(1, 4), budget)
def test_plans_are_the_same_every_time(lengths: list[int], num_ranks: int, max_tokens: int) -> None:
    assert plan_micro_batches(lengths, num_ranks, max_tokens) == plan_micro_batches(
        tuple(lengths), num_ranks, max_tokens
    )
