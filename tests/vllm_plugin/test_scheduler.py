"""The scheduler that engines are given: when it speaks, what it leaves out, and that no text depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import vllm_compat
from shoal.engines.client import EngineClient
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.types import RolloutRequest, SamplingSettings
from shoal.vllm_compat import scheduling
from shoal.vllm_plugin.late_scheduler import LateScheduler
from shoal.vllm_plugin.scheduler import HoldingScheduler, make_scheduler

NUM_TOKENS = 60


class Plain:
    """What comes after our class: answers each step with a token for each request, and counts its figures."""

    def __init__(self, **arguments: Any) -> None:
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []
        self.num_stats = 0

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.running.append(request)

    def finish_requests(self, names: list[str]) -> None:
        for name in names:
            self.running.remove(self.requests.pop(name))

    def update_from_output(self, names: list[str], model_runner_output: Any) -> dict[int, Any]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        messages: dict[int, Any] = {}
        for name in names:
            message = messages.setdefault(self.requests[name].client_index, EngineCoreOutputs(outputs=[]))
            message.outputs.append(EngineCoreOutput(request_id=name, new_token_ids=[5]))
        if (stats := self.make_stats(None)) is not None:
            messages.setdefault(0, EngineCoreOutputs(outputs=[])).scheduler_stats = stats
        return messages

    def make_stats(self, spec: Any) -> Any:
        self.num_stats += 1
        return "figures"


class Holding(HoldingScheduler, Plain):
    """Ours before it."""


def request(name: str, client: int = 0, *, may_hold: bool = True) -> Any:
    params = vllm_compat.sampling_params({}, seed=1, flush_tokens=64, is_held=may_hold)
    return SimpleNamespace(request_id=name, client_index=client, sampling_params=params)


def step(scheduler: Holding, *names: str) -> dict[int, dict[str, list[int]]]:
    messages = scheduler.update_from_output(list(names), SimpleNamespace(logprobs=None))
    return {client: {o.request_id: o.new_token_ids for o in message.outputs} for client, message in messages.items()}


def holding(*requests: Any) -> Holding:
    scheduler = Holding()
    for each in requests:
        scheduler.add_request(each)
    step(scheduler)  # the first one is always due
    scheduler.interval_s = 1e9
    return scheduler


def test_between_two_messages_nothing_is_said_and_no_figures_are_made() -> None:
    scheduler = holding(request("a"), request("b", client=1))
    before = scheduler.num_stats
    assert step(scheduler, "a", "b") == step(scheduler, "a", "b") == {}
    assert scheduler.num_stats == before


def test_when_it_is_time_everything_goes_to_its_client_even_of_those_that_wait() -> None:
    scheduler = holding(request("a"), request("b", client=1))
    step(scheduler, "a", "b")
    scheduler.interval_s = 0
    assert step(scheduler, "a") == {0: {"a": [5, 5]}, 1: {"b": [5]}}


def test_requests_of_other_routes_are_told_of_every_token() -> None:
    scheduler = holding(request("a", may_hold=False), request("b"))
    assert step(scheduler, "a", "b") == {0: {"a": [5]}}


def test_an_engine_that_falls_idle_says_so_at_once() -> None:
    scheduler = holding(request("a"))
    scheduler.finish_requests(["a"])
    (message,) = scheduler.update_from_output([], SimpleNamespace(logprobs=None)).values()
    assert message.scheduler_stats == "figures"


def test_this_vllm_is_as_expected() -> None:
    assert vllm_compat.why_not_hold() is None
    assert vllm_compat.why_not_tell_late() is None


def test_a_scheduler_that_takes_in_tokens_in_another_way_is_told_of_each_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    monkeypatch.setattr(vllm_compat, "scheduler_class", lambda config: Plain)
    monkeypatch.setattr(vllm_compat, "is_told_late", lambda config: True)
    assert isinstance(make_scheduler(vllm_config=None), LateScheduler)  # the control
    monkeypatch.setattr(AsyncScheduler, "_update_request_with_output", lambda self, request, token_ids: None)
    assert not isinstance(make_scheduler(vllm_config=None), LateScheduler)
    assert "takes ('self', 'request', 'token_ids')" in caplog.text


def test_an_output_with_something_unknown_is_not_held_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduling, "_KNOWN_OUTPUT_FIELDS", scheduling._KNOWN_OUTPUT_FIELDS - {"events"})
    monkeypatch.setattr(vllm_compat, "scheduler_class", lambda config: Plain)
    assert type(make_scheduler(vllm_config=None)) is Plain
    assert "EngineCoreOutput has events" in caplog.text


def blocks(num_blocks: int, **changes: Any) -> tuple[Any, list[Any]]:
    """Return what a scheduler has of blocks, of 16 tokens, and the calls that reach vLLM's own manager."""
    calls: list[Any] = []

    class FullAttentionManager:
        def __init__(self) -> None:
            self.block_size = 16
            self.req_to_blocks = {"a": list(range(num_blocks))}
            self.num_cached_block: dict[str, int] = {}

    group = FullAttentionManager()

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        group.num_cached_block[request.request_id] = num_computed_tokens // 16
        calls.append(num_computed_tokens)

    manager = SimpleNamespace(
        coordinator=SimpleNamespace(single_type_managers=(group,)),
        block_pool=SimpleNamespace(hash_block_size=16),
        empty_kv_cache_blocks="nothing",
        allocate_slots=lambda request, num_new_tokens, **options: calls.append(options) or "some",
        cache_blocks=cache_blocks,
    )
    settings = {"kv_cache_manager": manager, "connector": None, "num_lookahead_tokens": 0} | changes
    assert vllm_compat.skip_idle_block_work(SimpleNamespace(**settings)) is None
    return manager, calls


