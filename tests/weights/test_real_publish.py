"""Publishes to real vLLM engines: afterwards each writes, token for token, what transformers writes.

One fleet for all of it: an engine with one worker and one with two (tensor parallel).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model

from shoal.algorithm.logprobs import token_logprobs
from shoal.algorithm.truncation import Truncation
from shoal.engines.client import EngineClient
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.errors import EngineError, EngineRequestError, WeightProofError
from shoal.testing import greedy_texts
from shoal.testing.transport import make_flipping
from shoal.trainer.exchange import Exchange
from shoal.types import UNPROVEN, Rollout, RolloutRequest, SamplingSettings
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source

pytestmark = pytest.mark.engine

NUM_TOKENS = 32
EOS = 2
# Bytes of text, one token, and one long enough to fill a block of the prefix cache (128 tokens on CPUs), whose keys and
# values a publish has to drop.
PROMPTS = (
    tuple(range(70, 90)),
    (5,),
    (3, 3, 3, 3),
    tuple(3 + (7 * i) % 250 for i in range(60)),
    tuple(3 + (i * i) % 250 for i in range(200)),
)
GREEDY = SamplingSettings(temperature=0.0, max_tokens=NUM_TOKENS, stop_token_ids=(EOS,))
SAMPLED = SamplingSettings(temperature=0.8, max_tokens=NUM_TOKENS, stop_token_ids=(EOS,))


@dataclass(frozen=True)
class Running:
    """A fleet with a publisher connected to it."""

    fleet: Fleet
    model: Any
    publisher: WeightPublisher

    @property
    def clients(self) -> tuple[EngineClient, ...]:
        return tuple(engine.client for engine in self.fleet.engines)


def publisher_to(fleet: Fleet, model: Any, *, sleeps: bool = False, **settings: Any) -> WeightPublisher:
    publisher = WeightPublisher(
        {"model": make_source(model)},
        [
            EngineAddress(client=engine.client, num_workers=engine.spec.num_workers, backend="gloo", sleeps=sleeps)
            for engine in fleet.engines
        ],
        ranks=Exchange(rank=0, world_size=1),
        device=torch.device("cpu"),
        settings=PublishSettings(host="127.0.0.1", **({"timeout_s": 90} | settings)),
    )
    publisher.connect()
    return publisher


@pytest.fixture(scope="module")
def running(
    make_served_model: Callable[..., Any],
    make_spec: Callable[..., EngineSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    model = make_served_model(seed=11)
    randomise(model, seed=0, scale=0.1)  # the biases too, which start at zero
    ports = choose_ports(2, None)
    specs = [
        make_spec("engine-0", ports[0], cpu_cores=(0,)),
        make_spec("engine-1", ports[1], cpu_cores=(0, 1), tensor_parallel_size=2),
    ]
    logs = tmp_path_factory.mktemp("logs")
    with Fleet.start(specs, log_dir=logs, timeout_s=400, request_timeout_s=90) as fleet:
        publisher = publisher_to(fleet, model)
        yield Running(fleet=fleet, model=model, publisher=publisher)
        publisher.close()


@torch.no_grad()
def randomise(model: Any, seed: int, scale: float) -> None:
    """Move every parameter by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.add_(scale * torch.randn(value.shape, generator=generator))


@torch.no_grad()
def transformers_logprobs(model: Any, prompt: tuple[int, ...], tokens: list[int], temperature: float) -> list[float]:
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].double() / temperature
    table = torch.log_softmax(logits, dim=-1)
    return [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]


def ask(clients: tuple[EngineClient, ...], sampling: SamplingSettings) -> list[list[Rollout]]:
    """Return, for each engine, its completion of each prompt."""

    async def on_one(client: EngineClient) -> list[Rollout]:
        # A client's connections belong to one event loop; each call here has its own.
        fresh = EngineClient(
            name=client.name,
            url=client.url,
            api_key=client._sync.headers["authorization"].removeprefix("Bearer "),
            log_path=client.log_path,
            request_timeout_s=90,
        )
        fresh.weight_version = client.weight_version
        fresh.cache_salt = client.cache_salt
        requests = [
            RolloutRequest(prompt_token_ids=prompt, seed=100 + i, sampling=sampling) for i, prompt in enumerate(PROMPTS)
        ]
        try:
            return list(await asyncio.gather(*map(fresh.generate, requests)))
        finally:
            await fresh.aclose()
            fresh.close()

    async def on_all() -> list[list[Rollout]]:
        return list(await asyncio.gather(*map(on_one, clients)))

    return asyncio.run(on_all())


