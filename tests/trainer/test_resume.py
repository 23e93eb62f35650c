"""A run that was killed goes on where its last checkpoint was, as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import ConfigError

NUM_STEPS = 9
DIES_AT = 7  # The checkpoint of step 7 is not written any more.
TIMED = ("seconds/", "rollout/", "train_")


@dataclass(frozen=True)
class Ended:
    """What is left of a run that came to its end."""

    seen: list[list[Any]]
    weights: dict[str, torch.Tensor]
    log: list[dict[str, Any]]
    num_steps: int
    num_tokens: int


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], Any]) -> Any:
    return load_script("resume_script")


@pytest.fixture(scope="module")
def killed(script: Any, run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that killed itself."""
    folder = tmp_path_factory.mktemp("killed")
    ended = run_script("resume_script", folder, NUM_STEPS, DIES_AT)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def uninterrupted(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    torch.set_num_threads(1)
    yield finish(script, tmp_path_factory.mktemp("uninterrupted"), resume=None)


def finish(script: Any, folder: Path, *, resume: bool | str | None, **changes: Any) -> Ended:
    """Train to the end, from a checkpoint or from the start."""
    already = len(script.seen(folder)) if resume else 0
    trainer = script.make_run(folder, max_steps=NUM_STEPS, **changes)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        trainer.close()
    return Ended(
        seen=script.seen(folder)[already:],
        weights={name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        log=[
            {name: value for name, value in line.items() if not name.startswith(TIMED)}
            for line in trainer.state.log_history
        ],
        num_steps=trainer.state.global_step,
        num_tokens=trainer.state.num_input_tokens_seen,
    )


def test_the_killed_run_left_the_checkpoints_of_all_steps_before(killed: Path, script: Any) -> None:
    left = {path.name for path in (killed / "run").glob("checkpoint-*")}
    assert left == {f"checkpoint-{step}" for step in range(1, DIES_AT)}
    assert [step for step, *_ in script.seen(killed)] == sorted([*range(DIES_AT)] * 2)


# Checkpoint 3 is within an epoch, 5 between two, 6 the last one, which `True` finds by itself.
@pytest.mark.parametrize("checkpoint", [3, 5, None])
def test_a_resumed_run_sees_the_same_prompts_and_ends_with_the_same_weights(
    script: Any, killed: Path, uninterrupted: Ended, tmp_path: Path, checkpoint: int | None
) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    resume = True if checkpoint is None else str(folder / "run" / f"checkpoint-{checkpoint}")
    first = checkpoint or DIES_AT - 1

    resumed = finish(script, folder, resume=resume)

    # Steps, prompts and completions: the samples' seeds follow from where they stand in the run.
    assert resumed.seen == [entry for entry in uninterrupted.seen if entry[0] >= first]
    assert len(resumed.seen) == 2 * (NUM_STEPS - first)
    assert resumed.num_steps == uninterrupted.num_steps == NUM_STEPS
    assert resumed.num_tokens == uninterrupted.num_tokens
    assert resumed.log == uninterrupted.log
    for name, value in uninterrupted.weights.items():
        assert torch.equal(resumed.weights[name], value), name


@pytest.mark.parametrize("left", [[], ["model.safetensors", "config.json"], ["trainer_state.json"]])
def test_a_checkpoint_that_was_never_finished_is_passed_over(
    script: Any, killed: Path, uninterrupted: Ended, tmp_path: Path, left: list[str]
) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    half_written = folder / "run" / f"checkpoint-{DIES_AT}"
    half_written.mkdir()
    for name in left:
        whole = (folder / "run" / f"checkpoint-{DIES_AT - 1}" / name).read_bytes()
        (half_written / name).write_bytes(whole[: len(whole) // 2])

    resumed = finish(script, folder, resume=True)

    assert resumed.seen == [entry for entry in uninterrupted.seen if entry[0] >= DIES_AT - 1]
    assert resumed.num_steps == NUM_STEPS


def test_going_on_from_nothing_is_refused(script: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-old").mkdir()
    trainer = script.make_run(tmp_path, max_steps=NUM_STEPS)
    with pytest.raises(ConfigError, match="found no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.rollouts is None


def test_a_run_with_another_seed_sees_other_prompts(script: Any, uninterrupted: Ended, tmp_path: Path) -> None:
    other = finish(script, tmp_path, resume=None, data_seed=1)
    assert [entry[1] for entry in other.seen] != [entry[1] for entry in uninterrupted.seen]
    assert any(not torch.equal(other.weights[name], value) for name, value in uninterrupted.weights.items())


def test_starting_again_without_the_checkpoint_begins_with_the_first_step(
    script: Any, killed: Path, uninterrupted: Ended, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    (folder / "seen.jsonl").unlink()
    assert finish(script, folder, resume=None).seen == uninterrupted.seen


def test_each_epoch_has_every_prompt_once_but_those_that_fill_no_step(script: Any, uninterrupted: Ended) -> None:
    first = [prompt for step, prompt, _ in uninterrupted.seen if step < script.STEPS_PER_EPOCH]
    second = [prompt for step, prompt, _ in uninterrupted.seen if step >= script.STEPS_PER_EPOCH]
    assert len(set(first)) == len(first) == 10
    assert len(set(second)) == len(second) == 8
    assert first[:8] != second
