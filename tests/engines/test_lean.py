"""Our own route for completions, both halves of it over a real socket; what stands in for vLLM is the engine alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engines.client import EngineClient
from shoal.errors import EngineFaultError, EngineRequestError
from shoal.types import Rollout, RolloutRequest, SamplingSettings
from shoal.vllm_plugin.frames import Kind, tokens_frame
from shoal.vllm_plugin.generate_route import GenerateRoute
from shoal.vllm_plugin.orders import PATH

SAMPLING = SamplingSettings(temperature=1.0, max_tokens=40, stop_token_ids=(2,))


def request(seed: int, name: str = "", prompt: tuple[int, ...] = (5, 6)) -> RolloutRequest:
    return RolloutRequest(prompt_token_ids=prompt, seed=seed, sampling=SAMPLING, name=name)


def text_of(seed: int) -> tuple[list[int], list[float]]:
    """What the engine writes for a seed: 1 to 40 tokens."""
    chance = np.random.default_rng(seed)
    length = 1 + seed % 40
    return chance.integers(3, 300, length).tolist(), (-chance.random(length).astype(np.float32)).tolist()


class Engine:
    """What the route needs of vLLM's engine client. Writes a token a turn, and `held` seeds stop half-way for good."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=None))
        self.held: set[int] = set()
        self.breaks_at: dict[int, Exception] = {}
        self.running: dict[str, asyncio.Event] = {}
        self.asked: list[tuple[Any, Any]] = []

    async def generate(self, prompt: Any, params: Any, name: str, *, lora_request: Any) -> AsyncIterator[Any]:
        self.asked.append((prompt, params))
        if max(prompt["prompt_token_ids"]) > 1000:
            raise ValueError("a token is not in the vocabulary")
        token_ids, logprobs = text_of(params.seed)
        aborted = self.running[name] = asyncio.Event()
        sent = 0
        try:
            for place in range(1, len(token_ids) + 1):
                await asyncio.sleep(0)
                is_half = place > len(token_ids) // 2
                if is_half and params.seed in self.breaks_at:
                    raise self.breaks_at[params.seed]
                if is_half and params.seed in self.held:
                    await aborted.wait()
                if aborted.is_set():
                    yield self._output(token_ids[sent : place - 1], logprobs[sent : place - 1], "abort")
                    return
                if place == len(token_ids) or place - sent >= params.stream_interval:
                    end = None if place < len(token_ids) else "stop" if params.seed % 2 else "length"
                    yield self._output(token_ids[sent:place], logprobs[sent:place], end)
                    sent = place
        finally:
            del self.running[name]

    async def abort(self, names: list[str]) -> None:
        for name in names:
            if name in self.running:
                self.running[name].set()

    def _output(self, token_ids: list[int], logprobs: list[float], finish_reason: str | None) -> Any:
        flat = SimpleNamespace(logprobs=logprobs, start_indices=range(len(logprobs)))
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=token_ids, logprobs=flat, finish_reason=finish_reason)]
        )


