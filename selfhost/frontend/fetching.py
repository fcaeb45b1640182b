"""Brings single blobs into the cache: from one source after the other, until the bytes are right.

Rules
- Whoever holds the digest's lock looks into the cache once more before anything is asked for. The lock saves
  work; without it two threads fetch the same and both are right.
- What a broken transfer brought stays, and the next one continues it if the transport finds it to be the
  same. If the hash of a file made of two transfers is wrong, its last source is asked once more for the whole
  before it is blamed.
- A FetchError or VerificationError moves on to the next source, the latter with a warning. Whatever else is
  raised ends the resolve.

Which source is next is decided in `sources`, what is remembered of failures in `failures`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Callable, Optional

from ..card.checksum import Checksum
from ..errors import (
    Attempt,
    FetchError,
    ResolveError,
    SchemeNotAllowed,
    SizeLimitExceeded,
    SourceDrifted,
    VerificationError,
    shown,
)
from .cache import BlobCache, BlobWriter
from .failures import FailureMemo, Source, SourceError
from .limits import ResolverLimits
from .progress import ProgressMeter
from .reports import missing_offline, nowhere_to_be_had
from .sources import Rounds
from .transport import Bytes, Transport, transport_for
from .wanted import WantedBlob

logger = logging.getLogger(__name__)

_HTML = (b"<!doctype html", b"<html")


class Stopped(Exception):
    """The resolve is ending, because something else of it failed."""


@dataclass(frozen=True)
class Surroundings:
    """What fetching works with; the same for every blob of a resolve."""

    cache: BlobCache
    transports: Mapping[str, Transport]
    failures: FailureMemo
    limits: ResolverLimits
    offline: bool
    clock: Callable[[], float]
    sleep: Optional[Callable[[float], object]]  # None: a wait that ends when the resolve does
    random: Callable[[], float]


class BlobFetcher:
    """Fetches the blobs of one resolve; used by several threads at once, each with a blob of its own."""

    def __init__(
        self,
        around: Surroundings,
        sources: Mapping[Checksum, Sequence[Source]],
        meter: ProgressMeter,
        stop: threading.Event,
    ) -> None:
        self.fetched: set[Checksum] = set()  # what came from a source
        self._around = around
        self._sources = sources
        self._meter = meter
        self._stop = stop
        self._since = around.failures.mark()
        self._given_up: list[tuple[WantedBlob, ResolveError]] = []

    def fetch(self, blob: WantedBlob) -> None:
        """Bring the blob into the cache, unless it is there by now.

        Raises ResolveError if no source gives it; offline that is put off until `raise_given_up`, so that
        one error can name all that is missing.
        """
        with self._around.cache.lock(blob.checksum, give_up=self._stop.is_set):
            if self._stop.is_set():
                raise Stopped
            if self._around.cache.find(blob.checksum) is not None:
                self._meter.done(blob, blob.size)
                return
            try:
                self._fetch(blob)
            except ResolveError as error:
                if not self._around.offline:
                    raise
                self._given_up.append((blob, error))

    def raise_given_up(self) -> None:
        """Raise one error for all that an offline resolve could not find."""
        if self._given_up:
            blobs = [blob for blob, _ in self._given_up]
            attempts = [attempt for _, error in self._given_up for attempt in error.attempts]
            cause = attempts[-1].error if attempts else None
            raise missing_offline(blobs, attempts, self._around.cache.root) from cause

    def _fetch(self, blob: WantedBlob) -> None:
        usable, attempts = self._usable(self._sources.get(blob.checksum, ()))
        rounds = self._rounds(usable)
        if rounds.seconds_blocked is None:
            with self._around.cache.write(blob.checksum, blob.size) as writer:
                sink = _WatchedSink(writer, blob, self._meter, self._stop)
                if self._ask_in_turn(rounds, blob, sink, attempts):
                    return
        raise self._nowhere(blob, rounds, attempts) from (attempts[-1].error if attempts else None)

    def _usable(self, sources: Sequence[Source]) -> tuple[list[Source], list[Attempt]]:
        """Return the sources that may be asked, and the attempts that the others come to."""
        usable, refused = [], []
        for source in sources:
            try:
                transport = transport_for(self._around.transports, source.url)
            except SchemeNotAllowed as error:
                refused.append(Attempt(source.url, error, 0.0))
                continue
            if not (self._around.offline and transport.uses_network):
                usable.append(source)
        return usable, refused

    def _rounds(self, sources: Sequence[Source]) -> Rounds:
        around = self._around
        return Rounds(
            sources,
            around.failures,
            since=self._since,
            limits=around.limits,
            clock=around.clock,
            random=around.random,
        )

    def _ask_in_turn(
        self, rounds: Rounds, blob: WantedBlob, sink: _WatchedSink, attempts: list[Attempt]
    ) -> bool:
        """Ask source after source; tell whether one gave the blob, and add the failed ones to `attempts`."""
        while True:
            turn = rounds.next()
            if turn is None:
                return False
            self._pause(turn.pause_seconds)
            started = self._around.clock()
            try:
                self._ask(turn.source, blob, sink)
            except (FetchError, VerificationError) as error:
                attempts.append(Attempt(turn.source.url, error, self._around.clock() - started))
                self._note_failure(turn.source, error, is_final=rounds.failed(turn.source, error))
            else:
                self._note_success(turn.source, blob)
                return True

    def _pause(self, seconds: float) -> None:
        if seconds:
            (self._around.sleep or self._stop.wait)(seconds)
        if self._stop.is_set():
            raise Stopped

    def _ask(self, source: Source, blob: WantedBlob, sink: _WatchedSink) -> None:
        transport = transport_for(self._around.transports, source.url)
        try:
            self._transfer(transport, source.url, blob, sink)
        except (VerificationError, SizeLimitExceeded) as error:
            looks_like_html = sink.looks_like_html
            sink.restart()
            if transport.may_drift:
                raise _drifted(source.url, blob, error) from error
            if looks_like_html and isinstance(error, VerificationError):
                raise _html(error) from error
            raise

    def _transfer(self, transport: Transport, url: str, blob: WantedBlob, sink: _WatchedSink) -> None:
        sink.begin_transfer()
        transport.fetch(url, sink, max_bytes=blob.max_bytes)
        try:
            sink.publish(url)
        except VerificationError:
            if not sink.is_continued:
                raise
            logger.debug("%s: wrong when continued, asking for the whole", shown(url))
            sink.restart()
            transport.fetch(url, sink, max_bytes=blob.max_bytes)
            sink.publish(url)

    def _note_success(self, source: Source, blob: WantedBlob) -> None:
        self.fetched.add(blob.checksum)
        self._meter.done(blob, None)
        self._around.failures.forget(source)
        logger.debug("fetched %s from %s", blob, shown(source.url))

    def _note_failure(self, source: Source, error: SourceError, *, is_final: bool) -> None:
        if isinstance(error, VerificationError):
            logger.warning("wrong bytes: %s", error)  # which names the source
        else:
            logger.debug("a source failed: %s", error)
        if not self._around.offline:  # what needs no network is not spared, and may be there next time
            self._around.failures.remember(source, error, is_final=is_final)

    def _nowhere(self, blob: WantedBlob, rounds: Rounds, attempts: Sequence[Attempt]) -> ResolveError:
        asked = {attempt.url for attempt in attempts}
        skipped = [
            (source.url, self._around.failures.reason(source))
            for source in rounds.sources
            if source.url not in asked
        ]
        return nowhere_to_be_had(blob, attempts, skipped, rounds.seconds_blocked)


class _WatchedSink:
    """The cache's writer as a transport sees it: counts for the progress, ends when the resolve does."""

    def __init__(
        self, writer: BlobWriter, blob: WantedBlob, meter: ProgressMeter, stop: threading.Event
    ) -> None:
        self.is_continued = False  # whether the bytes are of more than one transfer
        self.looks_like_html = False
        self.publish = writer.publish
        self._writer = writer
        self._blob = blob
        self._meter = meter
        self._stop = stop

    @property
    def validator(self) -> Optional[str]:
        return self._writer.validator

    @validator.setter
    def validator(self, validator: Optional[str]) -> None:
        self._writer.validator = validator

    @property
    def received(self) -> int:
        return self._writer.received

    def begin_transfer(self) -> None:
        self.is_continued = self._writer.received > 0

    def write(self, data: Bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        if not self._writer.received:
            self.looks_like_html = bytes(data[:32]).lstrip().lower().startswith(_HTML)
        self._writer.write(data)
        self._meter.report(self._blob, self._writer.received)

    def restart(self) -> None:
        self.is_continued = False
        self._writer.restart()
        self._meter.report(self._blob, 0)


def _drifted(url: str, blob: WantedBlob, error: SourceError) -> SourceDrifted:
    return SourceDrifted(
        f"{shown(url)} has moved on, it is no longer what the card was made from: {error}",
        url=url,
        expected=str(blob.checksum),
        actual=getattr(error, "actual", ""),
        size=getattr(error, "size", None),
    )


def _html(error: VerificationError) -> VerificationError:
    return VerificationError(
        f"{error}; it looks like an HTML page (of a proxy or a login)",
        url=error.url,
        expected=error.expected,
        actual=error.actual,
        size=error.size,
    )
