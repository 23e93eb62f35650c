"""The client against a real HTTP server that answers well and badly."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engines.client import EngineClient
from shoal.engines.process import choose_ports
from shoal.errors import EngineFaultError, EngineRequestError
from shoal.protocols import RolloutEngine
from shoal.types import Rollout, RolloutRequest, SamplingSettings

KEY = "the key"
LOG = Path("/runs/x/engine-4.log")
REQUEST = RolloutRequest(
    prompt_token_ids=(11, 12, 13),
    seed=77,
    sampling=SamplingSettings(temperature=0.5, max_tokens=9, stop_token_ids=(2, 3), top_k=20, top_p=0.9, min_p=0.1),
)
GOOD = {
    "choices": [
        {"token_ids": [5, 6, 2], "logprobs": {"token_logprobs": [-0.5, -1.25, 0.0]}, "finish_reason": "stop"},
    ]
}


def changed(**changes: Any) -> dict[str, Any]:
    """Return the good answer with entries of its choice replaced; None takes one out."""
    choice = {name: value for name, value in (GOOD["choices"][0] | changes).items() if value is not None}
    return {"choices": [choice]}


class Server:
    """Answers every request with what the test sets, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes = b"{}"
        self.delay_s = 0.0
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.connections: list[int] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections, as vLLM's server does

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                outer.connections.append(self.client_address[1])
                outer.asked.append((self.path, dict(self.headers), json.loads(self.rfile.read(size) or b"null")))
                outer.released.wait(outer.delay_s)
                try:
                    self.send_response(outer.status)
                    self.send_header("Content-Length", str(len(outer.body)))
                    self.end_headers()
                    self.wfile.write(outer.body)
                except OSError:
                    return  # the client gave up

            do_GET = do_POST = answer

            def log_message(self, *args: Any) -> None: ...

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.http = Http(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def say(self, answer: Any) -> None:
        self.body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.released.set()
    running.http.shutdown()
    running.http.server_close()


def client_of(url: str, request_timeout_s: float = 10) -> EngineClient:
    return EngineClient(name="engine-4", url=url, api_key=KEY, log_path=LOG, request_timeout_s=request_timeout_s)


def generate(client: EngineClient) -> Rollout:
    async def run() -> Rollout:
        try:
            return await client.generate(REQUEST)
        finally:
            await client.aclose()

    try:
        return asyncio.run(run())
    finally:
        client.close()


def failure(act: Callable[[], Any]) -> str:
    with pytest.raises(EngineRequestError) as error:
        act()
    assert "engine-4" in str(error.value)
    return str(error.value)


def test_a_good_answer_becomes_a_rollout(server: Server) -> None:
    server.say(GOOD)
    client = client_of(server.url)
    assert isinstance(client, RolloutEngine)
    client.weight_version = 6
    rollout = generate(client)
    assert rollout.token_ids.tolist() == [5, 6, 2] and rollout.token_ids.dtype == np.int32
    assert rollout.rollout_logprobs.tolist() == [-0.5, -1.25, 0.0] and rollout.rollout_logprobs.dtype == np.float32
    assert (rollout.finish_reason, rollout.weight_version, rollout.engine) == ("stop", 6, "engine-4")


def test_an_adapter_is_asked_for_by_its_name(server: Server) -> None:
    server.say(GOOD)
    generate(client_of(server.url))
    generate(
        EngineClient(name="e", url=server.url, api_key=KEY, log_path=LOG, request_timeout_s=10, model="policy-adapter")
    )
    assert [body["model"] for _, _, body in server.asked] == ["policy", "policy-adapter"]


def test_a_completion_cut_by_length_says_so(server: Server) -> None:
    server.say(changed(finish_reason="length"))
    assert generate(client_of(server.url)).finish_reason == "length"


def test_the_engine_is_asked_with_token_ids_the_samples_own_seed_and_the_key(server: Server) -> None:
    server.say(GOOD)
    generate(client_of(server.url))
    ((path, headers, body),) = server.asked
    assert path == "/v1/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["prompt"] == [11, 12, 13]
    assert (body["seed"], body["temperature"], body["max_tokens"], body["n"]) == (77, 0.5, 9, 1)
    assert body["stop_token_ids"] == [2, 3]
    assert (body["top_k"], body["top_p"], body["min_p"]) == (20, 0.9, 0.1)
    assert (body["return_token_ids"], body["logprobs"]) == (True, 0)


def test_a_rollout_carries_the_version_that_was_current_when_it_was_asked_for(server: Server) -> None:
    server.say(GOOD)
    server.delay_s = 0.3
    client = client_of(server.url)
    client.weight_version = 1

    async def run() -> Rollout:
        task = asyncio.create_task(client.generate(REQUEST))
        await asyncio.sleep(0.1)
        client.weight_version = 2
        return await task

    assert asyncio.run(run()).weight_version == 1


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        7,
        {"choices": []},
        {"choices": [GOOD["choices"][0]] * 2},
        changed(token_ids=None),
        changed(logprobs=None),
        changed(finish_reason=None),
        changed(logprobs={}),
        changed(token_ids="five"),
        changed(token_ids=["a", "b", "c"]),
        changed(token_ids=[[5, 6], [2]]),
        changed(token_ids=[5, 6, 2**40]),
        {"choices": [changed()["choices"][0] | {"token_ids": None}]},
    ],
    ids=str,
)
def test_a_completion_without_its_parts_is_refused(answer: Any, server: Server) -> None:
    server.say(answer)
    assert "without tokens or logprobs" in failure(lambda: generate(client_of(server.url)))


