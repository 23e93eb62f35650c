"""A model's blocks: compiled they compute the same, and as many as are asked for are computed again."""

from __future__ import annotations

import copy
import logging
import pickle
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from shoal.data.micro_batch import build_micro_batch
from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.testing.sequences import random_sequences
from shoal.trainer import blocks
from shoal.trainer.blocks import are_compiled, compile_blocks, compiles_blocks, find_blocks, recompute_first
from shoal.trainer.forward import packed_logprobs

SHORT, LONG = ((1, 1), (5, 7)), ((30, 2), (3, 20), (5, 7), (9, 31))


def logprobs_and_gradient(model: Any, lengths: Any = LONG) -> tuple[torch.Tensor, torch.Tensor]:
    batch = build_micro_batch(sequences := random_sequences(lengths), [1.0] * len(sequences))
    model.zero_grad()
    found = packed_logprobs(model, batch, temperature=1.0, keeps_logits=True).logprobs
    found.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [value.grad.flatten() for value in model.parameters() if value.grad is not None]
    return found.detach(), torch.cat(gradients)


def refuse(graph: Any, inputs: Any) -> Any:
    """Compile nothing."""
    raise RuntimeError("no compiler here")


@pytest.fixture
def model() -> Any:
    return tiny_model().train()


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
def test_compiled_blocks_give_the_same_logprobs_and_gradients(model: Any, has_adapter: bool, checkpoints: bool) -> None:
    if has_adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if checkpoints:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    expected = {lengths: logprobs_and_gradient(model, lengths) for lengths in (SHORT, LONG)}
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    torch._dynamo.utils.counters.clear()
    compile_blocks(model)
    for lengths, (logprobs, gradient) in expected.items():
        found = logprobs_and_gradient(model, lengths)
        torch.testing.assert_close(found[0], logprobs, rtol=1e-5, atol=1e-5)
        assert (found[1] - gradient).norm() < 1e-5 * gradient.norm()
    # One graph for both blocks and both numbers of tokens, without a break: the compiled code has run. Beside an
    # adapter the first block's input has no gradient, which makes one more.
    num_graphs = 2 if has_adapter and not checkpoints else 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_within_ddp_a_block_is_one_graph_all_the_same(one_process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_graphs() -> int:
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        graphs: list[Any] = []

        def note(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        # A block holds more than one of DDP's buckets does.
        model = tiny_model(hidden_size=1024, intermediate_size=3072).train()
        compile_blocks(model, backend=note)
        wrapped = DistributedDataParallel(model)
        for lengths in (SHORT, LONG):
            logprobs_and_gradient(wrapped, lengths)
        return len(graphs)

    assert num_graphs() == 1
    assert torch._dynamo.config.optimize_ddp is True
    monkeypatch.setattr(blocks, "_compiler", lambda **_: nullcontext())
    assert num_graphs() > 1


def test_outside_of_training_blocks_run_as_they_are(model: Any) -> None:
    compile_blocks(model, backend=refuse)
    model.eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, tiny_model().eval()(ids).logits)


def test_a_copy_computes_with_its_own_weights(model: Any) -> None:
    compile_blocks(model, backend="eager")
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.layers[0]))):
        assert are_compiled(copied)
        for value in copied.parameters():
            value.data.zero_()
    assert torch.equal(model(ids).logits, before)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert torch.equal(copied(ids).logits, before)


def test_what_cannot_be_compiled_is_said_once_and_computed_all_the_same(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logprobs_and_gradient(model)
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    compile_blocks(model, backend=refuse)
    with caplog.at_level(logging.WARNING, "shoal"):
        found = logprobs_and_gradient(model)
        logprobs_and_gradient(model)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    said = [record.getMessage() for record in caplog.records if "cannot be compiled" in record.getMessage()]
    assert len(said) == 1 and "LlamaDecoderLayer" in said[0] and "no compiler here" in said[0]


def test_as_many_blocks_are_computed_again_as_are_asked_for(model: Any) -> None:
    expected = logprobs_and_gradient(model)
    calls: list[int] = []
    for index, block in enumerate(find_blocks(model)):
        block.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))  # type: ignore[union-attr,operator]
    model.gradient_checkpointing_enable()
    for count in (2, 1, 0):
        recompute_first(model, count, is_lean=False)
        calls.clear()
        found = logprobs_and_gradient(model)
        assert sorted(calls[2:]) == list(range(count))
        torch.testing.assert_close(found, expected)


def test_lean_blocks_keep_a_quarter_less_and_give_the_same_gradients(model: Any) -> None:
    def kept_and_gradient(model: Any, *, is_lean: bool) -> tuple[int, torch.Tensor]:
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        recompute_first(model, 0, is_lean=is_lean)
        compile_blocks(model)
        storages: dict[int, int] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            if value.ndim and value.shape[-1] and not isinstance(value, torch.nn.Parameter):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autocast("cpu", torch.bfloat16):
            logprobs_and_gradient(model)  # compiles
            with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
                _, gradient = logprobs_and_gradient(model)
        return sum(storages.values()), gradient

    whole, expected = kept_and_gradient(copy.deepcopy(model), is_lean=False)
    lean, gradient = kept_and_gradient(copy.deepcopy(model), is_lean=True)
    assert lean < 0.8 * whole
    assert torch.equal(gradient, expected)
    assert torch._functorch.config.ban_recompute_materialized_backward is True


def settings(**changes: Any) -> Any:
    return SimpleNamespace(
        **({"regional_compilation": None, "torch_compile": False, "device": torch.device("cuda")} | changes)
    )


def test_blocks_are_compiled_where_it_pays(model: Any) -> None:
    assert compiles_blocks(model, settings(), is_deepspeed=False)
    for args, is_deepspeed in (
        (settings(device=torch.device("cpu")), False),
        (settings(torch_compile=True), False),
        (settings(regional_compilation=False), False),
        (settings(), True),
    ):
        assert not compiles_blocks(model, args, is_deepspeed=is_deepspeed)
    assert compiles_blocks(model, settings(regional_compilation=True, device=torch.device("cpu")), is_deepspeed=False)
    model.config.num_local_experts = 8
    assert not compiles_blocks(model, settings(), is_deepspeed=False)
    inner = model.config
    model.config = SimpleNamespace(get_text_config=lambda: inner)  # as of a model that takes pictures too
    assert not compiles_blocks(model, settings(), is_deepspeed=False)
    model.config = inner
    del model.config.num_local_experts
    model.hf_quantizer = object()
    assert not compiles_blocks(model, settings(), is_deepspeed=False)
    assert not compiles_blocks(torch.nn.Linear(2, 2), settings(), is_deepspeed=False)


def test_what_is_asked_for_and_cannot_be_is_refused(model: Any) -> None:
    wanted = settings(regional_compilation=True)
    with pytest.raises(ConfigError, match="DeepSpeed gathers parameters"):
        compiles_blocks(model, wanted, is_deepspeed=True)
    with pytest.raises(ConfigError, match="knows no blocks"):
        compiles_blocks(torch.nn.Linear(2, 2), wanted, is_deepspeed=False)
