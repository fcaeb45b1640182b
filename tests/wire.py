"""A server that sends exactly the bytes it is told to, for tests of what a transport makes of them."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from typing import Any, Callable, Optional, Union

SECONDS = 10.0  # for what takes milliseconds unless it is broken

Play = Callable[[socket.socket, threading.Event], Any]  # Event: the server is closing
Answer = Union[bytes, Play]


def ok(body: bytes = b"", *lines: str, status: str = "200 OK") -> bytes:
    """Return an answer with a Content-Length."""
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def head(*lines: str, status: str = "200 OK") -> bytes:
    """Return the header of an answer."""
    return "\r\n".join((f"HTTP/1.1 {status}", *lines, "", "")).encode("latin-1")


def part(first: int, body: bytes, total: int, *lines: str) -> bytes:
    """Return a 206 that brings `body` from `first` on."""
    content_range = f"Content-Range: bytes {first}-{first + len(body) - 1}/{total}"
    return ok(body, content_range, *lines, status="206 Partial Content")


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a chunked answer."""
    coded = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head("Transfer-Encoding: chunked") + coded + end


def closing(data: bytes) -> Play:
    """Send bytes, then end the connection."""

    def play(sock: socket.socket, _: threading.Event) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_RDWR)

    return play


def resetting(data: bytes, *, after: Optional[threading.Event] = None) -> Play:
    """Send bytes, wait until they are read, then break the connection."""

    def play(sock: socket.socket, _: threading.Event) -> None:
        sock.sendall(data)
        if after is not None:
            after.wait(SECONDS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    return play


def silent_after(data: bytes = b"") -> Play:
    """Send bytes, then nothing more."""

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(data)
        closing.wait(SECONDS)

    return play


def endless(start: bytes, again: bytes, *, every: float = 0.0) -> Play:
    """Send bytes, then others until somebody hangs up, with a pause of `every` seconds."""

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(start)
        while not closing.wait(every):
            sock.sendall(again)

    return play


class WireServer:
    """Plays one answer for each request, over all connections; the last one again and again.

    `requests` holds the head of each request, `connections` counts, and so does `handshakes` with `tls`.
    """

    def __init__(
        self,
        *answers: Answer,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Optional[ssl.SSLContext] = None,
    ) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.handshakes = 0
        self._answers = list(answers)
        self._tls = tls
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}/f"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(SECONDS)
                self.connections += 1
                self._sockets.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
                stack.callback(sock.close)
                self.handshakes += 1
            while self._answer_one(sock):
                pass

    def _answer_one(self, sock: socket.socket) -> bool:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            data = sock.recv(65536)
            if not data:
                return False
            request += data
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if callable(answer):
            answer(sock, self._closing)
            return False
        sock.sendall(answer)
        return True

    def hang_up(self) -> None:
        """End all connections, and wait for that."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(SECONDS)

    def close(self) -> None:
        """Stop listening, end all connections and threads."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(SECONDS)
        self._listener.close()
        self.hang_up()

    def __enter__(self) -> WireServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
