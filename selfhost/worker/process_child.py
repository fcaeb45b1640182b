"""The status server's own process: `main` runs in an interpreter that has loaded nothing of the host's.

It serves the listener that it inherited, by the same event loop as the thread does, from a registry of its
own that the host fills over the control socket. It ends when told to, when that socket ends, and when the
host's process has ended, even if others still hold the socket's other end. It takes no signals: who stops a
whole service by signals means the host, which still has its cards to withdraw.

One thread serves, the other one listens to the host and is the only one to use the control socket. The host
asks now and then whether the first still turns: a file on a storage that hangs could hold it up.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Callable, Optional, cast

from ..card.checksum import Checksum
from ..errors import SelfHostError
from ..settings import ServerLimits
from .access import Access
from .artifacts import Registration, Row
from .connection import SENDFILE_BYTES
from .content import Content, HeldFile, MemoryContent
from .counters import ServerCounters
from .event_loop import EventLoop
from .process_channel import Channel, Message, open_pidfd
from .registry import MetadataArtifactRegistry
from .site import Site
from .tls import TlsFiles

_ROOT = __name__.partition(".")[0]  # the package, by the name that it has here
_MAX_RECORDS = 200  # of the log, waiting for the host
_WATCH_SECONDS = 1.0  # how late the host's end is noticed where the system cannot tell
SWITCH_SECONDS = 0.0005  # how long the thread that registers may keep the one that serves waiting
NICENESS = 2  # more than the host's: where both want one processor, it has six tenths of it
STALE_SECONDS = 10.0  # the host tells its endpoints' states once a second


def main(control_fd: int, listener_fd: int, host_pid: int) -> None:
    """Serve until the host is gone or says so."""
    _stand_alone()
    process = ServingProcess(socket.socket(fileno=control_fd), socket.socket(fileno=listener_fd), host_pid)
    try:
        process.run()
    except SelfHostError as error:  # a certificate that cannot be read now: the host logs it in a line
        sys.exit(str(error))
    finally:
        process.close()
    os._exit(0)  # nothing is left to tidy up


def _stand_alone() -> None:
    """Leave behind what a new program inherits, and allow ourselves what no guest of a host could."""
    import resource

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.nice(NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as group:
        group.write(str(NICENESS))  # where Linux shares processors out to sessions first
    sys.setswitchinterval(SWITCH_SECONDS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where a hard limit means less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class ServingProcess:
    """What this process does: it is told by the host, and serves."""

    def __init__(self, control: socket.socket, listener: socket.socket, host_pid: int) -> None:
        self._channel = Channel(control)
        self._listener = listener
        self._host_pid = host_pid
        self._host_end = open_pidfd(host_pid)
        self._log = _Log()
        self._states = HostStates()
        self._registry = MetadataArtifactRegistry()
        self._contents: dict[str, Content] = {}
        self._registrations: dict[str, Registration] = {}
        self._loop: Optional[AskedLoop] = None
        self._has_turned = False  # and the host is still to be told
        self._is_done = False

    def run(self) -> None:
        """Do as the host says, until there is no host."""
        while not self._is_done and os.getppid() == self._host_pid:  # another's child once the host is gone
            try:
                messages = self._wait()
            except EOFError:
                return
            number = max([self._apply(message) for message in messages], default=0)
            if number:
                self._channel.send(Message({"number": number, "counters": self._counters().as_dict()}))
            for record in self._log.taken():
                self._channel.send(Message(record))
            if self._has_turned:
                self._has_turned = False
                self._channel.send(Message({"turned": True}))
            self._channel.flush()

    def close(self) -> None:
        """Serve no more."""
        if self._loop is not None:
            self._loop.stop(0)

    def _wait(self) -> list[Message]:
        poller = select.poll()
        write = select.POLLOUT if self._channel.has_unsent else 0
        poller.register(self._channel.sock, select.POLLIN | write)
        poller.register(self._log.receiver, select.POLLIN)
        if self._host_end is not None:
            poller.register(self._host_end.fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(1000 * _WATCH_SECONDS if self._host_end is None else None)}
        return self._channel.receive() if self._channel.sock.fileno() in ready else []

    def _apply(self, message: Message) -> int:
        """Do what a message says; return its number if it has one, else 0."""
        head = message.head
        if "content" in head:
            self._contents[head["content"]] = _content(message)
        elif "add" in head:
            self._add(head)
        elif "remove" in head:
            self._registrations.pop(head["remove"]).close()
            for digest in head["forget"]:
                del self._contents[digest]
        elif "states" in head or "failure" in head:
            self._states.tell(head.get("states"), head.get("failure", ""))
        elif "options" in head:
            self._prepare(head["options"])
        elif "serve" in head and self._loop is not None:
            self._loop.start()
            self._channel.send(Message({"serving": True}))
        elif "turn" in head and self._loop is not None:
            self._loop.ask()
        elif "stop" in head:
            threading.Thread(target=self._stop, args=(head["stop"],)).start()
        return int(head.get("number", 0))

    def _add(self, head: Mapping[str, Any]) -> None:
        rows = [
            Row(name, self._contents[hex], serial, is_plain) for name, hex, serial, is_plain in head["files"]
        ]
        self._registrations[head["add"]] = self._registry.restore(head["slug"], head["suffix"], rows)

    def _prepare(self, options: Mapping[str, Any]) -> None:
        self._log.begin(options["log_level"])
        if options["wheels"] is not None:
            sys.path.append(options["wheels"])
        if options["shared"] is not None:
            self._registry = MetadataArtifactRegistry(shared=options["shared"])
        site = Site(
            self._registry,
            endpoints=self._states if options["has_states"] else None,
            access=_access(options["token"], options["token_file"]),
            index=options["index"],
        )
        tls = None if options["tls"] is None else TlsFiles(**options["tls"])
        self._loop = AskedLoop(site, self._listener, ServerLimits(**options["limits"]), tls)
        self._loop.on_turn = self._turned

    def _turned(self) -> None:
        self._has_turned = True
        self._log.wake()

    def _stop(self, timeout: float) -> None:
        """End the server on a thread of its own: this one has the host to watch."""
        if self._loop is not None:
            self._loop.stop(timeout)
        self._is_done = True
        self._log.wake()

    def _counters(self) -> ServerCounters:
        return ServerCounters() if self._loop is None else self._loop.counters


class AskedLoop(EventLoop):
    """An event loop that can be asked whether it turns: `on_turn` is called, on its thread, as the answer."""

    on_turn: Callable[[], None]

    def ask(self) -> None:
        """Have it answer with its next turn."""
        with contextlib.suppress(OSError):  # it has ended
            self._wake_sender.send(b"x")

    def _woken(self, now: float) -> None:
        if self.is_closing:
            super()._woken(now)
        else:
            self._wake_receiver.recv(1)  # this one: with another, it is closing by now
        self.on_turn()


class HostStates:
    """The endpoints' states as the host told them last; calling it is asking for them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: tuple[Optional[dict[str, str]], str] = None, "the host has not told it yet"
        self._told_at = clock()

    def tell(self, states: Optional[dict[str, str]], failure: str) -> None:
        """Take what the host says: its endpoints' states, or why it cannot tell."""
        self._told, self._told_at = (states, failure), self._clock()

    def __call__(self) -> Mapping[str, str]:
        """Return the states, or raise what says why they are not known."""
        states, failure = self._told
        if states is None:
            raise RuntimeError(failure)
        silence = self._clock() - self._told_at
        if silence > STALE_SECONDS:
            raise TimeoutError(f"the host has not told the state of its endpoints for {silence:.0f} s")
        return states


