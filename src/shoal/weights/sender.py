"""What one trainer rank does in a publish: send its pieces of every parameter, and digest them."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.protocols import Parcel, Pending, WeightSource
from shoal.weights.batch import Batch, Contents, Line, Scratch, draw_batches, piece_of
from shoal.wire.agreement import Verify
from shoal.wire.digest import DigestPlan, RepeatedDigests
from shoal.wire.liveness import GoneError, LateError, patience_left
from shoal.wire.plan import SlicePlan
from shoal.wire.schedule import Holdings, num_ahead
from shoal.wire.side_stream import SideStream


@dataclass(frozen=True, slots=True)
class Loss:
    """Why an engine could not be sent to.

    Attributes:
        reason: For people.
        members: Which members of its group it was that did not come along, where that is known.
    """

    reason: str
    members: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SendReport:
    """What came of sending.

    Attributes:
        digests: `[pieces]` int64, this rank's share of each piece's digest, in the order of `WeightSender.pieces`;
            zeros with `verify="off"`.
        lost: Engines that could not be sent to, and why.
        mismatches: With `verify="full"`: for each engine, pieces that came back different.
        num_bytes: Sent, over all engines.
    """

    digests: torch.Tensor
    lost: Mapping[str, Loss]
    mismatches: Mapping[str, tuple[str, ...]]
    num_bytes: int


class WeightSender:
    """Sends one source to all lines, ahead of the wire.

    The tensors under way are views of the parameters wherever the engine keeps them in the trainer's type and the
    piece is contiguous. The others are copied into scratch of two batches, which is kept, or are the source's own
    scratch, of at most two batches.

    Args:
        source: This rank's part of the weights.
        rank: This trainer rank.
        holdings: What each rank holds.
        lines: To all engines.
        plans: For each line, its workers' slice plans.
        device: That the transports carry tensors of.
        batch_bytes: Bound on one batch.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        rank: int,
        holdings: Sequence[Holdings],
        lines: Sequence[Line],
        plans: Sequence[Sequence[SlicePlan]],
        device: torch.device,
        batch_bytes: int,
    ) -> None:
        self._source = source
        self._rank = rank
        self._holdings = holdings
        self._lines = tuple(lines)
        self._plans = tuple(plans)
        self._device = device
        self._batch_bytes = batch_bytes
        self._held = holdings[rank]
        self.pieces, self._batches = draw_batches(source, rank, holdings, lines, plans, batch_bytes)
        self._scratch = Scratch(max((batch.scratch_bytes for batch in self._batches), default=0), device)
        self._beside = SideStream(device)
        self._in_place: tuple[list[Contents], DigestPlan] | None = None
        numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self.slots = {
            plan.worker: tuple(numbers[piece_of(item)] for item in plan.slices) for workers in plans for plan in workers
        }
        """For each worker, which of `pieces` each slice of its plan is."""

    @property
    def wanted(self) -> frozenset[str]:
        """Parameters that engines take something of."""
        return frozenset(piece.source for piece in self.pieces)

    def with_line(self, index: int, line: Line, workers: Sequence[SlicePlan]) -> WeightSender:
        """Return a sender like this one in which another engine has taken the place of one."""
        return WeightSender(
            self._source,
            rank=self._rank,
            holdings=self._holdings,
            lines=(*self._lines[:index], line, *self._lines[index + 1 :]),
            plans=(*self._plans[:index], workers, *self._plans[index + 1 :]),
            device=self._device,
            batch_bytes=self._batch_bytes,
        )

    @torch.no_grad()
    def send(self, lines: Sequence[int], *, timeout_s: float, verify: Verify) -> SendReport:
        """Send the current weights; an engine that fails is left out from then on. A collective where `source` is one.

        Args:
            lines: Which engines take part.
            timeout_s: For an engine to take what is under way.
            verify: Whether to digest what is sent, and whether to compare bit for bit what the engines then hold.
        """
        return _Sending(self, lines, timeout_s, verify).run()

    def loaded(self) -> Iterator[tuple[Batch, Contents]]:
        """Go through the source; yield each batch with what it holds now, once that is filled."""
        stream = self._source.tensors()
        values: dict[str, torch.Tensor] = {}
        for batch in self._batches:
            values = {name: value for name, value in values.items() if name == batch.names[0]}
            wanted = batch.names[-1]
            while wanted not in values:
                name, value = next(stream)
                values[name] = value
            yield batch, batch.contents([values[name] for name in batch.names], self._held, self._scratch)
        # To the end: what follows the last parameter that an engine wants may be a collective.
        for _ in stream:
            pass

    def expect_in_place(self) -> torch.Tensor | None:
        """Digest what lay in place the last time, where it lay. It most likely still does, and nothing is sent yet.

        Not on CPUs, where it would not run beside the sending but before it.
        """
        if self._in_place is None or self._device.type == "cpu":
            return None
        return self._in_place[1].compute()

    def digests_in_place(self, contents: list[Contents], expected: torch.Tensor | None) -> torch.Tensor:
        """Return `[pieces]` int64, this rank's shares of the digests of batches that lie in place.

        Args:
            contents: Of these batches.
            expected: What `expect_in_place` returned.
        """
        known = self._in_place
        if known is not None and len(known[0]) == len(contents) and all(map(operator.is_, known[0], contents)):
            return known[1].compute() if expected is None else expected
        plan = DigestPlan([run for of_batch in contents for run in of_batch.runs], len(self.pieces), self._device)
        self._in_place = contents, plan
        return plan.compute()


