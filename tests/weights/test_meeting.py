"""Where trainer and engines meet: at loopback, at the address on the way to an engine, or where the user says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from shoal.errors import WeightSyncError
from shoal.testing.loopback import LoopbackEngine
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.types import PublishReport
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source
from shoal.wire.rendezvous import local_address

pytestmark = pytest.mark.usefixtures("plain_modules")


class Served(nn.Linear):
    """What an engine holds of a linear layer, with vLLM's loader."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            self.get_parameter(name).data.copy_(value)


def outward() -> str:
    """An address of this host that is not loopback."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family.name == "AF_INET" and not address.address.startswith("127.")
    ]
    if not found:
        pytest.skip("this host has no address but loopback")
    return found[0]


def publish(model: nn.Linear, engine_host: str, own_host: str | None, num_ranks: int) -> list[Any]:
    """Publish to an engine at some address; return what each rank's lines say of themselves."""
    engine = LoopbackEngine("engine-0", [Served(3, 2)])
    address = EngineAddress(client=engine, num_workers=1, backend="gloo", host=engine_host)

    def run(ranks: ThreadRanks) -> tuple[PublishReport, str, str]:
        publisher = WeightPublisher(
            {"model": make_source(model)},
            [address] if ranks.rank == 0 else (),
            ranks=ranks,
            device=torch.device("cpu"),
            settings=PublishSettings(host=own_host, timeout_s=60),
        )
        try:
            publisher.connect()
            report = publisher.publish(1)
            (line,) = publisher.group.lines
            return report, line._host, line._store.host
        finally:
            publisher.close()

    outcomes = on_ranks(num_ranks, run)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    assert torch.equal(engine.workers[0].model.weight, model.weight)
    return outcomes


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_engines_on_this_host_are_met_at_loopback(num_ranks: int) -> None:
    for report, own, store in publish(nn.Linear(3, 2), "127.0.0.1", None, num_ranks):
        assert (own, store) == ("127.0.0.1", "127.0.0.1")
        assert report.num_digests == 2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_engines_elsewhere_are_met_at_the_address_on_the_way_to_them(num_ranks: int) -> None:
    for _, own, store in publish(nn.Linear(3, 2), outward(), None, num_ranks):
        assert own == store == local_address(outward()) != "127.0.0.1"


def test_the_users_address_goes_before_the_one_on_the_way() -> None:
    ((_, own, store),) = publish(nn.Linear(3, 2), "127.0.0.1", outward(), 1)
    assert own == store == outward()


def test_an_address_of_another_host_is_refused_and_an_unknown_engine_is_named() -> None:
    with pytest.raises(WeightSyncError, match=r"weight_sync_host='203\.0\.113\.77' is no address of this host"):
        publish(nn.Linear(3, 2), "127.0.0.1", "203.0.113.77", 1)
    with pytest.raises(WeightSyncError, match=r"engine-0 at no-such-host\.invalid cannot be reached"):
        publish(nn.Linear(3, 2), "no-such-host.invalid", None, 1)
