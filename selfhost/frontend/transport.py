"""What brings bytes: the Transport protocol, the table of schemes, and the limits that every download has.

A transport is handed a URL, a cap and a sink. It knows neither cache nor card, verifies nothing and decides
nothing about other sources; it ends with all bytes of the file in the sink, or with a FetchError. Transports
may be used by any number of threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Callable, Optional, Protocol, Union

from ..card import url as urls
from ..card.checksum import MAX_FILE_BYTES
from ..errors import FetchError, FetchTimeout, SchemeNotAllowed, shown, shown_url, without_userinfo

if TYPE_CHECKING:
    import ssl

    from .http_connection import Answer

Bytes = Union[bytes, bytearray, memoryview]

PATH_SCHEME = ""  # the table's key for a path on a disk, which is no URL

# What `FetchError.problem` may be, but for TLS.
BAD_URL, NO_HTTP, ENCODED = "unusable URL", "no HTTP", "encoded answer"
LOCAL_PATH, HUB, HUB_NOT_ASKED, NO_HUB_PACKAGE = "local path", "hub", "hub not asked", "no huggingface_hub"


class Sink(Protocol):
    """Where a transport puts the bytes of one file, in order; for one thread at a time.

    A sink outlives a transfer that breaks: `received` bytes of the file are in it already, and came from a
    representation whose strong entity tag is `validator` (None: it had none, so they cannot be continued).
    """

    validator: Optional[str]

    @property
    def received(self) -> int:
        """How many bytes of the file, counted from its first one, are in the sink."""

    def write(self, data: Bytes) -> None:
        """Append bytes; the caller may change the buffer afterwards."""

    def restart(self) -> None:
        """Forget all bytes and the validator: what comes next is the first byte."""


class Transport(Protocol):
    """Fetches files by URLs of one kind."""

    may_drift: bool  # bytes behind a URL may change legitimately (a branch of a repository)

    def fetch(self, url: str, sink: Sink, *, max_bytes: int) -> None:
        """Bring the file behind `url` into the sink, continuing what is in it where that is possible.

        Stops at `max_bytes` + 1. Raises a FetchError, with the bytes that did come left in the sink; what
        the sink raises passes through.
        """

    def offline(self) -> Optional[Transport]:
        """Return what of this transport works without a network: itself, a narrower one, or None."""

    def close(self) -> None:
        """Give back what is held (connections); harmless when repeated."""


@dataclass(frozen=True)
class FetchLimits:
    """How long one fetch may take and how much it may bring; every number is above zero, and finite."""

    connect_seconds: float = 5.0  # to a host, whichever of its addresses; and again for the TLS handshake
    read_seconds: float = 10.0  # for the whole header of an answer, and of silence between pieces of its body
    total_seconds: float = 300.0  # for one request and its whole answer; Dynamo 1.6.1 waits as long
    min_bytes_per_second: int = 1024  # measured over each `read_seconds` of a body: slower is as good as dead
    max_bytes: int = MAX_FILE_BYTES  # whatever the card says; no frontend takes more
    max_unsized_bytes: int = 64 << 20  # for a file whose size the card does not tell

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{field.name}: expected a finite number above 0, found {shown(value)}")

    def cap(self, size: Optional[int]) -> int:
        """Return how many bytes a file may have of which a card says this size (None: nothing)."""
        return min(self.max_unsized_bytes if size is None else size, self.max_bytes)


class FetchObserver:
    """Is told of each step of a fetch that worked, by the thread that fetches; this one does not care.

    A kept connection is neither resolved nor connected nor secured once more.
    """

    def dialing(self) -> None:
        """Be told that a connection is about to be made."""

    def resolved(self, host: str, addresses: Sequence[str]) -> None:
        """Be told which addresses a host has."""

    def connected(self, address: str, port: int) -> None:
        """Be told which of them took the connection."""

    def secured(self, sock: ssl.SSLSocket) -> None:
        """Be told of a TLS connection."""

    def answered(self, answer: Answer) -> None:
        """Be told of the header of an answer, whatever its status."""


NOBODY = FetchObserver()


class Watch:
    """How long each step of one fetch may still take, and the errors that its steps end with.

    For one thread; `url` and `shown_url` are what may stand in an attribute and in a message.
    """

    def __init__(
        self,
        url: str,
        limits: FetchLimits,
        clock: Callable[[], float],
        observer: FetchObserver = NOBODY,
    ) -> None:
        self.url = without_userinfo(url)
        self.shown_url = shown_url(url)
        self.limits = limits
        self.clock = clock
        self.observer = observer
        self.has_token = False  # whether one is sent along
        self._ends = clock() + limits.total_seconds

    def allow(self, seconds: float) -> float:
        """Return how many of `seconds` a step may take; FetchTimeout if the whole fetch has no time left."""
        left = self._ends - self.clock()
        if left <= 0:
            raise self.timeout("total", self.limits.total_seconds, "it was not finished")
        return min(seconds, left)

    def timeout(self, phase: str, seconds: float, found: str) -> FetchTimeout:
        """Return the error for a step that got no further in `seconds`, or in what the fetch had left."""
        if self.clock() >= self._ends:
            phase, seconds = "total", self.limits.total_seconds
        message = f"cannot fetch {self.shown_url}: {found} within {seconds:g} s ({phase})"
        return FetchTimeout(message, url=self.url, seconds=seconds, phase=phase)

    def error(self, why: str, *, is_transient: bool = False, problem: str = "") -> FetchError:
        """Return the error for a step that failed."""
        message = f"cannot fetch {self.shown_url}: {why}"
        return FetchError(message, url=self.url, is_transient=is_transient, problem=problem)


def scheme_of(location: str) -> str:
    """Return the scheme of a URL, PATH_SCHEME for a path on a disk; as cards mean it, never raising."""
    url = urls.parse(location)
    return PATH_SCHEME if url is None else url.scheme


def origin_of(location: str) -> str:
    """Return what fails as one when it fails: scheme, host and port of a URL, else the location itself."""
    url = urls.parse(location)
    if url is None or not url.host:
        return location
    return f"{url.scheme}://{url.host}" + ("" if url.port is None else f":{url.port}")


def transport_for(transports: Mapping[str, Transport], location: str) -> Transport:
    """Return the transport whose scheme this URL or path has; SchemeNotAllowed where there is none."""
    scheme = scheme_of(location)
    if scheme in transports:
        return transports[scheme]
    what = f"the scheme {scheme!r}" if scheme else "a path on a disk"
    allowed = ", ".join(sorted(repr(known) for known in transports if known)) or "none"
    raise SchemeNotAllowed(
        f"cannot fetch {shown_url(location)}: {what} is not allowed here (allowed schemes: {allowed})",
        url=without_userinfo(location),
        scheme=scheme,
    )
