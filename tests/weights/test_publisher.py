"""The publisher against an engine that speaks the real protocol: HTTP for control, the real store and group over gloo.

What is made up is vLLM: each worker here holds plain tensors and follows a small plan of its own.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal.engines.client import EngineClient
from shoal.errors import WeightProofError, WeightSyncError
from shoal.types import UNPROVEN, ParameterMeta
from shoal.weights.link import AbandonableCall, EngineLink
from shoal.weights.publisher import WeightPublisher, wire_metadata
from shoal.wire.digest import digest
from shoal.wire.plan import Region, Slice, SlicePlan, dtype_from_name, dtype_name, metadata_from_json
from shoal.wire.rendezvous import WIRE_KEY, digest_key, join_store, make_group, plan_key

HOST = "127.0.0.1"
LIFECYCLE = [
    "/pause",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]


def whole(*shape: int) -> Region:
    return Region.of(torch.empty(shape, device="meta"))


def piece(source: str, region: Region, target: str, into: Region, dtype: str = "float32") -> Slice:
    return Slice(source=source, source_region=region, target=target, target_region=into, dtype=dtype)


def rows(start: int, count: int, width: int) -> Region:
    return Region(offset=start * width, shape=(count, width), strides=(width, 1))


def plan_of(engine: str, rank: int, num_workers: int) -> SlicePlan:
    """Shard `a` and `b` by rows into one stacked parameter; keep `c` in bfloat16 and whole. Nobody wants `unused`."""
    size = 4 // num_workers
    return SlicePlan(
        worker=f"{engine} worker {rank}",
        slices=(
            piece("a", rows(rank * size, size, 5), "stacked", rows(0, size, 5)),
            piece("b", rows(rank * size, size, 5), "stacked", rows(size, size, 5)),
            piece("c", whole(7), "c", whole(7), "bfloat16"),
        ),
        fills=(),
        reloaded=(),
    )


class Worker:
    """Holds real tensors, joins the real store and group, receives, writes its slices and digests them."""

    def __init__(self, engine: str, rank: int, num_workers: int) -> None:
        self.rank = rank
        self.plan = plan_of(engine, rank, num_workers)
        self.held = {"stacked": torch.zeros(8 // num_workers, 5), "c": torch.zeros(7, dtype=torch.bfloat16)}
        self.received: list[str] = []
        self.after_writing: Callable[[Worker], None] = lambda worker: None
        self.store: Any = None
        self.group: Any = None

    def join(self, info: dict[str, Any]) -> None:
        self.store = join_store(info["host"], info["port"], info["timeout_s"])
        self.store.set(plan_key(1 + self.rank), self.plan.to_json())
        self.group = make_group(
            self.store,
            backend=info["backend"],
            host=info["own_host"],
            rank=1 + self.rank,
            size=info["world_size"],
            timeout_s=info["timeout_s"],
        )

    def receive(self, version: int, attempt: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.received = []
        for meta in metadata_from_json(json.loads(self.store.get(WIRE_KEY))):
            value = torch.empty(meta.shape, dtype=dtype_from_name(meta.dtype))
            self.group.broadcast([value], options).wait()
            self.received.append(meta.name)
            for index in self.plan.by_source.get(meta.name, ()):
                part = self.plan.slices[index]
                part.target_region.view(self.held[part.target]).copy_(part.source_region.view(value))
        self.after_writing(self)
        digests = [digest(part.target_region.view(self.held[part.target])) for part in self.plan.slices]
        self.store.set(digest_key(version, attempt, 1 + self.rank), json.dumps(digests))


class Engine:
    """An HTTP server with a vLLM server's control routes, in front of some workers."""

    def __init__(self, name: str, num_workers: int) -> None:
        self.name = name
        self.workers = [Worker(name, rank, num_workers) for rank in range(num_workers)]
        self.called: list[str] = []
        self.answers_500: set[str] = set()
        self.answers: dict[str, dict[str, Any]] = {}
        self.stalls_at: set[str] = set()
        self.released = threading.Event()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size) or b"{}")
                path = self.path.split("?")[0]
                engine.called.append(path)
                status = 200
                try:
                    engine.serve(path, body or {})
                except Exception as error:
                    status, answer = 500, {"error": str(error)}
                else:
                    answer = engine.answers.get(path, {})
                octets = json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(octets)))
                    self.end_headers()
                    self.wfile.write(octets)
                except BrokenPipeError:
                    return  # the trainer gave up waiting

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, path: str, body: dict[str, Any]) -> None:
        if path in self.stalls_at:
            self.released.wait(30)
        if path in self.answers_500:
            raise RuntimeError("told to fail")
        if path == "/init_weight_transfer_engine":
            self.on_each(lambda worker: worker.join(body["init_info"]))
        elif path == "/update_weights":
            self.on_each(lambda worker: worker.receive(**body["update_info"]))

    def on_each(self, action: Callable[[Worker], None]) -> None:
        calls = [AbandonableCall(partial(action, worker)) for worker in self.workers]
        for call in calls:
            call.result(30, "a worker")

    def link(self, timeout_s: float) -> EngineLink:
        client = EngineClient(
            name=self.name,
            url=f"http://{HOST}:{self.server.server_port}",
            api_key="key",
            log_path=None,
            request_timeout_s=10,
        )
        return EngineLink(client, num_workers=len(self.workers), backend="gloo", host=HOST, timeout_s=timeout_s)

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


