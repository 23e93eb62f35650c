"""The slow exact reference: greedy text is transformers' own, samples follow the model's distribution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shoal.engines.reference import ReferenceEngine
from shoal.protocols import RolloutEngine
from shoal.testing import tiny_model
from shoal.types import RolloutRequest, SamplingSettings


def request(temperature: float, max_tokens: int = 8, seed: int = 0, stop: tuple[int, ...] = ()) -> RolloutRequest:
    sampling = SamplingSettings(temperature=temperature, max_tokens=max_tokens, stop_token_ids=stop)
    return RolloutRequest(prompt_token_ids=(10, 20, 30), seed=seed, sampling=sampling)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@torch.no_grad()
def logprobs_of(model: Any, prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
    logits = model(torch.tensor([prompt + tokens])).logits[0].double() / temperature
    table = torch.log_softmax(logits, dim=-1)
    return [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]


def test_greedy_text_is_what_transformers_generates(model: Any) -> None:
    engine = ReferenceEngine(model)
    assert isinstance(engine, RolloutEngine)
    wanted = model.generate(torch.tensor([[10, 20, 30]]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    rollout = engine.complete(request(0.0, max_tokens=24))
    assert rollout.token_ids.tolist() == wanted[0, 3:].tolist()
    assert rollout.finish_reason == "length"
    other = ReferenceEngine(tiny_model(seed=1).eval()).complete(request(0.0, max_tokens=24))
    assert other.token_ids.tolist() != rollout.token_ids.tolist()  # the control: other weights, other text


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_logprobs_are_the_models_at_the_temperature_that_was_sampled_at(temperature: float, model: Any) -> None:
    rollout = ReferenceEngine(model).complete(request(temperature, seed=3))
    wanted = logprobs_of(model, [10, 20, 30], rollout.token_ids.tolist(), temperature)
    assert rollout.rollout_logprobs == pytest.approx(wanted, abs=1e-5)


def test_filters_leave_the_most_likely_tokens_with_the_logprobs_among_them(model: Any) -> None:
    with torch.no_grad():
        table = model(torch.tensor([[10, 20, 30]])).logits[0, -1].double() / 2.0
    best = table.topk(3)
    wanted = dict(zip(best.indices.tolist(), torch.log_softmax(best.values, dim=0).tolist(), strict=True))
    base = request(2.0, max_tokens=1)
    drawn = {}
    for seed in range(60):
        filtered = replace(base, seed=seed, sampling=replace(base.sampling, top_k=3))
        rollout = ReferenceEngine(model).complete(filtered)
        drawn[int(rollout.token_ids[0])] = float(rollout.rollout_logprobs[0])
    assert drawn == pytest.approx(wanted, abs=1e-6)
    free = {int(ReferenceEngine(model).complete(replace(base, seed=seed)).token_ids[0]) for seed in range(60)}
    assert not free <= wanted.keys()  # the control


def test_a_seed_decides_the_text(model: Any) -> None:
    engine = ReferenceEngine(model)
    texts = [tuple(engine.complete(request(1.5, seed=seed)).token_ids) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_first_tokens_are_drawn_as_often_as_the_model_says(model: Any) -> None:
    engine = ReferenceEngine(model)
    with torch.no_grad():
        logits = model(torch.tensor([[10, 20, 30]])).logits[0, -1]
    temperature = float(logits.std()) * 1.0  # spread enough that several tokens are likely
    probabilities = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    draws = 400
    counts = Counter(int(engine.complete(request(temperature, 1, seed)).token_ids[0]) for seed in range(draws))
    likely = np.argsort(probabilities)[-5:]
    for token in likely:
        expected = draws * probabilities[token]
        assert abs(counts[int(token)] - expected) < 5 * np.sqrt(expected * (1 - probabilities[token]))


def test_a_stop_token_ends_the_text_and_stays_part_of_it(model: Any) -> None:
    engine = ReferenceEngine(model)
    free = engine.complete(request(0.0, max_tokens=12)).token_ids.tolist()
    stop = free[4]
    rollout = engine.complete(request(0.0, max_tokens=12, stop=(stop,)))
    assert rollout.token_ids.tolist() == free[: free.index(stop) + 1]
    assert rollout.finish_reason == "stop"
