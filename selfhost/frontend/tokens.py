"""Bearer tokens (RFC 6750): which one is sent to which origin.

A token goes to the very scheme, host and port that it is configured for, and to no other: one for `https://h`
is for port 443 of h, not for `http://h`, and not for any other name of that machine. To have one sent in the
clear, configure it for an `http://` origin. Nothing here or elsewhere shows a token: no repr, error or log;
messages about a file of tokens name lines by their number alone.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from typing import Optional, Union

from ..card import url as urls
from ..errors import SettingsError, shown, shown_url, without_userinfo
from .http_dial import Origin
from .renewable import Renewable

_Path = Union[str, "os.PathLike[str]"]

MAX_FILE_BYTES = 1 << 20
_TOKEN = re.compile("[\x21-\x7e]{1,8192}")  # more than RFC 6750 allows, and nothing that could end a header
_ACCEPTED_ORIGIN = "http(s)://host[:port]"
_ACCEPTED_TOKEN = "printable ASCII without spaces, at most 8192 characters"  # noqa: S105
_ACCEPTED_LINE = "lines `ORIGIN TOKEN`, such as `https://gpu7:9090 s3cret`, and comments that begin with #"


class Tokens:
    """The tokens by origin: those that are `given`, and those of a `file`, read anew when it changes.

    The file has lines `ORIGIN TOKEN`, and comments that begin with `#`; it is first read for the first
    request. What is given comes before what the file says. Raises SettingsError for what cannot be used.
    """

    def __init__(self, given: Optional[Mapping[str, str]] = None, *, file: Optional[_Path] = None) -> None:
        self._given = dict(_parse_entry(*entry) for entry in enumerate((given or {}).items(), 1))
        self._path = None if file is None else os.fspath(file)
        self._of_file = Renewable(self._read, [] if self._path is None else [self._path])

    def of(self, origin: Origin) -> Optional[str]:
        """Return the token for an origin, None if it has none; SettingsError if the file cannot be used."""
        return self._given.get(origin) or self._of_file.get().get(origin)

    def _read(self) -> dict[Origin, str]:
        if self._path is None:
            return {}
        try:
            with open(self._path, encoding="utf-8", opener=_open_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
                text = file.read(MAX_FILE_BYTES + 1)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise _unusable_file(self._path, str(why)) from None  # what cannot be decoded may be a token
        if len(text) > MAX_FILE_BYTES:
            raise _unusable_file(self._path, f"it has more than {MAX_FILE_BYTES} bytes")
        return _parse(text, self._path)

    def __repr__(self) -> str:
        return f"<Tokens given={len(self._given)} file={self._path!r}>"


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait for a writer


def parse_origin(text: str) -> Origin:
    """Return the origin that `http(s)://host[:port]` means; SettingsError for anything else."""
    parsed = urls.parse(text)
    origin = Origin.of(parsed)
    if parsed is None or origin is None or (parsed.userinfo, *parsed[4:]) != ("", "/", None, None):
        raise SettingsError(
            f"cannot use a token for {shown_url(text)}: expected {_ACCEPTED_ORIGIN} and nothing else",
            variable="tokens", value=without_userinfo(text), accepted=_ACCEPTED_ORIGIN,
        )  # fmt: skip
    return origin


def origin_text(url: str) -> str:
    """Return the origin of a URL as `parse_origin` takes it; SettingsError if it has none."""
    parsed = urls.parse(url)
    if parsed is not None:
        url = str(parsed._replace(userinfo="", path="/", query=None, fragment=None))
    parse_origin(url)
    return url


def read_token(path: str) -> str:
    """Return the token that is all of a file, but for white space around it; SettingsError if it is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            token = file.read(MAX_FILE_BYTES).strip()
    except OSError as error:
        raise _unusable_file(path, str(error.strerror), _ACCEPTED_TOKEN, "--token-file") from None
    if not _TOKEN.fullmatch(token):
        found = "something else" if token else "nothing"
        raise _unusable_file(path, found, _ACCEPTED_TOKEN, "--token-file")
    return token


def _parse(text: str, path: str) -> dict[Origin, str]:
    tokens: dict[Origin, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            origin, token = words
            key = parse_origin(origin)
        except ValueError:  # SettingsError, too, which shows what may be a token in the wrong place
            raise _unusable_file(path, f"line {number} is not `ORIGIN TOKEN`") from None
        if key in tokens or not _TOKEN.fullmatch(token):
            why = "names an origin once more" if key in tokens else f"has no token ({_ACCEPTED_TOKEN})"
            raise _unusable_file(path, f"line {number} {why}")
        tokens[key] = token
    return tokens


def _parse_entry(number: int, entry: tuple[str, str]) -> tuple[Origin, str]:
    """Return origin and token of an entry; an error shows neither, as one may stand in the other's place."""
    origin, token = entry
    try:
        key = parse_origin(origin)
    except SettingsError:
        raise SettingsError(
            f"cannot use entry {number} of tokens= (not shown): expected the origin {_ACCEPTED_ORIGIN} "
            "and nothing else in front of its token",
            variable="tokens", value=None, accepted=_ACCEPTED_ORIGIN,
        ) from None  # fmt: skip
    return key, _checked(token, origin)


def _checked(token: str, origin: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise SettingsError(
            f"cannot use the token for {shown(origin)} (not shown): expected {_ACCEPTED_TOKEN}",
            variable="tokens", value=None, accepted=_ACCEPTED_TOKEN,
        )  # fmt: skip
    return token


def _unusable_file(
    path: str, found: str, accepted: str = _ACCEPTED_LINE, variable: str = "DYN_MDC_TOKENS_FILE"
) -> SettingsError:
    message = f"cannot use {shown(path)} for tokens ({variable}): expected {accepted}; found: {found}"
    return SettingsError(message, variable=variable, value=path, accepted=accepted)