class Server:
    """The route before an app that has vLLM's `/abort_requests` and nothing else."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.num_orders = 0
        self.aborted: list[str] = []
        models = SimpleNamespace(lora_requests={}, is_base_model=lambda name: name == "policy")
        self._app = SimpleNamespace(state=SimpleNamespace(engine_client=self.engine, openai_serving_models=models))
        self._route = GenerateRoute(self._rest)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_orders += scope["path"] == PATH
        await self._route({**scope, "app": self._app}, receive, send)

    async def _rest(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"] or b"{}")
        names = body.get("request_ids", [])
        self.aborted += names
        await self.engine.abort(names)
        found = scope["path"] == "/abort_requests"
        await send({"type": "http.response.start", "status": 200 if found else 404, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@asynccontextmanager
async def serving(flush_tokens: int = 4, timeout_s: float = 20) -> AsyncIterator[tuple[Server, EngineClient]]:
    server = Server()
    http = uvicorn.Server(uvicorn.Config(server, port=0, log_level="error", lifespan="off"))
    http.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    client = client_of(url, flush_tokens=flush_tokens, timeout_s=timeout_s)
    try:
        yield server, client
    finally:
        await client.aclose()
        client.close()
        http.should_exit = True
        await task


def client_of(url: str, *, flush_tokens: int = 4, timeout_s: float = 20) -> EngineClient:
    client = EngineClient(
        name="engine-4", url=url, api_key="k", log_path=None, request_timeout_s=timeout_s, has_plugin=True,
        flush_tokens=flush_tokens,
    )  # fmt: skip
    client.weight_version = 6
    return client


def run(act: Callable[[Server, EngineClient], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with serving(**options) as (server, client):
            await asyncio.wait_for(act(server, client), 60)

    asyncio.run(main())


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


def assert_is(rollout: Rollout, seed: int) -> None:
    token_ids, logprobs = text_of(seed)
    assert rollout.token_ids.tolist() == token_ids and rollout.token_ids.dtype == np.int32
    assert rollout.rollout_logprobs.tolist() == logprobs and rollout.rollout_logprobs.dtype == np.float32
    assert rollout.finish_reason == ("stop" if seed % 2 else "length")
    assert (rollout.weight_version, rollout.engine) == (6, "engine-4")


@pytest.mark.parametrize("flush_tokens", [0, 1, 4, 1000])
def test_what_the_engine_writes_arrives_and_what_is_asked_for_together_is_one_request(flush_tokens: int) -> None:
    async def act(server: Server, client: EngineClient) -> None:
        client.cache_salt = "7f"
        rollouts = await asyncio.gather(*(client.generate(request(seed)) for seed in range(50)))
        for seed, rollout in enumerate(rollouts):
            assert_is(rollout, seed)
        assert server.num_orders == 1
        prompt, params = server.engine.asked[3]
        assert (prompt["prompt_token_ids"], prompt["cache_salt"]) == ([5, 6], "7f")
        assert (params.seed, params.temperature, params.max_tokens, params.stop_token_ids) == (3, 1.0, 40, [2])
        assert params.logprobs == 0 and not params.detokenize
        await client.generate(request(7))
        assert server.num_orders == 2

    if flush_tokens == 0:  # the stand-in streams only by an interval
        flush_tokens = 500
    run(act, flush_tokens=flush_tokens)


def test_a_completion_that_was_cut_is_handed_over_as_far_as_it_is_and_the_others_go_on() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.held = {29}
        long = asyncio.create_task(client.generate(request(29, "long")))
        other = asyncio.create_task(client.generate(request(38, "other")))
        assert_is(await other, 38)
        await until(lambda: (part := client.written("long")) is not None and len(part.token_ids) == 12)
        await client.cut("long")
        rollout = await long
        assert (rollout.finish_reason, rollout.token_ids.tolist()) == ("cut", text_of(29)[0][:15])
        assert rollout.rollout_logprobs.tolist() == text_of(29)[1][:15]
        assert server.aborted == ["long"] and client.written("long") is None
        await client.cut("long")  # it is not under way: nothing is sent
        assert server.aborted == ["long"]

    run(act)


def test_one_that_nobody_waits_for_frees_its_slot_and_the_last_one_hangs_up() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.held = {29, 30, 31}
        tasks = [asyncio.create_task(client.generate(request(seed, str(seed)))) for seed in (29, 30, 31)]
        await until(lambda: len(server.engine.running) == 3)
        tasks[1].cancel()
        await until(lambda: sorted(server.engine.running) == ["29", "31"])
        assert server.aborted == ["30"]
        tasks[0].cancel(), tasks[2].cancel()
        await until(lambda: not server.engine.running)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        assert_is(await client.generate(request(8)), 8)  # it serves on

    run(act)


def test_a_caller_that_goes_away_frees_the_engines_slots() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.held = {29}
        gone = client_of(client.url)
        task = asyncio.create_task(gone.generate(request(29, "x")))
        await until(lambda: len(server.engine.running) == 1)
        await gone._async.aclose()  # its connections break
        await until(lambda: not server.engine.running)
        await asyncio.gather(task, return_exceptions=True)
        await gone.aclose()

    run(act)


def test_what_goes_wrong_with_one_sample_is_told_with_what_was_received_and_leaves_the_others_alone() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.breaks_at = {29: RuntimeError("CUDA error")}
        outcomes = await asyncio.gather(
            *(
                client.generate(request(seed, prompt=prompt))
                for seed, prompt in ((29, (5,)), (30, (5,)), (31, (2000,)))
            ),
            return_exceptions=True,
        )
        broken, fine, refused = outcomes
        assert isinstance(broken, EngineFaultError) and "CUDA error" in str(broken) and "engine-4" in str(broken)
        assert isinstance(broken.partial, Rollout) and broken.partial.finish_reason == "cut"
        assert broken.partial.token_ids.tolist() == text_of(29)[0][:12]  # whole fours of the 15 that there were
        assert broken.partial.rollout_logprobs.tolist() == text_of(29)[1][:12]
        assert isinstance(fine, Rollout)
        assert_is(fine, 30)
        assert isinstance(refused, EngineRequestError) and not isinstance(refused, EngineFaultError)
        assert "not in the vocabulary" in str(refused)

    run(act)


def test_a_slow_completion_is_given_up_with_what_was_received_and_frees_its_slot() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.held = {29}
        with pytest.raises(EngineFaultError, match=r"did not answer /shoal/generate within 2 s") as failure:
            await client.generate(request(29))
        assert isinstance(failure.value.partial, Rollout) and len(failure.value.partial.token_ids) == 12
        await until(lambda: not server.engine.running)

    run(act, timeout_s=2)


OTHER_MODEL = json.dumps(
    {
        "model": "other",
        "salt": "",
        "flush_tokens": 0,
        "prompts": [[5]],
        "samples": [
            {
                "prompt": 0,
                "name": "a",
                "seed": 1,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "max_tokens": 3,
                "stop_token_ids": [],
            },
        ],
    }
).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{}", "entries"),
        (b"[" * 100_000, "not JSON"),
        (OTHER_MODEL, "'other'"),
    ],
)
def test_a_malformed_order_gets_a_400_and_hurts_nobody(body: bytes, says: str) -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.held = {29}
        under_way = asyncio.create_task(client.generate(request(29, "x")))
        await until(lambda: len(server.engine.running) == 1)
        async with httpx.AsyncClient(base_url=client.url, trust_env=False) as http:
            answer = await http.post(PATH, content=body)
        assert answer.status_code == 400 and says in answer.text
        assert len(server.engine.asked) == 1
        server.engine.running["x"].set()
        with pytest.raises(EngineFaultError, match="'abort'"):  # nobody of ours has cut it
            await under_way

    run(act)


def test_a_server_without_the_route_is_an_error_that_names_it() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server._route = server._rest  # type: ignore[assignment]
        with pytest.raises(EngineRequestError, match=r"engine-4 answered /shoal/generate with status 404"):
            await client.generate(request(1))

    run(act)


# ---- whatever comes back ----


async def answer_with(payload: bytes, seeds: tuple[int, ...] = (29,)) -> list[Rollout | BaseException]:
    """Ask a server that answers every request with these bytes as its stream, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + payload)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = client_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        return await asyncio.gather(*(client.generate(request(seed)) for seed in seeds), return_exceptions=True)
    finally:
        await client.aclose()
        client.close()
        server.close()


