"""One record file that this process published: make it, keep it alive, replace it, remove it.

Each record has a lock of its own that orders the operations on its file: a keep-alive that finds the file
missing must not make it again after a withdrawal. It is held during I/O on that one file, and nobody waits
for it who does not want that very file. A forked child never touches the file: it is the parent's.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import stat
import threading
from typing import Callable, Optional

from .._atomic import place_absent, place_over, staged
from .._threads import log_safely
from . import layout

logger = logging.getLogger(__name__)

_MODE = 0o644  # as Dynamo's; frontends may run as another user


class _State(enum.Enum):
    OURS = "ours"
    MISSING = "missing"
    FOREIGN = "somebody else's"


class NotOurs(Exception):
    """The record is withdrawn, the parent's, or somebody else's by now; the text says which."""


class OwnedRecord:
    """The file `path` with the bytes `data`; `now_ns` is the wall clock.

    Every method raises OSError where the disk does.
    """

    def __init__(self, path: str, data: bytes, now_ns: Callable[[], int]) -> None:
        self.path = path
        self.is_foreign = False  # as last seen
        self._data = data
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._is_live = False
        self._is_withdrawn = False  # never to be made again; a record may be withdrawn before it is made
        self._stamp: Optional[tuple[int, ...]] = None  # of the file as we left it

    def create(self, *, adopt: bool = False) -> None:
        """Make the file; FileExistsError where its name is taken, unless what is there is to be adopted.

        Raises NotOurs where it was withdrawn.
        """
        with self._lock:
            if self._is_withdrawn:  # only a close() finds a record that nobody has been given yet
                raise NotOurs("this discovery is closed")
            if not (adopt and self._look() is _State.OURS and self._touch()):
                self._put(self._data, place_over if adopt else place_absent)
            self._is_live = True

    def refresh(self) -> None:
        """Show that the owner lives; make the file again where it is gone. Somebody else's is left alone."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if not self._is_live:
                return
            state = self._look()
            if state is _State.OURS and not self._touch():
                state = _State.MISSING
            if state is _State.MISSING:
                self._put(self._data, place_absent)
                message = "%r was removed, or expired while we were stopped: made again"
                log_safely(logger, logging.INFO, message, self.path)
            elif state is _State.FOREIGN and not self.is_foreign:
                message = "%r now holds somebody else's record; it is left alone"
                log_safely(logger, logging.WARNING, message, self.path)
            self.is_foreign = state is _State.FOREIGN

    def replace(self, data: bytes) -> None:
        """Put other bytes in the file's place, in one step. Raises NotOurs."""
        if self._pid != os.getpid():
            raise NotOurs("it belongs to the process that this one was forked from")
        with self._lock:
            if not self._is_live:
                raise NotOurs("it was withdrawn")
            state = self._look()
            if state is _State.FOREIGN:
                raise NotOurs("somebody else has put another record there")
            if state is _State.OURS:
                self._put(data, place_over)
            else:
                self._put(data, place_absent)
            self._data = data

    def remove(self) -> None:
        """Remove the file, if it is still ours; from now on nothing makes it again. Twice is harmless."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_withdrawn = True
            was_live, self._is_live = self._is_live, False
            if was_live and self._look() is _State.OURS:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)

    def abandon(self) -> None:
        """Leave the file as it is, for whoever adopts it; from now on it is not ours. Twice is harmless."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_withdrawn = True
            self._is_live = False

    def _look(self) -> _State:
        """Tell whose file it is: ours is one as we left it, or one with our bytes whoever touched it."""
        try:
            found = os.lstat(self.path)
            if _stamp(found) == self._stamp:
                return _State.OURS
            if not stat.S_ISREG(found.st_mode) or found.st_size != len(self._data):
                return _State.FOREIGN
            return _State.OURS if layout.read_bytes(self.path) == self._data else _State.FOREIGN
        except FileNotFoundError:
            return _State.MISSING

    def _touch(self) -> bool:
        """Show that the owner lives; False where somebody has just removed the file."""
        now = self._now_ns()
        try:
            os.utime(self.path, ns=(now, now), follow_symlinks=False)
            self._stamp = _stamp(os.lstat(self.path))  # read back: a file system may round the time
        except FileNotFoundError:
            return False
        return True

    def _put(self, data: bytes, place: Callable[[str, str], None]) -> None:
        directory = os.path.dirname(self.path)
        _make_directory(directory)
        temporary = os.path.join(directory, layout.new_temporary_name())
        with staged(temporary, data, mode=_MODE, mtime_ns=self._now_ns()):
            stamp = _stamp(os.lstat(temporary))
            place(temporary, self.path)
            self._stamp = stamp


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced, written or touched by others than us."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as err:  # to callers that error means that the key is taken
        raise NotADirectoryError(err.errno, "is there and no directory", path) from err
