"""Three real vLLM engines, of which some are killed, frozen or made to talk nonsense while they write.

Whatever happens, every prompt yields exactly its samples, and each is what an undisturbed engine writes for its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest
import torch

from shoal.engines.client import EngineClient
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.engines.restarts import RestartSettings
from shoal.errors import EngineError
from shoal.observe.ledger import TimeLedger
from shoal.rollout.collector import GroupRequest
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.health import State
from shoal.rollout.parts import go_on, join
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.trainer.engine_side import EngineSide
from shoal.trainer.exchange import Exchange
from shoal.trainer.rollouts import Rollouts, RolloutSettings
from shoal.types import Prompt, Rollout, RolloutRequest, SamplingSettings, ScoredGroup
from shoal.weights.group import PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source
from shoal.wire.agreement import MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

STALL_S = 15.0
MOMENT_S = 2.0
WAIT_S = 120.0
"""Longest that a test waits for what comes at once on an idle machine."""
COMEBACK_S = 400.0
"""Longest that an engine may take to come back, which is to start."""
MAX_MODEL_LEN = 4096
NUM_PROMPTS, NUM_SAMPLES = 8, 4
# Greedy, these weights write one token for ever; sampled, every seed writes something else.
SAMPLED = SamplingSettings(temperature=1.0, max_tokens=160, stop_token_ids=())

Texts: TypeAlias = list[list[list[int]]]
"""Token ids by prompt and sample."""


@dataclass
class Line:
    """What lies between the trainer and one engine: passes everything on, until it talks nonsense."""

    port: int
    talks_nonsense: bool = False
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            self.hang_up()

    def hang_up(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        if self.talks_nonsense:
            writer.write(random.Random(1).randbytes(300))
            writer.close()
            return
        with contextlib.suppress(OSError):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writers.append(up_writer)
            await asyncio.gather(_pass_on(reader, up_writer), _pass_on(up_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
def policy(make_served_model: Callable[..., Any]) -> Any:
    """A model that hardly ever ends by itself what it writes."""
    model = make_served_model(max_position_embeddings=MAX_MODEL_LEN)
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.eos_token_id] = 0  # tied: its logit is 0, others' are up to 7
    return model


@pytest.fixture
def fleet(policy: Any, make_spec: Callable[..., EngineSpec], served_model_dir: Path, tmp_path: Path) -> Iterator[Fleet]:
    model_dir = tmp_path / "model"
    policy.config.save_pretrained(model_dir)
    for file in served_model_dir.glob("token*"):
        (model_dir / file.name).write_bytes(file.read_bytes())
    specs = [
        make_spec(f"engine-{i}", port, model_dir=model_dir, max_model_len=MAX_MODEL_LEN)
        for i, port in enumerate(choose_ports(3, None))
    ]
    with Fleet.start(specs, log_dir=tmp_path / "logs", timeout_s=500, request_timeout_s=120) as running:
        yield running


def processes(fleet: Fleet, index: int) -> list[psutil.Process]:
    """Return the server and its workers, without the guard."""
    return psutil.Process(fleet.engines[index].process.pid).children(recursive=True)


def requests_of(prompt: int) -> list[RolloutRequest]:
    """Prompts that differ, so that a sample of another prompt would show."""
    ids = tuple(3 + (prompt * 29 + 7 * i) % 250 for i in range(12))
    return [
        RolloutRequest(prompt_token_ids=(*ids, 10 + sample), seed=100 * prompt + sample, sampling=SAMPLED)
        for sample in range(NUM_SAMPLES)
    ]


async def write_all(pool: EnginePool) -> Texts:
    async with pool.watching():
        groups = await asyncio.gather(*(pool.generate_group(requests_of(prompt)) for prompt in range(NUM_PROMPTS)))
    return [[rollout.token_ids.tolist() for rollout in group] for group in groups]


@asynccontextmanager
async def pool_of(fleet: Fleet, lines: list[Line]) -> AsyncIterator[tuple[EnginePool, list[EngineClient]]]:
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for engine, line in zip(fleet.engines, lines, strict=True):
            url = await stack.enter_async_context(line.open())
            key = engine.client._sync.headers["authorization"].removeprefix("Bearer ")
            client = EngineClient(name=engine.name, url=url, api_key=key, log_path=None, request_timeout_s=120)
            stack.push_async_callback(client.aclose)
            clients.append(client)
        dispatch = DispatchSettings(max_in_flight=8, affinity_margin=2)
        pool = EnginePool(
            clients, PoolSettings(dispatch=dispatch, stall_s=STALL_S, poll_s=0.3), why_ended=fleet.why_ended
        )
        pool.publishing(0)
        pool.proven(0, [client.name for client in clients])
        yield pool, clients


def test_no_sample_is_lost_doubled_or_invented_whatever_becomes_of_the_engines(
    fleet: Fleet, policy: Any, request: pytest.FixtureRequest
) -> None:
    """All in one run of the fleet, whose start takes longer than the rest."""
    chance = random.Random(request.config.getoption("--soak-seed"))
    _one_is_killed_restarted_and_refilled(fleet, policy, chance)
    lines = [Line(engine.spec.port) for engine in fleet.engines]

    async def run() -> None:
        undisturbed = await _cut_and_compare(fleet, lines)
        for _ in range(request.config.getoption("--soak-rounds")):
            await _one_is_lost_and_comes_back(fleet, lines, undisturbed, chance)
        await _one_after_the_other_is_lost(fleet, lines, undisturbed, chance)

    asyncio.run(run())


class Step:
    """A trainer's hold on the engines, and the same step collected as often as wanted."""

    def __init__(self, fleet: Fleet, policy: Any) -> None:
        self.fleet = fleet
        self.holds_open = lambda: False
        """As long as this is so, no reward comes, and the step goes on."""
        ranks = Exchange(rank=0, world_size=1)
        dispatch = DispatchSettings(max_in_flight=8, affinity_margin=2)
        self.rollouts = Rollouts(
            fleet,
            decode=lambda prompt, rollouts: ("",) * len(rollouts),
            score=self._score,
            settings=RolloutSettings(
                backends=("gloo",) * len(fleet.engines),
                # An engine that is slow because another one starts beside it has not stalled.
                pool=PoolSettings(dispatch=dispatch, stall_s=COMEBACK_S, poll_s=0.3),
                restarts=RestartSettings(max_in_a_row=1, timeout_s=COMEBACK_S),
            ),
        )
        self.side = EngineSide(
            ranks=ranks,
            ledger=TimeLedger(),
            make_sources=lambda: {MODEL: make_source(policy, wire_dtype=torch.float32)},
            start=lambda: self.rollouts,
            make_publisher=lambda sources, rollouts: WeightPublisher(
                sources,
                self.rollouts.addresses,
                ranks=ranks,
                device=torch.device("cpu"),
                settings=PublishSettings(host="127.0.0.1", timeout_s=60.0),
            ),
        )

    def collect(self) -> tuple[ScoredGroup, ...]:
        request = GroupRequest(
            prompts=tuple(
                Prompt(row=row, prompt="", token_ids=requests_of(row)[0].prompt_token_ids, columns={})
                for row in range(NUM_PROMPTS)
            ),
            num_generations=NUM_SAMPLES,
            sampling=SAMPLED,
            seed=lambda prompt, sample: 100 * prompt.row + sample,
        )
        return self.side.during(lambda: self.side.collect(request, timeout_s=2 * COMEBACK_S))()

    def state(self, index: int) -> State:
        return self.rollouts.loads()[index].state

    def close(self) -> None:
        """Leave the engines running."""
        if self.side.publisher is not None:
            self.side.publisher.close()
        self.rollouts.leave()

    async def _score(self, prompt: Prompt, rollouts: tuple[Rollout, ...], completions: Any) -> ScoredGroup:
        while self.holds_open():
            await asyncio.sleep(0.1)
        rewards = np.zeros((len(rollouts), 1))
        return ScoredGroup(prompt=prompt, rollouts=rollouts, completions=completions, rewards=rewards, extras={})


