"""Write a run's report: one HTML file that needs nothing else, made of what the run left behind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from shoal.observe.charts import Series, bar_chart, line_chart, stacked_chart
from shoal.observe.files import encodable, replace_file
from shoal.observe.metrics import merge_by_step, read_metrics
from shoal.observe.samples import sample_steps
from shoal.observe.summary import read_summary
from shoal.observe.text import format_duration, format_number

_TEMPLATE = Path(__file__).with_name("report.html.j2")
SECONDS_PREFIX = "seconds/"
"""Precedes a phase in the name of the metric that says how long it took within a step."""

_REWARD_MEAN = re.compile(r"rewards/.+/mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    """A chart of one metric: its title, the metric's name, its unit, and the name of its standard deviation."""

    title: str
    metric: str
    unit: str
    spread: str = ""


_CURVES = (
    _Curve(title="Reward", metric="reward", unit="reward", spread="reward_std"),
    _Curve(title="Completion length", metric="completions/mean_length", unit="tokens"),
    _Curve(title="Loss", metric="loss", unit="loss"),
    _Curve(title="Gradient norm", metric="grad_norm", unit="norm"),
    _Curve(title="Entropy", metric="entropy", unit="nats per token"),
    _Curve(title="KL to the reference", metric="kl", unit="nats per token"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Headline:
    """One of the numbers at the top."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """A titled chart; `svg` is markup that is already safe."""

    title: str
    svg: str
    note: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` from `summary.json`, `metrics.jsonl` and `completions/*.parquet`, as far as they exist.

    Args:
        run_dir: The run's folder.

    Returns:
        The report's path.

    Raises:
        OSError: The report cannot be written. An earlier one stays as it was.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir / "summary.json")
    metrics_path = run_dir / "metrics.jsonl"
    rows = merge_by_step(read_metrics(metrics_path)) if metrics_path.exists() else []
    # Escapes everything that is not marked as safe: a model's completions may well be HTML.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=run_dir.resolve().name,
        headlines=_headlines(summary, rows),
        curves=_curves(rows),
        times=_times(summary, rows),
        steps=sample_steps(run_dir / "completions"),
        versions=_pairs(summary.get("versions")),
        settings=_pairs(summary.get("settings")),
    )
    path = run_dir / "report.html"
    replace_file(path, lambda part: _write_text(part, encodable(html)))
    return path


def _headlines(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[_Headline]:
    headlines = []
    before, after = _number(summary.get("reward_before")), _number(summary.get("reward_after"))
    if before is not None and after is not None:
        headlines.append(
            _Headline(
                label="Held-out reward",
                value=f"{before:.3f} → {after:.3f}",
                note=_difference(after - before, _number(summary.get("reward_ci95"))),
            )
        )
    num_steps = _number(summary.get("num_steps"))
    headlines.append(_Headline(label="Steps", value=format_number(len(rows) if num_steps is None else num_steps)))
    num_engines = _number(summary.get("num_engines"))
    if num_engines is not None:
        headlines.append(_Headline(label="Engines", value=format_number(num_engines)))
    publishes, proven = _number(summary.get("num_publishes")), _number(summary.get("num_publishes_proven"))
    if publishes is not None and proven is not None:
        headlines.append(
            _Headline(
                label="Publishes proven",
                value=f"{proven:.0f} of {publishes:.0f}",
                note="by a digest from every worker" if proven == publishes else "some were not proven",
            )
        )
    seconds = _seconds(summary)
    if seconds:
        headlines.append(_Headline(label="Time", value=format_duration(sum(seconds.values())), note="all phases"))
    return headlines


def _difference(difference: float, half_width: float | None) -> str:
    if half_width is None:
        return f"{difference:+.3f}"
    # Within its interval a difference is not told from none; saying so is the point of the interval.
    verdict = "" if abs(difference) > half_width else ", within its interval"
    return f"{difference:+.3f} ± {half_width:.3f} (95 %){verdict}"


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    charts = []
    for curve in (*_CURVES, *_reward_functions(rows)):
        points = tuple((float(row["step"]), _number(row.get(curve.metric))) for row in rows if curve.metric in row)
        spread = tuple(_number(row.get(curve.spread)) for row in rows if curve.metric in row)
        series = Series(name=curve.metric, points=points, spread=spread)
        svg = line_chart([series], x_label="step", y_label=curve.unit)
        if svg:
            note = "band: ± one standard deviation" if any(value is not None for value in spread) else ""
            charts.append(_Chart(title=curve.title, svg=svg, note=note))
    return charts


def _reward_functions(rows: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    """Return a curve for each reward function, when there are several."""
    names = sorted({name.removesuffix("/mean") for row in rows for name in row if _REWARD_MEAN.fullmatch(name)})
    if len(names) < 2:
        return []
    return [_Curve(title=name, metric=f"{name}/mean", unit="reward", spread=f"{name}/std") for name in names]


def _times(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    """Return the charts of where the time went; a phase has the same colour in both."""
    seconds = _seconds(summary)
    timed = [row for row in rows if any(name.startswith(SECONDS_PREFIX) for name in row)]
    by_step = {name.removeprefix(SECONDS_PREFIX) for row in timed for name in row if name.startswith(SECONDS_PREFIX)}
    # Phases of the steps first, so that the bars' legend has them together; then the rest, longest first.
    phases = sorted(seconds.keys() | by_step, key=lambda name: (name not in by_step, -seconds.get(name, 0.0), name))
    charts = []
    bars = bar_chart([(name, seconds.get(name, 0.0)) for name in phases], colours=range(len(phases)))
    if bars:
        charts.append(_Chart(title="Seconds by phase", svg=bars, note="the whole run"))
    layers = [(name, [_number(row.get(SECONDS_PREFIX + name)) for row in timed]) for name in phases if name in by_step]
    if layers:
        steps = [float(row["step"]) for row in timed]
        stacked = stacked_chart(steps, layers, x_label="step", y_label="seconds")
        if stacked:
            charts.append(_Chart(title="Seconds of each step", svg=stacked, note="colours as in the bars by phase"))
    return charts


def _seconds(summary: Mapping[str, Any]) -> dict[str, float]:
    seconds = summary.get("seconds")
    if not isinstance(seconds, dict):
        return {}
    numbers = {str(name): _number(value) for name, value in seconds.items()}
    return {name: value for name, value in numbers.items() if value is not None and value > 0}


def _pairs(mapping: object) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in mapping.items()] if isinstance(mapping, dict) else []


def _number(value: object) -> float | None:
    """Return a JSON number, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
