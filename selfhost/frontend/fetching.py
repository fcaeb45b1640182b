"""Brings single blobs into the cache: from one source after the other, until the bytes are right.

Rules
- Whoever holds the digest's lock looks into the cache once more before anything is asked for. The lock saves
  work; without it two threads fetch the same and both are right.
- What a broken transfer brought stays, and the next one continues it if the transport finds it to be the
  same. If the hash of a file made of two transfers is wrong, its last source is asked once more for the whole
  before it is blamed.
- A FetchError or VerificationError moves on to the next source, the latter with a warning. Whatever else is
  raised ends the resolve.
- Offline, only what the transports can do without a network is tried, and nothing is remembered of it.

Which source is next is decided in `sources`, what is remembered of failures in `failures`.
"""

from __future__ import annotations

import logging
import os
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
    SourceTooSlow,
    VerificationError,
    shown_url,
)
from . import waits
from .cache import BlobCache
from .counters import FETCHED, Counts
from .failures import FailureMemo, Source, SourceError
from .limits import ResolverLimits
from .progress import ProgressMeter
from .resolve_errors import drifted, html_instead, missing_offline, nowhere_to_be_had
from .sources import Rounds, Turn
from .transport import Transport, transport_for
from .wanted import WantedBlob
from .watched_sink import Stopped, WatchedSink

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What fetching works with; the same for every blob of a resolve."""

    cache: BlobCache
    counts: Counts
    transports: Mapping[str, Transport]  # offline: of those that need no network
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
            path = self._find(blob)
            if path is not None:
                self._meter.done(blob, _bytes_of(path, blob))
                return
            try:
                self._fetch(blob)
            except ResolveError as error:
                if not self._around.offline:
                    raise
                self._given_up.append((blob, error))

    def _find(self, blob: WantedBlob) -> Optional[str]:
        """Look into the cache once more, and again when nobody else is writing the blob any longer."""
        cache = self._around.cache
        path = cache.find(blob.checksum)
        if path is None and cache.wait_for_strangers(blob.checksum, give_up=self._stop.is_set):
            path = cache.find(blob.checksum)
        return path

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
            with self._around.cache.write(blob.checksum) as writer:
                sink = WatchedSink(
                    writer,
                    blob,
                    meter=self._meter,
                    stop=self._stop,
                    limits=self._around.limits,
                    clock=self._around.clock,
                )
                if self._ask_in_turn(rounds, blob, sink, attempts):
                    return
        raise self._nowhere(blob, rounds, attempts) from (attempts[-1].error if attempts else None)

    def _usable(self, sources: Sequence[Source]) -> tuple[list[Source], list[Attempt]]:
        """Return the sources that may be asked, and the attempts that the others come to."""
        usable, refused = [], []
        for source in sources:
            try:
                transport_for(self._around.transports, source.url)
                usable.append(source)
            except SchemeNotAllowed as error:
                if not self._around.offline:  # where it most likely is one that needs the network
                    self._around.counts.attempt(type(error).__name__)
                    refused.append(Attempt(source.url, error, 0.0))
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
        self, rounds: Rounds, blob: WantedBlob, sink: WatchedSink, attempts: list[Attempt]
    ) -> bool:
        """Ask source after source; tell whether one gave the blob, and add the failed ones to `attempts`."""
        while True:
            turn = rounds.next()
            if turn is None:
                return False
            self._pause(turn.pause_seconds)
            started = self._around.clock()
            try:
                self._ask(turn, blob, sink)
            except (FetchError, VerificationError) as error:
                attempts.append(Attempt(turn.source.url, error, self._around.clock() - started))
                self._note_failure(turn.source, error, is_final=rounds.failed(turn.source, error))
            else:
                self._note_success(turn.source, blob, sink.published_bytes)
                return True

    def _pause(self, seconds: float) -> None:
        if seconds:
            if self._around.sleep is None:
                waits.sleep(self._stop, seconds)
            else:
                self._around.sleep(seconds)
        if self._stop.is_set():
            raise Stopped

    def _ask(self, turn: Turn, blob: WantedBlob, sink: WatchedSink) -> None:
        url = turn.source.url
        transport = transport_for(self._around.transports, url)
        sink.begin_transfer(url, may_be_slow=turn.may_be_slow)
        try:
            if not self._has_nearby(transport, url, blob, sink):
                self._transfer(transport, url, blob, sink)
        except (VerificationError, SizeLimitExceeded) as error:
            looks_like_html = sink.looks_like_html
            sink.restart()
            if transport.may_drift:
                raise drifted(url, blob, error) from error
            if looks_like_html and isinstance(error, VerificationError):
                raise html_instead(error) from error
            raise

    def _has_nearby(self, transport: Transport, url: str, blob: WantedBlob, sink: WatchedSink) -> bool:
        """Tell whether a source that may drift has the right bytes here, without the network, and take them.

        What it has elsewhere by now may be another version; only the hash knows which one the card means.
        """
        nearby = transport.offline() if transport.may_drift else None
        if nearby is None or nearby is transport:
            return False
        try:
            self._transfer(nearby, url, blob, sink)
        except (FetchError, VerificationError) as error:
            logger.debug("%s: not from here: %s", shown_url(url), error)
            if isinstance(error, (VerificationError, SizeLimitExceeded)):  # else it may hold another source's
                sink.restart()
            return False
        return True

    def _transfer(self, transport: Transport, url: str, blob: WantedBlob, sink: WatchedSink) -> None:
        transport.fetch(url, sink, max_bytes=blob.max_bytes)
        try:
            sink.publish(url)
        except VerificationError:
            if not sink.is_continued:
                raise
            logger.debug("%s: wrong when continued, asking for the whole", shown_url(url))
            sink.restart()
            transport.fetch(url, sink, max_bytes=blob.max_bytes)
            sink.publish(url)

    def _note_success(self, source: Source, blob: WantedBlob, size: int) -> None:
        self.fetched.add(blob.checksum)
        self._meter.done(blob, size)
        self._around.counts.attempt(FETCHED)
        self._around.counts.add(fetched_files=1, fetched_bytes=size)
        self._around.failures.forget(source)
        logger.debug("fetched %s from %s", blob, shown_url(source.url))

    def _note_failure(self, source: Source, error: SourceError, *, is_final: bool) -> None:
        self._around.counts.attempt(type(error).__name__)
        if isinstance(error, SourceDrifted):
            logger.warning("drifted: %s", error)
        elif isinstance(error, VerificationError):
            logger.warning("wrong bytes: %s", error)  # which names the source
        else:
            logger.debug("a source failed: %s", error)
        if not self._around.offline:  # what needs no network is not spared, and may be there next time
            # Slow sources stay slow for a while: a short rest would cost the next file as many seconds again.
            rest = self._around.limits.max_backoff_seconds if isinstance(error, SourceTooSlow) else 0.0
            self._around.failures.remember(source, error, is_final=is_final, rest_seconds=rest)

    def _nowhere(self, blob: WantedBlob, rounds: Rounds, attempts: Sequence[Attempt]) -> ResolveError:
        asked = {attempt.url for attempt in attempts}
        skipped = [
            (source.url, self._around.failures.reason(source))
            for source in rounds.sources
            if source.url not in asked
        ]
        return nowhere_to_be_had(blob, attempts, skipped, rounds.seconds_blocked)


def _bytes_of(path: str, blob: WantedBlob) -> int:
    """Return the size of a blob that somebody else brought; as declared, if it is gone again."""
    try:
        return os.stat(path).st_size
    except OSError:
        return blob.size or 0
