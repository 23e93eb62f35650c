"""Publishing by vLLM's own update to engines without Shoal's plugin: the parts that need no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.errors import ConfigError, EngineRequestError, WeightSyncError
from shoal.testing import tiny_model
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.types import UNPROVEN
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.native import NativePublisher
from shoal.weights.native_api import FanOut, Outgoing, connect_native, outgoing_of
from shoal.weights.sources import make_source


class FakeClient:
    """Notes what it is told; answers with an error where it is to."""

    def __init__(self, name: str = "engine-0") -> None:
        self.name = name
        self.posts: list[tuple[str, Any]] = []
        self.fails_at = ""
        self.weight_version = UNPROVEN
        self.cache_salt = ""

    def post(self, path: str, body: Any, timeout_s: float) -> None:
        self.posts.append((path, body))
        if path == self.fails_at:
            raise EngineRequestError(f"{self.name} answered {path} with status 500")

    def has_died(self) -> bool:
        return False

    def paths(self) -> list[str]:
        return [path for path, _ in self.posts]


def test_both_forms_of_vllms_update_reach_every_engine_at_its_place_in_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second form is that of the vLLM installed here; the first is rebuilt after vLLM 0.26."""
    nccl_engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    model = torch.nn.Linear(2, 3)
    sent: list[Any] = []

    class ByFunctions:
        @staticmethod
        def trainer_init(meeting: dict[str, Any]) -> str:
            return f"group of {meeting['world_size']}"

        @staticmethod
        def trainer_send_weights(iterator: Any, arguments: dict[str, Any]) -> None:
            sent.append((dict(iterator), arguments))

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(size=info.world_size))
    monkeypatch.setattr(
        nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **others: sent.append((dict(iterator), others))
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for is_first in (False, True):
        if is_first:
            monkeypatch.delattr(nccl_engine, "NCCLTrainerWeightTransferEngine")
            monkeypatch.setattr(nccl_engine, "NCCLWeightTransferEngine", ByFunctions)
        clients = [FakeClient(), FakeClient()]
        connect_native(FanOut(clients, [3, 2], 5), outgoing_of(model), host="10.0.0.1", port=1234)()
        for client, offset in zip(clients, (1, 4), strict=True):
            assert client.paths() == [
                "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"
            ]  # fmt: skip
            joining, update = client.posts[0][1]["init_info"], client.posts[2][1]["update_info"]
            assert (joining["rank_offset"], joining["world_size"]) == (offset, 6)
            assert (joining["master_address"], joining["master_port"]) == ("10.0.0.1", 1234)
            assert (joining if not is_first else update)["packed"] is True
            assert update["names"] == ["weight", "bias"] and update["shapes"] == [[3, 2], [3]]
        assert torch.equal(sent[-1][0]["weight"], model.weight)


class Wire:
    """Stands in for vLLM's group: keeps what was sent."""

    def __init__(self) -> None:
        self.meetings: list[tuple[int, str]] = []
        self.sent: dict[str, torch.Tensor] = {}
        self.hangs = threading.Event()
        self.hangs.set()

    def connect(self, engines: FanOut, outgoing: Outgoing, *, host: str, port: int) -> Callable[[], None]:
        self.meetings.append((engines.group_size, host))

        def send() -> None:
            self.hangs.wait(30)
            engines.start_weight_update()
            self.sent = dict(outgoing.tensors())
            engines.finish_weight_update()

        return send


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.hangs.set()


def publisher(model: Any, clients: list[FakeClient], wire: Wire, ranks: Any, timeout_s: float = 60) -> NativePublisher:
    return NativePublisher(
        {"model": make_source(model)},
        [EngineAddress(client=client, num_workers=2, backend="nccl") for client in clients] if ranks.rank == 0 else (),
        ranks=ranks,
        device=torch.device("cpu"),
        settings=PublishSettings(host=None, timeout_s=timeout_s),
        connect=wire.connect,
    )


def alone(action: Callable[[ThreadRanks], Any]) -> Any:
    (outcome,) = on_ranks(1, action)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_every_parameter_goes_out_whole_between_a_pause_and_a_resume(wire: Wire) -> None:
    model, clients = tiny_model(seed=5, tie_word_embeddings=False), [FakeClient("engine-0"), FakeClient("engine-1")]

    def publish(ranks: ThreadRanks) -> Any:
        native = publisher(model, clients, wire, ranks)
        native.connect()
        report = native.publish(4)
        native.close()
        return report, native

    (report, native), (other, _) = on_ranks(2, publish)  # type: ignore[misc]
    assert wire.meetings == [(5, "127.0.0.1")]  # one trainer, twice two workers, over loopback
    held = dict(model.named_parameters())
    assert wire.sent.keys() == held.keys()
    assert all(torch.equal(wire.sent[name], held[name]) for name in held)
    for client in clients:
        pause = "/pause?mode=keep&clear_cache=false"
        assert client.paths() == [pause, "/start_weight_update", "/finish_weight_update", "/resume"]
        assert client.weight_version == 4 and len(client.cache_salt) == 16
    assert (report.version, report.num_workers, report.num_digests, report.lost) == (4, 4, 0, {})
    assert report.num_bytes == sum(value.numel() * 4 for value in held.values())
    assert (native.num_publishes, native.num_proven) == (1, 0)  # nothing is proven, and nothing says so
    assert other.num_workers == 4


def test_engines_go_on_after_a_publish_that_fails_and_are_not_trusted(wire: Wire) -> None:
    clients = [FakeClient("engine-0"), FakeClient("engine-1")]

    def publish(ranks: ThreadRanks) -> None:
        native = publisher(tiny_model(), clients, wire, ranks)
        native.connect()
        native.publish(1)
        clients[1].fails_at = "/start_weight_update"
        native.publish(2)

    with pytest.raises(WeightSyncError, match=r"engine-1 answered /start_weight_update"):
        alone(publish)
    assert [client.paths()[-1] for client in clients] == ["/resume", "/resume"]
    assert [client.weight_version for client in clients] == [UNPROVEN, UNPROVEN]


def test_a_publish_that_hangs_is_given_up_and_the_engines_go_on(wire: Wire) -> None:
    client = FakeClient()

    def publish(ranks: ThreadRanks) -> None:
        native = publisher(tiny_model(), [client], wire, ranks, timeout_s=1.0)
        native.connect()
        wire.hangs.clear()
        native.publish(1)

    with pytest.raises(WeightSyncError, match=r"waited 1 s for vLLM's own weight update"):
        alone(publish)
    assert client.paths()[-1] == "/resume"


def test_a_sharded_trainer_is_refused(wire: Wire) -> None:
    source = make_source(tiny_model())
    half = {name: type(run)(0, run.stop // 2) for name, run in source.held().items()}
    sharded: Any = SimpleNamespace(metadata=source.metadata, held=lambda: half, tensors=source.tensors)
    with pytest.raises(ConfigError, match=r"embed_tokens.* is sharded over the trainer's ranks.*shoal serve"):
        NativePublisher(
            {"model": sharded},
            (),
            ranks=SimpleNamespace(rank=0),  # type: ignore[arg-type]
            device=torch.device("cpu"),
            settings=PublishSettings(host=None, timeout_s=1),
            connect=wire.connect,
        )
