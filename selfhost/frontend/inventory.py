"""What lies in a cache: its blobs, its models, and what was left over, as values. Changes nothing.

A scan is no snapshot: files may come and go meanwhile. A folder of models that cannot be read is left out,
with a warning, and counted.

Which blob a name that is a copy was copied from is not written down. It refers to every blob of its size, for
all that garbage collection needs: at worst a blob stays that nobody wants.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import NamedTuple, Optional

from ..errors import CacheError
from .folders import BLOBS, BY_SLUG, SHORTAGE, Folder, OpenRoot
from .model_dirs import ModelKey
from .names import SET_ASIDE, is_hex, is_staged, is_temporary_blob

logger = logging.getLogger(__name__)

# What was made or used so recently is never touched: a fetch of many files may take minutes, and a blob is
# referred to only when the last of them is there. Dynamo gives up a download after 300 s.
GRACE_SECONDS = 3600.0

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
    unreadable: int = 0  # folders of models that could not be looked into, see the warnings


class BlobFile(NamedTuple):
    """A file in `blobs`; `since` is when it got its name, by ctime, in seconds since 1970."""

    name: str
    bytes: int
    since: float
    is_folder: bool = False  # somebody planted it


class Leftover(NamedTuple):
    """A temporary file or folder: `parent` is a path below the root, `touched` its mtime."""

    parent: str
    name: str
    bytes: int
    touched: float
    is_folder: bool


class ModelDir(NamedTuple):
    """A model's directory. `used` is its mtime: the last use to the hour, in seconds since 1970."""

    key: ModelKey
    parent: str  # the path, below the root, of the folder that it is in
    used: float
    names: int  # of its files
    links: frozenset[str]  # the hex of each blob that it links
    copied_bytes: int  # of names that are files
    sources: frozenset[str]  # the hex of each blob that one of these may be a copy of

    @property
    def path(self) -> str:
        """Its path below the root."""
        return f"{self.parent}/{self.key.mdcsum}"

    @property
    def references(self) -> frozenset[str]:
        """The hex of each blob that it must keep from being collected."""
        return self.links | self.sources


class Inventory:
    """Everything that a scan found."""

    def __init__(self) -> None:
        self.blobs: dict[str, BlobFile] = {}  # by hex
        self.set_aside: list[BlobFile] = []
        self.models: list[ModelDir] = []
        self.leftovers: list[Leftover] = []
        self.unreadable = 0  # folders; the blobs that models in them refer to are not known

    def without(self, models: Collection[ModelDir]) -> Inventory:
        """Return what is left when these models are gone."""
        left = copy.copy(self)
        left.models = [model for model in self.models if model not in models]
        return left


def stats_of(found: Inventory) -> CacheStats:
    """Return what the inventory comes to."""
    sizes = sum(blob.bytes for blob in found.blobs.values())
    return CacheStats(
        blobs=len(found.blobs),
        bytes=sizes + sum(model.copied_bytes for model in found.models),
        models=len(found.models),
        temporary_files=len(found.leftovers),
        set_aside=len(found.set_aside),
        unreadable=found.unreadable,
    )


def models_of(found: Inventory, root: str) -> list[CachedModel]:
    """Return the models of the inventory of `root`, least recently used first."""
    models = []
    for model in found.models:
        linked = sum(found.blobs[hex].bytes for hex in model.links if hex in found.blobs)
        size = linked + model.copied_bytes
        models.append(CachedModel(*model.key, f"{root}/{model.path}", model.names, size, model.used))
    return sorted(models, key=lambda model: (model.last_use, model.key))


def take_inventory(opened: OpenRoot) -> Inventory:
    """Look at everything in a cache; raise OSError or CacheError if its folders cannot be opened."""
    found = Inventory()
    blobs, by_slug = opened.get(BLOBS), opened.get(BY_SLUG)
    if blobs is not None:
        _look_at_blobs(blobs, found)
    if by_slug is not None:
        _ModelScan(found).look_at(by_slug)
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
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        blob = BlobFile(name, 0 if is_folder else status.st_size, status.st_ctime, is_folder)
        if is_hex(name):
            found.blobs[name] = blob
        elif name.endswith(SET_ASIDE):
            found.set_aside.append(blob)


class _ModelScan:
    """One look at the models, when the blobs are known."""

    def __init__(self, found: Inventory) -> None:
        self._found = found
        self._by_size: defaultdict[int, set[str]] = defaultdict(set)
        for hex, blob in found.blobs.items():
            self._by_size[blob.bytes].add(hex)

    def look_at(self, by_slug: Folder) -> None:
        """Look at all models."""
        for slug, status in _entries(by_slug):
            if self._is_leftover(BY_SLUG, slug, status) or not stat.S_ISDIR(status.st_mode):
                continue
            folder = self._open(by_slug, slug) if _SLUG.fullmatch(slug) else None
            if folder is not None:
                with folder:
                    self._look_at_slug(folder, slug)

    def _look_at_slug(self, folder: Folder, slug: str) -> None:
        parent = f"{BY_SLUG}/{slug}"
        if is_hex(slug):  # of a model with an empty slug, or of models with such a slug
            self._look_at_model(folder, ModelKey("", slug), BY_SLUG)
        for name, status in _entries(folder):
            if not stat.S_ISDIR(status.st_mode) or self._is_leftover(parent, name, status):
                continue
            inner = self._open(folder, name) if is_hex(name) else None
            if inner is not None:
                with inner:
                    self._look_at_model(inner, ModelKey(slug, name), parent)

    def _look_at_model(self, folder: Folder, key: ModelKey, parent: str) -> None:
        links: set[str] = set()
        sources: set[str] = set()
        names = copied = 0
        for name, status in _entries(folder):
            if stat.S_ISDIR(status.st_mode):
                if is_hex(name) or is_staged(name):
                    return  # no model: a slug that looks like a digest
                continue
            if self._is_leftover(f"{parent}/{key.mdcsum}", name, status):
                continue
            names += 1
            if stat.S_ISREG(status.st_mode):
                copied += status.st_size
                sources |= self._by_size.get(status.st_size, set())
            else:
                links |= _linked(folder, name)
        model = ModelDir(key, parent, folder.mtime, names, frozenset(links), copied, frozenset(sources))
        self._found.models.append(model)

    def _is_leftover(self, parent: str, name: str, status: os.stat_result) -> bool:
        if not is_staged(name):
            return False
        is_folder = stat.S_ISDIR(status.st_mode)
        size = 0 if is_folder else status.st_size
        self._found.leftovers.append(Leftover(parent, name, size, status.st_mtime, is_folder))
        return True

    def _open(self, above: Folder, name: str) -> Optional[Folder]:
        try:
            return above.open(name)
        except FileNotFoundError:
            return None
        except OSError as err:
            if err.errno in SHORTAGE:
                raise
            reason: Exception = err
        except CacheError as err:
            reason = err
        self._found.unreadable += 1
        logger.warning("cannot look into %r: %s", f"{above.path}/{name}", reason)
        return None


def _linked(folder: Folder, name: str) -> set[str]:
    """Return the hex of the blob that a link means, if it is one and means one."""
    with contextlib.suppress(OSError):
        match = _LINK.fullmatch(os.readlink(name, dir_fd=folder.fd))
        if match:
            return {match[1]}
    return set()
