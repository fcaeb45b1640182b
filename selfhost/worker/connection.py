"""One client of the status server: request heads in, prepared answers out, never blocking.

A connection shakes hands (under TLS, see tls_connection.py), reads (waits for a head), sends (an answer is on
its way) or lingers: a refusal is sent, and what the client still sends is thrown away for a moment, because
closing a socket with unread input makes the kernel send RST, which can overtake the refusal (RFC 9112 section
9.6). Each state has a deadline, which the event loop enforces. Used by that loop's thread only.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import TYPE_CHECKING, Optional

from .._threads import log_safely
from . import http1
from .answer import METHOD_NOT_ALLOWED, Answer, render_fields, text_answer
from .content import Content, Descriptor
from .poller import READ, WRITE

if TYPE_CHECKING:
    from .artifacts import Artifact
    from .event_loop import EventLoop

logger = logging.getLogger(__name__)

RECEIVE_BYTES = 16 * 1024  # one recv: a whole record of TLS, so that none waits where no poller sees it
SINGLE_SEND_BYTES = 64 * 1024  # up to here the body is copied behind its header and leaves in one send
# From here on sendfile, which hands over pages: below, copying out of the processor's cache is up to twice
# as fast, at 2 MB equal, at 17 MB a third slower (Linux 6.18, loopback).
SENDFILE_BYTES = 2 * 1024 * 1024
STEP_BYTES = 1024 * 1024  # one sendfile call
TURN_BYTES = 4 * STEP_BYTES  # then the next client has its turn
COPY_BYTES = 256 * 1024  # one read of a held file
PIPELINED_PER_TURN = 16  # requests
LINGER_BYTES = 256 * 1024  # thrown away after a refusal, at most

_CLOSE = b"Connection: close\r\n"

# Clients send the same head again and again; strictness then costs one dictionary look-up. Of plain GETs the
# loop keeps: head -> its target, and what the answer says of the connection.
_KNOWN_HEADS = 256
_KNOWN_HEAD_BYTES = 1024
_UNKNOWN = ("", b"")  # no target is empty

SHAKING_HANDS, READING, SENDING, LINGERING, CLOSED = range(5)
_MORE = getattr(socket, "MSG_MORE", 0)  # the header waits for the first of the body: one packet less


class Connection:
    """A client; `deadline` (monotonic seconds) is when its present state has lasted too long.

    `since` is when it began to wait for a request: its first, or the one after the last answer.
    """

    __slots__ = (
        "_close_after", "_content", "_end", "_in_head", "_interest", "_linger_bytes", "_loop", "_out",
        "_position", "_received", "_sealed", "_send_until", "_state", "deadline", "since", "sock",
    )  # fmt: skip
    copy_bytes = COPY_BYTES  # what a connection may hold of a file
    turn_bytes = TURN_BYTES
    uses_sendfile = True

    def __init__(self, loop: EventLoop, sock: socket.socket, now: float) -> None:
        self._loop = loop
        self.sock = sock
        self.since = now
        self.deadline = now + loop.limits.idle_seconds
        self._state = READING
        self._interest = 0  # what the poller waits for; 0: not registered
        self._received = b""
        self._in_head = False  # part of a head has come, its deadline runs
        self._out = memoryview(b"")  # sent before the rest of the content
        self._content: Optional[Content] = None
        self._sealed: Optional[Descriptor] = None  # of the content, for sendfile
        self._position = self._end = 0  # of the content
        self._send_until = 0.0
        self._close_after = False
        self._linger_bytes = 0  # what to throw away at most, once the answer is sent

    @property
    def is_sending(self) -> bool:
        """Whether an answer is on its way."""
        return self._state == SENDING

    def on_event(self, now: float) -> None:
        """Go on with what this connection was waiting for; whatever fails, fails for this client alone."""
        try:
            if self._state == READING:
                self._receive(now)
            elif self._state == SENDING:
                if self._pump(now):
                    self._serve(now)
            elif self._state == LINGERING:
                self._discard()
        except OSError as error:  # the client is gone, or the content is no longer what was hashed
            self.close()
            self._loop.report(error)
        except Exception:  # noqa: BLE001 - of whatever kind
            self.close()
            log_safely(logger, logging.ERROR, "a request failed unexpectedly", exc_info=True)

    # -------------------------------------------------------------- reading

    def _receive(self, now: float) -> None:
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            self._watch(READ)
            return
        if not self._received and self._answer_known(data, now):
            return
        if not data:
            self.close()
            return
        self._received += data
        self._serve(now)

    def _answer_known(self, head: bytes, now: float) -> bool:
        """Answer a whole head that came before and asks for a file in memory, or return False.

        The path of nearly every request, and kept short for that.
        """
        target, connection_field = self._loop.known_heads.get(head, _UNKNOWN)
        artifact = self._loop.site.registry.lookup(target)
        data: Optional[bytes] = artifact.content.data if artifact is not None else None
        if artifact is None or data is None or self._loop.is_closing:
            return False
        if len(data) > SINGLE_SEND_BYTES:
            self._begin_known(artifact, connection_field, now)
            return True
        answer = b"".join((self._loop.ok_head, connection_field, artifact.head, data))
        try:
            sent = self.sock.send(answer)
        except (BlockingIOError, InterruptedError):
            sent = 0
        counters = self._loop.counters
        counters.requests[200] += 1  # as it was counted when the head came first
        counters.sent_bytes += sent
        if sent < len(answer):
            self._out = memoryview(answer)[sent:]
            self._close_after = bool(connection_field)
            if self._begin(now):
                self._await_head(now)
        elif connection_field:
            self.close()
        else:
            self.since = now
            self.deadline = now + self._loop.limits.idle_seconds
            self._watch(READ)
        return True

    def _begin_known(self, artifact: Artifact, connection_field: bytes, now: float) -> None:
        """Begin the answer where the file is too large to be copied behind its header."""
        self._loop.counters.requests[200] += 1
        self._out = memoryview(b"".join((self._loop.ok_head, connection_field, artifact.head)))
        self._content, self._end = artifact.content, artifact.content.size
        self._close_after = bool(connection_field)
        if self._begin(now):
            self._await_head(now)

    def _serve(self, now: float) -> None:
        """Answer the heads that have come, until one is incomplete or an answer has to wait."""
        for _ in range(PIPELINED_PER_TURN):
            end = self._received.find(b"\r\n\r\n") + 4
            if end == 3:
                self._await_head(now)
                return
            head, self._received = self._received[:end], self._received[end:]
            self._in_head = False
            if not self._serve_one(head, now):
                return
        self._state = SENDING  # nothing, in fact: the others first, then the rest of the pipeline
        self.deadline = now + self._loop.limits.stall_seconds
        self._watch(WRITE)

    def _await_head(self, now: float) -> None:
        limits = self._loop.limits
        fault = http1.fault_so_far(self._received, limits.max_head_bytes)
        if fault is not None:
            self._refuse(fault, now)
            return
        if self._loop.is_closing:
            self.close()
            return
        if not self._received:
            self.deadline = now + limits.idle_seconds
        elif not self._in_head:  # from its first byte on: dripping wins no time
            self._in_head = True
            self.deadline = now + limits.head_seconds
        self._state = READING
        self._watch(READ)

    def _serve_one(self, head: bytes, now: float) -> bool:
        """Answer one head; tell whether the answer has left whole and the connection goes on."""
        try:
            if len(head) > self._loop.limits.max_head_bytes:
                raise http1.too_large(self._loop.limits.max_head_bytes)
            request = http1.parse_head(head)
        except http1.BadRequest as fault:
            return self._refuse(fault, now)
        self._close_after = not request.keep_alive or self._loop.is_closing
        answer = self._loop.site.answer(request.method, request.target, request.fields)
        # A hit: whoever is not let in is asked for the token each time.
        if request.is_plain and answer.content is not None and len(head) <= _KNOWN_HEAD_BYTES:
            self._remember(head, request)
        return self._send(answer, request, now)

    def _remember(self, head: bytes, request: http1.Request) -> None:
        known = self._loop.known_heads
        if len(known) >= _KNOWN_HEADS:
            known.clear()
        known[head] = request.target, b"" if request.keep_alive else _CLOSE

    def _refuse(self, fault: http1.BadRequest, now: float) -> bool:
        """Answer what is not understood, then close: what follows it has no meaning any more."""
        self._close_after = True
        self._linger_bytes = LINGER_BYTES
        answer = METHOD_NOT_ALLOWED if fault.status == 405 else text_answer(fault.status, fault.reason)
        return self._send(answer, None, now)

    # -------------------------------------------------------------- sending

    def _send(self, answer: Answer, request: Optional[http1.Request], now: float) -> bool:
        self._loop.counters.count(answer.status)
        parts = [self._loop.status_head(answer.status)]
        if self._close_after:
            parts.append(_CLOSE)
        elif request is not None and request.http_1_0:
            parts.append(b"Connection: keep-alive\r\n")
        parts.append(render_fields(answer.fields))
        parts.append(b"\r\n")
        if request is None or request.method != "HEAD":
            parts.append(answer.body)
            self._take_content(answer, parts)
        self._out = memoryview(b"".join(parts))
        return self._begin(now)

    def _take_content(self, answer: Answer, parts: list[bytes]) -> None:
        """Put a small body behind the header; remember a large one, to be sent from where it lies."""
        if answer.content is None:
            return
        if answer.stop - answer.start <= SINGLE_SEND_BYTES:
            parts.append(answer.content.read(answer.start, answer.stop))
        else:
            self._content, self._position, self._end = (answer.content, answer.start, answer.stop)
            if self.uses_sendfile and self._end - self._position >= SENDFILE_BYTES:
                self._sealed = answer.content.sealed()

    def _begin(self, now: float) -> bool:
        limits = self._loop.limits
        self._state = SENDING
        self.deadline = now + limits.stall_seconds
        self._send_until = self.deadline + (self._end - self._position) / limits.min_bytes_per_second
        return self._pump(now)

    def _pump(self, now: float) -> bool:
        """Send as much as the client takes, one turn's worth at most; tell whether all has left."""
        budget = turn = self.turn_bytes
        try:
            while budget > 0 and (self._out or self._position < self._end):
                budget -= self._send_some()
        except (BlockingIOError, InterruptedError):
            pass
        self._loop.counters.sent_bytes += turn - budget
        if self._out or self._position < self._end:
            if budget < turn:
                self.deadline = min(now + self._loop.limits.stall_seconds, self._send_until)
            self._watch(WRITE)
            return False
        return self._finish(now)

    def _send_some(self) -> int:
        """Send what one system call takes, and return how many bytes that were."""
        sent = self._send_once()
        of_out = min(sent, len(self._out))
        self._out = self._out[of_out:]
        self._position += sent - of_out
        return sent

    def _send_once(self) -> int:
        content = self._content
        if content is None or self._position == self._end:
            return self.sock.send(self._out)
        if self._sealed is not None:
            return self.sock.send(self._out, _MORE) if self._out else self._send_file(self._sealed.fd)
        data: Optional[bytes] = content.data
        if data is not None:
            return self.sock.sendmsg((self._out, memoryview(data)[self._position : self._end]))
        if not self._out:
            start, self._position = self._position, min(self._position + self.copy_bytes, self._end)
            self._out = memoryview(content.read(start, self._position))
        return self.sock.send(self._out, _MORE if self._position < self._end else 0)

    def _send_file(self, fd: int) -> int:
        step = min(self._end - self._position, STEP_BYTES)
        sent = os.sendfile(self.sock.fileno(), fd, self._position, step)
        if not sent:
            raise OSError(errno.EIO, "sendfile sent nothing of pinned content")
        return sent

    def _finish(self, now: float) -> bool:
        self._content = self._sealed = None
        self._position = self._end = 0
        if not self._close_after:
            self.since = now
            return True
        if self._linger_bytes:
            self._linger(now)
        else:
            self.close()
        return False

    # -------------------------------------------------------------- the end

    def _linger(self, now: float) -> None:
        self.sock.shutdown(socket.SHUT_WR)
        self._state = LINGERING
        self.deadline = now + self._loop.limits.linger_seconds
        self._watch(READ)

    def _discard(self) -> None:
        try:
            data = self.sock.recv(LINGER_BYTES)
        except (BlockingIOError, InterruptedError):  # the loop's end looks at every connection
            return
        self._linger_bytes -= len(data)
        if not data or self._linger_bytes <= 0:
            self.close()

    def close(self) -> None:
        """Close the socket and forget the client; harmless when repeated."""
        if self._state != CLOSED:
            self._state = CLOSED
            self._content = self._sealed = None
            self._out = memoryview(b"")
            self._loop.forget(self, watched=self._interest != 0)
            self.sock.close()

    def _watch(self, interest: int) -> None:
        if interest != self._interest:
            self._loop.watch(self, interest, known=self._interest != 0)
            self._interest = interest
