"""One sample as a conversation: the policy's turns and what others write between them, token after token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.errors import RolloutFlowError
from shoal.protocols import Conversation
from shoal.rollout.parts import go_on_after
from shoal.types import FinishReason, Prompt, Rollout, RolloutRequest

Write = Callable[[RolloutRequest, str | None], Awaitable[Rollout]]
"""Writes one turn, near the engine of that name if one is given."""


class SingleTurn:
    """The flow of a plain completion: the policy is asked once."""

    async def run(self, conversation: Conversation) -> None:
        """Ask once."""
        await conversation.ask()


@dataclass(frozen=True, slots=True)
class _Observation:
    """Tokens that the policy did not write."""

    token_ids: tuple[int, ...]


class SampleConversation:
    """A `Conversation` whose turns are written by whatever `write` asks.

    Args:
        prompt: What it begins with.
        request: Asks for the whole completion; each turn is what is missing of it.
        write: Writes a turn.
    """

    def __init__(self, prompt: Prompt, request: RolloutRequest, write: Write) -> None:
        self._prompt = prompt
        self._request = request
        self._write = write
        self._pieces: list[Rollout | _Observation] = []
        self._token_ids: tuple[int, ...] = ()
        self._last: Rollout | None = None

    @property
    def prompt(self) -> Prompt:
        """What it begins with."""
        return self._prompt

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens after the prompt so far."""
        return self._token_ids

    @property
    def room(self) -> int:
        """How many tokens there may still be."""
        return self._request.sampling.max_tokens - len(self._token_ids)

    async def ask(self) -> Rollout:
        """Have the policy write its next turn and return it.

        Raises:
            RolloutFlowError: There is no room.
            EngineError: No engine is left, or the request cannot be answered.
        """
        if self.room < 1:
            raise RolloutFlowError(
                f"A rollout flow asked for another turn, but the conversation of dataset row {self._prompt.row} has "
                f"all of its {self._request.sampling.max_tokens} tokens (max_completion_length). Look at `room` before."
            )
        near = self._last.engine if self._last is not None else None
        turn = await self._write(go_on_after(self._request, self._token_ids), near)
        self._last = turn
        self._append(turn)
        return turn

    def add(self, token_ids: Sequence[int]) -> None:
        """Append what the policy did not write.

        Raises:
            RolloutFlowError: There is no room for so many.
        """
        if len(token_ids) > self.room:
            raise RolloutFlowError(
                f"A rollout flow added {len(token_ids)} tokens to the conversation of dataset row {self._prompt.row}, "
                f"which has room for {self.room} of its {self._request.sampling.max_tokens} (max_completion_length). "
                "Look at `room` before, and shorten what is added or end the conversation."
            )
        self._append(_Observation(tuple(int(token) for token in token_ids)))

    def rollout(self) -> Rollout:
        """Return the whole of it as one completion.

        Raises:
            RolloutFlowError: The policy was never asked.
        """
        if self._last is None:
            raise RolloutFlowError(
                f"A rollout flow ended the conversation of dataset row {self._prompt.row} without asking the policy, "
                "so there is nothing to learn from. Call `await conversation.ask()` at least once."
            )
        if len(self._pieces) == 1:
            return self._last
        turns = [piece for piece in self._pieces if isinstance(piece, Rollout)]
        return Rollout(
            token_ids=np.array(self._token_ids, dtype=np.int32),
            rollout_logprobs=np.concatenate([_logprobs(piece) for piece in self._pieces]),
            finish_reason=self._finish_reason(self._last),
            weight_version=min(turn.weight_version for turn in turns),
            engine=self._last.engine,
            by_policy=np.concatenate(
                [np.full(len(piece.token_ids), isinstance(piece, Rollout)) for piece in self._pieces]
            ),
        )

    def _append(self, piece: Rollout | _Observation) -> None:
        self._pieces.append(piece)
        self._token_ids += tuple(int(token) for token in piece.token_ids)

    def _finish_reason(self, last: Rollout) -> FinishReason:
        """Say why it ended: for want of room, or as its last turn did."""
        return "length" if self._pieces[-1] is not last and self.room == 0 else last.finish_reason


def _logprobs(piece: Rollout | _Observation) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return piece.rollout_logprobs if isinstance(piece, Rollout) else np.zeros(len(piece.token_ids), dtype=np.float32)
