"""Who sends which piece of which parameter to whom, and in which order: a pure function of what all sides know.

Trainer ranks and workers each derive it from the workers' slice plans and from what every rank holds, so that nothing
needs to be said while the tensors travel. Parameters go in the checkpoint's order, a bounded number of bytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shoal.types import Interval, ParameterMeta
from shoal.wire.plan import Region, SlicePlan, dtype_from_name

_MAX_AHEAD = 15  # each has half of the time-out, counted from when it was posted

Holdings = Mapping[str, Interval]
"""What one trainer rank holds: elements of flattened parameters."""


class ScheduleError(RuntimeError):
    """What the ranks hold does not make up what the engines need."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of one parameter's elements that travels in one batch."""

    name: str
    interval: Interval


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one parameter's elements that one trainer rank sends."""

    rank: int
    interval: Interval


Ownership = Mapping[str, tuple[Segment, ...]]
"""For each parameter, who sends what of it; the segments cover it in order."""


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor from a trainer rank to a worker.

    Attributes:
        rank: Trainer rank that sends it.
        slice_index: Which slice of the worker's plan it is a piece of.
        start: Number, in the slice's row-major order, of its first element.
        source: The piece within the checkpoint's parameter.
        target: The piece within the engine's.
    """

    rank: int
    slice_index: int
    start: int
    source: Region
    target: Region


def batches(parameters: Sequence[ParameterMeta], max_bytes: int) -> tuple[tuple[Part, ...], ...]:
    """Cut a checkpoint into batches of at most `max_bytes` (in the trainer's types), large parameters into several."""
    done: list[tuple[Part, ...]] = []
    current: list[Part] = []
    room = max_bytes
    for meta in parameters:
        size = dtype_from_name(meta.dtype).itemsize
        start = 0
        while start < meta.num_elements:
            if current and (room < size or (start == 0 and meta.num_elements * size > room)):
                done.append(tuple(current))
                current, room = [], max_bytes
            stop = min(meta.num_elements, start + max(1, room // size))
            current.append(Part(meta.name, Interval(start, stop)))
            room -= (stop - start) * size
            start = stop
    return (*done, tuple(current)) if current else tuple(done)


def num_ahead(*, is_kept: bool, goes_back: bool) -> int:
    """Return how many batches may be under way before the one that is posted last, on either side.

    Args:
        is_kept: Whether the last one takes no memory that is not kept anyway.
        goes_back: Whether what has arrived is sent back; NCCL wants both sides to take turns alike.
    """
    return _MAX_AHEAD if is_kept and not goes_back else 1


def assign(
    parameters: Sequence[ParameterMeta], holdings: Sequence[Holdings], preferred: frozenset[int] = frozenset()
) -> Ownership:
    """Decide which rank sends what. Where several hold the same, the one with the least to send so far does.

    Args:
        parameters: All of the checkpoint.
        holdings: For each rank, what it holds.
        preferred: Ranks that send whatever they hold, since they share a device with the receiver.

    Raises:
        ScheduleError: Nobody holds some elements.
    """
    loads = [0] * len(holdings)
    owners: dict[str, tuple[Segment, ...]] = {}
    for meta in parameters:
        held = [(rank, holding[meta.name]) for rank, holding in enumerate(holdings) if meta.name in holding]
        segments: list[Segment] = []
        position = 0
        while position < meta.num_elements:
            able = [(rank, interval) for rank, interval in held if interval.start <= position < interval.stop]
            able = [choice for choice in able if choice[0] in preferred] or able
            if not able:
                raise ScheduleError(f"no trainer rank holds element {position} of {meta.name} {meta.shape}")
            rank, interval = min(able, key=lambda choice: (loads[choice[0]], choice[0]))
            later = [run.start for other, run in held if other in preferred and run.start > position]
            stop = interval.stop if rank in preferred else min([interval.stop, *later])
            segments.append(Segment(rank, Interval(position, stop)))
            loads[rank] += (stop - position) * dtype_from_name(meta.dtype).itemsize
            position = stop
        owners[meta.name] = tuple(segments)
    return owners


def messages(plan: SlicePlan, ownership: Ownership, part: Part) -> Iterator[Message]:
    """Yield what one worker receives of one part, in the order in which it is sent and received.

    Raises:
        ScheduleError: A slice whose elements are not in the parameter's order would have to be cut.
    """
    for index in plan.by_source.get(part.name, ()):
        piece = plan.slices[index]
        for segment in ownership[part.name]:
            run = run_within(piece.source_region, segment.interval.overlap(part.interval), part.name)
            start = run.start
            for source, target in zip(
                piece.source_region.boxes(run.start, run.stop),
                piece.target_region.boxes(run.start, run.stop),
                strict=True,
            ):
                yield Message(segment.rank, index, start, source, target)
                start += source.num_elements


def run_within(region: Region, interval: Interval, name: str) -> Interval:
    """Return which elements of `region`, counted in its row-major order, lie in `interval` of parameter `name`.

    Raises:
        ScheduleError: The region's order is not the parameter's, and the interval cuts it.
    """
    if interval.size <= 0:
        return Interval(0, 0)
    if region.is_ordered:
        return Interval(region.num_below(interval.start), region.num_below(interval.stop))
    last = region.offset + sum((size - 1) * stride for size, stride in zip(region.shape, region.strides, strict=True))
    if last < interval.start or region.offset >= interval.stop:
        return Interval(0, 0)
    if interval.start <= region.offset and last < interval.stop:
        return Interval(0, region.num_elements)
    raise ScheduleError(
        f"the engine's loader reorders {name}, which is cut into elements {interval.start} to {interval.stop}: it can "
        "only be sent whole, by a rank that holds all of it."
    )
