"""Blobs: verified files under the hex of their digest, in the cache's own root and in lower ones.

A hit is verified, each time: by a stamp that says that nobody changed the blob since it was hashed (stamps.py
says why that is safe), or by hashing it. Any doubt is a miss. A blob of the own root that is wrong is set
aside as `<hex>.corrupt`, for somebody to look at; the next one takes its place, an hour later it is garbage.
In lower roots nothing is ever changed; stamps of their blobs lie in the own root.

Sharing: any number of threads and processes, Dynamo's among them. The worst case: a good blob that somebody
publishes in the very moment in which the wrong one before it is set aside goes with it, and is fetched again.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import Callable, Optional

from ..card.checksum import Checksum, hash_fd
from .folders import BLOBS, READ, STAMPS, Folder, OpenRoot, Root, reason_of, sync_folder
from .names import SET_ASIDE
from .stamps import Stamps, stamp_of

logger = logging.getLogger(__name__)

# How long a blob must have been left alone before its stamp is worth anything: two ticks of the coarsest
# clock of a file system that matters would be enough (FAT: 2 s for a whole one).
_RACY_SECONDS = 2.0

# What says nothing about the blob, only that we cannot look at it now.
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Verifier:
    """Tells whether a file has the bytes of a digest, and remembers what it looked like then.

    `always` hashes every time. `clock` is the wall clock, in seconds, by which the file system dates changes.
    """

    def __init__(self, stamps: Stamps, *, always: bool, clock: Callable[[], float]) -> None:
        self.stamps = stamps
        self.always = always
        self._clock = clock

    def is_stamped(self, key: str, status: os.stat_result, folder: Folder, own: Optional[OpenRoot]) -> bool:
        """Whether a file in `folder` that looks like this was verified before, by this process or another."""
        if self.always or folder.is_shared:
            return False
        if self.stamps.knows(key, status):
            return True
        kept = None if own is None else own.optional(STAMPS)
        return kept is not None and self.stamps.learn(key, status, kept)

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
            if err.errno in _SHORTAGE:
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
            self.stamps.record(key, after, None if own is None else own.optional(STAMPS, make=True))
        return None


def _is_on_disk(fd: int) -> bool:
    """Bring what is dirty to the disk, and tell whether that worked."""
    try:
        sync_folder(fd)
    except OSError:
        return False
    return True


class Blobs:
    """The blobs of one root."""

    def __init__(self, root: Root, verifier: Verifier) -> None:
        self.root = root
        self._verifier = verifier
        # Two lower roots may have a blob each, with stamps of its own.
        self._tag = f".{Checksum.of(os.fsencode(root.path)).hex[:16]}" if root.is_lower else ""
        self._reported: set[str] = set()

    def path_of(self, hex: str) -> str:
        """Return the path that a blob has or would have."""
        return f"{self.root.path}/{BLOBS}/{hex}"

    def key_of(self, hex: str) -> str:
        """Return the name of a blob's stamp."""
        return hex + self._tag

    def has(self, hex: str, own: Optional[OpenRoot]) -> bool:
        """Whether the verified blob is here; a wrong one is no longer there afterwards.

        `own` is the cache's own root, opened; None where it does not exist. Raises OSError or CacheError.
        """
        if not self.root.is_lower:
            return own is not None and self._has(hex, own, own)
        try:
            with self.root.open() as opened:
                return self._has(hex, opened, own)
        except FileNotFoundError:
            return False

    def _has(self, hex: str, opened: OpenRoot, own: Optional[OpenRoot]) -> bool:
        folder = opened.get(BLOBS)
        if folder is None:
            return False
        try:
            status = os.stat(hex, dir_fd=folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return self._verifier.is_stamped(self.key_of(hex), status, folder, own) or self.rehash(
            hex, folder, own
        )

    def rehash(self, hex: str, folder: Folder, own: Optional[OpenRoot]) -> bool:
        """Whether the blob in the opened `blobs` folder hashes right; a wrong one is set aside."""
        try:
            found = os.stat(hex, dir_fd=folder.fd, follow_symlinks=False)
            reason = self._verifier.why_wrong(hex, hex, self.key_of(hex), folder, own)
        except FileNotFoundError:
            return False
        if reason is not None and self.root.is_lower:
            self._complain(hex, reason)
        elif reason is not None:
            self._set_aside(hex, folder, found.st_ino, reason)
        return reason is None

    def _complain(self, hex: str, reason: str) -> None:
        if hex not in self._reported:
            self._reported.add(hex)
            logger.warning("the blob %r of a lower cache is not used: %s", self.path_of(hex), reason)

    def _set_aside(self, hex: str, folder: Folder, inode: int, reason: str) -> None:
        self._verifier.stamps.forget(hex)
        path = self.path_of(hex)
        try:
            if os.stat(hex, dir_fd=folder.fd, follow_symlinks=False).st_ino != inode:
                return  # somebody was faster, and has put another in its place
            os.rename(hex, hex + SET_ASIDE, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        except FileNotFoundError:
            return
        except OSError as err:
            logger.warning("the blob %r is not used: %s; it cannot be set aside: %s", path, reason, err)
            return
        logger.warning("the blob %r was wrong: %s; it is now %r", path, reason, path + SET_ASIDE)
