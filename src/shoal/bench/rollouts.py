"""`shoal bench rollouts --simulate`: how near the pool's dispatch comes to what no dispatch can beat."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shoal.bench.dispatch_policies import AtOncePolicy, Policy, PoolPolicy, Rule
from shoal.bench.simulated_engine import EngineModel
from shoal.bench.simulation import Outcome, Simulation, Trouble, Work, draw_work, lower_bound_s
from shoal.errors import ConfigError
from shoal.rollout.dispatch import DispatchSettings

_RULES: tuple[Rule, ...] = ("static_split", "round_robin", "least_pending")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """What is simulated.

    Attributes:
        num_engines: All alike.
        num_prompts: Of one step.
        num_generations: Samples of each prompt.
        median_tokens: Of the lognormal lengths.
        p99_tokens: Which one sample in a hundred exceeds.
        longest_tokens: Where completions are cut.
        correlation: Of the logarithms of the lengths of two samples of one prompt.
        prompt_tokens: Of every prompt.
        num_deaths: Engines that die, at random moments.
        num_stalls: Engines that write nothing more, at random moments.
        stall_s: How long one may write nothing before it is given up.
        repeats: Draws of the work behind a median.
        seed: Of the first draw.
        model: What an engine costs.
        dispatch: The pool's settings.
    """

    num_engines: int
    num_prompts: int
    num_generations: int
    median_tokens: float
    p99_tokens: float
    longest_tokens: int
    correlation: float
    prompt_tokens: int
    num_deaths: int
    num_stalls: int
    stall_s: float
    repeats: int
    seed: int
    model: EngineModel
    dispatch: DispatchSettings


def check_simulation(settings: SimulationSettings) -> None:
    """Refuse what cannot be simulated.

    Raises:
        ConfigError: A value leaves nothing to simulate, or no engine.
    """
    for name in ("num_engines", "num_prompts", "num_generations", "prompt_tokens", "longest_tokens", "repeats"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} leaves nothing to simulate. Give at least 1.")
    if not 1 <= settings.median_tokens < settings.p99_tokens:
        raise ConfigError(
            f"a median of {settings.median_tokens:g} tokens is not below the 99th percentile of "
            f"{settings.p99_tokens:g}. Give a median of at least 1 and a larger percentile."
        )
    if not 0 <= settings.correlation <= 1:
        raise ConfigError(f"a correlation of {settings.correlation:g} does not exist. Give 0 to 1.")
    if settings.num_deaths + settings.num_stalls >= settings.num_engines:
        raise ConfigError(
            f"{settings.num_deaths} deaths and {settings.num_stalls} stalls leave none of {settings.num_engines} "
            "engines. Give fewer."
        )
    if settings.model.kv_tokens < settings.prompt_tokens + settings.longest_tokens:
        raise ConfigError(
            f"a KV cache of {settings.model.kv_tokens} tokens does not hold the longest sample "
            f"({settings.prompt_tokens} + {settings.longest_tokens} tokens). Give a larger one."
        )


def run_simulation(settings: SimulationSettings) -> dict[str, Any]:
    """Simulate, print a table and one line of JSON; return what that line says."""
    print(_headline(settings))
    ratios: dict[str, list[float]] = {}
    outcomes: dict[str, list[Outcome]] = {}
    bounds: list[float] = []
    dispatch_us: list[float] = []
    for seed in range(settings.seed, settings.seed + settings.repeats):
        work = _work(settings, seed)
        bounds.append(lower_bound_s(work, settings.model, settings.num_engines))
        troubles = _troubles(settings, bounds[-1], seed)
        ours = PoolPolicy(settings.num_engines, settings.dispatch)
        policies: dict[str, Policy] = {"makespan": ours}
        policies |= {rule: AtOncePolicy(settings.num_engines, rule) for rule in _RULES}
        for name, policy in policies.items():
            simulation = Simulation(work, settings.model, settings.num_engines, policy, stall_s=settings.stall_s)
            outcome = simulation.run(troubles)
            outcomes.setdefault(name, []).append(outcome)
            ratios.setdefault(name, []).append(outcome.makespan_s / bounds[-1])
        dispatch_us.append(ours.seconds / work.num_tokens.size * 1e6)
    for name, values in ratios.items():
        print(_row(name, values, outcomes[name]))
    data = _summary(settings, ratios, outcomes, bounds, dispatch_us)
    print(f"dispatch takes {data['dispatch_us_per_sample']:.1f} microseconds a sample")
    print(json.dumps(data))
    return data


def _work(settings: SimulationSettings, seed: int) -> Work:
    return draw_work(
        settings.num_prompts,
        settings.num_generations,
        median=settings.median_tokens,
        p99=settings.p99_tokens,
        longest=settings.longest_tokens,
        correlation=settings.correlation,
        prompt_tokens=settings.prompt_tokens,
        seed=seed,
    )


def _troubles(settings: SimulationSettings, bound_s: float, seed: int) -> list[Trouble]:
    """Draw which engines are lost and when, while there is work for certain."""
    random = np.random.default_rng([seed, 1])
    chosen = random.permutation(settings.num_engines)[: settings.num_deaths + settings.num_stalls]
    return [
        Trouble(
            at_s=float(random.uniform(0, bound_s)),
            engine=int(engine),
            fate="dies" if index < settings.num_deaths else "stalls",
        )
        for index, engine in enumerate(chosen)
    ]


def _headline(settings: SimulationSettings) -> str:
    model = settings.model
    return (
        f"{settings.num_engines} engines, {settings.num_prompts} prompts of {settings.prompt_tokens} tokens x "
        f"{settings.num_generations} samples, lengths with median {settings.median_tokens:g} and 99th percentile "
        f"{settings.p99_tokens:g} cut at {settings.longest_tokens}, {settings.num_deaths} deaths, "
        f"{settings.num_stalls} stalls; {settings.repeats} draws\n"
        f"an engine: {model.step_s * 1e3:g} ms a step + {model.sequence_s * 1e6:g} us a sequence + "
        f"{model.context_s * 1e6:g} us a token of context, {model.prefill_s * 1e6:g} us a prompt token, "
        f"{model.kv_tokens} tokens of KV cache, {model.max_num_seqs} sequences at most\n"
        f"{'':<16}{'makespan / lower bound':>24}{'worst':>8}{'put off':>10}{'moved':>10}{'issued again':>14}"
    )


def _row(name: str, ratios: Sequence[float], outcomes: Sequence[Outcome]) -> str:
    title = "the pool" if name == "makespan" else name.replace("_", " ")
    put_off = statistics.median(outcome.num_preemptions for outcome in outcomes)
    again = statistics.median(outcome.num_again for outcome in outcomes)
    moved = statistics.median(outcome.num_moved for outcome in outcomes)
    return f"{title:<16}{statistics.median(ratios):>24.3f}{max(ratios):>8.3f}{put_off:>10g}{moved:>10g}{again:>14g}"


def _summary(
    settings: SimulationSettings,
    ratios: Mapping[str, Sequence[float]],
    outcomes: Mapping[str, Sequence[Outcome]],
    bounds: Sequence[float],
    dispatch_us: Sequence[float],
) -> dict[str, Any]:
    return {
        "benchmark": "rollouts",
        "kind": "simulated",
        **{f"{name}_ratio": round(statistics.median(values), 4) for name, values in ratios.items()},
        "worst_makespan_ratio": round(max(ratios["makespan"]), 4),
        "dispatch_us_per_sample": round(statistics.median(dispatch_us), 2),
        "lower_bound_s": round(statistics.median(bounds), 3),
        "num_preemptions": [outcome.num_preemptions for outcome in outcomes["makespan"]],
        "num_moved": [outcome.num_moved for outcome in outcomes["makespan"]],
        "num_issued_again": [outcome.num_again for outcome in outcomes["makespan"]],
        "ratios": {name: [round(value, 4) for value in values] for name, values in ratios.items()},
        "settings": asdict(settings),
    }
