"""vLLM's own update of weights over NCCL, for servers without our plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from shoal.types import ParameterMeta


def connect_native_update(
    client: Any,
    parameters: Sequence[ParameterMeta],
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    meeting: Mapping[str, Any],
) -> Callable[[], None]:
    """Form the group of vLLM's own packed NCCL update, and return what updates all engines.

    Args:
        client: What vLLM calls a weight-sync client.
        parameters: What is sent.
        tensors: Yields it, in this order.
        meeting: Where: `master_address`, `master_port` and `world_size`.
    """
    from vllm.distributed.weight_transfer import base, nccl_engine

    if not hasattr(nccl_engine, "NCCLTrainerWeightTransferEngine"):
        return _native_by_functions(nccl_engine.NCCLWeightTransferEngine, client, parameters, tensors, meeting)

    class Source(base.WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [base.ParamMeta(meta.name, getattr(torch, meta.dtype), meta.shape) for meta in parameters]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return tensors()

    sender = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
        nccl_engine.NCCLTrainerInitInfo(rank=0, packed=True, **meeting), client=client, source=Source()
    )
    send: Callable[[], None] = sender.send_weights
    return send


def _native_by_functions(
    engine: Any,
    client: Any,
    parameters: Sequence[ParameterMeta],
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    meeting: Mapping[str, Any],
) -> Callable[[], None]:
    """Do the same with vLLM 0.26, where `packed` travels with every update and the trainer calls plain functions."""
    update_info = {
        "names": [meta.name for meta in parameters],
        "dtype_names": [meta.dtype for meta in parameters],
        "shapes": [list(meta.shape) for meta in parameters],
        "packed": True,
    }
    threads = ThreadPoolExecutor(max_workers=1)
    joining = threads.submit(client.init_weight_transfer_engine, dict(meeting))
    group = engine.trainer_init(dict(meeting))
    joining.result()

    def send() -> None:
        client.start_weight_update()
        updating = threads.submit(client.update_weights, update_info)
        engine.trainer_send_weights(tensors(), {"group": group, "packed": True})
        torch.cuda.synchronize()
        updating.result()
        client.finish_weight_update()

    return send
