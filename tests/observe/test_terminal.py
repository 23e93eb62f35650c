"""The terminal view: plain lines where there is no terminal, a panel of any width where there is one."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from shoal.observe.terminal import ProgressView, start_panel, state_panel
from shoal.observe.view_state import EngineView, ViewState

STATE = ViewState(
    step=12,
    num_steps=30,
    elapsed_s=218.4,
    phase="generate",
    reward=0.412,
    reward_history=(0.1, 0.2, 0.3),
    tokens_per_s=812.4,
    engines=(
        EngineView(name="engine-0", state="idle", weight_version=12, done_tokens=48000, tokens_per_s=401.5),
        EngineView(
            name="engine-1", state="generating", running=8, weight_version=12, log_path=Path("runs/demo/engine-1.log")
        ),
    ),
    metrics={"loss": 0.0123, "grad_norm": 0.5, "kl": None},
    seconds_per_step=18.2,
    time_left_s=300,
)


def test_without_a_terminal_a_finished_step_is_one_plain_line() -> None:
    stream = io.StringIO()
    with ProgressView(stream=stream) as view:
        view.update(STATE)
    assert stream.getvalue() == (
        "step 12/30  reward 0.412 ▁▅█  gen 812 tok/s  engine-0 idle v12 | engine-1 generating v12  18.2 s/step  "
        "5 min left\n"
    )


def test_without_a_terminal_a_step_is_printed_once_and_not_before_it_is_finished() -> None:
    stream = io.StringIO()
    with ProgressView(stream=stream) as view:
        for step, phase in [(0, "generate"), (0, "train"), (1, "generate"), (1, "train"), (2, "generate")]:
            view.update(ViewState(step=step, num_steps=2, elapsed_s=1.0, phase=phase))
    assert stream.getvalue() == "step 1/2  reward -\nstep 2/2  reward -\n"


def test_steps_finished_before_a_resume_are_not_printed_again() -> None:
    stream = io.StringIO()
    view = ProgressView(stream=stream, first_step=5)
    for step in (5, 6):
        view.update(ViewState(step=step, num_steps=9, elapsed_s=1.0, phase="train"))
    assert stream.getvalue() == "step 6/9  reward -\n"


def test_without_a_terminal_the_start_is_told_when_it_changes_and_now_and_then() -> None:
    stream, now = io.StringIO(), 0.0
    view = ProgressView(stream=stream, clock=lambda: now)
    starting = EngineView(name="engine-0", state="starting", detail="loading\nweights")
    ready = EngineView(name="engine-0", state="idle")
    for now, engine in [(0.0, starting), (1.0, starting), (16.0, starting), (17.0, ready)]:
        view.starting_engines([engine], elapsed_s=now)
    assert stream.getvalue() == (
        "engines 0/1 ready  0.0 s  engine-0 starting loading weights\n"
        "engines 0/1 ready  16.0 s  engine-0 starting loading weights\n"
        "engines 1/1 ready  17.0 s  engine-0 idle\n"
    )


def test_a_stream_that_cannot_show_bars_gets_something_it_can() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with ProgressView(stream=stream) as view:
        view.update(STATE)
    assert raw.getvalue().startswith(b"step 12/30  reward 0.412 ???")


@pytest.mark.parametrize("width", [1, 2, 5, 10, 20, 40, 60, 80, 100, 200])
def test_panels_fit_any_width(width: int) -> None:
    for panel in (
        state_panel(STATE, width=width),
        state_panel(dataclasses.replace(STATE, reward_history=(0.5,) * 500, num_steps=0), width=width),
        state_panel(ViewState(step=0, num_steps=0, elapsed_s=0.0, phase=""), width=width),
        start_panel(STATE.engines, elapsed_s=3.0, width=width),
    ):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(panel)
        assert all(cell_len(line) <= width for line in capture.get().splitlines())


def test_a_wide_panel_says_what_each_engine_is_doing() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(state_panel(STATE, width=120))
    text = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    for part in ("step 12/30", "generate", "5 min left", "0.412", "812 tok/s", "v12", "402", "engine-1.log", "loss"):
        assert part in text


def test_on_a_terminal_the_view_is_live_and_messages_stay_above_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=30, _environ={"TERM": "xterm"})
    with ProgressView(console=console) as view:
        view.starting_engines(STATE.engines, elapsed_s=1.0)
        view.update(STATE)
        view.message("engine-1 was restarted [not markup]")
    assert "engine-1 was restarted [not markup]" in stream.getvalue()
    assert "step 12/30" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_dumb_terminal_gets_plain_lines() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, _environ={"TERM": "dumb"})
    with ProgressView(console=console) as view:
        view.update(STATE)
    assert "\x1b" not in stream.getvalue()
