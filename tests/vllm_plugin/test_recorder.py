"""The recorder, on loaders written the way vLLM's are: its plan, carried out, does what the loader does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch

from shoal.vllm_plugin.recorder import PlanError, Recorder
from shoal.wire.plan import Slice, dtype_from_name

HIDDEN, HEAD, HEADS, KV_HEADS, VOCAB, PADDED, MIDDLE = 12, 4, 8, 4, 30, 32, 20

Tensors = dict[str, torch.Tensor]
Loader = Callable[[Tensors, Mapping[str, torch.Tensor]], None]


def checkpoint(device: str = "cpu") -> Tensors:
    torch.manual_seed(0)
    shapes = {
        "embed": (VOCAB, HIDDEN),
        "q": (HEADS * HEAD, HIDDEN),
        "k": (KV_HEADS * HEAD, HIDDEN),
        "v": (KV_HEADS * HEAD, HIDDEN),
        "o": (HIDDEN, HEADS * HEAD),
        "gate_up": (2 * MIDDLE, HIDDEN),
        "conv": (HIDDEN, 1, 4),
        "norm": (HIDDEN,),
        "scale": (),
    }
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def empty_engine(tp: int, device: str = "cpu", fill: float = 7.0) -> Tensors:
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "embed": ((PADDED // tp, HIDDEN), torch.bfloat16),
        "qkv": (((HEADS + 2 * KV_HEADS) * HEAD // tp, HIDDEN), torch.bfloat16),
        "o": ((HIDDEN, HEADS * HEAD // tp), torch.bfloat16),
        "gate_up": ((2 * MIDDLE // tp, HIDDEN), torch.float32),
        "transposed": ((HIDDEN, HIDDEN), torch.float32),
        "conv": ((HIDDEN, 4), torch.float32),
        "norm": ((HIDDEN,), torch.float32),
        "repeated": ((3, HIDDEN), torch.float32),
        "scale": ((2,), torch.float32),
    }
    return {
        name: torch.nn.Parameter(torch.full(shape, fill, dtype=dtype, device=device))
        for name, (shape, dtype) in shapes.items()
    }


def loader(tp: int, rank: int) -> Loader:
    """Return a loader that shards and stacks as vLLM's linear, embedding and norm layers do."""

    def load(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
        # VocabParallelEmbedding: rows of this rank, and zeros where the vocabulary is padded.
        rows = PADDED // tp
        start = rank * rows
        have = source["embed"].narrow(0, start, min(rows, VOCAB - start))
        engine["embed"][: have.shape[0]].data.copy_(have)
        engine["embed"][have.shape[0] :].data.fill_(0)
        # QKVParallelLinear: three parameters stacked, each with its own shard.
        offset = 0
        for name in ("q", "k", "v"):
            size = source[name].shape[0] // tp
            shard = source[name].narrow(0, rank * size, size)
            engine["qkv"].data.narrow(0, offset, size).copy_(shard)
            offset += size
        # RowParallelLinear, through a cast and a copy that make whole new tensors of a view.
        size = source["o"].shape[1] // tp
        engine["o"].data.copy_(source["o"].narrow(1, rank * size, size).to(torch.bfloat16).contiguous())
        # MergedColumnParallelLinear from one parameter that holds both halves.
        size = MIDDLE // tp
        for index, half in enumerate(source["gate_up"].chunk(2)):
            into = engine["gate_up"].data[index * size : (index + 1) * size]
            into.copy_(half[rank * size : (rank + 1) * size])
        engine["transposed"].data.copy_(source["o"][:, :HIDDEN].t().contiguous())
        engine["conv"].data.copy_(source["conv"].squeeze(1))
        engine["norm"].data.copy_(source["norm"].view(1, -1).expand(1, HIDDEN).reshape(-1))
        engine["repeated"].data.copy_(source["norm"])  # broadcast by copy_ itself
        engine["scale"].data[0].copy_(source["scale"])
        engine["scale"].data[1:].zero_()

    return load


def record(load: Loader, engine: Tensors, source: Tensors) -> Recorder:
    recorder = Recorder(source, engine)
    with torch.no_grad(), recorder:
        load(engine, source)
    return recorder


def carry_out(slices: list[Slice], recorder: Recorder, source: Tensors, engine: Tensors) -> None:
    with torch.no_grad():
        for piece in slices:
            into = piece.target_region.view(engine[piece.target].data)
            into.copy_(piece.source_region.view(source[piece.source]))
            assert engine[piece.target].dtype is dtype_from_name(piece.dtype)
        for fill in recorder.fills:
            fill.target_region.view(engine[fill.target].data).fill_(fill.value)


def differing(first: Tensors, second: Tensors) -> Iterator[str]:
    return (name for name in first if not torch.equal(first[name], second[name]))


ranks = pytest.mark.parametrize(("tp", "rank"), [(tp, rank) for tp in (1, 2, 4) for rank in range(tp)])


@ranks
def test_carrying_out_the_plan_leaves_exactly_what_the_loader_leaves(tp: int, rank: int) -> None:
    recorder = record(loader(tp, rank), empty_engine(tp, "meta"), checkpoint("meta"))
    source = checkpoint()
    loaded, planned = empty_engine(tp, fill=1.0), empty_engine(tp, fill=2.0)
    with torch.no_grad():
        loader(tp, rank)(loaded, source)
    assert list(differing(loaded, planned)) == list(planned)  # nothing agrees before
    carry_out(recorder.slices, recorder, source, planned)
    assert list(differing(loaded, planned)) == []


def test_a_plan_with_one_offset_off_by_a_row_does_not_do_what_the_loader_does() -> None:
    recorder = record(loader(2, 1), empty_engine(2, "meta"), checkpoint("meta"))
    index, piece = next((i, s) for i, s in enumerate(recorder.slices) if s.source == "k")
    region = replace(piece.source_region, offset=piece.source_region.offset - HIDDEN)
    wrong = list(recorder.slices)
    wrong[index] = replace(piece, source_region=region)
    source, loaded, planned = checkpoint(), empty_engine(2), empty_engine(2)
    with torch.no_grad():
        loader(2, 1)(loaded, source)
    carry_out(wrong, recorder, source, planned)
    assert list(differing(loaded, planned)) == ["qkv"]  # the control of the test above


def test_the_other_ranks_plan_does_not_do_what_this_ranks_loader_does() -> None:
    recorder = record(loader(2, 0), empty_engine(2, "meta"), checkpoint("meta"))
    source, loaded, planned = checkpoint(), empty_engine(2), empty_engine(2)
    with torch.no_grad():
        loader(2, 1)(loaded, source)
    carry_out(recorder.slices, recorder, source, planned)
    assert set(differing(loaded, planned)) == {"embed", "qkv", "o", "gate_up"}


def test_recording_into_parameters_that_hold_data_leaves_them_as_they_are() -> None:
    engine = empty_engine(2)
    before = {name: value.clone() for name, value in engine.items()}
    recorder = record(loader(2, 1), engine, checkpoint("meta"))
    assert len(recorder.slices) == 12
    assert list(differing(engine, before)) == []


def test_stacked_shards_are_recorded_where_they_lie() -> None:
    recorder = record(loader(2, 1), empty_engine(2, "meta"), checkpoint("meta"))
    key = next(piece for piece in recorder.slices if piece.source == "k")
    assert (key.target, key.dtype) == ("qkv", "bfloat16")
    assert (key.source_region.offset, key.source_region.shape) == (8 * HIDDEN, (8, HIDDEN))
    assert (key.target_region.offset, key.target_region.shape) == (16 * HIDDEN, (8, HIDDEN))


def test_padding_is_recorded_as_a_fill() -> None:
    recorder = record(loader(2, 1), empty_engine(2, "meta"), checkpoint("meta"))
    padding = next(fill for fill in recorder.fills if fill.target == "embed")
    assert (padding.value, padding.target_region.offset, padding.target_region.shape) == (0.0, 14 * HIDDEN, (2, HIDDEN))


def _negated(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    engine["norm"].data.copy_(-source["norm"])


def _sum_of_two(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    engine["norm"].data.copy_(source["norm"] + 1)


def _concatenated(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    engine["norm"].data.copy_(torch.cat([source["norm"][:6], source["norm"][6:]]))


def _flattened_copy(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    before_a_row_ends = source["q"].shape[0] - 1
    flat = source["q"].t().contiguous().view(-1)
    engine["norm"].data.copy_(flat[before_a_row_ends : before_a_row_ends + engine["norm"].numel()])


def _changed_after_copying(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    engine["norm"].data.copy_(source["norm"])
    engine["norm"].data.add_(1)


def _changed_copy(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    value = source["norm"].to(torch.bfloat16)
    value += 1
    engine["norm"].data.copy_(value)


def _changed_source(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    source["norm"].mul_(2)
    engine["norm"].data.copy_(source["norm"])


def _written_by_out(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
    torch.neg(source["norm"], out=engine["norm"].data)


@pytest.mark.parametrize(
    "load",
    [
        _negated,
        _sum_of_two,
        _concatenated,
        _flattened_copy,
        _changed_after_copying,
        _changed_copy,
        _changed_source,
        _written_by_out,
    ],
)
def test_a_value_that_the_loader_computes_is_refused_naming_the_parameter(load: Loader) -> None:
    with pytest.raises(PlanError, match=r"\bnorm\b"):
        record(load, empty_engine(1, "meta"), checkpoint("meta"))


def test_work_beside_the_parameters_is_carried_out_and_not_recorded() -> None:
    notes = torch.zeros(3)

    def load(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
        notes.add_(1)
        notes[0].fill_(5)
        engine["norm"].data.copy_(source["norm"])

    recorder = record(load, empty_engine(1, "meta"), checkpoint("meta"))
    assert [piece.source for piece in recorder.slices] == ["norm"]
    assert notes.tolist() == [5.0, 1.0, 1.0]


def test_setting_a_view_to_a_number_is_a_fill_and_is_not_carried_out() -> None:
    engine = empty_engine(1)

    def load(engine: Tensors, source: Mapping[str, torch.Tensor]) -> None:
        engine["repeated"].data[1] = 3

    (fill,) = record(load, engine, checkpoint("meta")).fills
    assert (fill.target, fill.target_region.offset, fill.target_region.shape) == ("repeated", HIDDEN, (HIDDEN,))
    assert fill.value == 3.0
    assert engine["repeated"].unique().tolist() == [7.0]
