"""What the tests of the command line share: processes of `selfhost`, which end with their test."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import selfhost
from selfhost.demo_model import write_demo_model

SECONDS = 30.0  # for a process to start or to end on a busy machine

# Whatever ran the tests may have had signals ignored, which a process hands on.
DEFAULT_SIGNALS = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Command:
    """A running `selfhost`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def lines_until(self, start: str) -> list[str]:
        """Return what it prints, up to the line that starts so."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return lines
        pytest.fail(f"it ended with {self.process.wait()}: {lines} {self.process.stderr.read()}")

    def end(self, number: Optional[int] = None) -> tuple[int, str]:
        """Send a signal, if any; return the exit code and what is on stderr."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Make a model directory called my-model."""
    write_demo_model(str(tmp_path / "my-model"))
    return tmp_path / "my-model"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return the root of the file store that the commands use."""
    return tmp_path / "kv"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return a small environment: nothing set but what Python needs and where the test's things are."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(Path(selfhost.__file__).parents[1]),
        "TMPDIR": str(tmp_path),
        "DYN_FILE_KV": str(tmp_path / "kv"),
        "DYN_MDC_CACHE": str(tmp_path / "cache"),
    }


def command_line(arguments: tuple[object, ...], script: Optional[str] = None) -> list[str]:
    """Return the command line of a process that reports every warning."""
    what = ["-m", "selfhost"] if script is None else ["-c", script]
    python = [sys.executable, "-X", "dev", *what]
    return [sys.executable, "-c", DEFAULT_SIGNALS, *python, *map(str, arguments)]


@pytest.fixture
def run(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one command to its end."""

    def run_to_end(*arguments: object, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(arguments),
            env={**environment, **more},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    return run_to_end


@pytest.fixture
def run_without(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one command whose descriptor of that number is closed from the start."""

    def run_to_end(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", f'exec "$@" {number}>&-', "sh", *command_line(arguments)]
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    return run_to_end


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Command]]:
    """Start one command, or a script in its place; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_process(
        *arguments: object, script: Optional[str] = None, stdout: Any = subprocess.PIPE, **more: str
    ) -> Command:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE}
        line = command_line(arguments, script)
        started.append(subprocess.Popen(line, env={**environment, **more}, text=True, **pipes))
        return Command(started[-1])

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def read_terminal() -> Callable[[int], str]:
    """Return a function that reads all that was written to a pseudo-terminal whose other end is closed."""

    def read(leader: int) -> str:
        pieces = []
        with contextlib.suppress(OSError):  # EIO: that was all
            while piece := os.read(leader, 1 << 16):
                pieces.append(piece)
        return b"".join(pieces).decode()

    return read


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """Return the writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)
