"""A transport that brings files out of memory, for tests that are about what happens around transports.

`OriginSimulator` has the public interface of a transport and counts, so that tests can say what was asked for
and that nothing was. Files are to be had by their URL; a script says what happens instead, for the next
requests to a URL or an origin:

    origins = OriginSimulator({"http://a/config.json": b"{}"})
    origins.script("http://a", broken_after(1))          # once, then it serves well
    origins.script("http://b", silent(), times=None)     # always
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import FetchError, FetchTimeout, HTTPStatusError, SizeLimitExceeded
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.limits import ResolverLimits
from selfhost.frontend.resolver import MetadataResolver, ResolvedModel
from selfhost.frontend.transport import Sink, origin_of

PIECE_BYTES = 1000
A, B, C = "http://a:9090/m", "http://b:9090/m", "http://c:9090/m"
ONE_BY_ONE = ResolverLimits(connections=1)  # so that the order of requests is known

MakeResolver = Callable[..., MetadataResolver]
Serve = Callable[..., ModelDeploymentCard]


class Asked(NamedTuple):
    """One request."""

    url: str
    offset: int  # the first byte that was asked for
    thread: threading.Thread


class Transfer(NamedTuple):
    """What a script can play with."""

    origins: OriginSimulator
    url: str
    sink: Sink
    max_bytes: int


Script = Callable[[Transfer], None]


class OriginSimulator:
    """Any number of origins that answer out of memory; a Transport."""

    def __init__(
        self,
        files: Optional[Mapping[str, bytes]] = None,
        *,
        needs_network: bool = True,
        may_drift: bool = False,
        nearby: Optional[OriginSimulator] = None,
    ) -> None:
        self.files = dict(files or {})
        self.needs_network = needs_network
        self.may_drift = may_drift
        self.nearby = nearby  # what of it is on this machine
        self.ignores_ranges = False
        self.etag: Callable[[str, bytes], Optional[str]] = lambda url, data: f'"{Checksum.of(data).hex}"'
        self.asked: list[Asked] = []
        self.closed = 0
        self.on_request: Callable[[str], object] = lambda url: None
        self._scripts: dict[str, deque[Script]] = {}
        self._always: dict[str, Script] = {}
        self._lock = threading.Lock()

    def script(self, where: str, script: Script, *, times: Optional[int] = 1) -> None:
        """Let the next `times` (None: all) requests to a URL or an origin go another way."""
        if times is None:
            self._always[where] = script
        else:
            self._scripts.setdefault(where, deque()).extend([script] * times)

    @property
    def urls(self) -> list[str]:
        """The URLs that were asked for, in order."""
        return [asked.url for asked in self.asked]

    def fetch(self, url: str, sink: Sink, *, max_bytes: int) -> None:
        """Bring the file, unless a script says otherwise."""
        data = self.files.get(url, b"")
        is_same = sink.validator is not None and sink.validator == self.etag(url, data)
        with self._lock:
            offset = sink.received if is_same else 0
            self.asked.append(Asked(url, offset, threading.current_thread()))
            script = self._next_script(url)
        self.on_request(url)
        script(Transfer(self, url, sink, max_bytes))

    def _next_script(self, url: str) -> Script:
        for where in (url, origin_of(url)):
            if self._scripts.get(where):
                return self._scripts[where].popleft()
            if where in self._always:
                return self._always[where]
        return well

    def offline(self) -> Optional[OriginSimulator]:
        """Return these origins if they are said to be on this machine, or those that are."""
        return self.nearby if self.needs_network else self

    def close(self) -> None:
        """Count."""
        self.closed += 1


def send(transfer: Transfer, data: bytes, *, before_piece: Callable[[], object] = lambda: None) -> None:
    """Send bytes in small pieces, from where the sink stands."""
    sink, etag = (
        transfer.sink,
        transfer.origins.etag(transfer.url, transfer.origins.files.get(transfer.url, b"")),
    )
    if transfer.origins.ignores_ranges or sink.validator is None or sink.validator != etag:
        if sink.received:
            sink.restart()
        sink.validator = etag
    for start in range(sink.received, len(data), PIECE_BYTES):
        before_piece()
        if sink.received + len(data[start : start + PIECE_BYTES]) > transfer.max_bytes:
            raise SizeLimitExceeded(
                f"{transfer.url}: longer than {transfer.max_bytes} bytes",
                url=transfer.url,
                limit=transfer.max_bytes,
                received=transfer.max_bytes + 1,
            )
        sink.write(data[start : start + PIECE_BYTES])


def well(transfer: Transfer) -> None:
    """Serve the file, or 404."""
    if transfer.url not in transfer.origins.files:
        return status(404)(transfer)
    return send(transfer, transfer.origins.files[transfer.url])


def gives(data: bytes) -> Script:
    """Return a script that serves other bytes."""
    return lambda transfer: send(transfer, data)


def broken_after(count: int) -> Script:
    """Return a script that breaks the connection after so many bytes of the file."""

    def play(transfer: Transfer) -> None:
        if count:
            send(transfer, transfer.origins.files[transfer.url][:count])
        raise FetchError(f"{transfer.url}: broken off", url=transfer.url, is_transient=True)

    return play


refused = broken_after(0)


def drips(wait: Callable[[float], Any], *, seconds: float) -> Script:
    """Return a script that serves well, but waits before each piece."""

    def play(transfer: Transfer) -> None:
        send(transfer, transfer.origins.files[transfer.url], before_piece=lambda: wait(seconds))

    return play


def status(code: int, *, retry_after: Optional[float] = None) -> Script:
    """Return a script that answers with a status."""

    def play(transfer: Transfer) -> None:
        raise HTTPStatusError(
            f"status {code}",
            url=transfer.url,
            status=code,
            is_transient=code in (429, 503),
            retry_after=retry_after,
        )

    return play


def silent(seconds: float = 10.0, *, wait: Callable[[float], Any] = lambda seconds: None) -> Script:
    """Return a script that times out, after what `wait` does."""

    def play(transfer: Transfer) -> None:
        wait(seconds)
        raise FetchTimeout(
            f"{transfer.url}: silent for {seconds} s", url=transfer.url, seconds=seconds, phase="headers"
        )

    return play


class FakeClock:
    """A monotonic clock that stands still unless somebody sleeps; remembers who did."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        with self._lock:
            self.slept.append(seconds)
            self.now += seconds


# ------------------------------------------------------------------ around a resolver


def contents(model: ResolvedModel) -> dict[str, bytes]:
    """Return what is in the directory of a model."""
    return {path.name: path.read_bytes() for path in Path(model.local_dir).iterdir()}


def leftovers(cache: BlobCache) -> list[str]:
    """Return everything below the blobs folder that is no whole blob."""
    blobs = Path(cache.root) / "blobs"
    names = [path.name for path in blobs.iterdir()] if blobs.exists() else []
    return [name for name in names if not re.fullmatch("[0-9a-f]{64}", name)]


def extra(path: str, data: bytes, **changes: Any) -> CheckedFile:
    """Return a file that a card may list."""
    return replace(CheckedFile(path, Checksum.of(data), len(data)), **changes)
