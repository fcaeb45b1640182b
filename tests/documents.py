"""What the tests of README.md and docs/ share: their samples, and running them as a reader would."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import selfhost
from selfhost.demo_model import write_demo_model

SECONDS = 30.0  # for what takes a second or two unless it is broken
ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


def read(name: str) -> str:
    """Return the text of a document, by its path from the project's root."""
    return (ROOT / name).read_text(encoding="utf-8")


def samples(text: str) -> dict[str, str]:
    """Return the blocks of a document whose first line is a comment with a file's name, by that name."""
    return dict(re.findall(r"```\w+\n# ([\w.-]+\.\w+)\n(.*?)```", text, re.DOTALL))


def write_samples(folder: Path, blocks: dict[str, str]) -> Path:
    """Put samples into a folder, beside the model directory `my-model` that they name; return the folder."""
    write_demo_model(str(folder / "my-model"))
    for name, block in blocks.items():
        (folder / name).write_text(block, encoding="utf-8")
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment with nothing but what Python and a sample need."""
    package = str(Path(selfhost.__file__).parents[1])
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    return {"PATH": path, "PYTHONPATH": package, "HOME": str(folder), "TMPDIR": str(folder), **more}


def run(folder: Path, *command: str, **variables: str) -> list[str]:
    """Run a command in the folder to its end, without a complaint; return what it prints, line by line."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@contextlib.contextmanager
def running(folder: Path, *command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in the folder for the time of a `with`; all that it says is its stdout.

    At the end it gets what Ctrl-C sends, unless it has ended; in any case it is gone in time.
    """
    process = subprocess.Popen(
        command, cwd=folder, env=environment(folder, **variables), text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    kill = threading.Timer(4 * SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    kill.start()
    try:
        with process:  # which waits in the end
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
    finally:
        kill.cancel()


def records(store: Path) -> list[Path]:
    """Return every file of a store."""
    return [path for path in store.rglob("*") if path.is_file()]
