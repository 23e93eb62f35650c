"""The checkpoint to go on from: found in a folder that a run may have been killed over, or left as a run ends."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

from shoal.errors import ConfigError
from shoal.protocols import Ranks

logger = logging.getLogger(__name__)

_FOLDER_NAME = re.compile(r"checkpoint-(\d+)")


def last_complete_checkpoint(output_dir: Path) -> Path:
    """Return the newest checkpoint that was written to its end.

    transformers takes the newest folder, and fails on one that a killed run left half written. It writes
    `trainer_state.json` last (read in 5.5 to 5.19), so a checkpoint that has a readable one has everything else too.

    Raises:
        ConfigError: There is none.
    """
    found = [
        (int(match.group(1)), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _FOLDER_NAME.fullmatch(path.name)) and is_complete(path)
    ]
    if not found:
        raise ConfigError(
            f"resume_from_checkpoint=True found no complete checkpoint in output_dir={str(output_dir)!r}. "
            "Name the checkpoint's folder, or start anew without resume_from_checkpoint."
        )
    return max(found)[1]


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        return isinstance(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def save_last_step(output_dir: Path, step: int, ranks: Ranks, save: Callable[[], None]) -> None:
    """Save a checkpoint of the last whole step if there is none, to go on from when the run can. A collective.

    Args:
        output_dir: Of the run.
        step: Optimizer steps done; with none there is nothing to save.
        ranks: The trainer's.
        save: Writes `checkpoint-STEP`; on all ranks.
    """
    folder = output_dir / f"checkpoint-{step}"
    if not ranks.json(lambda: step > 0 and not is_complete(folder)):
        return
    try:
        save()
    except OSError as error:  # a full disk must not hide why the run has ended
        logger.error("The last step could not be saved: %s", error)
    else:
        logger.warning("Step %d is saved in %s: resume_from_checkpoint=True goes on from there.", step, folder)
