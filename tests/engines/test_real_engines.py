"""Real vLLM engines: who may talk to them, and that nothing of them is left however the trainer ends.

Small "trainers", one for each way to end, start an engine each side by side (starting is mostly importing) and wait.
While they do, the engines' routes, sockets and command lines are looked at; then each trainer ends in its way. In CI
one unwinds and one is gone at once; `pytest --all` ends one in each of the five ways.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest

from shoal.engines.client import EngineClient
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.errors import EngineFaultError, EngineRequestError, EngineStartError
from shoal.types import Rollout, RolloutRequest, SamplingSettings
from shoal.vllm_plugin.gate import KEY_VARIABLE

pytestmark = pytest.mark.engine

ENDINGS = ("normal", "exception", "SIGINT", "SIGTERM", "SIGKILL")
IN_CI = ("SIGINT", "SIGKILL")
# Tokens that an engine takes. No machine is so slow to ask, nor so fast to write, that a completion of this length is
# over when it is looked for.
MAX_MODEL_LEN = 1024
LONGEST = 1000
WAIT_S = 120.0
"""Longest that a test waits for what comes at once on an idle machine."""
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

TRAINER = """
import signal, sys, time
from pathlib import Path
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
# A shell ignores Ctrl-C for what it runs in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ending, model_dir, port, log_dir, core = sys.argv[1:]
spec = EngineSpec(
    name=f"engine-{ending}", model_dir=Path(model_dir), port=int(port), cuda_devices=(), cpu_cores=(int(core),),
    tensor_parallel_size=1, pipeline_parallel_size=1, dtype="float32", max_model_len=1024, gpu_memory_utilization=0.9,
    cpu_kv_cache_gib=1, seed=0, extra_arguments={},
)
with Fleet.start([spec], log_dir=Path(log_dir), timeout_s=500, request_timeout_s=60) as fleet:
    print(fleet.engines[0].client._sync.headers["authorization"].removeprefix("Bearer "), flush=True)
    sys.stdin.readline()
    if ending == "exception":
        raise RuntimeError("training failed")
    if ending != "normal":
        time.sleep(600)
