"""Tokens that an engine's core keeps for a moment, so that many steps go to the front end as one message.

vLLM's core makes a message of every step: for each request an object, three small arrays, and their encoding, which the
front end decodes one by one. Nobody reads them sooner than a few dozen tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.vllm_plugin.untold import Untold


class Slices(Protocol):
    """The logprobs of a step, as vLLM's runner gives them."""

    logprobs: Any
    sampled_token_ranks: Any

    def slice_request(self, req_idx: int, num_positions: int) -> Any:
        """Return the rows of one request."""


class StepLogprobs:
    """Stands for a step's logprobs while vLLM deals them out: a row's number costs less than three arrays of one."""

    def __init__(self, lists: Slices) -> None:
        self.lists = lists
        self.logprobs: list[float] = lists.logprobs[:, 0].tolist()
        self.ranks: list[int] = lists.sampled_token_ranks.tolist()

    def slice_request(self, req_idx: int, num_positions: int) -> Any:
        """Return the number of the row where it is only one."""
        return req_idx if num_positions == 1 else self.lists.slice_request(req_idx, num_positions)


@dataclass(slots=True)
class _Held:
    """What is kept of one request: the last of its outputs, and what will be put into it."""

    carrier: Any = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


class HeldOutputs:
    """The outputs of the requests that may be kept; those of others pass.

    Args:
        join_logprobs: Makes vLLM's logprobs of several positions out of their token ids, logprobs and ranks.
    """

    def __init__(self, join_logprobs: Any) -> None:
        self._join_logprobs = join_logprobs
        self._requests: dict[str, _Held] = {}
        self._waiting: dict[str, _Held] = {}

    def open(self, name: str) -> None:
        """Keep outputs of this request from now on."""
        self._requests.setdefault(name, _Held())

    def forget(self, alive: Iterable[str]) -> None:
        """Drop what is kept of requests that have ended: nobody listens to them any more."""
        for name in self._requests.keys() - set(alive):
            del self._requests[name]
            self._waiting.pop(name, None)

    def sift(self, outputs: list[Any], step: StepLogprobs | None) -> list[Any]:
        """Return what goes on at once: outputs that tell more than a token, with what was kept before them."""
        passed = []
        for output in outputs:
            name = output.request_id
            held = self._requests.get(name)
            row = output.new_logprobs
            if held is None:
                if type(row) is int:
                    assert step is not None
                    output.new_logprobs = step.lists.slice_request(row, 1)
                passed.append(output)
                continue
            held.token_ids += output.new_token_ids
            if type(row) is Untold:
                num_known = len(output.new_token_ids)
                held.logprobs += row.logprobs[:num_known]
                held.ranks += row.ranks[:num_known]
            elif type(row) is int:
                assert step is not None
                held.logprobs.append(step.logprobs[row])
                held.ranks.append(step.ranks[row])
            elif row is not None:
                held.logprobs += row.logprobs[:, 0].tolist()
                held.ranks += row.sampled_token_ranks.tolist()
            held.carrier = output
            if output.finish_reason is not None or output.events is not None or output.prefill_stats is not None:
                passed.append(self._release(held))
                self._waiting.pop(name, None)
                if output.finish_reason is not None:
                    del self._requests[name]
            else:
                self._waiting[name] = held
        return passed

    def release(self) -> Iterator[tuple[str, Any]]:
        """Yield everything that is kept, with its request's name."""
        waiting, self._waiting = self._waiting, {}
        for name, held in waiting.items():
            yield name, self._release(held)

    def _release(self, held: _Held) -> Any:
        output, held.carrier = held.carrier, None
        output.new_token_ids = held.token_ids
        output.new_logprobs = None
        if held.logprobs:
            output.new_logprobs = self._join_logprobs(held.token_ids, held.logprobs, held.ranks)
        held.token_ids, held.logprobs, held.ranks = [], [], []
        return output
