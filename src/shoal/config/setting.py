"""How one setting is declared: a dataclass field with its help text."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help_text: str) -> Any:
    """Declare a setting.

    Args:
        default: Its (immutable) default.
        help_text: What `--help` shows. A `%` may be written as it is: argparse's escape is added here.
    """
    return field(default=default, metadata={"help": help_text.replace("%", "%%")})
