"""The errors of a resolve, in words: what was tried where, what came of it, what the operator can do.

URLs stand in them as `shown_url` shows them, without what may be a secret; the attributes have them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from ..errors import (
    Attempt,
    ResolveError,
    SchemeNotAllowed,
    SourceDrifted,
    VerificationError,
    shown,
    shown_url,
)
from .failures import SourceError
from .wanted import WantedBlob

_MAX_LINES = 20  # of one kind in one message; the error's attributes hold them all
_MAX_CHARS = 400  # of one line

# ------------------------------------------------------------------ of one source


def drifted(url: str, blob: WantedBlob, error: SourceError) -> SourceDrifted:
    """Return the error for a source that may change, has other bytes by now, and is not to blame for it."""
    return SourceDrifted(
        f"{shown_url(url)} has moved on, it is no longer what the card was made from: {error}",
        url=url,
        expected=str(blob.checksum),
        actual=getattr(error, "actual", ""),
        size=getattr(error, "size", None),
    )


def html_instead(error: VerificationError) -> VerificationError:
    """Return the error for wrong bytes that are somebody's page."""
    return VerificationError(
        f"{error}; it looks like an HTML page (of a proxy or a login)",
        url=error.url,
        expected=error.expected,
        actual=error.actual,
        size=error.size,
    )


# ------------------------------------------------------------------ of all sources


def nowhere_to_be_had(
    blob: WantedBlob,
    attempts: Sequence[Attempt],
    skipped: Sequence[tuple[str, str]],
    retry_after: Optional[float],
) -> ResolveError:
    """Return the error for a file that no source gave.

    `skipped` are the URLs that were not asked because they failed lately, each with what happened then.
    """
    lines = [
        f"cannot get {blob} from any source:",
        *_bounded([_line(attempt) for attempt in attempts]),
        *_bounded([_skipped_line(url, reason) for url, reason in skipped]),
    ]
    if not attempts and not skipped:
        lines.append("  there is none")
    lines.append(_advice([attempt.error for attempt in attempts], retry_after))
    return ResolveError(
        "\n".join(lines),
        file=blob.names[0],
        attempts=attempts,
        missing=[str(blob.checksum)],
        retry_after=retry_after,
    )


def missing_offline(blobs: Sequence[WantedBlob], attempts: Sequence[Attempt], root: str) -> ResolveError:
    """Return the error for all files that are not there while nothing may be fetched."""
    lines = [
        f"{len(blobs)} of the card's files are not in the cache {shown(root)}, and this resolver is offline:",
        *(f"  {blob}" for blob in blobs),  # all: it is what the operator has to bring
        *_bounded([_line(attempt) for attempt in attempts]),
        "resolve the card once while online, or import its files into the cache",
    ]
    return ResolveError(
        "\n".join(lines),
        file=blobs[0].names[0],
        attempts=attempts,
        missing=[str(blob.checksum) for blob in blobs],
    )


def _line(attempt: Attempt) -> str:
    text = " ".join(str(attempt.error).split())  # one line, whatever a transport wrote
    url = shown_url(attempt.url)
    told = text if url in text else f"{url}: {text}"
    return f"{told[:_MAX_CHARS]} ({attempt.seconds:.2f} s)"


def _skipped_line(url: str, reason: str) -> str:
    text, url = " ".join(reason.split()), shown_url(url)
    return (
        f"not asked, it failed lately: {text}"
        if url in text
        else f"{url}: not asked, it failed lately: {text}"
    )


def _bounded(lines: list[str]) -> list[str]:
    """Indent the lines, and leave out the middle of very many."""
    if len(lines) > _MAX_LINES:
        half = _MAX_LINES // 2
        lines = [*lines[:half], f"... and {len(lines) - 2 * half} more ...", *lines[-half:]]
    return [f"  {line[: 2 * _MAX_CHARS]}" for line in lines]


def _advice(errors: Sequence[Exception], retry_after: Optional[float]) -> str:
    if retry_after is not None:
        return f"none is asked again for {retry_after:.1f} s; see that a worker of this model can be reached"
    if errors and all(isinstance(error, SchemeNotAllowed) for error in errors):
        return "publish the model with URLs, or give the resolver a transport for these"
    if any(isinstance(error, VerificationError) for error in errors):
        return "what serves other bytes than its card promises has to publish its model again"
    return "see that a worker of this model runs and can be reached from here, then resolve again"