def computed(num_tokens: int, name: str = "a") -> Any:
    return SimpleNamespace(request_id=name, num_computed_tokens=num_tokens)


def test_a_token_that_fits_into_the_last_block_asks_for_none() -> None:
    manager, calls = blocks(2)
    assert manager.allocate_slots(computed(31), 1, num_lookahead_tokens=0) == "nothing"
    assert calls == []
    assert manager.allocate_slots(computed(32), 1, num_lookahead_tokens=0) == "some"  # the control: it is full
    assert manager.allocate_slots(computed(20), 2, num_lookahead_tokens=0) == "some"
    assert manager.allocate_slots(computed(0, "b"), 1, num_lookahead_tokens=0) == "some"
    assert manager.allocate_slots(computed(20), 1, num_new_computed_tokens=0, num_lookahead_tokens=0) == "some"
    assert len(calls) == 4


def test_blocks_are_entered_into_the_prefix_cache_when_one_is_full() -> None:
    manager, calls = blocks(2)
    for num_tokens in range(14, 35):
        manager.cache_blocks(computed(num_tokens), num_tokens)
    assert calls == [16, 32]
    manager.cache_blocks(computed(67), 67)  # told of many tokens at once
    assert calls == [16, 32, 67]


@pytest.mark.parametrize("changes", [{"connector": object()}, {"num_lookahead_tokens": 3}])
def test_with_a_connector_or_speculation_vllm_looks_after_blocks_itself(changes: dict[str, Any]) -> None:
    manager, calls = blocks(2, **changes)
    assert manager.allocate_slots(computed(20), 1, num_lookahead_tokens=0) == "some"
    assert len(calls) == 1


def test_a_manager_that_is_not_as_expected_is_left_alone_and_it_is_said_why() -> None:
    bare = SimpleNamespace(kv_cache_manager=SimpleNamespace())
    assert "coordinator" in str(vllm_compat.skip_idle_block_work(bare))
    manager, _ = blocks(2)
    manager.cache_blocks = stranger = lambda request, first, last: None
    scheduler = SimpleNamespace(kv_cache_manager=manager, connector=None, num_lookahead_tokens=0)
    assert "('request', 'first')" in str(vllm_compat.skip_idle_block_work(scheduler))
    assert manager.cache_blocks is stranger


@pytest.mark.engine
def test_a_seed_writes_the_same_whatever_runs_beside_it_and_another_seed_does_not(
    make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    """Few cache blocks, so that requests are preempted and go on later in the crowded go."""
    (port,) = choose_ports(1, None)
    spec = make_spec("engine-0", port, extra_arguments={"num-gpu-blocks-override": 24, "block-size": 32})

    def asked(seed: int) -> RolloutRequest:
        sampling = SamplingSettings(temperature=1.0, max_tokens=NUM_TOKENS, stop_token_ids=())
        return RolloutRequest(prompt_token_ids=tuple(range(3, 23)), seed=seed, sampling=sampling)

    async def write(client: EngineClient, seeds: list[int]) -> list[list[int]]:
        rollouts = await asyncio.gather(*(client.generate(asked(seed)) for seed in seeds))
        assert all(len(rollout.rollout_logprobs) == NUM_TOKENS for rollout in rollouts)
        return [rollout.token_ids.tolist() for rollout in rollouts]

    async def run(client: EngineClient) -> tuple[list[list[int]], list[list[int]], int]:
        try:
            alone = [(await write(client, [seed]))[0] for seed in (1, 2)]
            crowded = await write(client, [*range(20, 30), 2, *range(30, 40), 1, 1])
            return alone, crowded, (await client.report()).num_preemptions
        finally:
            await client.aclose()

    with Fleet.start([spec], log_dir=tmp_path / "logs", timeout_s=500, request_timeout_s=120) as fleet:
        alone, crowded, num_preemptions = asyncio.run(run(fleet.engines[0].client))
        log = (tmp_path / "logs" / "engine-0.log").read_text()
    assert num_preemptions > 0  # or nothing was shown of it
    assert "every token goes to the front end by itself" not in log
    assert crowded[10] == alone[1]
    assert crowded[-1] == crowded[-2] == alone[0]
    assert len({str(tokens) for tokens in crowded}) == len(crowded) - 1
