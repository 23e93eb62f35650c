"""Charts as SVG: well-formed, to scale, and robust to what runs really write."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.observe.charts import HEIGHT, WIDTH, Series, bar_chart, line_chart, nice_ticks, stacked_chart

SVG = "{http://www.w3.org/2000/svg}"


def draw(*ys: float | None, spread: tuple[float | None, ...] = ()) -> ET.Element:
    points = tuple((float(index), y) for index, y in enumerate(ys, start=1))
    text = line_chart([Series(name="r", points=points, spread=spread)], x_label="step", y_label="reward")
    return ET.fromstring(text)


def numbers(element: ET.Element, attribute: str) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in element.attrib[attribute].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_rises_with_its_values_and_to_scale() -> None:
    (line,) = draw(0.0, 0.5, 1.0).iter(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = numbers(line, "points")
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)  # up is down in SVG
    assert y0 > y2


def test_each_point_has_a_hover_text() -> None:
    titles = [title.text for title in draw(0.25, 0.5, spread=(0.1, None)).iter(f"{SVG}title")]
    assert titles == ["r at step 1: 0.2500 ± 0.100", "r at step 2: 0.5000"]


def test_a_missing_value_is_a_gap_and_a_lone_point_is_visible() -> None:
    chart = draw(1.0, 2.0, None, float("nan"), 3.0)
    assert [len(numbers(line, "points")) for line in chart.iter(f"{SVG}polyline")] == [2]
    assert [circle.attrib["class"] for circle in chart.iter(f"{SVG}circle")] == ["point c0"] * 2 + ["point c0 lone"]


def test_a_band_lies_around_the_line_and_within_the_chart() -> None:
    chart = draw(1.0, 2.0, spread=(0.5, 1.5))
    (band,) = chart.iter(f"{SVG}polygon")
    (line,) = chart.iter(f"{SVG}polyline")
    corners, middle = numbers(band, "points"), numbers(line, "points")
    assert (corners[0][1] + corners[3][1]) / 2 == pytest.approx(middle[0][1], abs=0.1)
    assert all(0 <= y <= HEIGHT for _, y in corners)


@pytest.mark.parametrize("ys", [(0.3,), (0.0, 0.0, 0.0), (-2.0, -2.0), (1e-9, 1e-9), (1e12, -1e12)])
def test_single_points_and_constant_series_are_drawn_inside(ys: tuple[float, ...]) -> None:
    for circle in draw(*ys).iter(f"{SVG}circle"):
        assert 0 <= float(circle.attrib["cx"]) <= WIDTH
        assert 0 <= float(circle.attrib["cy"]) <= HEIGHT


@pytest.mark.parametrize("ys", [(), (None, None), (float("inf"),)])
def test_nothing_to_draw_is_no_chart(ys: tuple[float | None, ...]) -> None:
    points = tuple((float(index), y) for index, y in enumerate(ys))
    assert line_chart([Series(name="r", points=points)], x_label="step", y_label="y") == ""


def test_names_are_escaped() -> None:
    text = line_chart([Series(name="<b>&", points=((1.0, 1.0),))], x_label='"x"', y_label="<y>")
    ET.fromstring(text)
    assert "<b>" not in text and "<y>" not in text


def test_steps_on_the_axis_are_whole() -> None:
    ticks = [text.text for text in draw(1.0, 2.0, 1.0).iter(f"{SVG}text") if text.attrib.get("text-anchor") == "middle"]
    assert ticks == ["1", "2", "3", "step", "reward"]


@example(low=0.0, width=5e-324)
@example(low=680429297.0, width=1.7e-07)  # to the next number that there is
@example(low=1e9, width=1e-3)
@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_enclose_the_range_and_are_few(low: float, width: float) -> None:
    high = low + width
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack and high - slack <= ticks[-1]
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]), (5, 5, [2, 3, 4, 5, 6, 7, 8])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


def test_bars_are_as_long_as_their_values_and_give_their_share() -> None:
    chart = ET.fromstring(bar_chart([("generate", 30.0), ("<train>", 10.0), ("none", 0.0)], colours=range(3)))
    lengths = [float(rect.attrib["width"]) for rect in chart.iter(f"{SVG}rect")]
    assert lengths[0] == pytest.approx(3 * lengths[1], rel=0.01)
    titles = [title.text for title in chart.iter(f"{SVG}title")]
    assert titles == ["generate: 30 s · 75 %", "<train>: 10 s · 25 %"]


def test_layers_are_stacked_without_gaps() -> None:
    text = stacked_chart([1.0, 2.0], [("a", [1.0, None]), ("b", [2.0, math.nan])], x_label="step", y_label="seconds")
    below, above = ET.fromstring(text).iter(f"{SVG}rect")
    assert float(above.attrib["y"]) + float(above.attrib["height"]) == pytest.approx(float(below.attrib["y"]), abs=0.11)
    assert float(above.attrib["height"]) == pytest.approx(2 * float(below.attrib["height"]), abs=0.2)


def test_charts_load_nothing_from_elsewhere() -> None:
    text = line_chart([Series(name="r", points=((1.0, 1.0), (2.0, 2.0)))], x_label="step", y_label="y")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|<script|href", text)
