"""The control routes of one engine, and calls that can be left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from shoal.errors import WeightSyncError
from shoal.testing.loopback import LoopbackEngine, LoopbackWorker
from shoal.testing.sleeping import HeldWeights, SleepingEngine
from shoal.weights.control import EngineControl
from shoal.weights.line import EngineLine, within
from shoal.wire.agreement import done_key, gave_up_key
from shoal.wire.rendezvous import host_store

HOST = "127.0.0.1"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def engine_of(*answers: dict[str, Any]) -> LoopbackEngine:
    """An engine whose workers answer so to `say`."""
    engine = LoopbackEngine("engine-0", [nn.Module() for _ in answers])
    for worker, answer in zip(engine.workers, answers, strict=True):
        worker.say = lambda answer=answer, **_: answer  # type: ignore[attr-defined]
    return engine


def test_every_workers_answer_comes_in_order(threads: ThreadPoolExecutor) -> None:
    control = EngineControl(engine_of({"value": 1}, {"value": [2]}), threads, 5)
    assert control.call("say", text="x") == [1, [2]]


def test_all_workers_that_failed_are_named(threads: ThreadPoolExecutor) -> None:
    control = EngineControl(engine_of({"error": "left"}, {"value": 1}, {"error": "no memory"}), threads, 5)
    with pytest.raises(WeightSyncError) as failure:
        control.call("say")
    assert str(failure.value) == ("engine-0 worker 0 failed at say: left; engine-0 worker 2 failed at say: no memory")


@pytest.mark.parametrize("answer", [None, 7, [], {}, {"results": None}, {"results": [7]}, {"results": [{}]}], ids=str)
def test_an_engine_that_answers_nonsense_is_an_error_that_names_it(answer: Any, threads: ThreadPoolExecutor) -> None:
    engine = engine_of()
    engine.post = lambda path, body, timeout_s: answer  # type: ignore[method-assign]
    control = EngineControl(engine, threads, 5)
    with pytest.raises(WeightSyncError, match="engine-0 answered say"):
        control.call("say")
    engine.post = lambda path, body, timeout_s: {"results": [], "pause_s": "x"}  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="engine-0 does not say how long"):
        control.receive(pauses=True, patience_s=1)


def test_receiving_pauses_first_and_waits_as_long_as_it_is_told(threads: ThreadPoolExecutor) -> None:
    engine = engine_of()
    for worker in range(2):
        engine.workers.append(LoopbackWorker(nn.Module(), worker))
        engine.workers[worker].shoal_receive = lambda worker=worker, **_: {"value": [worker]}  # type: ignore[method-assign]
    control = EngineControl(engine, threads, 0.1)
    assert control.receive(pauses=True, patience_s=5, attempt=1) == ([[0], [1]], 0.0)
    assert engine.is_paused and engine.called == ["/shoal/receive", "shoal_receive"]
    control.resume()
    assert not engine.is_paused
    control.receive(pauses=False, patience_s=5, attempt=2)
    assert not engine.is_paused
    engine.stalls_at.add("shoal_receive")
    with pytest.raises(WeightSyncError, match=r"engine-0.*0\.3 s"):
        control.receive(pauses=True, patience_s=0.3)
    engine.fails_at.add("/shoal/receive")
    with pytest.raises(WeightSyncError, match=r"engine-0 failed at /shoal/receive: .*told to fail"):
        control.receive(pauses=True, patience_s=5)


def test_resuming_an_engine_that_may_be_gone_raises_nothing(threads: ThreadPoolExecutor) -> None:
    engine = engine_of()
    engine.fails_at.add("/resume")
    EngineControl(engine, threads, 5).resume_if_possible()
    threads.shutdown()
    assert engine.called == ["/resume"]


def line(num_workers: int = 2, timeout_s: float = 0.5) -> EngineLine:
    return EngineLine(
        "engine-0",
        host_store(HOST, 60),
        rank=0,
        num_ranks=3,
        num_workers=num_workers,
        backend="gloo",
        host=HOST,
        device=torch.device("cpu"),
        timeout_s=timeout_s,
    )


def test_workers_come_after_the_ranks_and_those_that_are_late_are_named() -> None:
    here = line()
    assert [here.member(worker) for worker in range(2)] == [3, 4]
    here._store.set(done_key(1), "6")
    assert here.late_workers(6) == ["engine-0 worker 0"]
    assert here.late_workers(7) == ["engine-0 worker 0", "engine-0 worker 1"]  # that was an earlier publish
    here._store.set(gave_up_key(0), "7")
    assert here.late_workers(7) == ["engine-0 worker 1"]  # it is this one that the other has waited for


def test_only_where_memory_is_shared_ranks_are_preferred() -> None:
    here = line()
    here.prefer_own_device(["x", "y", "x"], ["y", "x"])
    assert here.preferred == (frozenset(), frozenset())
    here.backend = "ipc"
    here.prefer_own_device(["x", "y", "x"], ["y", "x"])
    assert here.preferred == (frozenset({1}), frozenset({0, 2}))


def test_a_line_that_has_not_joined_or_that_nobody_joins_is_an_error() -> None:
    here = line()
    with pytest.raises(WeightSyncError, match="engine-0 has not joined the weight group"):
        _ = here.transport
    began = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)tim|engine-0 to join"):
        here.join()
    assert time.monotonic() - began < 60
    here.close()


def test_a_call_is_left_behind_when_its_time_is_over_and_a_failed_one_raises_its_own_error() -> None:
    gate = threading.Event()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"waited 0\.2 s for a train"):
        within(0.2, lambda: gate.wait(300), "a train")
    assert time.monotonic() - began < 60
    gate.set()

    def fail() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        within(60, fail, "a train")
    assert within(60, lambda: 41 + 1, "an answer") == 42


def test_an_engine_that_sleeps_takes_its_memory_back_in_two_parts_and_others_are_only_resumed(
    threads: ThreadPoolExecutor,
) -> None:
    engine = SleepingEngine("engine-0", [HeldWeights(())])
    other = EngineControl(engine, threads, 5)
    other.wake_weights()
    other.resume()
    assert engine.called == ["/resume"]
    control = EngineControl(engine, threads, 5, sleeps=True)
    control.sleep(2)
    assert engine.asleep == {"weights", "kv_cache"}
    control.wake_weights()
    assert engine.asleep == {"kv_cache"} and engine.is_paused
    control.resume()
    assert engine.asleep == set() and not engine.is_paused
    control.wake_weights()  # awake already
    control.resume()
    wake = ["/wake_up?tags=weights", "/wake_up?tags=kv_cache", "/resume"]
    assert engine.called[1:] == ["/sleep?level=2", *wake, *wake]
    assert engine.asleep == set() and not engine.is_paused
    engine.stop()


def test_what_failed_in_a_sleep_is_named(threads: ThreadPoolExecutor) -> None:
    engine = SleepingEngine("engine-0", [HeldWeights(())])
    control = EngineControl(engine, threads, 0.2, sleeps=True)
    engine.fails_at |= {"/sleep?level=1", "/wake_up?tags=kv_cache"}
    with pytest.raises(WeightSyncError, match=r"putting to sleep engine-0 failed at /sleep\?level=1: .*told to fail"):
        control.sleep(1)
    with pytest.raises(WeightSyncError, match=r"/wake_up\?tags=kv_cache: .*told to fail.*offload_optimizer_during"):
        control.resume()
    engine.stop()
