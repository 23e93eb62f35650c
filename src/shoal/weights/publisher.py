"""Publish the trainer's weights to every engine, and prove that each worker holds them.

Order: pause each engine (keeping what runs) → send every parameter → compare digests → drop the prefix cache, which
holds keys and values of the old weights → resume, after a failure too.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from shoal.errors import WeightProofError, WeightSyncError
from shoal.protocols import WeightSource
from shoal.types import UNPROVEN, ParameterMeta, PublishReport
from shoal.weights.link import AbandonableCall, EngineLink
from shoal.wire.digest import digest
from shoal.wire.plan import Region, SlicePlan, dtype_from_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A region of a parameter in an engine's type: what one digest is about."""

    source: str
    region: Region
    dtype: str


class WeightPublisher:
    """Sends one source's weights to all linked engines. Lives on trainer rank 0.

    Args:
        source: The trainer's weights.
        links: One for each engine, not connected yet.
        timeout_s: For each step of a publish.
    """

    def __init__(self, source: WeightSource, links: Sequence[EngineLink], timeout_s: float) -> None:
        self._source = source
        self._links = tuple(links)
        self._timeout_s = timeout_s
        self._attempt = 0
        self._wire: tuple[ParameterMeta, ...] = ()
        self._pieces: dict[str, set[_Piece]] = {}
        # Two threads for each engine: one that still waits for an engine must not keep its `/resume` from being sent.
        self._pool = ThreadPoolExecutor(max_workers=max(1, 2 * len(self._links)), thread_name_prefix="publish")
        self.num_publishes = 0
        self.num_proven = 0

    @property
    def plans(self) -> tuple[SlicePlan, ...]:
        """Every worker's slice plan; empty before `connect`."""
        return tuple(plan for link in self._links for plan in link.plans)

    def connect(self) -> None:
        """Meet every engine's workers and agree on what will be sent.

        Raises:
            WeightSyncError: An engine did not come, or holds another model.
        """
        parameters = self._source.metadata()
        self._on_each(lambda link: link.connect(parameters), "joining the weight group")
        self._wire = wire_metadata(parameters, self.plans)
        self._pieces = _pieces_by_source(self.plans)
        for link in self._links:
            link.announce(self._wire)

    def publish(self, version: int) -> PublishReport:
        """Send the current weights and prove them. Repeating it with the same version is harmless.

        Raises:
            WeightSyncError: An engine failed or timed out.
            WeightProofError: An engine holds something else than was sent.
        """
        began = time.monotonic()
        self._attempt += 1
        self.num_publishes += 1
        try:
            self._on_each(lambda link: link.control("/pause?mode=keep"), "pausing", until=ALL_COMPLETED)
            expected = self._transfer(version)
            num_digests = sum(self._prove(link, version, expected) for link in self._links)
            self._on_each(lambda link: link.drop_prefix_cache(), "dropping its prefix cache")
        except BaseException:
            for link in self._links:
                link.client.weight_version = UNPROVEN
            self._resume_what_can_be()
            raise
        self._on_each(lambda link: link.control("/resume"), "resuming", until=ALL_COMPLETED)
        for link in self._links:
            link.client.weight_version = version
        self.num_proven += 1
        return PublishReport(
            version=version,
            num_workers=sum(link.num_workers for link in self._links),
            num_digests=num_digests,
            seconds=time.monotonic() - began,
        )

    def close(self) -> None:
        """Leave all groups and give the threads back."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for link in self._links:
            link.close()

    def _resume_what_can_be(self) -> None:
        """Resume every engine after a failure, whose own error is the one to raise."""
        try:
            self._on_each(lambda link: link.control("/resume"), "resuming", until=ALL_COMPLETED)
        except WeightSyncError as error:
            logger.warning("after a failed publish: %s", error)

    def _transfer(self, version: int) -> dict[_Piece, int]:
        """Send everything; return the digest of each piece as the trainer has it."""
        body = {"update_info": {"version": version, "attempt": self._attempt}}

        def receive(link: EngineLink) -> None:
            link.control("/start_weight_update")
            try:
                link.control("/update_weights", body)
            finally:
                # Even after a failure: a session left open would make the next start fail.
                link.control("/finish_weight_update")

        sending = AbandonableCall(self._send)
        try:
            self._on_each(receive, "receiving the weights")
        except WeightSyncError as error:
            if sending.error is not None:
                # An engine that waits in vain is what is seen of a failure to send.
                raise error from sending.error
            raise
        expected = sending.result(self._timeout_s, "the last parameter to be sent")
        assert isinstance(expected, dict)
        return expected

    @torch.no_grad()
    def _send(self) -> dict[_Piece, int]:
        expected: dict[_Piece, int] = {}
        dtypes = {meta.name: dtype_from_name(meta.dtype) for meta in self._wire}
        for name, tensor in self._source.tensors():
            if name not in dtypes:
                continue
            value = tensor.to(dtypes[name]).contiguous()
            works = [link.send(value) for link in self._links]
            for piece in self._pieces[name]:
                expected[piece] = digest(piece.region.view(value).to(dtype_from_name(piece.dtype)))
            for work in works:
                work.wait()
        return expected

    def _prove(self, link: EngineLink, version: int, expected: dict[_Piece, int]) -> int:
        """Compare one engine's digests with the trainer's; return how many."""
        count = 0
        for plan, digests in zip(link.plans, link.digests(version, self._attempt), strict=True):
            if len(digests) != len(plan.slices):
                raise WeightProofError(f"{plan.worker} sent {len(digests)} digests for {len(plan.slices)} slices")
            for piece, held in zip(plan.slices, digests, strict=True):
                sent = expected[_Piece(piece.source, piece.source_region, piece.dtype)]
                if held != sent:
                    raise WeightProofError(
                        f"{plan.worker} holds other values in {piece.target} than the trainer has in {piece.source} "
                        f"(version {version}: digest {held:016x}, expected {sent:016x}). The engine must not serve; "
                        "this is a fault of the transfer or of memory, please report it with the log."
                    )
            count += len(digests)
        return count

    def _on_each(self, action: Callable[[EngineLink], None], what: str, *, until: str = FIRST_EXCEPTION) -> None:
        """Do something with every engine at once; raise the first failure, at once unless told to wait for all."""
        futures: dict[Future[None], EngineLink] = {self._pool.submit(action, link): link for link in self._links}
        done, pending = wait(futures, timeout=self._timeout_s, return_when=until)
        for future in done:
            future.result()
        if pending:
            names = ", ".join(sorted(futures[future].client.name for future in pending))
            raise WeightSyncError(f"{names} did not finish {what} within {self._timeout_s:g} s (weight_sync_timeout_s)")


def wire_metadata(parameters: Sequence[ParameterMeta], plans: Sequence[SlicePlan]) -> tuple[ParameterMeta, ...]:
    """Decide what travels: the parameters that an engine has a use for, each in the type in which engines keep it.

    A parameter that engines keep in several types travels in the trainer's own.
    """
    dtypes: dict[str, set[str]] = defaultdict(set)
    for plan in plans:
        for piece in plan.slices:
            dtypes[piece.source].add(piece.dtype)
    return tuple(
        replace(meta, dtype=next(iter(dtypes[meta.name])) if len(dtypes[meta.name]) == 1 else meta.dtype)
        for meta in parameters
        if meta.name in dtypes
    )


def _pieces_by_source(plans: Sequence[SlicePlan]) -> dict[str, set[_Piece]]:
    pieces: dict[str, set[_Piece]] = defaultdict(set)
    for plan in plans:
        for piece in plan.slices:
            pieces[piece.source].add(_Piece(piece.source, piece.source_region, piece.dtype))
    return pieces
