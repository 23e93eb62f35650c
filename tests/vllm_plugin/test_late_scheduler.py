"""vLLM's own asynchronous scheduler, told of tokens late: every request gets its tokens, whatever happens meanwhile.

A runner without a model stands in for vLLM's second one, which schedules a step ahead, keeps tokens itself and runs on
GPUs only. What it "samples" depends on a request's seed and the token's position, so that what has to arrive is known.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import vllm_compat
from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.testing import tiny_tokenizer
from shoal.vllm_plugin.scheduler import make_scheduler
from shoal.vllm_plugin.untold import StepTokens, UntoldTokens

BLOCK, MAX_MODEL_LEN, MAX_BATCHED, VOCABULARY, STOP = 4, 96, 24, 50, 7


def token_at(seed: int, position: int) -> int:
    """Return what the runner samples."""
    return random.Random(seed * 1_000_003 + position).randrange(3, VOCABULARY)


def logprob_of(token: int) -> float:
    return -token / 8


@dataclass
class Expected:
    """A request and what has to come of it."""

    name: str
    prompt: list[int]
    seed: int
    max_tokens: int
    stops: bool
    may_hold: bool
    takes_logprobs: bool
    is_aborted: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    finish: str | None = None

    @property
    def due(self) -> list[int]:
        """All tokens that it must get."""
        tokens: list[int] = []
        while len(tokens) < min(self.max_tokens, MAX_MODEL_LEN - len(self.prompt)):
            tokens.append(token_at(self.seed, len(self.prompt) + len(tokens)))
            if self.stops and tokens[-1] == STOP:
                break
        return tokens


class Runner:
    """Checks what it is told of each request against what it has made of it."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.seeds: dict[str, int] = {}
        self.prompts: dict[str, int] = {}
        self.blocks: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.may_lose: set[str] = set()
        """Requests whose token under way is not waited for."""

    def run(self, output: Any) -> Any:
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        for new in output.scheduled_new_reqs:
            told = list(new.prefill_token_ids)
            known = self.tokens.get(new.req_id, told)
            is_whole = known == told or (new.req_id in self.may_lose and known[:-1] == told)
            assert is_whole, "resumed with other tokens than were sampled"
            self.may_lose.discard(new.req_id)
            self.tokens[new.req_id] = told
            self.seeds[new.req_id] = new.sampling_params.seed
            self.prompts[new.req_id] = len(new.prompt_token_ids)
            self.blocks[new.req_id] = len(new.block_ids[0])
            self.computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        assert not cached.resumed_req_ids
        for name, blocks, computed, written in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            self.blocks[name] += len(blocks[0]) if blocks else 0
            assert computed == self.computed[name]
            assert written == len(self.tokens[name]) - self.prompts[name]
        assert output.total_num_scheduled_tokens <= MAX_BATCHED, "more than a runner has room for"
        names = list(output.num_scheduled_tokens)
        random.Random(len(self.tokens)).shuffle(names)  # a runner has an order of its own
        sampled = []
        for name in names:
            self.computed[name] += output.num_scheduled_tokens[name]
            tokens = self.tokens[name]
            assert self.computed[name] <= BLOCK * self.blocks[name], "no cache block for a token"
            assert self.computed[name] <= len(tokens)
            if self.computed[name] == len(tokens):
                tokens.append(token_at(self.seeds[name], len(tokens)))
                sampled.append([tokens[-1]])
            else:
                sampled.append([])  # a part of a prompt
        last = [tokens[-1] if tokens else 0 for tokens in sampled]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: row for row, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=LogprobsLists(
                np.array(last, dtype=np.int32)[:, None],
                np.array([logprob_of(token) for token in last], dtype=np.float32)[:, None],
                np.array(last, dtype=np.int32),
                None,
            ),
        )


