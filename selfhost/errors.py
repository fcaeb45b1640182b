"""Every exception that selfhost raises on purpose, as one tree.

Catch `SelfHostError` to catch them all. Each class carries, as attributes, what a caller acts on;
the message says what was attempted, on which thing, what was expected and what was found.
"""

from __future__ import annotations

import copyreg
import re
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional


class SelfHostError(Exception):
    """The root of the tree.

    Errors can be copied and pickled, as a pool of processes does with what its workers raise.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone, where ours want keywords.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class CardError(SelfHostError, ValueError):
    """A model deployment card is not what Dynamo accepts.

    `field` is the dotted path of the first offending field ("" for the text as a whole), `value`
    what was found there; `issues` holds one line for every problem found.
    """

    def __init__(
        self, message: str, *, field: str = "", value: object = None, issues: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.issues = tuple(issues) or (message,)


class ChecksumError(CardError):
    """A text is no `blake3:<64 lower-case hex digits>`; `text` is what was found."""

    def __init__(self, message: str, *, text: object, field: str = "checksum") -> None:
        super().__init__(message, field=field, value=text)
        self.text = text


class ModelDirError(SelfHostError):
    """A model directory cannot become a card; `path` is the directory, `issues` one line a problem."""

    def __init__(self, message: str, *, path: str, issues: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.path = path
        self.issues = tuple(issues) or (message,)


class SettingsError(SelfHostError, ValueError):
    """A setting has a value that cannot be used, or one that is needed is missing."""

    def __init__(self, message: str, *, variable: str, value: Optional[str], accepted: str) -> None:
        super().__init__(message)
        self.variable = variable
        self.value = value
        self.accepted = accepted


class RegistrationError(SelfHostError):
    """A file or a model cannot be registered; nothing of it has been."""

    def __init__(
        self, message: str, *, slug: str = "", suffix: str = "", filename: str = "", reason: str = ""
    ) -> None:
        super().__init__(message)
        self.slug = slug
        self.suffix = suffix
        self.filename = filename
        self.reason = reason or message


class StatusServerError(SelfHostError):
    """The status server cannot listen, or cannot tell an address that others can reach."""

    def __init__(self, message: str, *, address: str) -> None:
        super().__init__(message)
        self.address = address


class DiscoveryError(SelfHostError):
    """A record cannot be published, read or withdrawn; `key` is the record's key ("" for the store)."""

    def __init__(self, message: str, *, backend: str, key: str = "") -> None:
        super().__init__(message)
        self.backend = backend
        self.key = key


class FetchError(SelfHostError):
    """A file could not be fetched from `url`.

    `is_transient` says whether the same source is worth another try soon, `retry_after` how many seconds the
    source asked to be left alone (None: it did not). `problem` is the cause in the words of `transport` and
    `http_tls`, "" where the class says it.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str,
        is_transient: bool = False,
        retry_after: Optional[float] = None,
        problem: str = "",
    ) -> None:
        super().__init__(message)
        self.url = url
        self.is_transient = is_transient
        self.retry_after = retry_after
        self.problem = problem


class HostNotFound(FetchError):
    """No address is known for the URL's `host`."""

    def __init__(self, message: str, *, url: str, host: str, is_transient: bool = False) -> None:
        super().__init__(message, url=url, is_transient=is_transient)
        self.host = host


class ConnectFailed(FetchError):
    """No address of the URL's `host` takes a connection to `port`; `errno` is why the last one did not."""

    def __init__(self, message: str, *, url: str, host: str, port: int, errno: Optional[int] = None) -> None:
        super().__init__(message, url=url, is_transient=True)
        self.host = host
        self.port = port
        self.errno = errno


class TLSFailed(FetchError):
    """There is no secure connection to the origin; `problem` says why, in the words of `http_tls`."""

    def __init__(self, message: str, *, url: str, problem: str, is_transient: bool = False) -> None:
        super().__init__(message, url=url, is_transient=is_transient, problem=problem)


class HTTPStatusError(FetchError):
    """The origin answered with a status that brings no file."""

    def __init__(
        self,
        message: str,
        *,
        url: str,
        status: int,
        is_transient: bool = False,
        retry_after: Optional[float] = None,
        problem: str = "",
    ) -> None:
        super().__init__(
            message, url=url, is_transient=is_transient, retry_after=retry_after, problem=problem
        )
        self.status = status


class FetchTimeout(FetchError):
    """The source took more than `seconds` in one `phase`: connect, tls, headers, body or total."""

    def __init__(self, message: str, *, url: str, seconds: float, phase: str) -> None:
        super().__init__(message, url=url)
        self.seconds = seconds
        self.phase = phase


class SourceTooSlow(FetchTimeout):
    """The source brings its bytes slowly while others are left; it is asked again if they all fail."""

    def __init__(self, message: str, *, url: str, seconds: float) -> None:
        super().__init__(message, url=url, seconds=seconds, phase="body")
        self.is_transient = True


