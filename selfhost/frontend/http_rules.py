"""What the header of an answer to a GET means for whoever wants the bytes of a file.

Pure functions; RFC 9110 unless said otherwise.
"""

from __future__ import annotations

import email.utils
import re
from typing import TYPE_CHECKING, NamedTuple, Optional

from ..errors import FetchError, HTTPStatusError, shown, shown_url
from .transport import ENCODED, Watch, origin_of

if TYPE_CHECKING:
    from .http_connection import Answer

OK = 200
PARTIAL_CONTENT = 206
UNAUTHORIZED = 401
FORBIDDEN = 403
RANGE_NOT_SATISFIABLE = 416
# The same request may well succeed a little later.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

# 8.8.3, without the W/ of a weak one. No longer than anybody's, because it is kept and sent back.
_STRONG_ETAG = re.compile('"[\x21\x23-\x7e\x80-\xff]{0,256}"')
_LENGTH = re.compile("[0-9]{1,18}")
_SECONDS = re.compile("[0-9]{1,9}")
_CONTENT_RANGE = re.compile("bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.IGNORECASE)


def is_strong(etag: Optional[str]) -> bool:
    """Tell whether an entity tag stands for exactly one sequence of bytes."""
    return etag is not None and _STRONG_ETAG.fullmatch(etag) is not None


def strong_etag(answer: Answer) -> Optional[str]:
    """Return the answer's entity tag if it is a strong one."""
    etag = answer.field("ETag")
    return etag if is_strong(etag) else None


def content_length(answer: Answer, watch: Watch) -> Optional[int]:
    """Return how many bytes the body has, None where only its end tells.

    Raises FetchError for a body that is coded in a way that nobody asked for, or framed in a way that two
    readers would understand differently (RFC 9112, 6.3).
    """
    encoding = answer.field("Content-Encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        why = f"expected the bytes as they are, found the Content-Encoding {shown(encoding)}"
        raise watch.error(why, problem=ENCODED)
    coding = answer.field("Transfer-Encoding")
    if coding is not None and not (coding.lower() == "chunked" and answer.is_chunked):
        raise watch.error(f"expected no Transfer-Encoding but chunked, found {shown(coding)}")
    length = answer.field("Content-Length")
    if length is None:
        return None
    if coding is not None:
        raise watch.error(f"found both a Content-Length ({shown(length)}) and a Transfer-Encoding")
    if not _LENGTH.fullmatch(length):
        raise watch.error(f"expected a number of bytes as Content-Length, found {shown(length)}")
    return int(length)


class ContentRange(NamedTuple):
    """Which bytes of a file a 206 brings: from `first` to `last`, of `total`."""

    first: int
    last: int
    total: int


def continuation(answer: Answer, received: int, validator: str) -> Optional[ContentRange]:
    """Return what a 206 brings, if that is certainly all that follows the first `received` bytes; else None.

    Certain is: the same strong entity tag, one range that goes on where we stopped and to the end of the
    file, and as many bytes as it says.
    """
    if answer.status != PARTIAL_CONTENT or answer.field("ETag") != validator:
        return None
    match = _CONTENT_RANGE.fullmatch(answer.field("Content-Range") or "")
    if match is None:
        return None
    found = ContentRange(*map(int, match.groups()))
    if not received == found.first <= found.last == found.total - 1:
        return None
    length = answer.field("Content-Length")
    if length is not None and length != str(found.total - received):
        return None
    return found


def status_error(answer: Answer, watch: Watch, *, now: float) -> FetchError:
    """Return the error for a status that brings no file; `now` is the wall clock's time (seconds)."""
    status = answer.status
    found = f"status {status} {shown(answer.reason)}"
    if 300 <= status < 400 and status != 304:
        location = answer.field("Location")
        found += f" to {'nowhere' if location is None else shown_url(location)} (redirects are not followed)"
    elif status in (UNAUTHORIZED, FORBIDDEN):
        found += f": {_about_token(watch)}"
    elif status == PARTIAL_CONTENT:
        found += " (a part of the file, which nobody asked for)"
    return HTTPStatusError(
        f"cannot fetch {watch.shown_url}: expected status 200, found {found}",
        url=watch.url,
        status=status,
        is_transient=status in _TRANSIENT,
        retry_after=retry_after(answer.field("Retry-After"), now=now),
    )


def _about_token(watch: Watch) -> str:
    origin = shown(origin_of(watch.url))
    if watch.has_token:
        return f"{origin} does not accept the bearer token that is configured for it: renew that"
    return (
        f"no bearer token is configured for {origin}: "
        "give one (--token-file for the origin of the card's URL, a line in DYN_MDC_TOKENS_FILE, tokens=)"
    )


def retry_after(text: Optional[str], *, now: float) -> Optional[float]:
    """Return the seconds that a Retry-After (10.2.3: a number or a date) asks for, None if it is junk."""
    if text is None:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        date = email.utils.parsedate_tz(text)
        seconds = None if date is None else email.utils.mktime_tz(date) - now
    except (ValueError, OverflowError, TypeError, IndexError):  # for dates that no calendar has
        return None
    return seconds if seconds is not None and seconds >= 0 else None
