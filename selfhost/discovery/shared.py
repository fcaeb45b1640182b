"""One publisher per host: of all processes that publish the same record, one holds it, the others stand by.

The processes of a WSGI server publish the same card under the same key, each for itself. Here the first of
them holds the record in the real discovery. When it withdraws the record, or dies, another one that published
it takes it over within about a second; until then the record stays as it is, whatever the text of the
successor's. The last one to withdraw removes it. A process that is stopped (SIGSTOP) goes on holding: its
record expires, and comes back when it is continued.

They find each other by a folder on a local disk, which must be one server's only and belong to its user
alone. It holds no text, and is not needed to read.

One thread stands by, and is there only while something is published. Any thread may call anything. A forked
child begins with nothing published, and joins the others by publishing. What is still published at the
interpreter's exit is withdrawn.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO, NoReturn, Optional, Union

from .._threads import log_safely
from ..errors import DiscoveryError
from . import claims
from .base import (
    ALREADY_OURS,
    POLL_SECONDS,
    Bucket,
    Discovery,
    Event,
    Publication,
    RecordKey,
    check_key,
    check_text,
    new_instance_id,
)
from .keepalive import KeepAlive
from .lifetime import track

logger = logging.getLogger(__name__)

STAND_BY_SECONDS = 1.0  # between two looks whether the leader is gone; a record lives ten times as long
_BUSY_SECONDS = 10.0  # to wait for a thread that does something about the same record, unless its disk hangs


class SharedDiscovery:
    """Publish in `inner` what no other process of `folder` publishes there; closes `inner` with itself."""

    def __init__(self, inner: Discovery, folder: Union[str, os.PathLike[str]]) -> None:
        self.inner = inner
        self.name = inner.name
        self.folder = os.path.abspath(folder)
        self._is_closed = False
        self.begin_anew()
        track(self)

    def begin_anew(self) -> None:
        """Forget what the parent of this forked process published; also how a new object begins."""
        self._lock = threading.Lock()  # for the next two, and closing
        self._stakes: set[_Stake] = set()
        self._keep_alive: Optional[KeepAlive] = None  # there is one while there are stakes

    def publish(self, bucket: Bucket, key: RecordKey, text: str, *, adopt: bool = False) -> Publication:
        """Publish the record, or stand by to do so; see Discovery.publish.

        `adopt` changes nothing: whoever leads the folder adopts what is there. DiscoveryError where the key
        is taken means that this very process has published it.
        """
        check_key(self.name, key)
        check_text(self.name, key, text)
        stake = _Stake(self.inner, bucket, key, text)
        self._reserve(stake)
        try:
            stake.enter(self.folder)
        except BaseException as err:
            self._withdraw(stake)
            if isinstance(err, claims.AlreadyClaimed):
                self._fail(key, ALREADY_OURS, err)
            if isinstance(err, OSError):
                self._fail(key, f"{err} (it is where the processes of this host meet)", err)
            raise
        return Publication(
            bucket, key, withdraw=functools.partial(self._withdraw, stake), replace=stake.replace
        )

    def _reserve(self, stake: _Stake) -> None:
        """Take the stake into our care and see that the thread runs, before anything is claimed."""
        with self._lock:
            if self._is_closed:
                self._fail(stake.key, "this discovery is closed")
            if self._keep_alive is None:
                keep_alive = KeepAlive(self._stand_by, STAND_BY_SECONDS)
                try:
                    keep_alive.start()
                except RuntimeError as err:
                    self._fail(stake.key, str(err), err)
                self._keep_alive = keep_alive
            self._stakes.add(stake)

    def _withdraw(self, stake: _Stake) -> None:
        stake.leave()
        finished = None
        with self._lock:
            self._stakes.discard(stake)
            if not self._stakes:
                finished, self._keep_alive = self._keep_alive, None
        if finished is not None:
            finished.stop()

    def _stand_by(self) -> None:
        with self._lock:
            stakes = list(self._stakes)
        for stake in stakes:
            stake.stand_by()

    def _fail(self, key: RecordKey, reason: str, cause: Optional[Exception] = None) -> NoReturn:
        message = f"cannot publish {str(key)!r}: {reason}"
        raise DiscoveryError(message, backend=self.name, key=str(key)) from cause

    def remove(self, bucket: Bucket, key: RecordKey) -> None:
        """Remove what a holder left that is gone, in the inner discovery."""
        self.inner.remove(bucket, key)

    def records(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return the live records of everybody, sorted by key."""
        return self.inner.records(bucket)

    def watch(
        self, bucket: Bucket, *, stop: Optional[threading.Event] = None, poll_seconds: float = POLL_SECONDS
    ) -> Iterator[Event]:
        """Yield what is there as added, then every change; see Discovery.watch."""
        return self.inner.watch(bucket, stop=stop, poll_seconds=poll_seconds)

    def close(self) -> None:
        """Withdraw what this object published, or hand it over, and close `inner`; twice is harmless."""
        with self._lock:
            self._is_closed = True
            stakes = list(self._stakes)
        for stake in stakes:
            self._withdraw(stake)
        self.inner.close()

    def __enter__(self) -> SharedDiscovery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        leading = sum(stake.is_leading for stake in list(self._stakes))
        return f"<SharedDiscovery {self.folder!r} published={len(self._stakes)} leading={leading}>"


