"""What tests of several folders share: a leak check, cards, and an origin that misbehaves by name."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Callable, NamedTuple, NoReturn, Optional
from urllib.parse import quote, unquote

import misbehaviours
import pytest

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.slots import ModelSlot

AT_ONCE = 2.5  # seconds, on a machine that is busy; who waits for a slow client waits for its time-out
TIMEOUT = 10.0  # seconds; for what takes milliseconds unless it is broken


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")

# ------------------------------------------------------------------ what is left over


def open_descriptors() -> int:
    """Count the descriptors of this process."""
    return len(os.listdir("/dev/fd"))


def wait_for_tick() -> None:
    """Wait until the file system's clock moves on: two writes in one tick have one time stamp."""
    with tempfile.TemporaryFile() as probe:
        number = probe.fileno()
        first = os.stat(number).st_mtime_ns

        def has_ticked() -> bool:
            os.utime(number)
            return os.stat(number).st_mtime_ns > first

        assert poll_until(has_ticked)


def poll_until(condition: Callable[[], Any], seconds: float = TIMEOUT) -> bool:
    """Wait until `condition()` is true; tell whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


_checks = itertools.count()


def make_collections_quick() -> None:
    """Take what is there already out of the garbage collector's sight, at each hundredth call.

    The leak check collects twice a test, and the reports of thousands of tests add up.
    """
    if next(_checks) % 100 == 0:
        gc.collect()
        gc.freeze()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no thread and no descriptor of what is inside the `with` outlives it."""
    make_collections_quick()
    gc.collect()
    threads, descriptors = threading.active_count(), open_descriptors()
    yield
    gc.collect()
    poll_until(lambda: open_descriptors() <= descriptors and threading.active_count() <= threads)
    assert threading.active_count() <= threads, threading.enumerate()
    assert open_descriptors() <= descriptors


# ------------------------------------------------------------------ cards

_SLOTS = {
    "config.json": ("model_info", "hf_config_json"),
    "tokenizer.json": ("tokenizer", "hf_tokenizer_json"),
    "tokenizer_config.json": ("prompt_formatter", "hf_tokenizer_config_json"),
    "chat_template.jinja": ("chat_template_file", "hf_chat_template"),
    "generation_config.json": ("gen_config", "hf_generation_config_json"),
}


DEMO_FILES = frozenset(_SLOTS)  # what write_demo_model makes


def make_card(
    files: Mapping[str, bytes], base_url: str, *, name: str = "org/model", sized: bool = True
) -> ModelDeploymentCard:
    """Return the card of a model whose files are found below `base_url`, as a frontend reads it.

    Each file gets the slot that its name stands for, or is an extra one. Without `sized` the card does not
    tell how long they are.
    """
    slots: dict[str, Any] = {}
    extra = []
    for filename, data in files.items():
        url = f"{base_url.rstrip('/')}/{quote(filename)}"
        file = CheckedFile(url, Checksum.of(data), len(data) if sized else None)
        if filename in _SLOTS:
            slot, variant = _SLOTS[filename]
            slots[slot] = ModelSlot(variant, file)
        else:
            extra.append(file)
    card = ModelDeploymentCard(name, extra_files=tuple(extra), **slots)
    return ModelDeploymentCard.from_json(card.to_json())


class MemorySink:
    """A sink that keeps the bytes, and counts how often it had to start anew."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.validator: Optional[str] = None
        self.restarts = 0

    @property
    def received(self) -> int:
        """How many bytes there are."""
        return len(self.data)

    def write(self, data: Any) -> None:
        """Append."""
        self.data += data

    def restart(self) -> None:
        """Forget everything."""
        self.data.clear()
        self.validator = None
        self.restarts += 1


# ------------------------------------------------------------------ an origin that misbehaves


@contextlib.contextmanager
def full_queue() -> Iterator[str]:
    """Yield the URL of a listener whose queue is full: no further connection is taken, or refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class Request(NamedTuple):
    """What a client asked for; names of fields in lower case."""

    connection: int  # counted from 1
    method: str
    target: str  # as it stood there
    path: str  # decoded, without the query
    fields: dict[str, str]


class _Over(Exception):
    """This connection has nothing more to be answered on."""


