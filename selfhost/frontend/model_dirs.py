"""One directory per model, in Dynamo's layout: a name for each file of its card, each a link to a blob.

`by-slug/<slug>/<mdcsum>/<name>`; a model whose slug is empty has `by-slug/<mdcsum>/<name>`. Our links are
relative, so that a cache still works that was moved or is mounted elsewhere; Dynamo's are absolute; both are
read. Where links cannot be made the names are copies, and the blobs stay beside them: twice the space.

Rules
- A directory that we make appears with all of its names at once: it is filled under a hidden name, brought to
  the disk, then renamed. Dynamo's appears empty and fills up; what is missing in one is added.
- A name that links another blob of this cache, or is a copy of one, is a collision of two cards, and an
  error. A link to anywhere else, which somebody planted, is replaced and never followed. So is a file whose
  bytes are those of no blob: it rotted, or somebody planted it.
- What is found or was just made is verified through the names, last of all: garbage collection may have run.
- The directory's mtime says when the model was last used, to the hour.

Sharing: any number of threads and processes, Dynamo's among them; no locks. The worst case: two that make the
same directory at once, and one of them finds its work done.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Callable, NamedTuple, Optional

from .._atomic import NO_LINKS
from ..card.checksum import Checksum, hash_fd
from ..card.slug import Slug
from ..errors import BlobMissing, CacheError, CardError, shown
from .blobs import Blobs
from .folders import (
    BLOBS,
    BY_SLUG,
    CREATE,
    READ,
    Folder,
    OpenRoot,
    Root,
    attempt,
    cannot,
    remove_folder,
    sync,
)
from .names import as_file_name, is_hex, staged_name
from .stamps import Verifier

logger = logging.getLogger(__name__)

# A model's last use is written down at most so often: to be found, a warm model needs no write then.
USE_SECONDS = 3600.0

# Garbage collection may take a folder away between two steps; it does not do so twice in a row, because what
# was just made is young.
_TRIES = 3

Files = Mapping[str, Checksum]


class ModelKey(NamedTuple):
    """What Dynamo names a model's directory by: the slug of its name and the checksum of its card."""

    slug: str
    mdcsum: str


def _checked(model: ModelKey, files: Files) -> str:
    """Return the path of a model's directory below the root; raise CardError for a wrong key or name."""
    for name in files:
        as_file_name(name)
    slug = Slug.parse(model.slug)
    if not isinstance(model.mdcsum, str) or not is_hex(model.mdcsum):
        raise CardError(
            f"mdcsum: expected 64 lower-case hexadecimal digits, found {shown(model.mdcsum)}",
            field="mdcsum",
            value=model.mdcsum,
        )
    return f"{BY_SLUG}/{slug}/{model.mdcsum}" if slug else f"{BY_SLUG}/{model.mdcsum}"


