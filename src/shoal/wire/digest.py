"""A 64-bit digest of a tensor's bits, computed where the tensor lies.

With `b_i` the bits of element i as a signed integer, and `w_i` fixed odd pseudo-random weights,

    digest = sum_i b_i * w_i  mod 2^64,    w_i = column[i mod C] * row[i div C]

The sum is modular, so it does not depend on the order of summation and is exact on every device. One changed element
always changes it: the difference is below 2^64 in magnitude and a weight is odd, hence invertible. Exchanged or shifted
elements change it because weights differ by position. It guards against mistakes and corruption, not against attackers.

Because it is a sum, parts of a tensor that lie in different places (ranks, buffers, devices) have shares, each computed
where the part lies, that add up to the digest of the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from shoal.wire.digest_weights import COLUMNS, column_weights, row_weights

if TYPE_CHECKING:
    from shoal.wire.digest_cuda import KernelPlan

_ROWS_PER_CHUNK = 16  # 256k elements: the int64 temporaries (2 MB) stay in a core's cache
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of some whole, and the digest that they count in.

    Attributes:
        values: The elements, in logical (row-major) order.
        start: Number of the first one among the elements of the whole.
        slot: Which digest their share is added to.
    """

    values: torch.Tensor
    start: int
    slot: int


def digest(tensor: torch.Tensor, start: int = 0) -> int:
    """Return the digest of `tensor`'s elements in logical (row-major) order, in `[0, 2^64)`.

    The layout in memory does not matter, the order of the elements does. Bits are compared, so 0.0 and -0.0 differ.

    Args:
        tensor: A whole, or consecutive elements of one.
        start: Number of `tensor`'s first element in the whole. The shares of a partition of the whole add up to the
            digest of the whole, mod 2^64.
    """
    return unsigned(digests([Run(tensor, start, 0)], 1, tensor.device))[0]


def digests(runs: Sequence[Run], num_slots: int, device: torch.device | str) -> torch.Tensor:
    """Return `[num_slots]` int64 digests on `device`, each the sum of its runs' shares mod 2^64 (see `unsigned`).

    On a GPU nothing waits for the device: the result is ready when the current stream is.

    Raises:
        TypeError: A run's dtype has no digest.
        ValueError: A run lies elsewhere, starts below 0 or names a slot that is not there.
    """
    return DigestPlan(runs, num_slots, device).compute()


def unsigned(values: torch.Tensor) -> list[int]:
    """Return digests from a tensor as integers in `[0, 2^64)`; waits for the device."""
    return [value & _MASK for value in values.tolist()]


class DigestPlan:
    """Digests of runs that stay where they are while their values change: planned once, computed many times.

    On a GPU all runs are read by one kernel launch (one per element size, where sizes are mixed), over a table uploaded
    here, on the current stream; without Triton each run takes a few torch operations instead. The plan keeps the runs'
    memory alive. A run that is not contiguous is copied into a buffer of the plan's at each `compute`.
    """

    def __init__(self, runs: Sequence[Run], num_slots: int, device: torch.device | str) -> None:
        """Plan the digests of `runs`; arguments and errors as of `digests`."""
        self._device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", which tensors say
        self._num_slots = num_slots
        for index, run in enumerate(runs):
            self._check(index, run)
        self._runs = [run for run in runs if run.values.numel()]
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kernels: list[KernelPlan] | None = None
        if self._device.type == "cuda" and find_spec("triton") is not None:
            self._kernels = self._plan_kernels()

    def compute(self) -> torch.Tensor:
        """Return `[num_slots]` int64 digests of the runs' present values, as `digests` does."""
        out = torch.zeros(self._num_slots, dtype=torch.int64, device=self._device)
        self.add_to(out)
        return out

    def add_to(self, out: torch.Tensor) -> None:
        """Add the digests of the runs' present values to `out`, `[num_slots]` int64 on the plan's device."""
        if self._kernels is None:
            for run in self._runs:
                out[run.slot] += _share(_bits(run.values), run.start)
            return
        for copy, values in self._copies:
            copy.copy_(values)
        for kernel in self._kernels:
            kernel.add_to(out)

    def _check(self, index: int, run: Run) -> None:
        values = run.values
        if values.is_complex() or values.element_size() not in _INTEGER_OF_SIZE:
            raise TypeError(f"no digest for dtype {values.dtype}")
        if values.device != self._device:
            raise ValueError(f"run {index} lies on {values.device}, its digest is to be computed on {self._device}")
        if run.start < 0:
            raise ValueError(f"run {index} starts at element {run.start}: elements are numbered from 0")
        if not 0 <= run.slot < self._num_slots:
            raise ValueError(f"run {index} counts in slot {run.slot}, there are {self._num_slots}")

    def _plan_kernels(self) -> list[KernelPlan]:
        # Imported here: Triton comes with torch for CUDA only.
        from shoal.wire.digest_cuda import KernelPlan, Span

        spans: defaultdict[int, list[Span]] = defaultdict(list)
        for run in self._runs:
            values = run.values.detach()
            if not values.is_contiguous():
                copy = torch.empty_like(values, memory_format=torch.contiguous_format)
                self._copies.append((copy, values))
                values = copy
            spans[values.element_size()].append((values.data_ptr(), values.numel(), run.start, run.slot))
        return [KernelPlan(of_size, size, self._device) for size, of_size in spans.items()]


