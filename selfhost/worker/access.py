"""Access: who may see metadata, by the bearer token of a request (RFC 6750; RFC 9110 section 11).

The token guards the metadata route and everything below it; /health and /live stay open. A refusal comes
before any look-up and is the same for what is registered and what is not. A token is taken from the
Authorization field alone, never from a query, which logs and proxies keep. It appears in no message, log or
repr. Shared caches do not keep answers to requests that carried one (RFC 9111 section 3.5).

A server may keep heads that were let in, whole, and answer them again without asking, until `version`
changes. Never heads that were refused. To look one up compares hashes with a secret key first, so the time
that it takes tells nothing of how much of a guess is right.

A token in a file may change at any time and is in force within a second. The file is then simply read anew:
comparing stamps would cost the same look at the disk and miss a second change within one tick of its clock.

Sharing: any number of threads and forked processes. Reading the file is all that may block: keep it on a
local disk.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import time
from typing import Callable, Optional, Union

from .._threads import log_safely
from ..errors import SettingsError
from .answer import Answer, is_metadata, text_answer

logger = logging.getLogger(__name__)

MIN_CHARACTERS = 16  # 64 bits even in hex; `openssl rand -hex 32` gives 64
MAX_CHARACTERS = 1024  # far below what any server takes as a header
_MAX_FILE_BYTES = 4096
CHECK_SECONDS = 1.0  # between two readings of the file, which happen only while requests come

_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1: b64token
_ACCEPTED = f"{MIN_CHARACTERS} to {MAX_CHARACTERS} characters A-Z a-z 0-9 -._~+/ and = at the end (RFC 6750)"

_NEEDED = "A valid bearer token is needed"
_REALM = 'Bearer realm="selfhost"'
UNAUTHORIZED = text_answer(401, _NEEDED, ("WWW-Authenticate", _REALM))
INVALID_TOKEN = text_answer(401, _NEEDED, ("WWW-Authenticate", f'{_REALM}, error="invalid_token"'))


class Access:
    """Lets in whoever has the token that was given, or that stands in a file.

    Raises SettingsError for both or neither, for a token that no request could carry or that could be
    guessed, and for a file without a usable one. Later a file that is gone, empty or unusable is warned of,
    once, and its last good token stays in force.
    """

    def __init__(
        self,
        token: Optional[str] = None,
        token_file: Union[str, os.PathLike[str], None] = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from hmac import compare_digest

        if (token is None) == (token_file is None):
            raise _not_one(found="neither" if token is None else "both")
        self._compare = compare_digest
        self._clock = clock
        self._check_at = clock() + CHECK_SECONDS
        self._is_warned = False
        self._version = 0
        # Absolute: the host may change its working directory.
        self.token_file = None if token_file is None else os.path.abspath(os.fspath(token_file))
        self._token = _checked(token) if token is not None else _read(str(self.token_file))

    @classmethod
    def of(cls, token: Optional[str], token_file: Union[str, os.PathLike[str], None]) -> Optional[Access]:
        """Return the access that these settings ask for, None where neither is set; SettingsError."""
        return None if token is None and token_file is None else cls(token, token_file)

    def allows(self, authorization: Optional[str]) -> bool:
        """Tell whether an Authorization field, None if there was none, carries the token."""
        self._renew()
        given = _bearer_token(authorization)
        # Its time depends on neither where nor whether the lengths and bytes differ.
        return self._compare(given.encode("utf-8", "surrogatepass"), self._token)

    def refusal(self, path: str, authorization: Optional[str]) -> Optional[Answer]:
        """Return the 401 for a percent-decoded path; None if it is let in, or is none of the metadata's."""
        if not is_metadata(path) or self.allows(authorization):
            return None
        return INVALID_TOKEN if _bearer_token(authorization) else UNAUTHORIZED

    @property
    def version(self) -> int:
        """A number that changes with the token: who was let in before is to be asked again."""
        self._renew()
        return self._version

    @property
    def token(self) -> str:
        """The token itself, for the worker's own request to itself."""
        self._renew()
        return self._token.decode()

    def _renew(self) -> None:
        """Read the file anew, if there is one and the last time is a while ago."""
        if self.token_file is None or self._clock() < self._check_at:
            return
        self._check_at = self._clock() + CHECK_SECONDS  # first: one thread reads, the others go on
        try:
            token = _read(self.token_file)
        except SettingsError as error:
            if not self._is_warned:
                self._is_warned = True
                log_safely(logger, logging.WARNING, "the last good token stays in force: %s", error)
            return
        self._is_warned = False
        if token != self._token:
            self._token = token
            self._version += 1
            log_safely(logger, logging.INFO, "the bearer token in %r has changed", self.token_file)

    def __repr__(self) -> str:
        return f"<Access by {'token' if self.token_file is None else repr(self.token_file)}>"


def _bearer_token(authorization: Optional[str]) -> str:
    """Return what follows the scheme, "" where there is nothing or the scheme is another."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip(" \t") if scheme.lower() == "bearer" else ""


def _checked(token: str) -> bytes:
    return _usable(token.encode("utf-8", "surrogatepass"), "DYN_SYSTEM_TOKEN", "the bearer token")


def _read(path: str) -> bytes:
    """Return the token in a file, without the white space around it, or raise SettingsError."""
    what = f"the bearer token in {path!r}"
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise _unusable("DYN_SYSTEM_TOKEN_FILE", what, reason) from error
    if len(data) > _MAX_FILE_BYTES:  # half a token must not become one
        raise _unusable("DYN_SYSTEM_TOKEN_FILE", what, f"the file has more than {_MAX_FILE_BYTES} bytes")
    return _usable(data.strip(), "DYN_SYSTEM_TOKEN_FILE", what)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait for a writer


def _usable(token: bytes, variable: str, what: str) -> bytes:
    """Return the token, or say what is wrong with it without a character of it."""
    if not MIN_CHARACTERS <= len(token) <= MAX_CHARACTERS:
        raise _unusable(variable, what, f"it has {len(token)} characters")
    if not _TOKEN.fullmatch(token):
        raise _unusable(variable, what, "it has characters that no bearer token may have")
    return token


def _not_one(*, found: str) -> SettingsError:
    accepted = "either a bearer token (DYN_SYSTEM_TOKEN) or a file that holds it (DYN_SYSTEM_TOKEN_FILE)"
    remedy = {"both": "both are set: unset one", "neither": "neither is set"}[found]
    message = f"metadata is guarded by {accepted}, and {remedy}"
    return SettingsError(message, variable="DYN_SYSTEM_TOKEN", value=None, accepted=accepted)


def _unusable(variable: str, what: str, why: str) -> SettingsError:
    message = f"{what} ({variable}) cannot be used: {why}; expected {_ACCEPTED}"
    return SettingsError(message, variable=variable, value=None, accepted=_ACCEPTED)
