"""BlobCache: verified files by their digest, and one directory per model, in Dynamo's layout.

    <root>/blobs/<hex>                         the files
    <root>/by-slug/<slug>/<mdcsum>/<name>      links to them, one directory per model
    <root>/locks/<hex>, <root>/stamps/<hex>    ours; Dynamo knows nothing of them

Any number of threads and processes of one host, forked ones and real Dynamo frontends among them, may share a
root at the same time. They may fetch a file twice, never see a torn or wrong one. What makes this so: bytes
are written under a private name, hashed, brought to the disk and only then renamed; every hit is verified; a
published blob never changes. Locks only save work. Hosts that share a root over a network file system may,
too, as far as its renames can be relied on; its locks cannot, which costs duplicate work.

The worst cases: a file that is fetched again though it was there (after a crash, a collection, a wrong
clock); a disk that is full of temporary files until they are an hour old (killed writers); with
`verify="stamp"`, bits that rot below the file system are seen by `verify()` or `verify="always"` only.

The cache trusts its own user and root. A root belongs to one user; see folders.py for what is refused.
No descriptor stays open after a call, but those of a writer, a lock and a hold while they last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Callable, Literal, Optional, Union

from ..card.checksum import Checksum
from ..errors import CacheError
from .blob_writer import BlobWriter
from .blobs import Blobs
from .folders import BLOBS, OpenRoot, Root, attempt, cannot
from .locks import Locks, hold_folder
from .model_dirs import ModelDirs, ModelKey
from .roots import choose_root
from .stamps import Verifier
from .strangers import wait_for_strangers

if TYPE_CHECKING:  # what only housekeeping needs is loaded by it
    from .collect import Collected
    from .inventory import CachedModel, CacheStats, Inventory

__all__ = ["BlobCache", "BlobWriter", "ModelKey"]

Path = Union[str, "os.PathLike[str]"]

# How long to wait for another process that fetches the same file, before fetching it as well: a large file
# over a slow network takes longer, but then a second connection may be the faster one.
LOCK_SECONDS = 30.0

_COLLECT_LOCK = "collect"  # beside the locks of digests; publishers of models share it


class BlobCache:
    """The cache in `root`, which is made, with mode 0700, if it is missing, and looked at here and now.

    `root` None stands for DYN_MDC_CACHE or Dynamo's place below HOME; where that cannot be used, for a
    private temporary root until the process ends, with one warning. A given root that cannot be used is a
    CacheError. `lower` are caches that are read and never written to. `verify` says what a hit is verified
    by: stamps, or a full hash "always". `links=False` makes models of copies. `fsync=False` gives up what
    survives a power cut, nothing else. `clock` is the wall clock, `monotonic` times the waiting; all are in
    seconds.
    """

    def __init__(
        self,
        root: Optional[Path] = None,
        *,
        lower: Sequence[Path] = (),
        verify: Literal["stamp", "always"] = "stamp",
        links: bool = True,
        fsync: bool = True,
        lock_seconds: float = LOCK_SECONDS,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if verify not in ("stamp", "always"):
            raise ValueError(f"verify={verify!r}: expected 'stamp' or 'always'")
        self._root, found = choose_root(None if root is None else os.fspath(root), fsync=fsync)
        lowers = [*(Root(os.fspath(path), is_lower=True) for path in lower), *found]
        verifier = Verifier(always=verify == "always", clock=clock)
        self._layers = [Blobs(layer, verifier) for layer in (self._root, *lowers)]
        self._monotonic = monotonic
        self._sleep = sleep
        self._locks = Locks(self._root, seconds=lock_seconds, clock=monotonic, sleep=sleep)
        self._models = ModelDirs(self._root, self._layers, verifier, links=links, clock=clock)
        self._clock = clock
        self._has_reaped = False

    @property
    def root(self) -> str:
        """The absolute path of the root."""
        return self._root.path

    # -------------------------------------------------------------- blobs

    def find(self, checksum: Checksum) -> Optional[str]:
        """Return the path of the verified blob, here or in a lower cache; None for a miss.

        A wrong one that is here is set aside. Raises CacheError if nobody can tell.
        """
        path = self._layers[0].path_of(checksum.hex)
        try:
            with contextlib.ExitStack() as stack:
                own = self._open_for_reading(stack)
                for layer in self._layers:
                    if layer.has(checksum.hex, own):
                        return layer.path_of(checksum.hex)
        except OSError as err:
            raise cannot("look for the blob", path, err) from err
        return None

    def _open_for_reading(self, stack: contextlib.ExitStack) -> Optional[OpenRoot]:
        try:
            return stack.enter_context(self._root.open())
        except FileNotFoundError:  # somebody removed it all; the next writer makes it again
            return None

    def write(self, checksum: Checksum) -> BlobWriter:
        """Return a writer for this blob, for a `with`: what it does not publish is gone afterwards."""
        return BlobWriter(
            checksum,
            blobs=self._layers[0],
            open_root=self._open_for_writing,
            fsync=self._root.fsync,
        )

    def _open_for_writing(self) -> OpenRoot:
        opened = self._root.open(make=True)
        try:
            opened[BLOBS]
            if not self._has_reaped:
                self._has_reaped = True
                from .reap import reap_some

                reap_some(opened, self._clock())
        except BaseException:
            opened.close()
            raise
        return opened

    def lock(
        self, checksum: Checksum, *, give_up: Callable[[], bool] = lambda: False
    ) -> contextlib.AbstractContextManager[bool]:
        """Keep other threads and processes from fetching the same blob, for the time of a `with`.

        True: granted; look again whether the blob is there now. False: there are no locks here, or
        `lock_seconds` passed in vain (a warning); go on without it. Or `give_up()` became true meanwhile.
        """
        return self._locks.hold(checksum.hex, give_up=give_up)

    def wait_for_strangers(self, checksum: Checksum, *, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait while somebody without a lock, a Dynamo frontend, writes the blob; whether there was one.

        Waits for `lock_seconds` at most, and no longer than the file grows. Then look again.
        """
        # It only saves work: what is wrong with the disk, the write that follows tells.
        with contextlib.suppress(OSError, CacheError), self._root.open() as own:
            folder = own.get(BLOBS)
            if folder is not None:
                return wait_for_strangers(
                    folder.fd,
                    checksum.hex,
                    seconds=self._locks.seconds,
                    give_up=give_up,
                    clock=self._monotonic,
                    sleep=self._sleep,
                )
        return False

    def import_blob(self, path: Path, checksum: Checksum) -> str:
        """Copy a local file into the cache, if it is the right one, and return the blob's path.

        Raises VerificationError if it is not, CacheError if it cannot be read or kept. A blob that no model
        refers to within the hour is garbage: resolve the card next.
        """
        from .export import import_file

        with self.write(checksum) as writer:
            return import_file(os.fspath(path), writer)

    def verify(self) -> list[Checksum]:
        """Hash every blob of the own root again, and return those that are wrong.

        They are set aside where that is possible, which a warning tells for each; where it is not (a cache
        that can only be read), it tells why, and the blob is still at its place.
        """
        wrong = []
        with attempt("verify the cache", self.root), contextlib.ExitStack() as stack:
            own = self._open_for_reading(stack)
            folder = None if own is None else own.get(BLOBS)
            for hex in sorted(self._inventory().blobs):
                if folder is not None and self._layers[0].rehash(hex, folder, own) is False:
                    wrong.append(Checksum(hex))
        return wrong

    # -------------------------------------------------------------- models

    def find_model(self, model: ModelKey, files: Mapping[str, Checksum]) -> Optional[str]:
        """Return the directory in which each of these names is a verified file of that digest, else None.

        Counts as a use of the model. Raises CardError for a name that cannot be one.
        """
        return self._models.find(model, files)

    def publish_model(self, model: ModelKey, files: Mapping[str, Checksum]) -> str:
        """Make the model's directory, which appears with all of its names, and return its path.

        Raises BlobMissing (fetch again) if a blob is not there, CacheError if the directory has another blob
        under one of the names or the disk refuses, CardError for a name or a key that cannot be one.
        """
        with self._locks.hold(_COLLECT_LOCK, shared=True):
            return self._models.publish(model, files)

    def hold(self, model_dir: str) -> contextlib.AbstractContextManager[None]:
        """Keep garbage collection, of any process, away from a model's files for the time of a `with`.

        Raises CacheError if the directory is gone. Costs a descriptor, which a forked child shares.
        """
        return hold_folder(model_dir)

    def export_model(self, files: Mapping[str, Checksum], directory: Path) -> None:
        """Copy these files, verified while they are copied, into a plain directory.

        A new directory appears with all of them. In one that exists, files that are there already must be the
        same (else CacheError, and nothing is changed); the others are added when all are copied. Modes are
        those of the umask. Raises BlobMissing if the cache does not have a file.
        """
        from .export import export_files

        with attempt("read the cache", self.root), self._root.open() as own:
            export_files(os.fspath(directory), files, layers=self._layers, own=own)

    # -------------------------------------------------------------- housekeeping

    def stats(self) -> CacheStats:
        """Count what is in the own root."""
        from .inventory import stats_of

        return stats_of(self._inventory())

    def models(self) -> list[CachedModel]:
        """Return the models of the own root, least recently used first."""
        from .inventory import models_of

        return models_of(self._inventory(), self.root)

    def _inventory(self) -> Inventory:
        from .inventory import Inventory, take_inventory

        with attempt("look at the cache", self.root), contextlib.ExitStack() as stack:
            own = self._open_for_reading(stack)
            return Inventory() if own is None else take_inventory(own)

    def collect(
        self,
        *,
        max_bytes: Optional[int] = None,
        max_age_seconds: Optional[float] = None,
        keep: Iterable[ModelKey] = (),
        dry_run: bool = False,
    ) -> Collected:
        """Remove models until at most `max_bytes` stay, and those not used for `max_age_seconds`.

        The least recently used go first; never one that is in `keep`, held, or was used within two hours.
        Blobs that no model refers to, temporary files and what was set aside go when they are an hour old,
        without any limit too. `dry_run` tells the same and changes nothing.
        """
        from .collect import collect

        with contextlib.ExitStack() as stack:
            stack.enter_context(attempt("collect garbage in the cache", self.root))
            if not dry_run:
                stack.enter_context(self._locks.hold(_COLLECT_LOCK))
            return collect(
                stack.enter_context(self._root.open()),
                now=self._clock(),
                max_bytes=max_bytes,
                max_age_seconds=max_age_seconds,
                keep=keep,
                dry_run=dry_run,
            )

    def __repr__(self) -> str:
        return f"<BlobCache {self.root!r} lower={len(self._layers) - 1}>"
