"""Whole files under their final name: staged beside the target, then put in place in one step.

Whoever reads the target sees all of a file or none (on file systems without hard links also an empty one,
see `_claim_and_replace`). Safe with any number of writers.

Nothing here calls fsync, so after a crash of the machine a file may be missing, empty or torn. Discovery can
bear that: its records are dead seconds after their owner, who died in that crash too, and a reader skips what
it cannot parse. What must outlive a crash must not be written with this.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

# What link() and symlink() say on a file system without them (FAT, some FUSE and network mounts).
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextlib.contextmanager
def staged(path: str, data: bytes, *, mode: int, mtime_ns: int) -> Iterator[str]:
    """Write `data` to the new file `path` for the time of a `with`; remove what is left of it at the end.

    `mode` holds whatever the umask is. Raises OSError, leaving nothing behind.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, mode)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def place_absent(staged_path: str, target: str) -> None:
    """Give a staged file the name `target`; FileExistsError where something has that name."""
    try:
        os.link(staged_path, target)
    except FileExistsError:
        if not os.path.samefile(staged_path, target):  # the same: NFS lost the reply and asked again
            raise
    except OSError as err:
        if err.errno not in NO_LINKS:
            raise
        _claim_and_replace(staged_path, target)


def _claim_and_replace(staged_path: str, target: str) -> None:
    """Do without links: take the name with an empty file, which no other writer can, then rename over it.

    A reader may see the empty file for a moment.
    """
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        os.replace(staged_path, target)
    except OSError:
        os.unlink(target)
        raise


def place_over(staged_path: str, target: str) -> None:
    """Give a staged file the name `target`, in the place of whatever has it."""
    os.replace(staged_path, target)