def test_a_stream_that_breaks_leaves_each_sample_what_it_has() -> None:
    frames = tokens_frame(0, Kind.MORE, [5, 6], [-1.0, -2.0]) + tokens_frame(1, Kind.STOP, [7], [-0.5])
    outcomes = asyncio.run(answer_with(frames + tokens_frame(2, Kind.MORE, [8] * 9, [-1.0] * 9)[:-1], (1, 2, 3)))
    first, second, third = outcomes
    assert isinstance(first, EngineFaultError) and isinstance(first.partial, Rollout)
    assert first.partial.token_ids.tolist() == [5, 6] and first.partial.rollout_logprobs.tolist() == [-1.0, -2.0]
    assert isinstance(second, Rollout) and second.token_ids.tolist() == [7]
    assert isinstance(third, EngineFaultError) and third.partial is None


def test_weights_that_do_not_compute_are_told_and_not_gone_on_with() -> None:
    nan = float("nan")
    whole, partial = asyncio.run(
        answer_with(tokens_frame(0, Kind.STOP, [5], [nan]) + tokens_frame(1, Kind.MORE, [5], [nan]), (1, 2))
    )
    assert isinstance(whole, EngineRequestError) and "version 6" in str(whole) and "learning_rate" in str(whole)
    assert not isinstance(whole, EngineFaultError)
    assert isinstance(partial, EngineFaultError) and partial.partial is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60), st.integers(0, 40), st.booleans())
def test_no_bytes_make_a_completion_raise_anything_but_that_its_engine_is_at_fault(
    noise: bytes, place: int, is_good_first: bool
) -> None:
    good = tokens_frame(0, Kind.MORE, [5, 6], [-1.0, -2.0])
    (outcome,) = asyncio.run(answer_with((good if is_good_first else good[:place]) + noise))
    if isinstance(outcome, Rollout):
        return
    assert isinstance(outcome, EngineRequestError)
    if isinstance(outcome, EngineFaultError) and isinstance(outcome.partial, Rollout):
        part = outcome.partial
        assert 0 < len(part.token_ids) == len(part.rollout_logprobs) < SAMPLING.max_tokens
        assert part.token_ids.min() >= 0 and np.isfinite(part.rollout_logprobs).all()


def test_names_are_the_callers_and_two_without_one_differ() -> None:
    async def act(server: Server, client: EngineClient) -> None:
        server.engine.held = {29}
        tasks = [asyncio.create_task(client.generate(replace(request(29), name=name))) for name in ("", "", "mine")]
        await until(lambda: len(server.engine.running) == 3)
        assert "mine" in server.engine.running
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(act)
