"""Check slice plans on real vLLM models in one worker process. Run by `test_real_models.py`, once for each rank.

The process sets up vLLM's distributed state as a CPU worker does and goes through all architectures. For each it builds
the model with vLLM's own loader and dummy weights, learns the plan, writes a tiny checkpoint through the plan, and
compares with a second model that vLLM loaded from the same files itself. What it finds goes to a JSON file.

    python real_models.py --tp 2 --pp 1 --rank 0 --port 29500 --folder /tmp/x
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Before torch and vLLM are imported. Threads that spin on shared cores cost more than they bring.
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from model_cases import CASES, ROUNDS, SIZES, Case, Tensors, make_checkpoint, names_of_cases, next_tensors
from torch import nn

BATCH_BYTES = 1 << 20  # what the loader reorders is not cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came out of one case on one rank.

    Attributes:
        num_slices: Of the plan.
        source_regions: Name, offset and size of each slice's source.
        num_parameters: Parameters of the engine's model.
        num_computing: Values that change with the weights.
        reloaded: Those that go through vLLM's reload.
        seconds: For everything.
        compared: Values that were compared in each round.
        differing: For each round, which of them were not equal to the oracle's.
        still: For each round, what held or computed with weights and yet is as it was before the round.
        dummy_differing: Control: what differs while the model still has its dummy weights.
        swapped: Control: the two sources that were exchanged.
        swapped_differing: Control: what differs after a write by a plan with two equal slices exchanged.
    """

    num_slices: int
    source_regions: list[tuple[str, int, int]]
    num_parameters: int
    num_computing: int
    reloaded: list[str]
    seconds: float
    compared: int
    differing: list[list[str]]
    still: list[list[str]]
    dummy_differing: list[str]
    swapped: list[str]
    swapped_differing: list[str]


