"""How trainer and workers meet: two real processes over gloo, one address, and a time-out when nobody comes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from shoal.wire.rendezvous import (
    Store,
    _without_nccl_watchdog,
    host_store,
    is_own_address,
    join_store,
    local_address,
    make_group,
)

HOST = "127.0.0.1"
PATIENCE_S = 60.0  # for what does happen, on a machine that has other work

# What the far side does, in a process of its own: answer through the store, then receive two broadcasts.
PEER = """
import os, sys, torch, torch.distributed as dist
from shoal.wire.digest import digest
from shoal.wire.rendezvous import join_store, make_group
port = int(sys.argv[1])
store = join_store("127.0.0.1", port, 60)
store.set("greeting", store.get("question").decode() + " yes")
group = make_group(store, backend="gloo", host="127.0.0.1", rank=1, size=2, timeout_s=60)
options = dist.BroadcastOptions()
options.rootRank = 0
for key, value in (("first", torch.zeros(1000, dtype=torch.bfloat16)), ("second", torch.zeros(3, 5))):
    group.broadcast([value], options).wait()
    store.set(key, str(digest(value)))
os._exit(0)  # Gloo's threads now and then abort an interpreter that ends while a group is alive
"""


def listening_addresses(port: int) -> set[str]:
    return {
        connection.laddr.ip
        for connection in psutil.Process().net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


def broadcast(group: dist.ProcessGroup, value: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([value], options).wait()


def test_the_store_listens_on_the_given_address_alone() -> None:
    store = host_store(HOST, PATIENCE_S)
    assert listening_addresses(store.port) == {HOST}


def test_torchs_own_store_would_listen_on_every_address() -> None:
    store = dist.TCPStore(HOST, 0, None, True, timedelta(seconds=PATIENCE_S), wait_for_workers=False)  # type: ignore[attr-defined]
    assert listening_addresses(store.port) - {HOST}  # the control: why the store is handed a bound socket


def test_two_processes_meet_and_what_is_broadcast_arrives_bit_for_bit() -> None:
    from shoal.wire.digest import digest

    store = host_store(HOST, PATIENCE_S)
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(store.port)])
    try:
        store.set("question", "are you there?")
        store.wait(["greeting"], timedelta(seconds=PATIENCE_S))
        assert store.get("greeting").decode() == "are you there? yes"
        group = make_group(store, backend="gloo", host=HOST, rank=0, size=2, timeout_s=PATIENCE_S)
        sent = {"first": torch.randn(1000).to(torch.bfloat16), "second": torch.randn(3, 5)}
        for key, value in sent.items():
            broadcast(group, value)
            store.wait([key], timedelta(seconds=PATIENCE_S))
            assert int(store.get(key)) == digest(value)
            assert digest(value) != 0  # what the far side started from
        assert peer.wait(timeout=PATIENCE_S) == 0
    finally:
        peer.kill()
        peer.wait()


def test_a_group_lets_no_tensor_listen_beyond_its_address() -> None:
    store = host_store(HOST, PATIENCE_S)
    before = psutil.Process().net_connections(kind="tcp")
    group = make_group(store, backend="gloo", host=HOST, rank=0, size=1, timeout_s=PATIENCE_S)
    broadcast(group, torch.zeros(2))
    new = [c for c in psutil.Process().net_connections(kind="tcp") if c not in before]
    assert {c.laddr.ip for c in new if c.status == psutil.CONN_LISTEN} <= {HOST}


def test_a_group_whose_peer_never_comes_is_an_error_within_the_time_out() -> None:
    store = host_store(HOST, 2 * PATIENCE_S)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        make_group(store, backend="gloo", host=HOST, rank=0, size=2, timeout_s=1)
    assert time.monotonic() - began < PATIENCE_S


def test_what_is_set_while_an_nccl_group_is_made_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    with _without_nccl_watchdog():
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert "TORCH_NCCL_ENABLE_MONITORING" not in os.environ


def test_a_value_that_never_comes_is_an_error_within_the_time_out() -> None:
    store = host_store(HOST, 2 * PATIENCE_S)
    began = time.monotonic()
    with pytest.raises(dist.DistStoreError):
        store.wait(["nobody sets this"], timedelta(seconds=0.5))
    assert time.monotonic() - began < PATIENCE_S


def test_joining_a_store_that_nobody_serves_is_an_error_within_the_time_out() -> None:
    store: Store = host_store(HOST, PATIENCE_S)
    port = store.port
    del store
    began = time.monotonic()
    with pytest.raises(dist.DistError):
        join_store(HOST, port, timeout_s=1)
    assert time.monotonic() - began < PATIENCE_S


def test_a_value_is_looked_for_without_waiting_and_can_be_taken_back() -> None:
    store = host_store(HOST, PATIENCE_S)
    other = join_store(HOST, store.port, PATIENCE_S)
    assert not store.check(["mark"])
    other.set("mark", "x")
    store.wait(
        ["mark"], timedelta(seconds=PATIENCE_S)
    )  # `set` waits for no answer, and the store's own connection may be faster
    assert store.check(["mark"])
    store.delete_key("mark")
    assert not other.check(["mark"])


def test_the_way_to_this_host_itself_is_loopback_and_its_other_addresses_are_its_own() -> None:
    for peer in ("127.0.0.1", "localhost", "0.0.0.0"):
        assert local_address(peer) in ("127.0.0.1", "::1")
    ours = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET}
    for address in ours - {"127.0.0.1"}:
        assert local_address(address) == address and is_own_address(address)
    assert is_own_address("127.0.0.1") and not is_own_address("203.0.113.77")
    with pytest.raises(OSError):
        local_address("no-such-host.invalid")


def test_a_store_listens_at_the_address_that_it_was_given_and_at_no_other() -> None:
    store = host_store("127.0.0.2", PATIENCE_S)
    with socket.create_connection(("127.0.0.2", store.port), timeout=PATIENCE_S):
        pass
    # Not asked of the port itself: another process may have the same number at another address.
    assert listening_addresses(store.port) == {"127.0.0.2"}
