"""How long a model of ours lives in a store that the real frontend sweeps: as long as its worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import selfhost

SWEEP_SECONDS = 13.5  # records untouched for 10 s go at the next sweep, 3.3 s later at most

WORKER = """
import sys, threading
from selfhost import DistributedRuntime, register_model

with DistributedRuntime() as runtime:
    endpoint = runtime.endpoint("ns.comp.ep")
    register_model("Tokens", "Chat | Completions", endpoint, sys.argv[1], "alive", worker_type="aggregated")
    threading.Event().wait()
"""


@pytest.fixture
def our_worker(
    model_dir: Any, file_kv: Path, tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start our worker in a process of its own, configured by the environment alone."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(Path(selfhost.__file__).parents[1]),
            "DYN_SELF_HOST_METADATA": "1",
            "DYN_SYSTEM_HOST": "127.0.0.1",
            "DYN_SYSTEM_PORT": "0",
            "DYN_FILE_KV": str(file_kv),
        }
        command = [sys.executable, "-c", WORKER, str(model_dir())]
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)


def test_model_outlives_the_sweeps(
    dynamo_frontend: Any, our_worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """The records are kept alive: the real frontend's sweeps of old records pass them by."""
    frontend = dynamo_frontend()
    our_worker()
    frontend.wait_for("alive")
    seen = set()
    deadline = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < deadline:
        seen.add(tuple(frontend.models()))
        time.sleep(0.1)

    assert seen == {("alive",)}


def test_killed_worker_is_swept_away(
    dynamo_frontend: Any, our_worker: Callable[[], subprocess.Popen[bytes]], file_kv: Path
) -> None:
    """A worker that had no chance to withdraw is gone when its records have grown old."""
    frontend = dynamo_frontend()
    worker = our_worker()
    frontend.wait_for("alive")

    worker.kill()
    frontend.wait_gone("alive", seconds=SWEEP_SECONDS + 4)

    assert list(file_kv.rglob("ns*")) == []