class SizeLimitExceeded(FetchError):
    """The source has more than `limit` bytes; `received` is what it announced or sent (bytes)."""

    def __init__(self, message: str, *, url: str, limit: int, received: int) -> None:
        super().__init__(message, url=url)
        self.limit = limit
        self.received = received


class SchemeNotAllowed(FetchError):
    """No transport is allowed to fetch URLs of this `scheme` ("" for a plain path)."""

    def __init__(self, message: str, *, url: str, scheme: str) -> None:
        super().__init__(message, url=url)
        self.scheme = scheme


class PeerNotAllowed(FetchError):
    """The peer policy refuses the address that the URL's host stands for; nothing was sent to it."""

    def __init__(self, message: str, *, url: str, host: str, address: str) -> None:
        super().__init__(message, url=url)
        self.host = host
        self.address = address


class VerificationError(SelfHostError):
    """Bytes that were fetched are not the bytes that the card promises."""

    def __init__(
        self, message: str, *, url: str, expected: str, actual: str, size: Optional[int] = None
    ) -> None:
        super().__init__(message)
        self.url = url
        self.expected = expected
        self.actual = actual
        self.size = size


class SourceDrifted(VerificationError):
    """The source is one that changes (a branch of a repository) and has moved on: not corrupt, but other."""


class CacheError(SelfHostError):
    """The cache cannot use `path`; `errno` is the system's reason, None where the reason is ours."""

    def __init__(self, message: str, *, path: str, errno: Optional[int] = None) -> None:
        super().__init__(message)
        self.path = path
        self.errno = errno


class BlobMissing(CacheError):
    """Blobs that a model needs are not in the cache, or no longer; `checksums` lists theirs, as texts."""

    def __init__(self, message: str, *, path: str, checksums: Sequence[str]) -> None:
        super().__init__(message, path=path)
        self.checksums = tuple(checksums)


class LockTimeout(CacheError):
    """A lock of the cache was not granted within `seconds`; work goes on without it."""

    def __init__(self, message: str, *, path: str, seconds: float) -> None:
        super().__init__(message, path=path)
        self.seconds = seconds


class Attempt(NamedTuple):
    """One try at one source: where, what came of it, and how long that took."""

    url: str
    error: SelfHostError
    seconds: float


class ResolveError(SelfHostError):
    """A file of a card is to be had from no source; `attempts` lists all that were tried, in order.

    `file` is the name of the first file that failed, `missing` the checksum of every file that is not there
    (more than one only when nothing may be fetched), `retry_after` the seconds for which the same request
    would fail again without being tried (None: it would be tried).
    """

    def __init__(
        self,
        message: str,
        *,
        file: str,
        attempts: Sequence[Attempt] = (),
        missing: Sequence[str] = (),
        retry_after: Optional[float] = None,
    ) -> None:
        super().__init__(message)
        self.file = file
        self.attempts = tuple(attempts)
        self.missing = tuple(missing)
        self.retry_after = retry_after


# ------------------------------------------------------------------ how messages show what they speak of

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_URL_REPR = reprlib.Repr()
_URL_REPR.maxstring = 250  # the URLs of workers have a query of 72 characters behind the name of the file

_SPECIAL = r"(?:https?|wss?|ftp):"  # URLs of which a backslash ends the host, too (WHATWG URL, 4.4)
_USERINFO = re.compile(
    rf"\A([\0-\x20]*{_SPECIAL}[/\\]*)[^/\\?#]*@|\A([\0-\x20]*(?!{_SPECIAL})[a-z][a-z0-9+.-]*:(?://)?)[^/?#]*@",
    re.IGNORECASE,
)
_INVISIBLE_IN_URL = {ord(char): None for char in "\t\r\n"}
_UNSHOWN = re.compile(
    r"\A([\0-\x20]*[a-z][a-z0-9+.\t\r\n-]*:[^?#]*)([?#])(?!blake3=[0-9a-f]{64}\Z).*", re.I | re.S
)


def shown(value: object) -> str:
    """Return `repr(value)` for an error message, shortened in the middle if it is long."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"<a very long {type(value).__name__}>"


def without_userinfo(url: str) -> str:
    """Return a URL without the user name and password in it; a path on a disk as it is."""
    return _replace_userinfo(url, "")


def shown_url(url: str) -> str:
    """Return a URL or path for an error message: in quotes, bounded, and without what may be a secret.

    A user name and password become `***`, a query or fragment `...`, unless it is one of a worker's own
    (`?blake3=<hex>`).
    """
    return _URL_REPR.repr(_UNSHOWN.sub(r"\1\2...", _replace_userinfo(url, "***@")))


def _replace_userinfo(url: str, by: str) -> str:
    if "@" not in url:
        return url
    found, count = _USERINFO.subn(rf"\g<1>\g<2>{by}", url.translate(_INVISIBLE_IN_URL))
    return found if count else url
