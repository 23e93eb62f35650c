"""Trainers on the CPU that attach to real engines which others have started, and leave them as usable as they were.

One engine of `shoal serve` for all of it. `pytest --all` starts a vLLM server without Shoal's plugin beside it, which
is refused on CPUs; in CI the engine answers what such a server is asked, and tests/engines/test_attach.py refuses one.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from shoal import GRPOTrainer, vllm_compat
from shoal.engines.probe import _stock_facts, probe
from shoal.engines.process import choose_ports
from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.vllm_plugin.gate import KEY_VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

START_S = 400.0
NUM_TOKENS = 24
PROMPTS = [[*range(70, 90)], [5], [3 + (7 * i) % 250 for i in range(60)]]

HOLDER = """
import sys
from shoal.engines.attached import Hold
from shoal.engines.client import EngineClient

url, key = sys.argv[1], sys.stdin.readline().strip()
hold = Hold(url, key)
client = EngineClient(name="e", url=url, api_key=key, log_path=None, request_timeout_s=30)
client.post("/pause?mode=keep&clear_cache=false", None, 30)
print("paused", flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Served:
    """A running server, and maybe one without Shoal's plugin."""

    url: str
    plain_url: str | None
    key: str
    key_file: Path
    process: subprocess.Popen[str]
    log: Path

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.get(self.url + path, headers=headers, timeout=30, trust_env=False).raise_for_status().json()

    def greedy(self) -> list[list[int]]:
        """Ask for completions as anybody would, with the `openai` package."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, http_client=httpx.Client(trust_env=False))
        answers = [
            client.completions.create(
                model="policy",
                prompt=prompt,
                temperature=0.0,
                max_tokens=NUM_TOKENS,
                extra_body={"return_token_ids": True, "stop_token_ids": [2], "cache_salt": secrets.token_hex(4)},
            )
            for prompt in PROMPTS
        ]
        return [answer.choices[0].model_extra["token_ids"] for answer in answers]


def ready(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code in (200, 401):
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def served(
    served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    key_file = folder / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(secrets.token_hex(32) + "\n")
    port, plain_port = choose_ports(2, None)
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    ours = [
        *(sys.executable, "-m", "shoal", "serve", "--model", str(served_model_dir), "--port", str(port)),
        *("--key-file", str(key_file), "--dtype", "float32", "--max-model-len", "256", "--devices", "cpu"),
    ]
    plain = [
        *(sys.executable, *vllm_compat.serve_arguments(str(served_model_dir)), "--port", str(plain_port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--load-format", "dummy"),
        *("--enforce-eager", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--weight-transfer-config", '{"backend": "nccl"}', "--api-key", key_file.read_text().strip()),
    ]
    plain_environment = environment | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    servers = [("ours", ours, environment, f"http://127.0.0.1:{port}")]
    if pytestconfig.getoption("--all"):
        servers.append(("plain", plain, plain_environment, f"http://127.0.0.1:{plain_port}"))
    processes = []
    try:
        for name, command, variables, _ in servers:
            with (folder / f"{name}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True, text=True)
                )
        for (name, _, _, url), process in zip(servers, processes, strict=True):
            ready(url, process, folder / f"{name}.log")
        yield Served(
            url=servers[0][3],
            plain_url=servers[1][3] if len(servers) > 1 else None,
            key=key_file.read_text().strip(),
            key_file=key_file,
            process=processes[0],
            log=folder / "ours.log",
        )
    finally:
        for process in processes:
            left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(timeout=60)
            for child in left:
                if child.is_running():
                    child.kill()


@pytest.fixture
def make_attached(make_trainer: Callable[..., Any], served: Served) -> Callable[..., Any]:
    """Make trainers whose engine is the one of `shoal serve`."""

    def make(**changes: Any) -> Any:
        settings: dict[str, Any] = {
            "kind": GRPOTrainer,
            "vllm_server_base_urls": [served.url],
            "vllm_api_key_file": str(served.key_file),
            "vllm_startup_timeout_s": 60.0,
            "learning_rate": 3e-2,
        }
        return make_trainer(**(settings | changes))

    return make


@torch.no_grad()
def transformers_text(model: Any) -> list[list[int]]:
    model.eval()
    texts = []
    for prompt in PROMPTS:
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def test_a_trainer_attaches_publishes_proven_leaves_the_engine_serving_and_another_takes_over(
    make_attached: Callable[..., Any], make_served_model: Callable[..., Any], served: Served, tmp_path: Path
) -> None:
    model = make_served_model(seed=3)
    first = make_attached(model=model)
    before = transformers_text(model)
    first.train()
    assert (first.publisher.num_publishes, first.publisher.num_proven) == (3, 3)
    after = transformers_text(model)
    assert served.greedy() == after != before  # by the openai package, with the key

    second = make_attached(model=make_served_model(seed=4))
    with pytest.raises(ConfigError, match=r"held by another trainer.*trainer \d+ on"):
        second.train()

    first.close()
    assert served.get("/is_paused") == {"is_paused": False}
    assert served.greedy() == after
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(served.key.encode() in path.read_bytes() for path in files)
    assert served.key not in served.log.read_text()

    second.train()
    assert second.publisher.num_proven == 3
    assert served.greedy() == transformers_text(second.model) != after
    second.close()
    assert re.search(r"trainer \d+ on .* has attached", served.log.read_text())


def test_an_openai_client_without_the_key_gets_401(served: Served) -> None:
    for key in ("none", served.key[:-1]):
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, http_client=httpx.Client(trust_env=False))
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="policy", prompt="a", max_tokens=1)


def test_vllms_own_routes_say_of_an_engine_what_the_plugin_says_of_it(served: Served) -> None:
    headers = {"Authorization": f"Bearer {served.key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=120, trust_env=False) as client:
        stock = _stock_facts(client, served.url, "policy")
    assert stock == replace(probe(served.url, served.key, 60.0), has_plugin=False, model=None)


def test_what_cannot_work_is_refused_before_anything_is_sent(
    make_attached: Callable[..., Any], make_served_model: Callable[..., Any], served: Served, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("0" * 64)
    model = make_served_model()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("refuses the key that it was given.*vllm_api_key_file", {"model": model, "vllm_api_key_file": str(wrong)}),
        (
            "takes 256 tokens, but .* needs 30[0-9]",
            {"model": make_served_model(max_position_embeddings=512), "max_completion_length": 300},
        ),
        ("another model.*hidden_size=128 instead of 64", {"model": tiny_model()}),
    ]
    if served.plain_url is not None:
        plain = {"model": model, "vllm_server_base_urls": [served.plain_url]}
        cases.append(("without Shoal's plugin and runs on CPUs.*Start it with `shoal serve`", plain))
    for message, changes in cases:
        with pytest.raises(ConfigError, match=message):
            make_attached(**changes).train()
    assert served.get("/is_paused") == {"is_paused": False}


def test_a_trainer_that_is_killed_leaves_the_engine_neither_paused_nor_held(
    make_attached: Callable[..., Any], make_served_model: Callable[..., Any], served: Served
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, served.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write(served.key + "\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "paused\n"
    assert served.get("/is_paused") == {"is_paused": True}
    holder.kill()
    holder.wait()
    wait_until(lambda: served.get("/is_paused") == {"is_paused": False})
    trainer = make_attached(model=make_served_model(seed=5), max_steps=1)
    trainer.train()
    assert served.greedy() == transformers_text(trainer.model)
    trainer.close()


def test_the_key_is_on_no_command_line_and_the_engine_ends_when_it_is_told_to(served: Served) -> None:
    engine = psutil.Process(served.process.pid)
    processes = [engine, *engine.children(recursive=True)]
    assert len(processes) >= 4  # shoal serve, guard, server, engine core
    assert not any(served.key in " ".join(process.cmdline()) for process in processes)
    assert any(process.environ().get(KEY_VARIABLE) == served.key for process in processes)  # the control
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=60) == 0
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)
