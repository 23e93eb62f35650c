"""The digest of a tensor's bits: what must leave it alone, and what must change it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.wire.digest import DigestPlan, Run, digest, digests, unsigned

COLUMNS = 1 << 14  # the width of the table that the digest lays the elements out in
CHUNK = 16 * COLUMNS  # elements that it sums at a time

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
# On both sides of the end of a row, of a chunk, and with tails of every kind.
SIZES = (
    1,
    2,
    7,
    COLUMNS - 1,
    COLUMNS,
    COLUMNS + 1,
    3 * COLUMNS,
    3 * COLUMNS + 5,
    CHUNK,
    CHUNK + 1,
    CHUNK + COLUMNS + 3,
)


def random_bits(num_elements: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return elements whose bits are random: NaNs, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (num_elements * size,), dtype=torch.uint8, generator=generator).view(dtype)


def splitmix64(seed: int) -> int:
    """Steele et al. 2014, in Python's own integers."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def slow_digest(tensor: torch.Tensor) -> int:
    """The formula of the module's docstring, one Python integer at a time."""
    flat = tensor.contiguous().view(-1)
    total = 0
    for index, bits in enumerate(flat.view(INTEGERS[flat.element_size()]).tolist()):
        column = splitmix64(1 + index % COLUMNS) | 1
        row = splitmix64(1 + index // COLUMNS + (1 << 40)) | 1
        total += bits * column * row
    return total % (1 << 64)


def flip(tensor: torch.Tensor, element: int, bit: int) -> torch.Tensor:
    """Return a copy with one bit of one element flipped."""
    changed = tensor.clone()
    octets = changed.view(torch.uint8)
    octets[element * tensor.element_size() + bit // 8] ^= 1 << (bit % 8)
    return changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_elements", [1, 5, 1000, COLUMNS, COLUMNS + 3, 2 * COLUMNS + 1])
def test_the_digest_equals_a_slow_reference(dtype: torch.dtype, num_elements: int) -> None:
    tensor = random_bits(num_elements, dtype)
    assert digest(tensor) == slow_digest(tensor)


def test_the_digest_of_known_values_stays_what_it_is() -> None:
    # Both ends of a transfer may run different releases of Shoal: a changed formula is a changed protocol.
    assert digest(torch.arange(10, dtype=torch.int32)) == 0x1B91B922A43FB6FF
    assert digest(torch.arange(20000, dtype=torch.int16)) == 0xCEA7112127FE5BDE


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(DTYPES), st.sampled_from(SIZES), st.data())
def test_any_one_flipped_bit_changes_the_digest(dtype: torch.dtype, num_elements: int, data: st.DataObject) -> None:
    tensor = random_bits(num_elements, dtype)
    edges = [i for i in (0, COLUMNS - 1, COLUMNS, CHUNK - 1, CHUNK, num_elements - 1) if i < num_elements]
    element = data.draw(st.one_of(st.sampled_from(edges), st.integers(0, num_elements - 1)))
    bit = data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    changed = flip(tensor, element, bit)
    assert digest(changed) != digest(tensor)
    assert digest(flip(changed, element, bit)) == digest(tensor)  # flipped back: the change was all there was


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_of_a_small_tensor_counts(dtype: torch.dtype) -> None:
    tensor = random_bits(9, dtype)
    flipped = [digest(flip(tensor, i, bit)) for i in range(9) for bit in range(8 * tensor.element_size())]
    assert len(flipped) == 72 * tensor.element_size()
    assert digest(tensor) not in flipped


@settings(deadline=None, max_examples=60)
@given(st.sampled_from((torch.bfloat16, torch.float32)), st.integers(2, 6), st.integers(1, 9000), st.data())
def test_exchanged_slices_change_the_digest(dtype: torch.dtype, rows: int, width: int, data: st.DataObject) -> None:
    tensor = random_bits(rows * width, dtype, seed=rows * width).view(rows, width)
    first, second = data.draw(st.lists(st.integers(0, rows - 1), min_size=2, max_size=2, unique=True))
    order = list(range(rows))
    order[first], order[second] = second, first
    exchanged = tensor[order]
    same_bits = torch.equal(exchanged.view(torch.uint8), tensor.view(torch.uint8))
    assert (digest(exchanged) == digest(tensor)) is same_bits


def test_a_shift_by_one_element_changes_the_digest_where_a_plain_sum_would_not_see_it() -> None:
    tensor = random_bits(COLUMNS + 100, torch.int32)
    shifted = tensor.roll(1)
    assert int(tensor.sum()) == int(shifted.sum())  # the control: what a weaker digest would say
    assert digest(shifted) != digest(tensor)


def test_whole_rows_of_the_table_exchanged_change_the_digest() -> None:
    # Column weights repeat from row to row, so only the row weights can tell these apart.
    tensor = random_bits(4 * COLUMNS, torch.bfloat16).view(4, COLUMNS)
    assert digest(tensor[[1, 0, 2, 3]]) != digest(tensor)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 900), st.sampled_from(("t", "step", "narrow")))