class ModelDirs:
    """The model directories of one cache. `clock` is the wall clock, in seconds."""

    def __init__(
        self,
        root: Root,
        layers: Sequence[Blobs],  # the own root's first
        verifier: Verifier,
        *,
        links: bool,
        clock: Callable[[], float],
    ) -> None:
        self._root = root
        self._layers = layers
        self._verifier = verifier
        self._links = links
        self._clock = clock

    # -------------------------------------------------------------- finding

    def find(self, model: ModelKey, files: Files) -> Optional[str]:
        """Return the directory if every name in it is a verified file of that digest, else None."""
        below = _checked(model, files)
        path = f"{self._root.path}/{below}"
        try:
            with self._root.open() as own:
                folder = own.get(below)
                if folder is None or not self._is_whole(folder, files, own):
                    return None
                return path if self._use(folder, below, own) else None
        except FileNotFoundError:
            return None
        except OSError as err:
            raise cannot("read the model directory", path, err) from err

    def _is_whole(self, folder: Folder, files: Files, own: OpenRoot) -> bool:
        prefix = _way_to_blobs(self._root, folder)
        return all(
            self._is_right(folder, name, checksum.hex, prefix, own) for name, checksum in files.items()
        )

    def _is_right(self, folder: Folder, name: str, hex: str, prefix: str, own: OpenRoot) -> bool:
        try:
            text = os.readlink(name, dir_fd=folder.fd)
        except OSError as err:
            if err.errno != errno.EINVAL:  # there is none
                return False
            return self._is_right_copy(folder, name, hex, own)
        if text == prefix + hex:
            return self._layers[0].has(hex, own)
        layer, linked = self._meaning_of(text, folder)
        return layer is not None and linked == hex and layer.has(hex, own)

    def _meaning_of(self, text: str, folder: Folder) -> tuple[Optional[Blobs], str]:
        """Return whose blob a link names, taken literally, and the blob's hex; (None, "") for none."""
        path = os.path.normpath(os.path.join(folder.path, text))
        parent, _, name = path.rpartition("/")
        for layer in self._layers:
            if parent == f"{layer.root.path}/{BLOBS}" and is_hex(name):
                return layer, name
        return None, ""

    def _is_right_copy(self, folder: Folder, name: str, hex: str, own: OpenRoot) -> bool:
        """Whether a name that is no link is a file with these bytes. Its stamp stays in this process."""
        key = f"{folder.path}/{name}:{hex}"
        status = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return False
        if self._verifier.is_stamped(key, status, folder, None):
            return True
        reason = self._verifier.why_wrong(name, hex, key, folder, None)
        if reason is not None:
            logger.warning("the file %r is not used: %s", f"{folder.path}/{name}", reason)
        return reason is None

    def _use(self, folder: Folder, below: str, own: OpenRoot) -> bool:
        """Write down that the model is used now, unless that was done within the hour.

        Whether the directory still has its name afterwards is what comes back: a collector that took it away
        in between looks once more whether it was used, and puts it back or did so too late for us.
        """
        now = self._clock()
        if not 0 <= now - folder.mtime < USE_SECONDS:
            with contextlib.suppress(OSError):  # a cache that can only be read collects no garbage
                os.utime(folder.fd, (now, now))
        parent, _, name = below.rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=own[parent].fd, follow_symlinks=False)
            return os.path.samestat(found, os.fstat(folder.fd))
        return False

    # -------------------------------------------------------------- publishing

    def publish(self, model: ModelKey, files: Files) -> str:
        """Make the directory, or add what is missing in it, and return its path.

        Raises BlobMissing, CacheError for a collision or where the disk refuses, CardError for a name or key.
        """
        below = _checked(model, files)
        path = f"{self._root.path}/{below}"
        with attempt("make the model directory", path):
            for tries_left in reversed(range(_TRIES)):
                try:
                    with self._root.open(make=True) as own:
                        self._make(below, files, self._holders(files, own), own)
                        parent, _, mdcsum = below.rpartition("/")
                        with own[parent].open(mdcsum) as folder:
                            if self._is_whole(folder, files, own) and self._use(folder, below, own):
                                return path
                        self._holders(files, own)  # raises, if that is the reason
                except FileNotFoundError:
                    if not tries_left:
                        raise
        raise CacheError(f"somebody changes the model directory {path!r} all the time: try again", path=path)

    def _holders(self, files: Files, own: OpenRoot) -> dict[str, Blobs]:
        """Return, by hex, whose blob each file is to be; raise BlobMissing for those that nobody has."""
        holders: dict[str, Blobs] = {}
        missing = []
        for checksum in dict.fromkeys(files.values()):
            holder = next((layer for layer in self._layers if layer.has(checksum.hex, own)), None)
            if holder is None:
                missing.append(checksum)
            else:
                holders[checksum.hex] = holder
        if missing:
            listed = ", ".join(map(str, missing))
            message = f"the cache {self._root.path!r} does not have {listed}: fetch again"
            raise BlobMissing(message, path=self._root.path, checksums=[str(one) for one in missing])
        return holders

    def _make(self, below: str, files: Files, holders: Mapping[str, Blobs], own: OpenRoot) -> None:
        parent, _, mdcsum = below.rpartition("/")
        with contextlib.suppress(FileNotFoundError), own[parent].open(mdcsum) as folder:
            self._fill(folder, files, holders, own)
            return
        try:
            self._make_whole(own[parent], mdcsum, files, holders, own)
        except OSError as err:
            if err.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            with own[parent].open(mdcsum) as folder:  # somebody was faster
                self._fill(folder, files, holders, own)

    def _make_whole(
        self, parent: Folder, mdcsum: str, files: Files, holders: Mapping[str, Blobs], own: OpenRoot
    ) -> None:
        staged = staged_name()
        os.mkdir(staged, 0o755, dir_fd=parent.fd)
        try:
            with parent.open(staged) as folder:
                prefix = _way_to_blobs(self._root, folder)
                for name, checksum in files.items():
                    self._place(folder, name, checksum.hex, holders[checksum.hex], prefix, own)
                if own.fsync:
                    sync(folder.fd)
            os.rename(staged, mdcsum, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        except BaseException:
            with contextlib.suppress(OSError, CacheError):
                remove_folder(parent, staged)
            raise
        if own.fsync:
            sync(parent.fd)

    def _fill(self, folder: Folder, files: Files, holders: Mapping[str, Blobs], own: OpenRoot) -> None:
        """Make each name of an existing directory right, one by one and each in one step."""
        prefix = _way_to_blobs(self._root, folder)
        is_changed = False
        for name, checksum in files.items():
            if self._is_right(folder, name, checksum.hex, prefix, own):
                continue
            self._refuse_collision(folder, name, checksum.hex, own)
            staged = staged_name()
            try:
                self._place(folder, staged, checksum.hex, holders[checksum.hex], prefix, own)
                os.rename(staged, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(staged, dir_fd=folder.fd)
                raise
            is_changed = True
        if is_changed and own.fsync:
            sync(folder.fd)

    def _refuse_collision(self, folder: Folder, name: str, hex: str, own: OpenRoot) -> None:
        path = f"{folder.path}/{name}"
        try:
            text = os.readlink(name, dir_fd=folder.fd)
        except FileNotFoundError:
            return
        except OSError:  # no link
            found = _hash_of(folder, name)
            if found is None or not any(layer.has(found, own) for layer in self._layers):
                logger.warning("replaced the file %r: it is of no known blob", path)
                return
        else:
            layer, found = self._meaning_of(text, folder)
            if layer is None:
                logger.warning("replaced the link %r: it points to %s", path, shown(text))
                return
        if found != hex:
            raise CacheError(
                f"the model directory {folder.path!r} has blake3:{found} as {name!r}, this card wants "
                f"blake3:{hex} there: two cards have the same name and checksum; remove the directory if the "
                "other one is no longer in use",
                path=folder.path,
            )

    def _place(self, folder: Folder, name: str, hex: str, holder: Blobs, prefix: str, own: OpenRoot) -> None:
        """Make a link, or a copy where there are no links, under a name that nothing has."""
        if self._links:
            target = holder.path_of(hex) if holder.root.is_lower else prefix + hex
            try:
                os.symlink(target, name, dir_fd=folder.fd)
                return
            except OSError as err:
                if err.errno not in NO_LINKS:
                    raise
                self._links = False
                logger.info("no links in the cache %r (%s): models are copies", self._root.path, err)
        self._copy(folder, name, hex, holder, own)

    def _copy(self, folder: Folder, name: str, hex: str, holder: Blobs, own: OpenRoot) -> None:
        target = os.open(name, CREATE, 0o600, dir_fd=folder.fd)
        try:
            is_right = holder.copy(hex, target, own)
            os.fchmod(target, 0o444)
            if own.fsync:
                os.fsync(target)
        finally:
            os.close(target)
        if not is_right:  # changed since it was verified: the next look sets it aside
            message = f"the blob blake3:{hex} changed while it was copied: fetch again"
            raise BlobMissing(message, path=holder.path_of(hex), checksums=[f"blake3:{hex}"])


def _way_to_blobs(root: Root, folder: Folder) -> str:
    """Return what leads from a model's directory to the blobs, as a relative link has it."""
    depth = folder.path.count("/") - root.path.count("/")
    return "../" * depth + BLOBS + "/"


def _hash_of(folder: Folder, name: str) -> Optional[str]:
    """Return the hex of a file's digest; None for what is no file, or cannot be read."""
    try:
        fd = os.open(name, READ, dir_fd=folder.fd)
        try:
            status = os.fstat(fd)
            return hash_fd(fd, status.st_size)[0].hex if stat.S_ISREG(status.st_mode) else None
        finally:
            os.close(fd)
    except OSError:
        return None
