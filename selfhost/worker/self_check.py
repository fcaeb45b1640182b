"""Whether this worker can fetch what it is about to publish, by the very URL that frontends will use.

A failure only warns: behind NAT the way back may be refused although everybody else gets through. Asks no
proxy and follows no redirect, as frontends do not either.
"""

from __future__ import annotations

import http.client
import logging
from urllib.parse import urlsplit

from ..card.checksum import Checksum

logger = logging.getLogger(__name__)

SELF_CHECK_SECONDS = 2.0  # for each of connecting and reading


def can_fetch(url: str, checksum: Checksum, size: int) -> bool:
    """Tell whether the URL gives what was promised; if not, warn. Blocks for a few seconds at most."""
    try:
        data = _get(url, size + 1)
    except (OSError, http.client.HTTPException) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        if Checksum.of(data) == checksum:
            return True
        found = "other bytes than those registered"
    logger.warning(
        "this worker cannot fetch its own %s (%s); if frontends cannot either, set DYN_SYSTEM_ADVERTISE_URL "
        "to a base URL that they can reach", url, found,
    )  # fmt: skip
    return False


def _get(url: str, max_bytes: int) -> bytes:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=SELF_CHECK_SECONDS)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path)
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}")
        return response.read(max_bytes)
    finally:
        connection.close()
