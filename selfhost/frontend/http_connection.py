"""One kept connection to an origin: requests out, bounded answers in.

http.client parses the answers. What it reads comes through a `_Source`, which every received byte passes and
which keeps the bounds that http.client does not know: an answer's header, interim (1xx) answers included, is
MAX_HEAD_BYTES at most and comes within `read_seconds`; a body is never silent for `read_seconds`, nor slower
than `min_bytes_per_second` over as long, nor mostly coding (chunk extensions, trailers); and everything ends
with the Watch of the fetch.

For one thread at a time.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Optional, cast

from ..errors import FetchError, FetchTimeout, TLSFailed, shown
from .http_dial import Origin
from .http_tls import TLS_WANTED, broken
from .transport import NO_HTTP, Watch
from .waits import on_socket

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_HEAD_BYTES = 64 << 10
_BUFFER_BYTES = 8 << 10  # what http.client reads lines from; larger pieces of a body go past this buffer
_CODED_PER_BYTE = 8  # a body in chunks of one byte takes six
_TLS_ALERT = "\x15\x03"  # how a TLS server answers plain HTTP, if it does
PIECE_SECONDS = 0.25  # a piece of a body is handed over by then, however small, once the next bytes come


class StaleConnection(FetchError):
    """A kept connection was dead, or what came there was no answer: it may still belong to the last one.

    A new connection may well work.
    """


class Connection:
    """A connected socket that answers one request after the other."""

    def __init__(self, origin: Origin, sock: socket.socket) -> None:
        self.origin = origin
        self.idle_since = 0.0  # the pool's note
        self._sock = sock
        self._is_reused = False
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def ask(self, request: bytes, watch: Watch) -> Answer:
        """Send a request and return the answer, its body unread; closes the connection if that fails."""
        source = _Source(self._sock, watch)
        try:
            self._sock.settimeout(watch.allow(watch.limits.read_seconds))
            self._sock.sendall(request)
            return Answer(source, watch)
        except (OSError, http.client.HTTPException, FetchError) as err:
            self.close()
            error = self._failure(err, watch)
            if error is err:
                raise
            raise error from err
        except BaseException:
            self.close()
            raise
        finally:
            self._is_reused = True

    def _failure(self, err: Exception, watch: Watch) -> FetchError:
        if isinstance(err, socket.timeout):  # of sendall; the source has an error of its own
            return watch.timeout("headers", watch.limits.read_seconds, "the request did not leave")
        error = err if isinstance(err, FetchError) else _error_of(err, watch)
        if not self._is_reused or isinstance(error, FetchTimeout):
            return error
        return StaleConnection(str(error), url=error.url, is_transient=True)

    def is_quiet(self) -> bool:
        """Tell whether nothing has come since the last answer: neither the end nor bytes nobody asked for."""
        has_pending = getattr(self._sock, "pending", None)  # decrypted already
        return not self._readable.poll(0) and not (has_pending and has_pending())

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        self._sock.close()


class Answer:
    """The answer to one request: status and fields, and a body that is read in pieces."""

    def __init__(self, source: _Source, watch: Watch) -> None:
        """Read the header; raises FetchTimeout, FetchError, OSError or HTTPException."""
        self._watch = watch
        self._source = source
        # http.client wants nothing of a socket but its `makefile`.
        self._response = _Response(cast(socket.socket, source), method="GET")
        try:
            self._response.begin()
        except BaseException:
            self.close()
            raise
        self._came = 0  # bytes of the piece that is being read
        self.status = self._response.status
        self.reason = self._response.reason
        self._fields: dict[str, str] = {}  # by lower-case name; of a repeated one all values (RFC 9110, 5.3)
        for name, value in self._response.headers.items():
            known = self._fields.get(name.lower())
            value = value.strip(" \t")  # http.client leaves what follows it
            self._fields[name.lower()] = value if known is None else f"{known}, {value}"

    def field(self, name: str) -> Optional[str]:
        """Return the value of a header field, None if there is none."""
        return self._fields.get(name.lower())

    @property
    def has_token(self) -> bool:
        """Whether a bearer token was sent for it."""
        return self._watch.has_token

    @property
    def is_chunked(self) -> bool:
        """Whether the body says itself where it ends."""
        return bool(self._response.chunked)

    @property
    def is_reusable(self) -> bool:
        """Whether the connection can take another request: the body was read to its end, and no byte more."""
        response = self._response
        return response.isclosed() and not response.will_close and not self._source.leftover

    def close(self) -> None:
        """Let go of the answer, not of its connection (left to the garbage, 3.13.0 complains about it)."""
        self._response.close()

    def pieces(self, buffer: memoryview, *, at_most: int) -> Iterator[memoryview]:
        """Yield the body in pieces, each in `buffer` until the next is asked for; stop at `at_most` bytes.

        A piece fills the buffer, or is what came in PIECE_SECONDS and did not fill it.
        Where the body breaks off, what came of it is yielded before FetchTimeout or FetchError is raised. One
        that merely ends with its connection may be shorter than it should be: the caller counts.
        """
        left = at_most
        while left:
            view = buffer[:left]
            self._source.begin_piece(len(view), came=self._came, may_cut=not self.is_chunked)
            failure = None
            try:
                self._fill(view)
            except FetchError as err:
                failure = err
            except (OSError, http.client.HTTPException) as err:
                failure = _error_of(err, self._watch)
                failure.__cause__ = err
            is_cut = self._source.end_piece()
            if self._came:
                yield view[: self._came]
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure  # with its traceback, which holds this frame
            if self._came < len(view) and not is_cut:
                return
            left -= self._came

    def _fill(self, view: memoryview) -> None:
        """Read until the view is full, the piece is cut or the body ends; `_came` says how much came.

        So it does after an error.
        """
        self._came = 0
        if self.is_chunked:
            self._fill_from_chunks(view)
            return
        if self._response.isclosed():  # at the end of the body
            return
        buffer = self._response.fp
        start = buffer.tell()
        try:
            self._came = self._response.readinto(view)
        except BaseException:
            self._came = buffer.tell() - start  # all that left the buffer is body, and stands in the view
            raise

    def _fill_from_chunks(self, view: memoryview) -> None:
        while self._came < len(view):
            room = len(view) - self._came
            piece = self._response.read1(room)
            if not piece:
                return
            if len(piece) > room:  # http.client takes a chunk's size of -1 for "whatever there is"
                raise http.client.IncompleteRead(b"")
            view[self._came : self._came + len(piece)] = piece
            self._came += len(piece)
            if self._source.cut(self._watch.clock()):
                return


class _Response(http.client.HTTPResponse):
    """http.client's, which takes 100 for the interim answer that it is, but not its likes."""

    def begin(self) -> None:
        """Read the header of the final answer (RFC 9110, 15.2; 101 is final: nobody asked for it)."""
        super().begin()
        while 101 < self.status < 200:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()


