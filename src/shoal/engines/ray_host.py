"""What runs on a Ray node: an actor that starts one engine there, behind the same guard as everywhere, and reports."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.engines.command import EngineSpec
from shoal.engines.process import EngineProcess, choose_ports

_MOST_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an engine on a node is doing.

    Attributes:
        exit_status: Of its process; None while it lives.
        printed: What it has printed since the offset that was asked for, at most 1 MiB.
    """

    exit_status: int | None
    printed: bytes


class EngineHost:
    """Owns one engine on the node it runs on. It becomes an actor where it is used, so that Ray is imported there only.

    When the actor's process ends, by whatever way, the engine's guard ends the engine.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-engine-"))
        self._engine: EngineProcess | None = None

    def start(self, spec: EngineSpec, api_key: str, files: Mapping[str, Mapping[str, bytes]]) -> str:
        """Start the engine, and return the URL that it will serve at.

        Args:
            spec: What to start; its folders, address, port and devices are decided here.
            api_key: The run's key. It goes into the engine's environment, and into no command line.
            files: `"model"`, and `"adapter"` where one is served: each file's path in its folder, and its content.
        """
        import ray

        for kind, contents in files.items():
            for path, content in contents.items():
                target = self._folder / kind / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        address = ray.util.get_node_ip_address()
        (port,) = choose_ports(1, None, address)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        spec = replace(
            spec,
            model_dir=self._folder / "model",
            lora_adapter=self._folder / "adapter" if "adapter" in files else None,
            host=address,
            port=port,
            # Ray has chosen them. An engine over several nodes asks Ray for its own.
            cuda_devices=tuple(filter(None, visible.split(","))) if spec.executor == "mp" else spec.cuda_devices,
        )
        self._engine = EngineProcess(spec, api_key, self._folder / "engine.log")
        return f"http://{f'[{address}]' if ':' in address else address}:{port}"

    def report(self, offset: int) -> Report:
        """Say how the engine is doing.

        Args:
            offset: Bytes of its output that are known already.
        """
        engine = self._engine
        if engine is None:
            return Report(exit_status=None, printed=b"")
        status = engine.exit_status()  # before its last words are read
        with engine.log_path.open("rb") as log:
            log.seek(offset)
            return Report(exit_status=status, printed=log.read(_MOST_AT_ONCE))

    def end(self) -> None:
        """End the engine and wait until nothing of it is left."""
        if self._engine is not None:
            self._engine.ask_to_end()
            self._engine.wait_ended()
        shutil.rmtree(self._folder, ignore_errors=True)
