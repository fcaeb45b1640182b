"""Content that the processes of one host keep once: files named after their digest, in a shared folder.

Written under another name and renamed, so a file with a digest's name is whole; never written again. Large
files are copied too, not held where they lie: a link would follow every edit, and a process that starts later
could not open what was replaced meanwhile. In memory (tmpfs) a copy takes its size once per host.

A process hashes each file when it first opens it (who knows who wrote there, or what a disk did), and from
then on compares size and mtime at every read: what is not what was registered raises OSError. Small contents
are then kept as bytes, large ones read from a descriptor. Both are bounded per process; beyond that, files
are opened again when they are asked for.

Sharing: any number of threads, processes and forked children.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple, Optional

from ..card.checksum import Checksum, hash_fd
from .content import Content, Descriptor
from .shared_folder import SharedFolder

logger = logging.getLogger(__name__)

SMALL_BYTES = 64 * 1024  # up to here content is kept in memory once it was asked for ...
KEPT_BYTES = 16 * 1024 * 1024  # ... as long as it is no more than this in all
OPEN_FILES = 64  # of larger content, per registry; a host's descriptors are not ours to use up
_PIECE_BYTES = 1024 * 1024  # of a copy

_TEMPORARY = re.compile(r"\.(.+)\.[0-9]+")  # the owner's token, and a number
_HEX = re.compile("[0-9a-f]{64}")

_Stamp = tuple[int, int, int, int]


def _stamp_of(fd: int) -> _Stamp:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _File(NamedTuple):
    """An open file whose bytes are right as long as it has this stamp."""

    descriptor: Descriptor
    stamp: _Stamp

    def is_unchanged(self) -> bool:
        return _stamp_of(self.descriptor.fd) == self.stamp


class SharedContent:
    """Content that lies in a shared folder; see the module's docstring."""

    __slots__ = ("__weakref__", "_data", "_file", "_is_reported", "_right", "_store", "_wrong", "hex", "size",
                 "users")  # fmt: skip

    def __init__(self, store: ContentStore, hex: str, size: int) -> None:
        self.hex = hex
        self.size = size
        self.users = 0  # kept by the registry
        self._store = store
        self._right: Optional[_Stamp] = None  # of the file whose bytes are known to be right
        self._wrong: Optional[_Stamp] = None  # of one whose bytes are known to be wrong
        self._data: Optional[bytes] = None
        self._file: Optional[_File] = None
        self._is_reported = False

    @property
    def checksum(self) -> Checksum:
        """The checksum of the bytes."""
        return Checksum(self.hex)

    @property
    def data(self) -> Optional[bytes]:
        """The bytes, if they are few and there is room to keep them; never raises."""
        if self._data is None and self.size <= SMALL_BYTES and self._store.has_room(self.size):
            with contextlib.suppress(OSError):
                self.keep(self._read(0, self.size))
        return self._data

    def keep(self, data: bytes) -> None:
        """Keep these bytes, which are right, if they are few and there is room."""
        with self._store.lock:
            if self._data is None and self.size <= SMALL_BYTES and self._store.take_room(self.size):
                self._data = data
                self._file = None

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, or raise OSError if they are not as registered."""
        data = self._data
        return self._read(start, stop) if data is None else data[start:stop]

    def _read(self, start: int, stop: int) -> bytes:
        file = self.hold_file()
        data = os.pread(file.descriptor.fd, stop - start, start)
        if len(data) != stop - start or not file.is_unchanged():  # after the read: what came is right
            self._file = None
            raise self._changed()
        return data

    def is_intact(self) -> bool:
        """Tell whether this can still be served; warn once if it cannot."""
        try:
            if self._data is None and not self.hold_file().is_unchanged():
                self._file = None
                self.hold_file()  # whoever registers the content anew puts a right file in the place
            self._is_reported = False
        except OSError as error:
            if not self._is_reported:
                self._is_reported = True
                name = f"{self._store.folder.path}/content/{self.hex}"
                logger.warning("%r is no longer served: %s; register the model again", name, error.strerror)
            return False
        return True

    def sealed(self) -> None:
        """Return None: sendfile would send bytes that nobody has compared with the stamp."""

    def hold_file(self) -> _File:
        """Return the open file, which others may have closed; who holds the object may read on."""
        file = self._file
        if file is None:
            file = self._file = self.open()
            self._store.opened(self)
        return file

    def forget_file(self) -> None:
        """Close the file; it is opened again when somebody reads."""
        self._file = None

    def open(self) -> _File:
        """Open the file as it lies there, hashing it unless this process has. Raises OSError."""
        descriptor = Descriptor(self._store.folder.open(f"content/{self.hex}", os.O_RDONLY))
        file = _File(descriptor, _stamp_of(descriptor.fd))
        if file.stamp == self._right or (file.stamp != self._wrong and self._has_right_bytes(file)):
            self._right = file.stamp
            return file
        self._wrong = file.stamp
        raise self._changed()

    def _has_right_bytes(self, file: _File) -> bool:
        if file.stamp[2] != self.size:
            return False
        checksum, size = hash_fd(file.descriptor.fd, self.size)
        return checksum.hex == self.hex and size == self.size and file.is_unchanged()

    def trust(self, stamp: _Stamp) -> None:
        """Know a file that was just written from the right bytes."""
        self._right = stamp
        self._file = None

    def _changed(self) -> OSError:
        return OSError(errno.ESTALE, "the file is not what was registered", self.hex)

    def __del__(self) -> None:
        if self._data is not None:
            self._store.give_room(self.size)


class ContentStore:
    """The contents of one folder, as one registry of this process knows them."""

    def __init__(self, folder: SharedFolder) -> None:
        self.folder = folder
        self.lock = threading.RLock()  # for arithmetic and dictionary work; a signal handler may come within
        self._known: weakref.WeakValueDictionary[str, SharedContent] = weakref.WeakValueDictionary()
        self._kept_bytes = 0
        self._given: deque[int] = deque()  # room given back by finalizers, which must not wait for a lock
        self._opened: deque[weakref.ref[SharedContent]] = deque()
        self._numbers = itertools.count()

    def get(self, hex: str, size: int) -> SharedContent:
        """Return the one object for a content, whether its file is there or not."""
        with self.lock:
            known = self._known.get(hex)
            if known is None or known.size != size:
                known = self._known[hex] = SharedContent(self, hex, size)
            return known

    # -------------------------------------------------------------- files

    def put(self, source: Content, owner: str) -> SharedContent:
        """See that the folder has a right file of this content, and return it. Raises OSError."""
        content = self.get(source.hex, source.size)
        try:
            content.open()
        except OSError:
            self._write(content, source, owner)
        data = source.data
        if data is not None:
            content.keep(data)
        return content

    def ensure(self, content: SharedContent, source: Content, owner: str) -> None:
        """Write a file that was put here, and removed meanwhile, again; under the lock. Raises OSError."""
        if not self.folder.has(f"content/{content.hex}"):
            self._write(content, source, owner)

    def _write(self, content: SharedContent, source: Content, owner: str) -> None:
        temporary = f"content/.{owner}.{next(self._numbers)}"
        fd = self.folder.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        try:
            with open(fd, "wb", buffering=0) as file:
                for start in range(0, source.size, _PIECE_BYTES):
                    _write_all(fd, source.read(start, min(start + _PIECE_BYTES, source.size)))
                os.fchmod(fd, 0o400)  # whatever the umask is
                stamp = _stamp_of(file.fileno())
            os.replace(
                temporary, f"content/{content.hex}", src_dir_fd=self.folder.fd, dst_dir_fd=self.folder.fd
            )
        except BaseException:
            self.folder.remove(temporary)
            raise
        content.trust(stamp)

    def remove(self, digests: Iterable[str]) -> None:
        """Remove the files of contents; under the folder's lock. Raises OSError."""
        for digest in digests:
            self.folder.remove(f"content/{digest}")

    def sweep(self, living: Collection[str]) -> list[str]:
        """Remove what owners that do not live left half-written; return the digests that have a file."""
        names = self.folder.names("content")
        for temporary in filter(None, map(_TEMPORARY.fullmatch, names)):
            if temporary[1] not in living:
                self.folder.remove(f"content/{temporary[0]}")
        return [name for name in names if _HEX.fullmatch(name)]

    # -------------------------------------------------------------- what this process holds

    def has_room(self, size: int) -> bool:
        """Tell whether so many more bytes may be kept in memory."""
        return self._kept_bytes + size <= KEPT_BYTES or bool(self._given)

    def take_room(self, size: int) -> bool:
        """Count bytes that are kept from now on, under the lock; False if there is no room for them."""
        while self._given:
            self._kept_bytes -= self._given.popleft()
        if self._kept_bytes + size > KEPT_BYTES:
            return False
        self._kept_bytes += size
        return True

    def give_room(self, size: int) -> None:
        """Count bytes that are kept no more; from a finalizer, at any moment."""
        self._given.append(size)

    def opened(self, content: SharedContent) -> None:
        """Note an open file, and close the one that has been open longest if they are too many."""
        self._opened.append(weakref.ref(content))
        while len(self._opened) > OPEN_FILES:
            oldest = self._opened.popleft()()
            if oldest is not None and oldest is not content:
                oldest.forget_file()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
