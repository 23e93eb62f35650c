"""When an engine is given up."""

from __future__ import annotations

from shoal.rollout.watch import EngineWatch
from shoal.types import EngineReport


def report(num_tokens: int | None) -> EngineReport:
    return EngineReport(running=1, waiting=0, num_tokens=num_tokens)


def test_an_engine_that_writes_nothing_while_it_has_work_is_given_up_after_the_bound_and_not_before() -> None:
    watch = EngineWatch(10.0)
    assert watch.answered(report(5), in_flight=3, now=100.0) is None
    assert watch.answered(report(5), in_flight=3, now=109.9) is None
    assert watch.answered(report(5), in_flight=3, now=110.0) == "it has 3 samples to write and wrote nothing for 10 s"


def test_a_single_token_starts_the_clock_anew() -> None:
    watch = EngineWatch(10.0)
    for now, tokens in ((0.0, 5), (9.0, 6), (18.0, 7), (27.0, 8)):
        assert watch.answered(report(tokens), in_flight=3, now=now) is None
    assert watch.answered(report(8), in_flight=3, now=37.0) is not None


def test_an_idle_engine_is_never_given_up_for_writing_nothing() -> None:
    watch = EngineWatch(10.0)
    for now in range(0, 1000, 50):
        assert watch.answered(report(5), in_flight=0, now=float(now)) is None
    assert watch.answered(report(5), in_flight=1, now=955.0) is None  # and its clock starts with its work


def test_an_engine_that_does_not_say_what_it_writes_is_not_given_up_for_it() -> None:
    watch = EngineWatch(10.0)
    for now in range(0, 1000, 50):
        assert watch.answered(report(None), in_flight=3, now=float(now)) is None


def test_silence_counts_from_the_first_question_without_an_answer() -> None:
    watch = EngineWatch(10.0)
    assert watch.silent("refused", since=100.0, now=104.0) is None
    assert watch.silent("refused", since=105.0, now=109.0) is None
    assert watch.silent("refused", since=109.5, now=110.0) == "it did not answer for 10 s: refused"


def test_an_answer_ends_the_silence() -> None:
    watch = EngineWatch(10.0)
    assert watch.silent("refused", since=100.0, now=104.0) is None
    assert watch.answered(report(1), in_flight=0, now=105.0) is None
    assert watch.silent("refused", since=109.0, now=112.0) is None
    assert watch.silent("refused", since=112.0, now=119.0) is not None


def test_failures_in_a_row_are_too_many_at_the_third_and_a_sample_in_between_forgives_them() -> None:
    watch = EngineWatch(10.0)
    assert watch.failed("nonsense") is None and watch.failed("nonsense") is None
    watch.wrote()
    assert watch.failed("nonsense") is None and watch.failed("nonsense") is None
    assert "failed 3 times in a row" in (watch.failed("nonsense") or "")
