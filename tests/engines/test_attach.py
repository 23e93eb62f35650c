"""What answers at a URL, what of it cannot be used, and how an engine is held; against small HTTP servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import shoal
from shoal.engines.attach_checks import Needs, check_server
from shoal.engines.attached import AttachedEngine, Hold, attach
from shoal.engines.probe import ServerFacts, probe
from shoal.errors import ConfigError, EngineStartError

KEY = "k" * 64
MODEL = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
ABOUT = {
    "shoal": shoal.__version__,
    "num_workers": 2,
    "data_parallel_size": 1,
    "device": "cuda",
    "dtype": "bfloat16",
    "max_model_len": 128,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "serves_adapters": False,
    "weight_transfer": None,
    "model": MODEL,
}
SERVER_INFO = {
    "vllm_config": {
        "model_config": {
            "dtype": "torch.bfloat16",
            "max_model_len": 128,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
        },
        "device_config": {"device": "cuda"},
        "parallel_config": {"data_parallel_size": 1},
        "lora_config": None,
        "weight_transfer_config": {"backend": "nccl"},
    }
}
MODELS = {"data": [{"id": "policy"}]}
FACTS = ServerFacts(
    url="http://engine:8000", request_model="policy", has_plugin=True,
    **{name: value for name, value in ABOUT.items() if name != "shoal"},
)  # fmt: skip
NEEDS = Needs(max_model_len=128, device="cuda", model=MODEL)


class Server:
    """Answers what it is told to, to who has the key."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.posts: list[str] = []
        self.num_statuses = 0
        self.first_statuses: list[int] = []
        self.holds_end = threading.Event()
        self.hold_status = 200
        self.held = threading.Event()
        self.released = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if owner.first_statuses:
                    self._answer(owner.first_statuses.pop(0), {})
                elif self.headers.get("Authorization") != f"Bearer {KEY}":
                    self._answer(401, {})
                else:
                    answer = owner.answers.get(self.path)
                    self._answer(404 if answer is None else 200, answer)

            def do_POST(self) -> None:
                owner.posts.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                if self.path != "/shoal/hold" or owner.hold_status != 200:
                    self._answer(owner.hold_status, body)
                    return
                self.send_response(200)
                self.end_headers()
                owner.held.set()
                try:
                    while not owner.holds_end.wait(0.02):
                        self.wfile.write(b"{}\n")
                except OSError:
                    owner.released.set()

            def _answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.holds_end.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def plugin(server: Server, **changes: Any) -> None:
    server.answers = {"/v1/models": MODELS, "/shoal/about": ABOUT | changes}


def stock(server: Server) -> None:
    server.answers = {
        "/v1/models": {"data": [{"id": "some/model"}]},
        "/get_world_size?include_dp=false": {"world_size": 4},
        "/server_info?config_format=json": SERVER_INFO,
    }


# ---- probing ----


def test_an_engine_with_the_plugin_and_a_server_without_it_are_told_apart(server: Server) -> None:
    plugin(server)
    assert probe(server.url, KEY, 5) == replace(FACTS, url=server.url)
    stock(server)
    assert probe(server.url, KEY, 5) == replace(
        FACTS, url=server.url, has_plugin=False, request_model="some/model", num_workers=4, weight_transfer="nccl",
        model=None,
    )  # fmt: skip


def test_a_server_that_is_not_ready_yet_is_waited_for(server: Server) -> None:
    plugin(server)
    server.first_statuses = [503, 502]
    assert probe(server.url, KEY, 20).num_workers == 2
    assert server.first_statuses == []


def test_a_server_that_never_comes_is_an_error_with_its_url(server: Server) -> None:
    server.close()
    with pytest.raises(EngineStartError, match=rf"Nothing became ready at {server.url} within 0\.2 s \(ConnectError"):
        probe(server.url, KEY, 0.2)


@pytest.mark.parametrize(("key", "says"), [("other", "refuses the key that it was given"), (None, "needs a key, and")])
def test_a_wrong_key_is_refused_at_once_and_never_shown(server: Server, key: str | None, says: str) -> None:
    plugin(server)
    with pytest.raises(ConfigError, match=f"{says}.*SHOAL_ENGINE_API_KEY or vllm_api_key_file") as refused:
        probe(server.url, key, 60)
    assert "other" not in str(refused.value)


def test_what_is_no_vllm_server_is_refused(server: Server) -> None:
    server.answers = {"/health": {}}
    with pytest.raises(ConfigError, match=r"is no vLLM server.*status 404.*trl vllm-serve"):
        probe(server.url, KEY, 60)


def test_a_server_without_control_routes_is_refused_with_how_to_start_it(server: Server) -> None:
    stock(server)
    del server.answers["/get_world_size?include_dp=false"]
    with pytest.raises(ConfigError, match=r"no control routes.*VLLM_SERVER_DEV_MODE=1.*shoal serve"):
        probe(server.url, KEY, 60)
    stock(server)
    server.answers["/server_info?config_format=json"] = {"vllm_config": {}}
    with pytest.raises(ConfigError, match="describes itself in a way that Shoal does not know"):
        probe(server.url, KEY, 60)