class Exchange:
    """One request, the right bytes to answer it with, and the means to do otherwise.

    Unless `keeps_open` is set, the connection is closed when the answer is done. `number` says which request
    for this path it is, counted from 1.
    """

    def __init__(
        self, origin: RudeOrigin, sock: socket.socket, request: Optional[Request], number: int
    ) -> None:
        self.origin = origin
        self.sock = sock
        self.request = request
        self.number = number
        self.keeps_open = False
        self.body = b"" if request is None else origin.files.get(request.path, b"")
        self.tag = f'"{Checksum.of(self.body).hex}"'

    @property
    def is_first_of_connection(self) -> bool:
        """Whether nothing was asked for on this connection before."""
        connection = self.request and self.request.connection
        return [request.connection for request in self.origin.requests].count(connection) <= 1

    @property
    def half(self) -> bytes:
        """The first half of the right bytes."""
        return self.body[: len(self.body) // 2]

    @property
    def offset(self) -> Optional[int]:
        """The first byte that is asked for by a Range field, None without one."""
        found = re.fullmatch(r"bytes=([0-9]+)-", self.field("range"))
        return int(found[1]) if found else None

    def field(self, name: str) -> str:
        """Return a field of the request, "" if it has none."""
        return "" if self.request is None else self.request.fields.get(name, "")

    def start(
        self, *lines: str, status: str = "200 OK", length: object = None, tag: Optional[str] = None
    ) -> None:
        """Send a status line and a header: a strong ETag, a Content-Length where given, and more lines."""
        if length is not None:
            lines = (f"Content-Length: {length}", *lines)
        head = (f"HTTP/1.1 {status}", f"ETag: {tag or self.tag}", *lines, "", "")
        self.send("\r\n".join(head).encode("latin-1"))

    def send(self, *pieces: bytes) -> None:
        """Send bytes as they are."""
        for piece in pieces:
            self.sock.sendall(piece)

    def chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked body."""
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def answer(self, body: bytes, *lines: str, status: str = "200 OK") -> None:
        """Send a whole answer and keep the connection."""
        self.start(*lines, status=status, length=len(body))
        self.send(b"" if self.request is not None and self.request.method == "HEAD" else body)
        self.keeps_open = True

    def answer_well(self) -> None:
        """Send what was asked for, as a decent server does: the whole file or the range."""
        if self.request is None or self.request.path not in self.origin.files:
            return self.answer(b"no such file\n", status="404 Not Found")
        if self.offset is None or self.field("if-range") not in ("", self.tag):
            return self.answer(self.body, "Accept-Ranges: bytes")
        if self.offset >= len(self.body):
            return self.answer(
                b"", f"Content-Range: bytes */{len(self.body)}", status="416 Range Not Satisfiable"
            )
        return self.answer_part(f"bytes {self.offset}-{len(self.body) - 1}/{len(self.body)}")

    def answer_part(self, content_range: Optional[str], *lines: str) -> None:
        """Send the rest of the file as a 206 that says `content_range`."""
        lines = (*lines, *([] if content_range is None else [f"Content-Range: {content_range}"]))
        self.answer(self.body[self.offset or 0 :], *lines, status="206 Partial Content")

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than the origin lives."""
        if self.origin.closing.wait(seconds):
            raise _Over

    def stall(self) -> NoReturn:
        """Say nothing more until the client hangs up."""
        while self.sock.recv(1 << 16):
            pass
        raise _Over

    def ignore(self) -> NoReturn:
        """Not even read, as long as the origin lives."""
        self.origin.closing.wait()
        raise _Over

    def reset(self) -> NoReturn:
        """Break the connection off with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Over


class RudeOrigin:
    """An HTTP origin on loopback that serves `files` badly, in the way that `behaviour` names.

    The names are those of misbehaviours.py, and "well". A behaviour may be changed at any time, and be given
    for a path alone (`behaviours`). Only the first `times` requests are answered badly, where that is given.
    A context manager: at its end every connection is broken off and every thread is joined.
    """

    def __init__(
        self, files: Mapping[str, bytes], behaviour: str = "well", *, times: Optional[int] = None
    ) -> None:
        if behaviour not in misbehaviours.ON_ACCEPT and behaviour != misbehaviours.REFUSES:
            _act_of(behaviour)
        self.files = {f"/{name}": data for name, data in files.items()}
        self.behaviour = behaviour
        self.behaviours: dict[str, str] = {}  # by path, before `behaviour`
        self.times = times
        self.requests: list[Request] = []
        self.connections = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()  # requests by path
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RudeOrigin:
        if self.behaviour != misbehaviours.REFUSES:
            self._listener.listen(128)
            self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Break every connection off, and wait for every thread."""
        self.closing.set()
        with self._lock:
            for sock in (self._listener, *self._sockets):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._listener.close()

    def url_of(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{quote(name)}"

    def count(self, name: str) -> int:
        """Return how many requests for a file there were."""
        return self._asked[f"/{name}"]

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=f"origin {self.behaviour}")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # shut down
                return
            with self._lock:
                if self.closing.is_set():
                    sock.close()
                    return
                self._sockets.add(sock)
                self.connections += 1
            self._start(self._serve, sock, self.connections)

    def _serve(self, sock: socket.socket, connection: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self.behaviour in misbehaviours.ON_ACCEPT:
                misbehaviours.ON_ACCEPT[self.behaviour](Exchange(self, sock, None, connection))
            else:
                self._answer_all(sock, connection)
        except (OSError, _Over):  # the client hung up, or the origin is closed
            pass
        finally:
            with self._lock:
                self._sockets.discard(sock)
                sock.close()

    def _answer_all(self, sock: socket.socket, connection: int) -> None:
        unread = b""
        while True:
            while b"\r\n\r\n" not in unread:
                data = sock.recv(1 << 16)
                if not data:
                    return
                unread += data
            head, _, unread = unread.partition(b"\r\n\r\n")
            request = _parse(head.decode("latin-1"), connection)
            with self._lock:
                self.requests.append(request)
                self._asked[request.path] += 1
                number = self._asked[request.path]
                is_rude = self.times is None or len(self.requests) <= self.times
            exchange = Exchange(self, sock, request, number)
            behaviour = self.behaviours.get(request.path, self.behaviour) if is_rude else "well"
            _act_of(behaviour)(exchange)
            if not exchange.keeps_open:
                return


def _act_of(behaviour: str) -> misbehaviours.Misbehaviour:
    """Return what answers a request in this way; KeyError for a name that nobody has."""
    return Exchange.answer_well if behaviour == "well" else misbehaviours.ON_REQUEST[behaviour]


def _parse(head: str, connection: int) -> Request:
    line, *lines = head.split("\r\n")
    method, target, _ = line.split(" ")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(connection, method, target, unquote(target.partition("?")[0]), fields)
