"""The thread behind the status server: waits for sockets, hands events to connections, enforces deadlines.

Sleeps without a timeout while nobody is connected, so an idle server costs its host nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Callable, Optional

from .._threads import log_safely, start_thread
from ..settings import ServerLimits
from .connection import RECEIVE_BYTES, Connection
from .counters import ServerCounters
from .poller import READ, new_poller
from .site import Site
from .tls import TlsFiles

logger = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 64
LAST_ACCEPTS = 1024  # in the last one: more than the listener's backlog holds
SWEEP_SECONDS = 0.5  # how late a deadline may be noticed
STALLED_SECONDS = 1.0  # without taking a byte, and a client makes room for others if there is none left
PAUSE_SECONDS = 0.2  # before the next try when the process has no descriptor or memory left
WARNING_SECONDS = 60.0  # between two warnings of that
GIVEN_BACK = 8  # one of so many clients makes room each time that there is no descriptor left
LEAST_CONNECTIONS = 16  # however few descriptors the process may have

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nServer: selfhost\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)


class EventLoop:
    """Serve `listener` until `stop`, on a thread of its own.

    Owns every socket from here on; `close_descriptors` is for one that never ran. Raises SettingsError for
    `tls` files that cannot be used.
    """

    def __init__(
        self, site: Site, listener: socket.socket, limits: ServerLimits, tls: Optional[TlsFiles] = None
    ) -> None:
        self.site = site
        self.limits = limits
        self.max_connections = _affordable(limits.max_connections)
        self.counters = ServerCounters()
        self._connect = _connector(tls)
        self._busy = _BUSY if tls is None else b""  # before a handshake nothing can be said
        self.bound: tuple[str, int] = listener.getsockname()[:2]
        self.connections: set[Connection] = set()
        self.is_closing = False
        self._listener: Optional[socket.socket] = listener
        self._accept_at: Optional[float] = None  # while accepting pauses: when to go on
        self._warn_at = 0.0  # not before: of descriptors or memory that are missing
        self.known_heads: dict[bytes, tuple[str, bytes]] = {}  # kept by the connections
        self._access_version = 0 if site.access is None else site.access.version
        self._stop_at = float("inf")
        self._sweep_at = 0.0
        self._date = ""
        self._date_until = 0.0
        self._renew_date(time.monotonic())
        self._thread = threading.Thread(target=self._run, name="selfhost-status-server", daemon=True)
        self._handlers: dict[int, Callable[[float], None]] = {}  # by descriptor; called with the loop's time
        self._poller = new_poller()
        try:
            self._wake_receiver, self._wake_sender = socket.socketpair()
        except BaseException:
            self._poller.close()
            raise
        try:
            self._wake_receiver.setblocking(False)
            self._handle(listener, self._accept)
            self._handle(self._wake_receiver, self._woken)
        except BaseException:
            self.close_descriptors()
            raise

    def start(self) -> None:
        """Serve on a thread of its own; RuntimeError where the system has none to give."""
        try:
            start_thread(self._thread)
        except BaseException:  # of a signal handler of the host's: then the thread runs
            self.stop(0)
            raise

    def stop(self, timeout: float) -> None:
        """End the thread, after at most `timeout` seconds for the answers on their way."""
        self._stop_at = time.monotonic() + timeout
        self.is_closing = True
        try:
            self._wake_sender.send(b"x", getattr(socket, "MSG_NOSIGNAL", 0))
        except OSError:  # the thread has ended by itself
            pass
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout + 2 * SWEEP_SECONDS)
            if self._thread.is_alive():
                logger.warning("the status server's thread did not end within %.1f s", timeout)

    def free_port(self) -> None:
        """Let others listen there, should the thread not have ended: the host's callback may never come back.

        The socket stays the thread's, which closes it. Not for one that another process has, too.
        """
        listener = self._listener
        if listener is not None:
            with contextlib.suppress(OSError):  # not every system can, or the thread has closed it just now
                listener.shutdown(socket.SHUT_RDWR)

    def close_descriptors(self) -> None:
        """Close every socket; for the thread's own end, and for a forked child, which has no such thread."""
        for connection in list(self.connections):
            connection.sock.close()
        self.connections.clear()
        self.counters.open_connections = 0
        self._poller.close()
        for sock in (self._listener, self._wake_receiver, self._wake_sender):
            if sock is not None:
                sock.close()

    # -------------------------------------------------------------- the thread

    def _run(self) -> None:
        """Serve until `stop`."""
        try:
            while not self._is_done():
                try:
                    self._turn()
                except BaseException:  # noqa: BLE001 - must not take the server down, whatever it is
                    message = "the status server goes on after an unexpected error"
                    log_safely(logger, logging.ERROR, message, exc_info=True)
                    time.sleep(PAUSE_SECONDS)
        finally:
            self.close_descriptors()

    def _is_done(self) -> bool:
        if not self.is_closing:
            return False
        is_idle = self._listener is None and not self.connections
        return is_idle or time.monotonic() >= self._stop_at

    def _turn(self) -> None:
        busy = self.connections or self.is_closing or self._accept_at is not None
        events = self._poller.poll(SWEEP_SECONDS if busy else None)
        now = time.monotonic()
        self._renew_date(now)
        self._forget_heads_of_old_tokens()
        for fd, _ in events:
            handler = self._handlers.get(fd)
            if handler is not None:  # None: closed since, by another event of this turn
                handler(now)
        if now >= self._sweep_at:
            self._sweep(now)

    def _forget_heads_of_old_tokens(self) -> None:
        version = 0 if self.site.access is None else self.site.access.version
        if version != self._access_version:
            self._access_version = version
            self.known_heads.clear()

    def _handle(self, sock: socket.socket, handler: Callable[[float], None]) -> None:
        self._poller.register(sock.fileno(), READ)
        self._handlers[sock.fileno()] = handler

    def _unhandle(self, sock: socket.socket) -> None:
        del self._handlers[sock.fileno()]
        self._poller.unregister(sock.fileno())

    def _woken(self, now: float) -> None:
        self._wake_receiver.recv(16)
        self._accept(now, LAST_ACCEPTS)  # closing the listener would reset who has come already
        self._stop_accepting()
        for connection in list(self.connections):
            if not connection.is_sending:  # a request may have come already: it is still answered
                connection.on_event(now)
            if not connection.is_sending:
                connection.close()

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + SWEEP_SECONDS
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.close()
            log_safely(logger, logging.DEBUG, "a client was too slow and is disconnected")
        if self._accept_at is not None and now >= self._accept_at and self._listener is not None:
            self._handle(self._listener, self._accept)
            self._accept_at = None

    # -------------------------------------------------------------- accepting

    def _accept(self, now: float, most: int = ACCEPTS_PER_TURN) -> None:
        for number in range(most):
            if self._listener is None:
                return
            try:
                sock, _peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):  # nobody there, or gone again
                return
            except OSError as error:
                # A later one may mean that nobody is there: the system looks for a descriptor first.
                if number == 0 and not self.is_closing:
                    self._cannot_accept(error, now)
                return
            self.counters.accepted += 1
            sock.setblocking(False)
            if len(self.connections) < self.max_connections or self._make_room(now):
                self._admit(sock, now)
            else:
                self.counters.refused_busy += 1
                _turn_away(sock, self._busy)

    def _admit(self, sock: socket.socket, now: float) -> None:
        try:
            connection = self._connect(self, sock, now)
        except OSError:  # the client has gone already
            sock.close()
            return
        self.connections.add(connection)
        self.counters.open_connections = len(self.connections)
        self._forget_heads_of_old_tokens()  # it may have come later than this turn began
        connection.on_event(now)  # its request is often there already

    def _make_room(self, now: float) -> bool:
        """Close whoever has waited longest, else whoever has taken nothing for a while."""
        waiting = [connection for connection in self.connections if not connection.is_sending]
        if waiting:
            min(waiting, key=lambda connection: connection.since).close()
            return True
        slowest = min(self.connections, key=lambda connection: connection.deadline)
        if slowest.deadline > now + self.limits.stall_seconds - STALLED_SECONDS:
            return False
        slowest.close()
        return True

    def _give_back(self, now: float) -> bool:
        """Let go of some clients, whose descriptors are missing elsewhere; tell whether there were any."""
        share = -(-len(self.connections) // GIVEN_BACK)
        return sum(self._make_room(now) for _ in range(share)) > 0

    def _cannot_accept(self, error: OSError, now: float) -> None:
        """Make room, else look away from the listener for a moment: it would be ready again at once."""
        if now >= self._warn_at:  # it may last, and be met again at each turn
            self._warn_at = now + WARNING_SECONDS
            log_safely(logger, logging.WARNING, "the status server cannot accept a connection: %s", error)
        if error.errno in (errno.EMFILE, errno.ENFILE) and self._give_back(now):
            return
        if self._listener is not None:
            self._unhandle(self._listener)
            self._accept_at = now + PAUSE_SECONDS

    def _stop_accepting(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            if self._accept_at is None:
                self._unhandle(listener)
            self._accept_at = None
            listener.close()

    # -------------------------------------------------------------- for connections

    def status_head(self, status: int) -> bytes:
        """Return the status line and the fields that every answer has."""
        line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"
        return f"{line}\r\nServer: selfhost\r\nDate: {self._date}\r\n".encode()

    def _renew_date(self, now: float) -> None:
        if now >= self._date_until:
            self._date_until = now + 1.0
            self._date = formatdate(usegmt=True)
            self.ok_head = self.status_head(200)

    def report(self, error: OSError) -> None:
        """Log why an answer was cut off: at debug, unless it was the file and not the client."""
        level = logging.WARNING if error.errno in (errno.ESTALE, errno.EIO) else logging.DEBUG
        # As text: the error itself would keep the content.
        log_safely(logger, level, "an answer was cut off: %s", str(error))

    def watch(self, connection: Connection, interest: int, *, known: bool) -> None:
        """Wait for `interest` on the connection's socket."""
        fd = connection.sock.fileno()
        if known:
            self._poller.modify(fd, interest)
        else:
            self._poller.register(fd, interest)
            self._handlers[fd] = connection.on_event

    def forget(self, connection: Connection, *, watched: bool) -> None:
        """Drop a connection that is about to close its socket."""
        self.connections.discard(connection)
        self.counters.open_connections = len(self.connections)
        if watched:
            self._unhandle(connection.sock)


def _connector(tls: Optional[TlsFiles]) -> Callable[[EventLoop, socket.socket, float], Connection]:
    if tls is None:
        return Connection
    from .tls_connection import TlsPort  # imports ssl

    return TlsPort(tls).connect


def _affordable(most: int) -> int:
    """Return how many clients there may be where half of the process's descriptors stay the host's."""
    try:
        import resource
    except ImportError:  # not every system has such a limit
        return most
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    bounded = most if soft == resource.RLIM_INFINITY else min(most, max(soft // 2, LEAST_CONNECTIONS))
    if bounded < most:
        message = (
            "the status server takes at most %d connections instead of %d: the process may open %d files"
        )
        logger.info(message, bounded, most, soft)
    return bounded


def _turn_away(sock: socket.socket, message: bytes) -> None:
    with sock:
        try:
            sock.send(message)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(RECEIVE_BYTES)  # unread input would turn the close into a reset
        except OSError:
            pass
