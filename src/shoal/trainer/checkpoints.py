"""Find the checkpoint to go on from, in a folder that a run may have been killed over."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shoal.errors import ConfigError

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
