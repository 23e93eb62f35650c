"""What the adapter tests call inside each worker of a vLLM engine, given as its `worker_extension_cls`."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from shoal.types import Interval, ParameterMeta
from shoal.vllm_plugin.adapter_plan import ServedAdapter, adapter_tensors, learn_adapter_plan
from shoal.vllm_plugin.sink import ParameterSink
from shoal.wire.plan import SlicePlan, dtype_name
from shoal.wire.schedule import assign, batches, messages

BATCH_BYTES = 1 << 10  # cuts most factors in two or more


def read(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


class AdapterWorker:
    """Methods that `LLM.collective_rpc` finds by their names. All state has names of its own in the worker."""

    def shoal_learn(self, folder: str) -> str:
        model = self._shoal_model()
        metas = [ParameterMeta(name=name, dtype="float64", shape=tuple(v.shape)) for name, v in read(folder).items()]
        before = self.shoal_digests()
        self.shoal_metas = metas
        self.shoal_plan: SlicePlan = learn_adapter_plan(model, metas, "worker")
        self.shoal_served = ServedAdapter(model, "worker")
        assert self.shoal_digests() == before, "learning changed what the worker serves"
        return self.shoal_plan.to_json()

    def shoal_publish(self, folder: str, skip: str = "") -> None:
        """Write the adapter of `folder` in place, piece by piece as one trainer rank that holds all of it sends it.

        Args:
            folder: Of the adapter.
            skip: Part of the name of a tensor that does not arrive, as in no real publish.
        """
        plan, tensors = self.shoal_plan, read(folder)
        ownership = assign(self.shoal_metas, [{m.name: Interval(0, m.num_elements) for m in self.shoal_metas}])
        resolve = adapter_tensors(self._shoal_model()).__getitem__
        sink = ParameterSink(self._shoal_model(), plan, torch.device("cpu"), resolve)
        sink.begin()
        try:
            for part in chain.from_iterable(batches(self.shoal_metas, max_bytes=BATCH_BYTES)):
                for message in messages(plan, ownership, part):
                    if skip and skip in part.name:
                        continue
                    room = sink.room(message)
                    room.copy_(message.source.view(tensors[part.name]))
                    sink.place(message, room)
                    sink.settle(message)
            if not skip:
                sink.finish()
        finally:
            sink.close()

    def shoal_restore(self) -> bool:
        return self.shoal_served.restore()

    def shoal_finish_weight_update(self) -> None:
        """Do what the worker does at the end of `/finish_weight_update`."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        runner.reset_lora_state()

    def shoal_digests(self) -> dict[str, str]:
        """Return a digest of every buffer, and of every parameter of the base."""
        model = self._shoal_model()
        tensors = adapter_tensors(model) | dict(model.named_parameters())
        return {
            name: f"{dtype_name(v.dtype)} {tuple(v.shape)} "
            + hashlib.sha256(v.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, v in tensors.items()
        }

    def _shoal_model(self) -> Any:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        return runner.get_model()
