"""One publish under way, on every trainer rank."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from shoal.errors import EnginesLostError, WeightProofError, WeightSyncError
from shoal.types import UNPROVEN, PublishReport
from shoal.weights.control import answer_of
from shoal.weights.group import EngineGroup
from shoal.weights.line import LAST_WORDS_S, PATIENCE, EngineLine
from shoal.weights.proof import mismatch, prove
from shoal.weights.sender import SendReport
from shoal.wire.agreement import Cargo, Verify
from shoal.wire.digest import unsigned

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class PublishRun:
    """Sends the current weights under one version. `transfer` and `finish` are collectives.

    Each engine has a thread on rank 0 that wakes it if it sleeps, pauses it and then has its workers receive, while all
    ranks begin to send: what they load and post meanwhile waits in the transport.

    Args:
        group: With the engines that are left.
        version: Of the weights.
        verify: How what arrives is compared.
    """

    def __init__(self, group: EngineGroup, version: int, verify: Verify) -> None:
        self._group = group
        self._version = version
        self._verify: Verify = verify
        self._lost: dict[int, Exception] = {}
        self._failure: Exception | None = None
        self._num_digests = 0
        self._num_bytes = 0
        self._paused: set[int] = set()
        self._pause_s = 0.0
        self._wake_s = 0.0
        self._began = self._lap_began = time.monotonic()
        self._phases = dict.fromkeys(("wake", "pause", "wire", "prove", "resume"), 0.0)
        self._updates: dict[int, Future[list[Any]]] = {}
        for control in group.controls:
            control.client.weight_version = UNPROVEN

    def transfer(self, cargo: Cargo) -> None:
        """Send one cargo to all that are left, and prove it."""
        group = self._group
        group.attempt += 1
        live = list(group.live)
        if group.ranks.rank == 0:
            self._updates = {index: self._start_update(index, cargo) for index in live}
        report, failure = self._send(cargo, live)
        if any(group.lines[index].wakes_on_own_device for index in live):
            torch.cuda.empty_cache()  # it is about to take the memory of its KV cache again
        accounts = group.ranks.gather_json(_account(report, failure))
        if errors := [account["error"] for account in accounts if account["error"]]:
            if failure is not None:
                raise failure
            raise WeightSyncError(f"another trainer rank could not send its weights: {errors[0]}")
        assert report is not None
        expected = group.ranks.sum(report.digests)
        self._num_bytes += sum(account["num_bytes"] for account in accounts)

        def on_rank_zero() -> list[int]:
            held = self._await(accounts)
            self._lap("wake", until=self._began + self._wake_s)
            self._lap("pause", until=self._began + self._wake_s + self._pause_s)
            self._lap("wire")
            for account in accounts:
                for name, sources in account["mismatches"].items():
                    self._lose(self._index(name), mismatch(name, sources, self._version))
            if self._verify != "off":
                self._prove_all(cargo, held, expected)
            return [index for index in live if index not in self._lost]

        group.keep(group.ranks.json(on_rank_zero))
        self._lap("prove")

    def finish(self) -> PublishReport:
        """Resume the engines that hold the new weights; say what became of the others.

        Raises:
            EnginesLostError: No engine is left.
            WeightProofError: An engine holds something else than was sent.
        """
        group = self._group
        data = group.ranks.json(self._resume)
        group.keep(data["live"])
        self._lap("resume")
        if data["is_proof"]:
            raise self._failure or WeightSyncError(data["failure"])
        if data["failure"]:
            raise EnginesLostError(data["failure"], data["lost"])
        return PublishReport(
            version=self._version,
            num_workers=sum(group.lines[index].num_workers for index in data["live"]),
            num_digests=data["num_digests"],
            num_bytes=self._num_bytes,
            lost=data["lost"],
            seconds=time.monotonic() - self._began,
            phases=dict(self._phases),
        )

    def give_up(self) -> None:
        """After a failure of the publish as a whole: let every engine go on, with nothing proven.

        All groups end: an engine that was sent a part of the weights would wait for the rest.
        """
        group = self._group
        for index in group.live:
            if group.ranks.rank == 0:
                self._release(index)
        group.keep(())

    def _start_update(self, index: int, cargo: Cargo) -> Future[list[Any]]:
        """Have an engine pause, if it has not, and receive. If it fails, nobody waits for it any longer."""
        group = self._group
        control = group.controls[index]
        info = {"attempt": group.attempt, "cargo": cargo, "verify": self._verify}
        # It waits for ranks that may be waiting for other engines, each of them for a share of the time-out.
        patience_s = group.settings.timeout_s * (1 + len(group.live))

        pauses = index not in self._paused
        self._paused.add(index)

        def update() -> list[Any]:
            if pauses:  # before its weights have memory, nothing can be received into it
                self._wake_s = max(self._wake_s, control.wake_weights())
            answers, pause_s = control.receive(pauses=pauses, patience_s=patience_s, **info)
            self._pause_s = max(self._pause_s, pause_s)
            return answers

        future = group.threads.submit(update)
        future.add_done_callback(_expelling_on_failure(group.lines[index]))
        return future

    def _send(self, cargo: Cargo, live: Sequence[int]) -> tuple[SendReport | None, Exception | None]:
        """Send this rank's part. A failure is returned, so that all ranks learn of it before any raises."""
        group = self._group
        try:
            report = group.senders[cargo].send(live, timeout_s=group.settings.timeout_s * PATIENCE, verify=self._verify)
        except Exception as error:
            for index in live:
                group.lines[index].close()  # or the other ranks and the engines would wait for the rest
            return None, error
        return report, None

    def _await(self, accounts: Sequence[Mapping[str, Any]]) -> dict[int, list[list[int]]]:
        """Wait for the engines; return what each worker of each holds, as digests."""
        group = self._group
        not_sent = {name: loss for account in accounts for name, loss in account["lost"].items()}
        limit = group.settings.timeout_s
        deadline = time.monotonic() + limit
        held = {}
        for index, update in self._updates.items():
            line = group.lines[index]
            loss = not_sent.get(line.name)
            # An engine that could not be sent to has said why by now, if it can.
            patience_s = min(LAST_WORDS_S, limit) if loss is not None else deadline - time.monotonic()
            try:
                answers = self._result(index, update, patience_s)
            except TimeoutError:
                self._lose(index, self._late(index, loss))
            except Exception as error:
                self._lose(index, error)
            else:
                if loss is None:
                    held[index] = answers
                else:
                    self._lose(index, self._late(index, loss))
        return held

    def _late(self, index: int, loss: Mapping[str, Any] | None) -> WeightSyncError:
        """Say who it is that others waited for, and in what."""
        line, limit = self._group.lines[index], self._group.settings.timeout_s
        setting = f"weight_sync_timeout_s: {limit:g} s"
        late = [line.worker_name(member) for member in loss["members"]] if loss is not None else []
        who = ", ".join(late or line.late_workers(self._group.attempt)) or line.name
        reason = loss["reason"] if loss is not None else "no answer in time"
        return WeightSyncError(f"{who} did not receive the weights: {reason} ({setting})")

    def _prove_all(self, cargo: Cargo, held: Mapping[int, list[list[int]]], expected: torch.Tensor) -> None:
        group = self._group
        values = unsigned(expected)
        for index, answers in held.items():
            try:
                for plan, digests in zip(group.plans[cargo][index], answers, strict=True):
                    sent = [values[slot] for slot in group.senders[cargo].slots[plan.worker]]
                    self._num_digests += prove(plan, digests, sent, self._version)
            except WeightProofError as error:
                self._lose(index, error)

    def _resume(self) -> dict[str, Any]:
        """On rank 0: let the engines go on, and say what became of each."""
        group = self._group
        salt = secrets.token_hex(8)
        self._resume_all()
        live = [index for index in group.live if index not in self._lost]
        for index in live:
            client = group.controls[index].client
            client.weight_version = self._version
            # Keys and values of other weights, under another salt, are never taken from the prefix cache.
            client.cache_salt = salt
        for index, error in self._lost.items():
            self._release(index)
            logger.error("%s leaves the group: %s", group.lines[index].name, error)
        errors = list(self._lost.values())
        self._failure = next((error for error in errors if isinstance(error, WeightProofError)), None)
        if not live and self._failure is None:
            self._failure = next(iter(errors), WeightSyncError("no engine is left to publish weights to"))
        return {
            "failure": str(self._failure or ""),
            "is_proof": isinstance(self._failure, WeightProofError),
            "live": live,
            "lost": {group.lines[index].name: str(error) for index, error in self._lost.items()},
            "num_digests": self._num_digests,
        }

    def _resume_all(self) -> None:
        group, limit = self._group, self._group.settings.timeout_s
        futures = {index: group.threads.submit(group.controls[index].resume) for index in group.live}
        deadline = time.monotonic() + limit
        for index, future in futures.items():
            try:
                self._result(index, future, deadline - time.monotonic())
            except TimeoutError:
                name = group.lines[index].name
                self._lose(index, WeightSyncError(f"{name} did not resume within {limit:g} s (weight_sync_timeout_s)"))
            except Exception as error:
                self._lose(index, error)

    def _result(self, index: int, future: Future[_T], patience_s: float) -> _T:
        """Wait for an engine's answer; see `answer_of`."""
        return answer_of(future, self._group.controls[index].client, patience_s)

    def _release(self, index: int) -> None:
        """Let an engine that is given up go on, once it has ended what it was told: a pause may still be on its way."""
        control = self._group.controls[index]
        if index in self._updates:
            self._updates[index].add_done_callback(lambda _: control.resume_if_possible())
        else:
            control.resume_if_possible()

    def _lap(self, phase: str, until: float | None = None) -> None:
        """Count the time since the last call as this phase's."""
        now = max(self._lap_began, time.monotonic() if until is None else until)
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._lap_began
        self._lap_began = now

    def _index(self, name: str) -> int:
        return next(index for index, line in enumerate(self._group.lines) if line.name == name)

    def _lose(self, index: int, error: Exception) -> None:
        self._lost.setdefault(index, error)


def _account(report: SendReport | None, failure: Exception | None) -> dict[str, Any]:
    """Say in plain JSON types what came of one rank's sending."""
    if report is None:
        return {"error": f"{type(failure).__name__}: {failure}"}
    return {
        "error": "",
        "lost": {name: {"reason": loss.reason, "members": list(loss.members)} for name, loss in report.lost.items()},
        "mismatches": {name: list(names) for name, names in report.mismatches.items()},
        "num_bytes": report.num_bytes,
    }


def _expelling_on_failure(line: EngineLine) -> Callable[[Future[list[Any]]], None]:
    """Return what ends the wait for an engine whose update has failed."""

    def when_done(update: Future[list[Any]]) -> None:
        if not update.cancelled() and update.exception() is not None:
            line.expel()

    return when_done