def test_an_engine_of_another_version_is_refused(server: Server) -> None:
    plugin(server, shoal="0.0.9")
    with pytest.raises(ConfigError, match=rf"runs Shoal 0\.0\.9, and this trainer is {shoal.__version__}"):
        probe(server.url, KEY, 60)


# ---- checking ----


def test_what_suits_is_accepted() -> None:
    check_server(FACTS, NEEDS)
    check_server(replace(FACTS, has_plugin=False, weight_transfer="nccl", model=None), NEEDS)
    check_server(FACTS, replace(NEEDS, model=MODEL | {"head_dim": None, "use_cache": False}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 127}, "takes 127 tokens, but .* needs 128.*--max-model-len 128"),
        ({"model": MODEL | {"vocab_size": 1}}, "another model.*vocab_size=1 instead of 320"),
        ({"device": "cpu"}, "runs on cpu and the trainer on cuda"),
        ({"data_parallel_size": 2}, "data_parallel_size=2"),
        ({"serves_adapters": True}, "LoRA"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode raw_logprobs.*--logprobs-mode processed_logprobs"),
        ({"generation_config": "auto"}, "--generation-config auto.*--generation-config vllm"),
        ({"has_plugin": False}, "without Shoal's plugin.*weight_transfer_config is None.*shoal serve"),
        ({"has_plugin": False, "weight_transfer": "ipc"}, "weight_transfer_config is 'ipc'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_server(replace(FACTS, **changes), NEEDS)


def test_without_the_plugin_cpus_are_refused() -> None:
    facts = replace(FACTS, has_plugin=False, device="cpu", weight_transfer="nccl")
    with pytest.raises(ConfigError, match=r"runs on CPUs.*between GPUs only"):
        check_server(facts, replace(NEEDS, device="cpu"))


# ---- holding ----


def test_a_hold_lasts_until_it_is_released(server: Server) -> None:
    hold = Hold(server.url, KEY)
    assert server.held.wait(60) and not hold.is_broken()
    assert not server.released.is_set()
    hold.release()
    hold.wait_released()
    assert server.released.wait(60) and not hold.is_broken()


def test_an_engine_that_goes_away_is_known_to_be_gone(server: Server) -> None:
    engine = AttachedEngine(replace(FACTS, url=server.url), NEEDS, KEY)
    assert engine.exit_status() is None
    server.holds_end.set()
    deadline = time.monotonic() + 5
    while engine.exit_status() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.exit_status() == 1
    assert server.url in engine.why_it_died()
    server.holds_end.clear()
    plugin(server)
    again, url = engine.start_again()  # whoever started it has done so again
    assert (again.exit_status(), url) == (None, server.url)
    plugin(server, max_model_len=16)
    with pytest.raises(ConfigError, match="takes 16 tokens"):
        again.start_again()


def test_an_engine_that_another_trainer_holds_is_refused_with_its_name(server: Server) -> None:
    server.hold_status = 409
    with pytest.raises(ConfigError, match=r"held by another trainer.*trainer \d+ on"):
        Hold(server.url, KEY)


# ---- attaching ----


def settings(**changes: Any) -> dict[str, Any]:
    return {"timeout_s": 5.0, "request_timeout_s": 5.0} | changes


def test_attaching_makes_a_fleet_that_ends_nothing(server: Server) -> None:
    plugin(server)
    told: list[Any] = []
    fleet = attach([server.url], KEY, NEEDS, **settings(on_progress=lambda stages, seconds: told.append(stages)))
    (engine,) = fleet.engines
    assert (engine.name, engine.num_workers, engine.host) == ("engine-0", 2, "127.0.0.1")
    assert told == [[("engine-0", "ready")]]
    fleet.check_alive()
    assert server.held.wait(60)
    fleet.close()
    assert server.released.wait(60)
    assert server.posts == ["/shoal/hold"]  # nothing else was asked of it


def test_a_server_without_the_plugin_is_resumed_when_it_is_left(server: Server, caplog: Any) -> None:
    stock(server)
    fleet = attach([server.url], KEY, NEEDS, **settings())
    assert "nothing is proven" in caplog.text and "slower" in caplog.text
    assert not fleet.engines[0].process.has_plugin
    fleet.close()
    assert server.posts == ["/resume"]


def test_the_two_kinds_do_not_mix_and_what_was_attached_is_let_go(server: Server) -> None:
    other = Server()
    try:
        plugin(server)
        stock(other)
        with pytest.raises(ConfigError, match=f"and {other.url} not"):
            attach([server.url, other.url], KEY, NEEDS, **settings())
        plugin(other)
        other.hold_status = 409
        with pytest.raises(ConfigError, match="held by another trainer"):
            attach([server.url, other.url], KEY, NEEDS, **settings())
        assert server.held.is_set() and server.released.wait(60)
    finally:
        other.close()
