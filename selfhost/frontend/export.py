"""A model's files as a plain directory, for hosts without a network: out of the cache and into it.

Nothing is written to the directory before all files are copied and verified. Files that it has already stay,
if they are the right ones; if one of them is not, nothing is changed. What an interrupted export had moved in
by then is right and complete.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence

from .. import _atomic
from ..card.checksum import Checksum, hash_file
from ..errors import BlobMissing, CacheError
from .blob_writer import BlobWriter
from .blobs import Blobs
from .folders import OpenRoot, reason_of, sync
from .names import as_file_name, staged_name

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_SOURCE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_BUFFER_BYTES = 1 << 20


def export_files(
    directory: str, files: Mapping[str, Checksum], *, layers: Sequence[Blobs], own: OpenRoot
) -> None:
    """Copy blobs into a directory under these names; see BlobCache.export_model."""
    target = os.path.abspath(directory)
    for name in files:
        as_file_name(name)
    try:
        if os.path.lexists(target):
            _add_to(target, _without_present(target, files), layers, own)
        else:
            _make(target, files, layers, own)
    except OSError as err:
        message = f"cannot export a model to {target!r}: {reason_of(err)}"
        raise CacheError(message, path=target, errno=err.errno) from err


def _make(target: str, files: Mapping[str, Checksum], layers: Sequence[Blobs], own: OpenRoot) -> None:
    """Fill a directory beside the target, then give it the target's name."""
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    staged = os.path.join(parent, staged_name())
    os.mkdir(staged)  # mode by the umask, like that of the files: these are the operator's
    try:
        _copy_all(staged, files, layers, own)
        os.rename(staged, target)
    except BaseException:
        _remove(staged)
        raise
    _sync(parent, own)


def _without_present(target: str, files: Mapping[str, Checksum]) -> dict[str, Checksum]:
    """Return the files that the directory does not have yet; raise CacheError if one of them is another."""
    absent = {}
    for name, checksum in files.items():
        path = os.path.join(target, name)
        if not os.path.lexists(path):
            absent[name] = checksum
        else:
            _require_same(path, checksum)
    return absent


def _require_same(path: str, checksum: Checksum) -> None:
    found, _ = hash_file(path)
    if found != checksum:
        raise CacheError(
            f"cannot export a model: {path!r} is there already and has the checksum {found}, "
            f"not {checksum}: remove it, or export to another directory",
            path=path,
        )


def _add_to(target: str, files: Mapping[str, Checksum], layers: Sequence[Blobs], own: OpenRoot) -> None:
    """Copy files inside the directory, which may be a mount of its own, then give them their names."""
    if not files:
        return
    staged = os.path.join(target, staged_name())
    os.mkdir(staged)
    moved = []
    try:
        _copy_all(staged, files, layers, own)
        for name, checksum in files.items():
            path = os.path.join(target, name)
            try:
                _atomic.place_absent(os.path.join(staged, name), path)
                moved.append(path)
            except FileExistsError:  # somebody was faster
                _require_same(path, checksum)
    except BaseException:
        for path in moved:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    finally:
        _remove(staged)
    _sync(target, own)


def _copy_all(staged: str, files: Mapping[str, Checksum], layers: Sequence[Blobs], own: OpenRoot) -> None:
    for name, checksum in files.items():
        holder = next((layer for layer in layers if layer.has(checksum.hex, own)), None)
        if holder is None:
            message = f"cannot export {name!r}: the cache {own.root.path!r} does not have {checksum}"
            raise BlobMissing(message, path=own.root.path, checksums=[str(checksum)])
        _copy(os.path.join(staged, name), checksum, holder, own)
    _sync(staged, own)


def _copy(path: str, checksum: Checksum, holder: Blobs, own: OpenRoot) -> None:
    target = os.open(path, _CREATE, 0o666)
    try:
        is_right = holder.copy(checksum.hex, target, own)
        if own.fsync:
            os.fsync(target)
    finally:
        os.close(target)
    if not is_right:
        blob = holder.path_of(checksum.hex)
        message = f"cannot export {blob!r}: it changed while it was copied"
        raise BlobMissing(message, path=blob, checksums=[str(checksum)])


def _sync(directory: str, own: OpenRoot) -> None:
    if own.fsync:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync(fd)
        finally:
            os.close(fd)


def _remove(staged: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(staged):
            os.unlink(os.path.join(staged, name))
        os.rmdir(staged)


def import_file(path: str, writer: BlobWriter) -> str:
    """Copy a file into the cache and return the blob's path; see BlobCache.import_blob."""
    try:
        fd = os.open(path, _SOURCE)
    except (OSError, ValueError) as err:
        raise _cannot_import(path, err) from err
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CacheError(f"cannot import {path!r}: it is no regular file", path=path)
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while count := _read(fd, buffer, path):
            writer.write(buffer[:count])
    finally:
        os.close(fd)
    return writer.publish(path)


def _read(fd: int, buffer: memoryview, path: str) -> int:
    try:
        return os.readv(fd, [buffer])
    except OSError as err:
        raise _cannot_import(path, err) from err


def _cannot_import(path: str, err: Exception) -> CacheError:
    reason = reason_of(err) if isinstance(err, OSError) else str(err)
    code = err.errno if isinstance(err, OSError) else None
    return CacheError(f"cannot import {path!r}: {reason}", path=path, errno=code)
