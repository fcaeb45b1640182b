"""Discovery in a directory, in Dynamo's layout: any number of processes that share a file system.

Each record is a file that its owner touches every third of its time to live; what nobody touches for that
long is dead, and every participant removes it, so a record outlives a killed owner by little. A record that
others removed, or that expired while its owner stood still, is made again at the next touch (Dynamo's never).

One thread does the touching and removing, and is there only while something is published. Any thread may
call anything. A forked child never touches or withdraws what its parent published; a thread of its own keeps
alive what it publishes itself. What is still published at interpreter exit is withdrawn.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Callable, NoReturn, Optional, Union

from .._threads import log_safely
from ..errors import DiscoveryError
from . import layout
from .base import (
    ALREADY_OURS,
    POLL_SECONDS,
    Bucket,
    Event,
    Publication,
    RecordKey,
    check_key,
    check_text,
    watch_snapshots,
)
from .expiry import Expiry, sweep
from .keepalive import KeepAlive
from .lifetime import track
from .owned import NotOurs, OwnedRecord
from .scan import Scanner

logger = logging.getLogger(__name__)

TTL_SECONDS = 10.0  # Dynamo's, whose processes remove whatever is older
TOUCHES_PER_TTL = 3  # Dynamo's: two may be late before anybody takes the owner for dead


class FileDiscovery:
    """The records under the directory `root`, which is made when something is published.

    `clock` is the wall clock that modification times are set and judged by, `monotonic` the one that shows
    when it jumped; both in seconds.
    """

    name = "file"

    def __init__(
        self,
        root: Union[str, os.PathLike[str]],
        *,
        ttl_seconds: float = TTL_SECONDS,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = os.path.abspath(root)
        self.ttl_seconds = ttl_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._expiry = Expiry(ttl_seconds, clock, monotonic)
        self._next_sweep = float("-inf")  # monotonic
        self._troubles: dict[str, set[Optional[int]]] = {}  # by action, those logged since it worked
        self._is_closed = False
        self.begin_anew()
        track(self)

    def begin_anew(self) -> None:
        """Forget what the parent of this forked process published; also how a new object begins."""
        self._lock = threading.Lock()  # for the next two, and closing
        self._owned: dict[str, OwnedRecord] = {}  # by path
        self._keep_alive: Optional[KeepAlive] = None  # there is one while anything is owned
        self._closing = threading.Event()
        if self._is_closed:
            self._closing.set()

    # -------------------------------------------------------------- publishing

    def publish(self, bucket: Bucket, key: RecordKey, text: str, *, adopt: bool = False) -> Publication:
        """Write the record and keep it alive until it is withdrawn; see Discovery.publish."""
        check_key(self.name, key)
        check_text(self.name, key, text)
        path = self._path(bucket, key)
        record = OwnedRecord(path, text.encode(), lambda: int(self._clock() * 1e9))
        self._reserve(key, record)
        try:
            self._create(record, adopt=adopt)
        except BaseException as err:
            self._withdraw(record)
            if isinstance(err, (NotOurs, OSError)):
                self._fail("publish", key, err)
            raise
        logger.debug("published %r", path)
        return Publication(
            bucket,
            key,
            withdraw=functools.partial(self._withdraw, record),
            replace=functools.partial(self._replace, key, record),
            abandon=functools.partial(self._abandon, record),
        )

    def remove(self, bucket: Bucket, key: RecordKey) -> None:
        """Unlink the record's file; see Discovery.remove."""
        check_key(self.name, key, action="remove")
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(bucket, key))
        except OSError as err:
            self._fail("remove", key, err)

    def _path(self, bucket: Bucket, key: RecordKey) -> str:
        return os.path.join(layout.bucket_directory(self.root, bucket), layout.file_name(key))

    def _reserve(self, key: RecordKey, record: OwnedRecord) -> None:
        """Take the record into our care and see that the thread runs, before anything is on the disk."""
        with self._lock:
            if self._is_closed:
                self._fail("publish", key, "this discovery is closed")
            if record.path in self._owned:
                self._fail("publish", key, ALREADY_OURS)
            if self._keep_alive is None:
                keep_alive = KeepAlive(self._tick, self.ttl_seconds / TOUCHES_PER_TTL)
                try:
                    keep_alive.start()
                except RuntimeError as err:
                    self._fail("publish", key, err)
                self._keep_alive = keep_alive
            self._owned[record.path] = record

    def _create(self, record: OwnedRecord, *, adopt: bool) -> None:
        try:
            record.create(adopt=adopt)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if not self._expiry.is_stale(record.path, os.lstat(record.path).st_mtime):
                    raise
                os.unlink(record.path)  # its owner is dead
            record.create()

    def _replace(self, key: RecordKey, record: OwnedRecord, text: str) -> None:
        check_text(self.name, key, text)
        try:
            record.replace(text.encode())
        except (NotOurs, OSError) as err:
            self._fail("replace", key, err)

    def _withdraw(self, record: OwnedRecord) -> None:
        try:
            record.remove()
        except OSError as err:
            message = "could not remove %r (%s); it expires in %g s"
            log_safely(logger, logging.WARNING, message, record.path, err, self.ttl_seconds)
        self._forget(record)

    def _abandon(self, record: OwnedRecord) -> None:
        record.abandon()
        self._forget(record)

    def _forget(self, record: OwnedRecord) -> None:
        """Drop the record from our care; with the last one the thread goes."""
        finished = None
        with self._lock:
            if self._owned.get(record.path) is record:
                del self._owned[record.path]
            if not self._owned:
                finished, self._keep_alive = self._keep_alive, None
        if finished is not None:
            finished.stop()

    def _fail(self, action: str, key: RecordKey, reason: Union[str, Exception]) -> NoReturn:
        if isinstance(reason, FileExistsError):
            why = f"somebody else has published it (in {self.root!r})"
        elif isinstance(reason, OSError):
            why = f"{reason} (the store is {self.root!r}; DYN_FILE_KV sets another)"
        else:
            why = str(reason)
        cause = reason if isinstance(reason, Exception) else None
        message = f"cannot {action} {str(key)!r}: {why}"
        raise DiscoveryError(message, backend=self.name, key=str(key)) from cause

    # -------------------------------------------------------------- reading

    def records(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return the live records of everybody, sorted by key; stale ones are left out."""
        try:
            return self._scanner(bucket).scan()
        except OSError as err:
            message = f"cannot read the {bucket.value} records in {self.root!r}: {err}"
            raise DiscoveryError(message, backend=self.name) from err

    def watch(
        self, bucket: Bucket, *, stop: Optional[threading.Event] = None, poll_seconds: float = POLL_SECONDS
    ) -> Iterator[Event]:
        """Yield what is there as added, then every change; see Discovery.watch.

        Where the directory cannot be read for a while, what was known stays (one warning).
        """
        stopped = self._closing if stop is None else stop
        return watch_snapshots(
            functools.partial(self._snapshot, bucket, self._scanner(bucket)),
            bucket,
            is_over=lambda: stopped.is_set() or self._is_closed,
            wait=stopped.wait,
            poll_seconds=poll_seconds,
        )

    def _scanner(self, bucket: Bucket) -> Scanner:
        directory = layout.bucket_directory(self.root, bucket)
        return Scanner(directory, self._expiry, self._is_ours, monotonic=self._monotonic)

    def _snapshot(self, bucket: Bucket, scanner: Scanner) -> dict[RecordKey, str]:
        if self._monotonic() >= self._next_sweep:
            self._sweep()
        errors: list[OSError] = []
        try:
            scanner.refresh()
        except OSError as err:
            errors.append(err)
        self._report(f"read the {bucket.value} records", errors)
        return scanner.last

    def _is_ours(self, path: str) -> bool:
        record = self._owned.get(path)
        return record is not None and not record.is_foreign

    # -------------------------------------------------------------- keeping alive

    def _tick(self) -> None:
        with self._lock:
            owned = list(self._owned.values())
        errors: list[OSError] = []
        for record in owned:
            try:
                record.refresh()
            except OSError as err:
                errors.append(err)
        if owned:
            self._report("keep a record alive", errors)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what dead owners left."""
        self._next_sweep = self._monotonic() + self.ttl_seconds / TOUCHES_PER_TTL
        errors: list[OSError] = []
        for bucket in Bucket:
            errors += sweep(layout.bucket_directory(self.root, bucket), self._expiry, self._is_ours)
        self._report("remove a stale record", errors)

    def _report(self, action: str, errors: Sequence[OSError]) -> None:
        """Log what came of one round of an action: each kind of trouble once, until a round without any."""
        if not errors:
            if self._troubles.pop(action, None):  # of several threads one gets it
                log_safely(logger, logging.INFO, "can %s again", action)
            return
        logged = self._troubles.setdefault(action, set())
        for err in errors:
            if err.errno not in logged:
                logged.add(err.errno)
                message = "cannot %s: %s (tried again; such errors are logged once)"
                log_safely(logger, logging.WARNING, message, action, err)

    # -------------------------------------------------------------- the end

    def close(self) -> None:
        """Withdraw what this object published and end its watches; twice is harmless."""
        with self._lock:
            self._is_closed = True
            self._closing.set()
            owned = list(self._owned.values())
        for record in owned:
            self._withdraw(record)

    def __enter__(self) -> FileDiscovery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FileDiscovery {self.root!r} published={len(self._owned)}>"
