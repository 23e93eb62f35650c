"""Draw charts as SVG text, with no dependency and no script; colours come from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shoal.observe.text import format_number

WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the hover text.
        points: `(x, y)` in order of x; a y of None is a gap.
        spread: For each point half the height of a band around it (such as one standard deviation), or None.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    spread: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Maps values of `[low, high]` linearly to pixels of `[start, end]`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.end - self.start):.1f}"


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Return an SVG with the series as lines, their spreads as bands, axes, and a hover text for each point.

    Points that are missing, or not finite, leave a gap. Returns an empty string when there is nothing to draw.
    """
    series = [_finite(line) for line in series]
    xs = [x for line in series for x, y in line.points if y is not None]
    if not xs:
        return ""
    heights = [height for line in series for height in _heights(line)]
    y_ticks = nice_ticks(min(heights), max(heights))
    x_ticks = _whole_ticks(min(xs), max(xs))
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 1, xs[0] + 1)
    x_scale = _Scale(low=x_low, high=x_high, start=_LEFT, end=WIDTH - _RIGHT)
    y_scale = _Scale(low=y_ticks[0], high=y_ticks[-1], start=HEIGHT - _BOTTOM, end=_TOP)
    parts = [_axes(x_ticks, y_ticks, x_scale, y_scale, x_label=x_label, y_label=y_label)]
    for index, line in enumerate(series):
        parts.append(_line(line, index % _NUM_COLOURS, x_scale, y_scale, x_label=x_label))
    return _svg(parts, height=HEIGHT, label=f"{y_label} by {x_label}")


def bar_chart(values: Sequence[tuple[str, float]], *, colours: Sequence[int]) -> str:
    """Return an SVG with one horizontal bar a value, in seconds, and its share of the sum.

    Args:
        values: Name and seconds; those that are not positive are left out.
        colours: For each value the number of its colour.
    """
    rows = [
        (name, value, colour)
        for (name, value), colour in zip(values, colours, strict=True)
        if math.isfinite(value) and value > 0
    ]
    if not rows:
        return ""
    longest, total, row_height, left = max(row[1] for row in rows), sum(row[1] for row in rows), 26, 112
    parts = []
    for index, (name, value, colour) in enumerate(rows):
        y, length = 6 + index * row_height, max((WIDTH - left - 110) * value / longest, 1.0)
        label = f"{_seconds(value)} · {100 * value / total:.0f} %"
        parts.append(
            f'<g><title>{escape(name)}: {label}</title><text class="tick" x="{left - 8}" y="{y + 13}" '
            f'text-anchor="end">{escape(_shortened(name, 17))}</text><rect class="fill c{colour % _NUM_COLOURS}" '
            f'x="{left}" y="{y + 2}" width="{length:.1f}" height="15" rx="2"/><text class="value" '
            f'x="{left + length + 6:.1f}" y="{y + 14}">{label}</text></g>'
        )
    return _svg(parts, height=12 + row_height * len(rows), label="seconds by phase")


def stacked_chart(
    steps: Sequence[float], layers: Sequence[tuple[str, Sequence[float | None]]], *, x_label: str, y_label: str
) -> str:
    """Return an SVG with one bar a step, each made of the layers from bottom to top.

    Args:
        steps: `[n]`, in order.
        layers: Name and `[n]` values of each layer; missing and negative ones count as zero.
        x_label: What the steps are.
        y_label: What the values are.
    """
    heights = [[_or_zero(value) for value in values] for _, values in layers]
    totals = [sum(column) for column in zip(*heights, strict=True)]
    if not totals or max(totals) <= 0:
        return ""
    y_ticks = nice_ticks(0.0, max(totals))
    x_ticks = _whole_ticks(steps[0], steps[-1])
    gap = min((b - a for a, b in itertools.pairwise(steps)), default=1.0) or 1.0
    x_scale = _Scale(low=steps[0] - gap / 2, high=steps[-1] + gap / 2, start=_LEFT, end=WIDTH - _RIGHT)
    y_scale = _Scale(low=0.0, high=y_ticks[-1], start=HEIGHT - _BOTTOM, end=_TOP)
    bar_width = max((WIDTH - _LEFT - _RIGHT) * gap / (x_scale.high - x_scale.low) * 0.8, 0.5)
    parts = [_axes(x_ticks, y_ticks, x_scale, y_scale, x_label=x_label, y_label=y_label)]
    for column, step in enumerate(steps):
        base = 0.0
        for layer, (name, _) in enumerate(layers):
            value = heights[layer][column]
            if value > 0:
                top, bottom = float(y_scale(base + value)), float(y_scale(base))
                parts.append(
                    f'<rect class="fill c{layer % _NUM_COLOURS}" x="{float(x_scale(step)) - bar_width / 2:.1f}" '
                    f'y="{top:.1f}" width="{bar_width:.1f}" height="{bottom - top:.1f}"><title>{escape(x_label)} '
                    f"{format_number(step)} · {escape(name)}: {_seconds(value)}</title></rect>"
                )
            base += value
    return _svg(parts, height=HEIGHT, label=f"{y_label} by {x_label}")


