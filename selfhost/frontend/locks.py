"""One lock between processes and threads per digest: it saves work, correctness never needs it.

A lock is flock on a file in the cache's `locks` folder. The kernel gives it back when its holder dies, so a
killed holder delays nobody. Lock files are never removed: a process that waits on a file that another removes
would hold a lock that a third one cannot see. They are empty, one per digest ever fetched. Nobody's lock is
ever taken away: who has waited long enough goes on without it.

flock silently grants everybody on some network file systems, is refused on others and means only this host on
most. In each case the worst that happens is that a file is fetched more than once.

Each holder has a descriptor of its own, so threads exclude each other too. A child forked while a lock is
held shares it until parent and child have let go.

A model's directory is locked itself, which tells the garbage collector that it is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from typing import Callable, Optional

from ..errors import CacheError
from .folders import LOCKS, Root, attempt

logger = logging.getLogger(__name__)

# First and longest pause between two tries, in seconds. flock has no time-out of its own that threads could
# use. A blob of one megabyte is there after some milliseconds; 50 ms is what a waiter loses at most.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05

_HOLD_SECONDS = 5.0  # to wait for a collector, which needs a few milliseconds

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def _never() -> bool:
    return False


class Locks:
    """The locks of one cache. `clock` is monotonic; it and `sleep` are in seconds."""

    def __init__(
        self,
        root: Root,
        *,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self._root = root
        self._clock = clock
        self._sleep = sleep
        self._is_reported = False

    @contextlib.contextmanager
    def hold(
        self, name: str, *, shared: bool = False, give_up: Callable[[], bool] = _never
    ) -> Iterator[bool]:
        """Hold the lock `name` for the time of a `with`; whether it was granted is what comes back.

        False after `seconds` of waiting (with a warning), as soon as `give_up()` is true, or at once where
        the file system has no locks.
        """
        fd = self._open(name)
        try:
            yield fd is not None and self._wait(fd, name, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, give_up)
        finally:
            if fd is not None:
                os.close(fd)  # which also unlocks

    def _open(self, name: str) -> Optional[int]:
        try:
            with self._root.open(make=True) as opened:
                return os.open(name, _FLAGS, 0o600, dir_fd=opened[LOCKS].fd)
        except (OSError, CacheError) as err:
            self._report(err)
            return None

    def _wait(self, fd: int, name: str, kind: int, give_up: Callable[[], bool]) -> bool:
        try:
            is_granted = flock(
                fd, kind, seconds=self.seconds, clock=self._clock, sleep=self._sleep, give_up=give_up
            )
        except OSError as err:
            self._report(err)
            return False
        if not is_granted and not give_up():
            logger.warning(
                "waited %g s for the lock %r of the cache %r and went on without it",
                self.seconds,
                name,
                self._root.path,
            )
        return is_granted

    def _report(self, err: Exception) -> None:
        """Say once that there are no locks here."""
        if not self._is_reported:
            self._is_reported = True
            logger.warning(
                "no locks in the cache %r (%s): files may be fetched more than once", self._root.path, err
            )


def is_held(fd: int) -> Optional[bool]:
    """Whether somebody holds a lock on this open file; None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def flock(
    fd: int,
    kind: int,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
    give_up: Callable[[], bool] = _never,
) -> bool:
    """Lock the descriptor, waiting at most `seconds` and until `give_up()`; whether that worked comes back.

    `kind` is fcntl.LOCK_SH or LOCK_EX. Raises OSError where there are no locks.
    """
    deadline = clock() + seconds
    pause = _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            left = deadline - clock()
            if left <= 0 or give_up():
                return False
            sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)


@contextlib.contextmanager
def hold_folder(path: str) -> Iterator[None]:
    """Keep garbage collection away from the model directory `path`; see BlobCache.hold."""
    with attempt("hold the model directory", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # The collector locks a directory for the moment in which it looks at it or renames it.
        try:
            if not flock(fd, fcntl.LOCK_SH, seconds=_HOLD_SECONDS):
                logger.warning("somebody else has locked the model directory %r all the time", path)
        except OSError as err:  # no locks here: then the collector cannot tell, and removes nothing
            logger.debug("cannot lock %r: %s", path, err)
        with attempt("hold the model directory", path):
            is_there = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
        if not is_there:
            raise CacheError(f"the model directory {path!r} was collected: resolve again", path=path)
        yield
    finally:
        os.close(fd)  # which also unlocks
