"""Garbage collection: what is over budget, old, or left over goes; what is in use, wanted or young stays.

Safe while any number of processes use the cache: a directory that somebody holds is not touched, the others
disappear in one step, by a rename; only then their links go, and after another look at everything the blobs
that nothing refers to. Publishing waits meanwhile (and goes on without waiting where there are no locks).

The worst cases, all of which end in a file being fetched again: a Dynamo frontend, which knows none of our
locks, links an old blob that nothing referred to in the very moment in which it goes; a model that somebody
uses without holding it was not asked for in all the time that it takes to be old; there are no locks, and
somebody reads from a directory that is held. Where the file system refuses to lock directories at all (NFS),
nobody can tell who holds what, and models are never removed. While a folder of models cannot be read, no blob
is: one of them may refer to it.

Times are the file system's: when a directory was last used (its mtime) or a blob made (its ctime). The clock
may have been wrong when they were written: what lies in the future counts as used now and is dated so, which
makes nothing immortal and removes nothing at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, Optional

from ..errors import CacheError
from .folders import BLOBS, BY_SLUG, SHORTAGE, STAMPS, Folder, OpenRoot, remove_folder
from .inventory import GRACE_SECONDS, BlobFile, Inventory, ModelDir, take_inventory
from .model_dirs import USE_SECONDS, ModelKey
from .names import staged_name
from .reap import reap

logger = logging.getLogger(__name__)


class Collected(NamedTuple):
    """What a collection removed, or would remove; `bytes` counts each blob once."""

    models: tuple[ModelKey, ...]  # least recently used first
    blobs: int
    bytes: int
    temporary_files: int
    set_aside: int
    kept_bytes: int  # of the blobs and copies that stay


def collect(
    opened: OpenRoot,
    *,
    now: float,
    max_bytes: Optional[int] = None,
    max_age_seconds: Optional[float] = None,
    keep: Iterable[ModelKey] = (),
    dry_run: bool = False,
) -> Collected:
    """Remove what may go, or only tell what would; see BlobCache.collect. Raises OSError or CacheError."""
    found = take_inventory(opened)
    if not dry_run:
        _date_what_is_from_the_future(opened, found, now)
    reaped = [left for left in found.leftovers if reap(opened, left, now, dry_run=dry_run)]
    stale = [blob for blob in found.set_aside if _is_grown(blob, now) and _remove_blob(opened, blob, dry_run)]
    chosen = _choose(opened, found, now, max_bytes, max_age_seconds, set(keep))
    if dry_run:
        models = list(chosen)
        left = found.without(models)
    else:
        models = [model for model in chosen if _remove_model(opened, model)]
        left = take_inventory(opened)
    garbage = [blob for blob in _unreferenced(found, left, now) if _remove_blob(opened, blob, dry_run)]
    freed = sum(blob.bytes for blob in garbage) + sum(model.copied_bytes for model in models)
    return Collected(
        models=tuple(model.key for model in models),
        blobs=len(garbage),
        bytes=freed + sum(blob.bytes for blob in stale) + sum(left_over.bytes for left_over in reaped),
        temporary_files=len(reaped),
        set_aside=len(stale),
        kept_bytes=_bytes_of(found) - freed,
    )


# ------------------------------------------------------------------ which


def _choose(
    opened: OpenRoot,
    found: Inventory,
    now: float,
    max_bytes: Optional[int],
    max_age_seconds: Optional[float],
    keep: Collection[ModelKey],
) -> Iterator[ModelDir]:
    """Yield the models that may and should go, least recently used first."""
    users = Counter(hex for model in found.models for hex in model.references)
    total = _bytes_of(found) - sum(blob.bytes for blob in _unreferenced(found, found, now))
    for model in sorted(found.models, key=lambda model: model.used):
        idle = now - model.used - USE_SECONDS  # at least: a use is written down once an hour
        is_old = max_age_seconds is not None and idle > max_age_seconds
        is_over = max_bytes is not None and total > max_bytes
        if (
            idle < GRACE_SECONDS
            or model.key in keep
            or not (is_old or is_over)
            or not _is_free(opened, model)
        ):
            continue
        yield model
        users.subtract(model.references)
        freed = [found.blobs[hex] for hex in model.references if not users[hex] and hex in found.blobs]
        total -= model.copied_bytes + sum(blob.bytes for blob in freed if _is_grown(blob, now))


def _bytes_of(found: Inventory) -> int:
    blobs = sum(blob.bytes for blob in found.blobs.values())
    return blobs + sum(model.copied_bytes for model in found.models)


def _unreferenced(found: Inventory, left: Inventory, now: float) -> list[BlobFile]:
    """Return the blobs that no model that is left refers to and that are not young."""
    if found.unreadable or left.unreadable:
        return []
    wanted = {hex for model in left.models for hex in model.references}
    return [blob for hex, blob in found.blobs.items() if hex not in wanted and _is_grown(blob, now)]


def _is_grown(blob: BlobFile, now: float) -> bool:
    return now - blob.since >= GRACE_SECONDS


def _is_free(opened: OpenRoot, model: ModelDir) -> bool:
    """Whether nobody holds the model; False where that cannot be told."""
    try:
        with opened.visit(model.path) as folder:
            return _can_lock(folder)
    except FileNotFoundError:
        return False
    except (OSError, CacheError) as err:
        return _stays(model.path, err)


def _can_lock(folder: Folder) -> bool:
    try:
        fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        logger.warning("the model %r stays: nobody can tell whether it is in use (%s)", folder.path, err)
        return False
    return True


# ------------------------------------------------------------------ how


def _remove_model(opened: OpenRoot, model: ModelDir) -> bool:
    """Remove a model's directory, unless somebody has come to use it; whether it is gone comes back."""
    hidden = staged_name()
    try:
        with opened.visit(model.parent) as parent:
            if not _hide(parent, model, hidden):
                return False
            with contextlib.suppress(OSError, CacheError):  # what stays of it is reaped
                remove_folder(parent, hidden)
        if model.parent != BY_SLUG:
            with contextlib.suppress(OSError):  # there are more models of that name
                os.rmdir(model.key.slug, dir_fd=opened[BY_SLUG].fd)
    except FileNotFoundError:
        return False
    except (OSError, CacheError) as err:
        return _stays(model.path, err)
    logger.info("removed the model %r: last used %s", model.path, model.used)
    return True