@pytest.mark.parametrize(
    "answer",
    [
        changed(token_ids=[5, 6]),
        changed(logprobs={"token_logprobs": None}),
        changed(token_ids=[5, 6, 2, 9]),
        changed(token_ids=[], logprobs={"token_logprobs": []}),
        changed(token_ids=7, logprobs={"token_logprobs": -1.0}),
        changed(token_ids=[[5, 6, 2]], logprobs={"token_logprobs": [[-1.0, -1.0, -1.0]]}),
        changed(finish_reason="abort"),
        changed(finish_reason="error"),
    ],
    ids=str,
)
def test_a_completion_that_does_not_fit_together_is_refused(answer: Any, server: Server) -> None:
    server.say(answer)
    assert "malformed completion" in failure(lambda: generate(client_of(server.url)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
def test_a_logprob_that_is_not_finite_is_refused_naming_the_weights(value: float | None, server: Server) -> None:
    server.say(changed(logprobs={"token_logprobs": [-0.5, value, -1.0]}))
    client = client_of(server.url)
    client.weight_version = 3
    message = failure(lambda: generate(client))
    assert "not finite" in message and "version 3" in message and "learning_rate" in message


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_an_error_status_is_told_with_the_route_the_answer_and_the_log(status: int, server: Server) -> None:
    server.status = status
    server.say({"error": "CUDA out of memory"})
    for act in (
        lambda: generate(client_of(server.url)),
        lambda: client_of(server.url).post("/v1/completions", None, 5),
    ):
        message = failure(act)
        assert f"/v1/completions with status {status}" in message
        assert "CUDA out of memory" in message
        assert str(LOG) in message


def test_an_answer_that_is_not_json_is_told(server: Server) -> None:
    server.say(b"<html>a proxy</html>")
    assert "not JSON" in failure(lambda: generate(client_of(server.url)))
    assert "/pause with something that is not JSON" in failure(lambda: client_of(server.url).post("/pause", None, 5))


def test_a_control_route_may_answer_with_nothing(server: Server) -> None:
    server.say(b"")  # as /sleep and /wake_up of vLLM 0.26 do
    assert client_of(server.url).post("/wake_up?tags=weights", None, 5) is None
    assert "not JSON" in failure(lambda: generate(client_of(server.url)))


def test_an_answer_that_is_longer_than_it_can_be_is_refused_before_it_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.engines.client.MOST_CONTROL_BYTES", 1000)
    monkeypatch.setattr("shoal.engines.client.MOST_METRICS_BYTES", 1000)
    server.say({"x": "y" * 2000})
    assert "/pause with more than the 1000 bytes" in failure(lambda: client_of(server.url).post("/pause", None, 5))
    client = client_of(server.url)
    assert "/metrics with more than the 1000" in failure(lambda: asynchronously(client, client.report))
    server.say(b'{"x": "' + b"y" * (2 << 20) + b'"}')  # 12 tokens have less than that
    assert "/v1/completions with more than the" in failure(lambda: generate(client_of(server.url)))
    server.say({"x": "y"})  # the control
    assert client_of(server.url).post("/pause", None, 5) == {"x": "y"}


def test_metrics_that_are_no_numbers_are_told(server: Server) -> None:
    client = client_of(server.url)
    for value in (b"x", b"nan", b"inf", b""):
        server.body = b'vllm:num_requests_running{engine="0"} ' + value + b"\n"
        assert "vllm:num_requests_running" in failure(lambda: client.num_running(5))
    client.close()


def test_a_slow_completion_is_given_up_after_the_time_out_which_is_named(server: Server) -> None:
    server.say(GOOD)
    server.delay_s = 300
    began = time.monotonic()
    message = failure(lambda: generate(client_of(server.url, request_timeout_s=0.5)))
    assert time.monotonic() - began < 60
    assert "did not answer /v1/completions within 0.5 s" in message and str(LOG) in message


def test_a_slow_control_route_is_given_up_after_its_own_time_out(server: Server) -> None:
    server.delay_s = 300
    began = time.monotonic()
    message = failure(lambda: client_of(server.url).post("/pause?mode=keep", None, 0.5))
    assert time.monotonic() - began < 60
    assert "did not answer /pause?mode=keep within 0.5 s" in message


def test_a_control_route_gets_the_body_and_the_key_and_gives_the_answer(server: Server) -> None:
    server.say({"success": True})
    assert client_of(server.url).post("/update_weights", {"update_info": {"version": 3}}, 5) == {"success": True}
    ((path, headers, body),) = server.asked
    assert (path, headers["Authorization"], body) == (
        "/update_weights",
        f"Bearer {KEY}",
        {"update_info": {"version": 3}},
    )


def test_a_completion_is_salted_once_there_is_a_salt(server: Server) -> None:
    server.say(GOOD)
    generate(client_of(server.url))
    salted = client_of(server.url)
    salted.cache_salt = "7f"
    generate(salted)
    assert [body.get("cache_salt") for _, _, body in server.asked] == [None, "7f"]  # vLLM refuses an empty one


def test_running_completions_are_counted_from_the_engines_metrics(server: Server) -> None:
    client = client_of(server.url)
    server.body = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="policy"} 3.0
vllm:num_requests_running{engine="1",model_name="policy"} 4.0
vllm:num_requests_running_total{engine="0"} 50.0
"""
    assert client.num_running(5) == 7
    server.body = b"{}"
    assert "vllm:num_requests_running" in failure(lambda: client.num_running(5))
    client.close()


def test_an_engine_that_is_gone_is_told_for_both_halves() -> None:
    url = f"http://127.0.0.1:{choose_ports(1, None)[0]}"
    assert "did not answer /v1/completions" in failure(lambda: generate(client_of(url)))
    assert "did not answer /resume" in failure(lambda: client_of(url).post("/resume", None, 5))


def test_health_is_a_200_from_a_server_that_answers(server: Server) -> None:
    client = client_of(server.url)
    assert client.is_healthy() and not client.has_died()
    server.status = 503
    assert not client.is_healthy() and client.has_died()
    client.close()
    nobody = client_of(f"http://127.0.0.1:{choose_ports(1, None)[0]}")
    assert not nobody.is_healthy() and nobody.has_died()


def test_a_proxy_in_the_environment_never_sees_loopback_traffic(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.say(GOOD)
    nowhere = f"http://127.0.0.1:{choose_ports(1, None)[0]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, nowhere)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert generate(client_of(server.url)).token_ids.tolist() == [5, 6, 2]
    assert client_of(server.url).post("/resume", None, 5) == GOOD


def test_many_completions_at_once_share_one_client(server: Server) -> None:
    server.say(GOOD)
    server.delay_s = 0.2
    client = client_of(server.url)

    async def run() -> float:
        began = time.monotonic()
        await asyncio.gather(*(client.generate(REQUEST) for _ in range(60)))
        await client.aclose()
        return time.monotonic() - began

    assert asyncio.run(run()) < 60 * 0.2 / 3  # side by side, not in turn
    assert len(server.asked) == 60


def test_a_connection_is_not_used_again_about_the_time_when_vllm_closes_it(server: Server) -> None:
    server.say(GOOD)
    client = client_of(server.url)

    async def run() -> None:
        for pause_s in (0.0, 2.5, 0.0):
            await asyncio.sleep(pause_s)
            await client.generate(REQUEST)
            client.post("/resume", None, 5)
        await client.aclose()

    asyncio.run(run())
    (first, control), (second, later_control), (third, _) = zip(
        server.connections[::2], server.connections[1::2], strict=True
    )
    assert first != second and control != later_control  # after 2.5 idle seconds: new ones
    assert third == second  # the control: without a pause, the same one


# ---- what the pool needs to know ----


def asynchronously(client: EngineClient, act: Callable[[], Any]) -> Any:
    async def run() -> Any:
        try:
            return await act()
        finally:
            await client.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize(("status", "is_fault"), [(400, False), (401, False), (404, False), (408, True), (429, True),
                                                  (500, True), (503, True)])  # fmt: skip
def test_what_the_engine_is_to_blame_for_differs_from_what_is_wrong_with_the_request(
    status: int, is_fault: bool, server: Server
) -> None:
    server.status = status
    with pytest.raises(EngineRequestError) as error:
        generate(client_of(server.url))
    assert isinstance(error.value, EngineFaultError) == is_fault


@pytest.mark.parametrize("answer", [b"<html>a proxy</html>", {}, changed(token_ids=[5, 6]), changed(finish_reason="x")])
def test_nonsense_is_the_engines_fault_and_a_model_that_does_not_compute_is_not(answer: Any, server: Server) -> None:
    server.say(answer)
    with pytest.raises(EngineFaultError):
        generate(client_of(server.url))
    server.say(changed(logprobs={"token_logprobs": [-0.5, float("nan"), -1.0]}))
    with pytest.raises(EngineRequestError) as error:
        generate(client_of(server.url))
    assert not isinstance(error.value, EngineFaultError)


def test_a_report_is_read_from_the_engines_metrics(server: Server) -> None:
    server.body = b"vllm:num_requests_running 3.0\nvllm:num_requests_waiting 1.0\nvllm:kv_cache_usage_perc 0.5\n"
    client = client_of(server.url)
    report = asynchronously(client, client.report)
    assert (report.running, report.waiting, report.kv_usage) == (3, 1, 0.5)
    assert [path for path, _, _ in server.asked] == ["/metrics"]


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (500, b"{}"), (200, b"")])
def test_a_report_that_is_none_is_the_engines_fault(status: int, body: bytes, server: Server) -> None:
    server.status, server.body = status, body
    client = client_of(server.url)
    with pytest.raises(EngineFaultError, match="/metrics"):
        asynchronously(client, client.report)


def named(name: str) -> RolloutRequest:
    return replace(REQUEST, name=name)


def test_a_completion_that_was_cut_is_handed_over_as_far_as_it_is(server: Server) -> None:
    for tokens in ([5, 6, 2], []):
        server.say(changed(token_ids=tokens, logprobs={"token_logprobs": [-1.0] * len(tokens)}, finish_reason="abort"))
        server.delay_s = 0.2
        client = client_of(server.url)

        async def run(client: EngineClient = client) -> Rollout:
            task = asyncio.create_task(client.generate(named("run-7")))
            await asyncio.sleep(0.05)
            await client.cut("run-7")
            return await task

        rollout = asynchronously(client, run)
        assert (rollout.finish_reason, rollout.token_ids.tolist()) == ("cut", tokens)
    (_, headers, _), (path, _, body), *_ = server.asked
    assert headers["X-Request-Id"] == "run-7"
    assert (path, body) == ("/abort_requests", {"request_ids": ["cmpl-run-7-0"]})


def test_an_abort_that_nobody_asked_for_is_refused_as_ever(server: Server) -> None:
    server.say(changed(finish_reason="abort"))
    client = client_of(server.url)

    async def run() -> None:
        await client.cut("run-7")  # it is not under way: nothing is sent
        with pytest.raises(EngineFaultError, match="finish_reason 'abort'"):
            await client.generate(named("run-7"))

    asynchronously(client, run)
    assert [path for path, _, _ in server.asked] == ["/v1/completions"]


@pytest.mark.parametrize(("stops", "ignored"), [((), True), ((2,), False)])
def test_a_completion_that_no_token_ends_is_not_ended_by_the_tokenizers_either(
    server: Server, stops: tuple[int, ...], ignored: bool
) -> None:
    server.say(GOOD)
    client = client_of(server.url)
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, stop_token_ids=stops))

    async def run() -> None:
        await client.generate(request)
        await client.aclose()

    asyncio.run(run())
    client.close()
    ((_, _, body),) = server.asked
    assert body["ignore_eos"] is ignored
