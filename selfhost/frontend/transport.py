"""What brings bytes: the Transport protocol, the table of schemes, and the limits that every download has.

A transport is handed a URL, a cap and a sink. It knows neither cache nor card, verifies nothing and decides
nothing about other sources; it ends with all bytes of the file in the sink, or with a FetchError. Transports
may be used by any number of threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional, Protocol, Union
from urllib.parse import urlsplit

from ..card import url as urls
from ..card.checksum import MAX_FILE_BYTES
from ..errors import SchemeNotAllowed, shown

Bytes = Union[bytes, bytearray, memoryview]

PATH_SCHEME = ""  # the table's key for a path on a disk, which is no URL


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

    uses_network: bool  # such a transport is not asked when the resolver is offline
    may_drift: bool  # bytes behind a URL may change legitimately (a branch of a repository)

    def fetch(self, url: str, sink: Sink, *, max_bytes: int) -> None:
        """Bring the file behind `url` into the sink, continuing what is in it where that is possible.

        Stops at `max_bytes` + 1. Raises a FetchError, with the bytes that did come left in the sink; what
        the sink raises passes through.
        """

    def close(self) -> None:
        """Give back what is held (connections); harmless when repeated."""


@dataclass(frozen=True)
class FetchLimits:
    """How long one fetch may take and how much it may bring."""

    connect_seconds: float = 5.0  # for the connection to one address, and again for its TLS handshake
    read_seconds: float = 10.0  # for the whole header of an answer, and of silence between pieces of its body
    total_seconds: float = 300.0  # for one request and its whole answer; Dynamo 1.6.1 waits as long
    min_bytes_per_second: int = 1024  # measured over each `read_seconds` of a body: slower is as good as dead
    max_bytes: int = MAX_FILE_BYTES  # whatever the card says; no frontend takes more
    max_unsized_bytes: int = 64 << 20  # for a file whose size the card does not tell

    def cap(self, size: Optional[int]) -> int:
        """Return how many bytes a file may have of which a card says this size (None: nothing)."""
        return min(self.max_unsized_bytes if size is None else size, self.max_bytes)


def scheme_of(location: str) -> str:
    """Return the scheme of a URL in lower case, PATH_SCHEME for a path on a disk."""
    return urlsplit(location).scheme if urls.is_url(location) else PATH_SCHEME


def origin_of(location: str) -> str:
    """Return what fails as one when it fails: scheme, host and port of a URL, a path itself."""
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc}" if urls.is_url(location) and parts.netloc else location


def transport_for(transports: Mapping[str, Transport], location: str) -> Transport:
    """Return the transport whose scheme this URL or path has; SchemeNotAllowed where there is none."""
    scheme = scheme_of(location)
    if scheme in transports:
        return transports[scheme]
    what = f"the scheme {scheme!r}" if scheme else "a path on a disk"
    allowed = ", ".join(sorted(repr(known) for known in transports if known)) or "none"
    raise SchemeNotAllowed(
        f"cannot fetch {shown(location)}: {what} is not allowed here (allowed schemes: {allowed})",
        url=location,
        scheme=scheme,
    )