class Source:
    """Plain tensors under the names of a checkpoint."""

    def __init__(self, seed: int = 0) -> None:
        self.change(seed)

    def change(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        # `a` and `b` lie inside one flat buffer, as an optimizer that flattens its parameters leaves them.
        flat = torch.randn(3 + 40, generator=generator)
        self.now = {
            "a": flat[3:23].view(4, 5),
            "unused": torch.randn(100, generator=generator),
            "b": flat[23:43].view(4, 5),
            "c": torch.randn(7, generator=generator),
        }

    def metadata(self) -> tuple[ParameterMeta, ...]:
        return tuple(
            ParameterMeta(name=name, dtype=dtype_name(value.dtype), shape=tuple(value.shape))
            for name, value in self.now.items()
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.now.items()


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    both = [Engine("engine-0", num_workers=1), Engine("engine-1", num_workers=2)]
    yield both
    for engine in both:
        engine.close()


def connected(engines: list[Engine], source: Any, timeout_s: float = 10) -> WeightPublisher:
    publisher = WeightPublisher(source, [engine.link(timeout_s) for engine in engines], timeout_s)
    publisher.connect()
    return publisher


def holds(worker: Worker, source: Source, num_workers: int) -> bool:
    size = 4 // num_workers
    mine = slice(worker.rank * size, (worker.rank + 1) * size)
    stacked = torch.cat([source.now["a"][mine], source.now["b"][mine]])
    same_c = torch.equal(worker.held["c"], source.now["c"].to(torch.bfloat16))
    return torch.equal(worker.held["stacked"], stacked) and same_c


def test_every_worker_of_every_engine_holds_what_the_trainer_has_after_each_publish(engines: list[Engine]) -> None:
    source = Source()
    publisher = connected(engines, source)
    assert [plan.worker for plan in publisher.plans] == ["engine-0 worker 0", "engine-1 worker 0", "engine-1 worker 1"]
    for version in (1, 2, 3):
        source.change(version)
        assert not any(holds(w, source, len(e.workers)) for e in engines for w in e.workers)  # not before
        report = publisher.publish(version)
        assert all(holds(w, source, len(e.workers)) for e in engines for w in e.workers)
        assert (report.version, report.num_workers, report.num_digests) == (version, 3, 9)
        assert 0 < report.seconds < 10
    assert (publisher.num_publishes, publisher.num_proven) == (3, 3)
    publisher.close()


def test_the_routes_are_called_in_the_order_that_a_running_engine_needs(engines: list[Engine]) -> None:
    publisher = connected(engines, Source())
    publisher.publish(0)
    publisher.publish(0)  # again: harmless
    for engine in engines:
        assert engine.called == ["/init_weight_transfer_engine", *LIFECYCLE, *LIFECYCLE]
    publisher.close()


def test_a_version_counts_for_an_engine_only_once_it_is_proven(engines: list[Engine]) -> None:
    publisher = connected(engines, Source())
    clients = [link.client for link in publisher._links]
    assert [client.weight_version for client in clients] == [UNPROVEN, UNPROVEN]
    publisher.publish(4)
    assert [client.weight_version for client in clients] == [4, 4]
    engines[1].answers_500.add("/reset_prefix_cache")
    with pytest.raises(WeightSyncError, match="engine-1"):
        publisher.publish(5)
    # They no longer hold version 4, and nothing shows that they hold version 5.
    assert [client.weight_version for client in clients] == [UNPROVEN, UNPROVEN]
    publisher.close()


def test_what_no_engine_uses_does_not_travel(engines: list[Engine]) -> None:
    publisher = connected(engines, Source())
    publisher.publish(1)
    assert engines[1].workers[1].received == ["a", "b", "c"]
    publisher.close()


@pytest.mark.parametrize(
    ("target", "source_name", "engine", "worker"),
    [("stacked", "a", 0, 0), ("c", "c", 0, 0), ("stacked", "b", 1, 1), ("c", "c", 1, 0)],
)
def test_one_flipped_bit_fails_the_proof_naming_parameter_worker_and_version(
    target: str, source_name: str, engine: int, worker: int, engines: list[Engine]
) -> None:
    publisher = connected(engines, Source())
    publisher.publish(1)

    def flip(broken: Worker) -> None:
        octets = broken.held[target].view(torch.uint8).view(-1)
        octets[-1 if source_name == "b" else 0] ^= 1

    engines[engine].workers[worker].after_writing = flip
    wanted = rf"engine-{engine} worker {worker} holds other values in {target} than the trainer has in {source_name} "
    with pytest.raises(WeightProofError, match=wanted + r"\(version 2"):
        publisher.publish(2)
    assert [e.called[-1] for e in engines] == ["/resume", "/resume"]
    assert publisher.num_proven == 1
    engines[engine].workers[worker].after_writing = lambda worker: None
    publisher.publish(3)  # the control: without the flip the same engines prove it
    assert publisher.num_proven == 2
    publisher.close()


def test_the_digests_of_an_earlier_attempt_do_not_prove_a_later_one(engines: list[Engine]) -> None:
    source = Source()
    publisher = connected(engines, source)
    publisher.publish(1)

    def leave_nothing_new(worker: Worker) -> None:
        worker.store = SimpleNamespace(get=worker.store.get, set=lambda key, value: None)

    engines[0].workers[0].after_writing = leave_nothing_new
    publisher._links[0]._timeout_s = 1
    with pytest.raises(WeightSyncError, match="engine-0 worker 0 did not send its digests within 1 s"):
        publisher.publish(1)
    publisher.close()


@pytest.mark.parametrize("route", LIFECYCLE)
@pytest.mark.parametrize("engine", [0, 1])
def test_a_route_that_answers_with_an_error_is_named_with_its_engine_and_every_engine_is_resumed(
    route: str, engine: int, engines: list[Engine]
) -> None:
    publisher = connected(engines, Source(), timeout_s=3)
    engines[engine].answers_500.add(route)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=rf"engine-{engine} failed at {route}\b.*500.*told to fail"):
        publisher.publish(1)
    assert time.monotonic() - began < 8
    assert [e.called.count("/resume") for e in engines] == [1, 1]
    assert publisher.num_proven == 0
    publisher.close()


@pytest.mark.parametrize("route", ["/pause", "/update_weights", "/reset_prefix_cache", "/resume"])
def test_an_engine_that_stalls_is_named_within_the_time_out_and_the_other_is_resumed(
    route: str, engines: list[Engine]
) -> None:
    publisher = connected(engines, Source(), timeout_s=1.5)
    engines[0].stalls_at.add(route)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"engine-0.* within 1\.5 s") as failure:
        publisher.publish(1)
    assert time.monotonic() - began < 6
    if route != "/update_weights":
        assert "engine-1" not in str(failure.value)
    # While weights are sent the engines go in step, so there the other one did not finish either.
    assert "/resume" in engines[1].called
    publisher.close()


