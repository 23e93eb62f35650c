"""An event loop on its own thread: results, errors, time-outs, the end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from shoal.errors import EngineRequestError
from shoal.rollout.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test loop")
    yield thread
    thread.close()


async def answer() -> tuple[int, str]:
    await asyncio.sleep(0.01)
    return 42, threading.current_thread().name


def test_work_runs_on_the_loops_own_thread_and_its_value_comes_back(loop: LoopThread) -> None:
    assert loop.run(answer(), timeout_s=60, what="an answer") == (42, "test loop")
    assert loop.run(answer(), timeout_s=60, what="another")[0] == 42  # the same loop, again
    assert threading.current_thread().name != "test loop"


@pytest.mark.parametrize("error", [EngineRequestError("engine-0 broke"), TimeoutError("its own"), KeyError("k")])
def test_an_exception_of_the_work_passes_through_as_it_is(error: Exception, loop: LoopThread) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise error

    with pytest.raises(type(error)) as raised:
        loop.run(fail(), timeout_s=60, what="a failure")
    assert raised.value.args == error.args


def test_work_that_takes_too_long_is_named_and_cancelled(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"waited 0\.5 s for the rollouts of step 3"):
        loop.run(endless(), timeout_s=0.5, what="the rollouts of step 3")
    assert 0.4 < time.monotonic() - began < 60
    assert cancelled.wait(60)
    assert loop.run(answer(), timeout_s=60, what="an answer")[0] == 42  # and the loop goes on


def test_a_time_out_of_the_work_itself_is_not_taken_for_a_wait_that_goes_on(loop: LoopThread) -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    began = time.monotonic()
    with pytest.raises(TimeoutError, match="its own"):
        loop.run(fail(), timeout_s=300, what="a failure")
    assert time.monotonic() - began < 60


def test_closing_ends_the_thread_and_closing_again_does_nothing() -> None:
    loop = LoopThread("to be closed")
    assert "to be closed" in {thread.name for thread in threading.enumerate()}
    loop.close()
    assert "to be closed" not in {thread.name for thread in threading.enumerate()}
    loop.close()


def test_closing_cancels_what_still_runs_and_lets_it_clean_up() -> None:
    loop = LoopThread("busy")
    cleaned_up = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            cleaned_up.set()

    async def start() -> asyncio.Task[None]:
        return asyncio.create_task(endless())

    task = loop.run(start(), timeout_s=60, what="a task to start")
    time.sleep(0.05)
    loop.close()
    assert cleaned_up.is_set()
    assert task.cancelled()


def test_work_after_closing_is_an_error_at_once() -> None:
    loop = LoopThread("closed")
    loop.close()
    work = answer()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(work, timeout_s=300, what="an answer")
    work.close()
    assert time.monotonic() - began < 60


WAITS = """
import asyncio, signal, sys
from shoal.rollout.loop_thread import LoopThread
# A shell ignores Ctrl-C for what it runs in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
loop = LoopThread("loop")
async def endless():
    print("waiting", flush=True)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise
try:
    loop.run(endless(), timeout_s=60, what="ever")
except KeyboardInterrupt:
    loop.close()
    print("interrupted", flush=True)
"""


def test_ctrl_c_interrupts_the_wait_and_cancels_the_work() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert out.split() == ["cancelled", "interrupted"]
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
