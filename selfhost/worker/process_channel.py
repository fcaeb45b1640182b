"""How the status server's process and its host talk: JSON, with bytes and a descriptor where needed.

Over a pair of connected UNIX sockets, which carry descriptors. Nothing here blocks: what the other side does
not take now waits in memory, so whoever sends asks `has_unsent` first. Only plain values travel; the package
may have another name on the other side.

Sharing: each end belongs to one thread.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

from .content import Descriptor

_PREFIX = struct.Struct("!II?")  # bytes of the JSON, bytes of the body, whether a descriptor belongs to it
_PIECE_BYTES = 256 * 1024  # one read
_MAX_DESCRIPTORS = 16  # in one read; the kernel ends it after those that were sent together
# A host at its limit of descriptors on their way (RLIMIT_NOFILE) is told so; they go when they are received.
_LATER = (errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ETOOMANYREFS)


class Message(NamedTuple):
    """One message; the descriptor is the receiver's own."""

    head: Mapping[str, Any]
    body: bytes = b""
    descriptor: Optional[Descriptor] = None


class Channel:
    """One end of the connection; owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._unsent: deque[tuple[memoryview, Optional[Descriptor]]] = deque()
        self._received = bytearray()
        self._descriptors: deque[Descriptor] = deque()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for the other side to read."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Send a message after those before it, now or with a `flush`; OSError if nobody is there."""
        head = json.dumps(message.head).encode()
        prefix = _PREFIX.pack(len(head), len(message.body), message.descriptor is not None)
        self._unsent.append((memoryview(prefix + head), message.descriptor))
        if message.body:
            self._unsent.append((memoryview(message.body), None))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes; OSError if nobody is there."""
        while self._unsent:
            data, descriptor = self._unsent[0]
            try:
                if descriptor is None:
                    sent = self.sock.send(data)
                else:  # it goes with the first of the bytes, and is not sent again with the others
                    sent = socket.send_fds(self.sock, [data], [descriptor.fd])
            except OSError as error:
                if error.errno in _LATER:
                    return
                raise
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = data[sent:], None

    def receive(self) -> list[Message]:
        """Return the messages that have come whole since the last time; EOFError if there will be no more."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _PIECE_BYTES, _MAX_DESCRIPTORS)
        except (BlockingIOError, InterruptedError):
            return []
        except ConnectionError:
            data, fds = b"", []
        self._descriptors.extend(map(Descriptor, fds))
        if not data:
            raise EOFError
        self._received += data
        return list(self._complete())

    def _complete(self) -> Iterator[Message]:
        while len(self._received) >= _PREFIX.size:
            head_bytes, body_bytes, has_descriptor = _PREFIX.unpack_from(self._received)
            start = _PREFIX.size + head_bytes
            if len(self._received) < start + body_bytes:
                return
            head = json.loads(self._received[_PREFIX.size : start])
            with memoryview(self._received) as view:
                body = bytes(view[start : start + body_bytes])
            del self._received[: start + body_bytes]
            yield Message(head, body, self._descriptors.popleft() if has_descriptor else None)

    def close(self) -> None:
        """Close the socket, and what was received with it and never taken."""
        self.sock.close()
        self._unsent.clear()
        self._descriptors.clear()


def open_pidfd(pid: int) -> Optional[Descriptor]:
    """Return what becomes readable when a process ends, or None where the system has no such thing."""
    try:
        return Descriptor(os.pidfd_open(pid))
    except (AttributeError, OSError):
        return None
