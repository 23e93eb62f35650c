"""The seams: what the rooms below expect of one another. A protocol exists where two implementations do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from shoal.types import EngineReport, Interval, ParameterMeta, Prompt, Rollout, RolloutRequest


@runtime_checkable
class RolloutEngine(Protocol):
    """Something that writes completions: a managed vLLM server, or the slow exact reference."""

    @property
    def name(self) -> str:
        """Short name for messages and metrics, such as `"engine-0"`."""
        ...

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Write one completion.

        Raises:
            EngineRequestError: The request cannot be answered, by this engine or any other.
            EngineFaultError: The engine failed or answered with something malformed. It carries what had been
                received, of an engine that sends as it writes.
        """
        ...

    def written(self, name: str) -> Rollout | None:
        """Return what has been received so far of the request of this name; None where nothing has."""
        ...

    async def cut(self, name: str) -> None:
        """Have the request of this name return what it has so far, with `finish_reason="cut"`.

        One that has just ended, and an engine that cannot do so, go on as they are.

        Raises:
            EngineRequestError: The engine did not take it.
        """
        ...

    async def report(self) -> EngineReport:
        """Say what it is doing.

        Raises:
            EngineFaultError: The engine failed or answered with something malformed.
        """
        ...


class Conversation(Protocol):
    """One sample under way: a prompt, and after it turns of the policy with what others wrote between them.

    Tokens are only ever appended, so that each turn begins with exactly what the one before ended with: its engine
    still has the keys and values of that, and the trainer sees the tokens that the policy saw.
    """

    @property
    def prompt(self) -> Prompt:
        """What it begins with."""
        ...

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens after the prompt so far."""
        ...

    @property
    def room(self) -> int:
        """How many tokens there may still be, whoever writes them."""
        ...

    async def ask(self) -> Rollout:
        """Have the policy write its next turn, up to a stop token or until there is no room, and return that turn.

        Raises:
            RolloutFlowError: There is no room.
            EngineError: No engine is left, or the request cannot be answered.
        """
        ...

    def add(self, token_ids: Sequence[int]) -> None:
        """Append what the policy did not write: a tool's result, say, with whatever the chat format puts around it.

        Raises:
            RolloutFlowError: There is no room for so many.
        """
        ...


@runtime_checkable
class RolloutFlow(Protocol):
    """How a sample comes about. One call for each sample, all of them at the same time in one event loop."""

    async def run(self, conversation: Conversation) -> None:
        """Take the conversation from its prompt to its end; the policy is asked at least once."""
        ...


@runtime_checkable
class WeightSource(Protocol):
    """One trainer rank's part of the trainer's weights, named and shaped as the checkpoint has them.

    A parameter is cut along its flattened (row-major) elements, which covers every way in which trainers shard: whole
    parameters (plain, DDP), rows of them (FSDP2), runs of elements (ZeRO-3).
    """

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe every parameter in full, in the order in which `tensors` yields them; equal on all ranks."""
        ...

    def held(self) -> Mapping[str, Interval]:
        """Return which elements of each parameter this rank has; a parameter that it has nothing of is left out."""
        ...

    def in_place(self) -> frozenset[str]:
        """Name the parameters whose values `tensors` yields where they lie: they cost no memory, however many.

        They are current as soon as `tensors` has yielded its first value.
        """
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the current values of what `held` names: flat, `[stop - start]`, contiguous, in the trainer's type.

        Every parameter of `metadata` is yielded, in its order, with an empty tensor where this rank has nothing of it.
        A value is a view of the parameter, or scratch of its own. Making it may be a collective, so all ranks must go
        through their iterators to the end.
        """
        ...


@dataclass(frozen=True, slots=True)
class Parcel:
    """A tensor on its way.

    Attributes:
        tensor: Contiguous, on the transport's device. Both ends have equally many elements of the same type.
        peer: Member of the group that it goes to or comes from.
        stays: Of what is sent: whether it will lie at the same place in later transfers too. Its memory may then be
            kept, and kept open by the receiver, until a transfer goes by without it.
    """

    tensor: torch.Tensor
    peer: int
    stays: bool = False


class Pending(Protocol):
    """Parcels under way."""

    def wait(self) -> None:
        """Make what this thread does next (on a GPU: what it launches next) come after the parcels.

        Raises:
            Exception: They did not arrive, or could not be sent.
        """
        ...


@runtime_checkable
class WeightTransport(Protocol):
    """What carries tensors between trainer ranks and the workers of one engine.

    A batch of `send` meets the batches of `receive` of its peers: between any two members, parcels pair up in the order
    in which both list them. Neither call blocks for the peer; `finish` does.
    """

    def send(self, parcels: Sequence[Parcel]) -> Pending:
        """Start sending. The tensors must keep their values until the answer was waited for."""
        ...

    def receive(self, parcels: Sequence[Parcel]) -> Pending:
        """Start receiving into the tensors, which must not be used until the answer was waited for."""
        ...

    def finish(self, timeout_s: float) -> None:
        """Block until all that was started is done.

        Raises:
            TimeoutError: It was not within `timeout_s`.
            Exception: A peer or the connection failed.
        """
        ...

    def close(self) -> None:
        """Leave, without waiting for anyone. What is under way is abandoned."""
        ...


class Ranks(Protocol):
    """How trainer ranks tell one another things. Every method is a collective: all call it, in the same order."""

    @property
    def rank(self) -> int:
        """Of this process."""
        ...

    @property
    def num_ranks(self) -> int:
        """Trainer processes."""
        ...

    def json(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and return its value, of plain JSON types, on all ranks.

        Raises:
            ShoalError: On the other ranks, when `make` raised; rank 0 raises what it raised.
        """
        ...

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value, of plain JSON types, on all ranks."""
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of int64 values, modulo 2^64, on all ranks."""
        ...
