"""The folders of a cache, opened so that nothing planted is followed; its system errors as CacheError.

All work on a cache is done relative to descriptors of its folders. They are opened for one operation, without
following a link, and looked at each time: a folder must belong to us or to root and nobody else may write to
it. A root may be a link if we or root made it. Where the group may write as well, the folder is used but is
`is_shared`: what a file was when it was verified says nothing there about what it is now.

The folders above the root are the operator's: who may rename the root may also put another in its place,
which is then looked at like the first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Optional

from ..errors import CacheError

BLOBS, BY_SLUG, LOCKS, STAMPS = "blobs", "by-slug", "locks", "stamps"

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK and O_NOCTTY: a FIFO or a terminal under a blob's name must not block us or become ours.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_GROUP_WRITES, _OTHERS_WRITE, _OTHERS_ENTER = 0o020, 0o002, 0o011

# What fsync says of a folder where the file system has no such thing (SMB, some FUSE mounts, squashfs).
_NO_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS})

# What says nothing about a file, only that we cannot look at it now.
SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Folder:
    """An open directory of a cache; a context manager that closes it."""

    __slots__ = ("_is_closed_to_others", "_owners", "fd", "is_shared", "mtime", "path")

    def __init__(self, fd: int, path: str, above: Optional[Folder], owners: tuple[int, ...]) -> None:
        self.fd = fd
        self.path = path
        self.mtime = 0.0
        self.is_shared = False
        self._is_closed_to_others = False
        self._owners = owners
        try:
            self._look(os.fstat(fd), above)
        except BaseException:
            os.close(fd)
            raise

    def _look(self, status: os.stat_result, above: Optional[Folder]) -> None:
        """Refuse a folder that others may have filled; CacheError says how to make it acceptable."""
        mode = status.st_mode
        is_behind = above is not None and above._is_closed_to_others
        if self._owners and status.st_uid not in self._owners:
            raise CacheError(
                f"the cache folder {self.path!r} belongs to user {status.st_uid}, who could put anything "
                f"there; expected {self._owners[0]} or root: chown it, or use another root (DYN_MDC_CACHE)",
                path=self.path,
            )
        if self._owners and mode & _OTHERS_WRITE and not is_behind:
            raise CacheError(
                f"everybody may write to the cache folder {self.path!r} (mode {stat.S_IMODE(mode):04o}): "
                "run `chmod o-w` on it, or use another root (DYN_MDC_CACHE)",
                path=self.path,
            )
        self.mtime = status.st_mtime
        self._is_closed_to_others = is_behind or not mode & _OTHERS_ENTER
        writers = mode & (_GROUP_WRITES | _OTHERS_WRITE)
        self.is_shared = (above is not None and above.is_shared) or bool(writers and not is_behind)

    def open(self, name: str, *, make: bool = False, fsync: bool = True) -> Folder:
        """Open the folder `name` in this one, making it where told to; raise OSError or CacheError."""
        try:
            fd = os.open(name, _FOLDER, dir_fd=self.fd)
        except FileNotFoundError:
            if not make:
                raise
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self.fd)
            if fsync:
                sync(self.fd)
            fd = os.open(name, _FOLDER, dir_fd=self.fd)
        return Folder(fd, f"{self.path}/{name}", self, self._owners)

    def close(self) -> None:
        """Close the descriptor; once."""
        os.close(self.fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


class Root:
    """Where a cache lies: `path` is absolute. Opens nothing by itself; `open` does, for one operation.

    A lower root may belong to anybody, since the operator named it and only verified files of it are used;
    nothing is ever made in it.
    """

    def __init__(self, path: str, *, is_lower: bool = False, fsync: bool = True) -> None:
        self.path = os.path.abspath(path)
        self.is_lower = is_lower
        self.fsync = fsync

    def open(self, *, make: bool = False) -> OpenRoot:
        """Open the root, made (mode 0700) where told to; raise OSError or CacheError if it cannot be used."""
        try:
            fd = os.open(self.path, _FOLDER)
        except FileNotFoundError:
            if not make:
                raise
            fd = self._make()
        except OSError as err:
            if err.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            fd = self._open_link()
        owners = () if self.is_lower else (os.geteuid(), 0)
        return OpenRoot(Folder(fd, self.path, None, owners), is_made=make, fsync=self.fsync)

    def _make(self) -> int:
        _make_private(self.path, fsync=self.fsync)
        return os.open(self.path, _FOLDER)

    def _open_link(self) -> int:
        """Open what the root, a link, points to, if we or root made that link."""
        status = os.lstat(self.path)
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
            raise CacheError(
                f"the cache root {self.path!r} is a link that user {status.st_uid} made: it is not followed",
                path=self.path,
            )
        return os.open(os.path.realpath(self.path), _FOLDER)

    def __repr__(self) -> str:
        return f"<Root {self.path!r}{' (lower)' if self.is_lower else ''}>"


def _make_private(path: str, *, fsync: bool) -> None:
    """Make a folder, and those above it that are missing, for us alone whatever the umask is."""
    parent = os.path.dirname(path)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_private(parent, fsync=fsync)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    if fsync:
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync(fd)
        finally:
            os.close(fd)


class OpenRoot:
    """The root's folders as far as one operation needs them: each opened once, all closed with the `with`."""

    __slots__ = ("_folders", "_is_made", "fsync", "root")

    def __init__(self, root: Folder, *, is_made: bool, fsync: bool) -> None:
        self.root = root
        self._is_made = is_made  # folders that are missing are made
        self.fsync = fsync
        self._folders: dict[str, Folder] = {}

    def __getitem__(self, name: str) -> Folder:
        """Return the folder of this name, or path of names, opened at its first use.

        Raises OSError or CacheError.
        """
        return self._get(name, make=self._is_made)

    def _get(self, name: str, *, make: bool) -> Folder:
        folder = self._folders.get(name)
        if folder is None:
            parent, _, last = name.rpartition("/")
            above = self._get(parent, make=make) if parent else self.root
            is_lasting = name not in (LOCKS, STAMPS)  # a cache that lost those is as good as before
            folder = self._folders[name] = above.open(last, make=make, fsync=self.fsync and is_lasting)
        return folder

    def get(self, name: str) -> Optional[Folder]:
        """Return the folder of this name, None where there is none; raise OSError or CacheError."""
        try:
            return self[name]
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def visit(self, path: str) -> Iterator[Folder]:
        """Open the folder at this path for the time of a `with` only; raise OSError or CacheError.

        For those of which there may be more than one process has descriptors: the models and their slugs.
        """
        parent, _, name = path.rpartition("/")
        if not parent:
            yield self[name]
            return
        with self.visit(parent) as above, above.open(name) as folder:
            yield folder

    def optional(self, name: str, *, make: bool = False) -> Optional[Folder]:
        """Return the folder of this name, for what only saves work: None where it cannot be had."""
        try:
            return self._get(name, make=make)
        except (OSError, CacheError):
            return None

    def close(self) -> None:
        """Close them all; harmless when repeated."""
        for folder in self._folders.values():
            folder.close()
        self._folders.clear()
        if self.root.fd >= 0:
            self.root.close()
            self.root.fd = -1

    def __enter__(self) -> OpenRoot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_folder(parent: Folder, name: str) -> None:
    """Remove a folder and all that is in it, following no link; raise OSError or CacheError."""
    with parent.open(name) as folder:
        for entry in os.listdir(folder.fd):
            if stat.S_ISDIR(os.stat(entry, dir_fd=folder.fd, follow_symlinks=False).st_mode):
                remove_folder(folder, entry)
            else:
                os.unlink(entry, dir_fd=folder.fd)
    os.rmdir(name, dir_fd=parent.fd)


