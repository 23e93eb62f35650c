"""Numbers, durations and sparklines as short text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_MISSING = "-"


def format_number(value: float | None, *, digits: int = 3) -> str:
    """Return a number for a table: `-` when there is none, an exponent only where nothing else fits."""
    if value is None or not math.isfinite(value):
        return _MISSING
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(digits - 2, 1)}e}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{digits}f}"


def format_duration(seconds: float | None) -> str:
    """Return a duration rounded to what matters, such as `18.2 s`, `5 min`, `2 h 10 min`."""
    if seconds is None or not math.isfinite(seconds):
        return _MISSING
    seconds = max(seconds, 0.0)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def sparkline(values: Sequence[float | None], *, width: int) -> str:
    """Return the last `width` values as a row of bars from the least to the greatest; missing ones are blank.

    A series that never changes is drawn at half height.
    """
    shown = list(values[-width:]) if width > 0 else []
    known = [value for value in shown if value is not None and math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)

    def bar(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return " "
        share = (value - low) / (high - low) if high > low else 0.5
        return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]

    return "".join(bar(value) for value in shown)


def one_line(text: str) -> str:
    """Return the text without line breaks and control characters, for a place where they would break the layout."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
