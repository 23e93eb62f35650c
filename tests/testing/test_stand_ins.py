from __future__ import annotations

import asyncio

import torch

from shoal.testing import FakeEngine, tiny_model, tiny_tokenizer
from shoal.types import RolloutRequest, SamplingSettings


def _request(seed: int) -> RolloutRequest:
    sampling = SamplingSettings(temperature=1.0, max_tokens=6, stop_token_ids=(2,))
    return RolloutRequest(prompt_token_ids=(1, 5), seed=seed, sampling=sampling)


def test_a_fake_engines_completions_follow_from_the_seed_alone() -> None:
    one, two = FakeEngine("one"), FakeEngine("two")
    first = asyncio.run(one.generate(_request(3)))
    assert asyncio.run(two.generate(_request(3))).token_ids.tolist() == first.token_ids.tolist()
    others = {tuple(asyncio.run(one.generate(_request(seed))).token_ids.tolist()) for seed in range(8)}
    assert len(others) > 4
    assert [request.seed for request in one.requests] == [3, *range(8)]


def test_the_tiny_tokenizer_gives_back_every_text_it_is_given() -> None:
    tokenizer = tiny_tokenizer()
    text = "2 + 2 = 4, naïve 🙂\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < tiny_model().config.vocab_size
    assert tokenizer.eos_token_id == 2


def test_the_tiny_models_weights_follow_from_its_seed() -> None:
    same, again, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    pairs = zip(same.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert not torch.equal(next(same.parameters()), next(other.parameters()))