class Core:
    """vLLM's loop about a scheduler, with one step under way while the next one is planned."""

    def __init__(self, config: Any, num_blocks: int, seed: int) -> None:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config.cache_config.num_gpu_blocks = num_blocks
        self.scheduler = make_scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.random = random.Random(seed)
        self.runner = Runner()
        self.under_way: deque[tuple[Any, Any]] = deque()
        self.requests: dict[str, Expected] = {}
        self.num_told = self.num_steps = 0
        told = self.scheduler._update_request_with_output
        self.scheduler._update_request_with_output = lambda *args, **options: self._count(told(*args, **options))

    def add(self, wanted: Expected) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        params = vllm_compat.sampling_params(
            {
                "temperature": 1.0,
                "max_tokens": wanted.max_tokens,
                "stop_token_ids": (STOP,) if wanted.stops else (),
                "ignore_eos": True,
            },
            seed=wanted.seed,
            flush_tokens=64,
            is_held=wanted.may_hold,
        )
        if not wanted.takes_logprobs:
            params.logprobs = None
        self.requests[wanted.name] = wanted
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request(wanted.name, wanted.prompt, params, None, block_hasher=hasher))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.requests[name].is_aborted = True
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @property
    def is_paused(self) -> bool:
        return bool(self.scheduler.pause_state.name == "PAUSED_ALL")

    def pause(self, *, on: bool) -> None:
        from vllm.v1.core.sched.interface import PauseState

        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if on else PauseState.UNPAUSED)

    def empty_prefix_cache(self, *, of_running: bool) -> None:
        if of_running:
            self.runner.may_lose |= set(self.scheduler.requests)
        self.scheduler.reset_prefix_cache(reset_running_requests=of_running)

    def step(self) -> None:
        """Plan a step; fetch the one before it, or this one where nothing was planned."""
        self.num_steps += 1
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            assert output.total_num_scheduled_tokens == sum(output.num_scheduled_tokens.values())
            assert not (self.is_paused and output.num_scheduled_tokens)
            self.under_way.append((output, self.runner.run(output)))
            if output.total_num_scheduled_tokens and len(self.under_way) < 2:
                return
        if self.under_way:
            for message in self.scheduler.update_from_output(*self.under_way.popleft()).values():
                for written in message.outputs:
                    self._take(written)

    def finish(self) -> None:
        """Run until nobody waits for anything."""
        for _ in range(3000):
            if not (self.scheduler.has_requests() or self.under_way):
                return
            self.step()
        raise AssertionError(f"never ends: {[name for name, wanted in self.requests.items() if not wanted.finish]}")

    def _count(self, result: Any) -> Any:
        self.num_told += 1
        return result

    def _take(self, written: Any) -> None:
        wanted = self.requests[written.request_id]
        assert wanted.finish is None and not wanted.is_aborted, "something came after the end"
        wanted.token_ids += written.new_token_ids
        if written.new_logprobs is not None:
            wanted.logprobs += written.new_logprobs.logprobs[:, 0].tolist()
            wanted.ranks += written.new_logprobs.sampled_token_ranks.tolist()
        if written.finish_reason is not None:
            wanted.finish = written.finish_reason.name


def assert_right(core: Core) -> None:
    """Every request has what it must, and the scheduler has kept nothing."""
    for wanted in core.requests.values():
        due = wanted.due
        if wanted.is_aborted and wanted.finish is None:
            assert wanted.token_ids == due[: len(wanted.token_ids)]
        else:
            assert wanted.token_ids == due
            assert wanted.finish == ("STOP" if wanted.stops and due[-1] == STOP else "LENGTH")
        expected = wanted.token_ids if wanted.takes_logprobs else []
        assert wanted.ranks == expected
        assert wanted.logprobs == pytest.approx([logprob_of(token) for token in expected])
    scheduler = core.scheduler
    assert not scheduler.requests and not scheduler.running
    assert not scheduler._shoal_untold._requests and not scheduler._shoal_untold.names
    assert scheduler.processed_step_seq == scheduler.sched_step_seq
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's own


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine's configuration as on GPUs."""
    from vllm import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash

    init_none_hash(sha256)
    folder: Path = tmp_path_factory.mktemp("model")
    qwen3_config(SHAPES["tiny"]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        made = EngineArgs(
            model=str(folder), load_format="dummy", dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=12,
            max_num_batched_tokens=MAX_BATCHED, enable_chunked_prefill=True, block_size=BLOCK,
            generation_config="vllm", enable_prefix_caching=True,
        ).create_engine_config()  # fmt: skip
        made.scheduler_config.async_scheduling = True
        made.cache_config.block_size = BLOCK
        patch.setattr(type(made), "use_v2_model_runner", True)
        yield made


def wanted(name: str, rng: random.Random, *, shares: float = 0.0, **changes: Any) -> Expected:
    prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([rng.randrange(1, 30), rng.randrange(1, 85)]))]
    if rng.random() < shares:  # of its prompt, others have a part in the prefix cache
        prompt = [*range(3, 3 + 2 * BLOCK), *prompt]
    values = {
        "name": name,
        "prompt": prompt,
        "seed": rng.randrange(1000),
        "max_tokens": rng.choice([1, 2, rng.randrange(1, 40), 200]),
        "stops": rng.random() < 0.5,
        "may_hold": True,
        "takes_logprobs": True,
    }
    return Expected(**(values | changes))


