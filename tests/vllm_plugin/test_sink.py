"""The receiving end on a toy model: vLLM's own reload machinery, real tensors, a real publisher over gloo.

Importing vLLM takes some ten seconds; the model's two kinds of layers (written in place, and repacked by vLLM's
reload) are what its CPU and CUDA layers come down to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from shoal.errors import EngineRequestError, WeightProofError
from shoal.types import UNPROVEN, ParameterMeta
from shoal.vllm_plugin.recorder import PlanError, learn_plan
from shoal.vllm_plugin.sink import ParameterSink
from shoal.weights.link import EngineLink
from shoal.weights.publisher import WeightPublisher
from shoal.wire.digest import digest
from shoal.wire.plan import SlicePlan, dtype_name

VOCAB, PADDED, HIDDEN = 10, 12, 6


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


def publish_into(model: ToyModel, plan: SlicePlan, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    sink = ParameterSink(model, plan)
    try:
        for name, value in tensors.items():
            sink.write(name, value)
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


def test_parameters_may_arrive_in_any_order() -> None:
    tensors = checkpoint(1)
    model = started()
    plan = learn_plan(model, metadata(tensors), worker="w")
    backwards = dict(reversed(tensors.items()))
    assert publish_into(model, plan, backwards) == expected_digests(plan, tensors)
    for value, wanted in zip(model(IDS), freshly_loaded(tensors)(IDS), strict=True):
        assert torch.equal(value, wanted)


def test_the_padding_of_the_vocabulary_is_zero_after_a_publish() -> None:
    model = started()
    plan = learn_plan(model, metadata(checkpoint(1)), worker="w")
    with torch.no_grad():
        model.embed.weight[VOCAB:] = 3.0
    publish_into(model, plan, checkpoint(1))
    assert model.embed.weight[VOCAB:].abs().max() == 0


def test_buffers_survive_a_publish() -> None:
    model = started()
    plan = learn_plan(model, metadata(checkpoint(1)), worker="w")
    publish_into(model, plan, checkpoint(1))
    assert model.norm.get_buffer("steps").tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", ["embed.weight", "norm.weight"])
def test_one_element_corrupted_after_it_was_written_changes_the_digest_of_its_slice_alone(name: str) -> None:
    tensors = checkpoint(1)
    model = started()
    plan = learn_plan(model, metadata(tensors), worker="w")
    sink = ParameterSink(model, plan)
    for source, value in tensors.items():
        sink.write(source, value)
    model.get_parameter(name).data.view(torch.int32).view(-1)[4] ^= 1  # the last bit of one element
    differ = [
        piece.target
        for piece, held, sent in zip(plan.slices, sink.finish(), expected_digests(plan, tensors), strict=True)
        if held != sent
    ]
    assert differ == [name]


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
    sink = ParameterSink(model, plan)
    sink.write("gate.weight", checkpoint(1)["gate.weight"])
    with pytest.raises(RuntimeError, match=r"engine-0 worker 0.*without weights for.*gate_up"):
        sink.finish()
    sink.close()
    assert torch.equal(model.gate_up.weight, before)
    # And the next publish, a whole one, works.
    assert publish_into(model, plan, checkpoint(2)) == expected_digests(plan, checkpoint(2))


def test_a_parameter_that_the_plan_does_not_know_is_left_alone() -> None:
    tensors = checkpoint(1)
    model = started()
    plan = learn_plan(model, metadata(tensors), worker="w")
    assert publish_into(model, plan, {"rotary.inv_freq": torch.zeros(3), **tensors}) == expected_digests(plan, tensors)


@pytest.mark.parametrize("name", ["up.weight", "norm.weight", "gate.bias", "embed.weight"])
def test_a_checkpoint_that_lacks_a_parameter_is_refused_naming_what_stays_empty(name: str) -> None:
    target = {"up.weight": "gate_up.weight", "gate.bias": "gate_up.bias"}.get(name, name)
    metas = [meta for meta in metadata(checkpoint(0)) if meta.name != name]
    with pytest.raises(PlanError, match=rf"engine-3 worker 1 has a parameter ({target}|head\.weight) "):
        learn_plan(started(), metas, worker="engine-3 worker 1")


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


class ReceiverAsEngine:
    """The control routes of an engine with two workers, each a real `ShoalWeightReceiver` in this process."""

    def __init__(self, models: list[ToyModel]) -> None:
        from vllm.config import ParallelConfig

        from shoal.vllm_plugin.receiver import ShoalWeightReceiver

        self.weight_version = -1
        self.receivers = []
        for rank, model in enumerate(models):
            parallel = ParallelConfig()
            parallel.world_size, parallel.rank = len(models), rank
            config = SimpleNamespace(parallel_config=parallel, model_config=None)
            self.receivers.append(ShoalWeightReceiver(None, config, torch.device("cpu"), model))
        self.called: list[str] = []

    @property
    def name(self) -> str:
        return "engine-0"

    def post(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        from shoal.vllm_plugin.receiver import ShoalInitInfo

        self.called.append(path)

        def work(receiver: Any) -> None:
            if path == "/init_weight_transfer_engine":
                receiver.init_transfer_engine(ShoalInitInfo(**(body or {})["init_info"]))
            elif path == "/start_weight_update":
                receiver.start_weight_update()
            elif path == "/update_weights":
                receiver.update_weights((body or {})["update_info"])
            elif path == "/finish_weight_update":
                receiver.finish_weight_update()

        with ThreadPoolExecutor(len(self.receivers)) as pool:
            try:
                list(pool.map(work, self.receivers))
            except Exception as error:
                raise EngineRequestError(f"{self.name} answered {path} with status 500: {error}") from error


class DictSource:
    """A `WeightSource` over a plain dict, which the test may change between publishes."""

    def __init__(self, tensors_by_name: dict[str, torch.Tensor]) -> None:
        self.now = tensors_by_name

    def metadata(self) -> tuple[ParameterMeta, ...]:
        return metadata(self.now)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.now.items()


def linked(models: list[ToyModel], source: DictSource) -> tuple[WeightPublisher, ReceiverAsEngine]:
    engine = ReceiverAsEngine(models)
    link = EngineLink(engine, num_workers=len(models), backend="gloo", host="127.0.0.1", timeout_s=20)
    publisher = WeightPublisher(source, [link], 20)
    publisher.connect()
    return publisher, engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_publish_to_two_real_receivers_is_proven_and_computes_the_same(dtype: torch.dtype) -> None:
    models = [started(2, 0), started(2, 1)]
    source = DictSource(checkpoint(1, dtype))
    publisher, engine = linked(models, source)
    assert [plan.worker for plan in publisher.plans] == ["engine-0 worker 0", "engine-0 worker 1"]
    for version in (1, 2):
        source.now = checkpoint(version, dtype)
        report = publisher.publish(version)
        assert (report.version, report.num_workers, report.num_digests) == (version, 2, 12)
        assert engine.weight_version == version
        for rank, model in enumerate(models):
            for value, wanted in zip(model(IDS), freshly_loaded(source.now, 2, rank)(IDS), strict=True):
                assert torch.equal(value, wanted)
    publisher.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_element_that_changes_in_a_workers_memory_fails_the_proof_naming_parameter_and_worker(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [started(2, 0), started(2, 1)]
    publisher, engine = linked(models, DictSource(checkpoint(1)))
    publisher.publish(1)
    written = ParameterSink.write

    def write_then_break(sink: ParameterSink, name: str, value: torch.Tensor) -> None:
        written(sink, name, value)
        if name == "norm.weight" and sink._model is models[rank]:
            models[rank].norm.weight.data.view(torch.int32)[2] ^= 1

    with monkeypatch.context() as patch:
        patch.setattr(ParameterSink, "write", write_then_break)
        with pytest.raises(WeightProofError, match=rf"engine-0 worker {rank} .*norm\.weight.*version 2"):
            publisher.publish(2)
    assert engine.weight_version == UNPROVEN
    assert engine.called[-1] == "/resume"
    assert publisher.publish(3).version == 3  # the same engine, whole again
    publisher.close()