class _Stake:
    """One record that this process publishes: as the one that holds it, or standing by.

    Its lock orders what is done about this record, disk and all; it is waited for in bounds.
    """

    def __init__(self, inner: Discovery, bucket: Bucket, key: RecordKey, text: str) -> None:
        self.bucket = bucket
        self.key = key
        self._inner = inner
        self._text = text
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._is_over = False
        self._claim: Optional[claims.Claim] = None
        self._publication: Optional[Publication] = None  # of `inner`: there while this process leads
        self._has_stood_by = False  # so there is a record that another one left
        self._has_failed = False  # to take over, when it was tried last

    @property
    def is_leading(self) -> bool:
        """Whether this process holds the record."""
        return self._publication is not None

    def enter(self, folder: str) -> None:
        """Join the others, and publish if there are none.

        Raises AlreadyClaimed, OSError, and DiscoveryError where the record cannot be published.
        """
        with self._alone():
            self._check_not_over()
            self._claim = claims.join(folder, f"{self.bucket.value}/{self.key}")
            if self._claim.lead():
                self._publish()
            else:
                self._has_stood_by = True
            self._check_not_over()  # again: this may have taken long

    def stand_by(self) -> None:
        """Take the record over if nobody leads; never raises, never waits for another thread."""
        if self.is_leading or not self._lock.acquire(blocking=False):
            return
        try:
            if self._claim is not None and not self.is_leading and self._claim.lead():
                self._publish()
                log_safely(logger, logging.INFO, "took over the record %s", self)
                self._has_failed = False
        except Exception as err:  # noqa: BLE001 - it is logged; a host's own discovery may raise anything
            self._fail_to_take_over(err)
        finally:
            self._release()

    def _fail_to_take_over(self, err: Exception) -> None:
        if self._claim is not None:
            with contextlib.suppress(OSError):
                self._claim.step_down()  # another process may be able to
        if not self._has_failed:
            message = "cannot take over the record %s (tried again): %s"
            log_safely(logger, logging.WARNING, message, self, err)
        self._has_failed = True

    def replace(self, text: str) -> None:
        """Put another text in place of the record, or of what this process would publish. DiscoveryError."""
        check_text(self._inner.name, self.key, text)
        if self._pid != os.getpid():
            raise self._error("replace", "it belongs to the process that this one was forked from")
        with self._alone():
            if self._is_over:
                raise self._error("replace", "it was withdrawn")
            if self._publication is not None:
                self._publication.replace(text)
            self._text = text

    def leave(self) -> None:
        """Withdraw the record, or leave it to the others; twice is harmless. Never raises."""
        if self._pid != os.getpid():
            return
        self._is_over = True  # first: whoever is at it then ends it, if our turn does not come
        if self._lock.acquire(timeout=_BUSY_SECONDS):
            self._release()
        else:
            message = "the record %s is withdrawn as soon as the thread that has been at it for %g s is done"
            log_safely(logger, logging.WARNING, message, self, _BUSY_SECONDS)

    def _end(self) -> None:
        claim, self._claim = self._claim, None
        if claim is None:
            return
        try:
            with claim.leaving() as is_last:
                self._let_go(is_last=is_last)
        except Exception as err:  # noqa: BLE001 - as above
            self._let_go(is_last=False)  # what is left where the locks failed
            message = "could not withdraw the record %s (%s); it expires"
            log_safely(logger, logging.WARNING, message, self, err)

    def _let_go(self, *, is_last: bool) -> None:
        if is_last and self._publication is None and self._has_stood_by:
            self._inner.remove(self.bucket, self.key)  # its holder has died, and nobody took it over
        publication, self._publication = self._publication, None
        if publication is not None:
            (publication.withdraw if is_last else publication.abandon)()

    def _publish(self) -> None:
        self._publication = self._inner.publish(self.bucket, self.key, self._text, adopt=True)

    def _check_not_over(self) -> None:
        if self._is_over:
            raise self._error("publish", "this discovery is closed")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_BUSY_SECONDS):
            raise self._error("publish", f"another thread has been at it for {_BUSY_SECONDS:g} s")
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        """Let others at the record, which is withdrawn first if it is over by now."""
        try:
            if self._is_over:
                self._end()
        finally:
            self._lock.release()

    def _error(self, action: str, reason: str) -> DiscoveryError:
        message = f"cannot {action} {str(self.key)!r}: {reason}"
        return DiscoveryError(message, backend=self._inner.name, key=str(self.key))

    def __str__(self) -> str:
        return f"{self.bucket.value}/{self.key}"


# ------------------------------------------------------------------ one instance


def shared_instance_id(folder: Union[str, os.PathLike[str]]) -> int:
    """Return the instance id of all processes that share the folder; the first one chooses it.

    Raises DiscoveryError where the folder cannot be used, or holds something else under that name.
    """
    path = os.path.join(folder, "instance")
    try:
        claims.make_private(os.fspath(folder))
        with open(path, "r+b", opener=_open_private) as file:
            return _instance_id_in(file)
    except (OSError, ValueError) as err:
        reason = err if isinstance(err, OSError) else f"{path!r} holds something else: remove it"
        message = f"cannot share an instance id in {os.fspath(folder)!r}: {reason}"
        raise DiscoveryError(message, backend="") from err


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _instance_id_in(file: BinaryIO) -> int:
    """Read an instance id, or choose one where the file is new, or what a crash of the machine has left."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        text = file.read().strip(b"\0")
        if not text:
            text = b"%x" % new_instance_id()
            file.seek(0)
            file.write(text)
            file.flush()
        return int(text, 16)
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open, too
