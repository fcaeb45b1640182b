"""The folder through which the processes of one host share a registry: who may use it, and its one lock.

    journal          what was registered and removed, in order (shared_journal.py)
    content/<hex>    each content once (shared_content.py)
    owners/<token>   one file per process that registers, locked as long as that lives (shared_owners.py)
    lock             held by whoever changes any of these
    publish/         who of them publishes their models (discovery/shared.py)

Everything is reached through one descriptor of the folder: whatever becomes of its path, a process goes on
with the folder that it checked. On a local file system only: a network disk has other ideas of locks and of
what others have just written. One in memory (/dev/shm, /run) is best, nothing here is of use after a reboot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from typing import Optional, Union

from ..errors import RegistrationError
from .content import Descriptor

LOCK_SECONDS = 10.0  # a change takes milliseconds; who waits longer is told, and nobody for ever
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02  # seconds between two tries: flock has no time-out of its own

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
PUBLISH = "publish"
_OURS = frozenset({"content", "journal", "journal.new", "lock", "owners", PUBLISH})


class Busy(Exception):
    """Somebody else holds the lock."""


class SharedFolder:
    """An open folder that belongs to this user alone; `path` is absolute.

    Raises RegistrationError where it cannot be one, and OSError from its methods.
    """

    def __init__(self, path: Union[str, os.PathLike[str]]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.lock_seconds = LOCK_SECONDS
        try:
            self._descriptor: Optional[Descriptor] = _open_own(self.path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise self.refusal(f"cannot be used: {reason}; name another folder") from error

    def claim(self) -> None:
        """Make what is missing in a folder that is ours, or empty; under the lock. RegistrationError else."""
        if not self.has("journal") and not _OURS.issuperset(self.names(".")):
            raise self.refusal("is not empty and holds no journal; name a new one")
        for part in ("content", "owners"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=self.fd)
                os.chmod(part, 0o700, dir_fd=self.fd)  # whatever the umask is

    @property
    def fd(self) -> int:
        """The folder, for `dir_fd`. Raises OSError once it is closed."""
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the registry is closed")
        return self._descriptor.fd

    def close(self) -> None:
        """Let go of the folder; files that are open stay so."""
        self._descriptor = None

    def refusal(self, problem: str) -> RegistrationError:
        """Return the error for something that is wrong with the folder."""
        return RegistrationError(f"the shared registry's folder {self.path!r} {problem}")

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open a file below the folder, never through a link and never waiting."""
        return os.open(name, flags | FILE_FLAGS, mode, dir_fd=self.fd)

    def stat(self, name: str) -> os.stat_result:
        """Return what is known of a file below the folder."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Tell whether there is such a file."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Return the size of a file below the folder in bytes; 0 where there is none."""
        return self.stat(name).st_size if self.has(name) else 0

    def names(self, part: str) -> list[str]:
        """Return the names of what is in a part of the folder."""
        descriptor = Descriptor(os.open(part, _FOLDER_FLAGS, dir_fd=self.fd))
        return os.listdir(descriptor.fd)

    def remove(self, name: str) -> None:
        """Remove a file below the folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    @contextlib.contextmanager
    def locked(self, seconds: Optional[float] = None) -> Iterator[None]:
        """Hold the lock for the time of a `with`, against processes, threads and registries alike.

        The kernel gives it back when its holder dies. Raises Busy where others have had it for `seconds`.
        """
        fd = self.open("lock", os.O_RDWR | os.O_CREAT)
        _locks.add(fd)
        try:
            _lock(fd, self.lock_seconds if seconds is None else seconds)
            yield
        finally:
            if fd in _locks:  # else this is a child that was forked meanwhile: the lock is its parent's
                fcntl.flock(fd, fcntl.LOCK_UN)  # not only closed: such a child had a copy for a moment
                _locks.discard(fd)
                os.close(fd)


_locks: set[int] = set()  # descriptors of locks that threads of this process hold or wait for


def forget_locks() -> None:
    """In a forked child: close copies of its parent's locks, which would hold them after its death."""
    while _locks:
        os.close(_locks.pop())


def _lock(fd: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= deadline:
            raise Busy
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _open_own(path: str) -> Descriptor:
    """Open a folder that is this user's and nobody else's, or make it."""
    try:
        os.mkdir(path, 0o700)
        is_new = True
    except FileExistsError:
        is_new = False
    try:
        descriptor = Descriptor(os.open(path, _FOLDER_FLAGS))
    except NotADirectoryError:
        what = "a symbolic link" if os.path.islink(path) else "no folder"
        raise ValueError(f"it is {what}") from None
    if is_new:
        os.fchmod(descriptor.fd, 0o700)  # whatever the umask is
    found = os.fstat(descriptor.fd)
    if found.st_uid != os.geteuid():
        raise ValueError(f"it belongs to user {found.st_uid}, and this process runs as {os.geteuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise ValueError(f"others may write to it (mode {mode:04o}); `chmod 700` it")
    return descriptor
