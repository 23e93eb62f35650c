"""Put the engines that share the trainer's devices to sleep, until the next publish wakes them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from shoal.errors import WeightSyncError
from shoal.weights.control import EngineControl, SleepLevel, answer_of
from shoal.weights.group import EngineGroup
from shoal.wire.agreement import ADAPTER

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    """What came of putting engines to sleep.

    Attributes:
        asleep: Names of those that sleep.
        lost: Those that could not, and why; they have left the group.
    """

    asleep: tuple[str, ...]
    lost: dict[str, str]


class Bedtime:
    """Puts engines to sleep, each at the deepest level that a publish brings it back from.

    Level 2 drops the weights, which the next publish sends anyway; vLLM saves the model's buffers. It is too deep for
    an engine that is sent an adapter alone, and for one with tensors that are neither parameters nor buffers: level 1
    keeps a copy of all of it in pinned host memory.
    """

    def __init__(self) -> None:
        self._levels: dict[int, SleepLevel] = {}

    def begin(self, group: EngineGroup) -> SleepReport:
        """Put the live engines that do so to sleep. A collective.

        Raises:
            WeightSyncError: No engine is left.
        """
        data = group.ranks.json(lambda: self._on_rank_zero(group))
        group.keep([index for index in group.live if group.lines[index].name not in data["lost"]])
        if not group.live:
            raise WeightSyncError(f"no engine is left: {'; '.join(data['lost'].values())}")
        return SleepReport(asleep=tuple(data["asleep"]), lost=dict(data["lost"]))

    def _on_rank_zero(self, group: EngineGroup) -> dict[str, object]:
        sleepers = [index for index in group.live if group.controls[index].sleeps]
        limit = group.settings.timeout_s
        futures = {index: group.threads.submit(self._put_to_sleep, group, index) for index in sleepers}
        deadline = time.monotonic() + limit
        lost = {}
        for index, future in futures.items():
            name = group.lines[index].name
            try:
                answer_of(future, group.controls[index].client, deadline - time.monotonic())
            except TimeoutError:
                lost[name] = f"{name} did not fall asleep within {limit:g} s (weight_sync_timeout_s)"
            except WeightSyncError as error:
                lost[name] = str(error)
        for name, reason in lost.items():
            logger.error("%s leaves the group: %s", name, reason)
        names = [group.lines[index].name for index in sleepers]
        return {"asleep": [name for name in names if name not in lost], "lost": lost}

    def _put_to_sleep(self, group: EngineGroup, index: int) -> None:
        control = group.controls[index]
        if index not in self._levels:
            self._levels[index] = _choose_level(control, serves_adapter=ADAPTER in group.senders)
        control.sleep(self._levels[index])


def _choose_level(control: EngineControl, *, serves_adapter: bool) -> SleepLevel:
    if serves_adapter:
        return 1
    lost = sorted({name for worker in control.call("shoal_lost_asleep") for name in worker})
    if not lost:
        return 2
    logger.warning(
        "%s keeps a copy of its weights in host memory while it sleeps: %d of its tensors are no part of what is "
        "published (%s).",
        control.client.name,
        len(lost),
        ", ".join(lost[:3]),
    )
    return 1
