"""Choose the engine for one sample, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence


def choose_engine(loads: Sequence[int], preferred: int | None, margin: int) -> int:
    """Return the index of the engine that is to write the next sample.

    A group's later samples go where its first one went, since that engine has the prompt's keys and values already,
    as long as it is within `margin` samples of the least loaded; else, and for a first sample, to the least loaded
    (the first of several).

    Args:
        loads: Samples under way on each engine.
        preferred: The engine that holds the prompt, if any does.
        margin: How many samples more than the least loaded it may have.
    """
    least = min(range(len(loads)), key=loads.__getitem__)
    if preferred is not None and loads[preferred] <= loads[least] + margin:
        return preferred
    return least
