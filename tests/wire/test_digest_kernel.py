"""The CUDA kernel's arithmetic, without a GPU: Triton's interpreter runs it on the CPU's memory.

Run with Triton installed: `TRITON_INTERPRET=1 pytest tests/wire/test_digest_kernel.py` (a minute or two).
The compiled kernel is tested on a GPU, in tests/gpu/test_digest_on_gpu.py.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from shoal.wire.digest import digest
from shoal.wire.digest_weights import COLUMNS

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which comes with torch for CUDA, is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 to run the kernel"),
]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Below a load, around a row, and past the rows of one block.
COUNTS = (1, 7, COLUMNS - 1, COLUMNS + 1, 66 * COLUMNS + 77)
STARTS = (0, 3 * COLUMNS - 5, (COLUMNS << 10) + 4096)


@pytest.mark.parametrize("size", INTEGERS)
def test_the_kernel_adds_every_runs_share_to_its_slot(size: int) -> None:
    from shoal.wire.digest_cuda import KernelPlan

    generator = torch.Generator().manual_seed(size)
    num_bytes = (max(COUNTS) + 100) * size
    memory = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(INTEGERS[size])
    spans, expected = [], [0] * 3
    for number, (count, start) in enumerate((count, start) for count in COUNTS for start in STARTS):
        values = memory[17 * number % 100 :][:count]
        spans.append((values.data_ptr(), count, start, number % 3))
        expected[number % 3] += digest(values, start)
    out = torch.zeros(3, dtype=torch.int64)
    KernelPlan(spans, size, torch.device("cpu")).add_to(out)
    assert [value % 2**64 for value in out.tolist()] == [value % 2**64 for value in expected]
    first = out.clone()
    memory[50] ^= 1
    out.zero_()
    KernelPlan(spans, size, torch.device("cpu")).add_to(out)
    assert not torch.equal(out, first)  # the control: it reads what it is said to read
