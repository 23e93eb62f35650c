"""The one factory of transports: which carrier suits is the caller's to know, how it is set up is said here."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from shoal.errors import ConfigError
from shoal.protocols import WeightTransport
from shoal.wire.device_memory import CudaMemory
from shoal.wire.group_transport import GlooTransport, NcclTransport, warm_up
from shoal.wire.ipc_transport import IpcTransport
from shoal.wire.liveness import Peers
from shoal.wire.rendezvous import Store, make_group

Backend: TypeAlias = Literal["gloo", "nccl", "ipc"]
"""Gloo between CPUs; NCCL between GPUs, one member each; CUDA IPC between processes that see one another's GPUs."""

DEFAULT_STAGING_BYTES = 256 << 20
_SHARE_OF_WORKERS = 8  # workers send only for verification, and their memory belongs to the engine


def make_transport(
    store: Store,
    *,
    backend: Backend,
    rank: int,
    num_trainers: int,
    num_workers: int,
    host: str,
    device: torch.device,
    timeout_s: float,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
) -> WeightTransport:
    """Meet the other members and connect to them.

    Blocks until all members have called it. A member that closes its transport ends those of the others that are not
    finished, so let all of them finish first. With NCCL it can block for longer than `timeout_s` when a member dies
    meanwhile, so call it where it can be left behind.

    Args:
        store: Where the members meet; a fresh one for each meeting.
        backend: What carries the tensors.
        rank: Of this member: trainer ranks are 0 to `num_trainers - 1`, the engine's workers come after them.
        num_trainers: Number of trainer ranks.
        num_workers: Number of workers of the engine.
        host: Address of this process that the others can reach (gloo only).
        device: Where this member's tensors are.
        timeout_s: For meeting, and for a `Pending.wait` that blocks.
        staging_bytes: Bound on a trainer rank's staging buffers (ipc only); a worker's are an eighth of it.

    Raises:
        ConfigError: The backend cannot reach from device to device.
        RuntimeError: A member did not come in time, or could not be reached.
    """
    if (device.type == "cpu") != (backend == "gloo"):
        raise ConfigError(f"weights on {device} cannot go over {backend}: Gloo is for CPUs, NCCL and CUDA IPC for GPUs")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    sends = rank < num_trainers
    size = num_trainers + num_workers
    others = range(num_trainers, size) if sends else range(num_trainers)
    peers = Peers(store, rank=rank, others=others, timeout_s=timeout_s)
    if backend == "gloo":
        group = make_group(store, backend="gloo", host=host, rank=rank, size=size, timeout_s=timeout_s)
        peers.watch_store()
        return GlooTransport(group, peers, timeout_s)
    if backend == "ipc":
        return IpcTransport(
            store,
            rank=rank,
            peers=peers,
            peer_ranks=others,
            memory=CudaMemory(device),
            staging_bytes=staging_bytes if sends else staging_bytes // _SHARE_OF_WORKERS,
            timeout_s=timeout_s,
        )
    group = make_group(store, backend="nccl", host=host, rank=rank, size=size, timeout_s=timeout_s, device=device)
    peers.watch_store()
    transport = NcclTransport(group, device, peers, timeout_s)
    try:
        warm_up(transport, device=device, peers=others, sends=sends, timeout_s=timeout_s)
    except BaseException:
        transport.close()
        raise
    return transport