"""


@dataclass(frozen=True)
class Trainer:
    """A process that owns one ready engine."""

    ending: str
    process: subprocess.Popen[str]
    port: int
    log_path: Path
    key: str
    descendants: tuple[psutil.Process, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def still_there(processes: tuple[psutil.Process, ...]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def ready(ending: str, process: subprocess.Popen[str], port: int, logs: Path) -> Trainer:
    assert process.stdout is not None
    key = process.stdout.readline().strip()
    assert len(key) == 64, f"{ending}: its engine did not start, see {logs}"
    descendants = tuple(psutil.Process(process.pid).children(recursive=True))
    return Trainer(
        ending=ending,
        process=process,
        port=port,
        log_path=logs / f"engine-{ending}.log",
        key=key,
        descendants=descendants,
    )


def endings(config: pytest.Config) -> tuple[str, ...]:
    return ENDINGS if config.getoption("--all") else IN_CI


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ending" in metafunc.fixturenames:
        metafunc.parametrize("ending", endings(metafunc.config))


@pytest.fixture(scope="module")
def trainers(
    served_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[dict[str, Trainer]]:
    logs = tmp_path_factory.mktemp("logs")
    model_dir = change_config(served_model_dir, logs / "model", max_position_embeddings=MAX_MODEL_LEN)
    names = endings(pytestconfig)
    ports = choose_ports(len(names), None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, ending, str(model_dir), str(port), str(logs), str(index % 2)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, (ending, port) in enumerate(zip(names, ports, strict=True))
    ]
    started: dict[str, Trainer] = {}
    try:
        for ending, process, port in zip(names, processes, ports, strict=True):
            started[ending] = ready(ending, process, port, logs)
        yield started
    finally:
        for process in processes:
            process.kill()  # the guards end what is left
            process.wait()


def routes_of(trainer: Trainer) -> set[tuple[str, str]]:
    """Return every (method, path) that the engine says it has: in its description, and in its log."""
    headers = {"Authorization": f"Bearer {trainer.key}"}
    description = httpx.get(f"{trainer.url}/openapi.json", headers=headers, timeout=10, trust_env=False).json()
    described = {(method.upper(), path) for path, methods in description["paths"].items() for method in methods}
    logged = {
        (method, match.group(1))
        for match in re.finditer(r"Route: (\S+), Methods: (.+)", trainer.log_path.read_text())
        for method in match.group(2).split(", ")
    }
    return described | logged


def test_every_route_of_a_real_engine_refuses_whoever_does_not_have_the_key(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["SIGINT"]
    routes = routes_of(trainer) | {("GET", path) for path in ("/metrics", "/docs", "/redoc", "/", "/nowhere")}
    for path in ("/pause", "/resume", "/update_weights", "/init_weight_transfer_engine", "/collective_rpc", "/sleep"):
        assert ("POST", path) in routes
    assert len(routes) > 30
    # Shoal's own, which the engine does not list.
    routes |= {("POST", f"/shoal/{name}") for name in ("receive", "generate", "hold")} | {("GET", "/shoal/about")}
    with httpx.Client(base_url=trainer.url, timeout=10, trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {trainer.key[:-1]}"}):
            for method, path in sorted(routes):
                answer = client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                assert answer.status_code == 401, f"{method} {path} with {list(headers)}"
        right = {"Authorization": f"Bearer {trainer.key}"}
        assert client.get("/health", headers=right).status_code == 200  # the control: the key opens them
        assert client.get("/v1/models", headers=right).json()["data"][0]["id"] == "policy"
        assert client.get("/is_paused", headers=right).json() == {"is_paused": False}  # nobody got through to /pause


def test_any_openai_client_can_talk_to_an_engine_with_the_key_and_gets_401_without(
    trainers: dict[str, Trainer],
) -> None:
    trainer = trainers["SIGINT"]

    def ask(key: str) -> str:
        with httpx.Client(trust_env=False) as connection:
            client = openai.OpenAI(base_url=f"{trainer.url}/v1", api_key=key, http_client=connection, max_retries=0)
            answer = client.completions.create(model="policy", prompt="abc", max_tokens=5, temperature=0.0, seed=1)
        assert answer.usage is not None
        return f"{answer.usage.completion_tokens} tokens, {answer.choices[0].finish_reason}"

    assert ask(trainer.key) in ("5 tokens, length", *(f"{number} tokens, stop" for number in range(6)))
    for key in ("wrong", trainers["SIGKILL"].key):
        with pytest.raises(openai.AuthenticationError, match="401"):
            ask(key)


def test_the_key_of_one_run_does_not_open_anothers_engine(trainers: dict[str, Trainer]) -> None:
    assert len({trainer.key for trainer in trainers.values()}) == len(trainers)
    other = {"Authorization": f"Bearer {trainers['SIGKILL'].key}"}
    assert httpx.get(f"{trainers['SIGINT'].url}/health", headers=other, trust_env=False).status_code == 401


def test_the_key_is_on_no_command_line_and_in_no_log(trainers: dict[str, Trainer]) -> None:
    keys = {trainer.key for trainer in trainers.values()}
    looked_at = 0
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        looked_at += "engine-" in line or "VLLM" in line
        assert not any(key in line for key in keys), process
    assert looked_at >= len(trainers)
    for trainer in trainers.values():
        log = trainer.log_path.read_text()
        assert "Application startup complete" in log
        assert trainer.key not in log
        # The control: it is the key, and the engine has it.
        assert any(p.environ().get(KEY_VARIABLE) == trainer.key for p in still_there(trainer.descendants))


def test_nothing_of_a_real_engine_listens_beyond_loopback(trainers: dict[str, Trainer]) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for trainer in trainers.values()
        for process in [psutil.Process(trainer.process.pid), *still_there(trainer.descendants)]
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {trainer.port for trainer in trainers.values()} <= {port for _, port in listening}
    assert {ip for ip, _ in listening} <= LOOPBACK


# ---- completions by our own route ----


def client_to(trainer: Trainer, *, has_plugin: bool) -> EngineClient:
    return EngineClient(
        name="e", url=trainer.url, api_key=trainer.key, log_path=None, request_timeout_s=60, has_plugin=has_plugin
    )


def asked(
    seed: int, temperature: float = 1.0, *, prompt: int = 0, name: str = "", most: int = 100, stops: bool = True
) -> RolloutRequest:
    ids = tuple(3 + (prompt * 29 + 7 * place) % 250 for place in range(12))
    stop = (17,) if stops else ()
    sampling = SamplingSettings(temperature=temperature, max_tokens=most, stop_token_ids=stop)
    return RolloutRequest(prompt_token_ids=ids, seed=seed, sampling=sampling, name=name)


async def tokens_more(client: EngineClient, number: int) -> None:
    """Wait until the engine has read and written so many tokens more."""
    before = (await client.report()).num_tokens
    assert before is not None
    async with asyncio.timeout(WAIT_S):
        while ((await client.report()).num_tokens or 0) < before + number:
            await asyncio.sleep(0.05)


async def running_now(client: EngineClient, number: int) -> None:
    """Wait until the engine says that it writes so many completions, which are to be too long to end meanwhile."""
    async with asyncio.timeout(WAIT_S):
        while (await client.report()).running != number:
            await asyncio.sleep(0.05)


def test_our_own_route_writes_what_vllms_route_writes_token_for_token(trainers: dict[str, Trainer]) -> None:
    requests = [asked(seed, temperature, prompt=seed % 3) for seed in range(8) for temperature in (0.0, 0.7, 1.0)]

    async def run() -> tuple[list[Rollout], list[Rollout]]:
        ours, stock = (client_to(trainers["SIGINT"], has_plugin=has_plugin) for has_plugin in (True, False))
        try:
            return (
                await asyncio.gather(*map(ours.generate, requests)),
                await asyncio.gather(*map(stock.generate, requests)),
            )
        finally:
            await ours.aclose()
            await stock.aclose()

    ours, stock = asyncio.run(run())
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        # Of the same engine, but of batches that were put together otherwise.
        np.testing.assert_allclose(mine.rollout_logprobs, theirs.rollout_logprobs, atol=1e-4)
        assert mine.finish_reason == theirs.finish_reason
    assert {rollout.finish_reason for rollout in ours} == {"stop", "length"}
    # Dummy weights are nearly uniform: a seed decides, whatever the prompt. A mix-up of seeds would show.
    assert len({str(rollout.token_ids) for rollout in ours}) > 8


def test_a_real_engine_hands_over_what_it_has_and_frees_the_slots_of_those_who_leave(
    trainers: dict[str, Trainer],
) -> None:
    def endless(seed: int, name: str = "", most: int = LONGEST) -> RolloutRequest:
        return asked(seed, name=name, most=most, stops=False)

    async def run() -> None:
        client = client_to(trainers["SIGINT"], has_plugin=True)
        try:
            start = (await client.generate(endless(5, most=100))).token_ids.tolist()
            long = asyncio.create_task(client.generate(endless(5, "long")))
            other = asyncio.create_task(client.generate(endless(6, "other")))
            await running_now(client, 2)
            await tokens_more(client, 50)
            await client.cut("long")
            part = await long
            assert part.finish_reason == "cut" and 0 < len(part.token_ids) < LONGEST
            assert part.token_ids.tolist()[: len(start)] == start[: len(part.token_ids)]
            await running_now(client, 1)
            other.cancel()
            await running_now(client, 0)
            tasks = [asyncio.create_task(client.generate(endless(seed))) for seed in range(3)]
            await running_now(client, 3)
            tasks[0].cancel()
            await running_now(client, 2)
            for task in tasks:
                task.cancel()
            await running_now(client, 0)
            gone = client_to(trainers["SIGINT"], has_plugin=True)
            task = asyncio.create_task(gone.generate(endless(7)))
            await running_now(client, 1)
            await gone._async.aclose()  # as if its process were gone: the connection breaks
            await running_now(client, 0)
            await asyncio.gather(other, task, *tasks, return_exceptions=True)
        finally:
            await client.aclose()

    asyncio.run(run())


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[" * 100_000, b'{"model":"policy","salt":"","flush_tokens":1,"prompts":[[]],"samples":[]}']
)
def test_a_malformed_order_gets_a_400_from_a_real_engine(body: bytes, trainers: dict[str, Trainer]) -> None:
    headers = {"Authorization": f"Bearer {trainers['SIGINT'].key}"}
    url = f"{trainers['SIGINT'].url}/shoal/generate"
    answer = httpx.post(url, content=body, headers=headers, timeout=10, trust_env=False)
    assert answer.status_code == 400 and "error" in answer.json()


def test_a_real_engine_refuses_one_sample_and_writes_the_others(trainers: dict[str, Trainer]) -> None:
    requests = [
        asked(1),
        replace(asked(2), prompt_token_ids=(5, 100_000)),
        replace(asked(3), prompt_token_ids=(5,) * (MAX_MODEL_LEN + 1)),
    ]

    async def run() -> list[Rollout | BaseException]:
        client = client_to(trainers["SIGINT"], has_plugin=True)
        try:
            return await asyncio.gather(*map(client.generate, requests), return_exceptions=True)
        finally:
            await client.aclose()

    fine, unknown, long = asyncio.run(run())
    assert isinstance(fine, Rollout)
    for refused, says in ((unknown, "vocabulary"), (long, "maximum model length")):
        assert isinstance(refused, EngineRequestError) and not isinstance(refused, EngineFaultError)
        assert says in str(refused)


def test_no_process_and_no_port_is_left_however_the_trainer_ends(ending: str, trainers: dict[str, Trainer]) -> None:
    trainer = trainers[ending]
    assert len(still_there(trainer.descendants)) >= 3  # guard, server, engine core at least
    assert httpx.get(f"{trainer.url}/health", trust_env=False).status_code == 401
    assert trainer.process.stdin is not None
    trainer.process.stdin.write("go on\n")
    trainer.process.stdin.flush()
    if ending.startswith("SIG"):
        time.sleep(0.2)
        trainer.process.send_signal(signal.Signals[ending])
    trainer.process.wait(timeout=WAIT_S)
    statuses = {"normal": {0}, "exception": {1}, "SIGINT": {-2, 130, 1}, "SIGTERM": {-15}, "SIGKILL": {-9}}
    assert trainer.process.returncode in statuses[ending]
    if ending in ("normal", "exception"):
        assert still_there(trainer.descendants) == []  # the trainer itself waited for them
    deadline = time.monotonic() + WAIT_S
    while (left := still_there(trainer.descendants)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert choose_ports(1, trainer.port) == [trainer.port]


def change_config(folder: Path, into: Path, **entries: object) -> Path:
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    config = json.loads((into / "config.json").read_text()) | entries
    (into / "config.json").write_text(json.dumps(config))
    return into


def test_a_model_that_vllm_does_not_know_is_an_error_that_says_so_and_ends_the_other_engine_too(
    served_model_dir: Path, make_spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    bad = change_config(served_model_dir, tmp_path / "bad", architectures=["NobodyKnowsForCausalLM"])
    ports = choose_ports(2, None)
    specs = [make_spec("engine-0", ports[0]), make_spec("engine-1", ports[1], model_dir=bad)]
    told: list[list[tuple[str, str]]] = []
    with pytest.raises(EngineStartError) as failure:
        Fleet.start(
            specs,
            log_dir=tmp_path / "logs",
            timeout_s=300,
            request_timeout_s=10,
            on_progress=lambda stages, seconds: told.append(list(stages)),
        )
    message = str(failure.value)
    assert "engine-1 could not start" in message
    assert "NobodyKnowsForCausalLM" in message and "not supported" in message
    assert str(tmp_path / "logs" / "engine-1.log") in message
    assert_nothing_left(tmp_path, ports)
    assert [name for name, _ in told[0]] == ["engine-0", "engine-1"]
    assert told[0][0][1] == "importing vLLM"


def test_a_corrupt_config_is_an_error_that_names_it(
    served_model_dir: Path, make_spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    bad = change_config(served_model_dir, tmp_path / "bad")
    (bad / "config.json").write_text("{not json")
    ports = choose_ports(1, None)
    with pytest.raises(EngineStartError, match=r"engine-0 could not start.*config\.json.*JSON"):
        Fleet.start(
            [make_spec("engine-0", ports[0], model_dir=bad)],
            log_dir=tmp_path / "logs",
            timeout_s=300,
            request_timeout_s=10,
        )
    assert_nothing_left(tmp_path, ports)


def test_an_engine_that_is_not_ready_in_time_is_ended_and_its_stage_is_named(
    make_spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    ports = choose_ports(1, None)
    with pytest.raises(
        EngineStartError, match=r"engine-0 not ready after 1 s \(engine-0: importing vLLM\).*engine-0\.log"
    ):
        Fleet.start([make_spec("engine-0", ports[0])], log_dir=tmp_path / "logs", timeout_s=1, request_timeout_s=10)
    assert_nothing_left(tmp_path, ports)


def assert_nothing_left(tmp_path: Path, ports: list[int]) -> None:
    """Check that no child of this process serves a model, and that the ports are free."""
    children = psutil.Process().children(recursive=True)
    lines = [" ".join(child.cmdline()) for child in children if child.status() != psutil.STATUS_ZOMBIE]
    for port in ports:
        assert not any(f"--port {port}" in line for line in lines), lines
        assert choose_ports(1, port) == [port]
