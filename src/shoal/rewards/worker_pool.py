"""A fixed number of worker processes for calls from an event loop; one that had to be killed is replaced."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref

from shoal.rewards.threads import run_in_daemon_thread
from shoal.rewards.worker_process import Call, Reply, Setup
from shoal.rewards.workers import Worker, WorkerLauncher

_THREAD_GRACE_S = 5.0
_LAUNCH_GRACE_S = 150.0


class WorkerPool:
    """Keeps up to `num_workers` processes that hold the same functions.

    Args:
        setup: Where they get the functions.
        num_workers: Calls that can run at the same time.
    """

    def __init__(self, setup: Setup, *, num_workers: int) -> None:
        self._launcher = WorkerLauncher(setup)
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        # asyncio's semaphores belong to one loop; the check before training runs on another than the training.
        self._slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def idle_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that wait for a call."""
        with self._lock:
            return tuple(worker.pid for worker in self._idle)

    async def start(self) -> None:
        """Start all workers, so that no call has to wait for one.

        Raises:
            RewardError: One could not get the functions, or did not start.
        """
        missing = range(self._num_workers - len(self.idle_pids))
        workers = await asyncio.gather(*(self._launch() for _ in missing), return_exceptions=True)
        for worker in workers:
            if isinstance(worker, Worker):
                self._put_back(worker)
        for error in workers:
            if isinstance(error, BaseException):
                raise error

    async def call(self, call: Call, *, timeout_s: float) -> Reply:
        """Have a free worker make the call; wait for one if none is.

        A call that takes too long, or that nobody waits for any more, is ended with its worker.

        Args:
            call: What to call.
            timeout_s: How long the call itself may take, in seconds.

        Raises:
            TimeoutError: It took longer.
            WorkerEndedError: The worker ended instead of answering.
            RewardError: A worker that had to be replaced did not start.
        """
        async with self._slot():
            worker = self._take_idle() or await self._launch()
            work = functools.partial(worker.call, call, timeout_s=timeout_s)
            try:
                outcome = await run_in_daemon_thread(
                    work, timeout_s=timeout_s + _THREAD_GRACE_S, name=f"shoal-worker-{worker.pid}"
                )
            except BaseException:
                worker.kill()
                raise
            if outcome.error is not None:
                raise outcome.error
            self._put_back(worker)
            reply: Reply = outcome.value
            return reply

    def close(self) -> None:
        """Kill all workers, whatever they do. A later call starts others."""
        with self._lock:
            self._idle.clear()
        self._launcher.close()

    async def _launch(self) -> Worker:
        outcome = await run_in_daemon_thread(
            self._launcher.launch, timeout_s=_LAUNCH_GRACE_S, name="shoal-worker-start"
        )
        if outcome.error is not None:
            raise outcome.error
        worker: Worker = outcome.value
        return worker

    def _take_idle(self) -> Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_running():
                    return worker
        return None

    def _put_back(self, worker: Worker) -> None:
        with self._lock:
            if not worker.has_ended:  # the pool was closed meanwhile
                self._idle.append(worker)

    def _slot(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if loop not in self._slots:
            self._slots[loop] = asyncio.Semaphore(self._num_workers)
        return self._slots[loop]
