"""Reward functions in worker processes: the same answers, an end to every hang, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from shoal.errors import ConfigError, RewardError
from shoal.rewards.caller import GroupScore, RewardCaller
from shoal.rewards.functions import normalise_reward_funcs
from shoal.types import Prompt, Rollout

K = 3
LIMIT_S = 60.0

MakeCaller = Callable[..., RewardCaller]


@pytest.fixture
def make_caller() -> Iterator[MakeCaller]:
    """Make callers whose processes end with the test."""
    made: list[RewardCaller] = []

    def make(functions: object, *, timeout_s: float = LIMIT_S, num_workers: int = 1) -> RewardCaller:
        made.append(RewardCaller(normalise_reward_funcs(functions), timeout_s=timeout_s, num_workers=num_workers))
        return made[-1]

    yield make
    for caller in made:
        caller.close()


ROLLOUT = Rollout(
    token_ids=np.arange(2, dtype=np.int32),
    rollout_logprobs=np.zeros(2, dtype=np.float32),
    finish_reason="stop",
    weight_version=0,
    engine="engine-0",
)


async def score(caller: RewardCaller, **columns: Any) -> GroupScore:
    prompt = Prompt(row=7, prompt="1+1=", token_ids=(1,), columns=columns)
    return await caller.score(prompt, [ROLLOUT] * K, ["a", "bb", "ccc"], trainer_state={"step": 4})


def run(caller: RewardCaller, **columns: Any) -> GroupScore:
    return asyncio.run(score(caller, **columns))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pid_in(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def pid_of_copy() -> Callable[..., list[float]]:
    """`pid_of` as a function that goes whole, since a worker cannot import this file."""

    def pid_of(**_: Any) -> list[float]:
        return [float(os.getpid())] * K

    return pid_of


def test_a_function_gets_and_gives_in_a_worker_what_it_does_on_a_thread(make_caller: MakeCaller) -> None:
    def spy(log_extra: Any, log_metric: Any, **keywords: Any) -> Any:
        log_metric("step", keywords["trainer_state"]["step"])
        log_extra("seen", [repr(sorted(keywords.items()))] * K)
        return np.array([len(text) for text in keywords["completions"]]), keywords["answer"]

    def first(**keywords: Any) -> Any:
        return spy(**keywords)[0]

    on_thread = run(make_caller(first, num_workers=0), answer="2")
    in_worker = run(make_caller(first), answer="2")
    assert in_worker.rewards.tolist() == on_thread.rewards.tolist() == [[1], [2], [3]]
    assert in_worker.extras == on_thread.extras and "'answer', ['2', '2', '2']" in in_worker.extras["seen"][0]
    assert in_worker.metrics == on_thread.metrics == (("step", 4.0),)


@pytest.mark.parametrize(
    "answer", [(1, None, 0.5), np.array([1, 2, 3.0]), torch.tensor([1, 2, 3.0]), [np.float32(1)] * 3]
)
def test_answers_of_every_kind_cross(make_caller: MakeCaller, answer: Any) -> None:
    def fixed(**_: Any) -> Any:
        return answer

    expected = run(make_caller(fixed, num_workers=0)).rewards
    np.testing.assert_array_equal(run(make_caller(fixed)).rewards, expected)


def test_the_trainers_state_does_not_make_a_worker_import_transformers(make_caller: MakeCaller) -> None:
    from transformers import TrainerState

    def look(trainer_state: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("step", trainer_state.global_step)
        log_metric("last", trainer_state.log_history[-1]["step"])
        log_metric("history", len(trainer_state.log_history))
        log_metric("imported", "transformers" in sys.modules)
        return [0.0] * K

    prompt = Prompt(row=7, prompt="1+1=", token_ids=(1,), columns={})
    state = TrainerState(global_step=5, log_history=[{"step": step} for step in range(1000)])
    call = make_caller(look).score(prompt, [ROLLOUT] * K, ["a", "b", "c"], trainer_state=state)
    assert asyncio.run(call).metrics == (
        ("step", 5.0),
        ("last", 999.0),
        ("history", 100.0),
        ("imported", 0.0),
    )
    assert len(state.log_history) == 1000


def test_synchronous_functions_leave_this_process_and_async_ones_stay(make_caller: MakeCaller) -> None:
    async def here(**_: Any) -> list[float]:
        return [float(os.getpid())] * K

    rewards = run(make_caller([pid_of_copy(), here])).rewards
    assert rewards[0, 1] == os.getpid() != rewards[0, 0]


def test_as_many_calls_run_at_once_as_there_are_workers(make_caller: MakeCaller, tmp_path: Path) -> None:
    def meets(row: list[int], **_: Any) -> list[float]:
        (tmp_path / str(row[0])).write_text(str(os.getpid()))
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2:  # ends only if the other call runs meanwhile
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return [1.0] * K

    caller = make_caller(meets, num_workers=2)

    async def rows() -> None:
        prompts = [Prompt(row=row, prompt="p", token_ids=(1,), columns={"row": row}) for row in range(2)]
        await asyncio.gather(*(caller.score(prompt, [ROLLOUT] * K, ["a", "b", "c"]) for prompt in prompts))

    asyncio.run(rows())
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 2


def test_a_hang_in_native_code_ends_with_its_worker_and_another_takes_its_place(
    make_caller: MakeCaller, tmp_path: Path
) -> None:
    noted = tmp_path / "pid"

    def hangs(hang: list[bool], **_: Any) -> list[float]:
        noted.write_text(f"{os.getpid()}\n")
        return [float(9**9**9**9 if hang[0] else os.getpid())] * K  # no Python signal handler runs meanwhile

    caller = make_caller(hangs, timeout_s=1.0)
    asyncio.run(caller.start())
    with pytest.raises(RewardError, match=r"'hangs' .* did not answer within 1 s.*worker process was killed"):
        run(caller, hang=True)
    hung = pid_in(noted)
    assert not is_running(hung)
    assert run(caller, hang=False).rewards[0, 0] not in (hung, os.getpid())


def test_what_a_hung_function_has_started_ends_too(make_caller: MakeCaller, tmp_path: Path) -> None:
    noted = tmp_path / "pid"

    def runs_code(**_: Any) -> list[float]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        noted.write_text(f"{child.pid}\n")
        child.wait()
        return [0.0] * K

    caller = make_caller(runs_code, timeout_s=2.0)
    asyncio.run(caller.start())
    with pytest.raises(RewardError, match="did not answer"):
        run(caller)
    child = pid_in(noted)
    wait_until(lambda: not is_running(child))


def test_a_function_that_takes_its_process_with_it_is_named_and_replaced(make_caller: MakeCaller) -> None:
    def exits(how: list[str], **_: Any) -> list[float]:
        if how[0] == "exit":
            os._exit(3)
        if how[0] == "killed":
            os.kill(os.getpid(), signal.SIGSEGV)
        return [1.0] * K

    caller = make_caller(exits)
    with pytest.raises(RewardError, match=r"'exits' .*its process \(pid \d+\) ended with code 3 during the call"):
        run(caller, how="exit")
    with pytest.raises(RewardError, match="was ended by SIGSEGV"):
        run(caller, how="killed")
    assert run(caller, how="").rewards[0, 0] == 1.0


def test_an_idle_worker_that_was_killed_from_outside_is_not_called(make_caller: MakeCaller) -> None:
    caller = make_caller(pid_of_copy())
    first = int(run(caller).rewards[0, 0])
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_running(first))
    assert run(caller).rewards[0, 0] not in (first, os.getpid())


def test_what_a_function_raises_in_a_worker_is_told_as_on_a_thread(make_caller: MakeCaller) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("answr")

    def needy(completions: list[str]) -> list[float]:
        return [0.0] * K

    def dies(**_: Any) -> list[float]:
        raise SystemExit(3)

    messages = {}
    for num_workers in (0, 1):
        for function in (broken, needy, dies):
            with pytest.raises(RewardError) as caught:
                run(make_caller(function, num_workers=num_workers))
            messages[num_workers, function.__name__] = str(caught.value)
            if num_workers:
                assert "Traceback" in caught.value.__notes__[0]
    for name in ("broken", "needy", "dies"):
        assert messages[0, name].partition(" at ")[0] == messages[1, name].partition(" at ")[0]
    assert "KeyError: 'answr' at " in messages[1, "broken"] and "add **kwargs" in messages[1, "needy"]


def test_wrong_logging_in_a_worker_names_the_function(make_caller: MakeCaller) -> None:
    def logs(log_extra: Any, **_: Any) -> list[float]:
        log_extra("note", [1, 2])
        return [0.0] * K

    with pytest.raises(RewardError, match=r"'logs' .*log_extra\('note', …\) with 2 values for 3 completions"):
        run(make_caller(logs))


def test_an_answer_that_cannot_leave_its_process_is_an_error(make_caller: MakeCaller) -> None:
    def odd(**_: Any) -> Any:
        return (x for x in range(K))

    with pytest.raises(RewardError, match=r"'odd' .*cannot be sent to the trainer"):
        run(make_caller(odd))


def test_an_argument_that_cannot_enter_a_process_is_named(make_caller: MakeCaller) -> None:
    with pytest.raises(RewardError, match=r"its argument lock cannot be copied there.*reward_workers=0"):
        run(make_caller(pid_of_copy()), lock=threading.Lock())


def test_a_function_that_cannot_be_copied_is_refused_before_anything_runs(make_caller: MakeCaller) -> None:
    lock = threading.Lock()

    def holds(**_: Any) -> list[float]:
        with lock:
            return [0.0] * K

    with pytest.raises(ConfigError, match=r"'holds' cannot be sent to a worker.*lock.*module.*reward_workers=0"):
        make_caller(holds)


def test_a_module_that_workers_cannot_import_is_refused_at_the_start(
    make_caller: MakeCaller, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("made_up_rewards")
    exec("def score(**_):\n    return [0.0] * 3\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "made_up_rewards", module)
    caller = make_caller(module.score)
    with pytest.raises(ConfigError, match=r"could not load .*'score'.*No module named 'made_up_rewards'"):
        asyncio.run(caller.start())


def test_workers_without_synchronous_functions_are_refused(make_caller: MakeCaller) -> None:
    async def here(**_: Any) -> list[float]:
        return [0.0] * K

    with pytest.raises(ConfigError, match="reward_workers=2 would have nothing to do"):
        make_caller(here, num_workers=2)


def test_a_worker_has_one_thread_and_is_no_trainer_rank(
    make_caller: MakeCaller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(log_extra: Any, **_: Any) -> list[float]:
        import torch

        names = ("OMP_NUM_THREADS", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OWN")
        log_extra("seen", [[torch.get_num_threads(), *(os.environ.get(name) for name in names)]] * K)
        return [0.0] * K

    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OWN"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run(make_caller(look)).extras["seen"][0] == [1, "1", None, None, None, "7"]


def test_a_call_that_nobody_waits_for_any_more_is_ended(make_caller: MakeCaller, tmp_path: Path) -> None:
    noted = tmp_path / "pid"

    def slow(**_: Any) -> list[float]:
        noted.write_text(f"{os.getpid()}\n")
        time.sleep(600)
        return [0.0] * K

    caller = make_caller(slow)

    async def cancel() -> None:
        task = asyncio.create_task(score(caller))
        pid = await asyncio.to_thread(pid_in, noted)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not is_running(pid)

    asyncio.run(cancel())


def test_closing_ends_the_workers_and_a_later_call_starts_others(make_caller: MakeCaller) -> None:
    caller = make_caller(pid_of_copy(), num_workers=2)
    asyncio.run(caller.start())
    first = int(run(caller).rewards[0, 0])
    children = {child.pid for child in psutil.Process().children()}
    assert first in children
    caller.close()
    assert not is_running(first)
    assert int(run(caller).rewards[0, 0]) not in children


SCRIPT = """
import asyncio, os, subprocess, sys, time
import numpy as np
from shoal.rewards import RewardCaller, normalise_reward_funcs
from shoal.types import Prompt, Rollout

