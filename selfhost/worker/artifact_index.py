"""What is registered, as dictionaries: artifacts by key and by URL, the registrations that hold them.

Rules
- The same content under one key is one artifact, counted. Different content under one key stands side by
  side: the oldest answers the plain URL, every one answers its URL with `?blake3=<hex>`. When the oldest
  goes, the next oldest takes over the plain URL.
- An artifact's `serial` says who is older, its `target` who was first; both are fixed when it comes. So what
  is registered follows from the set of open registrations and these two alone, in whatever order they are put
  in: two indexes that hold the same registrations are equal. For the moment between two such sets, content
  that went and came again stands there twice.

No I/O. Changes are made under `lock`; look-ups take none, each sees a file as it was before or after a
change.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Callable, Optional

from .answer import CARD
from .artifacts import Artifact, Follower, Registration, Row, model_target
from .content import Content, HeldFile
from .names import segment

logger = logging.getLogger(__name__)

# (slug, suffix) -> filename, or CARD -> the oldest content, which knows the younger ones
Models = dict[tuple[str, str], dict[str, Artifact]]
_NO_MODEL: dict[str, Artifact] = {}


def all_of(models: Models) -> Iterator[Artifact]:
    """Yield every artifact, the oldest of each key before the younger ones."""
    for model in models.values():
        for oldest in model.values():
            yield oldest
            yield from oldest.younger


def with_digest(oldest: Artifact, digest: str) -> Optional[Artifact]:
    """Return the artifact of this key whose blake3 hex is `digest`."""
    return next((a for a in (oldest, *oldest.younger) if a.content.hex == digest), None)


def _same(oldest: Artifact, row: Row) -> Optional[Artifact]:
    """Return the artifact that this row holds, too: the same content, and in the same place if it has one."""
    for artifact in (oldest, *oldest.younger):
        is_placed = not row.serial or (artifact.serial, artifact.is_plain) == (row.serial, row.is_plain)
        if is_placed and artifact.content.hex == row.content.hex:
            return artifact
    return None


class ArtifactIndex:
    """The dictionaries of one registry; `contents` and `lock` are shared by all that share content."""

    def __init__(self, lock: threading.RLock, contents: dict[str, Content]) -> None:
        self.lock = lock
        self.models: Models = {}
        self.targets: dict[str, Artifact] = {}  # URL path, with query where needed -> artifact
        self.count = 0  # of files; cards are none
        self.version = 0  # another one after every change
        self._contents = contents  # by blake3 hex; `users` of each counts the artifacts that have it
        self._registrations: dict[tuple[str, str], dict[str, Registration]] = {}
        self._last_serial = 0
        self._followers: tuple[Follower, ...] = ()

    # -------------------------------------------------------------- look-ups

    def get(self, slug: str, suffix: str, filename: str, digest: Optional[str]) -> Optional[Artifact]:
        """Return the oldest content of a key, or the one with this digest."""
        oldest = self.models.get((slug, suffix), _NO_MODEL).get(filename)
        return oldest if oldest is None or digest is None else with_digest(oldest, digest)

    def registrations(self, slug: str, suffix: str) -> list[Registration]:
        """Return the open registrations of a model, in order."""
        return list(self._registrations.get((slug, suffix), {}).values())

    def holds(self, registration: Registration) -> bool:
        """Tell whether this registration is open."""
        return registration.id in self._registrations.get((registration.slug, registration.suffix), {})

    def all_registrations(self) -> list[Registration]:
        """Return the open registrations of all models, those with the oldest content first."""
        everything = [one for model in self._registrations.values() for one in model.values()]
        return sorted(everything, key=_first_serial)

    def place(self, slug: str, suffix: str, filename: str, digest: str) -> tuple[int, bool]:
        """Return `serial` and `is_plain` of a content that is registered now."""
        oldest = self.get(slug, suffix, filename, None)
        known = None if oldest is None else with_digest(oldest, digest)
        if known is not None:
            return known.serial, known.is_plain
        return self._last_serial + 1, oldest is None

    # -------------------------------------------------------------- changes, under the lock

    def add(self, id: str, slug: str, suffix: str, rows: Iterable[Row]) -> Registration:
        """Put in a registration and tell the followers."""
        path = model_target(slug, suffix)
        model = self.models.setdefault((slug, suffix), {})
        artifacts = tuple([self._hold(model, path, slug, suffix, row) for row in rows])
        if not model:
            del self.models[slug, suffix]
        registration = Registration(id, slug, suffix, artifacts)
        self._registrations.setdefault((slug, suffix), {})[id] = registration
        self.version += 1
        self._tell(lambda follower: follower.added(registration))
        return registration

    def remove(self, registration: Registration) -> bool:
        """Take out a registration and tell the followers; False if that was done before."""
        key = registration.slug, registration.suffix
        model = self._registrations.get(key, {})
        if model.pop(registration.id, None) is None:
            return False
        if not model:
            del self._registrations[key]
        for artifact in registration.artifacts:
            artifact.holders -= 1
            if not artifact.holders:
                self._drop(artifact)
        self.version += 1
        self._tell(lambda follower: follower.removed(registration))
        return True

    def _hold(self, model: dict[str, Artifact], path: str, slug: str, suffix: str, row: Row) -> Artifact:
        filename, content, serial, is_plain = row
        oldest = model.get(filename)
        artifact = None if oldest is None else _same(oldest, row)
        if artifact is None:
            if not serial:
                serial, is_plain = self._last_serial + 1, oldest is None
            plain = path if filename == CARD else f"{path}/{segment(filename, 'filename')}"
            target = plain if is_plain else f"{plain}?blake3={content.hex}"
            artifact = Artifact(slug, suffix, filename, self._share(content), target, serial)
            self._insert(model, plain, artifact, oldest)
        elif isinstance(artifact.content, HeldFile):  # it may have changed since; not so the new one
            self._unshare(artifact.content)
            artifact.content = self._share(content)
        artifact.holders += 1
        return artifact

    def _insert(
        self, model: dict[str, Artifact], plain: str, new: Artifact, oldest: Optional[Artifact]
    ) -> None:
        self.targets[new.target] = new
        if oldest is None:
            model[new.filename] = self.targets[plain] = new
        else:
            self._line_up(model, plain, (oldest, *oldest.younger, new))
        self._last_serial = max(self._last_serial, new.serial)
        self.count += new.filename != CARD

    def _line_up(self, model: dict[str, Artifact], plain: str, artifacts: Iterable[Artifact]) -> None:
        """Let the oldest answer the plain URL and know the younger ones."""
        oldest, *younger = sorted(artifacts, key=lambda artifact: artifact.serial)
        oldest.younger = tuple(younger)
        model[oldest.filename] = self.targets[plain] = oldest

    def _drop(self, artifact: Artifact) -> None:
        model = self.models[artifact.slug, artifact.suffix]
        oldest = model[artifact.filename]
        left = [other for other in (oldest, *oldest.younger) if other is not artifact]
        plain = artifact.target.partition("?")[0]
        if left:
            self._line_up(model, plain, left)
        else:
            self.targets.pop(plain, None)
            del model[artifact.filename]
            if not model:
                del self.models[artifact.slug, artifact.suffix]
        if not artifact.is_plain and self.targets.get(artifact.target) is artifact:
            del self.targets[artifact.target]
        self.count -= artifact.filename != CARD
        self._unshare(artifact.content)

    def clear(self) -> None:
        """Take out everything."""
        for registration in self.all_registrations():
            self.remove(registration)

    # -------------------------------------------------------------- contents

    def _share(self, content: Content) -> Content:
        """Count one more user of this content, and return the object that all of them use."""
        known = self._contents.setdefault(content.hex, content)
        if isinstance(known, HeldFile) or known.size != content.size:
            # It may have changed since, or is of a line that nobody of us wrote; not so the new one.
            known = self._contents[content.hex] = content
        known.users += 1
        return known

    def _unshare(self, content: Content) -> None:
        content.users -= 1
        if not content.users and self._contents.get(content.hex) is content:
            del self._contents[content.hex]

    # -------------------------------------------------------------- followers

    def follow(self, follower: Follower) -> Callable[[], None]:
        """Tell `follower` of what is there and of every change from now on, until the result is called."""
        with self.lock:
            self._followers = (*self._followers, follower)
            for registration in self.all_registrations():
                _guarded(follower.added, registration)

        def unfollow() -> None:
            with self.lock:
                self._followers = tuple(other for other in self._followers if other is not follower)

        return unfollow

    def settle(self) -> None:
        """Wait for the followers. Not under the lock."""
        self._tell(lambda follower: follower.settle())

    def _tell(self, tell: Callable[[Follower], None]) -> None:
        for follower in self._followers:
            _guarded(tell, follower)


def _first_serial(registration: Registration) -> int:
    return min([artifact.serial for artifact in registration.artifacts], default=0)


def _guarded(call: Callable[..., None], *args: object) -> None:
    """Let no follower keep another one, or the change itself, from being told or made."""
    try:
        call(*args)
    except Exception:
        logger.exception("a follower of the registry failed")
