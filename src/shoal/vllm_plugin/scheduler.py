"""What `--scheduler-cls` names: vLLM's own scheduler, which sends on what it has four times a second.

Why, and what it saves: docs/decisions/0017.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from shoal import vllm_compat
from shoal.vllm_plugin.held_outputs import HeldOutputs, StepLogprobs
from shoal.vllm_plugin.late_scheduler import LateScheduler

logger = logging.getLogger(__name__)

PATH = f"{__name__}.make_scheduler"
"""For `--scheduler-cls`."""

_INTERVAL_S = 0.25
"""A sample that is cut loses what it wrote since; 20 to 80 steps of a busy GPU."""


def make_scheduler(**arguments: Any) -> Any:
    """Return the engine's scheduler, for the arguments that vLLM gives to a scheduler's class.

    Where vLLM is not as expected, that is its own, and a warning says so.
    """
    base = vllm_compat.scheduler_class(arguments["vllm_config"])
    if surprise := vllm_compat.why_not_hold():
        logger.warning("every token goes to the front end by itself, which costs speed: %s", surprise)
        return base(**arguments)
    bases: list[type] = [HoldingScheduler, base]
    if vllm_compat.is_told_late(arguments["vllm_config"]):
        if surprise := vllm_compat.why_not_tell_late():
            logger.warning("the scheduler is told of every token by itself, which costs speed: %s", surprise)
        else:
            bases.insert(1, LateScheduler)
    scheduler = type("ShoalScheduler", tuple(bases), {"__module__": __name__})(**arguments)
    if surprise := vllm_compat.skip_idle_block_work(scheduler):
        logger.warning("cache blocks are looked after for every token, which costs speed: %s", surprise)
    return scheduler


class HoldingScheduler:
    """Goes before vLLM's scheduler class, and keeps outputs of requests that allow it (`vllm_compat.may_hold`)."""

    interval_s = _INTERVAL_S

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shoal_held = HeldOutputs(vllm_compat.join_logprobs)
        self._shoal_sent_at = 0.0
        self._shoal_is_due = True

    def add_request(self, request: Any) -> None:
        """Take a request in."""
        super().add_request(request)  # type: ignore[misc]
        if vllm_compat.may_hold(request):
            self._shoal_held.open(request.request_id)

    def finish_requests(self, *args: Any, **options: Any) -> Any:
        """End requests from outside."""
        ended = super().finish_requests(*args, **options)  # type: ignore[misc]
        self._shoal_held.forget(self.requests)  # type: ignore[attr-defined]
        return ended

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """Return the messages to the front ends that a step brings about."""
        now = time.monotonic()
        self._shoal_is_due = now - self._shoal_sent_at >= self.interval_s
        step = None
        if model_runner_output.logprobs is not None:
            step = model_runner_output.logprobs = StepLogprobs(model_runner_output.logprobs)
        messages: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for message in messages.values():
            message.outputs = self._shoal_held.sift(message.outputs, step)
        if self._shoal_is_due:
            self._shoal_sent_at = now
            for name, output in self._shoal_held.release():
                client = self.requests[name].client_index  # type: ignore[attr-defined]
                if client not in messages:
                    messages[client] = vllm_compat.empty_message()
                messages[client].outputs.append(output)
        return {client: message for client, message in messages.items() if vllm_compat.says_something(message)}

    def make_stats(self, *args: Any, **options: Any) -> Any:
        """Return the figures for a message, when one is due or the engine falls idle; what is counted goes on."""
        is_plain = all(part is None for part in (*args, *options.values()))
        if is_plain and not self._shoal_is_due and self.running:  # type: ignore[attr-defined]
            return None
        return super().make_stats(*args, **options)  # type: ignore[misc]