def test_an_engine_that_keeps_its_prefix_cache_is_an_error_and_counts_as_unproven(engines: list[Engine]) -> None:
    publisher = connected(engines, Source())
    publisher.publish(1)
    engines[1].answers["/reset_prefix_cache"] = {"success": False}
    with pytest.raises(WeightSyncError, match=r"engine-1.* prefix cache"):
        publisher.publish(2)
    assert [link.client.weight_version for link in publisher._links] == [UNPROVEN, UNPROVEN]
    engines[1].answers["/reset_prefix_cache"] = {"success": True}
    assert publisher.publish(2).version == 2
    publisher.close()


def test_an_engine_that_stalls_altogether_does_not_keep_the_other_from_being_resumed(engines: list[Engine]) -> None:
    publisher = connected(engines, Source(), timeout_s=1.5)
    engines[0].stalls_at |= {"/update_weights", "/finish_weight_update", "/resume"}
    with pytest.raises(WeightSyncError, match=r"engine-0.*(receiving the weights|/update_weights)"):
        publisher.publish(1)
    assert "/resume" in engines[1].called
    publisher.close()


def test_a_source_that_fails_while_it_sends_is_the_cause_of_what_is_raised(engines: list[Engine]) -> None:
    class Failing(Source):
        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", self.now["a"]
            raise MemoryError("no memory to merge b")

    publisher = connected(engines, Failing(), timeout_s=1.5)
    with pytest.raises(WeightSyncError, match=r"engine-[01]") as failure:
        publisher.publish(1)
    assert isinstance(failure.value.__cause__, MemoryError)
    publisher.close()


