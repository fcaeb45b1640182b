"""The cache's writer as a transport sees it: counts for the progress, and ends what should not go on.

What should not go on is a transfer of a resolve that is ending, and one that is slow while another source of
the file waits for its turn. Either is noticed at the next piece that comes; the bytes so far stay.
"""

from __future__ import annotations

import threading
from typing import Callable, Optional

from ..errors import SourceTooSlow, shown_url
from .cache import BlobWriter
from .limits import ResolverLimits
from .progress import ProgressMeter
from .transport import Bytes
from .wanted import WantedBlob

_HTML = (b"<!doctype html", b"<html")


class Stopped(Exception):
    """The resolve is ending: something else of it failed, or somebody ended it."""


def looks_like_html(data: Bytes) -> bool:
    """Tell whether these first bytes of a file are those of somebody's page."""
    return bytes(data[:32]).lstrip().lower().startswith(_HTML)


class WatchedSink:
    """A Sink that writes to a BlobWriter; of one file, for one transfer after the other."""

    def __init__(
        self,
        writer: BlobWriter,
        blob: WantedBlob,
        *,
        meter: ProgressMeter,
        stop: threading.Event,
        limits: ResolverLimits,
        clock: Callable[[], float],
    ) -> None:
        self.is_continued = False  # whether the bytes are of more than one transfer
        self.looks_like_html = False
        self.published_bytes = 0  # how many bytes the file has, once it is published
        self._writer = writer
        self._blob = blob
        self._meter = meter
        self._stop = stop
        self._limits = limits
        self._clock = clock
        self._pace: Optional[_Pace] = None

    @property
    def validator(self) -> Optional[str]:
        """The writer's; see Sink."""
        return self._writer.validator

    @validator.setter
    def validator(self, validator: Optional[str]) -> None:
        self._writer.validator = validator

    @property
    def received(self) -> int:
        """How many bytes of the file the writer has."""
        return self._writer.received

    def begin_transfer(self, url: str, *, may_be_slow: bool) -> None:
        """Be told where the next bytes come from, and whether there is nobody better."""
        self.is_continued = self._writer.received > 0
        self._pace = None if may_be_slow else _Pace(url, self._limits, self._clock)

    def write(self, data: Bytes) -> None:
        """Append bytes, unless the resolve ends; raise SourceTooSlow when too few have come."""
        if self._stop.is_set():
            raise Stopped
        if not self._writer.received:
            self.looks_like_html = looks_like_html(data)
        self._writer.write(data)
        self._meter.report(self._blob, self._writer.received)
        if self._pace is not None and self._writer.received != self._blob.size:  # what is whole is not late
            self._pace.check(len(data))

    def publish(self, source: str) -> None:
        """Let the file appear in the cache; raises what BlobWriter.publish does."""
        size = self._writer.received
        self._writer.publish(source)
        self.published_bytes = size

    def restart(self) -> None:
        """Forget all bytes and the validator."""
        self.is_continued = False
        self._writer.restart()
        self._meter.report(self._blob, 0)


class _Pace:
    """Whether bytes come fast enough, over one stretch of time after the other; the first piece begins."""

    def __init__(self, url: str, limits: ResolverLimits, clock: Callable[[], float]) -> None:
        self._url = url
        self._limits = limits
        self._clock = clock
        self._since: Optional[float] = None
        self._received = 0

    def check(self, count: int) -> None:
        """Count the bytes of a piece; raise SourceTooSlow at the end of a slow stretch."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        self._received += count
        seconds = now - self._since
        if seconds < self._limits.slow_seconds:
            return
        if self._received < self._limits.slow_bytes_per_second * seconds:
            raise SourceTooSlow(
                f"{shown_url(self._url)}: too slow while other sources are left, {self._received} bytes in "
                f"{seconds:.1f} s, expected {self._limits.slow_bytes_per_second} per second",
                url=self._url,
                seconds=seconds,
            )
        self._since, self._received = now, 0
