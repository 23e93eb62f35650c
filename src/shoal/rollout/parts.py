"""A completion that several engines write in turn: each goes on after the tokens of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shoal.types import Rollout, RolloutRequest

_SEED_STRIDE = 1_000_003


def go_on(request: RolloutRequest, parts: Sequence[Rollout], *, name: str) -> RolloutRequest:
    """Return the request for what is missing of a completion, under a name of its own.

    The tokens that there are become part of the prompt as they are; nothing is encoded again. The seed changes, since
    a generator that began anew would draw the first numbers twice.
    """
    return go_on_after(request, tuple(int(token) for part in parts for token in part.token_ids), name=name)


def go_on_after(request: RolloutRequest, done: tuple[int, ...], *, name: str = "") -> RolloutRequest:
    """Return the request for what follows on these tokens of the completion, whoever wrote them; see `go_on`."""
    num_done = len(done)
    if num_done == 0:
        return replace(request, name=name)
    return replace(
        request,
        prompt_token_ids=request.prompt_token_ids + done,
        seed=(request.seed + _SEED_STRIDE * num_done) % 2**31,
        sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens - num_done),
        name=name,
    )


def join(parts: Sequence[Rollout]) -> Rollout:
    """Return the whole completion, as written by the last engine and with the oldest weights that took part."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    return replace(
        last,
        token_ids=np.concatenate([part.token_ids for part in parts]),
        rollout_logprobs=np.concatenate([part.rollout_logprobs for part in parts]),
        weight_version=min(part.weight_version for part in parts),
    )
