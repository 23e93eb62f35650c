"""What the wire itself can do: the same bytes between the same devices, with nothing around them.

Run as `python -m shoal.bench.raw ANSWER SETTINGS RANK PORT`, once for each member: trainer ranks, then workers. With
engines on the trainer's GPU there is no wire, and one process measures the device's own copies.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.bench.children import run_children
from shoal.bench.model import parameters_of
from shoal.bench.settings import BenchSettings
from shoal.engines.command import LOOPBACK
from shoal.types import ParameterMeta
from shoal.weights.group import BATCH_BYTES
from shoal.wire.plan import dtype_from_name
from shoal.wire.rendezvous import host_store, join_store
from shoal.wire.schedule import batches

NUM_WARM_UPS = 3
_JOIN_TIMEOUT_S = 120.0


def measure_raw(settings: BenchSettings, timeout_s: float) -> dict[str, list[float]]:
    """Return seconds of each repeat: `"p2p"` and `"broadcast"`, or `"copy"` where trainer and engine share a GPU.

    Raises:
        StageError: A process failed or hung.
    """
    store = host_store(LOOPBACK, _JOIN_TIMEOUT_S)
    size = 1 if settings.is_colocated else settings.num_ranks + settings.num_workers
    arguments = [(settings.to_json(), str(rank), str(store.port)) for rank in range(size)]
    answer: dict[str, list[float]] = run_children("shoal.bench.raw", arguments, timeout_s=timeout_s)
    return answer


class _Member:
    """One process of the measurement, with a list of tensors of the checkpoint's shapes."""

    def __init__(self, settings: BenchSettings, rank: int) -> None:
        self.settings = settings
        self.rank = rank
        self.device = _device(settings, rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        parameters = parameters_of(settings)
        self._tensors = _tensors(parameters, self.device)
        self._batches = batches(parameters, BATCH_BYTES)

    def exchange(self) -> None:
        """Send or receive every piece, in place, a batch at a time."""
        for parts in self._batches:
            operations = []
            tags: Counter[int] = Counter()  # Gloo pairs by tag
            for part in parts:
                whole = self._tensors[part.name][part.interval.start : part.interval.stop]
                for peer, piece in self._pieces(whole):
                    kind = dist.isend if self.rank < self.settings.num_ranks else dist.irecv
                    operations.append(dist.P2POp(kind, piece, peer, tag=tags[peer]))
                    tags[peer] += 1
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def broadcast(self) -> None:
        """Broadcast every tensor from the first member to all others."""
        for parts in self._batches:
            works = [
                dist.broadcast(self._tensors[part.name][part.interval.start : part.interval.stop], 0, async_op=True)
                for part in parts
            ]
            for work in works:
                if work is not None:
                    work.wait()

    def copy(self) -> Callable[[], None]:
        """Return a copy from and to every tensor on this device; with tensor parallelism, of a worker's share."""
        sources = [value.tensor_split(self.settings.tensor_parallel_size)[0] for value in self._tensors.values()]
        targets = [torch.empty_like(value) for value in sources]
        return lambda: torch._foreach_copy_(targets, sources)

    def samples(self, action: Callable[[], None]) -> list[float]:
        """Repeat an action that all members take part in; return the seconds until all have finished it."""
        seconds = []
        for _ in range(NUM_WARM_UPS + self.settings.repeats):
            self._meet()
            began = time.perf_counter()
            action()
            self._meet()
            seconds.append(time.perf_counter() - began)
        return seconds[NUM_WARM_UPS:]

    def _meet(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _pieces(self, whole: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what goes to, or comes from, each peer: every rank has its share, every worker needs its own."""
        ranks, tp = self.settings.num_ranks, self.settings.tensor_parallel_size
        pieces = whole.tensor_split(ranks * tp)
        if self.rank < ranks:
            for worker in range(self.settings.num_workers):
                yield ranks + worker, pieces[self.rank * tp + worker % tp]
        else:
            for peer in range(ranks):
                yield peer, pieces[peer * tp + (self.rank - ranks) % tp]


def _device(settings: BenchSettings, rank: int) -> torch.device:
    if settings.device == "cpu":
        return torch.device("cpu")
    own = range(settings.num_ranks)
    return torch.device("cuda", rank if rank in own else settings.engine_devices[rank - settings.num_ranks])


def _tensors(parameters: Sequence[ParameterMeta], device: torch.device) -> dict[str, torch.Tensor]:
    return {
        meta.name: torch.zeros(meta.num_elements, dtype=dtype_from_name(meta.dtype), device=device)
        for meta in parameters
    }


def main(answer: str, settings_text: str, rank_text: str, port: str) -> None:
    """Be one member."""
    settings, rank = BenchSettings.from_json(settings_text), int(rank_text)
    if settings.is_colocated:
        member = _Member(settings, 0)
        result = {"copy": member.samples(member.copy())}
    else:
        store = join_store(LOOPBACK, int(port), _JOIN_TIMEOUT_S)
        backend = "nccl" if settings.device == "cuda" else "gloo"
        size = settings.num_ranks + settings.num_workers
        member = _Member(settings, rank)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)  # type: ignore[arg-type]
        result = {"p2p": member.samples(member.exchange), "broadcast": member.samples(member.broadcast)}
        dist.destroy_process_group()
    if rank == 0:
        Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
