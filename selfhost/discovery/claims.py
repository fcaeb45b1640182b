"""Which process of this host publishes a record: locks of the kernel on one file in a private folder.

Each record has three bytes in the file, where a hash of its name says; nothing is ever written there. Whoever
has locked LEADER publishes. All who would publish share MEMBERS. TURN is held for the moment in which one of
them comes or goes, so that of many who go at once one sees that it is the last.

They are POSIX record locks: the kernel takes them back however a process dies, and gives none to its
children, where an flock would live on in a child that was forked meanwhile. In return they go when *any*
descriptor of the file is closed, and do not keep threads apart. So a process opens the file once, for all its
claims, and remembers what it has claimed.

Sharing: any number of threads may join, one at a time may use a Claim. A forked child has no claims.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import threading
import time
from collections.abc import Iterator

TURN_SECONDS = 5.0  # to wait for others who come or go, which takes milliseconds unless one is stopped

_TURN, _LEADER, _MEMBERS, _SIZE = range(4)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  # seconds, between two tries: such locks have no time-out
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

Identity = tuple[int, int]  # device and inode


class AlreadyClaimed(Exception):
    """This process has joined under that name."""


def join(folder: str, name: str) -> Claim:
    """Become one of those who would publish under `name`; the folder is made where there is none.

    Raises AlreadyClaimed where this process has joined, TimeoutError where others who come or go do not get
    done, OSError where the folder is open to other users or has no locks.
    """
    make_private(folder)
    place = _place_of(name)
    file = _reserve(os.path.join(folder, "claims"), place)
    try:
        if not file.take_turn(place):
            raise TimeoutError(errno.ETIMEDOUT, f"waited {TURN_SECONDS:g} s for another process", file.path)
        file.try_lock(place + _MEMBERS, fcntl.LOCK_SH)  # nobody has it alone but in a turn
        file.unlock(place + _TURN)
    except BaseException:
        file.release(place)
        raise
    return Claim(file, place)


def make_private(folder: str) -> None:
    """Make a folder for this user alone, unless it is there; OSError where it is open to others."""
    os.makedirs(folder, 0o700, exist_ok=True)
    found = os.stat(folder)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        expected = f"expected a folder of user {os.geteuid()} alone (mode 700), found one of user"
        raise PermissionError(
            errno.EPERM, f"{expected} {found.st_uid} (mode {stat.S_IMODE(found.st_mode):o})", folder
        )


def _place_of(name: str) -> int:
    from hashlib import sha256  # costs more to load than all of this package's discovery

    return int.from_bytes(sha256(name.encode()).digest()[:7], "big") * _SIZE  # below 2**58


class Claim:
    """This process's place among those who would publish under one name.

    Every method raises OSError where the file system loses its locks.
    """

    def __init__(self, file: _ClaimFile, place: int) -> None:
        self._file = file
        self._place = place

    def lead(self) -> bool:
        """Become the leader if there is none; tell whether this process is it."""
        return self._file.try_lock(self._place + _LEADER, fcntl.LOCK_EX)

    def step_down(self) -> None:
        """Let another one lead."""
        self._file.unlock(self._place + _LEADER)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[bool]:
        """Give the claim up at the end of a `with`; yields whether this is the last one, and leads.

        False too where others who come or go do not get done.
        """
        try:
            is_alone = self._file.take_turn(self._place) and self.lead()
            yield is_alone and self._file.try_lock(self._place + _MEMBERS, fcntl.LOCK_EX)
        finally:
            self._file.release(self._place)


class _ClaimFile:
    """The open file, and which places in it this process has claimed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.places: set[int] = set()
        self._descriptor = os.open(path, _FLAGS, 0o600)
        self.identity = _identity(os.fstat(self._descriptor))

    def try_lock(self, byte: int, kind: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, kind | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX lets either mean that it is taken
            return False
        return True

    def unlock(self, byte: int, count: int = 1) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, count, byte)

    def take_turn(self, place: int) -> bool:
        """Lock a place's TURN, waiting for a while; tell whether that worked."""
        deadline, pause = time.monotonic() + TURN_SECONDS, _FIRST_PAUSE
        while not self.try_lock(place + _TURN, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        return True

    def release(self, place: int) -> None:
        """Give up a place with all its locks in one step; with the last one the file is closed."""
        with _guard:
            self.places.discard(place)
            if self.places:
                self.unlock(place, _SIZE)
            else:
                self.close()

    def close(self) -> None:
        if _files.pop(self.identity, None) is self:
            os.close(self._descriptor)


# ------------------------------------------------------------------ what this process has open

_guard = threading.Lock()
_files: dict[Identity, _ClaimFile] = {}


def _reserve(path: str, place: int) -> _ClaimFile:
    """Return the file at `path`, in which the place is this process's from now on."""
    _install_fork_hook()
    with _guard:
        file = _files.get(_identity_at(path)) or _ClaimFile(path)
        _files[file.identity] = file
        if place in file.places:
            raise AlreadyClaimed
        file.places.add(place)
        return file


def _identity_at(path: str) -> Identity:
    try:
        return _identity(os.stat(path))
    except FileNotFoundError:
        return (0, 0)


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino


@functools.cache
def _install_fork_hook() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_anew)


def _begin_anew() -> None:
    """Close, in a forked child, what its parent has open, whose locks that leaves alone."""
    global _guard
    _guard = threading.Lock()  # a thread that is not there now may have held it
    for file in list(_files.values()):
        file.close()
