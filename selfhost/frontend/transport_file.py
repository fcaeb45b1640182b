"""FileTransport: files on this machine's disk, only below the folders that the operator named.

Somebody else wrote the card, so a path in it is no more than a wish. Rules
- A location is an absolute path, or a `file:` URL of this host, without `..`. As it is written it must be
  below a root, so that nothing elsewhere is even looked at.
- Links are followed, because model directories consist of them (a Hugging Face snapshot points into
  `../../blobs`). Where they lead to must be below a root, too.
- What was found like this is opened from the root's descriptor on, one component at a time and following
  nothing: where somebody puts a link in between, opening fails.
- Regular files only; a FIFO or a device never blocks. Reading stops one byte behind the cap, however much the
  file grows meanwhile.

Whoever may write below a root decides what is read from there. Any number of threads may share a transport.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Sequence
from typing import Callable, Union
from urllib.parse import unquote_to_bytes

from ..card import url as urls
from ..errors import FetchError, FetchTimeout, SettingsError, SizeLimitExceeded, shown, shown_url
from .transport import LOCAL_PATH, FetchLimits, Sink

PathLike = Union[str, "os.PathLike[str]"]

_BUFFER_BYTES = 256 << 10  # fits into the processor's cache beside everything else, as in card/checksum.py

# A folder needs to be passable, not readable, where the system has descriptors for that.
_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_LIMITS = FetchLimits()


class FileTransport:
    """Reads files below `roots`, which are resolved now and once."""

    may_drift = False

    def __init__(self, roots: Sequence[PathLike], *, limits: FetchLimits = _LIMITS) -> None:
        if isinstance(roots, (str, os.PathLike)):
            raise TypeError(f"roots: expected a list of folders, found {roots!r}")
        self._written = tuple(_absolute_root(os.fspath(root)) for root in roots)
        self._roots = tuple(os.path.realpath(root) for root in self._written)
        self._limits = limits

    def fetch(self, url: str, sink: Sink, *, max_bytes: int) -> None:
        """Read the file at a path or `file:` URL; see Transport.fetch. No partial sink is continued."""
        path = _path_of(url)
        if not any(is_below(path, root) for root in (*self._written, *self._roots)):
            raise self._outside(url, path)
        real = os.path.realpath(path)
        root = next((root for root in self._roots if is_below(real, root)), None)
        if root is None:
            raise self._outside(url, real)
        read_file(root, real, sink, url=url, max_bytes=max_bytes, limits=self._limits)

    def offline(self) -> FileTransport:
        """Return this transport: it needs no network."""
        return self

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _outside(self, url: str, path: str) -> FetchError:
        found = f"it is {shown(path)}" if path == url else f"it leads to {shown(path)}"
        roots = ", ".join(map(repr, self._written)) or "none"
        return _refusal(url, f"a file below an allowed folder ({roots})", found)

    def __repr__(self) -> str:
        return f"<FileTransport roots={list(self._written)}>"


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is in `folder` as both are written, at any depth."""
    return path.startswith(os.path.join(folder, ""))


def read_file(
    root: str,
    path: str,
    sink: Sink,
    *,
    url: str,
    max_bytes: int,
    limits: FetchLimits,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Read the regular file `path`, which is below `root`, into the sink; both without links in them.

    Raises FetchError for `url`; SizeLimitExceeded before the sink gets more than `max_bytes`.
    """
    try:
        fd = open_below(root, path)
    except OSError as err:
        raise _unreadable(url, path, err) from err
    try:
        _copy(fd, path, sink, url, min(max_bytes, limits.max_bytes), limits.total_seconds, clock)
    finally:
        os.close(fd)


def open_below(root: str, path: str) -> int:
    """Open the regular file `path`, reached from `root` without following a link; raise OSError."""
    *folders, name = path[len(os.path.join(root, "")) :].split("/")
    folder = os.open(root, _FOLDER_FLAGS)
    try:
        for inner in folders:
            outer, folder = folder, os.open(inner, _FOLDER_FLAGS, dir_fd=folder)
            os.close(outer)
        fd = os.open(name, _FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "not a regular file", path)
    return fd


def _copy(
    fd: int, path: str, sink: Sink, url: str, limit: int, seconds: float, clock: Callable[[], float]
) -> None:
    deadline = clock() + seconds
    size = os.fstat(fd).st_size
    if size > limit:
        raise _too_long(url, limit, size)
    buffer = memoryview(bytearray(min(limit + 1, _BUFFER_BYTES)))
    received = 0
    while True:
        count = _read(fd, buffer[: limit + 1 - received], url, path)
        if not received:
            sink.restart()  # now that there is something better than what is in it
        if not count:
            return
        received += count
        if received > limit:
            raise _too_long(url, limit, received)
        sink.write(buffer[:count])
        if clock() > deadline:
            raise FetchTimeout(
                f"cannot fetch {shown_url(url)}: {received} bytes came within the {seconds:g} s it may take",
                url=url,
                seconds=seconds,
                phase="total",
            )


def _read(fd: int, view: memoryview, url: str, path: str) -> int:
    try:
        return os.readv(fd, [view])
    except OSError as err:
        raise _unreadable(url, path, err) from err


# ------------------------------------------------------------------ paths


def _absolute_root(root: str) -> str:
    if not root:  # else it would be the working directory
        raise SettingsError(
            "file_roots: expected folders, found an empty text",
            variable="file_roots",
            value=root,
            accepted="paths of folders",
        )
    return _one_slash(os.path.abspath(root))


def _path_of(url: str) -> str:
    """Return the normal path that a path or a `file:` URL stands for; raise FetchError."""
    path = _decoded(url) if urls.is_url(url) else url
    if not path.startswith("/"):
        raise _refusal(url, "an absolute path", "a relative one")
    if "\0" in path or ".." in path.split("/") or not _is_encodable(path):
        raise _refusal(url, "a path without '..' and NUL that the file system can have", shown(path))
    return _one_slash(os.path.normpath(path))


def _decoded(url: str) -> str:
    parts = urls.parse(url)
    if parts is None or parts.scheme != "file":
        raise _refusal(url, "a path or a file: URL", "another URL")
    if parts.host:  # "localhost" is left out by the parser
        raise _refusal(url, "a file of this host", f"the host {shown(parts.host)}")
    if parts.query is not None or parts.fragment is not None:
        raise _refusal(url, "a path alone", "a query or a fragment")
    return os.fsdecode(unquote_to_bytes(parts.path))


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _one_slash(path: str) -> str:
    """POSIX lets two leading slashes mean something else; where this runs they do not."""
    return path[1:] if path.startswith("//") else path


# ------------------------------------------------------------------ errors


def _refusal(url: str, expected: str, found: str) -> FetchError:
    message = f"cannot fetch {shown_url(url)}: expected {expected}, found {found}"
    return FetchError(message, url=url, problem=LOCAL_PATH)


def _unreadable(url: str, path: str, err: OSError) -> FetchError:
    message = f"cannot fetch {shown_url(url)}: reading {shown(path)}: {err.strerror or err}"
    return FetchError(message, url=url, problem=LOCAL_PATH)


def _too_long(url: str, limit: int, received: int) -> SizeLimitExceeded:
    return SizeLimitExceeded(
        f"cannot fetch {shown_url(url)}: expected at most {limit} bytes, found {received} or more",
        url=url,
        limit=limit,
        received=received,
    )
