"""Engines and trainers that are killed or stopped in the middle of a publish, as processes of their own.

Two engines, of one worker and of two. Whom it hits and when is drawn: `--num-kills` and `--kills-seed`. At the end a
table says what became of each, and `--kills-report` stores it. In CI a worker of the engine with two is stopped;
`pytest --all` stops the other engine's only one too.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet, ManagedEngine
from shoal.engines.process import choose_ports

pytestmark = pytest.mark.engine

TRAINER = Path(__file__).with_name("robustness") / "trainer.py"
TIMEOUT_S = 15.0
"""Of each step of a publish, which takes half a second to one where the machine does nothing else."""
END_S = TIMEOUT_S + 15.0
"""Longest that a publish may take that loses an engine: the time-out of the step that fails, and the other steps."""
STALL_S = 30.0
# About a hundred megabytes, in some hundred batches: one publish takes half a second to one.
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 16}
BATCH_BYTES = 1 << 20

# What an engine is told, or answers, as a phase of its publish begins. How long pausing takes, the report says.
PHASES = {
    "pause": ("call", "/shoal/receive"),
    "wire": ("call", "/shoal/receive"),
    "prove": ("answer", "/shoal/receive"),
    "resume": ("call", "/resume"),
}
AIMED_AT = ("wire", "pause", "wire", "prove", "wire", "resume")

Event = dict[str, Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--num-kills")))
    if "stalled_worker" in metafunc.fixturenames:
        workers = [("engine-1", 1), ("engine-0", 0)]
        metafunc.parametrize("stalled_worker", workers[: 2 if metafunc.config.getoption("--all") else 1], ids=str)


class TrainerProcess:
    """One rank of `robustness/trainer.py`: what it is told, and what it tells."""

    def __init__(self, settings: Mapping[str, Any], log_path: Path, **environment: str) -> None:
        self.log_path = log_path
        self.events: list[Event] = []
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(TRAINER), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                text=True,
            )
        self.pid = self._process.pid
        self._queue: queue.Queue[Event] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, do: str, **more: Any) -> None:
        """Give it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | more) + "\n")
        self._process.stdin.flush()

    def wait_for(self, event: str, *, timeout_s: float, **wanted: Any) -> Event:
        """Wait until it tells of this."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                told = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"the trainer did not tell of {event} {wanted} within {timeout_s:g} s; its last words: "
                    f"{self.events[-5:]} {self.log_path.read_text()[-2000:]}"
                ) from None
            if told["event"] == event and wanted.items() <= told.items():
                return told
            assert told["event"] != "failed", told

    def do(self, do: str, *, timeout_s: float = 3 * END_S, **more: Any) -> Event:
        """Give it a command and wait until that is done."""
        self.tell(do, **more)
        return self.wait_for("done", timeout_s=timeout_s)

    def kill(self) -> float:
        """End it the hard way; return when."""
        self._process.kill()
        killed_at = time.monotonic()
        self._process.wait(timeout=60)
        self._reader.join(timeout=60)  # what it had told by then
        return killed_at

    def ended(self, timeout_s: float) -> int:
        """Wait until it ends by itself, and return how."""
        status = self._process.wait(timeout=timeout_s)
        self._reader.join(timeout=60)
        return status

    def close(self) -> None:
        """Have it end; it has no other way to know that this process is gone."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=2 * TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"event"'):
                told = json.loads(line)
                self.events.append(told)
                self._queue.put(told)


