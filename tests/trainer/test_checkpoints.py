"""What is left to go on from, when a run ends without being asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.trainer.checkpoints import last_complete_checkpoint, save_last_step


def write(folder: Path, state: str = json.dumps({"global_step": 1})) -> None:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)


def saves(output_dir: Path, step: int) -> list[int]:
    """Have two ranks save the last step; return which of them wrote."""
    wrote: list[int] = []

    def act(ranks: ThreadRanks) -> None:
        save_last_step(output_dir, step, ranks, lambda: wrote.append(ranks.rank))

    assert on_ranks(2, act) == [None, None]
    return sorted(wrote)


def test_the_newest_checkpoint_that_was_written_to_its_end_is_found(tmp_path: Path) -> None:
    for step in (2, 10):
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "checkpoint-12", state='{"global_')
    (tmp_path / "checkpoint-14").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_where_there_is_none_the_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        last_complete_checkpoint(tmp_path)


def test_all_ranks_save_the_last_step_unless_it_is_saved(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-4").mkdir()  # a killed save is none
    assert saves(tmp_path, 0) == [] and saves(tmp_path, 3) == []
    assert saves(tmp_path, 4) == saves(tmp_path, 5) == [0, 1]


def test_a_full_disk_is_said_and_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("no space left on device")

    assert on_ranks(1, lambda ranks: save_last_step(tmp_path, 5, ranks, fail)) == [None]
    assert "could not be saved: no space left on device" in caplog.text
    assert "goes on from there" not in caplog.text
