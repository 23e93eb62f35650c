"""The digest on a real GPU: the compiled kernel against the CPU's arithmetic.

Run on a machine with an NVIDIA GPU: `pytest tests/gpu/test_digest_on_gpu.py`.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from shoal.wire import digest as digest_module
from shoal.wire.digest import DigestPlan, Run, digest, digests, unsigned
from shoal.wire.digest_weights import COLUMNS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]

DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64)
# Below one load, around a row, past the 64 rows of one block, and 3000 rows.
COUNTS = (1, 2, 7, 1000, COLUMNS - 1, COLUMNS, COLUMNS + 1, 66 * COLUMNS + 77, 50_000_000)
STARTS = (0, 1, 1024, 3 * COLUMNS - 5, (1 << 33) + 4096)


def random_bits(num_elements: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return elements with random bits, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    num_words = -(-num_elements * dtype.itemsize // 8)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (num_words,), dtype=torch.int64, generator=generator)
    return words.view(dtype)[:num_elements]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_the_kernel_equals_the_cpu(dtype: torch.dtype, count: int) -> None:
    on_cpu = random_bits(count + 13, dtype)
    on_gpu = on_cpu.cuda()
    for number, start in enumerate(STARTS):
        skipped = 5 * number % 13  # so that addresses are not multiples of 16 bytes
        expected = digest(on_cpu[skipped : skipped + count], start)
        assert digest(on_gpu[skipped : skipped + count], start) == expected
        assert digest(on_gpu[skipped : skipped + count], start + 1) != expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_sums_do_not_overflow(dtype: torch.dtype) -> None:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for value in (torch.iinfo(bits).min, torch.iinfo(bits).max):
        values = torch.full((130 * COLUMNS,), value, dtype=bits)
        assert digest(values.cuda()) == digest(values)


def test_many_runs_of_all_sizes_add_up_in_their_slots() -> None:
    choose = random.Random(0)
    on_cpu = [random_bits(3_000_000, dtype, seed) for seed, dtype in enumerate(DTYPES)]
    on_gpu = [values.cuda() for values in on_cpu]
    expected = [digest(values) for values in on_cpu]
    runs = []
    for slot, values in enumerate(on_gpu):
        cuts = [0, *sorted(choose.sample(range(1, len(values)), 5000)), len(values)]
        runs += [Run(values[low:high], low, slot) for low, high in itertools.pairwise(cuts)]
    choose.shuffle(runs)
    assert unsigned(digests(runs, len(DTYPES), "cuda")) == expected
    runs[77] = Run(runs[77].values, runs[77].start + 1, runs[77].slot)
    assert unsigned(digests(runs, len(DTYPES), "cuda")) != expected


def test_a_plan_reads_the_values_of_the_moment_also_of_runs_that_are_not_contiguous() -> None:
    square = random_bits(700 * 700, torch.bfloat16).view(700, 700).cuda()
    plan = DigestPlan([Run(square, 0, 0), Run(square.t(), 0, 1)], 2, "cuda")
    for row in range(3):
        square[row, 10] = row
        assert unsigned(plan.compute()) == [digest(square.cpu()), digest(square.t().cpu())]


def test_neither_planning_nor_computing_waits_for_the_gpu() -> None:
    values = random_bits(1_000_000, torch.bfloat16).cuda()
    digest(values)  # compiles the kernel and makes the tables of weights
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = digests([Run(values[:999], 0, 0), Run(values[999:], 999, 0)], 1, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert unsigned(found) == [digest(values.cpu())]


def test_without_triton_the_torch_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_bits(3_000_001, torch.bfloat16).cuda()
    with_kernel = digest(values, 5)
    monkeypatch.setattr(digest_module, "find_spec", lambda name: None)
    assert digest(values, 5) == with_kernel
    assert digest(values, 6) != with_kernel


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_values_on_a_gpu_that_is_not_the_current_one() -> None:
    values = random_bits(100_000, torch.bfloat16)
    assert digest(values.to("cuda:1")) == digest(values)
    with pytest.raises(ValueError, match="run 0 lies on cuda:1"):
        digests([Run(values.to("cuda:1"), 0, 0)], 1, "cuda:0")
