"""Names that can stand in a metadata URL: one segment each, printable, storable as a file name anywhere."""

from __future__ import annotations

import functools
import re
from typing import Optional
from urllib.parse import quote

from ..errors import RegistrationError

MAX_NAME_BYTES = 255  # NAME_MAX of the file systems on which frontends will store the file

_PLAIN_NAME = re.compile("[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,254}")  # nothing to refuse, nothing to encode
# Separators, control characters (C0, DEL, C1) and halves of surrogate pairs, which have no UTF-8.
_FORBIDDEN = re.compile("[/\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def why_unservable(name: str) -> Optional[str]:
    """Return why `name` cannot be one segment of a metadata URL, or None if it can."""
    if name in ("", ".", ".."):
        return "it must not be empty, '.' or '..'"
    found = _FORBIDDEN.search(name)
    if found:
        return f"it must not contain {found.group()!r}"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it has {len(name.encode())} bytes of UTF-8, at most {MAX_NAME_BYTES} are allowed"
    return None


@functools.lru_cache(maxsize=4096)  # a thousand adapters have the same ten filenames
def segment(name: str, what: str) -> str:
    """Percent-encode a "slug", "suffix" or "filename"; RegistrationError if no URL can have that name."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    if what == "slug" and name == "":  # of a model called 模型, for one
        return name
    reason = why_unservable(name)
    if reason is not None:
        where = {what: name}
        raise RegistrationError(f"cannot register the {what} {name!r}: {reason}", reason=reason, **where)
    return quote(name, safe="")