def texts_of(answers: list[Rollout]) -> list[list[int]]:
    return [[int(token) for token in rollout.token_ids] for rollout in answers]


def test_after_every_publish_every_engine_writes_what_transformers_writes_token_for_token(running: Running) -> None:
    seen: list[list[list[int]]] = []
    for version in range(3):
        if version:
            randomise(running.model, seed=version, scale=0.05)
        report = running.publisher.publish(version)
        assert (report.version, report.num_workers) == (version, 3)
        assert report.num_digests == sum(len(plan.slices) for plan in running.publisher.plans) > 0
        wanted = greedy_texts(running.model, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
        assert sum(map(len, wanted)) > 3 * NUM_TOKENS
        for client, answers in zip(running.clients, ask(running.clients, GREEDY), strict=True):
            assert texts_of(answers) == wanted, client.name
            assert {rollout.weight_version for rollout in answers} == {version}
        seen.append(wanted)
    # The controls: each publish changed what is written, from every prompt.
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        assert all(a != b for a, b in zip(seen[earlier], seen[later], strict=True))


def test_the_logprobs_of_sampled_tokens_are_transformers_at_that_temperature(running: Running) -> None:
    running.publisher.publish(10)
    distances = {0.8: 0.0, 1.0: 0.0}
    answers_of_engines = ask(running.clients, SAMPLED)
    for answers in answers_of_engines:
        for prompt, rollout in zip(PROMPTS, answers, strict=True):
            for temperature in distances:
                tokens = [int(token) for token in rollout.token_ids]
                wanted = torch.tensor(transformers_logprobs(running.model, prompt, tokens, temperature))
                distance = (torch.from_numpy(rollout.rollout_logprobs) - wanted).abs().max()
                distances[temperature] = max(distances[temperature], float(distance))
    assert distances[0.8] < 1e-3
    assert distances[1.0] > 0.05  # the control: at another temperature they are others
    assert texts_of(answers_of_engines[0]) == texts_of(answers_of_engines[1])  # a seed decides the text, not the engine


@torch.no_grad()
def test_the_logprobs_under_sampling_filters_are_the_trainers_under_the_same_filters(running: Running) -> None:
    running.publisher.publish(11)
    filters = {"top_k": 20, "top_p": 0.9, "min_p": 0.01}
    sampling = replace(SAMPLED, temperature=0.7, **filters)
    gaps: dict[str, list[float]] = {"truncated": [], "whole": []}
    for answers in ask(running.clients, sampling):
        for prompt, rollout in zip(PROMPTS, answers, strict=True):
            tokens = torch.from_numpy(rollout.token_ids).long()
            logits = running.model(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1 : -1]
            for name, truncation in (("truncated", Truncation(**filters)), ("whole", None)):
                wanted = token_logprobs(logits, tokens, 0.7, truncation=truncation).logprobs
                gaps[name].append(float((torch.from_numpy(rollout.rollout_logprobs) - wanted).abs().max()))
    print(f"largest difference of logprobs: {max(gaps['truncated']):.2g}, untruncated {max(gaps['whole']):.2g}")
    assert max(gaps["truncated"]) < 1e-3
    assert max(gaps["whole"]) > 0.02  # the control: over the whole vocabulary they are others


def test_a_worker_that_received_one_flipped_bit_is_named_with_the_parameter(running: Running) -> None:
    parameters = dict(running.model.named_parameters())
    for target in ("model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        publisher = publisher_to(running.fleet, running.model)
        flipping = make_flipping(publisher, 1)  # two workers
        flipping.flip_views_of(parameters[target].data)
        with pytest.raises(WeightProofError, match=rf"engine-1 worker 0 .* than the trainer has in {target} "):
            publisher.publish(20)
        publisher.close()
        assert [client.weight_version for client in running.clients] == [20, UNPROVEN]


def test_the_others_go_on_when_one_engine_holds_something_else(running: Running) -> None:
    running.publisher.connect()
    running.publisher.publish(22)
    before = ask(running.clients, GREEDY)
    flipping = make_flipping(running.publisher, 0)
    flipping.flip_views_of(running.model.model.norm.weight.data)
    with pytest.raises(WeightProofError, match="engine-0"):
        running.publisher.publish(23)
    assert running.publisher.live_engines == ("engine-1",)
    assert running.publisher.publish(24).num_workers == 2
    running.publisher.connect()  # takes the first one in again
    assert running.publisher.publish(25).num_workers == 3
    assert [texts_of(a) for a in ask(running.clients, GREEDY)] == [texts_of(a) for a in before]


def test_bits_are_compared_one_by_one_on_request(running: Running) -> None:
    publisher = publisher_to(running.fleet, running.model, verify="full")
    publisher.publish(26)
    flipping = make_flipping(publisher, 1)
    flipping.flip_views_of(running.model.model.layers[0].mlp.gate_proj.weight.data)
    with pytest.raises(
        WeightProofError, match=r"engine-1 holds other bits .* of model\.layers\.0\.mlp\.gate_proj\.weight "
    ):
        publisher.publish(27)
    publisher.close()


def test_a_lora_model_is_published_merged_over_a_new_line_to_the_same_engines(
    running: Running, make_served_model: Callable[..., Any]
) -> None:
    base = make_served_model(seed=5)
    plain = greedy_texts(base, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
    peft_model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.2)
    wanted = greedy_texts(peft_model, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
    assert wanted != plain  # the control: the adapter does something
    publisher = publisher_to(running.fleet, peft_model)
    publisher.publish(30)
    for answers in ask(running.clients, GREEDY):
        assert texts_of(answers) == wanted
    publisher.close()


def test_engines_hold_requests_while_they_sleep_and_write_rightly_after_the_publish_that_wakes_them(
    running: Running,
) -> None:
    """On CPUs vLLM gives no memory back. What holds requests and lets them go on is its scheduler, as on GPUs."""
    publisher = publisher_to(running.fleet, running.model, sleeps=True)
    publisher.publish(35)
    for version in (36, 37):
        assert publisher.sleep().asleep == ("engine-0", "engine-1")
        for client in running.clients:
            assert client._sync.get("/is_sleeping").json() == {"is_sleeping": True}
            prompt = {"model": "policy", "prompt": [5], "max_tokens": 1}
            with pytest.raises(EngineRequestError, match="within 2 s"):
                client.post("/v1/completions", prompt, 2.0)
        randomise(running.model, seed=version, scale=0.05)
        assert publisher.publish(version).num_workers == 3
        wanted = greedy_texts(running.model, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
        for client, answers in zip(running.clients, ask(running.clients, GREEDY), strict=True):
            assert texts_of(answers) == wanted, client.name
            assert client._sync.get("/is_sleeping").json() == {"is_sleeping": False}
    publisher.close()


def test_an_engine_that_is_killed_leaves_and_the_others_are_published_to(running: Running) -> None:
    """Comes last: the engine does not come back."""
    running.publisher.connect()
    running.publisher.publish(40)
    engine = running.fleet.engines[0]
    running.fleet.check_alive()
    (server,) = psutil.Process(engine.process.pid).children()
    server.send_signal(signal.SIGKILL)
    report = running.publisher.publish(41)
    assert list(report.lost) == ["engine-0"] and report.num_workers == 2
    assert [client.weight_version for client in running.clients] == [UNPROVEN, 41]
    wanted = greedy_texts(running.model, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
    assert texts_of(ask(running.clients[1:], GREEDY)[0]) == wanted
    deadline = time.monotonic() + 60
    while engine.process.exit_status() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(EngineError, match=r"engine-0 ended with status .*engine-0\.log"):
        running.fleet.check_alive()
    with pytest.raises(EngineRequestError, match=r"engine-0 did not answer .*engine-0\.log"):
        ask(running.clients[:1], GREEDY)
    assert Path(str(engine.process.log_path)).is_file()
