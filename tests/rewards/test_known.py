"""The well-known rewards, on the cases that tell them from near misses."""

import asyncio
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shoal.errors import ConfigError
from shoal.rewards.caller import RewardCaller
from shoal.rewards.functions import normalise_reward_funcs
from shoal.rewards.known import accuracy_reward, get_soft_overlong_punishment, think_format_reward
from shoal.rewards.math_judge import MathJudge
from shoal.types import Prompt, Rollout


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    pytest.importorskip("math_verify", reason="math-verify, an optional dependency, is not installed")
    judge = MathJudge(timeout_s=1.0)
    yield judge
    judge.close()


def test_equal_answers_are_right_however_they_are_written(judge: MathJudge) -> None:
    assert judge.judge(gold=r"\frac{1}{3}", answer=r"So it is \boxed{\frac{2}{6}}.").correct is True
    assert judge.judge(gold="$0.5$", answer=r"The final answer is $\frac{1}{2}$.").correct is True
    assert judge.judge(gold=r"\frac{1}{3}", answer=r"\boxed{\frac{1}{2}}").correct is False


def test_an_answer_outside_latex_is_wrong_and_says_so(judge: MathJudge) -> None:
    verdict = judge.judge(gold="$2$", answer="two, I think")
    assert (verdict.correct, verdict.gold, verdict.answer) == (False, "[2, '2']", "[unparseable]")


def test_a_gold_answer_that_cannot_be_read_leaves_the_completion_out(judge: MathJudge) -> None:
    assert judge.judge(gold="no idea", answer=r"\boxed{2}").correct is None


def test_an_answer_that_never_ends_is_wrong_and_the_next_is_judged(judge: MathJudge) -> None:
    began = time.monotonic()
    verdict = judge.judge(gold="$2$", answer=r"\boxed{9^{9^{9^9}}}")
    assert (verdict.correct, verdict.answer) == (False, "[timed out]")
    assert time.monotonic() - began < 60
    assert judge.judge(gold="$2$", answer=r"\boxed{2}").correct is True


def test_accuracy_reward_reads_text_and_conversations_through_the_caller() -> None:
    pytest.importorskip("math_verify", reason="math-verify, an optional dependency, is not installed")
    caller = RewardCaller(normalise_reward_funcs(accuracy_reward), timeout_s=60)
    rollout = Rollout(
        token_ids=np.zeros(1, dtype=np.int32),
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        finish_reason="stop",
        weight_version=0,
        engine="engine-0",
    )
    prompt = Prompt(row=0, prompt="?", token_ids=(1,), columns={"solution": "$4$"})
    completions: list[Any] = [r"\boxed{4}", [{"role": "assistant", "content": r"\boxed{5}"}], ""]
    result = asyncio.run(caller.score(prompt, [rollout] * 3, completions))
    assert result.rewards[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert result.extras["solution"] == ("$4$",) * 3
    assert result.extras["answer_parsed"][2] == "[unparseable]"


def test_the_math_process_ends_with_the_interpreter() -> None:
    pytest.importorskip("math_verify", reason="math-verify, an optional dependency, is not installed")
    program = """
from shoal.rewards.math_judge import MathJudge
judge = MathJudge()
judge.judge(gold="$2$", answer="$2$")
print(judge.pid)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    deadline = time.monotonic() + 10
    while _is_running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(int(done.stdout))


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nreasons\n</think>\nanswer", 1.0),
        ("<think></think>", 1.0),
        ("<think>reasons, never closed", 0.0),
        ("answer first <think>reasons</think>", 0.0),
        ("<think>one</think><think>two</think>", 0.0),
        ("<think>one</think> then </think>", 1.0),
        ("\n<think>reasons</think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_format_wants_one_closed_block_at_the_start(text: str, reward: float) -> None:
    assert think_format_reward([text, [{"role": "assistant", "content": text}]]) == [reward, reward]


def test_soft_overlong_punishment_follows_equation_13_of_dapo() -> None:
    punish = get_soft_overlong_punishment(100, 20)
    assert punish(completion_ids=[[1] * length for length in (0, 80, 85, 90, 100, 101)]) == [0, 0, -0.25, -0.5, -1, -1]


def test_soft_overlong_punishment_with_no_ramp_is_a_step() -> None:
    punish = get_soft_overlong_punishment(100, 0)
    assert punish(completion_ids=[[1] * 100, [1] * 101]) == [0, -1]


def test_soft_overlong_punishment_has_trls_name_and_can_be_pickled() -> None:
    punish = pickle.loads(pickle.dumps(get_soft_overlong_punishment(100, 20)))
    assert normalise_reward_funcs(punish)[0].name == "soft_overlong_punishment_reward"
    assert punish(completion_ids=[[1] * 90]) == [-0.5]


@pytest.mark.parametrize("cache", [-1, 101])
def test_a_ramp_longer_than_the_limit_is_refused(cache: int) -> None:
    with pytest.raises(ConfigError, match="soft_punish_cache"):
        get_soft_overlong_punishment(100, cache)
