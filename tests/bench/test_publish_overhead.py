"""The benchmark of what is around the copies of a publish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "publish_overhead.py"


def test_a_publish_takes_at_least_as_long_as_its_copies() -> None:
    command = [sys.executable, str(SCRIPT), "--gb-per-s", "100", "--repeats", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["copies_ms"] == 163.81
    assert found["publish_ms"] >= found["copies_ms"]