class Scene:
    """Engines, each a fleet of its own so that it can be replaced, and the trainer that publishes to them."""

    def __init__(self, specs: list[EngineSpec], folder: Path) -> None:
        self.folder = folder
        self._specs = {spec.name: spec for spec in specs}
        self._fleets: dict[str, Fleet] = {}
        self._trainer: TrainerProcess | None = None
        self._standby: TrainerProcess | None = None
        self._version = 0
        self._text: object = None
        self.start_engines()

    @property
    def names(self) -> list[str]:
        return sorted(self._specs)

    def engine(self, name: str) -> ManagedEngine:
        return self._fleets[name].engines[0]

    def start_engines(self) -> None:
        """Start those that are not there."""
        for name in sorted(self._specs.keys() - self._fleets.keys()):
            self._fleets[name] = Fleet.start(
                [self._specs[name]], log_dir=self.folder, timeout_s=300, request_timeout_s=60
            )

    def end_engine(self, name: str) -> None:
        self._fleets.pop(name).close()

    def described(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "url": engine.client.url,
                "key": engine.client._sync.headers["authorization"].removeprefix("Bearer "),
                "log": str(engine.process.log_path),
                "workers": engine.spec.num_workers,
            }
            for name in self.names
            for engine in self._fleets[name].engines
        ]

    def start_trainer(self, **environment: str) -> TrainerProcess:
        settings = {
            "model_dir": str(self._specs["engine-0"].model_dir),
            "timeout_s": TIMEOUT_S,
            "batch_bytes": BATCH_BYTES,
        }
        return TrainerProcess(settings, self.folder / "trainer.log", **environment)

    def trainer(self) -> TrainerProcess:
        """Return a trainer that is connected to all engines and has published to them."""
        self.start_engines()
        if self._trainer is None:
            self._trainer, self._standby = self.have_standby(), None
        connected = self._trainer.do("connect", engines=self.described())
        assert "error" not in connected, connected
        assert self.publish(self._trainer)["proven"] == self.names
        return self._trainer

    def have_standby(self) -> TrainerProcess:
        """Return a trainer that is ready to take over, and has met nobody yet."""
        if self._standby is None:
            self._standby = self.start_trainer()
            self._standby.wait_for("ready", timeout_s=300)
        return self._standby

    def drop_trainer(self) -> None:
        """Know no trainer from now on."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.close()

    def next_version(self) -> int:
        self._version += 1
        return self._version

    def publish(self, trainer: TrainerProcess) -> Event:
        return trainer.do("publish", version=self.next_version())

    def prove_text(self, trainer: TrainerProcess, engines: list[str]) -> None:
        """Check that these engines write what transformers writes, and no longer what they wrote the last time."""
        compared = trainer.do("compare", timeout_s=300)
        assert compared.get("equal") == engines, compared
        assert compared["text"] != self._text
        self._text = compared["text"]

    def shortened(self, said: str) -> str:
        return said.replace(f"{self.folder}/", "")

    def durations(self, trainer: TrainerProcess, name: str) -> dict[str, float]:
        """Measure how long the phases of a publish take one engine: medians of three."""
        measured: dict[str, list[float]] = {phase: [] for phase in PHASES}
        for _ in range(3):
            num_before = len(trainer.events)
            done = self.publish(trainer)
            starts = phase_starts(trainer.events[num_before:], name, done["phases"]["pause"])
            for (phase, start), (_, end) in zip(starts, [*starts[1:], ("", done["at"])], strict=True):
                measured[phase].append(end - start)
        return {phase: statistics.median(values) for phase, values in measured.items()}

    def close(self) -> None:
        for trainer in (self._trainer, self._standby):
            if trainer is not None:
                trainer.close()
        for name in tuple(self._fleets):
            self.end_engine(name)


@pytest.fixture(scope="module")
def scene(
    make_served_model: Callable[..., Any],
    make_spec: Callable[..., EngineSpec],
    tmp_path_factory: pytest.TempPathFactory,
    served_model_dir: Path,
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("robustness")
    config = make_served_model(**LARGE).config
    model_dir = folder / "model"
    config.save_pretrained(model_dir)
    for file in served_model_dir.glob("token*"):
        (model_dir / file.name).write_bytes(file.read_bytes())
    ports = choose_ports(2, None)
    scene = Scene(
        [
            make_spec("engine-0", ports[0], model_dir=model_dir),
            make_spec("engine-1", ports[1], model_dir=model_dir, tensor_parallel_size=2),
        ],
        folder,
    )
    try:
        yield scene
    finally:
        scene.close()


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.config.getoption('--kills-seed')} {request.node.name}")


def phase_starts(events: list[Event], engine: str, pause_s: float) -> list[tuple[str, float]]:
    """List the phases that a publish has reached at one engine, and when each began."""
    told = {
        (event["event"], event["what"]): event["at"]
        for event in reversed(events)
        if event["event"] in ("call", "answer") and event["engine"] == engine
    }
    return [
        (phase, told[start] + (pause_s if phase == "wire" else 0.0)) for phase, start in PHASES.items() if start in told
    ]


def phase_at(events: list[Event], engine: str, durations: Mapping[str, float], at: float) -> str:
    """Name the phase that one engine's publish was in."""
    starts = phase_starts(events, engine, durations["pause"])
    return next((phase for phase, start in reversed(starts) if start <= at), "before")


def stood_still_s(events: list[Event], engines: list[str]) -> str:
    """Say how long a publish has kept engines from writing."""
    told = {(event["engine"], event["event"], event["what"]): event["at"] for event in events if "what" in event}
    spans = [
        told[engine, "answer", "/resume"] - told[engine, "call", "/shoal/receive"]
        for engine in engines
        if (engine, "answer", "/resume") in told
    ]
    return f"{max(spans):.2f}" if spans else "-"


