"""What lies in a cache: its blobs, its models, and what was left over, as values. Changes nothing.

A scan is no snapshot: files may come and go meanwhile, and what cannot be read (any more) is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple, Optional

from .folders import BLOBS, BY_SLUG, Folder, OpenRoot
from .model_dirs import ModelKey
from .names import SET_ASIDE, is_hex, is_staged, is_temporary_blob
from .reap import Leftover

_SLUG = re.compile(r"[a-z0-9_-]+")
# Whatever root it names: a link that was made where the cache is mounted elsewhere counts here, too.
_LINK = re.compile(r"(?:.*/)?blobs/([0-9a-f]{64})", re.DOTALL)


class CachedModel(NamedTuple):
    """A model's directory; `bytes` counts each blob once, `last_use` is right to the hour (since 1970)."""

    slug: str
    mdcsum: str
    path: str
    files: int
    bytes: int
    last_use: float

    @property
    def key(self) -> ModelKey:
        """What the cache calls the model by."""
        return ModelKey(self.slug, self.mdcsum)


class CacheStats(NamedTuple):
    """What a cache's own root holds; `bytes` is that of all blobs and copies, not of what was left over."""

    blobs: int
    bytes: int
    models: int
    temporary_files: int  # being written now, or left by writers that died
    set_aside: int  # wrong blobs that were moved out of the way


class BlobFile(NamedTuple):
    """A file in `blobs`; `since` is when it got its name, by ctime, in seconds since 1970."""

    name: str
    bytes: int
    since: float


class ModelDir(NamedTuple):
    """A model's directory. `used` is its mtime: the last use to the hour, in seconds since 1970."""

    key: ModelKey
    parent: str  # the path, below the root, of the folder that it is in
    used: float
    names: int  # of its files
    links: frozenset[str]  # the hex of each blob that it refers to
    copied_bytes: int  # of names that are files


class Inventory:
    """Everything that a scan found."""

    def __init__(self) -> None:
        self.blobs: dict[str, BlobFile] = {}  # by hex
        self.set_aside: list[BlobFile] = []
        self.models: list[ModelDir] = []
        self.leftovers: list[Leftover] = []


def stats_of(found: Inventory) -> CacheStats:
    """Return what the inventory comes to."""
    sizes = sum(blob.bytes for blob in found.blobs.values())
    return CacheStats(
        blobs=len(found.blobs),
        bytes=sizes + sum(model.copied_bytes for model in found.models),
        models=len(found.models),
        temporary_files=len(found.leftovers),
        set_aside=len(found.set_aside),
    )


def models_of(found: Inventory, root: str) -> list[CachedModel]:
    """Return the models of the inventory of `root`, least recently used first."""
    models = []
    for model in found.models:
        linked = sum(found.blobs[hex].bytes for hex in model.links if hex in found.blobs)
        path = f"{root}/{model.parent}/{model.key.mdcsum}"
        models.append(CachedModel(*model.key, path, model.names, linked + model.copied_bytes, model.used))
    return sorted(models, key=lambda model: (model.last_use, model.key))


def take_inventory(opened: OpenRoot) -> Inventory:
    """Look at everything in a cache; raise OSError or CacheError if its folders cannot be opened."""
    found = Inventory()
    blobs, by_slug = opened.get(BLOBS), opened.get(BY_SLUG)
    if blobs is not None:
        _look_at_blobs(blobs, found)
    if by_slug is not None:
        _look_at_models(by_slug, found)
    return found


def _entries(folder: Folder) -> Iterator[tuple[str, os.stat_result]]:
    """Yield name and status of all that is in a folder; a link's own status."""
    with os.scandir(folder.fd) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                yield entry.name, entry.stat(follow_symlinks=False)


def _look_at_blobs(folder: Folder, found: Inventory) -> None:
    for name, status in _entries(folder):
        if is_temporary_blob(name):
            leftover = Leftover(BLOBS, name, status.st_size, status.st_mtime, stat.S_ISDIR(status.st_mode))
            found.leftovers.append(leftover)
        elif is_hex(name):
            found.blobs[name] = BlobFile(name, status.st_size, status.st_ctime)
        elif name.endswith(SET_ASIDE):
            found.set_aside.append(BlobFile(name, status.st_size, status.st_ctime))


def _look_at_models(by_slug: Folder, found: Inventory) -> None:
    for slug, status in _entries(by_slug):
        if _is_leftover(BY_SLUG, slug, status, found) or not stat.S_ISDIR(status.st_mode):
            continue
        if not _SLUG.fullmatch(slug):
            continue
        folder = _open(by_slug, slug)
        if folder is None:
            continue
        with folder:
            parent = f"{BY_SLUG}/{slug}"
            if is_hex(slug):  # of a model with an empty slug, or of models with such a slug
                _look_at_model(folder, ModelKey("", slug), BY_SLUG, found)
            for name, inner in _entries(folder):
                if stat.S_ISDIR(inner.st_mode) and not _is_leftover(parent, name, inner, found):
                    _look_into(folder, name, ModelKey(slug, name), parent, found)


def _look_into(above: Folder, name: str, key: ModelKey, parent: str, found: Inventory) -> None:
    folder = _open(above, name) if is_hex(name) else None
    if folder is not None:
        with folder:
            _look_at_model(folder, key, parent, found)


def _look_at_model(folder: Folder, key: ModelKey, parent: str, found: Inventory) -> None:
    links = set()
    names = copied = 0
    for name, status in _entries(folder):
        if stat.S_ISDIR(status.st_mode):
            if is_hex(name) or is_staged(name):
                return  # no model: a slug that looks like a digest
            continue
        if _is_leftover(f"{parent}/{key.mdcsum}", name, status, found):
            continue
        names += 1
        if stat.S_ISREG(status.st_mode):
            copied += status.st_size
        with contextlib.suppress(OSError):
            match = _LINK.fullmatch(os.readlink(name, dir_fd=folder.fd))
            if match:
                links.add(match[1])
    found.models.append(ModelDir(key, parent, folder.mtime, names, frozenset(links), copied))


def _is_leftover(parent: str, name: str, status: os.stat_result, found: Inventory) -> bool:
    if not is_staged(name):
        return False
    is_folder = stat.S_ISDIR(status.st_mode)
    size = 0 if is_folder else status.st_size
    found.leftovers.append(Leftover(parent, name, size, status.st_mtime, is_folder))
    return True


def _open(above: Folder, name: str) -> Optional[Folder]:
    try:
        return above.open(name)
    except OSError:  # gone, or not for us
        return None
