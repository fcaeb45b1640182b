"""Removing what dead writers left: temporary files and folders, an hour old, to which nobody writes.

Our writers hold a lock on what they write, so none of ours is taken from a living one while locks work. Of
Dynamo's, which lock nothing, and where there are no locks, age alone has to tell: each write renews it. The
worst case is a writer that is told that its file is gone, and tries again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os

from ..errors import CacheError
from .folders import BLOBS, READ, SHORTAGE, Folder, OpenRoot, remove_folder
from .inventory import GRACE_SECONDS, Leftover
from .locks import is_held
from .names import is_temporary_blob

logger = logging.getLogger(__name__)

# How many names a writer's first look goes through: some 6 ms. A collection looks at all.
_QUICK_LOOK_NAMES = 10_000


def reap(opened: OpenRoot, left: Leftover, now: float, *, dry_run: bool = False) -> bool:
    """Remove what a writer left that died; whether it was that is what comes back."""
    if now - left.touched < GRACE_SECONDS:
        return False
    try:
        with opened.visit(left.parent) as folder:
            if not left.is_folder and _has_writer(folder, left.name):
                return False
            if dry_run:
                return True
            if left.is_folder:
                remove_folder(folder, left.name)
            else:
                os.unlink(left.name, dir_fd=folder.fd)
    except FileNotFoundError:
        return False
    except (OSError, CacheError) as err:
        if isinstance(err, OSError) and err.errno in SHORTAGE:
            raise
        logger.warning("cannot remove %r, which a dead process left: %s", f"{left.parent}/{left.name}", err)
        return False
    logger.info("removed %r, which a dead process left", f"{left.parent}/{left.name}")
    return True


def _has_writer(folder: Folder, name: str) -> bool:
    """Whether somebody holds the lock of a temporary file."""
    try:
        fd = os.open(name, READ, dir_fd=folder.fd)
    except FileNotFoundError:
        raise
    except OSError as err:
        if err.errno in SHORTAGE:
            raise
        return False  # no regular file of ours
    try:
        return bool(is_held(fd))
    finally:
        os.close(fd)


def reap_some(opened: OpenRoot, now: float) -> None:
    """Remove orphaned temporary blobs among the first names of the folder; never raises OSError."""
    with contextlib.suppress(OSError), os.scandir(opened[BLOBS].fd) as entries:
        for entry in itertools.islice(entries, _QUICK_LOOK_NAMES):
            if is_temporary_blob(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    touched = entry.stat(follow_symlinks=False).st_mtime
                    reap(opened, Leftover(BLOBS, entry.name, 0, touched, is_folder=False), now)
