"""Print some of a step's completions as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.observe.completions import CompletionRow
from shoal.observe.text import format_number


def print_completions(
    rows: Sequence[CompletionRow], *, step: int, limit: int | None, console: Console | None = None
) -> None:
    """Print a table of prompts, completions, rewards and advantages.

    Args:
        rows: Of one step.
        step: Its number.
        limit: How many rows; None for all.
        console: Where to; standard output by default.
    """
    shown = rows if limit is None else rows[:limit]
    if not shown:
        return
    names = tuple(shown[0].rewards)
    table = Table("Prompt", "Completion", *names, "Advantage", title=f"Step {step}", show_lines=True, expand=True)
    for row in shown:
        table.add_row(
            # `Text` and not a string: completions may hold what rich would take for markup.
            Text(_as_text(row.prompt)),
            Text(_as_text(row.completion)),
            *(format_number(row.rewards[name]) for name in names),
            format_number(row.advantage),
        )
    (console or Console()).print(table)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
