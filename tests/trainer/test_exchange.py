"""What rank 0 tells the others arrives as it was; when it fails, all learn of it and none waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.trainer.exchange import Exchange

NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], Any]) -> Any:
    return load_script("exchange_script")


@pytest.fixture(scope="module", params=["gloo", "cuda:gloo"])
def outcomes(
    request: pytest.FixtureRequest, run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each process saw. That this returns at all shows that nobody was left waiting.

    A default group for GPUs alone, as NCCL's is, carries nothing here.
    """
    folder = tmp_path_factory.mktemp("exchange")
    ended = run_script("exchange_script", folder, request.param, num_processes=NUM_PROCESSES)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


def test_sequences_arrive_on_all_ranks_bit_for_bit(script: Any, outcomes: Any) -> None:
    sent = script.plain(script.make_sequences())
    assert [outcome["sequences"]["value"] for outcome in outcomes] == [sent] * NUM_PROCESSES
    assert sent[0] != sent[3]


def test_no_sequences_arrive_as_none(outcomes: Any) -> None:
    assert [outcome["no sequences"]["value"] for outcome in outcomes] == [[]] * NUM_PROCESSES


def test_plain_values_arrive_as_they_were(script: Any, outcomes: Any) -> None:
    assert [outcome["json"]["value"] for outcome in outcomes] == [script.VALUE] * NUM_PROCESSES
    assert [outcome["nothing"]["value"] for outcome in outcomes] == [None] * NUM_PROCESSES


def test_only_rank_zero_makes_anything(outcomes: Any) -> None:
    made = ["sequences", "no sequences", "json", "nothing", "not json", "not sequences", "after all that"]
    assert [outcome["calls"]["value"] for outcome in outcomes] == [made, []]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("own error", "RewardError", "reward function 'ü' raised"),
        ("error without text", "ValueError", ""),
        ("error with odd text", "ValueError", "?"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("not json", "TypeError", "not JSON serializable"),
        ("not sequences", "AttributeError", "token_ids"),
    ],
)
def test_rank_zero_raises_its_own_error_and_the_others_say_that_it_failed(
    outcomes: Any, name: str, error: str, text: str
) -> None:
    first, *others = (outcome[name] for outcome in outcomes)
    assert first["error"] == error and text in first["message"]
    for other in others:
        assert other["error"] == "RankZeroFailedError"
        assert "rank 0 failed" in other["message"] and error in other["message"] and text in other["message"]


def test_after_failures_the_ranks_still_understand_each_other(outcomes: Any) -> None:
    assert [outcome["after all that"]["value"] for outcome in outcomes] == ["still here"] * NUM_PROCESSES


def test_every_ranks_value_is_gathered_on_all_ranks_in_order(outcomes: Any) -> None:
    gathered = [{"rank": 0, "ü": ["", None]}, {"rank": 1, "ü": ["x" * 1000, None]}]
    assert [outcome["gathered"]["value"] for outcome in outcomes] == [gathered] * NUM_PROCESSES


def test_engines_that_come_back_are_refilled_by_all_ranks_while_rank_zero_works(outcomes: Any) -> None:
    sent = [["engine-0", "at engine-0", 7, 3], ["engine-1", "at engine-1", 7, 3]]
    noted = [["engine-0", 7], {"engine-1": "engine-1 holds something else"}]
    elsewhere = [[name, None, version, total] for name, _, version, total in sent]
    for name in ("come back", "come back and fail", "none comes back"):
        first, second = (outcome[name]["value"] for outcome in outcomes)
        assert (first[0], second[0]) == (sent, elsewhere)
        assert (first[1], second[1]) == (noted, None)
    assert [outcome["come back"]["value"][2] for outcome in outcomes] == [{"value": "the batch"}] * 2
    failed = [outcome["come back and fail"]["value"][2]["error"] for outcome in outcomes]
    assert failed == ["RewardError", "RankZeroFailedError"]
    for outcome in outcomes:  # one error for all, so that all save a checkpoint together
        said = outcome["none comes back"]["value"][2]
        assert said == {"error": "NoEngineError", "message": "no engine is left: engine-0 died"}


def test_sums_over_ranks_wrap_around_at_two_to_the_sixty_four(outcomes: Any) -> None:
    assert [outcome["summed"]["value"] for outcome in outcomes] == [[3, -2, 0]] * NUM_PROCESSES


def test_a_process_alone_needs_no_group_and_raises_what_was_raised(script: Any) -> None:
    exchange = Exchange(rank=0, world_size=1)
    assert script.plain(exchange.sequences(script.make_sequences)) == script.plain(script.make_sequences())
    assert exchange.json(lambda: {"a": 1}) == {"a": 1}
    assert exchange.gather_json((1, "ü")) == [[1, "ü"]]  # as JSON leaves it
    assert exchange.sum(torch.tensor([2**63 - 1])).tolist() == [2**63 - 1]
    assert (exchange.rank, exchange.num_ranks) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        exchange.sequences(lambda: [1 / 0])  # type: ignore[list-item]
