"""Discovery inside one process: for tests, and for a worker and a frontend that live together.

Participants that should see each other share a `MemoryStore`. Sharing between threads is safe. A forked
child gets a copy of the store as it was, which the parent never sees again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Optional

from ..errors import DiscoveryError
from .base import (
    POLL_SECONDS,
    Bucket,
    Event,
    Publication,
    RecordKey,
    check_key,
    check_text,
    sorted_by_key,
    watch_snapshots,
)
from .lifetime import track


class MemoryStore:
    """The records of any number of participants.

    There is no lock that a thread could hold while another one forks: each step is a single operation on a
    dictionary, which CPython does not interrupt.
    """

    def __init__(self) -> None:
        self._records: dict[tuple[Bucket, RecordKey], _Record] = {}

    def add(self, record: _Record) -> bool:
        """Put the record under its key; False where the key is taken."""
        return self._records.setdefault((record.bucket, record.key), record) is record

    def remove(self, record: _Record) -> None:
        """Take out a record that was added, once."""
        del self._records[record.bucket, record.key]

    def snapshot(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return the texts of one bucket, sorted by key."""
        records = self._records.copy().values()
        return sorted_by_key({record.key: record.text for record in records if record.bucket is bucket})


class _Record:
    def __init__(self, bucket: Bucket, key: RecordKey, text: str) -> None:
        self.bucket, self.key, self.text = bucket, key, text


class MemoryDiscovery:
    """One participant of a store (None: of a new one)."""

    name = "mem"

    def __init__(self, store: Optional[MemoryStore] = None) -> None:
        self.store = MemoryStore() if store is None else store
        self._published: dict[_Record, bool] = {}  # used as a set; pop() tells who was first
        self._is_closed = False
        self.begin_anew()
        track(self)

    def begin_anew(self) -> None:
        """Make an event that no thread holds, in a forked child; also how a new object begins."""
        self._closing = threading.Event()
        if self._is_closed:
            self._closing.set()

    def publish(self, bucket: Bucket, key: RecordKey, text: str, *, adopt: bool = False) -> Publication:
        """Make the record visible until it is withdrawn; see Discovery.publish.

        There is nothing to adopt: the owners of all records are in this process.
        """
        check_key(self.name, key)
        check_text(self.name, key, text)
        record = _Record(bucket, key, text)
        if not self.store.add(record):
            raise self._error(key, "the key is taken")
        self._published[record] = True
        if self._is_closed:  # asked last, so that a close() meanwhile leaves nothing behind
            self._withdraw(record)
            raise self._error(key, "this discovery is closed")
        return Publication(
            bucket,
            key,
            withdraw=functools.partial(self._withdraw, record),
            replace=functools.partial(self._replace, record),
        )

    def remove(self, bucket: Bucket, key: RecordKey) -> None:
        """Do nothing: whoever held a record in this memory has not died without us."""

    def records(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return the live records of everybody, sorted by key."""
        return self.store.snapshot(bucket)

    def watch(
        self, bucket: Bucket, *, stop: Optional[threading.Event] = None, poll_seconds: float = POLL_SECONDS
    ) -> Iterator[Event]:
        """Yield what is there as added, then every change; see Discovery.watch."""
        stopped = self._closing if stop is None else stop
        return watch_snapshots(
            functools.partial(self.store.snapshot, bucket),
            bucket,
            is_over=lambda: stopped.is_set() or self._is_closed,
            wait=stopped.wait,
            poll_seconds=poll_seconds,
        )

    def close(self) -> None:
        """Withdraw what this object published and end its watches; twice is harmless."""
        self._is_closed = True
        self._closing.set()
        for record in self._published.copy():
            self._withdraw(record)

    def _withdraw(self, record: _Record) -> None:
        if self._published.pop(record, False):
            self.store.remove(record)

    def _replace(self, record: _Record, text: str) -> None:
        check_text(self.name, record.key, text)
        if record not in self._published:
            raise self._error(record.key, "it was withdrawn")
        record.text = text

    def _error(self, key: RecordKey, reason: str) -> DiscoveryError:
        return DiscoveryError(f"cannot publish {str(key)!r}: {reason}", backend=self.name, key=str(key))

    def __enter__(self) -> MemoryDiscovery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MemoryDiscovery published={len(self._published)}>"
