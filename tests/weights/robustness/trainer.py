"""A trainer that does what its standard input says, line by line, and says in lines of JSON what it is about.

    python trainer.py '{"model_dir": "...", "timeout_s": 8, "batch_bytes": 262144}'

    {"do": "connect", "engines": [...]}   meet these engines, of which it may know some already
    {"do": "publish", "version": 7}       other weights with each version, the same ones in every process
    {"do": "compare"}                     what do the engines write, and what does transformers, with these weights?

Rank 0 answers each by `{"event": "done", ...}`. Each call of an engine's control routes is told as it begins and ends,
so that another process knows in which phase of a publish this one is. What ends it early is told as `"failed"`; else it
ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.engines.client import EngineClient
from shoal.errors import ShoalError
from shoal.testing import greedy_texts
from shoal.trainer.exchange import Exchange
from shoal.types import RolloutRequest, SamplingSettings
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source

CPU = torch.device("cpu")
EOS = 2
NUM_TOKENS = 16
PROMPTS = (tuple(range(70, 90)), (5,), tuple(3 + (7 * i) % 250 for i in range(140)))
GREEDY = SamplingSettings(temperature=0.0, max_tokens=NUM_TOKENS, stop_token_ids=(EOS,))
RANK = int(os.environ.get("RANK", "0"))
NUM_RANKS = int(os.environ.get("WORLD_SIZE", "1"))

_telling = threading.Lock()


def main() -> None:
    settings = json.loads(sys.argv[1])
    if NUM_RANKS > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # the next command may be long in coming
    trainer = Trainer(settings)
    tell("ready", pid=os.getpid())
    try:
        while command := trainer.ranks.json(next_command):
            began = time.monotonic()
            try:
                done = getattr(trainer, command.pop("do"))(**command)
            except ShoalError as error:
                if NUM_RANKS > 1:
                    raise
                done = {"error": f"{type(error).__name__}: {error}"}
            if RANK == 0:
                tell("done", seconds=time.monotonic() - began, **done)
    except Exception as error:
        tell("failed", error=f"{type(error).__name__}: {error}")
        raise
    trainer.close()


def next_command() -> dict[str, Any]:
    """Read one; nothing at the end of the input."""
    line = sys.stdin.readline()
    return dict(json.loads(line)) if line.strip() else {}


def tell(event: str, **more: Any) -> None:
    """Say what happens, with the time on a clock that all processes of this machine share."""
    text = json.dumps({"event": event, "at": time.monotonic(), "rank": RANK} | more) + "\n"
    with _telling:
        sys.stdout.write(text)
        sys.stdout.flush()


class TellingClient(EngineClient):
    """Tells what is posted to an engine's control routes, and when that ends."""

    def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        what = str(body["method"]) if body and "method" in body else path.partition("?")[0]
        tell("call", engine=self.name, what=what)
        try:
            return super().post(path, body, timeout_s)
        finally:
            tell("answer", engine=self.name, what=what)


class Trainer:
    """Weights that turn from version to version, and the publisher that sends them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        config = AutoConfig.from_pretrained(settings["model_dir"])
        self._model = random_model(config, seed=1)
        # Each version is a point on the circle through these two, of which none is larger than another.
        self._ends = [[value.detach().clone() for value in random_model(config, seed=s).parameters()] for s in (1, 2)]
        self._trained = DistributedDataParallel(self._model) if NUM_RANKS > 1 else self._model
        self.ranks = Exchange(rank=RANK, world_size=NUM_RANKS)
        self._clients: list[TellingClient] = []
        self._publisher: WeightPublisher | None = None

    def connect(self, engines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self.close()
        self._clients = [
            TellingClient(
                name=engine["name"],
                url=engine["url"],
                api_key=engine["key"],
                log_path=Path(engine["log"]),
                request_timeout_s=60,
            )
            for engine in (engines if RANK == 0 else ())
        ]
        self._publisher = WeightPublisher(
            {"model": make_source(self._trained)},
            [
                EngineAddress(client=client, num_workers=engine["workers"], backend="gloo")
                for client, engine in zip(self._clients, engines, strict=False)
            ],
            ranks=self.ranks,
            device=CPU,
            settings=PublishSettings(
                host="127.0.0.1", timeout_s=self._settings["timeout_s"], batch_bytes=self._settings["batch_bytes"]
            ),
        )
        self._publisher.connect()
        return {}

    def publish(self, version: int) -> dict[str, Any]:
        assert self._publisher is not None
        self._turn(version)
        tell("publish", version=version)
        began = time.monotonic()
        try:
            report = self._publisher.publish(version)
        finally:
            tell("published", seconds=time.monotonic() - began)
        return {
            "lost": dict(report.lost),
            "proven": sorted(self._publisher.live_engines) if report.num_digests else [],
            "phases": dict(report.phases),
        }

    def compare(self) -> dict[str, Any]:
        """Return what transformers writes with the published weights, and which engines write the same."""
        assert self._publisher is not None
        wanted = greedy_texts(self._model, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
        live = [client for client in self._clients if client.name in self._publisher.live_engines]
        texts = asyncio.run(self._ask(live))
        return {"text": wanted, "equal": [client.name for client in live if texts[client.name] == wanted]}

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        for client in self._clients:
            client.close()

    @torch.no_grad()
    def _turn(self, version: int) -> None:
        for value, one, other in zip(self._model.parameters(), *self._ends, strict=True):
            torch.add(one * math.cos(version), other, alpha=math.sin(version), out=value)

    @staticmethod
    async def _ask(clients: Sequence[EngineClient]) -> dict[str, list[list[int]]]:
        requests = [RolloutRequest(prompt_token_ids=prompt, seed=0, sampling=GREEDY) for prompt in PROMPTS]
        texts = {}
        for client in clients:
            # The connections of a client belong to one event loop.
            fresh = EngineClient(
                name=client.name,
                url=client.url,
                api_key=client._sync.headers["authorization"].removeprefix("Bearer "),
                log_path=client.log_path,
                request_timeout_s=60,
            )
            fresh.cache_salt = client.cache_salt
            texts[client.name] = [
                answer.token_ids.tolist() for answer in await asyncio.gather(*map(fresh.generate, requests))
            ]
            await fresh.aclose()
            fresh.close()
        return texts


@torch.no_grad()
def random_model(config: Any, *, seed: int) -> Any:
    """Return a model in float32 with random values in every parameter; transformers leaves norms 1 and biases 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model.eval()


if __name__ == "__main__":
    main()
