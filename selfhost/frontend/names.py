"""Names on the disk: what a card may call a file, and what the cache calls its own.

Pure functions on text. A name comes from the last segment of a URL and is kept as it stands there, still
percent-encoded, as Dynamo's frontends keep it; it is judged in both forms, because somebody may decode it.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Optional
from urllib.parse import unquote_to_bytes

from ..errors import CardError, shown

MAX_NAME_BYTES = 255  # of one path component, on every file system that matters

# Separators of any system, control characters (C0, DEL, C1) and halves of surrogate pairs.
_FORBIDDEN = re.compile("[/\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# With an extension they are devices, too: what opens `NUL.json` on Windows gets no file.
_DEVICES = frozenset(("CON", "PRN", "AUX", "NUL", "CLOCK$", "CONIN$", "CONOUT$")) | {
    port + digit for port in ("COM", "LPT") for digit in "0123456789\u00b9\u00b2\u00b3"
}
_HEX = re.compile(r"[0-9a-f]{64}")
_STAGED = re.compile(r"\.tmp\.[0-9]+\.[0-9a-f]{32}")
_TEMPORARY_BLOB = re.compile(r"[0-9a-f]{64}(?:\.[0-9a-f]+)?\.tmp\..*", re.DOTALL)  # Dynamo's, too

SET_ASIDE = ".corrupt"  # behind the name of a blob that was found to be wrong


@functools.lru_cache(maxsize=4096)  # a thousand models have the same ten names, judged at every warm start
def as_file_name(text: Optional[str], *, field: str = "path") -> str:
    """Return `text` if it may become the name of a file in a model's directory, or raise CardError.

    `field` is the place on the card, for the error. None stands for a URL that has no last segment.
    """
    reason = _why_unusable(text)
    if text is None or reason is not None:
        raise CardError(
            f"{field}: expected a URL or path that ends in a usable file name, found {shown(text)}: {reason}",
            field=field,
            value=text,
        )
    return text


def _why_unusable(text: Optional[str]) -> Optional[str]:
    """Return why this cannot be a file name, in any of its spellings, or None if it can."""
    if text is None:
        return "there is none"
    reason = _why_refused(text)
    while reason is None and "%" in text:
        decoded = unquote_to_bytes(text).decode("utf-8", "surrogateescape")
        if decoded == text:
            break
        reason = _why_refused(decoded)
        text = decoded
    return reason


def _why_refused(text: str) -> Optional[str]:
    if text in ("", ".", ".."):
        return f"{text!r} names no file"
    found = _FORBIDDEN.search(text)
    if found:
        return f"it means a name with {found.group()!r}"
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        return "this system's file names cannot be written so (its encoding is not UTF-8)"
    if size > MAX_NAME_BYTES:
        return f"it has {size} bytes, at most {MAX_NAME_BYTES} are allowed"
    if text.partition(".")[0].partition(":")[0].rstrip().upper() in _DEVICES:
        return "it is the name of a device on Windows"
    if _STAGED.fullmatch(text):
        return "the cache calls its own temporary files so"
    return None


def is_hex(name: str) -> bool:
    """Whether this is a digest as it stands in file names: 64 lower-case hexadecimal digits."""
    return _HEX.fullmatch(name) is not None


def staged_name() -> str:
    """Return a new hidden name for what is being made; nobody else has it."""
    return f".tmp.{unique()}"


def is_staged(name: str) -> bool:
    """Whether `staged_name` made this name, here or in another process."""
    return _STAGED.fullmatch(name) is not None


def temporary_blob(hex: str) -> str:
    """Return a new name for a blob that is being written: Dynamo's pattern."""
    return f"{hex}.tmp.{unique()}"


def is_temporary_blob(name: str) -> bool:
    """Whether this is a blob that somebody is or was writing, we or Dynamo."""
    return _TEMPORARY_BLOB.fullmatch(name) is not None


def unique() -> str:
    """Return `<pid>.<32 random hexadecimal digits>`; a forked child's differ from its parent's."""
    return f"{os.getpid()}.{os.urandom(16).hex()}"