def test_a_view_in_another_layout_has_the_digest_of_its_contiguous_copy(
    dtype: torch.dtype, rows: int, columns: int, kind: str
) -> None:
    bits = random_bits(3 * rows * 2 * columns, dtype, seed=rows).view(3 * rows, 2 * columns)
    view = {"t": bits.t(), "step": bits[::3, ::2], "narrow": bits.narrow(1, columns // 2, columns)}[kind]
    copy = view.clone(memory_format=torch.contiguous_format)
    assert digest(view) == digest(copy)
    assert digest(view) == digest(copy.view(-1))  # the shape is no part of it


def test_the_order_of_elements_matters_where_the_layout_does_not() -> None:
    square = random_bits(64, torch.float32).view(8, 8)
    assert digest(square.t()) != digest(square)  # the control of the test above: the same memory, another order


def test_no_elements_have_digest_zero_and_one_zero_has_too_but_minus_zero_has_not() -> None:
    for shape in ((0,), (0, 5), (3, 0)):
        assert digest(torch.empty(shape)) == 0
    assert digest(torch.tensor(0.0)) == 0
    assert digest(torch.tensor(-0.0)) != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_taking_the_digest_leaves_the_tensor_as_it_was(dtype: torch.dtype) -> None:
    tensor = random_bits(CHUNK + COLUMNS + 3, dtype)
    before = tensor.view(torch.uint8).clone()
    digest(tensor)
    assert torch.equal(tensor.view(torch.uint8), before)


def test_a_parameter_and_a_scalar_have_digests() -> None:
    value = torch.tensor(1.5)
    assert digest(torch.nn.Parameter(value)) == digest(value) == slow_digest(value.view(1))


def test_a_type_without_a_digest_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="complex64"):
        digest(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex128"):
        digest(torch.zeros(3, dtype=torch.complex128))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(DTYPES), st.sampled_from((*SIZES, 2 * CHUNK - 1)), st.data())
def test_the_shares_of_a_partition_add_up_to_the_digest_of_the_whole(
    dtype: torch.dtype, num_elements: int, data: st.DataObject
) -> None:
    tensor = random_bits(num_elements, dtype)
    edges = [i for i in (1, COLUMNS - 1, COLUMNS, COLUMNS + 1, CHUNK) if i < num_elements]
    cut = st.one_of(st.sampled_from(edges), st.integers(0, num_elements)) if edges else st.integers(0, num_elements)
    cuts = [0, *sorted(data.draw(st.lists(cut, max_size=5))), num_elements]
    shares = [digest(tensor[low:high], start=low) for low, high in itertools.pairwise(cuts)]
    assert sum(shares) % 2**64 == digest(tensor)


def test_a_share_far_into_a_large_whole_follows_the_formula() -> None:
    tensor = random_bits(COLUMNS + 10, torch.bfloat16)
    start = (1 << 33) + 5
    total = 0
    for index, bits in enumerate(tensor.view(torch.int16).tolist(), start=start):
        column = splitmix64(1 + index % COLUMNS) | 1
        row = splitmix64(1 + index // COLUMNS + (1 << 40)) | 1
        total += bits * column * row
    assert digest(tensor, start) == total % 2**64


def runs_of_two_wholes(first: torch.Tensor, second: torch.Tensor) -> list[Run]:
    """Return both tensors in parts, in mixed order, the first one's digest in slot 2 and the second one's in slot 0."""
    return [
        Run(second[20000:], 20000, 0),
        Run(first[:5], 0, 2),
        Run(first[COLUMNS:], COLUMNS, 2),
        Run(second[:20000], 0, 0),
        Run(first[5:5], 5, 2),
        Run(first[5:COLUMNS], 5, 2),
    ]


def test_runs_add_up_in_their_slots() -> None:
    first, second = random_bits(3 * COLUMNS + 1, torch.bfloat16), random_bits(30000, torch.float32)
    found = digests(runs_of_two_wholes(first, second), 3, "cpu")
    assert found.dtype == torch.int64
    assert unsigned(found) == [digest(second), 0, digest(first)]


@pytest.mark.parametrize("index", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("change", [{"start": 1}, {"start": COLUMNS}, {"slot": 1}], ids=str)
def test_a_run_in_a_wrong_place_or_slot_changes_the_digests(index: int, change: dict[str, int]) -> None:
    first, second = random_bits(3 * COLUMNS + 1, torch.bfloat16), random_bits(30000, torch.float32)
    runs = runs_of_two_wholes(first, second)
    run = runs[index]
    runs[index] = Run(run.values, run.start + change.get("start", 0), change.get("slot", run.slot))
    assert unsigned(digests(runs, 3, "cpu")) != [digest(second), 0, digest(first)]


def test_a_plan_reads_the_values_of_the_moment_also_of_runs_that_are_not_contiguous() -> None:
    square = random_bits(200 * 200, torch.float32).view(200, 200)
    plan = DigestPlan([Run(square.t(), 0, 0), Run(square[:, 3:50], 7, 1)], 2, "cpu")
    for row in range(3):
        square[row, 10] = row
        assert unsigned(plan.compute()) == [digest(square.t().contiguous()), digest(square[:, 3:50].contiguous(), 7)]


def test_runs_that_cannot_be_digested_are_refused() -> None:
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="run 1 counts in slot 2, there are 2"):
        digests([Run(values, 0, 0), Run(values, 0, 2)], 2, "cpu")
    with pytest.raises(ValueError, match="starts at element -1"):
        digest(values, start=-1)
    with pytest.raises(ValueError, match="run 0 lies on meta"):
        digests([Run(values.to("meta"), 0, 0)], 1, "cpu")
    with pytest.raises(TypeError, match="complex64"):
        digests([Run(values.to(torch.complex64), 0, 0)], 1, "cpu")
