"""What is different for a client of the status server under TLS; imports `ssl`, so it is loaded only then.

The handshake is the first state of the connection, under a deadline of its own, and like all others it never
blocks. Until it has succeeded nothing that the client sends is read as a request. Who fails it, by its
certificate or by speaking plain HTTP, gets an alert and is hung up on. Large answers are encrypted
piece by piece out of the pinned content: a connection holds at most one piece, and sendfile cannot be used.

Changed files count for new connections; those that are open go on with what they were opened with.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .._threads import log_safely
from ..errors import SettingsError
from .connection import LINGER_BYTES, READING, SHAKING_HANDS, Connection
from .poller import READ, WRITE
from .tls import TlsFiles

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from .event_loop import EventLoop

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # between two looks at the files, which happen only while clients come
# One send. OpenSSL tells of no progress within it, so at the least rate it must end before a client counts
# as stalled; four records.
PIECE_BYTES = 64 * 1024
TURN_BYTES = 4 * PIECE_BYTES  # encryption takes a third of a millisecond for that, and others wait meanwhile

_NO_TLS = ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "WRONG_VERSION_NUMBER")  # what came is no record of TLS
_ALERT = b"\x15\x03\x01\x00\x02\x02\x0a"  # fatal, unexpected_message (RFC 8446 section 6)


class TlsPort:
    """Makes connections out of accepted sockets, and notices when the files change; SettingsError."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamps = files.stamps()  # before the context: what changes in between is read once more
        self._context = _context(files)
        self._is_stale = False  # the files have changed, and could not be used
        self._check_at = 0.0

    def connect(self, loop: EventLoop, sock: socket.socket, now: float) -> Connection:
        """Return the connection of a client; OSError if it has gone already."""
        if now >= self._check_at:
            self._check_at = now + CHECK_SECONDS
            self._renew()
        sock.getpeername()  # where this fails, wrapping would, and leave its socket to the garbage collector
        wrapped = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return TlsConnection(loop, wrapped, now)

    def _renew(self) -> None:
        before, self._stamps = self._stamps, self._files.stamps()
        has_changed = self._stamps != before
        if not has_changed and not self._is_stale:
            return
        try:
            self._context = _context(self._files)
            self._is_stale = False
            log_safely(logger, logging.INFO, "new clients get the changed certificate %r", self._files.cert)
        except SettingsError as error:
            self._is_stale = True  # read at each look: what is missing may be no part of the stamps
            level = logging.WARNING if has_changed else logging.DEBUG  # one warning for each change
            log_safely(logger, level, "the last good certificate stays in use: %s", error)


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = files.context()
    context.sslsocket_class = TlsSocket
    return context


class TlsSocket(ssl.SSLSocket):
    """TLS for a connection that knows plain sockets: the same errors where it waits or the client fails."""

    wants = 0  # what the last call waits for, READ or WRITE: under TLS either may need either; 0: nothing

    def do_handshake(self, block: bool = False) -> None:
        """Go on with the handshake; BlockingIOError until it has succeeded."""
        self.wants = 0
        try:
            super().do_handshake(block)
        except ssl.SSLError as error:
            if error.reason in _NO_TLS:  # then OpenSSL itself says nothing
                with contextlib.suppress(OSError):
                    socket.socket.send(self, _ALERT)
            raise self._plain(error) from None

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        """Receive from one record; b"" at the end, whether the client said goodbye or not."""
        self.wants = 0
        try:
            return super().recv(size, flags)
        except ssl.SSLError as error:
            raise self._plain(error) from None

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Send at most a piece. After BlockingIOError the next call must begin with the same data."""
        self.wants = 0
        try:
            return super().send(memoryview(data)[:PIECE_BYTES])  # flags are for plain sockets
        except ssl.SSLError as error:
            raise self._plain(error) from None

    def sendmsg(self, buffers: Iterable[ReadableBuffer]) -> int:  # type: ignore[override]
        """Send the first of them that is not empty, at most a piece; see `send`."""
        return self.send(next(view for view in (memoryview(data) for data in buffers) if view))

    def shutdown(self, how: int) -> None:
        """End TLS, then the connection in the direction `how`; what still comes is received as it is."""
        self.say_goodbye()
        super().shutdown(how)

    def say_goodbye(self) -> None:
        """Tell the client that this is the end and nothing was cut off, if that can be sent at once."""
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()

    def _plain(self, error: ssl.SSLError) -> OSError:
        if isinstance(error, ssl.SSLWantReadError):
            self.wants = READ
        elif isinstance(error, ssl.SSLWantWriteError):
            self.wants = WRITE
        else:
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            return ConnectionAbortedError(errno.ECONNABORTED, reason)
        return BlockingIOError(errno.EAGAIN, "TLS waits")


class TlsConnection(Connection):
    """A client under TLS."""

    __slots__ = ()
    copy_bytes = PIECE_BYTES
    turn_bytes = TURN_BYTES
    uses_sendfile = False
    sock: TlsSocket

    def __init__(self, loop: EventLoop, sock: ssl.SSLSocket, now: float) -> None:
        super().__init__(loop, sock, now)
        self._state = SHAKING_HANDS
        self.deadline = now + loop.limits.handshake_seconds

    def on_event(self, now: float) -> None:
        """Shake hands first, then go on as every connection does."""
        if self._state != SHAKING_HANDS or self._shake_hands(now):
            super().on_event(now)

    def _shake_hands(self, now: float) -> bool:
        """Go on with the handshake; tell whether it is over and went well."""
        try:
            self.sock.do_handshake()
        except BlockingIOError:
            self._watch(READ)
            return False
        except (OSError, ValueError) as error:
            self._part(now)
            log_safely(logger, logging.DEBUG, "a TLS handshake failed: %s", str(error))
            return False
        self._state = READING
        self.deadline = now + self._loop.limits.idle_seconds
        return True

    def _part(self, now: float) -> None:
        """Leave the client time to read why: closing at once could reset the connection before it has."""
        try:
            self._linger_bytes = LINGER_BYTES
            self._linger(now)
            self._loop.counters.handshake_failures += 1
        except OSError:
            self.close()

    def _watch(self, interest: int) -> None:
        super()._watch(self.sock.wants or interest)

    def close(self) -> None:
        """Say goodbye, unless an answer is cut off, and close; harmless when repeated."""
        if self._state == SHAKING_HANDS:
            self._loop.counters.handshake_failures += 1
        elif not self._out and self._position == self._end:
            self.sock.say_goodbye()
        super().close()
