"""Who the other members of a group are, and whether their processes are still there."""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from shoal.wire.rendezvous import Store, join_store

_STORE_PERIOD_S = 1.0
_LEAST_PATIENCE_S = 0.2
_LEAVE_S = 1.0
_LAST_WAIT_S = 5.0


class LateError(TimeoutError):
    """Members did not take or bring in time what is under way.

    Args:
        message: What happened.
        members: Ranks in the group of those that are known to be late.
    """

    def __init__(self, message: str, members: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.members = tuple(members)


class GoneError(ConnectionError):
    """A member has left, or its process has ended.

    Args:
        message: What happened.
        member: Its rank in the group.
    """

    def __init__(self, message: str, member: int) -> None:
        super().__init__(message)
        self.members = (member,)


def patience_left(posted: float, timeout_s: float) -> float:
    """Return how long to wait for what was posted at a time, in seconds: it ages while others are waited for."""
    return max(_LEAST_PATIENCE_S, posted + timeout_s - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process, such that another one that gets its number later is told apart.

    Attributes:
        place: Boot of the machine and namespace of process numbers; `""` where the system does not tell.
        pid: Process number there.
        started: When it started, in the kernel's ticks.
    """

    place: str
    pid: int
    started: int

    @classmethod
    def own(cls) -> ProcessIdentity:
        """Describe this process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            place = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        except OSError:
            place = ""
        return cls(place=place, pid=os.getpid(), started=_start_time(os.getpid()) or 0)

    def is_dead(self) -> bool:
        """Whether it ended. False where that cannot be told from here, as on another machine."""
        own_place = ProcessIdentity.own().place
        if not own_place or own_place != self.place:
            return False
        return _start_time(self.pid) != self.started


class Peers:
    """The other members that this one exchanges parcels with.

    Args:
        store: Where the members meet.
        rank: Of this member.
        others: Ranks of the others; blocks until each has made its own `Peers`.
        timeout_s: For that.

    Raises:
        torch.distributed.DistStoreError: One did not come in time.
        GoneError: One does not come, see `excuse`.
    """

    def __init__(self, store: Store, *, rank: int, others: Iterable[int], timeout_s: float) -> None:
        self._store = store
        self._others = tuple(others)
        self._timeout_s = timeout_s
        store.set(_member_key(rank), json.dumps(asdict(ProcessIdentity.own())))
        store.wait([_member_key(other) for other in self._others], timedelta(seconds=timeout_s))
        self._identities = {other: _identity(store, other) for other in self._others}
        self._departure: ConnectionError | None = None
        self._leaving = threading.Event()
        # A store whose server is stopped answers never, and its calls have no time-out: they have a thread to block.
        self._thread = threading.Thread(target=self._watch, args=(rank,), daemon=True, name="weight-peers")

    def check_alive(self, ranks: Iterable[int]) -> None:
        """Look whether the processes of `ranks` exist.

        Raises:
            GoneError: One has ended.
        """
        for rank in ranks:
            identity = self._identities[rank]
            if identity.is_dead():
                raise GoneError(f"member {rank} of the weight transfer has died (process {identity.pid})", rank)

    def check_all(self) -> None:
        """Look whether all others exist and none was seen to leave.

        Raises:
            ConnectionError: One is gone (`GoneError`), or the store is, which the first trainer rank serves.
        """
        self.check_alive(self._others)
        if self._departure is not None:
            raise self._departure

    def watch_store(self) -> None:
        """Begin to look for members that leave, wherever they run. `leave` ends it."""
        self._thread.start()

    def leave(self) -> None:
        """Tell the others that this member is gone."""
        self._leaving.set()
        if self._thread.ident is not None:
            self._thread.join(_LEAVE_S)
        if self._thread.is_alive():
            # An interpreter that ends while a thread is within the store's code would be aborted.
            atexit.register(self._thread.join, _LAST_WAIT_S)

    def _watch(self, rank: int) -> None:
        """Ask the store, over a connection of this thread's own, until this member leaves."""
        try:
            store = join_store(self._store.host, self._store.port, self._timeout_s)
            while not self._leaving.wait(_STORE_PERIOD_S):
                gone = [other for other in self._others if store.check([_gone_key(other)])]
                if gone:
                    self._departure = GoneError(f"member {gone[0]} has left the weight transfer", gone[0])
                    break
            self._leaving.wait()
            store.set(_gone_key(rank), "")
        except dist.DistError as error:
            self._departure = ConnectionError(f"the first trainer rank's store cannot be reached any more: {error}")


def expel(store: Store, rank: int) -> None:
    """Tell all members that one is gone, in its place."""
    store.set(_gone_key(rank), "")


def excuse(store: Store, rank: int) -> None:
    """Have no member that has not met one yet wait for it: it does not come."""
    store.set(_member_key(rank), "")


def _identity(store: Store, rank: int) -> ProcessIdentity:
    said = store.get(_member_key(rank))
    if not said:
        raise GoneError(f"member {rank} of the weight transfer does not come", rank)
    return ProcessIdentity(**json.loads(said))


def _member_key(rank: int) -> str:
    return f"member/{rank}"


def _gone_key(rank: int) -> str:
    return f"gone/{rank}"


def _start_time(pid: int) -> int | None:
    """Return when a process started; `None` if there is none, or none that still runs (a zombie)."""
    try:
        # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