def _texts(groups: tuple[ScoredGroup, ...]) -> Texts:
    return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def _writers(groups: tuple[ScoredGroup, ...]) -> set[str]:
    return {rollout.engine for group in groups for rollout in group.rollouts}


def _one_is_killed_restarted_and_refilled(fleet: Fleet, policy: Any, chance: random.Random) -> None:
    """`kill -9` in the middle of a step, and the engine holds the step's weights again before the step has ended."""
    victim = chance.randrange(len(fleet.engines))
    name, client = fleet.engines[victim].name, fleet.engines[victim].client
    tree = psutil.Process(fleet.engines[victim].process.pid).children(recursive=True)
    memory = {Path(item.path) for one in tree for item in one.memory_maps() if item.path.startswith("/dev/shm/")}
    step = Step(fleet, policy)
    try:
        assert step.side.publish(1).num_workers == 3
        undisturbed = _texts(step.collect())
        deadline = time.monotonic() + COMEBACK_S
        step.holds_open = lambda: (
            time.monotonic() < deadline
            and (fleet.engines[victim].client is client or step.state(victim) is not State.READY)
        )

        def kill_once_asked() -> None:
            assert client._lean is not None
            while not client._lean._samples:
                time.sleep(0.01)
            _signal(fleet, victim, signal.SIGKILL)

        # It must not hand over tokens before: what is written on from those by others is another text.
        client._sync.post("/pause?mode=keep").raise_for_status()
        killer = threading.Thread(target=kill_once_asked, daemon=True)
        killer.start()
        began = time.monotonic()
        disturbed = step.collect()
        print(f"{name} was killed and wrote again after {time.monotonic() - began:.1f} s, in the same step")
        assert _texts(disturbed) == undisturbed
        assert fleet.engines[victim].client.weight_version == 1 and step.side.publisher.num_proven == 2
        counts = step.rollouts.take_counts()
        assert counts.pop("rollout/samples_reissued") > 0
        assert counts == {"rollout/engines_lost": 1.0, "rollout/engines_restarted": 1.0}
        assert not [one for one in tree if one.is_running()] and not [file for file in memory if file.exists()]

        again = step.collect()
        assert _texts(again) == undisturbed
        assert name in _writers(again)
        with torch.no_grad():
            policy.get_input_embeddings().weight *= 1.1
        report = step.side.publish(2)
        assert report.num_workers == 3 and not report.lost
        after = step.collect()
        assert _texts(after) != undisturbed and len(_writers(after)) == 3
        assert {rollout.weight_version for group in after for rollout in group.rollouts} == {2}
    finally:
        step.close()


