"""Blobs: verified files under the hex of their digest, in the cache's own root and in lower ones.

A hit is verified, each time: by a stamp that says that nobody changed the blob since it was hashed (stamps.py
says how far that goes), or by hashing it. Any doubt is a miss. A blob of the own root that is wrong is set
aside as `<hex>.corrupt`, for somebody to look at; the next one takes its place, an hour later it is garbage.
In lower roots nothing is ever changed; stamps of their blobs lie in the own root. A lower root that cannot be
read has no blobs, and a warning says why.

Sharing: any number of threads and processes, Dynamo's among them. The worst case: a good blob that somebody
publishes in the very moment in which the wrong one before it is set aside goes with it, and is fetched again.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import Optional

from ..card.checksum import Checksum, new_hasher
from ..errors import CacheError
from .folders import BLOBS, READ, SHORTAGE, Folder, OpenRoot, Root, cannot
from .names import SET_ASIDE, unique
from .stamps import Verifier

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20


class Blobs:
    """The blobs of one root."""

    def __init__(self, root: Root, verifier: Verifier) -> None:
        self.root = root
        self._verifier = verifier
        # Two lower roots may have a blob each, with stamps of its own.
        self._tag = f".{Checksum.of(os.fsencode(root.path)).hex[:16]}" if root.is_lower else ""
        self._reported: set[str] = set()  # what was complained about: hexes, or "" for the root

    def path_of(self, hex: str) -> str:
        """Return the path that a blob has or would have."""
        return f"{self.root.path}/{BLOBS}/{hex}"

    # -------------------------------------------------------------- looking

    def has(self, hex: str, own: Optional[OpenRoot]) -> bool:
        """Whether the verified blob is here; a wrong one is no longer there afterwards.

        `own` is the cache's own root, opened; None where it does not exist. Raises OSError or CacheError, of
        a lower root only where there are too few descriptors or too little memory to look at it.
        """
        if not self.root.is_lower:
            return own is not None and self._has(hex, own, own)
        try:
            with self.root.open() as opened:
                return self._has(hex, opened, own)
        except FileNotFoundError:
            return False
        except OSError as err:
            if err.errno in SHORTAGE:
                raise cannot("read the lower cache", self.root.path, err) from err
            self._complain("", f"the lower cache is not used: {cannot('read', self.root.path, err)}")
        except CacheError as err:
            self._complain("", f"the lower cache is not used: {err}")
        return False

    def _has(self, hex: str, opened: OpenRoot, own: Optional[OpenRoot]) -> bool:
        folder = opened.get(BLOBS)
        if folder is None:
            return False
        try:
            status = os.stat(hex, dir_fd=folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if self._verifier.is_stamped(hex + self._tag, status, folder, own):
            return True
        return self.rehash(hex, folder, own) is True

    def rehash(self, hex: str, folder: Folder, own: Optional[OpenRoot]) -> Optional[bool]:
        """Whether the blob in the opened `blobs` folder hashes right, None if there is none.

        A wrong one is set aside, or a warning says why that is not possible.
        """
        try:
            found = os.stat(hex, dir_fd=folder.fd, follow_symlinks=False)
            reason = self._verifier.why_wrong(hex, hex, hex + self._tag, folder, own)
        except FileNotFoundError:
            return None
        if reason is not None and self.root.is_lower:
            path = self.path_of(hex)
            self._complain(hex, f"the blob {path!r} of a lower cache is not used: {reason}")
        elif reason is not None:
            self._set_aside(hex, folder, found, reason)
        return reason is None

    def _complain(self, about: str, message: str) -> None:
        if about not in self._reported:
            self._reported.add(about)
            logger.warning("%s", message)

    # -------------------------------------------------------------- changing

    def note_published(
        self, hex: str, fd: int, written: os.stat_result, own: OpenRoot, *, is_on_disk: bool
    ) -> None:
        """Remember what a blob looks like that was just given its name; see Verifier.note_published."""
        if not own[BLOBS].is_shared:
            self._verifier.note_published(hex + self._tag, fd, written, own, is_on_disk=is_on_disk)

    def _set_aside(self, hex: str, folder: Folder, found: os.stat_result, reason: str) -> None:
        self._verifier.forget(hex)
        path = self.path_of(hex)
        # A file takes the place of the one before it, a folder cannot.
        aside = f"{hex}.{unique()}{SET_ASIDE}" if stat.S_ISDIR(found.st_mode) else hex + SET_ASIDE
        try:
            if os.stat(hex, dir_fd=folder.fd, follow_symlinks=False).st_ino != found.st_ino:
                return  # somebody was faster, and has put another in its place
            try:
                os.rename(hex, aside, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
            except IsADirectoryError:
                aside = f"{hex}.{unique()}{SET_ASIDE}"
                os.rename(hex, aside, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        except FileNotFoundError:
            return
        except OSError as err:
            logger.warning("the blob %r is not used: %s; it cannot be set aside: %s", path, reason, err)
            return
        logger.warning("the blob %r was wrong: %s; it is now %r", path, reason, f"{folder.path}/{aside}")

    def copy(self, hex: str, target: int, own: OpenRoot) -> bool:
        """Copy a blob to an open file; whether what was written is right. Raises OSError or CacheError."""
        if not self.root.is_lower:
            return _copy(hex, own[BLOBS], target)
        with self.root.open() as opened:
            return _copy(hex, opened[BLOBS], target)


def _copy(hex: str, folder: Folder, target: int) -> bool:
    source = os.open(hex, READ, dir_fd=folder.fd)
    try:
        hasher = new_hasher()
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while count := os.readv(source, [buffer]):
            hasher.update(buffer[:count])
            rest = buffer[:count]
            while rest:
                rest = rest[os.write(target, rest) :]
    finally:
        os.close(source)
    return bool(hasher.hexdigest() == hex)
