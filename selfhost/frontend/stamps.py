"""Stamps: what a file looked like when it was last verified, so that it need not be read again.

A stamp is (inode, size, mtime, ctime). Whoever writes to a file, truncates it, puts another in its place or
sets its times changes its ctime. So a file with the stamp of one that was verified is that file, unchanged,
wherever the file system dates changes itself and never twice the same. Local file systems do the first; the
second holds because of what is *not* stamped:

- what may still change unseen, in the tick of the clock in which it changed last (4 ms on most Linux systems,
  2 s on FAT). A file that is found gets a stamp once it was left alone for two seconds before it was hashed;
  one that we publish at once, if the file system is seen to date each change anew (`note_published`);
- a blob that could not be brought to the disk first: somebody who has it mapped into memory could go on
  changing pages that are already dirty, which the file system notices only after it has written them;
- anything in a folder to which others may write.

What a stamp cannot see: bits that rot below the file system, a clock that is set back to the very nanosecond,
a file server that makes up its times (FAT, some FUSE and network mounts), and, on tmpfs, somebody of our own
user who changes a file through a mapping. `verify="always"` sees all these.

A stamp is kept in memory and, for other processes, as the target of a symbolic link `stamps/<hex>` that
points nowhere: made in one step and read in one step, so it is never torn, and never followed. Without it (a
file system without links) each process hashes a blob once. Any number of threads and processes may use it at
once: the worst case is a stamp that is not there, which costs a hash.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from typing import Callable, Optional

from ..card.checksum import hash_fd, stamp_of
from .folders import READ, SHORTAGE, STAMPS, Folder, OpenRoot, reason_of, sync

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int, int]

# How long a file must have been left alone before its stamp is worth anything: two ticks of the coarsest
# clock of a file system that matters would be enough (FAT: 2 s for a whole one).
_RACY_SECONDS = 2.0

# Two changes that are dated differently within this time show a clock that is finer than any that ticks: a
# tick of the kernel's takes 1 to 10 ms. The look takes 10 us; it is repeated if somebody else had the CPU.
_LOOK_SECONDS = 0.0005
_LOOKS = 3


class Verifier:
    """Tells whether a file has the bytes of a digest, and remembers what it looked like then.

    `always` hashes every time. `clock` is the wall clock, in seconds, by which the file system dates changes.
    """

    def __init__(self, *, always: bool, clock: Callable[[], float]) -> None:
        self.always = always
        self._stamps = Stamps()
        self._clock = clock

    def is_stamped(self, key: str, status: os.stat_result, folder: Folder, own: Optional[OpenRoot]) -> bool:
        """Whether a file in `folder` that looks like this was verified before, by this process or another."""
        if self.always or folder.is_shared:
            return False
        if self._stamps.knows(key, status):
            return True
        kept = None if own is None else own.optional(STAMPS)
        return kept is not None and self._stamps.learn(key, status, kept)

    def why_wrong(
        self, name: str, hex: str, key: str, folder: Folder, own: Optional[OpenRoot]
    ) -> Optional[str]:
        """Hash the file `name` in `folder`; return what is wrong with it, or None and remember it as `key`.

        `own` is where other processes look for the stamp; None keeps it to this one. Raises OSError if there
        is no such file, or if nobody can tell.
        """
        try:
            fd = os.open(name, READ, dir_fd=folder.fd)
            try:
                return self._why_wrong(fd, hex, key, folder, own)
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as err:
            if err.errno in SHORTAGE:
                raise
            return f"it cannot be read ({reason_of(err)})"

    def _why_wrong(
        self, fd: int, hex: str, key: str, folder: Folder, own: Optional[OpenRoot]
    ) -> Optional[str]:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            return "it is no regular file"
        # In this order: what is dirty in memory is written first, then nothing can change without a trace.
        is_settled = self._clock() - before.st_ctime > _RACY_SECONDS
        may_stamp = is_settled and not self.always and not folder.is_shared and _is_on_disk(fd)
        checksum, size = hash_fd(fd, before.st_size)
        after = os.fstat(fd)
        if checksum.hex != hex or size != before.st_size:
            return f"its {size} bytes hash to {checksum}"
        if after.st_mtime_ns != before.st_mtime_ns or after.st_size != size:
            return "it changed while it was read"
        if may_stamp and stamp_of(after) == stamp_of(before):
            self._stamps.record(key, after, None if own is None else own.optional(STAMPS, make=True))
        return None

    def note_published(
        self, key: str, fd: int, written: os.stat_result, own: OpenRoot, *, is_on_disk: bool
    ) -> None:
        """Remember what a file looks like that was hashed, then looked as `written`, then got its name.

        Not on a file system that may give the next change the same date: there its first use hashes it. What
        is not on the disk is remembered by this process only, because a power cut could leave a stamp of
        bytes that it took.
        """
        status = None if self.always else _finely_dated(fd)
        if status is None or (status.st_size, status.st_mtime_ns) != (written.st_size, written.st_mtime_ns):
            return
        self._stamps.record(key, status, own.optional(STAMPS, make=True) if is_on_disk else None)

    def forget(self, key: str) -> None:
        """Drop what this process knows of a file; the others see for themselves that it no longer fits."""
        self._stamps.forget(key)


def _is_on_disk(fd: int) -> bool:
    """Bring what is dirty to the disk, and tell whether that worked."""
    try:
        sync(fd)
    except OSError:
        return False
    return True


def _finely_dated(fd: int) -> Optional[os.stat_result]:
    """Return what our file looks like if any change after this gets a date of its own, else None.

    Changes the file twice, without an effect, and looks how that is dated. Linux 6.13 and later date a change
    to the nanosecond if somebody has looked since the one before; earlier ones, by the tick.
    """
    with contextlib.suppress(OSError):
        for _ in range(_LOOKS):
            began = time.perf_counter()
            first = os.fstat(fd)
            seen = [first]
            for _ in range(2):
                os.fchmod(fd, stat.S_IMODE(first.st_mode))
                seen.append(os.fstat(fd))
            if len({status.st_ctime_ns for status in seen}) < len(seen):
                return None
            if time.perf_counter() - began < _LOOK_SECONDS:
                return seen[-1]
    return None


class Stamps:
    """The stamps that one process knows, by name; `folder` in the calls is the one of the other processes."""

    def __init__(self) -> None:
        self._known: dict[str, Stamp] = {}

    def knows(self, name: str, status: os.stat_result) -> bool:
        """Whether this process verified the file that looks like this now."""
        return self._known.get(name) == stamp_of(status)

    def learn(self, name: str, status: os.stat_result, folder: Folder) -> bool:
        """Whether some process verified the file that looks like this now; if so, remember it."""
        stamp = stamp_of(status)
        try:
            is_known = not folder.is_shared and os.readlink(name, dir_fd=folder.fd) == _text(stamp)
        except OSError:  # there is none, or something else has its name
            return False
        if is_known:
            self._known[name] = stamp
        return is_known

    def record(self, name: str, status: os.stat_result, folder: Optional[Folder] = None) -> None:
        """Remember what a verified file looks like, for other processes too where there is a folder."""
        stamp = stamp_of(status)
        self._known[name] = stamp
        if folder is None or folder.is_shared:
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder.fd)
            os.symlink(_text(stamp), name, dir_fd=folder.fd)
        except FileExistsError:  # another process was faster, and verified it as well
            pass
        except OSError as err:
            logger.debug("the stamp %r is not kept in %r: %s", name, folder.path, err)

    def forget(self, name: str) -> None:
        """Drop a stamp from this process's memory."""
        self._known.pop(name, None)


def _text(stamp: Stamp) -> str:
    return "v1:{}:{}:{}:{}".format(*stamp)
