"""One process's copy of a shared registry: the dictionaries of a plain one, fed from the journal.

The copies of all processes are equal once they have read equally far: what is registered follows from the set
of open registrations (artifact_index.py). So a journal that was replaced is read whole, into the dictionaries
that are there: what it adds is added first, what it no longer has is removed then, nothing is ever missing.

Look-ups take no lock; a refresh that finds nothing new takes none either, and costs one fstat.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable
from typing import Optional

from ..errors import RegistrationError
from .artifact_index import ArtifactIndex
from .artifacts import Registration, Row
from .shared_content import ContentStore
from .shared_folder import SharedFolder
from .shared_journal import Add, Change, File, Gone, Journal, Remove, owner_of

logger = logging.getLogger(__name__)


class Replica:
    """The `index` of one registry, and the journal that it follows."""

    def __init__(self, folder: SharedFolder) -> None:
        self._folder = folder
        self.store = ContentStore(folder)
        self.index = ArtifactIndex(threading.RLock(), {})
        self.journal: Optional[Journal] = Journal(folder)  # None once closed
        self._registrations: dict[str, dict[str, Registration]] = {}  # in the journal, by owner and id
        self._uses: dict[str, int] = {}  # blake3 hex -> files of these registrations
        self._is_reported = False

    def refresh(self) -> None:
        """See that the index is as the processes have left it; never raises."""
        journal = self.journal
        if journal is None:
            return
        try:
            found = os.fstat(journal.fd)
            if found.st_size != journal.seen or found.st_nlink != 1:
                self.catch_up()
        except (OSError, RegistrationError) as error:
            self.report(error)

    def catch_up(self) -> None:
        """Read what is new. Raises OSError or RegistrationError where there is no journal any more."""
        with self.index.lock:
            journal = self.journal
            if journal is None:
                return
            found = os.fstat(journal.fd)
            is_there = found.st_nlink == 1 or os.path.samestat(found, self._folder.stat("journal"))
            if is_there and found.st_size >= journal.size:
                for change in journal.read():
                    self.apply(change)
            else:
                self._reopen()
            self._is_reported = False

    def _reopen(self) -> None:
        journal = Journal(self._folder)
        left = {id for registrations in self._registrations.values() for id in registrations}
        for change in journal.read():
            if isinstance(change, Add):
                left.discard(change.id)
            self.apply(change)
        self.apply(Remove(tuple(left)))
        self.journal = journal

    def close(self) -> None:
        """Be empty from now on, and let go of the journal."""
        with self.index.lock:
            self.journal = None
            self._registrations.clear()
            self._uses.clear()
            self.index.clear()

    def report(self, error: Exception) -> None:
        """Say once that the folder is out of reach."""
        if not self._is_reported:
            self._is_reported = True
            logger.warning(
                "the shared registry's folder %r is out of reach (%s): this process goes on with what it "
                "knows; restart the processes that share it", self._folder.path, str(error),
            )  # fmt: skip

    # -------------------------------------------------------------- changes, under the index's lock

    def apply(self, change: Optional[Change]) -> None:
        """Do what a line of the journal says; whatever was done before is not done again."""
        if isinstance(change, Add):
            self._add(change)
        elif isinstance(change, (Remove, Gone)):
            for registration in self.touched(change):
                self._remove(registration)

    def withdraw(self, change: Change) -> None:
        """Serve no longer what a removal will take out, whatever else the journal says before."""
        with self.index.lock:
            for registration in self.touched(change):
                self.index.remove(registration)

    def touched(self, change: Change) -> list[Registration]:
        """Return the registrations that a removal takes out of the journal."""
        with self.index.lock:
            if isinstance(change, Gone):
                return list(self._registrations.get(change.owner, {}).values())
            ids = change.ids if isinstance(change, Remove) else ()
            return [registration for registration in map(self.find, ids) if registration is not None]

    def find(self, id: str) -> Optional[Registration]:
        """Return a registration that is in the journal."""
        return self._registrations.get(owner_of(id), {}).get(id)

    def owners(self) -> set[str]:
        """Return the tokens of the processes that have something registered."""
        return set(self._registrations)

    def _add(self, change: Add) -> None:
        if self.find(change.id) is None:
            rows = [
                Row(file.name, self.store.get(file.hex, file.size), file.serial, file.is_plain)
                for file in change.files
            ]
            registration = self.index.add(change.id, change.slug, change.suffix, rows)
            self._registrations.setdefault(owner_of(change.id), {})[change.id] = registration
            self._count(registration, 1)

    def _remove(self, registration: Registration) -> None:
        owned = self._registrations[owner_of(registration.id)]
        del owned[registration.id]
        if not owned:
            del self._registrations[owner_of(registration.id)]
        self._count(registration, -1)
        self.index.remove(registration)

    def _count(self, registration: Registration, step: int) -> None:
        for artifact in registration.artifacts:
            hex = artifact.content.hex
            self._uses[hex] = self._uses.get(hex, 0) + step
            if not self._uses[hex]:
                del self._uses[hex]

    def remove_unused(self, digests: Iterable[str]) -> None:
        """Remove files of which nothing is registered; under the folder's lock, with all of the journal read.

        Raises OSError.
        """
        self.store.remove([hex for hex in digests if hex not in self._uses])

    def sweep(self, living: Collection[str]) -> None:
        """Remove files that owners who do not live left, and that nothing registered needs; as above."""
        self.remove_unused(self.store.sweep(living))

    # -------------------------------------------------------------- what a change would be

    def placed(self, id: str, slug: str, suffix: str, rows: Iterable[Row]) -> Add:
        """Return the change that registers files now, when all of the journal is read; under the lock."""
        with self.index.lock:
            placed = [
                Row(name, content, *self.index.place(slug, suffix, name, content.hex))
                for name, content, *_ in rows
            ]
        return _add_of(id, slug, suffix, placed)

    def snapshot(self) -> list[Change]:
        """Return the changes that lead from nothing to what is registered now."""
        with self.index.lock:
            registrations = self.index.all_registrations()
        return [_add_of(one.id, one.slug, one.suffix, one.rows) for one in registrations]


def _add_of(id: str, slug: str, suffix: str, rows: Iterable[Row]) -> Add:
    files = [File(one.filename, one.content.hex, one.content.size, one.serial, one.is_plain) for one in rows]
    return Add(id, slug, suffix, tuple(files))
