"""Stamps: what a blob looked like when it was last verified, so that it need not be read again.

A stamp is (inode, size, mtime, ctime). Whoever writes to a file, truncates it, puts another in its place or
sets its times changes its ctime, which nobody can set back; so a file with the stamp of one that was verified
is that file, unchanged. This holds because of what is *not* stamped, see `Verifier` in blobs.py:

- a blob that changed less than two seconds before it was read: the next change could fall into the same tick
  of the file system's clock (2 s on FAT, 4 ms on most) and would leave the same ctime;
- a blob that could not be brought to the disk first: somebody who has it mapped into memory could go on
  changing pages that are already dirty, which the file system notices only after it has written them;
- anything in a folder to which others may write.

What a stamp cannot see: bits that rot below the file system, a clock that is set back to the very nanosecond,
and, on tmpfs, somebody of our own user who changes a blob through a mapping. `verify="always"` sees all
these.

A stamp is kept in memory and, for other processes, as the target of a symbolic link `stamps/<hex>` that
points nowhere: made in one step and read in one step, so it is never torn, and never followed. Without it (a
file system without links) each process hashes a blob once. Any number of threads and processes may use it at
once: the worst case is a stamp that is not there, which costs a hash.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Optional

from .folders import Folder

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what changes when a file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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
        """Drop a stamp from this process's memory; the others see for themselves that it no longer fits."""
        self._known.pop(name, None)


def _text(stamp: Stamp) -> str:
    return "v1:{}:{}:{}:{}".format(*stamp)
