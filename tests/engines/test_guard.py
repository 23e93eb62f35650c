"""The guard: however its parent ends, nothing of the command is left.

The command here is a small tree of Python processes, the worst of which leaves its session, loses its own parent and
ignores SIGTERM. All of them carry a marker in their environment, by which they are found.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

MARKER = "SHOAL_TEST_MARKER"

# Ends by itself after a minute, whatever happens to the test.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.setsid()
os.write(1, b"stubborn up\\n")  # in one piece: two processes write to this pipe
time.sleep(60)
"""
# Starts the stubborn one and dies: what it leaves behind is an orphan.
SHORT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
"""
COMMAND = f"""
import os, subprocess, sys, time
subprocess.run([sys.executable, "-c", {SHORT!r}])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
os.write(1, b"command up\\n")
time.sleep(60)
"""
# The trainer's part: starts a guarded command and does nothing to end it.
PARENT = f"""
import os, signal, subprocess, sys, time
# A shell ignores Ctrl-C for what it runs in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
guard = [sys.executable, "-m", "shoal.engines.guard", "--parent", str(os.getpid()), "--grace-s", "1"]
if sys.argv[2] == "guarded":
    subprocess.Popen([*guard, "--", sys.executable, "-c", {COMMAND!r}], start_new_session=True)
else:
    subprocess.Popen([sys.executable, "-c", {COMMAND!r}], start_new_session=True)
sys.stdin.readline()
if sys.argv[1] == "exception":
    raise RuntimeError("training failed")
if sys.argv[1] == "signal":
    time.sleep(60)
"""


def carrying(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until_gone(marker: str, within_s: float) -> list[psutil.Process]:
    deadline = time.monotonic() + within_s
    while (left := carrying(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture
def marker() -> Iterator[str]:
    value = uuid.uuid4().hex
    yield value
    for process in carrying(value):
        process.kill()


def start(arguments: list[str], marker: str) -> subprocess.Popen[str]:
    """Start a process and wait until the whole tree below it is up."""
    process = subprocess.Popen(
        arguments,
        env=os.environ | {MARKER: marker},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"stubborn up\n", "command up\n"}
    return process


def end(parent: subprocess.Popen[str], ending: str) -> None:
    assert parent.stdin is not None
    parent.stdin.write("go on\n")
    parent.stdin.flush()
    if ending.startswith("SIG"):
        parent.send_signal(signal.Signals[ending])
    parent.wait(timeout=60)


def start_guarded(command: list[str], marker: str, *options: str, parent: int | None = None) -> subprocess.Popen[str]:
    guard = [sys.executable, "-m", "shoal.engines.guard", "--parent", str(os.getpid() if parent is None else parent)]
    return subprocess.Popen(
        [*guard, "--grace-s", "1", *options, "--", *command],
        env=os.environ | {MARKER: marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("ending", ["normal", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_however_the_parent_ends(ending: str, marker: str) -> None:
    kind = ending if ending in ("normal", "exception") else "signal"
    parent = start([sys.executable, "-c", PARENT, kind, "guarded"], marker)
    assert len(carrying(marker)) == 5  # parent, guard, command, its child, the stubborn orphan
    end(parent, ending)
    assert parent.returncode == {"normal": 0, "exception": 1, "SIGINT": -2, "SIGTERM": -15, "SIGKILL": -9}[ending]
    assert wait_until_gone(marker, within_s=10) == []


@pytest.mark.parametrize("ending", ["normal", "SIGKILL"])
def test_without_the_guard_the_command_outlives_its_parent(ending: str, marker: str) -> None:
    parent = start([sys.executable, "-c", PARENT, "normal" if ending == "normal" else "signal", "bare"], marker)
    end(parent, ending)
    assert len(wait_until_gone(marker, within_s=2)) == 3  # the control of the test above


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_guard_that_is_told_to_end_ends_everything_first(number: signal.Signals, marker: str) -> None:
    guard = start_guarded([sys.executable, "-c", COMMAND], marker)
    assert guard.stdout is not None
    assert {guard.stdout.readline(), guard.stdout.readline()} == {"stubborn up\n", "command up\n"}
    guard.send_signal(number)
    assert guard.wait(timeout=60) == 143
    assert carrying(marker) == []


def test_a_command_that_ends_by_itself_gives_its_status_and_leaves_no_orphan(marker: str) -> None:
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SHORT!r}]); sys.exit(7)"
    guard = start_guarded([sys.executable, "-c", command], marker)
    assert guard.wait(timeout=60) == 7
    assert carrying(marker) == []


def test_a_command_that_is_killed_gives_a_status_that_is_not_zero(marker: str) -> None:
    guard = start_guarded([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], marker)
    assert guard.wait(timeout=60) != 0


def test_a_command_that_ends_politely_is_given_the_time_to_do_so(marker: str, tmp_path: Path) -> None:
    note = tmp_path / "note"
    polite = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        f"    time.sleep(0.5); pathlib.Path({str(note)!r}).write_text('tidied up'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    guard = start_guarded([sys.executable, "-c", polite], marker, "--grace-s", "120")
    assert guard.stdout is not None and guard.stdout.readline() == "up\n"
    began = time.monotonic()
    guard.terminate()
    assert guard.wait(timeout=150) == 143
    assert time.monotonic() - began < 60  # no longer than it needs
    assert note.read_text() == "tidied up"


def test_a_parent_that_is_gone_before_the_guard_starts_ends_the_command_at_once(marker: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    guard = start_guarded([sys.executable, "-c", "import time; time.sleep(60)"], marker, parent=gone.pid)
    assert guard.wait(timeout=60) == 143
    assert carrying(marker) == []


def test_the_command_runs_on_the_given_cores_alone(marker: str) -> None:
    core = max(os.sched_getaffinity(0))
    guard = start_guarded(
        [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"], marker, "--cores", str(core)
    )
    out, _ = guard.communicate(timeout=60)
    assert out.strip() == str([core])


def test_a_command_that_cannot_be_run_is_an_error_that_says_so(marker: str) -> None:
    guard = start_guarded(["/nowhere/vllm"], marker)
    out, _ = guard.communicate(timeout=60)
    assert guard.returncode != 0
    assert "/nowhere/vllm" in out


def test_shared_memory_that_a_killed_command_leaves_is_removed_and_no_other(marker: str) -> None:
    own, common, foreign = (Path("/dev/shm") / f"shoal-test-{marker}-{which}" for which in ("own", "common", "foreign"))
    code = (
        "import mmap, sys, time\n"
        "def share(path):\n"
        "    file = open(path, 'a+b'); file.truncate(4096); return mmap.mmap(file.fileno(), 4096)\n"
        "maps = [share(path) for path in sys.argv[1:]]; print('up', flush=True); time.sleep(60)"
    )
    foreign.write_bytes(b"mapped by nobody")
    guard = start_guarded([sys.executable, "-c", code, str(own), str(common)], marker)
    try:
        assert guard.stdout is not None and guard.stdout.readline() == "up\n"
        with common.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            time.sleep(0.6)  # the guard looks a few times a second
            (command,) = psutil.Process(guard.pid).children()
            command.kill()
            guard.wait(timeout=60)
            assert [path.exists() for path in (own, common, foreign)] == [False, True, True]
    finally:
        for path in (own, common, foreign):
            path.unlink(missing_ok=True)
