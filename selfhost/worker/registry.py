"""MetadataArtifactRegistry: what this process serves, by (slug, suffix, filename).

Rules
- A model is registered all or nothing. The `Registration` that comes back removes exactly what it added.
- The same content under one key is shared and counted. Different content under one key stands side by
  side: the oldest answers the plain URL, every one answers its URL with `?blake3=<hex>`. When the oldest
  goes, the next oldest takes over the plain URL.
- Equal content is kept once per process, whatever the keys.
- A model's card answers the URL of the model itself, by the same rules. It is no file: length, iteration and
  `pinned_bytes` leave it out. `is_empty` does not, and `unregister` removes it with the files.
- Files are read and hashed before the lock is taken; the lock covers dictionary work only. It is one lock
  for all registries of the process, because they share the content.

Sharing: any number of threads. Look-ups take no lock; each sees a file as it was before or after a change.
Forked children inherit a whole, unlocked copy.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Optional, Union
from urllib.parse import quote

from ..errors import RegistrationError
from .answer import CARD, ROUTE, Fields, hit_fields, render_fields
from .content import MAX_PINNED_BYTES, Content, HeldFile, MemoryContent, pin_bytes, pin_file

logger = logging.getLogger(__name__)

BASE_SUFFIX = "_base"  # no LoRA's slug can be this: slugs lose their leading underscores
MAX_NAME_BYTES = 255  # NAME_MAX of the file systems on which frontends will store the file

Source = Union[str, "os.PathLike[str]", MemoryContent, HeldFile]


class Artifact:
    """One registered file or card: its key, its pinned content and its URL below the server's root.

    `target` is the percent-encoded path that selects it, with a query only where another content holds the
    plain URL; `fields` are the header fields of its 200.
    """

    __slots__ = (
        "_fields", "_head", "content", "filename", "holders", "slug", "suffix", "target", "younger",
    )  # fmt: skip

    def __init__(self, slug: str, suffix: str, filename: str, content: Content, target: str) -> None:
        self.slug = slug
        self.suffix = suffix
        self.filename = filename
        self.content = content
        self.target = target
        self.holders = 1  # registrations that are not closed
        self.younger: tuple[Artifact, ...] = ()  # other contents of this key, if this one is the oldest
        self._fields: Optional[Fields] = None
        self._head: Optional[bytes] = None

    @property
    def fields(self) -> Fields:
        """The header fields of the 200, prepared once."""
        if self._fields is None:
            self._fields = hit_fields(self.filename, self.content)
        return self._fields

    @property
    def head(self) -> bytes:
        """The same fields as they stand on the wire, with the empty line that ends them."""
        if self._head is None:
            self._head = render_fields(self.fields) + b"\r\n"
        return self._head

    def __repr__(self) -> str:
        return f"<Artifact {self.target} {self.content.checksum} holders={self.holders}>"


class Registration:
    """What was registered together. Closing removes it, unless another registration shares it.

    `targets` maps each filename to its URL path (with query where needed), "" to a card's. A context manager;
    `close` may be called any number of times from any thread.
    """

    def __init__(self, registry: MetadataArtifactRegistry, artifacts: tuple[Artifact, ...]) -> None:
        self._registry = registry
        self._artifacts = artifacts
        self._closed = False

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What was registered, in the order given."""
        return self._artifacts

    @property
    def targets(self) -> Mapping[str, str]:
        """Map each filename to its URL path."""
        return MappingProxyType({artifact.filename: artifact.target for artifact in self._artifacts})

    def close(self) -> None:
        """Withdraw it all; harmless when repeated."""
        self._registry._release(self)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Registration {state} files={len(self._artifacts)}>"


# (slug, suffix) -> filename, or CARD -> the oldest content, which knows the younger ones
_Models = dict[tuple[str, str], dict[str, Artifact]]
_NO_MODEL: dict[str, Artifact] = {}


def _all_of(models: _Models) -> Iterator[Artifact]:
    for model in models.values():
        for oldest in model.values():
            yield oldest
            yield from oldest.younger


def _with_digest(oldest: Artifact, digest: str) -> Optional[Artifact]:
    return next((a for a in (oldest, *oldest.younger) if a.content.hex == digest), None)