def test_an_engine_that_cannot_plan_is_named_with_its_reason(engines: list[Engine]) -> None:
    engines[1].answers_500.add("/init_weight_transfer_engine")
    publisher = WeightPublisher(Source(), [engine.link(3) for engine in engines], 3)
    with pytest.raises(WeightSyncError, match=r"engine-1 failed at /init_weight_transfer_engine.*told to fail"):
        publisher.connect()
    publisher.close()


def test_an_engine_whose_workers_never_join_is_named_within_the_time_out(engines: list[Engine]) -> None:
    engines[1].workers[0].join = lambda info: None  # type: ignore[method-assign]
    publisher = WeightPublisher(Source(), [engine.link(1) for engine in engines], 2)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match="engine-1"):
        publisher.connect()
    assert time.monotonic() - began < 6
    publisher.close()


def test_publishing_before_connecting_is_an_error() -> None:
    engine = Engine("engine-0", 1)
    link = engine.link(1)
    with pytest.raises(WeightSyncError, match="engine-0 has not joined the weight group"):
        link.send(torch.zeros(1))
    engine.close()


META = (
    ParameterMeta(name="a", dtype="float32", shape=(4, 5)),
    ParameterMeta(name="unused", dtype="float32", shape=(100,)),
    ParameterMeta(name="b", dtype="float32", shape=(4, 5)),
    ParameterMeta(name="c", dtype="float32", shape=(7,)),
)


def test_a_parameter_travels_in_the_type_of_the_engines_and_in_the_trainers_order() -> None:
    wire = wire_metadata(META, [plan_of("e", 0, 2), plan_of("e", 1, 2)])
    assert [(meta.name, meta.dtype, meta.shape) for meta in wire] == [
        ("a", "float32", (4, 5)),
        ("b", "float32", (4, 5)),
        ("c", "bfloat16", (7,)),
    ]


def test_a_parameter_that_engines_keep_in_two_types_travels_in_the_trainers_own() -> None:
    other = SlicePlan(
        worker="e worker 1",
        slices=(piece("c", whole(7), "c", whole(7), "float16"),),
        fills=(),
        reloaded=(),
    )
    wire = wire_metadata(META, [plan_of("e", 0, 1), other])
    assert {meta.name: meta.dtype for meta in wire}["c"] == "float32"


def test_two_types_of_one_parameter_are_each_proven_in_their_own(engines: list[Engine]) -> None:
    worker = engines[1].workers[1]
    worker.held["c"] = torch.zeros(7, dtype=torch.float16)
    slices = (*worker.plan.slices[:2], piece("c", whole(7), "c", whole(7), "float16"))
    worker.plan = SlicePlan(worker=worker.plan.worker, slices=slices, fills=(), reloaded=())
    source = Source()
    publisher = connected(engines, source)
    assert publisher.publish(1).num_digests == 9
    assert torch.equal(worker.held["c"], source.now["c"].half())
    assert torch.equal(engines[0].workers[0].held["c"], source.now["c"].bfloat16())
    publisher.close()


def test_an_abandoned_call_is_left_behind_and_a_failed_one_raises_its_own_error() -> None:
    gate = threading.Event()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"waited 0\.2 s for a train"):
        AbandonableCall(lambda: gate.wait(20)).result(0.2, "a train")
    assert time.monotonic() - began < 3
    gate.set()

    def fail() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        AbandonableCall(fail).result(5, "a train")
    assert AbandonableCall(lambda: 41 + 1).result(5, "an answer") == 42
