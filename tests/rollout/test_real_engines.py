"""Three real vLLM engines, of which some are killed, frozen or made to talk nonsense while they write.

Whatever happens, every prompt yields exactly its samples, and each is what an undisturbed engine writes for its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from shoal.engines.client import EngineClient
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.errors import EngineError
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.health import State
from shoal.rollout.parts import go_on, join
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.types import Rollout, RolloutRequest, SamplingSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STALL_S = 8.0
MOMENT_S = 2.0
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
def fleet(make_spec: Callable[..., EngineSpec], tmp_path: Path) -> Iterator[Fleet]:
    specs = [make_spec(f"engine-{i}", port) for i, port in enumerate(choose_ports(3, None))]
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
    fleet: Fleet, request: pytest.FixtureRequest
) -> None:
    """All in one run of the fleet, whose start takes longer than the rest."""
    chance = random.Random(request.config.getoption("--soak-seed"))
    lines = [Line(engine.spec.port) for engine in fleet.engines]

    async def run() -> None:
        undisturbed = await _cut_and_compare(fleet, lines)
        for _ in range(request.config.getoption("--soak-rounds")):
            await _one_is_lost_and_comes_back(fleet, lines, undisturbed, chance)
        await _one_after_the_other_is_lost(fleet, lines, undisturbed, chance)

    asyncio.run(run())


async def _cut_and_compare(fleet: Fleet, lines: list[Line]) -> Texts:
    """Return what undisturbed engines write. One of them hands a completion over half-way."""
    async with pool_of(fleet, lines) as (pool, clients):
        undisturbed = await write_all(pool)
        texts = [str(text) for group in undisturbed for text in group]
        assert len(set(texts)) == NUM_PROMPTS * NUM_SAMPLES  # a mix-up would show
        # A long one, so that there is something to cut.
        _, prompt, sample = max((len(undisturbed[p][k]), p, k) for p in range(NUM_PROMPTS) for k in range(NUM_SAMPLES))
        num_before, whole = await _cut_and_go_on(clients[0], requests_of(prompt)[sample])
        assert whole[:num_before] == undisturbed[prompt][sample][:num_before]
        assert num_before < len(whole) <= SAMPLED.max_tokens
        return undisturbed


async def _one_is_lost_and_comes_back(
    fleet: Fleet, lines: list[Line], undisturbed: Texts, chance: random.Random
) -> None:
    victim = chance.randrange(len(lines))
    async with pool_of(fleet, lines) as (pool, _):
        fate = chance.choice(("frozen", "nonsense", "frozen for a moment"))
        print(f"{fleet.engines[victim].name}: {fate}")
        await _during(pool, undisturbed, lambda: _strike(fleet, lines, victim, fate), chance)
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
    async with pool_of(fleet, lines) as (pool, _):
        began = time.monotonic()
        await _during(pool, undisturbed, lambda: _strike(fleet, lines, first, "killed"), chance)
        await _until_dead(pool, first)
        print(f"a run in which an engine was killed took {time.monotonic() - began:.1f} s")
        await _during(pool, undisturbed, lambda: _strike(fleet, lines, second, "frozen"), chance)
        with pytest.raises(EngineError) as failure:
            await _during(pool, undisturbed, lambda: _strike(fleet, lines, last, "killed"), chance)
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


async def _during(pool: EnginePool, undisturbed: Texts, act: Callable[[], None], chance: random.Random) -> None:
    """Do something at a random moment of a run, and compare what the run writes with what it should."""
    task = asyncio.create_task(write_all(pool))
    await asyncio.sleep(chance.uniform(0.05, 1.0))
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


async def _cut_and_go_on(client: EngineClient, request: RolloutRequest) -> tuple[int, list[int]]:
    """Have an engine hand a completion over half-way and go on with it; return where, and the whole."""
    parts: list[Rollout] = []
    task = asyncio.create_task(client.generate(go_on(request, parts, name="a")))
    await asyncio.sleep(0.1)
    await client.cut("a")
    parts.append(await task)
    assert parts[0].finish_reason == "cut"
    assert 0 < len(parts[0].token_ids) < SAMPLED.max_tokens
    parts.append(await client.generate(go_on(request, parts, name="b")))
    return len(parts[0].token_ids), join(parts).token_ids.tolist()


def _signal(fleet: Fleet, index: int, number: signal.Signals) -> None:
    for process in processes(fleet, index):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