_SMALLEST_SHARE = 1e-12  # of the values; between narrower ones lie no round numbers
_SMALLEST_WIDTH = 1e-290  # a fifth of a smaller one may be no normal number, which has no logarithm


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about `count` round numbers that enclose `[low, high]`; at least two, even when low equals high."""
    if high - low < max(_SMALLEST_WIDTH, _SMALLEST_SHARE * max(abs(low), abs(high))):
        margin = abs(low) / 2 if abs(low) >= _SMALLEST_WIDTH else 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if raw <= factor * magnitude * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded to the step's own precision, so that a tick reads 0.3 and not 0.30000000000000004.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    """Return round whole numbers inside `[low, high]`: there is no step 1.5."""
    if high <= low:
        return [low]
    return [tick for tick in nice_ticks(low, high, count=6) if low <= tick <= high and tick == int(tick)] or [low]


def _finite(line: Series) -> Series:
    """Return the series with infinities and NaN made into gaps."""
    points = tuple((x, y if y is not None and math.isfinite(y) else None) for x, y in line.points)
    spread = tuple(value if value is not None and math.isfinite(value) else None for value in line.spread)
    return Series(name=line.name, points=points, spread=spread or (None,) * len(points))


def _heights(line: Series) -> list[float]:
    """Return every height that must be on the chart: the points, and the ends of their bands."""
    heights = []
    for (_, y), spread in zip(line.points, line.spread, strict=True):
        if y is not None:
            heights += [y - (spread or 0.0), y + (spread or 0.0)]
    return heights


def _line(line: Series, colour: int, x_scale: _Scale, y_scale: _Scale, *, x_label: str) -> str:
    parts = []
    for run in _runs(line):
        if len(run) > 1:
            if any(spread for _, _, spread in run):
                upper = [f"{x_scale(x)},{y_scale(y + (spread or 0.0))}" for x, y, spread in run]
                lower = [f"{x_scale(x)},{y_scale(y - (spread or 0.0))}" for x, y, spread in reversed(run)]
                parts.append(f'<polygon class="band c{colour}" points="{" ".join(upper + lower)}"/>')
            path = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y, _ in run)
            parts.append(f'<polyline class="line c{colour}" points="{path}"/>')
        for x, y, spread in run:
            around = f" ± {format_number(spread)}" if spread else ""
            title = f"{line.name} at {x_label} {format_number(x)}: {format_number(y, digits=4)}{around}"
            lone = " lone" if len(run) == 1 else ""
            parts.append(
                f'<circle class="point c{colour}{lone}" cx="{x_scale(x)}" cy="{y_scale(y)}" r="5">'
                f"<title>{escape(title)}</title></circle>"
            )
    return "".join(parts)


def _runs(line: Series) -> list[list[tuple[float, float, float | None]]]:
    """Cut a series at its gaps."""
    runs: list[list[tuple[float, float, float | None]]] = [[]]
    for (x, y), spread in zip(line.points, line.spread, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y, spread))
    return [run for run in runs if run]


def _axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], x_scale: _Scale, y_scale: _Scale, *, x_label: str, y_label: str
) -> str:
    parts = []
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
        )
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{x_scale(tick)}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(11 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _svg(parts: Sequence[str], *, height: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _tick(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0
