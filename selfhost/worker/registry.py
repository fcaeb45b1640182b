"""MetadataArtifactRegistry: what this process serves, by (slug, suffix, filename).

Rules
- A model is registered all or nothing. The `Registration` that comes back removes exactly what it added.
- The same content under one key is shared and counted. Different content under one key stands side by
  side: the oldest answers the plain URL, every one answers its URL with `?blake3=<hex>`. When the oldest
  goes, the next oldest takes over the plain URL.
- Equal content is kept once per process, whatever the keys; in a shared registry once per host.
- A model's card answers the URL of the model itself, by the same rules. It is no file: length, iteration and
  `pinned_bytes` leave it out. `is_empty` does not, and `unregister` removes it with the files.
- Files are read and hashed before the lock is taken; the lock covers dictionary work only. It is one lock
  for all registries of the process, because they share the content. (Each shared one has its own.)
- A follower is told of every change in order; see `Follower`. `unregister` is to it the removal of every open
  registration of the model. Whoever puts in and takes out the same registrations ends in the same state.

With `shared`, a folder, processes of one host serve what any of them registers, at their very next look-up
and by these same rules; what a process registered goes with it. See shared.py.

Sharing: any number of threads. Look-ups take no lock; each sees a file as it was before or after a change.
Forked children inherit a whole, unlocked copy.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Callable, Optional, Union

from ..errors import RegistrationError
from .answer import CARD
from .artifact_index import ArtifactIndex, all_of
from .artifacts import Artifact as Artifact
from .artifacts import Follower as Follower
from .artifacts import Registration as Registration
from .artifacts import Row, model_target
from .content import MAX_PINNED_BYTES, Content, HeldFile, MemoryContent, pin_bytes, pin_file
from .names import MAX_NAME_BYTES as MAX_NAME_BYTES
from .names import segment
from .names import why_unservable as why_unservable

if TYPE_CHECKING:
    from .shared import Shared

logger = logging.getLogger(__name__)

BASE_SUFFIX = "_base"  # no LoRA's slug can be this: slugs lose their leading underscores

Source = Union[str, "os.PathLike[str]", Content]


class MetadataArtifactRegistry:
    """Which bytes answer for (slug, suffix, filename); see the module's docstring for rules and sharing.

    Files above `max_pinned_bytes` are held open instead of in memory (small ones never). `shared` is a folder
    on a local file system, best one in memory (/dev/shm, /run), which is made where there is none; then
    whatever changes something may raise RegistrationError.
    """

    def __init__(
        self,
        *,
        max_pinned_bytes: int = MAX_PINNED_BYTES,
        shared: Optional[Union[str, os.PathLike[str]]] = None,
    ) -> None:
        self.max_pinned_bytes = max_pinned_bytes
        self._ids = itertools.count(1)
        self._is_closed = False
        self._shared: Optional[Shared] = None
        _install_fork_hooks()
        if shared is None:
            self._index = ArtifactIndex(_lock, _contents)
            weakref.finalize(self, _clear, self._index).atexit = False
        else:
            from .shared import Shared  # it needs fcntl, which not every system has

            self._shared = Shared(shared)
            self._index = self._shared.index
            weakref.finalize(self, self._shared.close)

    # -------------------------------------------------------------- writing

    def register(self, slug: str, suffix: str, filename: str, source: Source) -> Registration:
        """Pin and register one file; see `register_files`."""
        return self.register_files(slug, suffix, {filename: source})

    def register_files(self, slug: str, suffix: str, files: Mapping[str, Source]) -> Registration:
        """Pin and register files of one model, all or nothing.

        Each source is a path, which is read now, or content that is pinned already. Raises
        RegistrationError, naming the first file at fault, for a name that cannot be part of a URL path or
        a file that cannot be pinned. Blocks while the files are read; holds no lock meanwhile.
        """
        self._check_open(slug, suffix)
        model_target(slug, suffix)
        logger.debug("registering %d files of %r/%r", len(files), slug, suffix)
        return self._add(slug, suffix, self._pinned(slug, suffix, files))

    def register_card(self, slug: str, suffix: str, text: str) -> Registration:
        """Register the JSON text of a model's card, for the URL /v1/metadata/{slug}/{suffix}.

        Raises RegistrationError for a name that cannot be part of a URL path.
        """
        self._check_open(slug, suffix)
        model_target(slug, suffix)
        return self._add(slug, suffix, [Row(CARD, pin_bytes(text.encode()))])

    def restore(self, slug: str, suffix: str, rows: Iterable[Row]) -> Registration:
        """Put in `rows` of another registry's registration: who is older there is so here. Not if shared."""
        return self._add(slug, suffix, rows)

    def unregister(self, slug: str, suffix: str) -> int:
        """Remove all that is under (slug, suffix), whoever registered it; return how many files that were."""
        if self._shared is not None:
            removed = self._shared.unregister(slug, suffix)
        else:
            with self._index.lock:
                before = self._index.count
                for registration in self._index.registrations(slug, suffix):
                    self._index.remove(registration)
                removed = before - self._index.count
        self._index.settle()
        return removed

    def release(self, registration: Registration) -> None:
        """Take out a registration of this registry; harmless when repeated."""
        if self._shared is not None:
            is_gone = self._shared.release(registration)
        else:
            with self._index.lock:
                is_gone = self._index.remove(registration)
        if is_gone:
            self._index.settle()

    @property
    def shared(self) -> Optional[str]:
        """The folder through which processes share this registry, as an absolute path."""
        return None if self._shared is None else self._shared.folder.path

    def holds(self, registration: Registration) -> bool:
        """Tell whether this registration is open."""
        return self._index.holds(registration)

    def pin(self, path: str) -> Content:
        """Read, hash and keep a file that is to be registered; raise OSError as `pin_file` does."""
        return pin_file(path, max_pinned_bytes=self.max_pinned_bytes)

    def close(self) -> None:
        """Remove everything and take in nothing more; harmless when repeated."""
        self._is_closed = True
        if self._shared is not None:
            self._shared.close()
        else:
            _clear(self._index)
        self._index.settle()

    def _check_open(self, slug: str, suffix: str) -> None:
        if self._is_closed:
            message = f"cannot register {slug!r}/{suffix!r}: the registry is closed"
            raise RegistrationError(message, slug=slug, suffix=suffix)

    def _pinned(self, slug: str, suffix: str, files: Mapping[str, Source]) -> Iterator[Row]:
        for name, source in files.items():
            segment(name, "filename")  # a card's is no filename
            yield Row(name, self._pin(slug, suffix, name, source))

    def _pin(self, slug: str, suffix: str, filename: str, source: Source) -> Content:
        if isinstance(source, (MemoryContent, HeldFile)):
            return source
        where = os.fspath(source) if isinstance(source, (str, os.PathLike)) else source.hex
        try:
            if isinstance(source, (str, os.PathLike)):
                return self.pin(where)
            if self._shared is not None:
                return source
            return MemoryContent(where, source.read(0, source.size))  # what lies in a shared folder may go
        except OSError as error:
            reason = f"{where!r}: {error.strerror or error}"
            raise RegistrationError(
                f"cannot register {filename!r} of {slug!r}/{suffix!r}: {reason}",
                slug=slug, suffix=suffix, filename=filename, reason=reason,
            ) from error  # fmt: skip

    def _add(self, slug: str, suffix: str, rows: Iterable[Row]) -> Registration:
        if self._shared is not None:
            added = self._shared.register(slug, suffix, rows)
        else:
            pinned = list(rows)
            with self._index.lock:
                self._check_open(slug, suffix)  # again: reading the files took its time
                added = self._index.add(str(next(self._ids)), slug, suffix, pinned)
        self._index.settle()
        return Registration(added.id, slug, suffix, added.artifacts, self)

    # -------------------------------------------------------------- reading

    def get(self, slug: str, suffix: str, filename: str, digest: Optional[str] = None) -> Optional[Artifact]:
        """Return what answers for a key: the oldest content, or the one whose blake3 hex is `digest`.

        The `filename` CARD ("") stands for the model's card.
        """
        if self._shared is not None:
            self._shared.refresh()
        return self._index.get(slug, suffix, filename, digest)

    def lookup(self, target: str) -> Optional[Artifact]:
        """Return what a request target selects, if spelt exactly as in a card; one dictionary read."""
        if self._shared is not None:
            self._shared.refresh()
        return self._index.targets.get(target)

    @property
    def version(self) -> int:
        """Another number whenever anything that is registered has changed."""
        return self._current().version

    def keys(self) -> list[tuple[str, str]]:
        """Return (slug, suffix) of every model that has a file or a card."""
        index = self._current()
        with index.lock:
            return list(index.models)

    def model(self, slug: str, suffix: str) -> list[Artifact]:
        """Return the files and the card of one model, the oldest of each name before the younger ones."""
        index = self._current()
        with index.lock:
            return list(all_of({(slug, suffix): index.models.get((slug, suffix), {})}))

    def follow(self, follower: Follower) -> Callable[[], None]:
        """Tell `follower` of what is there, then of every change in order; call the result to end that.

        Nothing is missed or told twice.
        """
        return self._current().follow(follower)

    def is_empty(self) -> bool:
        """Tell whether nothing is registered, neither file nor card."""
        return not self._current().models

    @property
    def pinned_bytes(self) -> int:
        """Memory that the registered files take, in bytes: each digest once, held files not at all.

        Of a shared registry: what they take in its folder.
        """
        contents = {artifact.content.hex: artifact.content for artifact in self}
        return sum(content.size for content in contents.values() if not isinstance(content, HeldFile))

    def __len__(self) -> int:
        return self._current().count

    def __bool__(self) -> bool:
        return True  # an empty registry is a registry: `registry or default` must not replace it

    def __iter__(self) -> Iterator[Artifact]:
        """Iterate over a snapshot of the registered files."""
        index = self._current()
        with index.lock:
            return iter([artifact for artifact in all_of(index.models) if artifact.filename != CARD])

    def __repr__(self) -> str:
        shared = "" if self.shared is None else f" shared={self.shared!r}"
        index = self._current()
        return f"<MetadataArtifactRegistry models={len(index.models)} files={index.count}{shared}>"

    def _current(self) -> ArtifactIndex:
        """Return the index, with what other processes registered."""
        if self._shared is not None:
            self._shared.refresh()
        return self._index


# ------------------------------------------------------------------ what the process shares

_lock = threading.RLock()
_contents: dict[str, Content] = {}


def _clear(index: ArtifactIndex) -> None:
    """Give back the content of a registry that nobody refers to any more, or that is closed."""
    with index.lock:
        index.clear()


@functools.cache
def _install_fork_hooks() -> None:
    # A thread that forks while another one registers would leave its child a locked registry for ever.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
