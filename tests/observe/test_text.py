"""Numbers, durations and sparklines as text."""

import pytest

from shoal.observe.text import format_duration, format_number, one_line, sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0, "0"),
        (30.0, "30"),
        (0.41234, "0.412"),
        (-0.5, "-0.500"),
        (12345.6, "12346"),
        (1.2e-5, "1.2e-05"),
        (3.4e7, "3.4e+07"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (18.24, "18.2 s"),
        (-1.0, "0.0 s"),
        (59.97, "1 min"),
        (299, "5 min"),
        (3599, "1 h"),
        (7800, "2 h 10 min"),
        (float("inf"), "-"),
    ],
)
def test_durations_are_rounded_to_what_matters(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 7), "▁▂▃▄▅▆▇█"),
        ((9, 0, 1), "▁█"),
        ((0, None, float("nan"), 1), "▁  █"),
        ((2, 2), "▅▅"),
        ((None,), ""),
        ((), ""),
    ],
)
def test_sparklines_span_their_own_range(values: tuple[float | None, ...], text: str) -> None:
    assert sparkline(values, width=2 if values == (9, 0, 1) else 8) == text


def test_control_characters_do_not_reach_the_layout() -> None:
    assert one_line("a\x1b[31m\nb\t c") == "a [31m b c"