def sync(fd: int) -> None:
    """Bring a file, or the names in a folder, to the disk, unless the file system knows no such thing."""
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in _NO_FSYNC:
            raise


# ------------------------------------------------------------------ errors

_SPACE = "free some space, run `selfhost cache gc`, or use another root (DYN_MDC_CACHE)"
_FILES = "this process or host has too many open files: raise the limit (ulimit -n)"
_ACCESS = "this user may not do that: look at owner and mode, or use another root (DYN_MDC_CACHE)"
_READ_ONLY = "it can only be read: use it as a lower cache of a root that can be written (DYN_MDC_CACHE)"
_PLANTED = (
    "something else than a folder or file of the cache has its name, and links are not followed: remove it"
)
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "the process may not write files of that size: raise the limit (ulimit -f)",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EROFS: _READ_ONLY,
    errno.EIO: "the disk, or what is between it and us, has a fault: look at the system's log",
    errno.ESTALE: "the file server has forgotten it: the next try opens it again",
    errno.ENOENT: "somebody removed it meanwhile: the next try makes it again",
    errno.ELOOP: _PLANTED,
    errno.ENOTDIR: _PLANTED,
    errno.EISDIR: _PLANTED,
    errno.EEXIST: _PLANTED,
    errno.ENOTEMPTY: _PLANTED,
}


def cannot(action: str, path: str, err: OSError) -> CacheError:
    """Return the error that says what was attempted, why the system refused, and what the operator can do."""
    advice = _ADVICE.get(err.errno or 0)
    tail = f": {advice}" if advice else ""
    return CacheError(f"cannot {action} {path!r}: {reason_of(err)}{tail}", path=path, errno=err.errno)


def reason_of(err: OSError) -> str:
    """Return the system's reason without the file's name, which is relative to a folder."""
    return os.strerror(err.errno) if err.errno else str(err)


@contextlib.contextmanager
def attempt(action: str, path: str) -> Iterator[None]:
    """Turn a system error inside the `with` into the CacheError of `cannot`."""
    try:
        yield
    except OSError as err:
        raise cannot(action, path, err) from err