class MetadataArtifactRegistry:
    """Which bytes answer for (slug, suffix, filename); see the module's docstring for rules and sharing."""

    def __init__(self, *, max_pinned_bytes: int = MAX_PINNED_BYTES) -> None:
        self.max_pinned_bytes = max_pinned_bytes  # larger files are held open instead (small ones never)
        self._lock = _lock
        self._models: _Models = {}
        self._targets: dict[str, Artifact] = {}  # URL path, with query where needed -> artifact
        self._count = 0
        _install_fork_hooks()
        weakref.finalize(self, _drop_models, self._models).atexit = False

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
        prefix = f"{ROUTE}{_segment(slug, 'slug')}/{_segment(suffix, 'suffix')}/"
        new = []
        for name, source in files.items():
            target = prefix + _segment(name, "filename")
            new.append(Artifact(slug, suffix, name, self._pin(slug, suffix, name, source), target))
        logger.debug("registering %d files under %s", len(new), prefix)
        return self._insert_all(slug, suffix, new)

    def register_card(self, slug: str, suffix: str, text: str) -> Registration:
        """Register the JSON text of a model's card, for the URL /v1/metadata/{slug}/{suffix}.

        Raises RegistrationError for a name that cannot be part of a URL path.
        """
        target = f"{ROUTE}{_segment(slug, 'slug')}/{_segment(suffix, 'suffix')}"
        return self._insert_all(
            slug, suffix, [Artifact(slug, suffix, CARD, pin_bytes(text.encode()), target)]
        )

    def _pin(self, slug: str, suffix: str, filename: str, source: Source) -> Content:
        if isinstance(source, (MemoryContent, HeldFile)):
            return source
        path = os.fspath(source)
        try:
            return self.pin(path)
        except OSError as error:
            reason = f"{path!r}: {error.strerror or error}"
            raise RegistrationError(
                f"cannot register {filename!r} of {slug!r}/{suffix!r}: {reason}",
                slug=slug, suffix=suffix, filename=filename, reason=reason,
            ) from error  # fmt: skip

    def pin(self, path: str) -> Content:
        """Read, hash and keep a file that is to be registered; raise OSError as `pin_file` does."""
        return pin_file(path, max_pinned_bytes=self.max_pinned_bytes)

    def unregister(self, slug: str, suffix: str) -> int:
        """Remove all that is under (slug, suffix), whoever registered it; return how many files that were."""
        with self._lock:
            artifacts = list(_all_of({(slug, suffix): self._models.get((slug, suffix), {})}))
            for artifact in artifacts:
                artifact.holders = 0
                self._remove(artifact)
        return sum(artifact.filename != CARD for artifact in artifacts)

    def _insert_all(self, slug: str, suffix: str, new: list[Artifact]) -> Registration:
        with self._lock:
            model = self._models.setdefault((slug, suffix), {}) if new else {}
            return Registration(self, tuple([self._insert(model, artifact) for artifact in new]))

    def _insert(self, model: dict[str, Artifact], new: Artifact) -> Artifact:
        oldest = model.setdefault(new.filename, new)
        if oldest is not new:
            known = _with_digest(oldest, new.content.hex)
            if known is not None:
                known.holders += 1
                if isinstance(known.content, HeldFile):  # it may have changed since; not so the new one
                    _unshare(known.content)
                    known.content = _share(new.content)
                return known
            new.target += f"?blake3={new.content.hex}"
            oldest.younger = (*oldest.younger, new)
        new.content = _share(new.content)
        self._targets[new.target] = new
        self._count += new.filename != CARD
        return new

    def _remove(self, artifact: Artifact) -> None:
        model = self._models[artifact.slug, artifact.suffix]
        oldest = model[artifact.filename]
        left = [other for other in (oldest, *oldest.younger) if other is not artifact]
        plain_target = artifact.target.partition("?")[0]
        self._targets.pop(artifact.target, None)
        if left:
            left[0].younger = tuple(left[1:])
            model[artifact.filename] = self._targets[plain_target] = left[0]
        else:
            self._targets.pop(plain_target, None)
            del model[artifact.filename]
            if not model:
                del self._models[artifact.slug, artifact.suffix]
        self._count -= artifact.filename != CARD
        _unshare(artifact.content)

    def _release(self, registration: Registration) -> None:
        with self._lock:
            if registration._closed:
                return
            registration._closed = True
            for artifact in registration._artifacts:
                if artifact.holders:  # 0: `unregister` was here first
                    artifact.holders -= 1
                    if not artifact.holders:
                        self._remove(artifact)

    # -------------------------------------------------------------- reading

    def get(self, slug: str, suffix: str, filename: str, digest: Optional[str] = None) -> Optional[Artifact]:
        """Return what answers for a key: the oldest content, or the one whose blake3 hex is `digest`.

        The `filename` CARD ("") stands for the model's card.
        """
        oldest = self._models.get((slug, suffix), _NO_MODEL).get(filename)
        return oldest if oldest is None or digest is None else _with_digest(oldest, digest)

    def lookup(self, target: str) -> Optional[Artifact]:
        """Return what a request target selects, if spelt exactly as in a card; one dictionary read."""
        return self._targets.get(target)

    def is_empty(self) -> bool:
        """Tell whether nothing is registered, neither file nor card."""
        return not self._models

    @property
    def pinned_bytes(self) -> int:
        """Memory that the registered files take, in bytes: each digest once, held files not at all."""
        contents = {artifact.content.hex: artifact.content for artifact in self}
        return sum(content.size for content in contents.values() if isinstance(content, MemoryContent))

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return True  # an empty registry is a registry: `registry or default` must not replace it

    def __iter__(self) -> Iterator[Artifact]:
        """Iterate over a snapshot of the registered files."""
        with self._lock:
            return iter([artifact for artifact in _all_of(self._models) if artifact.filename != CARD])

    def __repr__(self) -> str:
        return f"<MetadataArtifactRegistry models={len(self._models)} files={self._count}>"


