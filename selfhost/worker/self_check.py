"""Whether this worker can fetch what it is about to publish, by the very URL that frontends will use.

A failure only warns: behind NAT the way back may be refused although everybody else gets through. Asks no
proxy and follows no redirect, as frontends do not either.
"""

from __future__ import annotations

import http.client
import logging
import time
from typing import TYPE_CHECKING, Optional
from urllib.parse import urlsplit

from ..card.checksum import Checksum

if TYPE_CHECKING:
    import ssl

logger = logging.getLogger(__name__)

SELF_CHECK_SECONDS = 2.0  # for the whole fetch
PIECE_BYTES = 64 * 1024  # read at once, between two looks at the clock


def can_fetch(
    url: str, checksum: Checksum, size: int, *, own_cert: Optional[str] = None, token: Optional[str] = None
) -> bool:
    """Tell whether the URL gives what was promised; if not, warn. Blocks for a few seconds at most.

    `own_cert` is the PEM file of the server's own certificate, which is trusted here like the system's CAs:
    whether frontends trust its CA nobody can know, but that it names another host or has expired is found.
    """
    try:
        tls = None if own_cert is None else _trusting(own_cert)
        status, data = fetch(url, size + 1, SELF_CHECK_SECONDS, token=token, tls=tls)
    except (OSError, http.client.HTTPException) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        if status == 200 and Checksum.of(data) == checksum:
            return True
        found = "other bytes than those registered" if status == 200 else f"status {status}"
    logger.warning(
        "this worker cannot fetch its own %s (%s); if frontends cannot either, set DYN_SYSTEM_ADVERTISE_URL "
        "to a base URL that they can reach, and DYN_SYSTEM_HOST to an address at which that arrives",
        url, found,
    )  # fmt: skip
    return False


def _trusting(own_cert: str) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()  # a proxy may stand in front, with another certificate
    context.load_verify_locations(cafile=own_cert)
    context.verify_flags |= 0x80000  # X509_V_FLAG_PARTIAL_CHAIN, which `ssl` names from Python 3.10 on
    return context


def fetch(
    url: str,
    max_bytes: int,
    seconds: float,
    *,
    token: Optional[str] = None,
    tls: Optional[ssl.SSLContext] = None,
) -> tuple[int, bytes]:
    """GET a URL in `seconds` in all; return the status and up to `max_bytes` of the body.

    Raises OSError (TimeoutError at the deadline) or http.client.HTTPException. Only the resolver, and a
    server that sends its header byte by byte, can take longer.
    """
    deadline = time.monotonic() + seconds
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=seconds)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.netloc, timeout=seconds, context=tls)
    headers = {"Connection": "close", **({} if token is None else {"Authorization": f"Bearer {token}"})}
    try:
        connection.connect()
        sock = connection.sock  # the connection forgets it once it knows that no second request follows
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        sock.settimeout(_left(deadline))
        connection.request("GET", target, headers=headers)
        sock.settimeout(_left(deadline))
        with connection.getresponse() as response:
            wanted = max_bytes if response.length is None else min(max_bytes, response.length)
            data = bytearray()
            while len(data) < wanted:
                sock.settimeout(_left(deadline))
                piece = response.read1(min(PIECE_BYTES, wanted - len(data)))
                if not piece:
                    break
                data += piece
            return response.status, bytes(data)
    finally:
        connection.close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no complete answer in time")
    return left