class _Source(io.RawIOBase):
    """What http.client reads one answer from: the socket, under deadlines and budgets."""

    def __init__(self, sock: socket.socket, watch: Watch) -> None:
        self.position = 0  # bytes received for this answer
        self.leftover = 0  # those of them that did not belong to it
        self._sock = sock
        self._watch = watch
        self._limits = watch.limits
        self._quota = int(self._limits.min_bytes_per_second * self._limits.read_seconds)
        self._phase = "headers"
        self._budget = MAX_HEAD_BYTES
        self._window_ends = watch.clock() + self._limits.read_seconds
        self._window_bytes = 0
        self._piece_start = 0  # the position
        self._piece_due = 0.0  # when it is cut
        self._piece_ended = 0.0
        self._may_cut = self._is_cut = False

    def makefile(self, mode: str) -> _Buffer:
        """Return what http.client takes for the socket's file; closing it leaves the socket alone."""
        return _Buffer(self, _BUFFER_BYTES)

    def begin_piece(self, size: int, *, came: int, may_cut: bool) -> None:
        """Get ready for `size` bytes of body, after a piece with `came` of them.

        What the caller did since then is not the server's slowness. `may_cut` lets `readinto` end the piece.
        """
        now = self._watch.clock()
        budget = _CODED_PER_BYTE * size + MAX_HEAD_BYTES
        if self._phase == "body":
            self._budget = min(budget, self._budget + _CODED_PER_BYTE * came)
            self._window_ends += now - self._piece_ended
        else:
            self._phase, self._budget = "body", budget
            self._begin_window(now)
        self._piece_start, self._piece_due = self.position, now + PIECE_SECONDS
        self._may_cut, self._is_cut = may_cut, False

    def end_piece(self) -> bool:
        """Tell whether the piece was cut: there may be more."""
        self._piece_ended = self._watch.clock()
        return self._is_cut

    def cut(self, now: float) -> bool:
        """Tell whether the piece has to do with what came of it."""
        self._is_cut = now >= self._piece_due and self.position > self._piece_start
        return self._is_cut

    def _begin_window(self, now: float) -> None:
        self._window_ends = now + self._limits.read_seconds
        self._window_bytes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how many bytes were received, from which the buffer counts back."""
        return self.position

    def readinto(self, buffer: WriteableBuffer) -> Optional[int]:
        """Receive what there is, as much as fits; None, at which the buffer returns what it has, is a cut."""
        view = cast(memoryview, buffer)
        if self._budget <= 0:
            raise self._too_much()
        now = self._watch.clock()
        if self._may_cut and self.cut(now):
            return None
        most = min(len(view), self._budget)
        try:
            count = on_socket(self._sock, lambda: self._sock.recv_into(view, most), self._patience(now))
        except socket.timeout:
            raise self._too_slow() from None
        self.position += count
        self._budget -= count
        self._window_bytes += count
        return count

    def _patience(self, now: float) -> float:
        """Return how long the next bytes may take (seconds)."""
        if self._phase == "body" and self._window_bytes >= self._quota:
            if now < self._window_ends:
                return self._watch.allow(self._limits.read_seconds)
            self._begin_window(now)
        elif now >= self._window_ends:
            raise self._too_slow()
        return self._watch.allow(self._window_ends - now)

    def _too_slow(self) -> FetchTimeout:
        seconds = self._limits.read_seconds
        if self._phase == "headers":
            found = f"the header of the answer was not complete ({self.position} bytes)"
        else:
            least = f"{self._limits.min_bytes_per_second} a second are the least"
            found = f"only {self._window_bytes} more bytes of the body came ({least})"
        return self._watch.timeout(self._phase, seconds, found)

    def _too_much(self) -> FetchError:
        if self._phase == "headers":
            return self._watch.error(f"the header of the answer has more than {MAX_HEAD_BYTES} bytes")
        return self._watch.error("the body has far more coding (chunk extensions, trailers) than bytes")


class _Buffer(io.BufferedReader):
    """The buffer between a source and http.client, which closes it at the end of the body."""

    def close(self) -> None:
        """Leave word of bytes after that end."""
        if not self.closed:
            source = cast(_Source, self.raw)
            source.leftover = source.position - self.tell()
        super().close()


def _error_of(err: Exception, watch: Watch) -> FetchError:
    """Return the FetchError for what a socket or http.client raised."""
    if isinstance(err, http.client.RemoteDisconnected):
        return watch.error("the connection was closed without an answer", is_transient=True)
    if isinstance(err, http.client.IncompleteRead):
        return watch.error("the body broke off, or its chunked coding is invalid", is_transient=True)
    if isinstance(err, http.client.BadStatusLine) and str(err).startswith(_TLS_ALERT):
        message = str(watch.error("expected an HTTP/1.1 answer, found TLS: the origin wants https"))
        return TLSFailed(message, url=watch.url, problem=TLS_WANTED)
    if isinstance(err, http.client.HTTPException):
        found = f"{type(err).__name__}: {shown(str(err))}"
        is_other = isinstance(err, (http.client.BadStatusLine, http.client.UnknownProtocol))
        why = f"expected an HTTP/1.1 answer, found something else ({found})"
        return watch.error(why, problem=NO_HTTP if is_other else "")
    return broken(watch, err)