def test_the_scheduler_is_told_of_many_tokens_at_once(config: Any) -> None:
    core = Core(config, num_blocks=400, seed=0)
    assert "LateScheduler" in [base.__name__ for base in type(core.scheduler).__mro__]
    core.scheduler.interval_s = 1e9
    for index in range(6):
        core.add(wanted(str(index), core.random, prompt=[5] * 3, max_tokens=40 + index, stops=False))
    core.finish()
    assert_right(core)
    # The first token, and the last with all before it.
    assert core.num_told == 12


def test_vllm_looks_at_a_request_when_it_needs_a_block(config: Any) -> None:
    core = Core(config, num_blocks=400, seed=0)
    core.scheduler.interval_s = 1e9
    asked: list[str] = []
    allocate = core.scheduler.kv_cache_manager.allocate_slots

    def allocate_slots(request: Any, *args: Any, **options: Any) -> Any:
        asked.append(request.request_id)
        return allocate(request, *args, **options)

    core.scheduler.kv_cache_manager.allocate_slots = allocate_slots
    for name, max_tokens in (("a", 41), ("ends meanwhile", 10), ("b", 41)):
        core.add(wanted(name, core.random, prompt=[5] * 8, max_tokens=max_tokens, stops=False))
    core.finish()
    assert_right(core)
    # The prompt, every fourth of the 40 tokens that are computed after it, and one step too many at the end.
    assert [asked.count(name) for name in ("a", "b")] == [12, 12]


def test_for_how_long_a_request_is_steady(config: Any) -> None:
    core = Core(config, num_blocks=400, seed=0)
    steps_of = vllm_compat.steady_steps(core.scheduler)
    assert steps_of is not None
    for name, num_tokens, max_tokens in (("block", 6, 60), ("length", 5, 3), ("context", 94, 60)):
        core.add(wanted(name, core.random, prompt=[5] * num_tokens, max_tokens=max_tokens, stops=False))
    core.step()
    core.step()
    steps = {name: steps_of(request) for name, request in core.scheduler.requests.items()}
    # Computed so far: 7, 6 and, as the third prompt took both steps, 94 tokens.
    assert steps == {"block": 1, "length": 1, "context": 1}


def test_without_delay_it_is_told_of_each(config: Any) -> None:
    """The control."""
    core = Core(config, num_blocks=400, seed=0)
    core.scheduler.interval_s = 0
    for index in range(6):
        core.add(wanted(str(index), core.random, prompt=[5] * 3, max_tokens=40, stops=False))
    core.finish()
    assert_right(core)
    assert core.num_told == 240


@pytest.mark.parametrize("num_blocks", [400, 60], ids=["room for all", "with preemptions"])
@pytest.mark.parametrize("case", range(30))
def test_whatever_happens_every_request_gets_its_tokens(config: Any, num_blocks: int, case: int) -> None:
    core = Core(config, num_blocks, seed=case)
    if defers := case % 4 == 3:  # blocks are freed by the number of steps
        core.scheduler.defer_block_free = True
        core.scheduler._shoal_steps_of = vllm_compat.steady_steps(core.scheduler)
    rng = core.random
    for number in range(rng.randrange(20, 200)):
        core.scheduler.interval_s = rng.choice([0, 1e9, 1e9, 1e9])
        chance = rng.random()
        alive = [name for name in core.requests if name in core.scheduler.requests]
        if chance < 0.25:
            is_ours = rng.random() < 0.9
            core.add(
                wanted(str(number), rng, shares=0.5, may_hold=is_ours, takes_logprobs=is_ours and rng.random() < 0.8)
            )
        elif chance < 0.29 and alive:
            core.abort(rng.choice(alive))
        elif chance < 0.31:
            core.empty_prefix_cache(of_running=not defers and rng.random() < 0.5)
        elif chance < 0.36:
            core.pause(on=chance < 0.33)
        core.step()
    core.scheduler.interval_s = 1e9
    core.pause(on=False)
    core.finish()
    assert_right(core)


