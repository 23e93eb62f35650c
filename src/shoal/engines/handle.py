"""What a fleet needs of an engine beside its HTTP routes, wherever it runs and whoever started it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from shoal.engines.command import EngineSpec


class EngineHandle(Protocol):
    """One engine's life: a process on this host (`process`), one on a Ray node (`ray_engine`), or others' (`attached`).

    No method waits for the engine, except `wait_ended` and `start_again`.
    """

    @property
    def log_path(self) -> Path | None:
        """File on this host with what the engine has printed; None where that is not known."""
        ...

    @property
    def spec(self) -> EngineSpec | None:
        """What was started; None where others did."""
        ...

    @property
    def num_workers(self) -> int:
        """vLLM's worker processes."""
        ...

    @property
    def has_plugin(self) -> bool:
        """Whether it was started with Shoal's plugin, by which weights reach it and are proven."""
        ...

    def exit_status(self) -> int | None:
        """Return the engine's exit status, or None while it lives as far as is known."""
        ...

    def why_it_died(self) -> str:
        """Return the most telling line of what it has printed, for an error message."""
        ...

    def stage(self) -> str:
        """Say in a few words how far its start is."""
        ...

    def start_again(self) -> tuple[EngineHandle, str]:
        """Start it anew once nothing of it is left, or wait for whoever started it to do so; return it, and its URL.

        Raises:
            EngineStartError: Nothing is there.
        """
        ...

    def ask_to_end(self) -> None:
        """Begin to end it, or to leave it where it is not ours to end."""
        ...

    def wait_ended(self) -> None:
        """Wait until `ask_to_end` is done."""
        ...


class Launch(Protocol):
    """Starts engines somewhere; see `process.launch_here`."""

    def __call__(self, specs: Sequence[EngineSpec], api_key: str, log_dir: Path) -> Sequence[tuple[EngineHandle, str]]:
        """Start each engine, and return what holds it with the URL that it will serve at.

        If it fails, nothing is left of what it has started.
        """
        ...
