"""Locks: who waits, for how long, and what happens where there are none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cache_kit import environment, names

from selfhost.frontend.folders import Root
from selfhost.frontend.locks import Locks

NAME = "0" * 64


class Waiting:
    """A clock that goes on only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def waiting() -> Waiting:
    """Return a clock of its own."""
    return Waiting()


@pytest.fixture
def root(tmp_path: Path, leaves_nothing: None) -> Root:
    """Return the root of a cache that does not exist yet."""
    return Root(str(tmp_path / "mdc"))


def test_waiting_ends_when_it_is_of_no_use(
    root: Root, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    """A waiter that is told to give up does so at its next try, without a word."""
    held = Locks(root, seconds=0)
    waiter = Locks(root, seconds=3600, clock=waiting.clock, sleep=waiting.sleep)

    with held.hold(NAME), waiter.hold(NAME, give_up=lambda: waiting.now > 0.1) as is_granted:
        assert not is_granted
    assert 0.1 < waiting.now < 0.2
    assert caplog.messages == []


def test_lock_is_granted_and_given_back(root: Root) -> None:
    """Whoever comes later gets it too; the file stays."""
    made = Locks(root, seconds=0)

    for _ in range(2):
        with made.hold(NAME) as is_granted:
            assert is_granted
    assert names(Path(root.path, "locks")) == [NAME]


def test_waiter_goes_on_without_the_lock(
    root: Root, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    """After the time that was set, with a warning; other digests do not wait."""
    waiter = Locks(root, seconds=30.0, clock=waiting.clock, sleep=waiting.sleep)

    with Locks(root, seconds=0).hold(NAME), waiter.hold(NAME) as same, waiter.hold("1" * 64) as other:
        assert (same, other) == (False, True)
    assert waiting.now == pytest.approx(30.0)
    assert waiting.pauses[0] == 0.001
    assert max(waiting.pauses) == 0.05
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "waited 30 s for the lock '0000" in caplog.text


def test_shared_locks_do_not_exclude_each_other(root: Root) -> None:
    """Publishers share a lock that only a collector wants for itself."""
    made = Locks(root, seconds=0)

    with made.hold(NAME, shared=True) as first, made.hold(NAME, shared=True) as second:
        assert first
        assert second
        with made.hold(NAME) as exclusive:
            assert not exclusive


def test_threads_exclude_each_other(root: Root) -> None:
    """Each holder has a descriptor of its own."""
    made = Locks(root, seconds=10.0)
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(5):
            with made.hold(NAME) as is_granted:
                inside.append(1)
                most.append(len(inside) if is_granted else 99)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == [1] * 40


def test_killed_holder_delays_nobody(root: Root) -> None:
    """The kernel gives back what a dead process held. # catalogue 132"""
    script = (
        "import sys, time; from selfhost.frontend.cache import BlobCache, Checksum\n"
        "with BlobCache(sys.argv[1]).lock(Checksum(sys.argv[2])): print('held', flush=True); time.sleep(10)"
    )
    command = [sys.executable, "-c", script, root.path, NAME]
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with Locks(root, seconds=0).hold(NAME) as is_granted:
            assert not is_granted
        child.send_signal(signal.SIGKILL)
        with Locks(root, seconds=10.0).hold(NAME) as is_granted:
            assert is_granted


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS, errno.EIO])
def test_no_locks_is_said_once(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Where flock does not work, everybody goes on at once."""

    def refuse(fd: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    made = Locks(root, seconds=30.0)

    for _ in range(3):
        with made.hold(NAME) as is_granted:
            assert not is_granted
    assert caplog.text.count("no locks in the cache") == 1


# catalogue 27
@pytest.mark.parametrize("what", ["file", "folder"])
def test_planted_link_is_not_followed(
    root: Root, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """A link under a lock's name, or in place of the folder, means no lock, and its target is not made."""
    victim = tmp_path / "victim"
    folder = Path(root.path, "locks")
    folder.parent.mkdir(0o700)
    if what == "file":
        folder.mkdir()
        (folder / NAME).symlink_to(victim)
    else:
        folder.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()

    with Locks(root, seconds=0).hold(NAME) as is_granted:
        assert not is_granted
    assert not victim.exists()
    assert names(tmp_path / "elsewhere") == []


def test_error_inside_gives_the_lock_back(root: Root) -> None:
    """What goes wrong under the lock passes through."""
    made = Locks(root, seconds=0)
    with pytest.raises(KeyError), made.hold(NAME):
        raise KeyError

    with made.hold(NAME) as is_granted:
        assert is_granted


def test_squatted_lock_file_of_any_kind(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    """A FIFO that waits for a reader, or a folder, must not block anybody."""
    folder = Path(root.path, "locks")
    folder.mkdir(parents=True)
    os.mkfifo(folder / NAME)
    (folder / ("1" * 64)).mkdir()
    caplog.set_level(logging.ERROR)

    for name in (NAME, "1" * 64):
        with Locks(root, seconds=0).hold(name):
            pass