print("script", flush=True)
FACTOR = 2.0

def scaled(n):
    return FACTOR * n

def reward(hang, **_):
    print("worker", os.getpid(), flush=True)
    if hang[0] == "program":
        program = subprocess.Popen(["sleep", "600"])
        print("program", program.pid, flush=True)
    return [scaled(9 ** 9 ** 9 ** 9 if hang[0] else 1)]

rollout = Rollout(token_ids=np.zeros(1, np.int32), rollout_logprobs=np.zeros(1, np.float32), finish_reason="stop",
                  weight_version=0, engine="e")
caller = RewardCaller(normalise_reward_funcs(reward), timeout_s=600, num_workers=1)
prompt = Prompt(row=0, prompt="p", token_ids=(1,), columns={"hang": "".join(sys.argv[1:])})
print("reward", asyncio.run(caller.score(prompt, [rollout], ["c"])).rewards.tolist(), flush=True)
"""


def test_a_function_of_the_script_itself_runs_without_running_the_script_again(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)  # no `if __name__ == "__main__"` guards it
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py")], capture_output=True, text=True, timeout=120, check=False
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["script", "worker", "reward"], done.stderr
    assert lines[2] == "reward [[2.0]]"
    worker = int(lines[1].split()[1])
    wait_until(lambda: not is_running(worker))


def test_a_worker_that_hangs_in_native_code_ends_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py"), "program"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "script\n"
        worker, program = (int(trainer.stdout.readline().split()[1]) for _ in range(2))
        assert is_running(worker) and is_running(program)
    finally:
        trainer.kill()
        trainer.wait(timeout=30)
    wait_until(lambda: not is_running(worker))
    wait_until(lambda: not is_running(program))
