"""The HTML report, from whole runs and from what is left of broken ones."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shoal.observe.completions import CompletionRow, CompletionsWriter
from shoal.observe.metrics import MetricsWriter
from shoal.observe.report import write_report
from shoal.observe.samples import sample_steps
from shoal.observe.summary import RunSummary, write_summary


def make_row(reward: float | None, **changes: Any) -> CompletionRow:
    values: dict[str, Any] = {
        "row": 0,
        "prompt": [{"role": "user", "content": "1+1?"}],
        "completion": f"completion of reward {reward}",
        "rewards": {"right": reward},
        "reward": reward,
        "advantage": None,
        "num_tokens": 5,
        "finish_reason": "stop",
        "engine": "engine-0",
        "weight_version": 0,
        "seed": None,
        "extras": {"parsed": "<i>2</i>"},
    }
    return CompletionRow(**(values | changes))


def make_run(folder: Path, *, ci95: float | None = 0.0625) -> None:
    writer = MetricsWriter(folder / "metrics.jsonl")
    for step in (1, 2, 3):
        reward = None if step == 2 else 0.1 * step
        writer.write(step, {"reward": reward, "loss": 0.0, "seconds/train": 1.0, "seconds/generate": 2.0})
        CompletionsWriter(folder / "completions").write(step, [make_row(float(i)) for i in range(9)])
    writer.close()
    summary = RunSummary(
        reward_before=0.125,
        reward_after=0.625,
        reward_ci95=ci95,
        num_engines=2,
        num_steps=3,
        num_publishes=4,
        num_publishes_proven=4,
        seconds={"generate": 6.0, "train": 3.0, "start engines": 1.0},
        versions={"torch": "2.11.0"},
        settings={"learning_rate": 1e-5},
    )
    write_summary(folder / "summary.json", summary)


class Tags(HTMLParser):
    """Collects the tags that a browser would see, and checks that they are closed in order."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polyline", "polygon"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    tags.close()
    assert tags.open == []
    return tags


def test_the_report_has_the_headlines_the_curves_the_samples_and_the_settings(tmp_path: Path) -> None:
    make_run(tmp_path / "demo")
    path = write_report(tmp_path / "demo")
    html = path.read_text(encoding="utf-8")
    assert path.name == "report.html"
    for part in ("demo", "0.125 → 0.625", "+0.500 ± 0.062 (95 %)", "4 of 4", "torch", "learning_rate", "1e-05"):
        assert part in html
    for title in ("Reward", "Loss", "Seconds by phase", "Seconds of each step"):
        assert f"<figcaption>{title}" in html
    assert "Completions of step 1" in html and "Completions of step 3" in html
    assert "Completions of step 2" not in html
    parse(path)


@pytest.mark.parametrize(("ci95", "said"), [(0.0625, False), (0.6, True)])
def test_a_rise_within_its_interval_is_called_that(tmp_path: Path, ci95: float, said: bool) -> None:
    make_run(tmp_path, ci95=ci95)
    assert ("within its interval" in write_report(tmp_path).read_text(encoding="utf-8")) is said


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    writer = CompletionsWriter(tmp_path / "completions")
    writer.write(1, [make_row(1.0, completion=attack, prompt=attack, engine=attack, extras={attack: attack})])
    tags = parse(write_report(tmp_path))
    assert not tags.seen & {"script", "img"}


def test_the_report_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    make_run(tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|<link|\bsrc=|url\(", html)


def test_an_empty_folder_still_gives_a_report(tmp_path: Path) -> None:
    path = write_report(tmp_path)
    parse(path)
    assert "No metrics were written" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("summary", ["{}", "[]", "{", '{"seconds": null, "reward_before": null, "settings": 3}'])
def test_a_summary_may_lack_anything(tmp_path: Path, summary: str) -> None:
    make_run(tmp_path)
    (tmp_path / "summary.json").write_text(summary)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<figcaption>Reward" in html


def test_several_reward_functions_get_a_curve_each(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        writer.write(step, {"rewards/right/mean": 0.5, "rewards/right/std": 0.1, "rewards/brief/mean": 1.0})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<figcaption>rewards/right<" in html and "<figcaption>rewards/brief<" in html


def test_best_and_worst_are_shown_and_the_rest_drawn_the_same_each_time(tmp_path: Path) -> None:
    rows = [make_row(reward) for reward in (0.5, None, 2.0, -1.0, 0.1, 0.2, 0.3, 0.4)]
    CompletionsWriter(tmp_path).write(1, rows)
    (step,) = sample_steps(tmp_path)
    assert [(sample.kind, sample.reward) for sample in step.samples[:2]] == [("best", "2"), ("worst", "-1")]
    assert len({sample.completion for sample in step.samples}) == len(step.samples) == 6
    assert sample_steps(tmp_path) == (step,)


def test_equal_rewards_have_no_best(tmp_path: Path) -> None:
    CompletionsWriter(tmp_path).write(1, [make_row(0.0), make_row(0.0)])
    (step,) = sample_steps(tmp_path)
    assert [sample.kind for sample in step.samples] == ["random", "random"]


def test_conversations_are_shown_by_role_and_brackets_are_not_taken_for_one(tmp_path: Path) -> None:
    CompletionsWriter(tmp_path).write(1, [make_row(1.0), make_row(0.0, prompt="[{not json")])
    (step,) = sample_steps(tmp_path)
    assert [[(turn.role, turn.text) for turn in sample.turns] for sample in step.samples] == [
        [("user", "1+1?")],
        [("", "[{not json")],
    ]