class _Log(logging.Handler):
    """Takes what this package logs, for the host's own logging; never blocks, drops what is too much."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[dict[str, Any]] = deque(maxlen=_MAX_RECORDS)
        self.receiver, self._sender = socket.socketpair()
        for sock in (self.receiver, self._sender):
            sock.setblocking(False)

    def begin(self, level: int) -> None:
        """Take what is logged from now on."""
        logger = logging.getLogger(_ROOT)
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        name = record.name.partition(".")[2]
        self._records.append({"log": self.format(record), "logger": name, "level": record.levelno})
        self.wake()

    def wake(self) -> None:
        """Wake the thread that talks to the host."""
        try:
            self._sender.send(b"x")
        except BlockingIOError:  # it will be awake
            pass

    def taken(self) -> list[dict[str, Any]]:
        """Take what was logged since the last time."""
        try:
            self.receiver.recv(4096)
        except BlockingIOError:
            return []
        return [self._records.popleft() for _ in range(len(self._records))]


def _content(message: Message) -> Content:
    hex, size, descriptor = message.head["content"], message.head["size"], message.descriptor
    if descriptor is None:
        return MemoryContent(hex, message.body)
    if "mtime_ns" in message.head:
        return HeldFile(Checksum(hex), descriptor, message.head["path"], size, message.head["mtime_ns"])
    if size < SENDFILE_BYTES:
        return MemoryContent(hex, _mapped(descriptor.fd, size))
    return MemoryContent.from_sealed(hex, size, descriptor)


def _mapped(fd: int, size: int) -> bytes:
    """Return the bytes of a sealed file without a copy; it cannot shrink, so reading them never fails.

    MAP_PRIVATE, because before Linux 6.7 nothing sealed against writing could be mapped as shared.
    """
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    return cast(bytes, mapping)  # its slices are bytes, and it is a buffer: all that is asked of `data`


def _access(token: Optional[str], token_file: Optional[str]) -> Optional[Access]:
    """Return the guard: with the token that the host has now, whatever has become of its file since."""
    if token is None:
        return None
    access = Access(token)
    access.token_file = token_file
    return access
