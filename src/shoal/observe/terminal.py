"""The view of a run in the terminal: a live panel on a TTY, else one plain line a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shoal.observe.files import encodable
from shoal.observe.text import format_duration, format_number, one_line, sparkline
from shoal.observe.view_state import EngineView, ViewState

_START_LINE_EVERY_S = 15.0
_REWARD_KEYS = ("reward", "step")


class ProgressView:
    """Shows the progress of a run; used as a context manager by one thread.

    On a terminal a panel is redrawn in place, and what else is printed scrolls by above it. Anywhere else (a file, a
    pipe, CI) each finished step is one line without control codes.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        console: Console | None = None,
        first_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Draw nothing yet.

        Args:
            stream: Where to; standard output by default.
            console: A rich console to use instead, such as one of a fixed width.
            first_step: Steps finished before this process began, when it resumes a run; they get no line.
            clock: Gives seconds, for how often plain start-up lines are repeated.
        """
        self._console = console or Console(file=stream or sys.stdout)
        self._clock = clock
        self._live: Live | None = None
        self._last_step = first_step
        self._last_start: tuple[tuple[str, str, str], ...] = ()
        self._last_start_time = -_START_LINE_EVERY_S

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, vertical_overflow="ellipsis")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def starting_engines(self, engines: Sequence[EngineView], *, elapsed_s: float) -> None:
        """Show how far the engines are with starting.

        Without a terminal, a line appears when an engine's state or detail changes, and every 15 s.
        """
        if self._live is not None:
            self._live.update(start_panel(engines, elapsed_s=elapsed_s, width=self._console.width))
            return
        now = self._clock()
        what = tuple((engine.name, engine.state, engine.detail) for engine in engines)
        if what != self._last_start or now - self._last_start_time >= _START_LINE_EVERY_S:
            self._last_start, self._last_start_time = what, now
            self.message(start_line(engines, elapsed_s=elapsed_s))

    def update(self, state: ViewState) -> None:
        """Show a moment of the run; without a terminal, only those that finish a step."""
        if self._live is not None:
            self._live.update(state_panel(state, width=self._console.width))
        elif state.step > self._last_step:
            self.message(state_line(state))
        self._last_step = max(self._last_step, state.step)

    def message(self, text: str) -> None:
        """Print a line, above the panel where there is one."""
        if self._live is not None:
            self._console.print(Text(text))
            return
        stream = self._console.file
        stream.write(encodable(text, encoding=getattr(stream, "encoding", None) or "utf-8") + "\n")
        stream.flush()


def state_line(state: ViewState) -> str:
    """Return a finished step as one plain line."""
    parts = [
        f"step {state.step}/{state.num_steps}",
        f"reward {format_number(state.reward)} {sparkline(state.reward_history, width=8)}".rstrip(),
    ]
    if state.tokens_per_s is not None:
        parts.append(f"gen {state.tokens_per_s:.0f} tok/s")
    if state.engines:
        parts.append(" | ".join(_engine_phrase(engine) for engine in state.engines))
    if state.seconds_per_step is not None:
        parts.append(f"{format_duration(state.seconds_per_step)}/step")
    if state.time_left_s is not None:
        parts.append(f"{format_duration(state.time_left_s)} left")
    return "  ".join(parts)


def start_line(engines: Sequence[EngineView], *, elapsed_s: float) -> str:
    """Return the engines' start-up as one plain line."""
    return f"{_num_ready(engines)}  {format_duration(elapsed_s)}  " + " | ".join(
        one_line(f"{engine.name} {engine.state} {engine.detail}") for engine in engines
    )


def state_panel(state: ViewState, *, width: int) -> RenderableType:
    """Return the live panel for a terminal of `width` columns."""
    inner = max(width - 4, 1)
    head = Text(f"step {state.step}/{state.num_steps}", style="bold", no_wrap=True, overflow="ellipsis")
    head.append(f"  {one_line(state.phase)}", style="cyan")
    head.append(f"  {format_duration(state.elapsed_s)} elapsed", style="dim")
    if state.time_left_s is not None:
        head.append(f"  {format_duration(state.time_left_s)} left")
    # In a grid, because a progress bar alone ends without a line break and would push the next line out of sight.
    bar = Table.grid()
    bar.add_row(ProgressBar(total=max(state.num_steps, 1), completed=state.step, width=inner))
    reward = Text("reward ", no_wrap=True, overflow="ellipsis")
    reward.append(format_number(state.reward), style="bold green")
    reward.append(f"  {sparkline(state.reward_history, width=max(inner - 32, 8))}", style="green")
    if state.tokens_per_s is not None:
        reward.append(f"  {state.tokens_per_s:.0f} tok/s", style="default")
    parts: list[RenderableType] = [head, bar, reward]
    if state.engines:
        parts.append(_engine_table(state.engines, width=inner))
    metrics = _metrics_text(state)
    if metrics.plain:
        parts.append(metrics)
    return Panel(Group(*parts), title="shoal", title_align="left", border_style="blue", width=width)


def start_panel(engines: Sequence[EngineView], *, elapsed_s: float, width: int) -> RenderableType:
    """Return the live panel while engines start."""
    head = Text(f"{_num_ready(engines)}  {format_duration(elapsed_s)}", style="bold", no_wrap=True, overflow="ellipsis")
    body = Group(head, _engine_table(engines, width=max(width - 4, 1)))
    return Panel(body, title="shoal: starting", title_align="left", border_style="blue", width=width)


def _engine_table(engines: Sequence[EngineView], *, width: int) -> Table:
    """Return a row per engine, with the columns that fit."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=width >= 60, header_style="dim", width=width)
    table.add_column("engine", no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True, overflow="ellipsis")
    if width >= 40:
        table.add_column("weights", no_wrap=True)
    if width >= 60:
        table.add_column("running", justify="right", no_wrap=True)
        table.add_column("tok/s", justify="right", no_wrap=True)
        table.add_column("tokens", justify="right", no_wrap=True)
    if width >= 100:
        table.add_column("log", style="dim", no_wrap=True, overflow="ellipsis", ratio=1)
    for engine in engines:
        state = Text(one_line(f"{engine.state} {engine.detail}"), style=_state_style(engine.state))
        cells = [Text(one_line(engine.name)), state, Text(_version(engine)), Text(str(engine.running))]
        cells += [Text(format_number(engine.tokens_per_s, digits=0)), Text(format_number(engine.done_tokens))]
        cells.append(Text("" if engine.log_path is None else one_line(str(engine.log_path))))
        table.add_row(*cells[: len(table.columns)])
    return table


def _metrics_text(state: ViewState) -> Text:
    text = Text(style="dim")
    for name, value in state.metrics.items():
        if name not in _REWARD_KEYS and value is not None:
            text.append(f"{one_line(name)} {format_number(value)}   ")
    text.rstrip()
    return text


def _engine_phrase(engine: EngineView) -> str:
    return one_line(f"{engine.name} {engine.state} {_version(engine)}")


def _version(engine: EngineView) -> str:
    return "" if engine.weight_version is None else f"v{engine.weight_version}"


def _num_ready(engines: Sequence[EngineView]) -> str:
    ready = sum(engine.state.lower() not in ("starting", "dead") for engine in engines)
    return f"engines {ready}/{len(engines)} ready"


def _state_style(state: str) -> str:
    lowered = state.lower()
    if lowered in ("dead", "suspect", "failed"):
        return "red"
    return "yellow" if lowered in ("starting", "stale", "paused") else "green"
