"""Ports, log tails, and what a log says about a start and a death."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from shoal.engines.process import choose_ports, is_free, next_log_path, reason_in, stage_in, tail
from shoal.errors import ConfigError

# Cut from what vLLM 0.32 really wrote.
UNKNOWN_ARCHITECTURE = """\
  File ".../vllm/engine/arg_utils.py", line 1955, in create_model_config
    return ModelConfig(
           ^^^^^^^^^^^^
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['NobodyKnowsForCausalLM'] are not supported for now. Supported architectures: dict_k
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
""".splitlines()
CORRUPT_CONFIG = """\
json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
    raise OSError(f"It looks like the config file at '{resolved_config_file}' is not a valid JSON file.")
OSError: It looks like the config file at '/m/config.json' is not a valid JSON file.
""".splitlines()
DEAD_CORE = """\
(EngineCore pid=9) ERROR 11-23 [core.py:9] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-23 [core.py:9] ValueError: No available memory for the cache blocks.
(EngineCore pid=9) asyncio.exceptions.CancelledError: the request was cancelled
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
""".splitlines()


def bound(port: int = 0) -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


def test_free_ports_are_different_and_can_be_listened_on() -> None:
    ports = choose_ports(20, None)
    assert len(set(ports)) == 20
    listeners = [bound(port) for port in ports]
    for listener in listeners:
        listener.close()


def test_a_base_port_gives_a_row_of_ports() -> None:
    with bound() as listener:
        base = listener.getsockname()[1]
    assert choose_ports(1, base) == [base]
    for base in range(20000, 60000, 37):
        try:
            assert choose_ports(3, base) == [base, base + 1, base + 2]
        except ConfigError:
            continue
        return
    pytest.fail("no three ports in a row are free on this machine")


def test_a_port_is_free_until_somebody_listens_and_again_afterwards() -> None:
    with bound() as listener:
        port = listener.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)


def test_each_life_of_an_engine_has_a_log_of_its_own() -> None:
    names = [path := Path("/runs/v1.5/engine-0.log")]
    for _ in range(2):
        names.append(path := next_log_path(path))
    assert [str(name) for name in names] == [
        "/runs/v1.5/engine-0.log",
        "/runs/v1.5/engine-0.restart-1.log",
        "/runs/v1.5/engine-0.restart-2.log",
    ]


def test_a_port_in_use_is_refused_naming_it_and_what_to_do() -> None:
    with bound() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError) as refusal:
            choose_ports(1, port)
    message = str(refusal.value)
    assert f"{port} is in use on 127.0.0.1" in message
    assert f"vllm_base_port={port}" in message
    assert "leave vllm_base_port unset for free ports" in message
    assert choose_ports(1, port) == [port]  # the control: the same port, once it is free


def test_a_port_in_use_further_along_the_row_is_named_too() -> None:
    with bound() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"needs ports {port - 1} to {port + 1}"):
            choose_ports(3, port - 1)


def test_a_port_that_somebody_listens_on_at_every_address_is_in_use_here_too() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        with pytest.raises(ConfigError, match="in use"):
            choose_ports(1, listener.getsockname()[1])


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("".join(f"line {i}\n" for i in range(50_000)))
    assert tail(log, 3) == ["line 49997", "line 49998", "line 49999"]
    log.write_bytes(b"caf\xc3\xa9 \xff\n")
    assert tail(log, 5) == ["café \ufffd"]
    log.write_text("")
    assert tail(log, 5) == []


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (UNKNOWN_ARCHITECTURE, "Model architectures ['NobodyKnowsForCausalLM'] are not supported"),
        (CORRUPT_CONFIG, "OSError: It looks like the config file at '/m/config.json' is not a valid JSON file."),
        (DEAD_CORE, "ValueError: No available memory for the cache blocks."),
        (DEAD_CORE[3:], "RuntimeError: Engine core initialization failed"),
        (["INFO all is well", "Killed", ""], "Killed"),
        (["    assert whole", "AssertionError", "INFO bye"], "AssertionError"),
        (["OSError: [Errno 98] Address already in use", "INFO bye"], "Address already in use"),
        ([], "its log is empty"),
        (["", "  "], "its log is empty"),
    ],
)
def test_the_reason_of_a_death_is_the_line_that_tells_most(lines: list[str], reason: str) -> None:
    assert reason in reason_in(lines)


def test_a_very_long_reason_is_cut() -> None:
    assert len(reason_in(["ValueError: " + "x" * 5000])) < 500


def test_the_stage_of_a_start_goes_forward_with_the_log() -> None:
    log = [
        "",
        "(APIServer pid=1) INFO [utils.py:306] vLLM API server version 0.32.0",
        "(EngineCore pid=9) INFO Initializing a V1 LLM engine",
        "(EngineCore pid=9) INFO Starting to load model /m...",
        "(EngineCore pid=9) INFO Loading model weights took 0.1 GB",
        "(EngineCore pid=9) INFO GPU KV cache size: 1,000 tokens",
        "(APIServer pid=1) INFO Starting vLLM server on http://127.0.0.1:8000",
    ]
    assert [stage_in(log[: i + 1]) for i in range(len(log))] == [
        "importing vLLM",
        "starting its engine core",
        "starting its workers",
        "building the model",
        "sizing its cache",
        "warming up",
        "starting its server",
    ]
