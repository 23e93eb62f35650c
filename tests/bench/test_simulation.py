"""The simulated engine against arithmetic, and dispatch against what no dispatcher can beat."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bench.dispatch_policies import AtOncePolicy, PoolPolicy, Rule
from shoal.bench.rollouts import SimulationSettings, check_simulation, run_simulation
from shoal.bench.simulated_engine import EngineModel, SimulatedEngine, SimulatedSample
from shoal.bench.simulation import Simulation, Trouble, Work, draw_work, lower_bound_s
from shoal.cli.main import main
from shoal.errors import ConfigError
from shoal.rollout.dispatch import DispatchSettings

MODEL = EngineModel()
POOL = DispatchSettings(max_in_flight=256, affinity_margin=2)
SETTINGS = SimulationSettings(
    num_engines=64,
    num_prompts=256,
    num_generations=8,
    median_tokens=1000,
    p99_tokens=16000,
    longest_tokens=32768,
    correlation=0.5,
    prompt_tokens=512,
    num_deaths=0,
    num_stalls=0,
    stall_s=120,
    repeats=2,
    seed=0,
    model=MODEL,
    dispatch=POOL,
)


def run_out(engine: SimulatedEngine) -> list[tuple[float, int]]:
    """Return when each sample ends."""
    ends = []
    while (at_s := engine.next_event()) < math.inf:
        ends += [(at_s, sample.index) for sample in engine.advance(at_s)]
    return ends


def in_steps(lengths: list[int], prompt_tokens: int, model: EngineModel) -> float:
    """Return how long an engine with samples of different prompts takes, step by step."""
    seconds = model.prefill_s * prompt_tokens * len(lengths)
    for step in range(max(lengths)):
        running = [length for length in lengths if length > step]
        context = sum(prompt_tokens + step for _ in running)
        seconds += model.step_s + model.sequence_s * len(running) + model.context_s * context
    return seconds


def test_one_sample_alone_takes_what_the_formula_says() -> None:
    engine = SimulatedEngine(MODEL)
    engine.add(SimulatedSample(0, 0, 512, 4000))
    ((end, index),) = run_out(engine)
    assert index == 0 and end == pytest.approx(MODEL.alone_s(512, 4000))
    assert end == pytest.approx(in_steps([4000], 512, MODEL), rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_a_batch_takes_as_long_as_its_steps_one_by_one(lengths: list[int]) -> None:
    engine = SimulatedEngine(MODEL)
    for index, length in enumerate(lengths):
        engine.add(SimulatedSample(index, index, 64, length))
    ends = run_out(engine)
    assert [lengths[index] for _, index in ends] == sorted(lengths)
    assert ends[-1][0] == pytest.approx(in_steps(lengths, 64, MODEL), rel=2e-2)


def test_the_samples_of_one_prompt_share_its_reading_and_its_memory() -> None:
    apart, together = SimulatedEngine(MODEL), SimulatedEngine(MODEL)
    for index in range(8):
        apart.add(SimulatedSample(index, index, 2000, 100))
        together.add(SimulatedSample(index, 0, 2000, 100))
    assert apart.report().kv_usage == pytest.approx(8 * together.report().kv_usage)
    saved = run_out(apart)[-1][0] - run_out(together)[-1][0]
    assert saved == pytest.approx(7 * 2000 * MODEL.prefill_s)


def test_what_does_not_fit_is_put_off_and_read_again() -> None:
    small = replace(MODEL, kv_tokens=3000)
    engine, roomy = SimulatedEngine(small), SimulatedEngine(MODEL)
    for index in range(4):
        engine.add(SimulatedSample(index, index, 100, 1000))
        roomy.add(SimulatedSample(index, index, 100, 1000))
    ends = run_out(engine)
    assert sorted(index for _, index in ends) == [0, 1, 2, 3]
    assert engine.num_preemptions > 0 and roomy.num_preemptions == 0
    assert ends[-1][0] > run_out(roomy)[-1][0]
    assert engine.report().kv_usage == pytest.approx(0, abs=1e-9) and engine.report().running == 0


def test_a_sample_that_was_cut_goes_on_where_it_was() -> None:
    one, other = SimulatedEngine(MODEL), SimulatedEngine(MODEL)
    sample = SimulatedSample(0, 0, 512, 4000)
    one.add(sample)
    half = one.next_event() / 2
    one.advance(half)
    other.advance(half)
    assert one.cut(sample) and not one.cut(sample)
    assert 0 < sample.done_tokens < 4000
    other.add(sample)
    ((end, _),) = run_out(other)
    again = MODEL.prefill_s * (512 + sample.done_tokens)
    assert end == pytest.approx(MODEL.alone_s(512, 4000) + again)
    assert one.next_event() == math.inf


def work(num_prompts: int = 64, seed: int = 0, **changes: float) -> Work:
    shape = {"median": 1000.0, "p99": 16000.0, "correlation": 0.5} | changes
    return draw_work(num_prompts, 8, longest=32768, prompt_tokens=512, seed=seed, **shape)


def test_lengths_have_the_median_the_percentile_and_the_correlation_asked_for() -> None:
    lengths = draw_work(
        20_000, 2, median=1000, p99=16000, longest=10**9, correlation=0.5, prompt_tokens=512, seed=0
    ).num_tokens
    assert np.median(lengths) == pytest.approx(1000, rel=0.03)
    assert np.percentile(lengths, 99) == pytest.approx(16000, rel=0.05)
    assert np.corrcoef(np.log(lengths).T)[0, 1] == pytest.approx(0.5, abs=0.02)


RULES: tuple[Rule, ...] = ("static_split", "round_robin", "least_pending")


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 40), st.integers(5_000, 60_000))
def test_nothing_beats_the_lower_bound_and_everything_is_written(
    seed: int, num_engines: int, num_prompts: int, kv_tokens: int
) -> None:
    model = replace(MODEL, kv_tokens=max(kv_tokens, 34_000))
    drawn = work(num_prompts, seed)
    bound = lower_bound_s(drawn, model, num_engines)
    for policy in [PoolPolicy(num_engines, POOL), *(AtOncePolicy(num_engines, rule) for rule in RULES)]:
        assert Simulation(drawn, model, num_engines, policy).run().makespan_s >= bound * (1 - 1e-9)


def test_the_bound_of_one_engine_with_one_sample_is_met() -> None:
    drawn = Work(prompt_tokens=512, num_tokens=np.array([[4000]]))
    outcome = Simulation(drawn, MODEL, 1, PoolPolicy(1, POOL)).run()
    assert outcome.makespan_s == pytest.approx(lower_bound_s(drawn, MODEL, 1))


@pytest.mark.parametrize("fate", ["dies", "stalls"])
def test_what_a_lost_engine_was_writing_is_written_by_others(fate: str) -> None:
    drawn = work(32)
    whole = Simulation(drawn, MODEL, 4, PoolPolicy(4, POOL)).run()
    troubles = [Trouble(at_s=whole.makespan_s / 4, engine=1, fate=fate)]  # type: ignore[arg-type]
    hurt = Simulation(drawn, MODEL, 4, PoolPolicy(4, POOL), stall_s=5.0).run(troubles)
    assert whole.num_again == 0 < hurt.num_again
    assert hurt.makespan_s > whole.makespan_s


def test_dispatch_comes_within_eight_percent_of_the_bound_where_others_do_not() -> None:
    found = run_simulation(SETTINGS)
    assert found["makespan_ratio"] <= 1.08 and found["worst_makespan_ratio"] <= 1.08
    for rule in RULES:
        assert found[f"{rule}_ratio"] > found["makespan_ratio"]
    assert found["static_split_ratio"] > 1.2
    # How it grows with the engines is tests/rollout/test_dispatch.py's matter; this much is no slowness of a machine.
    assert 0 < found["dispatch_us_per_sample"] < 1000


def test_the_command_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench rollouts --simulate --engines 8 --prompts 16 --repeats 1 --deaths 1 --stalls 1 --stall-s 10"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    data = json.loads(lines[-1])
    assert data["benchmark"] == "rollouts" and data["settings"]["num_deaths"] == 1
    assert {"makespan_ratio", "static_split_ratio", "round_robin_ratio", "least_pending_ratio"} <= data.keys()
    assert "4 ms a step" in "\n".join(lines) and "static split" in "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_engines": 0}, "num_engines=0 leaves nothing"),
        ({"median_tokens": 20_000}, "is not below the 99th percentile"),
        ({"correlation": 1.5}, "a correlation of 1.5"),
        ({"num_deaths": 40, "num_stalls": 24}, "leave none of 64"),
        ({"longest_tokens": 600_000}, "does not hold the longest sample"),
    ],
)
def test_what_cannot_be_simulated_is_refused(changes: dict[str, float], says: str) -> None:
    check_simulation(SETTINGS)
    with pytest.raises(ConfigError, match=says):
        check_simulation(replace(SETTINGS, **changes))