class RepeatedDigests:
    """Digests of runs that are made anew each time and mostly come to lie where they lay before.

    What is kept is the kernel's table of addresses, not the memory: it is used again only for the same addresses.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        self._num_slots = num_slots
        self._device = torch.empty(0, device=device).device
        self._addresses: tuple[tuple[int, int, int, int], ...] = ()
        self._kernels: list[KernelPlan] | None = None

    def compute(self, runs: Sequence[Run]) -> torch.Tensor:
        """Return `[num_slots]` int64 digests, as `digests` does."""
        if self._device.type != "cuda" or not all(run.values.is_contiguous() for run in runs):
            return digests(runs, self._num_slots, self._device)
        addresses = tuple((run.values.data_ptr(), run.values.nbytes, run.start, run.slot) for run in runs)
        if self._kernels is None or addresses != self._addresses:
            plan = DigestPlan(runs, self._num_slots, self._device)
            self._addresses, self._kernels = addresses, plan._kernels
            return plan.compute()
        out = torch.zeros(self._num_slots, dtype=torch.int64, device=self._device)
        for kernel in self._kernels:
            kernel.add_to(out)
        return out


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements, flat, as signed integers of their size."""
    return tensor.detach().reshape(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])


def _share(bits: torch.Tensor, start: int) -> torch.Tensor:
    """Return the share of elements number `start` and on, a 0-d int64 tensor where they lie."""
    columns = column_weights(bits.device)
    first_row, column = divmod(start, COLUMNS)
    rows = row_weights((start + bits.numel()) // COLUMNS + 1, bits.device)
    if column + bits.numel() <= COLUMNS:
        return _part_of_row(bits, columns[column:], rows[first_row])
    rows = rows[first_row:]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    if column:
        head = bits[: COLUMNS - column]
        total += _part_of_row(head, columns[column:], rows[0])
        bits, rows = bits[head.numel() :], rows[1:]
    num_rows = bits.numel() // COLUMNS
    table = bits[: num_rows * COLUMNS].view(num_rows, COLUMNS)
    for row in range(0, num_rows, _ROWS_PER_CHUNK):
        # `copy`: the product is formed in place, and 8-byte elements would else be the tensor's own memory.
        chunk = table[row : row + _ROWS_PER_CHUNK].to(torch.int64, copy=True)
        total += (chunk.mul_(columns).sum(dim=1) * rows[row : row + len(chunk)]).sum()
    tail = bits[num_rows * COLUMNS :]
    return total + _part_of_row(tail, columns, rows[num_rows]) if tail.numel() else total


def _part_of_row(bits: torch.Tensor, columns: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return (bits.to(torch.int64) * columns[: bits.numel()]).sum() * row
