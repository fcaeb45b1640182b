"""Waiting for a writer that takes no locks: as long as it writes, and no longer."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from selfhost.frontend.strangers import QUIET_SECONDS, wait_for_strangers

HEX = "ab" * 32
TEMPORARY = f"{HEX}.tmp.77.0123456789abcdef0123456789abcdef"


class Folder:
    """A folder of blobs, a clock that goes on while somebody sleeps, and what happens meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.now = 0.0
        self.meanwhile: Callable[[], Any] = lambda: None

    def sleep(self, seconds: float) -> None:
        """Let time pass, and happen what is to happen."""
        self.now += seconds
        self.meanwhile()

    def wait(self, *, seconds: float = 30.0, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the strangers in this folder."""
        return wait_for_strangers(
            self.fd, HEX, seconds=seconds, give_up=give_up, clock=lambda: self.now, sleep=self.sleep
        )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """Return an empty folder."""
    made = Folder(tmp_path)
    yield made
    os.close(made.fd)


def test_nobody_is_waited_for(folder: Folder) -> None:
    """Neither a blob nor another blob's temporary file is a stranger at work."""
    (folder.path / HEX).write_bytes(b"x")
    (folder.path / TEMPORARY.replace("ab", "cd")).write_bytes(b"x")

    assert not folder.wait()
    assert folder.now == 0


def test_growing_file_is_waited_for(folder: Folder) -> None:
    """While the file grows, and until it has its name."""
    temporary = folder.path / TEMPORARY
    temporary.write_bytes(b"")

    def grow() -> None:
        if folder.now > 5:
            temporary.rename(folder.path / HEX)
        else:
            with open(temporary, "ab") as file:
                file.write(b"x")

    folder.meanwhile = grow

    assert folder.wait()
    assert 5 < folder.now < 6


def test_quiet_file_is_waited_for_shortly(folder: Folder) -> None:
    """What a killed writer left delays a fetch by half a second, once."""
    (folder.path / TEMPORARY).write_bytes(b"x")

    assert folder.wait()
    assert QUIET_SECONDS < folder.now < QUIET_SECONDS + 0.1


def test_our_own_writers_are_no_strangers(folder: Folder) -> None:
    """They hold a lock on their file; whoever asks has waited for the digest's lock already."""
    with open(folder.path / TEMPORARY, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert not folder.wait()


@pytest.mark.parametrize("limits", [{"seconds": 2.0}, {"give_up": None}])
def test_waiting_is_bounded(folder: Folder, limits: dict[str, Any]) -> None:
    """A file that grows for ever is waited for until the time is over, or the resolve is."""
    temporary = folder.path / TEMPORARY
    temporary.write_bytes(b"")
    folder.meanwhile = lambda: os.truncate(temporary, int(folder.now * 1000))
    if "give_up" in limits:
        limits = {"give_up": lambda: folder.now > 2.0}

    assert folder.wait(**limits)
    assert 2.0 <= folder.now < 2.1


def test_planted_names_are_not_followed(folder: Folder, tmp_path: Path) -> None:
    """A link or FIFO under such a name is passed over, without blocking."""
    (folder.path / TEMPORARY).symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder.path / TEMPORARY.replace("77", "78"))
    (tmp_path / "elsewhere").write_bytes(b"x")

    assert not folder.wait()
    assert folder.now == 0
