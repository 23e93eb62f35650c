"""What an exchange does on this process: run by test_exchange.py with torchrun.

python exchange_script.py FOLDER BACKEND
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from shoal.errors import NoEngineError, RewardError, WeightProofError
from shoal.trainer.comebacks import Comebacks
from shoal.trainer.exchange import Exchange
from shoal.types import Sequence

VALUE = {"reward": 0.1, "names": ["ü", "\ud800"], "none": None, "yes": True, "nested": [{"a": [1, -2.5e-300]}], "": ""}


def make_sequences() -> list[Sequence]:
    """Sequences with everything that could be lost on the way."""
    random = np.random.default_rng(0)
    return [
        Sequence(
            token_ids=random.integers(0, 2**31 - 1, prompt + completion),
            prompt_length=prompt,
            advantage=float(random.normal()) * 1e-9,
            rollout_logprobs=np.where(random.random(completion) < 0.3, np.nan, random.normal(size=completion)).astype(
                np.float32
            ),
            in_loss=bool(index % 2),
        )
        for index, (prompt, completion) in enumerate([(1, 3), (4, 0), (200, 300), (2, 1)])
    ]


def plain(sequences: list[Sequence]) -> list[dict[str, Any]]:
    """Sequences as bits, so that NaN equals NaN and nothing is rounded."""
    return [
        {
            "token_ids": sequence.token_ids.tolist(),
            "dtypes": [str(sequence.token_ids.dtype), str(sequence.rollout_logprobs.dtype)],
            "prompt_length": sequence.prompt_length,
            "advantage": sequence.advantage.hex(),
            "rollout_logprobs": sequence.rollout_logprobs.tobytes().hex(),
            "in_loss": sequence.in_loss,
        }
        for sequence in sequences
    ]


def raises(error: BaseException) -> Callable[[], Any]:
    """Something that fails."""

    def make() -> Any:
        raise error

    return make


class Publisher:
    """Fills an engine with what all ranks add up, as the real one adds up digests."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.events: list[Any] = []

    def refill(self, name: str, address: str | None, version: int) -> None:
        """Do what a publish does between ranks; an engine of an odd name fails on all of them."""
        total = self._exchange.sum(torch.tensor([self._exchange.rank + 1])).item()
        self.events.append([name, address, version, total])

        def prove() -> None:
            if name == "engine-1":
                raise WeightProofError("engine-1 holds something else")

        self._exchange.json(prove)


class Rollouts:
    """Engines of which two come back, one after the other. On rank 0."""

    def __init__(self) -> None:
        self.version = 7
        self.events: list[Any] = []
        self._back = [["engine-0"], [], ["engine-1"], []]

    def take_back(self) -> list[str]:
        """Return those that are back."""
        return self._back.pop(0)

    def address(self, name: str) -> str:
        """Return where one is."""
        return f"at {name}"

    def refilled(self, name: str, version: int) -> None:
        """Take note."""
        self.events.append([name, version])

    def lost(self, reasons: dict[str, str]) -> None:
        """Take note."""
        self.events.append(reasons)


def come_back(exchange: Exchange, error: BaseException | None) -> Any:
    """Work on rank 0 while two engines come back; return what this rank has seen, and the result that all get."""
    publisher, rollouts = Publisher(exchange), Rollouts() if exchange.rank == 0 else None
    comebacks = Comebacks(exchange, cast(Any, publisher), cast(Any, rollouts))

    def work() -> str:
        for _ in range(4):
            comebacks.meanwhile()
        if error is not None:
            raise error
        return "the batch"

    result = outcome(lambda: exchange.json(comebacks.during(work)))
    return [publisher.events, rollouts.events if rollouts is not None else None, result]


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call returned or raised."""
    try:
        return {"value": call()}
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error).encode(errors="replace").decode()}


def main() -> None:
    """Go through all scenarios, in the same order on all processes, beside a default group of the backend named."""
    dist.init_process_group(sys.argv[2])
    rank = dist.get_rank()
    exchange = Exchange(rank=rank, world_size=dist.get_world_size())
    calls: list[str] = []

    def counted(name: str, value: Any) -> Callable[[], Any]:
        def make() -> Any:
            calls.append(name)
            return value

        return make

    results = {
        "sequences": outcome(lambda: plain(exchange.sequences(counted("sequences", make_sequences())))),
        "no sequences": outcome(lambda: plain(exchange.sequences(counted("no sequences", [])))),
        "json": outcome(lambda: exchange.json(counted("json", VALUE))),
        "nothing": outcome(lambda: exchange.json(counted("nothing", None))),
        "own error": outcome(lambda: exchange.sequences(raises(RewardError("reward function 'ü' raised")))),
        "error without text": outcome(lambda: exchange.json(raises(ValueError()))),
        "error with odd text": outcome(lambda: exchange.json(raises(ValueError("\ud800")))),
        "interrupt": outcome(lambda: exchange.sequences(raises(KeyboardInterrupt()))),
        "not json": outcome(lambda: exchange.json(counted("not json", {1, 2}))),
        "not sequences": outcome(lambda: exchange.sequences(counted("not sequences", ["text"]))),
        "gathered": outcome(lambda: exchange.gather_json({"rank": rank, "ü": ["x" * 1000 * rank, None]})),
        "summed": outcome(lambda: exchange.sum(torch.tensor([rank + 1, 2**63 - 1, -(2**63)])).tolist()),
        "come back": outcome(lambda: come_back(exchange, None)),
        "come back and fail": outcome(lambda: come_back(exchange, RewardError("it raised"))),
        "none comes back": outcome(lambda: come_back(exchange, NoEngineError("no engine is left: engine-0 died"))),
        "after all that": outcome(lambda: exchange.json(counted("after all that", "still here"))),
    }
    results["calls"] = {"value": calls}
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
