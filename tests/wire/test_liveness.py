"""Whether another process still runs, told without its help."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from shoal.wire.liveness import GoneError, Peers, ProcessIdentity, excuse
from shoal.wire.rendezvous import host_store, join_store

PRINT_IDENTITY = """
import json, time, dataclasses
from shoal.wire.liveness import ProcessIdentity
print(json.dumps(dataclasses.asdict(ProcessIdentity.own())), flush=True)
time.sleep(60)
"""


def test_a_killed_process_is_dead_before_anyone_has_reaped_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", PRINT_IDENTITY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        identity = ProcessIdentity(**json.loads(process.stdout.readline()))
        assert identity.pid == process.pid
        assert not identity.is_dead()
        process.kill()
        deadline = time.monotonic() + 60
        while not identity.is_dead() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert identity.is_dead()
    finally:
        process.kill()
        process.communicate()


def test_another_process_under_the_same_number_does_not_pass_for_it() -> None:
    own = ProcessIdentity.own()
    assert not own.is_dead()
    assert replace(own, started=own.started + 1).is_dead()


def test_nothing_is_said_of_a_process_of_another_machine() -> None:
    own = ProcessIdentity.own()
    assert not replace(own, place="elsewhere", started=own.started + 1).is_dead()
    assert not replace(own, place="", started=own.started + 1).is_dead()


def test_a_member_that_leaves_is_seen_through_the_store() -> None:
    store = host_store("127.0.0.1", timeout_s=60)
    store.set("member/1", '{"place": "elsewhere", "pid": 1, "started": 1}')
    first = Peers(store, rank=0, others=[1], timeout_s=60)
    second = Peers(store, rank=1, others=[0], timeout_s=60)
    first.watch_store()
    second.watch_store()
    first.check_all()
    second.leave()
    deadline = time.monotonic() + 60
    with pytest.raises(ConnectionError, match="member 1 has left"):
        while time.monotonic() < deadline:
            first.check_all()
            time.sleep(0.05)
    first.leave()


def test_nobody_waits_for_a_member_that_is_excused() -> None:
    store = host_store("127.0.0.1", 60)
    asker = join_store(store.host, store.port, 60)  # a waiting call holds its connection
    with ThreadPoolExecutor(1) as threads:
        meeting = threads.submit(Peers, store, rank=0, others=[1, 2], timeout_s=60)
        Peers(join_store(store.host, store.port, 60), rank=1, others=[0], timeout_s=60)
        began = time.monotonic()
        excuse(asker, 2)
        with pytest.raises(GoneError, match="member 2 of the weight transfer does not come"):
            meeting.result(50)
    assert time.monotonic() - began < 50