class _Sending:
    """One publish of one sender."""

    def __init__(self, sender: WeightSender, lines: Sequence[int], timeout_s: float, verify: Verify) -> None:
        self._sender = sender
        self._live = list(lines)
        self._timeout_s = timeout_s
        self._verify = verify
        self._lost: dict[str, Loss] = {}
        self._mismatches: dict[str, tuple[str, ...]] = {}
        self._num_bytes = 0

    def run(self) -> SendReport:
        sender = self._sender
        shares = torch.zeros(len(sender.pieces), dtype=torch.int64, device=sender._device)
        under_way: deque[tuple[Batch, Contents, dict[int, Pending]]] = deque()
        in_place: list[Contents] = []
        expected = None
        for number, (batch, contents) in enumerate(sender.loaded()):
            if number == 0 and self._verify != "off":
                with sender._beside.after_current():
                    expected = sender.expect_in_place()
            while contents.half is not None and any(former.half is contents.half for _, former, _ in under_way):
                self._settle(*under_way.popleft())
            contents.fill()
            pending = self._post(contents)
            if self._verify != "off":
                if contents.is_in_place:
                    in_place.append(contents)
                else:
                    if batch.digests is None:
                        batch.digests = RepeatedDigests(len(sender.pieces), sender._device)
                    with sender._beside.after_current():
                        shares += batch.digests.compute(contents.runs)
            under_way.append((batch, contents, pending))
            while len(under_way) > num_ahead(is_kept=contents.is_kept, goes_back=self._verify == "full"):
                self._settle(*under_way.popleft())
        if in_place:
            with sender._beside.after_current():
                shares += sender.digests_in_place(in_place, expected)
        for sent in under_way:
            self._settle(*sent)
        last_sent = time.monotonic()
        for index in tuple(self._live):
            self._guarded(index, lambda line: line.transport.finish(patience_left(last_sent, self._timeout_s)))
        sender._beside.join()
        return SendReport(digests=shares.cpu(), lost=self._lost, mismatches=self._mismatches, num_bytes=self._num_bytes)

    def _post(self, contents: Contents) -> dict[int, Pending]:
        pending: dict[int, Pending] = {}
        for index in tuple(self._live):
            parcels = contents.parcels.get(index)
            if not parcels:
                continue
            self._num_bytes += sum(parcel.tensor.nbytes for parcel in parcels)

            def post(line: Line, index: int = index, parcels: Sequence[Parcel] = parcels) -> None:
                pending[index] = line.transport.send(parcels)

            self._guarded(index, post)
        return pending

    def _settle(self, batch: Batch, contents: Contents, pending: dict[int, Pending]) -> None:
        """Wait until a batch is sent, so that its scratch can be used again; compare what comes back, if asked to."""
        if not contents.is_in_place:
            self._sender._beside.join()  # it may be being digested
        for index, sent in pending.items():
            if index in self._live:
                self._guarded(index, lambda line, sent=sent: sent.wait())  # type: ignore[misc]
            if index in self._live and self._verify == "full":
                self._guarded(index, lambda line, index=index: self._compare(line, batch, contents, index))  # type: ignore[misc]

    def _compare(self, line: Line, batch: Batch, contents: Contents, index: int) -> None:
        parcels, tensors = batch.parcels[index], contents.tensors
        echoes = [Parcel(torch.empty_like(tensors[load]), member) for load, member in parcels]
        line.transport.receive(echoes).wait()
        for (load, _), echo in zip(parcels, echoes, strict=True):
            if not torch.equal(_bits(echo.tensor), _bits(tensors[load])):
                known = self._mismatches.get(line.name, ())
                self._mismatches[line.name] = (*known, batch.loads[load].source)

    def _guarded(self, index: int, action: Callable[[Line], None]) -> None:
        """Do something with one line; if that fails, go on without it."""
        line = self._sender._lines[index]
        try:
            action(line)
        except Exception as error:
            members = error.members if isinstance(error, (LateError, GoneError)) else ()
            self._lost[line.name] = Loss(f"{type(error).__name__}: {error}", members)
            self._live.remove(index)
            line.close()


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)