# ------------------------------------------------------------------ names and sources

_PLAIN_NAME = re.compile("[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,254}")  # nothing to refuse, nothing to encode
# Separators, control characters (C0, DEL, C1) and halves of surrogate pairs, which have no UTF-8.
_FORBIDDEN = re.compile("[/\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def why_unservable(name: str) -> Optional[str]:
    """Return why `name` cannot be one segment of a metadata URL, or None if it can."""
    if name in ("", ".", ".."):
        return "it must not be empty, '.' or '..'"
    found = _FORBIDDEN.search(name)
    if found:
        return f"it must not contain {found.group()!r}"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it has {len(name.encode())} bytes of UTF-8, at most {MAX_NAME_BYTES} are allowed"
    return None


@functools.lru_cache(maxsize=4096)  # a thousand adapters have the same ten filenames
def _segment(name: str, what: str) -> str:
    """Validate and percent-encode one segment of a URL path."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    if what == "slug" and name == "":  # of a model called 模型, for one
        return name
    reason = why_unservable(name)
    if reason is not None:
        where = {what: name}
        raise RegistrationError(f"cannot register the {what} {name!r}: {reason}", reason=reason, **where)
    return quote(name, safe="")


# ------------------------------------------------------------------ what the process shares

_lock = threading.RLock()
_contents: dict[str, Content] = {}  # by blake3 hex; `users` of each counts the artifacts that have it


def _share(content: Content) -> Content:
    """Count one more user of this content, and return the object that all of them use."""
    known = _contents.setdefault(content.hex, content)
    if isinstance(known, HeldFile):  # it may have changed since; not so the new one
        known = _contents[content.hex] = content
    known.users += 1
    return known


def _unshare(content: Content) -> None:
    content.users -= 1
    if not content.users and _contents.get(content.hex) is content:
        del _contents[content.hex]


def _drop_models(models: _Models) -> None:
    """Give back the content of a registry that nobody refers to any more."""
    with _lock:
        for artifact in _all_of(models):
            _unshare(artifact.content)


@functools.cache
def _install_fork_hooks() -> None:
    # A thread that forks while another one registers would leave its child a locked registry for ever.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
