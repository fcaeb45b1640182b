"""What failed lately: which sources are left alone for a while, so that nobody hammers a dead worker.

Rules
- What concerns the connection (none, not secure, broken, silent, not allowed) counts against the whole
  origin; statuses, wrong bytes and everything else against the one URL.
- A source rests for 1 s after its first failure, twice as long after each further one, 30 s at most, with
  jitter: frontends that lost the same worker do not come back as one. What fails while it rests does not rest
  longer for it: the threads of one resolve that meet one dead worker count as one failure.
- A success clears it. So does time: a failure that is long over says nothing about the next one.

    A source is   when it failed                            and then
    ------------  ----------------------------------------  ------------------------------------------------
    resting       lately: its back-off is not over          it is asked after those that do not rest
    blocked       lately, and that was final                it is not asked if all sources of the file are
    spent         since the resolve began; that was final   it is not asked again within this resolve

A failure is final if another try within the same resolve is not worth it (a time-out, a 404, wrong bytes, or
what might be over soon after the last round), whichever file it was met with.

This remembers and tells; what follows for the order of sources is decided in `sources`. Any number of threads
may share a memo. It is no good in a forked child, whose lock may be held by a thread that is not there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from random import random as random_fraction
from typing import Callable, NamedTuple, Optional, Union

from ..card.checksum import Checksum
from ..errors import (
    FetchError,
    FetchTimeout,
    HostNotFound,
    HTTPStatusError,
    PeerNotAllowed,
    TLSFailed,
    VerificationError,
)
from .transport import origin_of

SourceError = Union[FetchError, VerificationError]  # what moves on to the next source

_REASON_CHARS = 200  # of an error's text; the whole text was in the error of the resolve that met it
_KEY_CHARS = 512  # of a URL; a longer one is remembered by its hash


class Source(NamedTuple):
    """One place from which a file is to be had."""

    url: str
    origin: str  # what fails with it when the connection fails

    @classmethod
    def at(cls, url: str) -> Source:
        """Return the source at a URL or path."""
        return cls(url, origin_of(url))


class Failure(NamedTuple):
    """The latest failure of an origin or a URL."""

    reason: str
    number: int  # counts all failures of the memo
    in_a_row: int  # which one of the back-offs that followed each other
    until: float  # when the back-off ends, on the memo's clock
    is_final: bool  # False: worth another try within the same resolve


class FailureMemo:
    """Which origins and URLs failed, and until when they rest; see the module's docstring."""

    def __init__(
        self,
        *,
        first_seconds: float = 1.0,
        max_seconds: float = 30.0,
        max_entries: int = 4096,  # 4 MiB at most; the oldest is forgotten first
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_fraction,
    ) -> None:
        self._first_seconds = first_seconds
        self._max_seconds = max_seconds
        self._max_entries = max_entries
        self._clock = clock
        self._random = random
        self._lock = threading.Lock()
        self._failures: dict[str, Failure] = {}  # by the key of a URL or origin, the latest last
        self._number = 0

    def remember(
        self, source: Source, error: SourceError, *, is_final: bool, rest_seconds: float = 0.0
    ) -> None:
        """Note that the source failed; `is_final` says that it is not worth another try soon.

        It rests for `rest_seconds` at least, as for what it asked for itself: within the longest back-off.
        """
        key = _key(source.origin if concerns_origin(error) else source.url)
        asked = max(rest_seconds, getattr(error, "retry_after", None) or 0.0)
        with self._lock:
            self._number += 1
            self._failures[key] = self._next(self._failures.pop(key, None), str(error), asked, is_final)
            if len(self._failures) > self._max_entries:
                del self._failures[next(iter(self._failures))]

    def _next(self, before: Optional[Failure], text: str, asked: float, is_final: bool) -> Failure:
        now = self._clock()
        reason = text[:_REASON_CHARS]
        if before is not None and now < before.until:
            is_final = is_final or before.is_final
            return before._replace(reason=reason, number=self._number, is_final=is_final)
        is_repeated = before is not None and now < before.until + self._max_seconds
        in_a_row = before.in_a_row + 1 if before is not None and is_repeated else 1
        until = now + max(self._back_off(in_a_row), min(self._max_seconds, asked))
        return Failure(reason, self._number, in_a_row, until, is_final)

    def _back_off(self, in_a_row: int) -> float:
        seconds = self._first_seconds * 2.0 ** min(in_a_row - 1, 62)  # bounded: a float ends at 2 ** 1024
        return min(self._max_seconds, seconds) * (1 + self._random()) / 2

    def forget(self, source: Source) -> None:
        """Note that the source gave what it should."""
        with self._lock:
            for key in _keys(source):
                self._failures.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._failures.clear()

    def mark(self) -> int:
        """Return a mark in time: `is_spent` asks what was remembered after it."""
        return self._number

    def is_resting(self, source: Source) -> bool:
        """Whether the source failed lately, so that others are asked first."""
        now = self._clock()
        return any(now < failure.until for failure in self._of(source))

    def is_spent(self, source: Source, *, since: int) -> bool:
        """Whether the source failed for good after the mark `since`."""
        return any(failure.is_final and failure.number > since for failure in self._of(source))

    def seconds_blocked(self, source: Source) -> float:
        """Return for how long the source still rests after it failed for good, 0.0 if it does not."""
        now = self._clock()
        return max([0.0, *(failure.until - now for failure in self._of(source) if failure.is_final)])

    def reason(self, source: Source) -> str:
        """Return what happened to the source last, "" if nothing is remembered."""
        latest = max(self._of(source), key=lambda failure: failure.number, default=None)
        return "" if latest is None else latest.reason

    def _of(self, source: Source) -> Iterator[Failure]:
        for key in _keys(source):
            failure = self._failures.get(key)  # one dictionary read: no lock needed
            if failure is not None:
                yield failure

    def __len__(self) -> int:
        return len(self._failures)

    def __repr__(self) -> str:
        return f"<FailureMemo entries={len(self)}>"


def concerns_origin(error: SourceError) -> bool:
    """Whether the error says something about everything that its origin has."""
    if isinstance(error, (FetchTimeout, HostNotFound, PeerNotAllowed, TLSFailed)):
        return True
    is_connection = isinstance(error, FetchError) and not isinstance(error, HTTPStatusError)
    return is_connection and error.is_transient  # type: ignore[union-attr]


def _keys(source: Source) -> set[str]:
    return {_key(source.url), _key(source.origin)}


def _key(location: str) -> str:
    """Return what a URL or an origin is remembered by: a card may have very long ones."""
    if len(location) <= _KEY_CHARS:
        return location
    return Checksum.of(location.encode(errors="surrogatepass")).hex
