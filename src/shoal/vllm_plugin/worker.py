"""What `--worker-extension-cls` adds to each vLLM worker: calls that the trainer reaches by `/collective_rpc`.

A call never raises. An exception in one worker makes vLLM's executor (0.26 to 0.32) leave the other workers' answers in
their queues, where each later call of any kind would find the one before its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from shoal import vllm_compat
from shoal.vllm_plugin.receiver import MeetInfo, ReceiveInfo, WeightReceiver
from shoal.vllm_plugin.survival import lost_asleep
from shoal.wire.agreement import Agreement

logger = logging.getLogger(__name__)

Answer = dict[str, Any]
"""`{"value": ...}`, or `{"error": "..."}`."""

# vLLM imports this module in each worker, before it makes the model's runner.
if _surprise := vllm_compat.skip_idle_sampler_work():
    logger.warning("sampling parameters are copied in every step, which costs speed: %s", _surprise)


class ShoalWorker:
    """Mixed into vLLM's worker class; its names must not meet the worker's own."""

    _shoal_receiver: WeightReceiver | None = None

    def shoal_meet(self, **info: Any) -> Answer:
        """Connect to a trainer; answer with this worker's slice plans. A line to a former trainer is given up."""

        def meet() -> Any:
            self._shoal_leave()
            model = vllm_compat.worker_model(self)
            vllm_compat.check_nothing_derived(model)
            self._shoal_receiver = WeightReceiver(
                model,
                device=vllm_compat.worker_device(self),
                worker=vllm_compat.worker_number(self),
                info=MeetInfo(**info),
            )
            return self._shoal_receiver.introduce()

        return self._shoal_answer(meet)

    def shoal_join(self, agreements: dict[str, str]) -> Answer:
        """Form the group with all trainer ranks, now that it is agreed who sends what."""

        def join() -> None:
            self._shoal_met().join({cargo: Agreement.from_json(text) for cargo, text in agreements.items()})

        return self._shoal_answer(join)

    def shoal_receive(self, **info: Any) -> Answer:
        """Receive one whole cargo; answer with digests of what this worker now holds."""
        return self._shoal_answer(lambda: self._shoal_met().receive(ReceiveInfo(**info)))

    def shoal_lost_asleep(self) -> Answer:
        """Name what nothing would bring back if this worker slept at level 2 (`shoal.vllm_plugin.survival`)."""
        return self._shoal_answer(lambda: lost_asleep(vllm_compat.worker_model(self), vllm_compat.drops_asleep))

    def _shoal_met(self) -> WeightReceiver:
        if self._shoal_receiver is None:
            raise RuntimeError("this worker has met no trainer")
        return self._shoal_receiver

    def _shoal_leave(self) -> None:
        receiver, self._shoal_receiver = self._shoal_receiver, None
        if receiver is not None:
            receiver.close()

    def _shoal_answer(self, call: Callable[[], Any]) -> Answer:
        try:
            with vllm_compat.worker_context(self):
                return {"value": call()}
        except Exception as error:
            logger.exception("a call of the trainer failed")
            self._shoal_leave()  # the trainer's ranks must not wait for this worker
            return {"error": f"{type(error).__name__}: {error}"}