async def _cut_and_compare(fleet: Fleet, lines: list[Line]) -> Texts:
    """Return what undisturbed engines write. One of them hands a completion over half-way."""
    async with pool_of(fleet, lines) as (pool, clients):
        undisturbed = await write_all(pool)
        texts = [str(text) for group in undisturbed for text in group]
        assert len(set(texts)) == NUM_PROMPTS * NUM_SAMPLES  # a mix-up would show
        await _cut_and_go_on(clients[0], undisturbed)
        return undisturbed


async def _one_is_lost_and_comes_back(
    fleet: Fleet, lines: list[Line], undisturbed: Texts, chance: random.Random
) -> None:
    victim = chance.randrange(len(lines))
    async with pool_of(fleet, lines) as (pool, clients):
        fate = chance.choice(("frozen", "nonsense", "frozen for a moment"))
        print(f"{fleet.engines[victim].name}: {fate}")
        await _during(pool, clients[victim], undisturbed, lambda: _strike(fleet, lines, victim, fate), chance)
        if fate == "frozen for a moment":
            await asyncio.sleep(MOMENT_S)
            assert all(load.state is not State.DEAD for load in pool.loads())
        else:
            await _until_dead(pool, victim)
            rest = await write_all(pool)
            assert rest == undisturbed  # by the two others alone
    lines[victim].talks_nonsense = False
    _signal(fleet, victim, signal.SIGCONT)