def test_a_request_that_is_preempted_goes_on_from_all_that_it_wrote(config: Any) -> None:
    core = Core(config, num_blocks=30, seed=3)
    core.scheduler.interval_s = 1e9
    for index in range(6):
        core.add(wanted(str(index), core.random, max_tokens=40, stops=False))
    requests = list(core.scheduler.requests.values())
    core.finish()
    assert_right(core)
    assert sum(request.num_preemptions for request in requests) > 0


def test_what_was_told_at_once_is_in_the_prefix_cache(config: Any) -> None:
    core = Core(config, num_blocks=400, seed=0)
    core.scheduler.interval_s = 1e9
    first = wanted("first", core.random, prompt=[5] * 10, max_tokens=41, stops=False)
    core.add(first)
    core.finish()
    written = first.prompt + first.token_ids[:-1]
    core.add(wanted("second", core.random, prompt=[*written, 3], max_tokens=2))
    core.step()
    ((output, _),) = core.under_way
    assert output.scheduled_new_reqs[0].num_computed_tokens == len(written) // BLOCK * BLOCK
    core.finish()
    assert_right(core)


def test_a_runner_that_is_sent_tokens_again_has_vllms_scheduler_told_of_each(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(config), "use_v2_model_runner", False)
    assert not vllm_compat.is_told_late(config)


# ---- what is kept ----


def step_of(tokens: dict[str, list[int]]) -> StepTokens:
    names = list(tokens)
    return StepTokens(
        names=names,
        rows={name: row for row, name in enumerate(names)},
        token_ids=list(tokens.values()),
        logprobs=[-1.0] * len(names),
        ranks=[2] * len(names),
    )


def kept(**most: int) -> UntoldTokens:
    untold = UntoldTokens()
    for name, limit in most.items():
        untold.open(name, stops=frozenset({STOP}), takes_logprobs=True)
        untold.expect(name, limit)
    return untold


def test_what_may_end_a_request_is_urgent_and_so_is_its_first_token() -> None:
    untold = kept(a=3, b=9, c=0)
    alive = {"a", "b", "c"}
    assert untold.take(step_of({"a": [5], "b": [5], "c": [5]}), alive) == ["c"]
    assert untold.take(step_of({"a": [5], "b": [STOP]}), alive) == ["b"]
    assert untold.take(step_of({"a": [5]}), alive) == ["a"]
    told = untold.tell(["a"])
    assert told["a"].token_ids == [5, 5, 5] and told["a"].logprobs == [-1.0] * 3 and told["a"].ranks == [2] * 3
    assert sorted(untold.names) == ["b", "c"] and untold.tell(["a"]) == {}


def test_nothing_of_a_step_is_kept_if_one_of_its_requests_is_not_ours_or_wrote_more_or_less() -> None:
    for tokens in ({"a": [5], "stranger": [5]}, {"a": [5], "b": [5, 6]}, {"a": [5], "b": []}):
        untold = kept(a=9, b=9)
        assert untold.take(step_of(tokens), {"a", "b", "stranger"}) is None
        assert untold.names == []


def test_those_that_have_ended_are_passed_over_and_forgotten() -> None:
    untold = kept(a=9, b=9)
    assert untold.take(step_of({"a": [5], "gone": [5], "b": [5]}), {"a", "b"}) == []
    untold.forget({"b"})
    assert untold.names == ["b"]
    untold.close("b")
    assert untold.names == [] and untold.take(step_of({"b": [5]}), {"b"}) is None
