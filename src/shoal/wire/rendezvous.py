"""How the trainer and one engine's workers meet: a key-value store, and a process group of their own beside it.

The store is a mailbox for small plain bytes (plans, digests); the group carries tensors. Nothing is pickled.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

GroupBackend = Literal["gloo", "nccl"]

_NEVER = timedelta(days=7)


class Store(Protocol):
    """What is used of a `torch.distributed.TCPStore`, which torch does not export to type checkers."""

    @property
    def host(self) -> str:
        """Address that it is served on."""
        ...

    @property
    def port(self) -> int:
        """Port that it is served on."""
        ...

    def set(self, key: str, value: str) -> None:
        """Leave a value."""
        ...

    def get(self, key: str) -> bytes:
        """Fetch a value, waiting for it up to the store's own time-out."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Look whether all values are there, without waiting for them."""
        ...

    def delete_key(self, key: str) -> bool:
        """Remove a value."""
        ...

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait for values; raises `torch.distributed.DistStoreError` after `timeout`."""
        ...


Group = Any
"""A `torch.distributed.ProcessGroup`, whose Gloo and NCCL forms torch does not declare as such."""


def local_address(peer: str) -> str:
    """Return this host's address on the way to another: its own loopback address for a loopback peer. Sends nothing.

    Raises:
        OSError: The name is not known, or no route leads there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def is_own_address(host: str) -> bool:
    """Whether this host can listen at an address."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def host_store(host: str, timeout_s: float) -> Store:
    """Serve a store on `host` alone, on a free port.

    torch binds a store to every interface unless it is handed a socket that is bound already.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(128)
    port = int(listener.getsockname()[1])
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        None,
        True,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store


def join_store(host: str, port: int, timeout_s: float) -> Store:
    """Connect to the store that the trainer serves."""
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False
    )
    return store


def make_group(
    store: Store,
    *,
    backend: GroupBackend,
    host: str,
    rank: int,
    size: int,
    timeout_s: float,
    device: torch.device | None = None,
) -> Group:
    """Form a process group over `store`, apart from any default group of this process.

    Blocks until all `size` members have called it: the trainer's ranks first, then the engine's workers.

    Args:
        store: Where the members meet.
        backend: `"nccl"` between GPUs, `"gloo"` between CPUs.
        host: Address of this process that the others can reach (gloo only).
        rank: Of this process in the group.
        size: Of the group.
        timeout_s: For forming the group and, with gloo, for each operation on it.
        device: This member's GPU (nccl only), on which the communicator is made at once rather than at the first use.
    """
    timeout = timedelta(seconds=timeout_s)
    meeting = dist.PrefixStore("group", store)  # type: ignore[attr-defined,arg-type]
    if backend == "gloo":
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        gloo._timeout = timeout
        return dist.ProcessGroupGloo(meeting, rank, size, gloo)
    # So that NCCL's next kernel does not wait behind the digests of what has arrived.
    nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    # Time is kept by who waits. NCCL's own watchdog would end the process where we want an error.
    nccl._timeout = _NEVER
    with _without_nccl_watchdog():
        group = dist.ProcessGroupNCCL(meeting, rank, size, nccl)
    if device is not None:
        group.eager_connect_single_device(device)
    return group


@contextmanager
def _without_nccl_watchdog() -> Iterator[None]:
    """Have a group made meanwhile neither end this process nor write dumps when a peer fails.

    These are read when a group is made and cannot be given in its options (torch 2.11 to 2.13).
    """
    settings = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    former = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
