"""Choose the completions that a report shows, and put them into words."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.observe.completions import REWARD_PREFIX, completion_files, read_completions
from shoal.observe.text import format_number

_NUM_RANDOM = 4
_LONGEST_TEXT = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation; `role` is empty for a plain text prompt."""

    role: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion as the report shows it.

    Attributes:
        kind: Why it was chosen: `"best"`, `"worst"` or `"random"`.
        turns: The prompt.
        completion: What the model wrote.
        reward: As text.
        facts: Name and value of everything else worth a line.
    """

    kind: str
    turns: tuple[Turn, ...]
    completion: str
    reward: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """The samples of one step."""

    step: int
    num_completions: int
    samples: tuple[Sample, ...]


def sample_steps(folder: Path) -> tuple[SampledStep, ...]:
    """Return the best, the worst and a few random completions of the first and of the last step that have any.

    The random ones are the same each time for the same files.
    """
    steps = list(completion_files(folder))
    chosen = dict.fromkeys(steps[:1] + steps[-1:])
    sampled = []
    for step in chosen:
        rows = read_completions(folder, steps=[step])
        if rows:
            sampled.append(SampledStep(step=step, num_completions=len(rows), samples=_choose(rows, seed=step)))
    return tuple(sampled)


def _choose(rows: Sequence[Mapping[str, Any]], *, seed: int) -> tuple[Sample, ...]:
    rest = list(rows)
    samples = []
    scored = [row for row in rows if row.get("reward") is not None]
    if scored:
        best, worst = max(scored, key=_reward), min(scored, key=_reward)
        # When all are alike there is no best one, and calling one so would mislead.
        if _reward(best) > _reward(worst):
            samples += [_sample(best, kind="best"), _sample(worst, kind="worst")]
            rest = [row for row in rows if row is not best and row is not worst]
    drawn = random.Random(seed).sample(rest, k=min(_NUM_RANDOM, len(rest)))
    return (*samples, *(_sample(row, kind="random") for row in drawn))


def _reward(row: Mapping[str, Any]) -> float:
    return float(row["reward"])


def _sample(row: Mapping[str, Any], *, kind: str) -> Sample:
    facts = [
        ("advantage", format_number(row.get("advantage"))),
        ("tokens", format_number(row.get("num_tokens"))),
        ("finish", str(row.get("finish_reason"))),
        ("engine", str(row.get("engine"))),
        ("weights", f"v{row.get('weight_version')}"),
    ]
    functions = [column for column in row if column.startswith(REWARD_PREFIX)]
    if len(functions) > 1:
        facts += [(column, format_number(row[column])) for column in functions]
    extras = _parsed(row.get("extras"))
    if isinstance(extras, dict):
        facts += [(str(name), _cut(str(value), 200)) for name, value in extras.items()]
    return Sample(
        kind=kind,
        turns=_turns(str(row.get("prompt", ""))),
        completion=_cut(str(row.get("completion", "")), _LONGEST_TEXT),
        reward=format_number(row.get("reward")),
        facts=tuple(facts),
    )


def _turns(prompt: str) -> tuple[Turn, ...]:
    """Return a conversation that was written as JSON as its messages, and any other text as it is."""
    messages = _parsed(prompt) if prompt.startswith("[{") else None
    if isinstance(messages, list) and all(isinstance(message, dict) and "role" in message for message in messages):
        return tuple(
            Turn(role=str(message["role"]), text=_cut(_content(message.get("content")), _LONGEST_TEXT))
            for message in messages
        )
    return (Turn(role="", text=_cut(prompt, _LONGEST_TEXT)),)


def _content(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _parsed(text: object) -> Any:
    """Return parsed JSON, or None."""
    if not isinstance(text, str):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length} more characters)"
