"""Pinned content: the bytes of a file as they were when they were hashed.

What is served is what was hashed, whatever happens to the file afterwards:

- up to `MAX_PINNED_BYTES` the bytes are read once, hashed and kept. They stay a plain `bytes` object until
  a server wants to send them with sendfile; then they move into a sealed memfd, a file in memory that
  nobody can change or truncate any more (Linux). Filling a memfd costs four times what reading the
  file costs, so only content that is really downloaded pays for it, and only once;
- above, the file's descriptor is held, and every read compares the file's size and mtime with those it had
  while it was hashed; a difference raises OSError and the transfer must be aborted. Removing, renaming or
  replacing the file changes nothing: the descriptor still has it. (Not its ctime, which all of these change:
  who edits a file and sets its mtime back is found out by the frontend, which hashes what it gets.)

Content lives as long as somebody refers to it (a registration, an answer on its way) and frees its memory
and descriptor with the last reference. Sharing between threads and with forked children is safe: memory
and sealed files never change, and every read names its own offset.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import weakref
from typing import Optional, Protocol

from ..card.checksum import MAX_FILE_BYTES, Checksum, hash_bytes, hash_fd

logger = logging.getLogger(__name__)

MAX_PINNED_BYTES = 64 * 1024 * 1024  # above, a descriptor is held instead: memory belongs to the model
# Sealed files at the same time: a host's descriptors (often 1,024 in all) are not ours to use up. Further
# content is sent from memory, which costs one more copy.
MAX_SEALED_FILES = 128

_SMALL_BYTES = 64 * 1024  # read by a single call

# O_NONBLOCK: opening a FIFO must not wait for a writer. It changes nothing for regular files. O_NOCTTY: a
# terminal that somebody linked here must not become ours.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_Stamp = tuple[int, int, int, int, int]


def _stamp(status: os.stat_result) -> _Stamp:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Descriptor:
    """Owns a file descriptor and closes it with its last reference."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Content(Protocol):
    """Pinned content; `users` is kept by the registry."""

    hex: str  # its blake3 digest
    size: int  # bytes
    users: int

    @property
    def data(self) -> Optional[bytes]:
        """All of the bytes, if they are in memory; never raises."""

    @property
    def checksum(self) -> Checksum:
        """The checksum of the bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, all of them, or raise OSError."""

    def is_intact(self) -> bool:
        """Tell whether this can still be served."""

    def sealed(self) -> Optional[Descriptor]:
        """Return a file of immutable bytes for `os.sendfile`, or None."""


