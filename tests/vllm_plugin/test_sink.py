"""The receiving end on a toy model: vLLM's own reload machinery and real tensors, pieces in any size and order.

Importing vLLM takes some ten seconds; the model's two kinds of layers (written in place, and repacked by vLLM's
reload) are what its CPU and CUDA layers come down to.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from shoal import vllm_compat
from shoal.testing.loopback import LoopbackEngine
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.types import Interval, ParameterMeta
from shoal.vllm_plugin.recorder import PlanError, learn_plan
from shoal.vllm_plugin.sink import ParameterSink
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.wire.agreement import MODEL
from shoal.wire.digest import digest
from shoal.wire.plan import Fill, Region, Slice, SlicePlan, dtype_name
from shoal.wire.schedule import Message, assign, batches, messages

VOCAB, PADDED, HIDDEN = 10, 12, 6
CPU = torch.device("cpu")


class Packing(QuantizeMethodBase):  # type: ignore[misc]
    """Computes with the transposed weight and drops the loaded one, as repacking kernels do."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, Layer)
        layer.weight = nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False)


class PackedCopy(QuantizeMethodBase):  # type: ignore[misc]
    """Keeps the weight and computes with a packed copy of it, as a CPU `lm_head` does."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, Layer)
        layer.packed = layer.weight.data.t().contiguous()


def weight_of(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)


class Layer(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter
    packed: torch.Tensor

    def __init__(self, *shape: int, method: QuantizeMethodBase | None = None) -> None:
        super().__init__()
        self.weight = weight_of(*shape)
        self.quant_method = method


class ToyModel(nn.Module):
    """One shard (of `tp`) of: embedding (padded) → stacked gate/up (repacked) → norm → tied head."""

    def __init__(self, tp: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.tp, self.rank = tp, rank
        self.embed = Layer(PADDED, HIDDEN)
        self.gate_up = Layer(2 * 8 // tp, HIDDEN, method=Packing())
        self.gate_up.bias = nn.Parameter(torch.full((2 * 8 // tp,), float("nan")), requires_grad=False)
        self.norm = Layer(HIDDEN)
        self.norm.register_buffer("steps", torch.arange(3.0))
        self.head = Layer(PADDED, HIDDEN, method=PackedCopy())
        self.head.weight = self.embed.weight
        record_metadata_for_reloading(self)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            if name == "embed.weight":
                self.embed.weight[:VOCAB].data.copy_(value)
                self.embed.weight[VOCAB:].data.fill_(0)
            elif name == "norm.weight":
                self.norm.weight.data.copy_(value)
            else:
                half, local = name.split(".")
                size = 8 // self.tp
                into = getattr(self.gate_up, local).data.narrow(0, size * ("gate", "up").index(half), size)
                into.copy_(value.narrow(0, self.rank * size, size))

    def process(self) -> None:
        """What vLLM does once, after the first load."""
        for layer in (self.gate_up, self.head):
            assert layer.quant_method is not None
            layer.quant_method.process_weights_after_loading(layer)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embed.weight[ids]
        return hidden @ self.gate_up.weight + self.gate_up.bias, (hidden * self.norm.weight) @ self.head.packed


def checkpoint(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (VOCAB, HIDDEN),
        "gate.weight": (8, HIDDEN),
        "up.weight": (8, HIDDEN),
        "gate.bias": (8,),
        "up.bias": (8,),
        "norm.weight": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def metadata(tensors: Mapping[str, torch.Tensor]) -> tuple[ParameterMeta, ...]:
    return tuple(ParameterMeta(name=n, dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items())


def started(tp: int = 1, rank: int = 0) -> ToyModel:
    """Return a model as an engine has it after its start: loaded with something, processed."""
    model = ToyModel(tp, rank)
    model.load_weights(checkpoint(99).items())
    model.process()
    return model


def freshly_loaded(tensors: Mapping[str, torch.Tensor], tp: int = 1, rank: int = 0) -> ToyModel:
    """Return the reference: a new model that loaded `tensors` with its own loader."""
    model = ToyModel(tp, rank)
    model.load_weights(tensors.items())
    model.process()
    return model


def pieces(plan: SlicePlan, tensors: Mapping[str, torch.Tensor], max_bytes: int = 1 << 20) -> list[Message]:
    """Return what one rank that holds everything sends."""
    metas = metadata(tensors)
    ownership = assign(metas, [{meta.name: Interval(0, meta.num_elements) for meta in metas}])
    return [m for parts in batches(metas, max_bytes) for part in parts for m in messages(plan, ownership, part)]


def deliver(sink: ParameterSink, plan: SlicePlan, tensors: Mapping[str, torch.Tensor], sent: Sequence[Message]) -> None:
    """Do what a worker does with pieces that arrive."""
    for message in sent:
        piece = plan.slices[message.slice_index]
        room = sink.room(message)
        assert room.is_contiguous() and room.shape == message.source.shape and dtype_name(room.dtype) == piece.dtype
        room.copy_(message.source.view(tensors[piece.source]))
        sink.place(message, room)
        assert torch.equal(sink.held(message).view(torch.int32), room.view(torch.int32))
        sink.settle(message)


def publish_into(
    model: ToyModel, plan: SlicePlan, tensors: Mapping[str, torch.Tensor], sent: Sequence[Message] | None = None
) -> list[int]:
    sink = ParameterSink(model, plan, CPU)
    sink.begin()
    try:
        deliver(sink, plan, tensors, pieces(plan, tensors) if sent is None else sent)
        return sink.finish()
    finally:
        sink.close()


def expected_digests(plan: SlicePlan, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    return [digest(piece.source_region.view(tensors[piece.source])) for piece in plan.slices]


IDS = torch.tensor([0, 3, VOCAB - 1, PADDED - 1])
ranks = pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 0), (2, 1)])


def test_learning_the_plan_touches_no_data_and_says_what_is_reloaded() -> None:
    model = started()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storages = {name: value.data_ptr() for name, value in model.named_parameters()}
    plan = learn_plan(model, metadata(checkpoint(0)), worker="w")
    assert {piece.source for piece in plan.slices} == set(checkpoint(0))
    assert [fill.target for fill in plan.fills] == ["embed.weight"]
    # The head's own name is there too: it shares the embedding's parameter and has a method of its own.
    assert {"gate_up.weight", "gate_up.bias"} <= set(plan.reloaded)
    assert {"embed.weight", "norm.weight"}.isdisjoint(plan.reloaded)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == storages
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@ranks
def test_after_a_publish_the_model_computes_what_a_freshly_loaded_one_does_and_again_after_a_second(
    tp: int, rank: int
) -> None:
    model = started(tp, rank)
    plan = learn_plan(model, metadata(checkpoint(0)), worker="w")
    storages = {name: value.data_ptr() for name, value in model.named_parameters()}
    seen = [model(IDS)]
    for seed in (1, 2):
        tensors = checkpoint(seed)
        assert publish_into(model, plan, tensors) == expected_digests(plan, tensors)
        for value, wanted in zip(model(IDS), freshly_loaded(tensors, tp, rank)(IDS), strict=True):
            assert torch.equal(value, wanted)
        seen.append(model(IDS))
        # CUDA graphs hold these addresses.
        assert {name: value.data_ptr() for name, value in model.named_parameters()} == storages
    for first, second in ((0, 1), (1, 2), (0, 2)):
        for value, other in zip(seen[first], seen[second], strict=True):
            assert not torch.equal(value, other)  # the control: each publish changed both outputs


@pytest.mark.parametrize("max_bytes", [4, 28, 1 << 20])
@ranks
def test_pieces_may_be_of_any_size_and_arrive_in_any_order(tp: int, rank: int, max_bytes: int) -> None:
    tensors = checkpoint(1)
    model = started(tp, rank)
    plan = learn_plan(model, metadata(tensors), worker="w")
    sent = pieces(plan, tensors, max_bytes)
    random.Random(max_bytes).shuffle(sent)
    assert publish_into(model, plan, tensors, sent) == expected_digests(plan, tensors)
    for value, wanted in zip(model(IDS), freshly_loaded(tensors, tp, rank)(IDS), strict=True):
        assert torch.equal(value, wanted)


def test_one_sink_serves_many_publishes() -> None:
    model = started()
    plan = learn_plan(model, metadata(checkpoint(0)), worker="w")
    sink = ParameterSink(model, plan, CPU)
    for seed in (1, 2, 3):
        tensors = checkpoint(seed)
        sink.begin()
        deliver(sink, plan, tensors, pieces(plan, tensors))
        assert sink.finish() == expected_digests(plan, tensors)
        sink.close()
        assert torch.equal(model(IDS)[1], freshly_loaded(tensors)(IDS)[1])


def test_digests_that_nobody_wants_are_zero_and_the_weights_arrive_all_the_same() -> None:
    model, tensors = started(), checkpoint(1)
    plan = learn_plan(model, metadata(tensors), worker="w")
    sink = ParameterSink(model, plan, CPU)
    sink.begin(with_digests=False)
    deliver(sink, plan, tensors, pieces(plan, tensors))
    assert sink.finish() == [0] * len(plan.slices) != expected_digests(plan, tensors)
    for value, wanted in zip(model(IDS), freshly_loaded(tensors)(IDS), strict=True):
        assert torch.equal(value, wanted)


def test_a_piece_arrives_in_its_own_place_where_that_is_contiguous_and_lies_still() -> None:
    model, tensors = started(), checkpoint(1)
    plan = learn_plan(model, metadata(tensors), worker="w")
    sink = ParameterSink(model, plan, CPU)
    sink.begin()
    parameter = model.get_parameter("norm.weight")
    for message in pieces(plan, tensors):
        if plan.slices[message.slice_index].target == "norm.weight":
            assert sink.room(message).data_ptr() == parameter.data_ptr()
            columns = Region(offset=0, shape=(2,), strides=(2,))
            assert sink.room(replace(message, target=columns)).data_ptr() != parameter.data_ptr()  # the control


def test_a_plan_may_lead_to_tensors_that_are_no_parameters() -> None:
    # As for an adapter: its factors lie in buffers beside the layers.
    model, value = started(), torch.randn(2, 3)
    buffers = {"norm.lora_a_stacked:0": torch.zeros(4, 5)}
    piece = Slice(
        source="a",
        source_region=Region.of(value),
        target="norm.lora_a_stacked:0",
        target_region=Region.of(buffers["norm.lora_a_stacked:0"][1:3, 2:]),
        dtype="float32",
    )
    plan = SlicePlan(worker="w", slices=(piece,), fills=(), reloaded=())
    sink = ParameterSink(model, plan, CPU, buffers.__getitem__)
    sink.begin()
    deliver(sink, plan, {"a": value}, pieces(plan, {"a": value}, 8))
    assert sink.finish() == [digest(value)]
    assert torch.equal(buffers["norm.lora_a_stacked:0"][1:3, 2:], value)
    assert buffers["norm.lora_a_stacked:0"].count_nonzero() == 6


def test_a_parameter_of_another_type_than_the_plan_says_is_refused() -> None:
    model, tensors = started(), checkpoint(1)
    plan = learn_plan(model, metadata(tensors), worker="w")
    model.norm.weight = nn.Parameter(model.norm.weight.data.half(), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"norm\.weight is torch\.float16, but the plan says float32"):
        publish_into(model, plan, tensors)


def test_the_padding_of_the_vocabulary_is_zero_after_a_publish() -> None:
    model = started()
    plan = learn_plan(model, metadata(checkpoint(1)), worker="w")
    with torch.no_grad():
        model.embed.weight[VOCAB:] = 3.0
    publish_into(model, plan, checkpoint(1))
    assert model.embed.weight[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("layer", ["embed", "gate_up"])
def test_a_layer_that_is_all_padding_is_filled_although_nothing_arrives_for_it(layer: str) -> None:
    model, tensors = started(), checkpoint(1)
    plan = learn_plan(model, metadata(tensors), worker="w")
    shapes = {"embed.weight": (PADDED, HIDDEN), "gate_up.weight": (16, HIDDEN), "gate_up.bias": (16,)}
    fills = tuple(
        Fill(target=name, target_region=Region.of(torch.empty(shape, device="meta")), value=0.0)
        for name, shape in shapes.items()
        if name.startswith(layer)
    )
    slices = tuple(piece for piece in plan.slices if not piece.target.startswith(layer))
    assert model.get_parameter(f"{layer}.weight").count_nonzero()
    publish_into(model, replace(plan, slices=slices, fills=fills), tensors)
    assert not model.get_parameter(f"{layer}.weight").count_nonzero()


def test_buffers_survive_a_publish() -> None:
    model = started()
    plan = learn_plan(model, metadata(checkpoint(1)), worker="w")
    publish_into(model, plan, checkpoint(1))
    assert model.norm.get_buffer("steps").tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("name", "other"), [("embed.weight", "norm.weight"), ("norm.weight", "embed.weight")])
def test_one_element_corrupted_after_it_was_written_changes_the_digest_of_its_slice_alone(
    name: str, other: str
) -> None:
    tensors = checkpoint(1)
    model = started()
    plan = learn_plan(model, metadata(tensors), worker="w")
    sink = ParameterSink(model, plan, CPU)
    sink.begin()
    *first, last = sorted(pieces(plan, tensors), key=lambda piece: plan.slices[piece.slice_index].target == other)
    deliver(sink, plan, tensors, first)
    model.get_parameter(name).data.view(torch.int32).view(-1)[4] ^= 1  # the last bit of one element
    deliver(sink, plan, tensors, [last])
    differ = [
        piece.target
        for piece, held, sent in zip(plan.slices, sink.finish(), expected_digests(plan, tensors), strict=True)
        if held != sent
    ]
    assert differ == [name]


def test_layers_are_digested_while_others_are_still_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.vllm_plugin.sink._BYTES_PER_DIGEST", 1)
    tensors = checkpoint(1)
    model = started()
    plan = learn_plan(model, metadata(tensors), worker="w")
    sink = ParameterSink(model, plan, CPU)
    *others, norm = sorted(
        pieces(plan, tensors), key=lambda piece: plan.slices[piece.slice_index].target == "norm.weight"
    )
    for _ in range(2):
        sink.begin()
        deliver(sink, plan, tensors, others)
        model.embed.weight.data.zero_()  # what comes after the digest is not seen
        deliver(sink, plan, tensors, [norm])
        assert sink.finish() == expected_digests(plan, tensors)


def test_an_element_that_arrives_changed_changes_the_digest_of_a_reloaded_layers_slice() -> None:
    tensors = checkpoint(1)
    model = started(2, 1)
    plan = learn_plan(model, metadata(tensors), worker="w")
    arriving = {name: value.clone() for name, value in tensors.items()}
    arriving["up.weight"].view(torch.int32)[7, 0] ^= 1 << 30
    held = publish_into(model, plan, arriving)
    differ = [
        plan.slices[i].source
        for i, (a, b) in enumerate(zip(held, expected_digests(plan, tensors), strict=True))
        if a != b
    ]
    assert differ == ["up.weight"]
    # What lies outside this worker's shard is not its business.
    arriving["up.weight"] = tensors["up.weight"].clone()
    arriving["up.weight"][0, 0] += 1
    assert publish_into(model, plan, arriving) == expected_digests(plan, tensors)


def test_a_publish_that_ends_early_is_an_error_and_leaves_the_repacked_layer_as_it_was() -> None:
    model = started()
    plan = learn_plan(model, metadata(checkpoint(1)), worker="engine-0 worker 0")
    before = model.gate_up.weight.clone()
    sink = ParameterSink(model, plan, CPU)
    sink.begin()
    sent = pieces(plan, checkpoint(1))
    deliver(sink, plan, checkpoint(1), [m for m in sent if plan.slices[m.slice_index].source == "gate.weight"])
    with pytest.raises(RuntimeError, match=r"engine-0 worker 0.*without weights for.*gate_up"):
        sink.finish()
    sink.close()
    assert torch.equal(model.gate_up.weight, before)
    # And the next publish, a whole one, works.
    assert publish_into(model, plan, checkpoint(2)) == expected_digests(plan, checkpoint(2))


@pytest.mark.parametrize("name", ["up.weight", "norm.weight", "gate.bias", "embed.weight"])
def test_a_checkpoint_that_lacks_a_parameter_is_refused_naming_what_stays_empty(name: str) -> None:
    target = {"up.weight": "gate_up.weight", "gate.bias": "gate_up.bias"}.get(name, name)
    metas = [meta for meta in metadata(checkpoint(0)) if meta.name != name]
    with pytest.raises(PlanError, match=rf"engine-3 worker 1 has a parameter ({target}|head\.weight) "):
        learn_plan(started(), metas, worker="engine-3 worker 1")


def test_a_loader_that_does_not_know_a_name_is_reported_as_a_plan_that_cannot_be_made() -> None:
    class KnowsNamesOnly(ToyModel):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, _ in weights:
                raise KeyError(name)

    with pytest.raises(PlanError, match=r"engine-3 worker 1's loader .*KeyError: 'embed\.weight'.*checkpoint"):
        learn_plan(KnowsNamesOnly(), metadata(checkpoint(0)), worker="engine-3 worker 1")


def test_a_parameter_loaded_twice_does_not_make_up_for_one_that_is_missing() -> None:
    class LoadsGateTwice(ToyModel):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, value in weights:
                super().load_weights([(name.replace("up.", "gate."), value)])

    model = LoadsGateTwice()
    with pytest.raises(PlanError, match="gate_up"):
        learn_plan(model, metadata(checkpoint(0)), worker="w")


def test_after_a_failure_to_plan_the_model_still_has_its_parameters() -> None:
    model = started()
    before = [value.clone() for value in model(IDS)]
    with pytest.raises(PlanError):
        learn_plan(model, metadata(checkpoint(0))[:2], worker="w")
    assert all(torch.equal(a, b) for a, b in zip(model(IDS), before, strict=True))


def test_a_publish_to_two_workers_is_proven_and_they_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_compat, "worker_context", lambda worker: nullcontext())
    models = [started(2, 0), started(2, 1)]
    engine = LoopbackEngine("engine-0", models)

    class Everything:
        def __init__(self) -> None:
            self.now = checkpoint(1)

        def metadata(self) -> tuple[ParameterMeta, ...]:
            return metadata(self.now)

        def held(self) -> dict[str, Interval]:
            return {name: Interval(0, value.numel()) for name, value in self.now.items()}

        def in_place(self) -> frozenset[str]:
            return frozenset(self.now)

        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from ((name, value.flatten()) for name, value in self.now.items())

    source = Everything()

    def publish(ranks: ThreadRanks) -> None:
        publisher = WeightPublisher(
            {MODEL: source},
            [EngineAddress(client=engine, num_workers=2, backend="gloo")],
            ranks=ranks,
            device=CPU,
            settings=PublishSettings(host="127.0.0.1", timeout_s=60, batch_bytes=100),
        )
        publisher.connect()
        for version in (1, 2):
            source.now = checkpoint(version)
            assert publisher.publish(version).num_digests == 12
            for rank, model in enumerate(models):
                for value, wanted in zip(model(IDS), freshly_loaded(source.now, 2, rank)(IDS), strict=True):
                    assert torch.equal(value, wanted)
        publisher.close()

    assert on_ranks(1, publish) == [None]
