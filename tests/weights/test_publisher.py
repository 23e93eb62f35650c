"""The publisher on every trainer rank, against engines that differ from real ones in vLLM and HTTP alone.

Ranks are threads, workers are threads with plain modules; plans, stores, Gloo and digests are real.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from shoal.errors import EnginesLostError, WeightProofError, WeightSyncError
from shoal.testing.loopback import LoopbackEngine, LoopbackWorker
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.types import UNPROVEN, Interval, ParameterMeta, PublishReport
from shoal.vllm_plugin import receiver as receiver_module
from shoal.vllm_plugin.sink import ParameterSink
from shoal.weights import line as line_module
from shoal.weights import meeting as meeting_module
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.wire.agreement import ADAPTER, MODEL, Cargo, Verify
from shoal.wire.plan import Region, Slice, SlicePlan, dtype_name
from shoal.wire.schedule import Message

pytestmark = pytest.mark.usefixtures("plain_modules")

HOST = "127.0.0.1"
SOON_S = 60.0
"""At once, on a machine that has other work; publishes wait for longer, unless a test says so."""
SHAPES = {"q": (8, 6), "k": (8, 6), "down": (6, 8), "unused": (50,), "norm": (6,)}
Tensors = Mapping[str, torch.Tensor]


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Layer(nn.Module):
    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Shard(nn.Module):
    """One worker's part: q and k stacked and cut by rows, `down` cut by columns, `norm` whole and in bfloat16."""

    def __init__(self, rank: int = 0, tp: int = 1) -> None:
        super().__init__()
        self.rank, self.tp = rank, tp
        self.qk = Layer(16 // tp, 6)
        self.down = Layer(6, 8 // tp)
        self.norm = Layer(6, dtype=torch.bfloat16)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        size = 8 // self.tp
        for name, value in weights:
            if name in ("q", "k"):
                into = self.qk.weight.data.narrow(0, size * ("q", "k").index(name), size)
                into.copy_(value.narrow(0, self.rank * size, size))
            elif name == "down":
                self.down.weight.data.copy_(value.narrow(1, self.rank * size, size))
            elif name == "norm":
                self.norm.weight.data.copy_(value)

    def holds(self, tensors: Tensors) -> bool:
        wanted = Shard(self.rank, self.tp)
        wanted.load_weights(tensors.items())
        mine = dict(self.named_parameters())
        return all(torch.equal(mine[name], value) for name, value in wanted.named_parameters())


class Source:
    """One rank's part of a checkpoint that the test may change between publishes."""

    def __init__(self, now: Tensors, part: int = 0, num_parts: int = 1) -> None:
        self.now = now
        self._part, self._num_parts = part, num_parts
        self.fails: Callable[[], None] = lambda: None

    def metadata(self) -> tuple[ParameterMeta, ...]:
        return tuple(
            ParameterMeta(name=name, dtype=dtype_name(value.dtype), shape=tuple(value.shape))
            for name, value in self.now.items()
        )

    def held(self) -> dict[str, Interval]:
        """Rows, as FSDP2 cuts them."""
        runs = {}
        for name, value in self.now.items():
            row = value[0].numel()
            size = -(-len(value) // self._num_parts)
            start, stop = (min(len(value), size * (self._part + i)) * row for i in (0, 1))
            if start < stop:
                runs[name] = Interval(start, stop)
        return runs

    def in_place(self) -> frozenset[str]:
        return frozenset(self.now)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        held = self.held()
        for name, value in self.now.items():
            run = held.get(name, Interval(0, 0))
            yield name, value.flatten()[run.start : run.stop]
            self.fails()


@dataclass
class Site:
    """Engines, and one publisher of each rank."""

    engines: list[LoopbackEngine]
    num_ranks: int = 1
    is_sharded: bool = False
    verify: Verify = "digest"
    timeout_s: float = 120.0
    batch_bytes: int = 100
    publishers: list[WeightPublisher] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def close(self) -> None:
        for engine in self.engines:
            engine.leave()
        for publisher in self.publishers:
            publisher.close()

    def connect(self) -> None:
        for publisher in self.publishers:
            publisher.close()
        parts = self.num_ranks if self.is_sharded else 1
        self.sources = [Source(checkpoint(0), rank % parts, parts) for rank in range(self.num_ranks)]
        addresses = [EngineAddress(client=e, num_workers=len(e.workers), backend="gloo") for e in self.engines]

        def make(ranks: ThreadRanks) -> WeightPublisher:
            publisher = WeightPublisher(
                {MODEL: self.sources[ranks.rank]},
                addresses if ranks.rank == 0 else (),
                ranks=ranks,
                device=torch.device("cpu"),
                settings=PublishSettings(
                    host=HOST, timeout_s=self.timeout_s, verify=self.verify, batch_bytes=self.batch_bytes
                ),
            )
            publisher.connect()
            return publisher

        self.publishers = [unwrap(outcome) for outcome in on_ranks(self.num_ranks, make)]

    def outcomes(self, version: int) -> list[PublishReport | Exception]:
        """Change the weights and publish them; return what each rank returned or raised."""
        for source in self.sources:
            source.now = checkpoint(version)
        return on_ranks(self.num_ranks, lambda ranks: with_ranks(self.publishers[ranks.rank], ranks).publish(version))

    def publish(self, version: int) -> PublishReport:
        reports = [unwrap(outcome) for outcome in self.outcomes(version)]
        assert all(
            replace(report, seconds=0.0, phases={}) == replace(reports[0], seconds=0.0, phases={}) for report in reports
        )
        return reports[0]

    def come_back(self, index: int, engine: LoopbackEngine, version: int | None) -> list[Any]:
        """Put another engine in the place of one, and fill it alone, or only meet it if there is no version."""
        self.engines[index].leave()
        self.engines[index] = engine

        def act(ranks: ThreadRanks) -> Any:
            publisher = with_ranks(self.publishers[ranks.rank], ranks)
            address = EngineAddress(client=engine, num_workers=len(engine.workers), backend="gloo")
            own = address if ranks.rank == 0 else None
            if version is None:
                return publisher.admit(engine.name, own)
            return publisher.refill(engine.name, own, version)

        return on_ranks(self.num_ranks, act)

    def holds(self, version: int, engine: int) -> bool:
        return all(holds(worker, checkpoint(version)) for worker in self.engines[engine].workers)


def with_ranks(publisher: WeightPublisher, ranks: ThreadRanks) -> WeightPublisher:
    publisher._ranks = publisher.group.ranks = ranks
    return publisher


def unwrap(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def holds(worker: LoopbackWorker, tensors: Tensors) -> bool:
    assert isinstance(worker.model, Shard)
    return worker.model.holds(tensors)


def sink_of(worker: LoopbackWorker, cargo: Cargo = MODEL) -> ParameterSink:
    assert worker._shoal_receiver is not None
    return worker._shoal_receiver._intakes[cargo].sink


def breaks(worker: LoopbackWorker, target: str, monkeypatch: pytest.MonkeyPatch, *, before: str = "settle") -> None:
    """Flip a bit of a parameter once its first piece has arrived in it, before the sink is asked for something."""
    sink = sink_of(worker)
    method = getattr(sink, before)

    def flip_first(message: Any) -> Any:
        piece = sink._plan.slices[message.slice_index]
        if (piece.target, piece.target_region.offset, message.start) == (target, 0, 0):
            worker.model.get_parameter(target).data.view(torch.uint8).view(-1)[0] ^= 1
        return method(message)

    monkeypatch.setattr(sink, before, flip_first)


Make = Callable[..., Site]


@pytest.fixture
def connected() -> Iterator[Make]:
    """Make a site of two engines, the second of two workers, connected."""
    made: list[Site] = []

    def make(**changes: Any) -> Site:
        engines = [
            LoopbackEngine("engine-0", [Shard()]),
            LoopbackEngine("engine-1", [Shard(0, 2), Shard(1, 2)]),
        ]
        made.append(Site(engines, **changes))
        made[-1].connect()
        return made[-1]

    yield make
    for site in made:
        site.close()


# ---- what arrives ----


@pytest.mark.parametrize("batch_bytes", [40, 1 << 20])
@pytest.mark.parametrize(("num_ranks", "is_sharded"), [(1, False), (2, False), (2, True)], ids=str)
def test_every_worker_holds_what_the_trainer_has_after_each_publish(
    connected: Make, num_ranks: int, is_sharded: bool, batch_bytes: int
) -> None:
    site = connected(num_ranks=num_ranks, is_sharded=is_sharded, batch_bytes=batch_bytes)
    names = ["engine-0 worker 0", "engine-1 worker 0", "engine-1 worker 1"]
    assert [plan.worker for plan in site.publishers[-1].plans] == names
    shares = []
    for version in (1, 2, 3):
        assert not site.holds(version, 0) and not site.holds(version, 1)  # not before
        report = site.publish(version)
        assert site.holds(version, 0) and site.holds(version, 1)
        assert (report.version, report.num_workers, report.num_digests, report.lost) == (version, 3, 12, {})
        assert [engine.weight_version for engine in site.engines] == [version] * 2
        assert set(report.phases) == {"wake", "pause", "wire", "prove", "resume"}
        shares.append(sum(report.phases.values()) / report.seconds)
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) > 0.5  # not of each publish: a machine with other work may halt between two phases
    # float32 but for `norm`, which every worker has whole in bfloat16; nothing of what nobody wants.
    assert report.num_bytes == 2 * 4 * (48 + 48 + 48) + 3 * 2 * 6


@pytest.mark.parametrize("is_sharded", [False, True])
def test_both_ranks_send_about_half(connected: Make, is_sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    site = connected(num_ranks=2, is_sharded=is_sharded)
    sent = [0, 0]
    for rank, publisher in enumerate(site.publishers):
        send = publisher.group.senders[MODEL].send

        def counted(*args: Any, rank: int = rank, send: Any = send, **kwargs: Any) -> Any:
            report = send(*args, **kwargs)
            sent[rank] = report.num_bytes
            return report

        monkeypatch.setattr(publisher.group.senders[MODEL], "send", counted)
    assert site.publish(1).num_bytes == sum(sent)
    assert min(sent) > 0.3 * sum(sent)


def test_the_same_version_again_is_harmless_and_engines_are_paused_around_it(connected: Make) -> None:
    site = connected()
    site.publish(1)
    site.publish(1)
    assert site.holds(1, 0) and site.holds(1, 1)
    for engine in site.engines:
        publish = ["/shoal/receive", "shoal_receive", "/resume"]
        assert engine.called == ["shoal_meet", "shoal_join", *publish, *publish]
        assert not engine.is_paused


def test_the_prefix_cache_is_salted_anew_with_each_publish(connected: Make) -> None:
    site = connected()
    salts = []
    for version in (1, 1, 2):
        site.publish(version)
        assert site.engines[0].cache_salt == site.engines[1].cache_salt
        salts.append(site.engines[0].cache_salt)
    assert len(set(salts)) == 3 and all(salts)


# ---- the proof ----


@pytest.mark.parametrize(
    ("target", "source", "engine", "worker"),
    [("qk.weight", "q", 0, 0), ("norm.weight", "norm", 0, 0), ("down.weight", "down", 1, 1)],
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_flipped_bit_fails_the_proof_naming_parameter_worker_and_version(
    connected: Make,
    monkeypatch: pytest.MonkeyPatch,
    num_ranks: int,
    target: str,
    source: str,
    engine: int,
    worker: int,
) -> None:
    site = connected(num_ranks=num_ranks, is_sharded=True)
    site.publish(1)
    with monkeypatch.context() as patch:
        breaks(site.engines[engine].workers[worker], target, patch)
        first, *others = site.outcomes(2)
    assert isinstance(first, WeightProofError) and all(isinstance(other, Exception) for other in others)
    wanted = rf"engine-{engine} worker {worker} holds other values in {target} than the trainer has in {source} "
    assert re.match(wanted + r"\(version 2: digest", str(first))
    # The other engine is proven and goes on; both are resumed.
    assert [e.weight_version for e in site.engines] == [UNPROVEN if i == engine else 2 for i in range(2)]
    assert site.publishers[-1].live_engines == (f"engine-{1 - engine}",)
    wait_until(lambda: not any(e.is_paused for e in site.engines))
    assert site.publish(3).num_workers == 2 - engine and site.holds(3, 1 - engine)  # without the bad one
    site.connect()
    assert site.publish(4).num_workers == 3 and site.holds(4, engine)  # the control: without the flip it proves it


def test_two_slices_exchanged_in_the_trainers_plan_fail_the_proof(
    connected: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exchanging:
        @staticmethod
        def from_json(text: str) -> SlicePlan:
            plan = SlicePlan.from_json(text)
            slices = {piece.source: piece for piece in plan.slices}
            q, k = slices["q"], slices["k"]
            slices["q"] = replace(q, source="k", source_region=k.source_region)
            slices["k"] = replace(k, source="q", source_region=q.source_region)
            return replace(plan, slices=tuple(slices.values()))

    with monkeypatch.context() as patch:
        patch.setattr(meeting_module, "SlicePlan", Exchanging)
        site = connected()
    (failure,) = site.outcomes(1)
    assert isinstance(failure, WeightProofError) and "qk.weight than the trainer has in k " in str(failure)
    site.connect()
    assert site.publish(2).num_digests == 12  # the control


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_full_verification_sends_everything_back_and_names_what_differs(
    connected: Make, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    site = connected(verify="full", num_ranks=num_ranks, is_sharded=True)
    site.publish(1)
    assert site.holds(1, 0) and site.holds(1, 1)
    breaks(site.engines[1].workers[0], "down.weight", monkeypatch, before="held")
    failure, *_ = site.outcomes(2)
    assert isinstance(failure, WeightProofError)
    assert re.match(r"engine-1 holds other bits than the trainer sent of down \(version 2\)", str(failure))
    assert site.holds(2, 0) and site.engines[0].weight_version == 2


def test_without_verification_nothing_is_compared(connected: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    site = connected(verify="off")
    breaks(site.engines[1].workers[0], "down.weight", monkeypatch)
    report = site.publish(1)
    assert (report.num_digests, report.lost) == (0, {})
    assert site.holds(1, 0) and not site.holds(1, 1)


# ---- engines that fail ----


@pytest.mark.parametrize("what", ["/shoal/receive", "shoal_receive", "/resume"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_engine_that_fails_leaves_and_the_other_goes_on_with_the_new_version(
    connected: Make, what: str, num_ranks: int
) -> None:
    site = connected(num_ranks=num_ranks)
    site.publish(1)
    site.engines[1].fails_at.add(what)
    report = site.publish(2)
    assert list(report.lost) == ["engine-1"] and "told to fail" in report.lost["engine-1"]
    assert (report.num_workers, report.num_digests) == (1, 4 if what != "/resume" else 12)
    assert site.holds(2, 0)
    assert [engine.weight_version for engine in site.engines] == [2, UNPROVEN]
    assert {publisher.live_engines for publisher in site.publishers} == {("engine-0",)}
    num_calls = len(site.engines[1].called)
    assert site.publish(3).lost == {} and site.holds(3, 0)
    assert not [name for name in site.engines[1].called[num_calls + 1 :] if name != "/resume"]  # it is left alone
    # Healed, it is met again.
    site.engines[1].fails_at.clear()
    site.connect()
    assert site.publish(4).num_workers == 3 and site.holds(4, 1)
    assert not site.engines[1].is_paused


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_that_fails_in_the_middle_is_named_with_its_reason(
    connected: Make, monkeypatch: pytest.MonkeyPatch, worker: int
) -> None:
    site = connected(num_ranks=2, is_sharded=True)

    def fail(message: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(sink_of(site.engines[1].workers[worker]), "settle", fail)
    began = time.monotonic()
    report = site.publish(1)
    assert time.monotonic() - began < SOON_S
    assert list(report.lost) == ["engine-1"] and site.holds(1, 0)
    assert f"engine-1 worker {worker} failed at shoal_receive: MemoryError: no room" in report.lost["engine-1"]


@pytest.mark.parametrize("what", ["/shoal/receive", "shoal_receive", "/resume"])
def test_an_engine_that_stalls_is_named_within_the_time_out(connected: Make, what: str) -> None:
    site = connected(timeout_s=4)
    site.publish(1)
    site.engines[0].stalls_at.add(what)
    began = time.monotonic()
    report = site.publish(2)
    assert time.monotonic() - began < SOON_S
    assert list(report.lost) == ["engine-0"] and re.search(r"engine-0.* 4 s", report.lost["engine-0"])
    assert site.holds(2, 1) and not site.engines[1].is_paused


@pytest.mark.parametrize("what", ["shoal_receive", "/resume"])
def test_an_engine_that_dies_and_whose_server_goes_on_is_not_waited_for(connected: Make, what: str) -> None:
    site = connected(timeout_s=12)
    site.publish(1)
    site.engines[0].stalls_at.add(what)
    site.engines[0].is_dead = True
    began = time.monotonic()
    report = site.publish(2)
    assert time.monotonic() - began < 12  # half of it, on an idle machine
    assert "engine-0 has died in the middle of a publish" in report.lost["engine-0"]
    assert site.holds(2, 1)


def test_a_worker_that_stalls_is_named(connected: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    site = connected(timeout_s=4)
    site.publish(1)
    gate = threading.Event()
    sink = sink_of(site.engines[1].workers[1])
    finish = sink.finish
    monkeypatch.setattr(sink, "finish", lambda: (gate.wait(300), finish())[1])
    began = time.monotonic()
    report = site.publish(2)
    assert time.monotonic() - began < SOON_S
    gate.set()
    assert re.search(
        r"^engine-1 worker 1 did not receive the weights: no answer in time \(.* 4 s\)", report.lost["engine-1"]
    )
    assert site.holds(2, 0)


@pytest.mark.parametrize("what", ["/shoal/receive", "shoal_receive", "/resume"])
def test_when_no_engine_is_left_that_is_an_error_on_every_rank(connected: Make, what: str) -> None:
    site = connected(num_ranks=2)
    for engine in site.engines:
        engine.fails_at.add(what)
    first, second = site.outcomes(1)
    assert isinstance(first, EnginesLostError) and "told to fail" in str(first)
    assert isinstance(second, EnginesLostError) and second.lost == first.lost
    assert sorted(first.lost) == ["engine-0", "engine-1"]
    assert [engine.weight_version for engine in site.engines] == [UNPROVEN] * 2
    again, _ = site.outcomes(2)
    assert isinstance(again, EnginesLostError) and "no engine is left" in str(again) and again.lost == {}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_source_that_raises_ends_the_publish_on_every_rank_and_every_engine_is_resumed(
    connected: Make, failing: int
) -> None:
    site = connected(num_ranks=2, is_sharded=True)
    site.publish(1)

    def fail() -> None:
        raise MemoryError("no memory to merge k")

    site.sources[failing].fails = fail
    began = time.monotonic()
    outcomes = site.outcomes(2)
    assert isinstance(outcomes[failing], MemoryError)
    other = outcomes[1 - failing]
    assert isinstance(other, WeightSyncError) and "no memory to merge k" in str(other)
    wait_until(lambda: not any(engine.is_paused for engine in site.engines))
    assert time.monotonic() - began < SOON_S
    assert [engine.weight_version for engine in site.engines] == [UNPROVEN] * 2
    site.connect()
    assert site.publish(3).num_workers == 3 and site.holds(3, 0) and site.holds(3, 1)


# ---- engines that come back ----


@pytest.mark.parametrize(("num_ranks", "is_sharded"), [(1, False), (2, False), (2, True)], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_an_engine_that_comes_back_is_filled_alone_and_is_one_of_all_afterwards(
    connected: Make, index: int, num_ranks: int, is_sharded: bool
) -> None:
    site = connected(num_ranks=num_ranks, is_sharded=is_sharded)
    site.publish(1)
    site.engines[index].fails_at.add("/shoal/receive")
    assert list(site.publish(2).lost) == [f"engine-{index}"]
    shards = [[Shard()], [Shard(0, 2), Shard(1, 2)]][index]
    other = site.engines[1 - index]
    called, salt = list(other.called), other.cache_salt

    reports = [unwrap(outcome) for outcome in site.come_back(index, LoopbackEngine(f"engine-{index}", shards), 2)]

    assert {(report.version, report.num_workers, report.num_digests) for report in reports} == {
        (2, len(shards), 4 * len(shards))
    }
    assert site.holds(2, index) and site.engines[index].weight_version == 2
    assert (other.called, other.cache_salt, other.weight_version) == (called, salt, 2)  # it was left alone
    assert {publisher.live_engines for publisher in site.publishers} == {("engine-0", "engine-1")}
    for version in (3, 4):
        report = site.publish(version)
        assert (report.num_workers, report.num_digests, report.lost) == (3, 12, {})
        assert site.holds(version, 0) and site.holds(version, 1)


def test_an_engine_that_comes_back_with_other_values_fails_its_proof_and_is_not_taken_in(
    connected: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = connected(num_ranks=2)
    site.publish(1)
    with_ranks_left(site, "engine-0")
    engine = LoopbackEngine("engine-0", [Shard()])
    settle = ParameterSink.settle

    def settle_wrongly(sink: ParameterSink, message: Message) -> None:
        # Once, in the piece that has just arrived: a bit flipped twice is as it was.
        if sink._plan.slices[message.slice_index].target == "down.weight" and message.start == 0:
            engine.workers[0].model.get_parameter("down.weight").data.view(torch.uint8).view(-1)[0] ^= 1
        settle(sink, message)

    with monkeypatch.context() as patch:
        patch.setattr(ParameterSink, "settle", settle_wrongly)
        first, second = site.come_back(0, engine, 1)
    assert isinstance(first, WeightProofError) and "down.weight" in str(first) and isinstance(second, WeightSyncError)
    assert engine.weight_version == UNPROVEN
    assert {publisher.live_engines for publisher in site.publishers} == {("engine-1",)}
    assert site.publish(2).num_workers == 2
    site.come_back(0, LoopbackEngine("engine-0", [Shard()]), 2)
    assert site.publish(3).num_workers == 3  # the control


@pytest.mark.parametrize("method", ["shoal_meet", "shoal_join", "/shoal/receive", "/resume"])
@pytest.mark.parametrize("version", [None, 1])
def test_an_engine_that_fails_again_as_it_comes_back_changes_nothing_for_the_others(
    connected: Make, monkeypatch: pytest.MonkeyPatch, method: str, version: int | None
) -> None:
    site = connected(num_ranks=2)
    site.publish(1)
    with_ranks_left(site, "engine-1")
    engine = LoopbackEngine("engine-1", [Shard(0, 2), Shard(1, 2)])
    engine.fails_at.add(method)
    with monkeypatch.context() as patch:
        if method == "shoal_join":
            # Its workers do not come to the group, for which ranks wait half of the time-out: a second will do here.
            patch.setattr(line_module, "PATIENCE", 1 / site.timeout_s)
        outcomes = site.come_back(1, engine, version)
    if version is None and method.startswith("/"):
        assert outcomes == [None, None]  # met, and lost by the publish below
    else:
        assert isinstance(outcomes[0], WeightSyncError) and "told to fail" in str(outcomes[0])
        assert isinstance(outcomes[1], Exception)
        assert {publisher.live_engines for publisher in site.publishers} == {("engine-0",)}
    assert site.publish(2).num_workers == 1 and site.holds(2, 0)


def test_an_engine_that_was_met_again_is_filled_by_the_next_publish(connected: Make) -> None:
    site = connected(num_ranks=2, is_sharded=True)
    site.publish(1)
    with_ranks_left(site, "engine-0")
    assert site.publish(2).num_workers == 2
    site.come_back(0, LoopbackEngine("engine-0", [Shard()]), None)
    assert not site.holds(2, 0) and site.engines[0].weight_version == UNPROVEN
    assert site.publish(3).num_workers == 3 and site.holds(3, 0) and site.holds(3, 1)


def test_an_engine_that_comes_back_with_another_model_is_refused_naming_the_parameter(connected: Make) -> None:
    class WithoutNorm(Shard):
        def __init__(self) -> None:
            super().__init__()
            del self.norm

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            super().load_weights((name, value) for name, value in weights if name != "norm")

    site = connected()
    site.publish(1)
    (refusal,) = site.come_back(0, LoopbackEngine("engine-0", [WithoutNorm()]), 1)
    assert isinstance(refusal, WeightSyncError)
    assert "engine-0 takes other parameters than the engines that the run began with: norm" in str(refusal)


def with_ranks_left(site: Site, name: str) -> None:
    """Have all ranks leave an engine."""
    on_ranks(site.num_ranks, lambda ranks: with_ranks(site.publishers[ranks.rank], ranks).leave([name]))


# ---- meeting ----


@pytest.mark.parametrize(
    ("method", "timeout_s"),
    [
        ("shoal_meet", 4),  # for so long the other engine looks for the trainer's store, which is gone then
        ("shoal_join", 10 * SOON_S),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_engine_that_cannot_be_met_is_named_with_its_reason(
    connected: Make, method: str, timeout_s: float, num_ranks: int
) -> None:
    site = connected(num_ranks=num_ranks)
    site.timeout_s = timeout_s
    site.engines[1].fails_at.add(method)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"engine-1.*told to fail"):
        site.connect()
    assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("method", ["shoal_meet", "shoal_join"])
def test_an_engine_that_does_not_come_is_named_within_the_time_out(connected: Make, method: str) -> None:
    site = connected(num_ranks=2)
    site.timeout_s = 4
    site.engines[1].stalls_at.add(method)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"engine-1.* 4 s"):
        site.connect()
    assert time.monotonic() - began < SOON_S


def test_an_engine_of_another_model_is_refused_naming_the_parameter(connected: Make) -> None:
    site = connected()
    site.engines[1].workers[0].model.register_module("extra", Layer(3))
    with pytest.raises(WeightSyncError, match=r"engine-1 worker 0 failed at shoal_meet: PlanError.*extra\.weight"):
        site.connect()


# ---- adapters ----


def test_after_the_first_publish_an_adapter_travels_alone_and_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's adapter lies in a module of its own, which stands for vLLM's buffers."""

    class Served(Shard):
        def __init__(self) -> None:
            super().__init__()
            self.lora = nn.Module()
            self.lora.a = torch.zeros(2, 6)

    model = Served()

    def learn(model: nn.Module, parameters: Sequence[ParameterMeta], worker: str) -> SlicePlan:
        region = Region.of(torch.empty(2, 6, device="meta"))
        piece = Slice(source="a", source_region=region, target="lora.a", target_region=region, dtype="float32")
        return SlicePlan(worker=worker, slices=(piece,), fills=(), reloaded=())

    monkeypatch.setattr(receiver_module, "learn_adapter_plan", learn)
    monkeypatch.setattr(receiver_module, "adapter_tensors", lambda model: {"lora.a": model.lora.a})
    engine = LoopbackEngine("engine-0", [model])
    base, adapter = Source(checkpoint(1)), Source({"a": torch.randn(2, 6)})

    def run(ranks: ThreadRanks) -> WeightPublisher:
        publisher = WeightPublisher(
            {MODEL: base, ADAPTER: adapter},
            [EngineAddress(client=engine, num_workers=1, backend="gloo")],
            ranks=ranks,
            device=torch.device("cpu"),
            settings=PublishSettings(host=HOST, timeout_s=60),
        )
        publisher.connect()
        first = publisher.publish(1)
        assert model.holds(checkpoint(1)) and torch.equal(model.lora.a, adapter.now["a"])
        base.now, adapter.now = checkpoint(2), {"a": torch.randn(2, 6)}
        second = publisher.publish(2)
        assert torch.equal(model.lora.a, adapter.now["a"])
        assert model.holds(checkpoint(1))  # the control: the base did not travel again
        assert (first.num_digests, second.num_digests, second.num_bytes) == (5, 1, 48)
        publisher.connect()
        assert publisher.publish(3).num_digests == 5 and model.holds(checkpoint(2))  # met anew, it gets everything
        return publisher

    (publisher,) = [unwrap(outcome) for outcome in on_ranks(1, run)]
    publisher.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