def _hide(parent: Folder, model: ModelDir, hidden: str) -> bool:
    """Take away a model's name, unless the model is in use; whether that was done is what comes back.

    Looks for a use before and after: who finds a model writes down the use first, then looks whether it still
    has its name, so that one of the two sees the other.
    """
    name = model.key.mdcsum
    with parent.open(name) as folder:
        if folder.mtime != model.used or not _can_lock(folder):
            return False
        os.rename(name, hidden, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        if os.fstat(folder.fd).st_mtime == model.used:
            return True
        try:
            os.rename(hidden, name, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        except OSError:  # somebody has made it anew
            return True
        return False


def _stays(what: str, err: Exception) -> bool:
    """Warn that something cannot be removed; False. Raise an error that says nothing about it."""
    if isinstance(err, OSError) and err.errno in SHORTAGE:
        raise err
    logger.warning("cannot remove %r: %s", what, err)
    return False


def _remove_blob(opened: OpenRoot, blob: BlobFile, dry_run: bool) -> bool:
    """Remove a blob and its stamp, unless another has its name now."""
    if dry_run:
        return True
    folder = opened[BLOBS]
    try:
        if os.stat(blob.name, dir_fd=folder.fd, follow_symlinks=False).st_ctime != blob.since:
            return False
        if blob.is_folder:
            remove_folder(folder, blob.name)
        else:
            os.unlink(blob.name, dir_fd=folder.fd)
    except FileNotFoundError:
        return False
    except (OSError, CacheError) as err:
        return _stays(f"{folder.path}/{blob.name}", err)
    stamps = opened.optional(STAMPS)
    if stamps is not None:
        with contextlib.suppress(OSError):
            os.unlink(blob.name, dir_fd=stamps.fd)
    return True


def _date_what_is_from_the_future(opened: OpenRoot, found: Inventory, now: float) -> None:
    """Let what was made under a clock that was ahead grow old from now on."""
    late = [(model.parent, model.key.mdcsum) for model in found.models if model.used > now]
    late += [(left.parent, left.name) for left in found.leftovers if left.touched > now]
    for parent, name in late:
        with contextlib.suppress(OSError), opened.visit(parent) as folder:
            os.utime(name, (now, now), dir_fd=folder.fd, follow_symlinks=False)
    for blob in [*found.blobs.values(), *found.set_aside]:
        if blob.since > now + GRACE_SECONDS:  # any change of its times sets its ctime; the stamp goes with it
            with contextlib.suppress(OSError):
                blobs = opened[BLOBS].fd
                status = os.stat(blob.name, dir_fd=blobs, follow_symlinks=False)
                times = (status.st_atime_ns, status.st_mtime_ns)
                os.utime(blob.name, ns=times, dir_fd=blobs, follow_symlinks=False)