def wait_for_moment(
    trainer: TrainerProcess, engine: str, phase: str, durations: Mapping[str, float], draw: random.Random
) -> None:
    """Wait until a drawn moment of this phase of the publish under way."""
    event, what = PHASES[phase]
    trainer.wait_for(event, engine=engine, what=what, timeout_s=END_S)
    time.sleep((durations["pause"] if phase == "wire" else 0.0) + draw.uniform(0.0, durations[phase]))


def processes_of(engine: ManagedEngine) -> dict[str, psutil.Process]:
    """Return what can be killed of an engine, by name: the server, the core and the workers."""
    (server,) = psutil.Process(engine.process.pid).children()
    found = {"server": server}
    for child in server.children(recursive=True):
        title = " ".join(child.cmdline())
        if match := re.search(r"VLLM::(EngineCore|Worker\w*)", title):
            number = re.search(r"TP(\d)", title)
            found["core" if match[1] == "EngineCore" else f"worker {number[1] if number else 0}"] = child
    assert len(found) == 2 + engine.spec.num_workers, found
    return found


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Return what they have mapped of the memory that outlives processes."""
    maps = (one.memory_maps() for one in processes)
    return {Path(item.path) for items in maps for item in items if item.path.startswith("/dev/shm/")}


def left_of(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Return those that are still there after so long; the dead that nobody has fetched are not."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def test_the_others_hold_the_new_weights_when_an_engine_is_killed_in_a_publish(
    scene: Scene, number: int, draw: random.Random, kills: list[dict[str, object]]
) -> None:
    trainer = scene.trainer()
    name = draw.choice(scene.names)
    what, victim = draw.choice(sorted(processes_of(scene.engine(name)).items()))
    tree = [psutil.Process(scene.engine(name).process.pid)]
    tree += tree[0].children(recursive=True)
    memory = shared_memory_of(tree)
    aimed = AIMED_AT[number % len(AIMED_AT)]
    durations = scene.durations(trainer, name)
    others = [other for other in scene.names if other != name]
    num_before = len(trainer.events)

    trainer.tell("publish", version=scene.next_version())
    wait_for_moment(trainer, name, aimed, durations, draw)
    os.kill(victim.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    hit = trainer.wait_for("done", timeout_s=3 * END_S)
    events = trainer.events[num_before:]
    following = scene.publish(trainer)
    kills.append(
        {
            "killed": f"{name} {what}",
            "phase": phase_at(events, name, durations, killed_at),
            "publish ended after s": round(hit["at"] - killed_at, 2),
            "others stood still s": stood_still_s(events, others),
            "next proven by": ", ".join(following.get("proven", ())) or "nobody",
            "next s": round(following["seconds"], 2),
            "said": scene.shortened(hit.get("error") or " ".join(hit["lost"].values()) or "(the publish was over)"),
        }
    )

    lost = hit.get("lost", {}) | following.get("lost", {})
    assert list(lost) == [name] and name in lost[name], (hit, following)
    assert following["proven"] == others
    assert hit["proven"] == (others if hit["lost"] else scene.names)
    assert hit["seconds"] < END_S
    scene.prove_text(trainer, others)
    scene.end_engine(name)
    assert not left_of(tree, timeout_s=0.0)
    assert not {file for file in memory if file.exists()}


def test_the_next_trainer_takes_over_the_engines_when_one_is_killed_in_a_publish(
    scene: Scene, number: int, draw: random.Random, kills: list[dict[str, object]]
) -> None:
    trainer, following = scene.trainer(), scene.have_standby()
    name = draw.choice(scene.names)
    aimed = AIMED_AT[number % len(AIMED_AT)]
    durations = scene.durations(trainer, name)
    children = psutil.Process(trainer.pid).children(recursive=True)
    engines = [psutil.Process(scene.engine(name).process.pid).create_time() for name in scene.names]
    num_before = len(trainer.events)

    trainer.tell("publish", version=scene.next_version())
    wait_for_moment(trainer, name, aimed, durations, draw)
    killed_at = trainer.kill()
    assert not left_of(children, timeout_s=END_S)
    scene.drop_trainer()
    assert all(scene.engine(name).client.is_healthy() for name in scene.names)
    connected = following.do("connect", engines=scene.described())
    published = scene.publish(following)
    kills.append(
        {
            "killed": "trainer",
            "phase": phase_at(trainer.events[num_before:], name, durations, killed_at) + f" of {name}",
            "publish ended after s": round(connected["at"] - killed_at, 2),
            "others stood still s": "-",
            "next proven by": ", ".join(published.get("proven", ())) or "nobody",
            "next s": round(published["seconds"], 2),
            "said": scene.shortened(connected.get("error") or published.get("error") or "(taken over)"),
        }
    )

    assert "error" not in connected, connected
    assert published.get("proven") == scene.names, published
    scene.prove_text(following, scene.names)
    assert [psutil.Process(scene.engine(name).process.pid).create_time() for name in scene.names] == engines


def test_a_worker_that_stalls_is_named_and_costs_the_other_engine_nothing(
    scene: Scene, stalled_worker: tuple[str, int], draw: random.Random, kills: list[dict[str, object]]
) -> None:
    name, what = stalled_worker[0], f"worker {stalled_worker[1]}"
    trainer = scene.trainer()
    stalled = processes_of(scene.engine(name))[what]
    others = [other for other in scene.names if other != name]
    durations = scene.durations(trainer, name)
    num_before = len(trainer.events)
    trainer.tell("publish", version=scene.next_version())
    wait_for_moment(trainer, name, "wire", durations | {"wire": durations["wire"] / 2}, draw)
    stalled.suspend()
    stopped_at = time.monotonic()
    try:
        hit = trainer.wait_for("done", timeout_s=3 * END_S)
        events = trainer.events[num_before:]
        following = scene.publish(trainer)
        scene.prove_text(trainer, others)
        time.sleep(max(0.0, stopped_at + STALL_S - time.monotonic()))
    finally:
        stalled.resume()
    kills.append(
        {
            "killed": f"{name} {what} (stopped for {STALL_S:g} s)",
            "phase": phase_at(events, name, durations, stopped_at),
            "publish ended after s": round(hit["at"] - stopped_at, 2),
            "others stood still s": stood_still_s(events, others),
            "next proven by": ", ".join(following.get("proven", ())) or "nobody",
            "next s": round(following["seconds"], 2),
            "said": scene.shortened(hit.get("error") or " ".join(hit["lost"].values()) or "(the publish was over)"),
        }
    )

    lost = hit["lost"] | following["lost"]  # the one that was aimed at may have been over
    assert list(lost) == [name], (hit, following)
    assert re.findall(r"engine-\d worker \d", lost[name].partition(" did not ")[0]) == [f"{name} {what}"], lost[name]
    assert hit["proven"] == (others if hit["lost"] else scene.names)
    assert following["proven"] == others
    assert max(hit["seconds"], following["seconds"]) < END_S and not (hit["lost"] and following["lost"])
    # The stalled one has not ended: it is taken in again.
    again = scene.trainer()
    scene.prove_text(again, scene.names)


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_trainer_rank_raises_and_ends_when_another_is_killed_in_a_publish(
    scene: Scene, killed_rank: int, draw: random.Random, kills: list[dict[str, object]]
) -> None:
    scene.start_engines()
    scene.drop_trainer()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        scene.start_trainer(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]
    following = scene.have_standby()
    try:
        for rank in ranks:
            rank.wait_for("ready", timeout_s=300)
        assert "error" not in (connected := ranks[0].do("connect", engines=scene.described())), connected
        durations = scene.durations(ranks[0], "engine-1")
        num_before = len(ranks[0].events)
        ranks[0].tell("publish", version=scene.next_version())
        wait_for_moment(ranks[0], "engine-1", "wire", durations, draw)
        killed_at = ranks[killed_rank].kill()
        survivor = ranks[1 - killed_rank]
        if killed_rank != 0:
            with suppress(OSError):  # it may have ended already; and if the publish was just over, this is the next one
                ranks[0].tell("publish", version=scene.next_version())
        failed = survivor.wait_for("failed", timeout_s=3 * END_S)
        status = survivor.ended(timeout_s=3 * END_S)
        ended_at = time.monotonic()
    finally:
        for rank in ranks:
            rank.close()
    connected = following.do("connect", engines=scene.described())
    published = scene.publish(following)
    kills.append(
        {
            "killed": f"trainer rank {killed_rank} of 2",
            "phase": phase_at(ranks[0].events[num_before:], "engine-1", durations, killed_at),
            "publish ended after s": round(failed["at"] - killed_at, 2),
            "others stood still s": "-",
            "next proven by": ", ".join(published.get("proven", ())) or "nobody",
            "next s": round(published["seconds"], 2),
            "said": scene.shortened(failed["error"]),
        }
    )

    assert failed["error"].startswith(("RankLostError", "WeightSyncError")) and status != 0
    assert failed["at"] - killed_at < END_S and ended_at - killed_at < END_S
    assert published.get("proven") == scene.names, (connected, published)
    scene.prove_text(following, scene.names)
