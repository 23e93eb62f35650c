from __future__ import annotations

import io

from rich.console import Console

from shoal.observe.completions import CompletionRow
from shoal.observe.sample_table import print_completions


def _row(completion: str, reward: float | None) -> CompletionRow:
    return CompletionRow(
        row=0,
        prompt="2 + 2 =",
        completion=completion,
        rewards={"is_right": reward},
        reward=reward,
        advantage=0.5,
        num_tokens=1,
        finish_reason="stop",
        engine="engine-0",
        weight_version=0,
        seed=None,
        extras={},
    )


def _printed(rows: list[CompletionRow], limit: int | None) -> str:
    stream = io.StringIO()
    print_completions(rows, step=7, limit=limit, console=Console(file=stream, width=100))
    return stream.getvalue()


def test_only_as_many_completions_are_printed_as_asked_for() -> None:
    rows = [_row("four", 1.0), _row("five", None), _row("six", 0.0)]
    two = _printed(rows, 2)
    assert "four" in two
    assert "five" in two
    assert "six" not in two
    assert "six" in _printed(rows, None)
    assert _printed(rows, 0) == ""


def test_markup_in_a_completion_is_printed_as_it_is() -> None:
    assert "[red]4[/red]" in _printed([_row("[red]4[/red]", 1.0)], None)
