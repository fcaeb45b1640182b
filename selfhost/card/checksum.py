"""Checksums of files and bytes, the only place that knows blake3.

The wheel `blake3` is loaded at the first hash. Files are read, never mapped: a mapped file that somebody
truncates meanwhile kills the process with SIGBUS, and this code runs inside inference workers. Everything
here may be used from any thread and, after a fork, in parent and child alike.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from ..errors import ChecksumError, SelfHostError, shown

if TYPE_CHECKING:
    from blake3 import blake3 as Hasher

MAX_FILE_BYTES = 1 << 30  # no frontend takes more (Dynamo 1.6.1)

# Below this a pool of threads costs more than it saves: measured 1.6 x slower at 1 MiB, equal at 2 MiB,
# 0.75 of the time at 4 MiB, 0.57 at 17 MB.
_THREADS_FROM_BYTES = 4 << 20
_MAX_THREADS = 4  # leaves the host its cores; two already do most of what can be won
_WHOLE_BYTES = 256 << 10  # up to here one read into one bytes object is the fastest
_BUFFER_BYTES = 256 << 10  # one thread: fits into the processor's cache beside everything else
_THREADS_BUFFER_BYTES = 2 << 20  # threads need long pieces: a quarter of this loses all that they win

# A FIFO or a device must not block or become our terminal.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_TEXT = re.compile(r"blake3:([0-9a-f]{64})")

Buffer = Union[bytes, bytearray, memoryview]
PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]


@dataclass(frozen=True)
class Checksum:
    """A BLAKE3 digest: `hex` is 64 lower-case hexadecimal digits, so it may become a file name."""

    hex: str

    @classmethod
    def parse(cls, text: object) -> Checksum:
        """Return the checksum that `blake3:<64 lower-case hex digits>` says, or raise ChecksumError."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ChecksumError(
                f"checksum: expected 'blake3:' and 64 lower-case hexadecimal digits, found {shown(text)}",
                text=text,
            )
        return cls(match[1])

    @classmethod
    def of(cls, data: Buffer) -> Checksum:
        """Return the checksum of `data`."""
        return cls(hash_bytes(data))

    def __str__(self) -> str:
        return f"blake3:{self.hex}"


def hash_bytes(data: Buffer) -> str:
    """Return the BLAKE3 digest of `data` as 64 hexadecimal digits."""
    size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
    if size < _THREADS_FROM_BYTES:
        return _blake3()(data).hexdigest()
    return _blake3()(data, max_threads=_threads_for(size)).hexdigest()


def new_hasher(*, threads: int = 1) -> Hasher:
    """Return an empty blake3 hasher; raise SelfHostError if the wheel is missing.

    `threads` above 1 makes the hasher a pool of its own, which costs about 50 us. blake3's AUTO is not
    offered: its pool belongs to the process, does not survive a fork, and a forked child that hashes
    waits for it for ever.
    """
    return _blake3()(max_threads=threads)


@functools.lru_cache(maxsize=1)
def _blake3() -> type[Hasher]:
    try:
        from blake3 import blake3
    except ImportError as err:
        raise SelfHostError(
            f"hashing needs the wheel `blake3`, which cannot be imported ({err}): run `pip install blake3`"
        ) from err
    return blake3


def hash_file(path: PathLike) -> tuple[Checksum, int]:
    """Return checksum and size in bytes of the regular file at `path`.

    Raises OSError: EISDIR for a directory, EINVAL for anything else that is no regular file or no path,
    EBUSY if the file changes meanwhile (a same-size overwrite within one tick of the file system's clock
    after the write before cannot be noticed).
    """
    fd = _open(path)
    try:
        before = os.fstat(fd)
        _require_regular(before.st_mode, path)
        checksum, size = hash_fd(fd, before.st_size)
        if size != before.st_size or stamp_of(os.fstat(fd)) != stamp_of(before):
            raise OSError(errno.EBUSY, "changed while it was hashed", os.fspath(path))
    finally:
        os.close(fd)
    return checksum, size


def hash_fd(fd: int, expected_bytes: int) -> tuple[Checksum, int]:
    """Hash the descriptor from its position to its end; return the checksum and how many bytes that were.

    Reading stops after `expected_bytes` + 1, so a count above `expected_bytes` says "longer" and the
    checksum is then of no use. The caller checks what kind of file it is and whether it changed.
    """
    hasher = new_hasher(threads=_threads_for(expected_bytes))
    size = 0
    if expected_bytes <= _WHOLE_BYTES:
        data = os.read(fd, expected_bytes + 1)
        hasher.update(data)
        size = len(data)
    if size != expected_bytes or not size:
        size = _hash_pieces(fd, hasher, size, expected_bytes)
    return Checksum(hasher.hexdigest()), size


def _hash_pieces(fd: int, hasher: Hasher, size: int, expected_bytes: int) -> int:
    few = expected_bytes < _THREADS_FROM_BYTES
    buffer = memoryview(bytearray(_BUFFER_BYTES if few else _THREADS_BUFFER_BYTES))
    while size <= expected_bytes:
        count = os.readv(fd, [buffer[: expected_bytes + 1 - size]])
        if not count:
            break
        hasher.update(buffer[:count])
        size += count
    return size


def _open(path: PathLike) -> int:
    try:
        return os.open(path, _OPEN_FLAGS)
    except ValueError as err:  # NUL, or text that the file system's encoding cannot hold
        raise OSError(errno.EINVAL, f"no path of this system ({err})", path) from err
    except OSError as err:
        if err.errno != errno.ENXIO:  # what opening a socket gives
            raise
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path)) from err


def _require_regular(mode: int, path: PathLike) -> None:
    if stat.S_ISREG(mode):
        return
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, "not a regular file", os.fspath(path))


def stamp_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return what changes when a file does: inode, size, mtime, ctime."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _threads_for(size: int) -> int:
    if size < _THREADS_FROM_BYTES:
        return 1
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return min(cores, _MAX_THREADS)