class MemoryContent:
    """Content that is held in memory, or in a sealed memfd once somebody asked for that."""

    __slots__ = ("_sealed", "data", "hex", "size", "users")

    def __init__(self, hex: str, data: bytes) -> None:
        self.hex = hex  # the blake3 digest of `data`
        self.size = len(data)
        self.users = 0  # kept by the registry
        self.data: Optional[bytes] = data  # None once the sealed file has it
        self._sealed: Optional[Descriptor] = None

    @classmethod
    def from_sealed(cls, hex: str, size: int, sealed: Descriptor) -> MemoryContent:
        """Return the content of a sealed file that another process made."""
        content = cls(hex, b"")
        content.size, content.data, content._sealed = size, None, sealed
        return content

    @property
    def checksum(self) -> Checksum:
        """The checksum of the bytes."""
        return Checksum(self.hex)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`; never short, never blocking."""
        data, sealed = self.data, self._sealed
        if data is None and sealed is not None:
            return _pread_exactly(sealed.fd, start, stop)
        return b"" if data is None else data[start:stop]  # a whole slice of bytes is no copy

    def is_intact(self) -> bool:
        """Tell whether this can still be served: always."""
        return True

    def sealed(self) -> Optional[Descriptor]:
        """Return a file of immutable bytes for `os.sendfile`, or None where the system has no such thing.

        The first call copies the bytes: about 10 ms for 17 MB. Whoever sends keeps the object, not only its
        number: of two servers that call this at once, one's file goes as soon as it is no longer used.
        """
        data = self.data
        if self._sealed is None and data is not None:
            sealed = _seal(data)
            if sealed is not None:
                self._sealed = sealed
                self.data = None  # held once: the sealed file has it now
        return self._sealed


class HeldFile:
    """Content too large for memory: an open file that must not change; see the module's docstring."""

    __slots__ = ("_is_reported", "checksum", "descriptor", "hex", "mtime_ns", "path", "size", "users")
    data = None  # nothing in memory

    def __init__(
        self, checksum: Checksum, descriptor: Descriptor, path: str, size: int, mtime_ns: int
    ) -> None:
        self.checksum = checksum
        self.hex = checksum.hex
        self.size = size
        self.mtime_ns = mtime_ns  # of the file, when it was hashed
        self.users = 0  # kept by the registry
        self.descriptor = descriptor
        self.path = path
        self._is_reported = False

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, or raise OSError if the file is not what was hashed."""
        data = os.pread(self.descriptor.fd, stop - start, start)
        if not self.is_intact() or len(data) != stop - start:  # after the read: what came is unchanged
            raise OSError(errno.ESTALE, "the file changed after it was hashed and registered", self.path)
        return data

    def is_intact(self) -> bool:
        """Tell whether the file is still the one that was hashed; warn once if it is not."""
        try:
            status = os.fstat(self.descriptor.fd)
            found = status.st_size, status.st_mtime_ns
        except OSError:  # a network disk that forgot the file
            found = -1, -1
        pinned = self.size, self.mtime_ns
        if found != pinned and not self._is_reported:
            self._is_reported = True
            logger.warning(
                "%r is no longer served: (size, mtime in ns) was %r when it was hashed and is %r now; "
                "register the model again", self.path, pinned, found,
            )  # fmt: skip
        return found == pinned

    def sealed(self) -> None:
        """Return None: sendfile would send bytes that nobody has compared with the stamp."""


def pin_file(path: str, *, max_pinned_bytes: int = MAX_PINNED_BYTES) -> Content:
    """Read, hash and keep the file at `path`. Blocks for one read.

    Raises OSError: as the system does, or EINVAL for anything but a regular file, EFBIG above
    `MAX_FILE_BYTES` (no frontend takes more), EBUSY if the file changed meanwhile.
    """
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except ValueError as error:  # NUL, or text that the file system's encoding cannot hold
        raise OSError(errno.EINVAL, f"no path of this system ({error})", path) from error
    try:
        data = _read_small(fd)
        if data is None:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            if before.st_size > max_pinned_bytes:
                return _hold(path, fd, before)
            data = os.pread(fd, before.st_size + 1, 0)  # one byte more: a file that grew shows
            if len(data) != before.st_size or _stamp(os.fstat(fd)) != _stamp(before):
                raise OSError(errno.EBUSY, "changed while it was read", path)
    finally:
        os.close(fd)
    return pin_bytes(data)


def pin_bytes(data: bytes) -> MemoryContent:
    """Hash and keep `data`."""
    return MemoryContent(hash_bytes(data), data)


def _read_small(fd: int) -> Optional[bytes]:
    """Return the whole of a small regular file, or None: look more closely.

    A model has thousands of small files when it has adapters, and fstat would be a fifth of their cost.
    FIFOs, sockets and terminals cannot seek, directories cannot be read, other devices have no end.
    """
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        data = os.pread(fd, size + 1, 0) if 0 < size <= _SMALL_BYTES else b""
    except OSError:
        return None
    return data if data and len(data) == size else None


def _hold(path: str, fd: int, before: os.stat_result) -> Content:
    if before.st_size > MAX_FILE_BYTES:
        found = f"{before.st_size} bytes, and no frontend takes more than {MAX_FILE_BYTES}"
        raise OSError(errno.EFBIG, found, path)
    held = Descriptor(os.dup(fd))
    os.lseek(fd, 0, os.SEEK_SET)  # `_read_small` looked for the end
    checksum, size = hash_fd(fd, before.st_size)
    if size != before.st_size or _stamp(os.fstat(fd)) != _stamp(before):
        raise OSError(errno.EBUSY, "changed while it was hashed", path)
    return HeldFile(checksum, held, path, before.st_size, before.st_mtime_ns)


def _pread_exactly(fd: int, start: int, stop: int) -> bytes:
    data = os.pread(fd, stop - start, start)
    if len(data) != stop - start:
        raise OSError(errno.EIO, f"short read: {len(data)} of {stop - start} bytes at {start}")
    return data


_sealed_files: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _seal(data: bytes) -> Optional[Descriptor]:
    """Copy `data` into a memfd that can no longer change, or return None where the system cannot."""
    if (
        not hasattr(os, "memfd_create")
        or not hasattr(os, "sendfile")
        or len(_sealed_files) >= MAX_SEALED_FILES
    ):
        return None
    try:
        sealed = Descriptor(os.memfd_create("selfhost", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        view = memoryview(data)
        while view:
            view = view[os.write(sealed.fd, view) :]
        _add_seals(sealed.fd)
    except OSError:  # out of descriptors or memory, or a sandbox without memfd: memory serves as well
        return None
    _sealed_files.add(sealed)
    return sealed


def _add_seals(fd: int) -> None:
    import fcntl  # not on every system, and needed only where memfd is

    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