async def _one_after_the_other_is_lost(
    fleet: Fleet, lines: list[Line], undisturbed: Texts, chance: random.Random
) -> None:
    first, second, last = chance.sample(range(len(lines)), 3)
    async with pool_of(fleet, lines) as (pool, clients):
        began = time.monotonic()
        await _during(pool, clients[first], undisturbed, lambda: _strike(fleet, lines, first, "killed"), chance)
        await _until_dead(pool, first)
        print(f"a run in which an engine was killed took {time.monotonic() - began:.1f} s")
        await _during(pool, clients[second], undisturbed, lambda: _strike(fleet, lines, second, "frozen"), chance)
        with pytest.raises(EngineError) as failure:
            await _during(pool, clients[last], undisturbed, lambda: _strike(fleet, lines, last, "killed"), chance)
        said = str(failure.value)
        assert "no engine is left" in said
        assert said.count("ended with status") == 2 and f"{fleet.engines[second].name}: it did not answer" in said


def _strike(fleet: Fleet, lines: list[Line], victim: int, fate: str) -> None:
    if fate == "nonsense":
        lines[victim].talks_nonsense = True
        lines[victim].hang_up()
        return
    _signal(fleet, victim, signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    if fate == "frozen for a moment":
        threading.Timer(MOMENT_S, lambda: _signal(fleet, victim, signal.SIGCONT)).start()


async def _during(
    pool: EnginePool, client: EngineClient, undisturbed: Texts, act: Callable[[], None], chance: random.Random
) -> None:
    """Do something while an engine is writing, and compare what the run writes with what it should.

    When is a matter of how much the engine has written, not of time: at most half of what three engines write each.
    """
    num_all = sum(len(text) for group in undisturbed for text in group)
    moment = await _num_tokens(client) + chance.randrange(num_all // 6)
    task = asyncio.create_task(write_all(pool))
    await _until_written(client, moment, task)
    assert not task.done(), "there was nothing left to disturb"
    act()
    assert await task == undisturbed


async def _until_dead(pool: EnginePool, index: int) -> None:
    """Watch until an engine is given up."""
    async with pool.watching():
        deadline = time.monotonic() + 3 * STALL_S
        while pool.loads()[index].state is not State.DEAD:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def _cut_and_go_on(client: EngineClient, undisturbed: Texts) -> None:
    """Have an engine hand a completion over unfinished and go on with it, as if it had never stopped.

    A completion may end between being seen and being cut, however long it may grow: then another one is tried.
    """
    at_length = replace(SAMPLED, max_tokens=MAX_MODEL_LEN // 2)
    by_length = sorted(
        itertools.product(range(NUM_PROMPTS), range(NUM_SAMPLES)), key=lambda i: -len(undisturbed[i[0]][i[1]])
    )
    for attempt, (prompt, sample) in enumerate(by_length):
        request = replace(requests_of(prompt)[sample], sampling=at_length)
        num_read = len(request.prompt_token_ids)
        before = await _num_tokens(client)
        task = asyncio.create_task(client.generate(go_on(request, [], name=f"a{attempt}")))
        await _until_written(client, before + num_read, task)
        await client.cut(f"a{attempt}")
        part = await task
        if part.finish_reason == "cut":
            rest = await client.generate(go_on(request, [part], name=f"b{attempt}"))
            num_before, whole = len(part.token_ids), join([part, rest]).token_ids.tolist()
            alike = min(num_before, len(undisturbed[prompt][sample]))
            assert whole[:alike] == undisturbed[prompt][sample][:alike]
            assert 0 < num_before < len(whole) <= at_length.max_tokens
            return
    raise AssertionError("no completion could be cut before it ended")


async def _num_tokens(client: EngineClient) -> int:
    """Return how many tokens an engine has read and written so far."""
    num_tokens = (await client.report()).num_tokens
    assert num_tokens is not None
    return num_tokens


async def _until_written(client: EngineClient, num_tokens: int, task: asyncio.Task[Any]) -> None:
    """Wait until an engine has read and written more than so many tokens, or the task has ended before."""
    deadline = time.monotonic() + WAIT_S
    while not task.done() and await _num_tokens(client) <= num_tokens:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def _signal(fleet: Fleet, index: int, number: signal.Signals) -> None:
    for process in processes(fleet, index):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
