"""HttpTransport: files by http and https, from whatever server holds them.

One GET per file. Redirects are not followed, no cookie or proxy is ever used, no credential but the token and
the certificate that are configured; nothing is decoded: the bytes are the file, or the fetch fails. What was
cut is continued where the sink already holds bytes of a file with the same strong entity tag (Range,
If-Range); any doubt about the continuation and the file is asked for from its first byte. Whoever owns the
sink checks the hash in the end.

Any number of threads may use one transport. Connections are kept and shared between them; forked children
make their own.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Union

from ..card import url as urls
from ..errors import SizeLimitExceeded, shown
from . import http_rules as rules
from .http_dial import Origin, dial
from .http_pool import Pool
from .http_tls import ClientTls, secure, tls_context
from .peer_policy import PeerPolicy, not_link_local
from .tokens import Tokens
from .transport import BAD_URL, NOBODY, FetchLimits, FetchObserver, Sink, Watch

if TYPE_CHECKING:
    import ssl

    from .http_connection import Answer, Connection

__all__ = ["ClientTls", "HttpTransport", "Tokens", "tls_context"]

_LIMITS = FetchLimits()

_BUFFER_BYTES = 1 << 20  # measured: a quarter takes an eighth longer, twice as much no longer fits the cache
_MAX_SPARE_BUFFERS = 4  # kept between fetches, so that not each of them waits for the pages of a new one
_UNSENDABLE = re.compile("[\x00-\x20\x7f]")  # in a request line; a URL has them encoded
_FIELD_VALUE = re.compile("[\x21-\x7e]+(?: [\x21-\x7e]+)*")


class HttpTransport:
    """Fetches `http:` and `https:` URLs; see the module's docstring for rules and sharing.

    `tls` is the context for https, or the files to make it of (ClientTls, by default the system's roots), for
    which `ssl` is loaded at the first such URL. `tokens` are bearer tokens by origin (`https://host[:port]`).
    `clock` is monotonic; `wall_clock` is what the dates in Retry-After are compared with.
    """

    may_drift = False

    def __init__(
        self,
        *,
        limits: FetchLimits = _LIMITS,
        peer_policy: PeerPolicy = not_link_local,
        tls: Union[ssl.SSLContext, ClientTls, None] = None,
        tokens: Union[Mapping[str, str], Tokens, None] = None,
        observer: FetchObserver = NOBODY,
        user_agent: Optional[str] = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self._allows = peer_policy
        self._tls = ClientTls() if tls is None else tls
        self._tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
        self._observer = observer
        self._user_agent = _field_value(user_agent or _default_user_agent())
        self._clock = clock
        self._wall_clock = wall_clock
        self._pool = Pool(clock)
        self._spare_buffers: list[bytearray] = []

    # -------------------------------------------------------------- what to ask, and what to make of it

    def fetch(self, url: str, sink: Sink, *, max_bytes: int) -> None:
        """Bring the file behind `url` into the sink; see Transport.fetch for what is raised."""
        watch = Watch(url, self.limits, self._clock, self._observer)
        request = _Request.parse(url, watch, self._user_agent)
        if not self._continue(request, sink, max_bytes, watch):
            with self._answer(request, watch) as answer:
                self._take_whole(answer, sink, max_bytes, watch)

    def _continue(self, request: _Request, sink: Sink, max_bytes: int, watch: Watch) -> bool:
        """Ask for what the sink does not hold yet; tell whether it holds all now. If not, start anew."""
        received, validator = sink.received, sink.validator
        if validator is None or not rules.is_strong(validator) or not 0 < received < max_bytes:
            return False
        with self._answer(request.after(received, validator), watch) as answer:
            found = rules.continuation(answer, received, validator)
            if found is not None:
                rules.content_length(answer, watch)
                _check_size(answer, found.total, max_bytes, watch)
                self._copy(answer, sink, max_bytes, watch)
                _check_end(sink.received, found.total, watch)
                return True
            if answer.status in (rules.PARTIAL_CONTENT, rules.RANGE_NOT_SATISFIABLE):
                return False
            self._take_whole(answer, sink, max_bytes, watch)
            return True

    def _take_whole(self, answer: Answer, sink: Sink, max_bytes: int, watch: Watch) -> None:
        if answer.status != rules.OK:
            raise rules.status_error(answer, watch, now=self._wall_clock())
        length = rules.content_length(answer, watch)
        _check_size(answer, length or 0, max_bytes, watch)
        if sink.received or sink.validator is not None:
            sink.restart()
        sink.validator = rules.strong_etag(answer)
        self._copy(answer, sink, max_bytes, watch)
        _check_end(sink.received, length, watch)

    def _copy(self, answer: Answer, sink: Sink, max_bytes: int, watch: Watch) -> None:
        """Move the body into the sink, as far as it may grow."""
        with self._buffer() as buffer:
            for piece in answer.pieces(buffer, at_most=max_bytes - sink.received + 1):
                if sink.received + len(piece) > max_bytes:
                    raise _too_large(answer, max_bytes, max_bytes + 1, watch)
                sink.write(piece)

    # -------------------------------------------------------------- whom to ask

    @contextlib.contextmanager
    def _answer(self, request: _Request, watch: Watch) -> Iterator[Answer]:
        """Send a request and yield the answer; keep the connection if the answer was read to its end."""
        head = request.head(self._tokens.of(request.origin))
        watch.has_token = head.has_token
        connection, answer = self._ask(request.origin, head, watch)
        watch.observer.answered(answer)
        is_reusable = False
        try:
            yield answer
            is_reusable = answer.is_reusable
        finally:
            answer.close()
            if is_reusable:
                self._pool.give(connection)
            else:
                connection.close()

    def _ask(self, origin: Origin, request: bytes, watch: Watch) -> tuple[Connection, Answer]:
        """Send a request on a kept connection, or on a new one if there is none or it has no answer."""
        kept = self._pool.take(origin)
        if kept is not None:
            from .http_connection import StaleConnection

            with contextlib.suppress(StaleConnection):
                return kept, kept.ask(request, watch)
        connection = self._connect(origin, watch)
        return connection, connection.ask(request, watch)

    def _connect(self, origin: Origin, watch: Watch) -> Connection:
        from .http_connection import Connection  # and with it http.client, for the first fetch

        if origin.scheme == "http":
            return Connection(origin, dial(origin, watch, self._allows))
        context = self._tls.context() if isinstance(self._tls, ClientTls) else self._tls
        sock = secure(dial(origin, watch, self._allows), origin, watch, context)
        watch.observer.secured(sock)
        return Connection(origin, sock)

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        try:
            buffer = self._spare_buffers.pop()
        except IndexError:
            buffer = bytearray(_BUFFER_BYTES)
        try:
            yield memoryview(buffer)
        finally:
            if len(self._spare_buffers) < _MAX_SPARE_BUFFERS:
                self._spare_buffers.append(buffer)

    def offline(self) -> None:
        """Return None: all of it is network."""

    def close(self) -> None:
        """Close the kept connections; those in use are closed when their fetch ends."""
        self._pool.close()
        self._spare_buffers.clear()

    def __enter__(self) -> HttpTransport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<HttpTransport idle={len(self._pool)}>"


# ------------------------------------------------------------------ sizes


def _check_size(answer: Answer, size: int, max_bytes: int, watch: Watch) -> None:
    if size > max_bytes:
        raise _too_large(answer, max_bytes, size, watch)


def _too_large(answer: Answer, limit: int, received: int, watch: Watch) -> SizeLimitExceeded:
    kind = answer.field("Content-Type")
    what = "" if kind is None else f" of type {shown(kind)}"
    return SizeLimitExceeded(
        f"cannot fetch {watch.shown_url}: expected at most {limit} bytes, found {received} or more{what}",
        url=watch.url,
        limit=limit,
        received=received,
    )


def _check_end(received: int, expected: Optional[int], watch: Watch) -> None:
    if expected is not None and received != expected:
        raise watch.error(f"expected {expected} bytes, found {received} when it ended", is_transient=True)


# ------------------------------------------------------------------ requests


class _Request(NamedTuple):
    """A GET of one URL."""

    origin: Origin
    fields: str  # with the request line

    @classmethod
    def parse(cls, url: str, watch: Watch, user_agent: str) -> _Request:
        """Read a URL as cards mean it; FetchError for one that cannot be fetched by HTTP."""
        unsendable = _UNSENDABLE.search(url)
        if unsendable is not None:
            raise watch.error(f"the URL contains {unsendable.group()!r}", problem=BAD_URL)
        parsed = urls.parse(url)
        origin = Origin.of(parsed)
        if parsed is None or origin is None:
            why = "expected an http or https URL with a host (addresses without a zone)"
            raise watch.error(why, problem=BAD_URL)
        if parsed.userinfo:
            why = "the URL has a user name or password, which would not be sent: leave it out"
            raise watch.error(why, problem=BAD_URL)
        target = parsed.path if parsed.query is None else f"{parsed.path}?{parsed.query}"
        fields = (
            f"GET {target} HTTP/1.1\r\n"
            f"Host: {parsed.host if parsed.port is None else f'{parsed.host}:{parsed.port}'}\r\n"
            "Accept: */*\r\n"
            "Accept-Encoding: identity\r\n"
            f"User-Agent: {user_agent}\r\n"
        )
        return cls(origin, fields)

    def after(self, received: int, validator: str) -> _Request:
        """Return the request for the bytes after the first ones, if it is still that file."""
        return self._replace(fields=f"{self.fields}Range: bytes={received}-\r\nIf-Range: {validator}\r\n")

    def head(self, token: Optional[str]) -> _Head:
        """Return what is sent; the token is kept nowhere else."""
        authorization = "" if token is None else f"Authorization: Bearer {token}\r\n"
        head = _Head(f"{self.fields}{authorization}\r\n".encode("latin-1"))
        head.has_token = token is not None
        return head


class _Head(bytes):
    """What is sent; shows nothing of it where somebody logs tracebacks with the variables of each frame."""

    has_token = False

    def __repr__(self) -> str:
        return f"<request of {len(self)} bytes>"


def _default_user_agent() -> str:
    from .. import __version__

    return f"selfhost/{__version__}"


def _field_value(text: str) -> str:
    if not _FIELD_VALUE.fullmatch(text):
        raise ValueError(f"cannot send the User-Agent {shown(text)}: expected printable ASCII characters")
    return text
