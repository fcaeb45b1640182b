"""What `MetadataArtifactRegistry(shared=PATH)` adds: the processes of one host serve what any of them has.

Every process has the dictionaries of a plain registry, and reads the journal of the folder into them. A
look-up costs one fstat of the journal: its size says whether anything is new, its link count whether it was
replaced. So what one process registered is served by all at their very next request.

- Changes are made under the folder's lock, by whoever has read all of the journal: so all agree on the order.
- What cannot be said, as the disk is full, is said with the next change, or within GHOST_SECONDS of look-ups.
- What a process registered goes when it ends: at once if it exits, within GHOST_SECONDS of look-ups by others
  if it was killed. A forked child serves what its parent registered, which stays the parent's.
- Who cannot read the folder any more goes on with what it knows, and says so once. Look-ups never raise.

Why a journal: a look-up by SQLite (WAL) costs three times as much, by its `data_version` before a dictionary
2.6 times, and no connection survives a fork (benchmarks/bench_shared.py). A generation in a mapped file would
cost a seventh of the fstat, and lie when a writer dies between the two.

Sharing: any number of threads, registries and forked children, all of one user.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Optional, Union

from ..errors import RegistrationError
from .answer import CARD
from .artifact_index import ArtifactIndex
from .artifacts import Registration, Row
from .shared_content import SharedContent
from .shared_folder import Busy, SharedFolder
from .shared_forks import install_fork_hooks, track
from .shared_journal import MAX_LINE_BYTES, Change, Gone, Remove, render, write_journal
from .shared_owners import end_owner, is_alive, known_owners, new_owner
from .shared_replica import Replica

logger = logging.getLogger(__name__)

GHOST_SECONDS = 2.0  # between two looks at who is still alive; one costs about as much as 50 look-ups
_BUSY_SECONDS = 0.05  # until the next try where somebody else had the lock
_END_SECONDS = 2.0  # to wait for the lock when a process ends: the others notice that anyway
_COMPACT_BYTES = 128 * 1024  # a larger journal is replaced if a new one is a quarter of it
_COMPACT_FACTOR = 4

_FULL = "make room there, or name another folder"
_REMEDIES = {
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.ENOENT: "if it was removed, restart the processes that share it",
    errno.EACCES: "all processes that share it must run as one user",
    errno.E2BIG: "register fewer files at once",
    errno.EBADF: "make another one",
}  # fmt: skip


class Shared:
    """One registry's part in a shared folder. Raises RegistrationError where changes are not possible."""

    def __init__(self, path: Union[str, os.PathLike[str]]) -> None:
        self.folder = SharedFolder(path)
        self._owner: Optional[str] = None  # this process, once it has registered something
        self._is_closed = False
        self._unsaid: list[Change] = []  # withdrawn while the folder could not be written
        self._unneeded: set[str] = set()  # content of which nothing may be registered any more
        self._numbers = itertools.count(1)
        self._compact_at = _COMPACT_BYTES
        self._sweep_at = 0.0
        install_fork_hooks()
        with self._refusing("share a registry"), self.folder.locked():
            self.folder.claim()
            if not self.folder.size("journal"):  # there is none, or a disk lost what was in it
                write_journal(self.folder, [])
            self._replica = Replica(self.folder)
            self._replica.catch_up()
            self._sweep_locked(thoroughly=True)
        track(self)

    @property
    def index(self) -> ArtifactIndex:
        """What is registered."""
        return self._replica.index

    def refresh(self) -> None:
        """See that the index is as the processes have left it; never raises. One system call if it is."""
        self._replica.refresh()
        if time.monotonic() >= self._sweep_at:
            self._sweep()

    # -------------------------------------------------------------- changes

    def register(self, slug: str, suffix: str, pinned: Iterable[Row]) -> Registration:
        """Put files into the folder one after the other, then register them, all or nothing."""
        files: list[tuple[Row, SharedContent]] = []
        digests = set()
        try:
            with self._refusing("register", slug, suffix):
                owner = self._ensure_owner()
            for row in pinned:
                digests.add(row.content.hex)
                with self._refusing("register", slug, suffix):
                    files.append((row, self._replica.store.put(row.content, owner)))
            with self._refusing("register", slug, suffix):
                return self._add(slug, suffix, files)
        except BaseException:
            self._unneeded |= digests
            self._tidy()
            raise

    def release(self, registration: Registration) -> bool:
        """Take out a registration of this process; those of others, a parent too, stay."""
        if self._owner is None or not registration.id.startswith(f"{self._owner}."):
            return False
        change = Remove((registration.id,))
        try:
            with self._writing():
                if not self.index.holds(registration):
                    return False
                self._say(change)
        except (OSError, Busy, RegistrationError) as error:
            logger.warning(
                "others serve %r/%r until the shared registry's folder %r can be written again: %s",
                registration.slug, registration.suffix, self.folder.path, self._reason(error),
            )  # fmt: skip
            self._withdraw_here(change)
        return True

    def unregister(self, slug: str, suffix: str) -> int:
        """Remove all of a model, whoever registered it; return how many files that were."""
        with self._refusing("unregister", slug, suffix), self._writing():
            with self.index.lock:
                registrations = self.index.registrations(slug, suffix)
            artifacts = {artifact for one in registrations for artifact in one.artifacts}
            if registrations:
                self._say(Remove(tuple([one.id for one in registrations])))
        return sum(artifact.filename != CARD for artifact in artifacts)

    def close(self) -> None:
        """Withdraw what this process registered and let go of the folder; harmless when repeated."""
        self._is_closed = True  # first: see `_owner_locked`
        owner, self._owner = self._owner, None
        if owner is not None:
            try:
                with self._writing(_END_SECONDS):
                    self._say(Gone(owner))
            except (OSError, Busy, RegistrationError) as error:
                # Its lock tells the others.
                logger.debug("%r goes without a word: %s", owner, self._reason(error))
            with contextlib.suppress(OSError):  # others remove what is left
                end_owner(self.folder, owner)
        self._replica.close()
        self.folder.close()

    def _ensure_owner(self) -> str:
        owner = self._owner
        if owner is None:
            with self._writing():
                owner = self._owner_locked()
        return owner

    def _owner_locked(self) -> str:
        owner = self._owner
        if owner is None or not self.folder.has(f"owners/{owner}"):  # somebody removed it
            owner = self._owner = new_owner(self.folder)
        if self._is_closed:  # by a thread that need not have seen this owner
            end_owner(self.folder, owner)
            raise OSError(errno.EBADF, "the registry is closed")
        return owner

    def _add(self, slug: str, suffix: str, files: list[tuple[Row, SharedContent]]) -> Registration:
        with self._writing():
            if time.monotonic() >= self._sweep_at:
                self._sweep_locked()  # the dead first: their contents have the plain URLs
            owner = self._owner_locked()
            for row, content in files:
                self._replica.store.ensure(content, row.content, owner)
            id = f"{owner}.{next(self._numbers)}"
            try:
                self._say(self._replica.placed(id, slug, suffix, [row for row, _ in files]))
                registration = self._replica.find(id)
            except BaseException:
                self._withdraw_here(Remove((id,)))  # it may have been written
                raise
        if registration is None:
            raise OSError(errno.EIO, "what was written to the journal cannot be read")
        return registration

    def _tidy(self) -> None:
        """Remove what a registration that failed has left; now, or with the next change."""
        try:
            with self._writing(_BUSY_SECONDS):
                pass
        except (OSError, Busy, RegistrationError) as error:
            logger.debug("leftovers in %r stay for now: %s", self.folder.path, self._reason(error))

    # -------------------------------------------------------------- under the folder's lock

    @contextlib.contextmanager
    def _writing(self, seconds: Optional[float] = None) -> Iterator[None]:
        """Hold the folder's lock with all of the journal read, and nothing left to do from before."""
        with self.folder.locked(seconds):
            self._replica.catch_up()
            self._say_unsaid()
            yield
            self._compact()

    def _say_unsaid(self) -> None:
        while self._unsaid:
            self._say(self._unsaid[0])
            del self._unsaid[0]
        self._remove_unneeded()

    def _say(self, change: Change) -> None:
        """Write a change, read it as everybody does, and remove content that nobody needs any more."""
        journal = self._replica.journal
        if journal is None:
            raise OSError(errno.EBADF, "the registry is closed")
        line = render(change)
        if len(line) > MAX_LINE_BYTES:
            raise OSError(errno.E2BIG, f"a line of {len(line)} bytes, at most {MAX_LINE_BYTES} are read")
        self._unneeded |= self._digests(change)
        journal.append(line)
        self._replica.catch_up()
        self._remove_unneeded()

    def _remove_unneeded(self) -> None:
        unneeded, self._unneeded = self._unneeded, set()
        try:
            self._replica.remove_unused(list(unneeded))  # other threads may add
        except OSError:
            self._unneeded |= unneeded
            raise

    def _digests(self, change: Change) -> set[str]:
        touched = self._replica.touched(change)
        return {artifact.content.hex for registration in touched for artifact in registration.artifacts}

    def _compact(self) -> None:
        """Replace a journal that is mostly old news; a disk that is full, say, leaves it as it is."""
        journal = self._replica.journal
        if journal is None or journal.size <= self._compact_at:
            return
        lines = [render(change) for change in self._replica.snapshot()]
        live_bytes = sum(map(len, lines))
        self._compact_at = max(_COMPACT_BYTES, _COMPACT_FACTOR * live_bytes)
        if journal.size > self._compact_at:
            self._rewrite(lines)

    def _rewrite(self, lines: list[bytes]) -> None:
        try:
            write_journal(self.folder, lines)
            self._replica.catch_up()
        except OSError as error:
            logger.debug("the journal in %r stays as it is: %s", self.folder.path, self._reason(error))

    # -------------------------------------------------------------- who is still there

    def _sweep(self) -> None:
        """Withdraw what dead processes registered, and what we could not yet; never waits, never raises."""
        self._sweep_at = time.monotonic() + GHOST_SECONDS
        if self._replica.journal is None:
            return
        try:
            with self.folder.locked(0):
                self._replica.catch_up()
                self._sweep_locked()
                with contextlib.suppress(OSError):  # it is tried again
                    self._say_unsaid()
        except Busy:
            self._sweep_at = time.monotonic() + _BUSY_SECONDS
        except (OSError, RegistrationError) as error:
            self._replica.report(error)

    def _sweep_locked(self, *, thoroughly: bool = False) -> None:
        self._sweep_at = time.monotonic() + GHOST_SECONDS
        registered = self._replica.owners()
        owners = registered.union(known_owners(self.folder))
        dead = [owner for owner in owners if not is_alive(self.folder, owner)]
        for owner in registered.intersection(dead):
            logger.info("%s has ended: what it registered in %r is withdrawn", owner, self.folder.path)
            self._say_gone(Gone(owner))
        if dead or thoroughly:
            self._replica.sweep(owners.difference(dead))
        for owner in dead:
            end_owner(self.folder, owner)

    def _say_gone(self, change: Gone) -> None:
        try:
            self._say(change)
        except OSError as error:  # a full disk: each process finds it out for itself
            logger.debug("cannot note that %s is gone: %s", change.owner, self._reason(error))
            with self.index.lock:
                self._replica.apply(change)

    def _withdraw_here(self, change: Change) -> None:
        """Withdraw in this process alone, and for the others as soon as the folder can be written."""
        self._unsaid.append(change)
        self._replica.withdraw(change)

    @contextlib.contextmanager
    def _refusing(self, what: str, slug: str = "", suffix: str = "") -> Iterator[None]:
        """Turn what can go wrong in the folder into a RegistrationError."""
        try:
            yield
        except (OSError, Busy) as error:
            reason = f"the shared registry's folder {self.folder.path!r}: {self._reason(error)}"
            message = f"cannot {what}{f' {slug!r}/{suffix!r}' if suffix else ''}: {reason}"
            raise RegistrationError(message, slug=slug, suffix=suffix, reason=reason) from error

    def _reason(self, error: Exception) -> str:
        """Say what went wrong and what to do."""
        if isinstance(error, RegistrationError):
            return str(error)
        if not isinstance(error, OSError):
            return f"others held its lock for {self.folder.lock_seconds:g} s; end who is stopped or stuck"
        found = error.strerror or str(error)
        return f"{found}; {_REMEDIES.get(error.errno or 0, 'name a folder on a local file system')}"

    def forget_parent(self) -> None:
        """In a forked child: own nothing."""
        self._owner = None
        self._unsaid = []
        self._unneeded = set()
        self._replica.store.lock = threading.RLock()