def apply_checkpoint(model: nn.Module, plan: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint's tensors into the model by the plan, as a publish from one rank that holds all does."""
    from shoal.types import Interval, ParameterMeta
    from shoal.vllm_plugin.sink import ParameterSink
    from shoal.wire.plan import dtype_name
    from shoal.wire.schedule import assign, batches, messages

    metas = [ParameterMeta(name=n, dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items()]
    ownership = assign(metas, [{meta.name: Interval(0, meta.num_elements) for meta in metas}])
    sink = ParameterSink(model, plan, torch.device("cpu"))
    sink.begin()
    try:
        for part in (part for parts in batches(metas, BATCH_BYTES) for part in parts):
            for message in messages(plan, ownership, part):
                room = sink.room(message)
                room.copy_(message.source.view(tensors[part.name].contiguous()))
                sink.place(message, room)
                sink.settle(message)
        sink.finish()
    finally:
        sink.close()


class Worker:
    """vLLM's state in this process: one rank of one layout."""

    def __init__(self, tp: int, pp: int, rank: int, port: int) -> None:
        import vllm.v1.worker.cpu.shm  # noqa: F401  # the first import of vLLM's CPU worker: it patches torch

        self.tp, self.pp, self.rank = tp, pp, rank
        self._init_method = f"tcp://127.0.0.1:{port}"
        os.environ["VLLM_DIST_IDENT"] = str(port)
        self._is_started = False

    def build(self, case: Case, folder: Path, load_format: str) -> nn.Module:
        """Build the model as a worker does, processed for its kernels."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model

        # A new one each time: it keeps a list of the attention layers, which must be new ones.
        config = self._config(case, folder, load_format)
        if not self._is_started:
            self._start(config)
        with set_current_vllm_config(config):
            model: nn.Module = get_model(vllm_config=config)
        return model

    def _config(self, case: Case, folder: Path, load_format: str) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=case.dtype,
            load_format=load_format,
            tensor_parallel_size=self.tp,
            pipeline_parallel_size=self.pp,
            distributed_executor_backend="mp",
            max_model_len=64,
            enforce_eager=True,
            **case.engine,
        ).create_engine_config()
        config.parallel_config.rank = self.rank
        return config

    def _start(self, config: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

        with set_current_vllm_config(config):
            init_worker_distributed_environment(config, self.rank, self._init_method, self.rank, "gloo")
        self._is_started = True
        gc.freeze()  # vLLM collects garbage in each build, which takes long among all that was imported


def observe(model: nn.Module) -> Tensors:
    """Return all that can be seen of a model: parameters, buffers, and what layers with hidden weights compute."""
    seen: Tensors = {}
    for prefix, layer in model.named_modules():
        for name, value in [*layer._parameters.items(), *layer._buffers.items()]:
            if value is not None:
                seen[f"{prefix}.{name}"] = value.detach().clone()
        # What latent attention derives from another layer's weight, for one.
        seen |= {f"{prefix}.{name}": value.clone() for name, value in vars(layer).items() if torch.is_tensor(value)}
        if (compute := _computation(layer)) is not None:
            seen[f"{prefix}()"] = compute()
    return seen


def weighty(model: nn.Module) -> set[str]:
    """Return the names, as `observe` gives them, of what changes with the weights: no buffers, no dropped weights."""
    return {
        name
        for prefix, layer in model.named_modules()
        for name in [
            *(f"{prefix}.{local}" for local, value in layer._parameters.items() if value is not None and value.numel()),
            *([f"{prefix}()"] if _computation(layer) is not None else []),
        ]
    }


def _computation(layer: nn.Module) -> Callable[[], torch.Tensor] | None:
    """Return what runs a layer on a fixed input. On CPUs a layer computes with a packed weight that nothing shows."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    method: Any = getattr(layer, "quant_method", None)
    if isinstance(layer, LinearBase):
        given = _fixed_input(getattr(layer, "input_size_per_partition", layer.input_size), layer.params_dtype)
        return lambda: method.apply(layer, given, layer.bias)
    if isinstance(layer, ParallelLMHead):
        given = _fixed_input(layer.embedding_dim, layer.weight.dtype)
        return lambda: method.apply(layer, given, layer.bias)
    if "w13_weight" in layer._parameters:
        return lambda: _experts(layer)
    return None


@torch.no_grad()
def _experts(layer: Any) -> torch.Tensor:
    hidden = _fixed_input(SIZES["hidden_size"], layer.w13_weight.dtype)
    # Those that this rank has: the kernel for CPUs takes any other for an address.
    ids = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32) % len(layer.w13_weight)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    result: torch.Tensor = layer.quant_method.apply(layer, hidden, weights, ids, None, None)
    return result.clone()


def _fixed_input(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn((3, size), generator=torch.Generator().manual_seed(1)).to(dtype)


def differing(first: Tensors, second: Tensors) -> list[str]:
    """Return the names under which the two are not the same bit for bit."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if not _same(first.get(name), second.get(name))]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def swap_two(plan: Any) -> tuple[Any, list[str]]:
    """Return the plan with the sources of its first two slices of equal shape exchanged."""
    for i, first in enumerate(plan.slices):
        for j in range(i + 1, len(plan.slices)):
            second = plan.slices[j]
            if first.source_region.shape == second.source_region.shape and first.source != second.source:
                slices = list(plan.slices)
                slices[i] = replace(first, source=second.source, source_region=second.source_region)
                slices[j] = replace(second, source=first.source, source_region=first.source_region)
                return replace(plan, slices=tuple(slices)), [first.source, second.source]
    raise RuntimeError("the plan has no two slices of equal shape")


def examine(worker: Worker, case: Case, folder: Path) -> Finding:
    """Go through one case."""
    from shoal.types import ParameterMeta
    from shoal.vllm_plugin.recorder import learn_plan
    from shoal.wire.plan import dtype_name

    started = time.perf_counter()
    tensors = next_tensors(case, folder, seed=0)
    metadata = [ParameterMeta(name=n, dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items()]
    model = worker.build(case, folder, "dummy")
    plan = learn_plan(model, metadata, worker=f"worker {worker.rank}")
    before = observe(model)
    num_before = len(before)
    rounds: list[list[str]] = []
    still: list[list[str]] = []
    dummy: list[str] = []
    for seed in range(1, 1 + ROUNDS):
        tensors = next_tensors(case, folder, seed)
        wanted = observe(worker.build(case, folder, "auto"))
        dummy = dummy or differing(before, wanted)
        apply_checkpoint(model, plan, tensors)
        now = observe(model)
        rounds.append(differing(now, wanted))
        still.append(sorted(weighty(model) - set(differing(now, before))))
        before = now
    swapped_plan, swapped = swap_two(plan)
    apply_checkpoint(model, swapped_plan, tensors)
    return Finding(
        num_slices=len(plan.slices),
        source_regions=[(s.source, s.source_region.offset, s.source_region.num_elements) for s in plan.slices],
        num_computing=len(weighty(model)),
        num_parameters=sum(1 for _ in model.named_parameters()),
        reloaded=list(plan.reloaded),
        seconds=time.perf_counter() - started,
        compared=num_before,
        differing=rounds,
        still=still,
        dummy_differing=dummy,
        swapped=swapped,
        swapped_differing=differing(observe(model), wanted),
    )


def main() -> None:
    """Go through all cases of one layout as one rank."""
    parser = argparse.ArgumentParser()
    for name in ("tp", "pp", "rank", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    # Every rank has files of its own, so that no rank waits for another. They are made first: once there is a process
    # group, `save_pretrained` saves on rank 0 alone.
    folders = {name: args.folder / f"{name}-rank{args.rank}" for name in args.only or names_of_cases(args.pp)}
    for name, folder in folders.items():
        make_checkpoint(CASES[name], folder, num_layers=2 * args.pp)
    worker = Worker(args.tp, args.pp, args.rank, args.port)
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        try:
            found[name] = asdict(examine(worker, CASES[name], folder))
        except Exception as error:  # the others are still worth knowing
            import traceback

            found[name] = {"error": "".join(traceback.format_exception(error))}
    (args.folder / f"found-rank{args.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
