"""`shoal serve`: start one engine in the foreground, for trainers that attach to it from this host or another."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from types import FrameType

from shoal import vllm_compat
from shoal.engines.command import EngineSpec, serve_command, serve_environment
from shoal.engines.key import need_key
from shoal.engines.process import choose_ports, guarded_command
from shoal.errors import ConfigError, PlacementError
from shoal.placement.devices import Device, discover_devices, usable_cpu_cores
from shoal.placement.parse import parse_devices
from shoal.vllm_plugin.gate import KEY_VARIABLE

_NAME = "engine"
_LOWEST_PORT = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal serve`."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder or hub id; its weights are not read")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="to listen on (default: 8000)")
    parser.add_argument("--key-file", metavar="PATH", help=f"file with the key, mode 600 (default: ${KEY_VARIABLE})")
    parser.add_argument("--devices", default="auto", metavar="SPEC", help='GPUs, such as "cuda:2,cuda:3", or "cpu"')
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallel size (default: 1)")
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="of the weights (default: the model's)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="context, in tokens (default: the model's)")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="share of each GPU (default: 0.9)"
    )
    parser.add_argument("--cpu-kv-cache-gib", type=int, default=1, metavar="N", help="for the KV cache on CPUs")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="vLLM's own; every sample brings its own")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--extra-args", default="{}", metavar="JSON", help="further flags of vllm serve")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")


def run(args: argparse.Namespace) -> int:
    """Serve until told to end.

    Raises:
        ConfigError: There is no key, or a flag cannot be what it is.
        PlacementError: There are too few devices.
    """
    spec = engine_spec(args)
    if args.dry_run:
        print(dry_run_text(spec))
        return 0
    key = need_key(args.key_file, os.environ)
    choose_ports(1, spec.port, spec.host)  # refuses one that is taken before vLLM is imported for half a minute
    print(f"shoal serve: {spec.model_dir} at http://{spec.host}:{spec.port}, for vllm_server_base_urls", flush=True)
    return _serve(spec, key)


def engine_spec(args: argparse.Namespace) -> EngineSpec:
    """Return what the arguments ask for.

    Raises:
        ConfigError: A flag cannot be what it is.
        PlacementError: There are too few devices.
    """
    if not _LOWEST_PORT <= args.port <= 65535:
        raise ConfigError(f"--port={args.port} is no port that a user can listen on. Choose one from 1024 to 65535.")
    for flag, value in (("--tp", args.tp), ("--pp", args.pp)):
        if value < 1:
            raise ConfigError(f"{flag}={value} is too small: there must be at least one worker.")
    devices = _devices(args.devices, args.tp * args.pp)
    return EngineSpec(
        name=_NAME,
        model_dir=Path(args.model),
        port=args.port,
        host=args.host,
        cuda_devices=tuple(device.visible_id for device in devices),
        cpu_cores=() if devices else usable_cpu_cores(),
        tensor_parallel_size=args.tp,
        pipeline_parallel_size=args.pp,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.gpu_memory_utilization,
        cpu_kv_cache_gib=args.cpu_kv_cache_gib,
        seed=args.seed,
        extra_arguments=_extra_arguments(args.extra_args)
        | ({"trust-remote-code": True} if args.trust_remote_code else {}),
    )


def dry_run_text(spec: EngineSpec) -> str:
    """Write what would be started as lines for a shell, the key left to the environment."""
    added = serve_environment(spec, f"${KEY_VARIABLE}", {})
    lines = [f'export {name}="{value}"' for name, value in added.items()]
    return "\n".join([*lines, shlex.join(serve_command(spec))])


def _devices(setting: str, num_workers: int) -> tuple[Device, ...]:
    """Return the GPUs to use; nothing for CPUs."""
    asked = parse_devices(setting, setting="--devices")
    present = () if asked.kind == "cpu" or vllm_compat.is_cpu_build() else discover_devices()
    if asked.kind == "colocate" or (asked.num_engines or 1) > 1:
        raise PlacementError(f'--devices="{setting}" is for trainers. Give the GPUs of this one engine, or "cpu".')
    if asked.kind == "cpu" or (asked.kind == "auto" and not present):
        return ()
    by_index = {device.index: device for device in present}
    wanted = asked.indices if asked.kind == "cuda" else tuple(by_index)[:num_workers]
    if missing := [f"cuda:{index}" for index in wanted if index not in by_index]:
        raise PlacementError(f'--devices="{setting}" names {", ".join(missing)}, which this process does not see.')
    if len(wanted) != num_workers:
        raise PlacementError(
            f"--tp times --pp needs {num_workers} GPUs, and there are {len(wanted)}. Give smaller sizes, or "
            "other --devices."
        )
    return tuple(by_index[index] for index in wanted)


def _extra_arguments(text: str) -> dict[str, object]:
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-args={text!r} is not JSON: {error}.") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-args={text!r} is no JSON object. Write '{{\"max-num-seqs\": 64}}', for example.")
    return {str(name).lstrip("-").replace("_", "-"): value for name, value in extra.items()}


def _serve(spec: EngineSpec, key: str) -> int:
    """Run the engine behind its guard, which ends it when this process is gone; pass on what ends this one."""
    engine = subprocess.Popen(
        guarded_command(spec),
        env=serve_environment(spec, key, os.environ),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    told = False

    def end(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        engine.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    status = engine.wait()
    return 0 if told else status or 1
