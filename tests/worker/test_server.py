"""What the embedded server serves, to clients that mean well; from a thread and from a process of its own."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfhost.worker import connection, event_loop
from selfhost.worker.content import HeldFile, pin_file
from selfhost.worker.poller import SelectorPoller
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

LARGE = os.urandom(2_100_000)  # bytes; leaves by sendfile
HUGE = LARGE * 6  # more than the kernel's buffers take: the answer has to wait for the client
SMALL = b'{"a": 1}'
THREAD = pytest.mark.parametrize("isolation", ["thread"])  # for tests that look or reach into the server


@pytest.fixture(params=["thread", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    """Return where the server runs."""
    return str(request.param)


def test_small_file(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A small file comes byte for byte, with its digest as validator."""
    target = serve_bytes(SMALL)

    answer = connect(server).get(target).answer()

    assert (answer.status, answer.body) == (200, SMALL)
    assert answer.fields["content-type"] == "application/json"
    assert len(answer.fields["etag"]) == 66


def test_headers_tell_no_version(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """Server names the package and nothing else; there is one Date."""  # catalogue 57, 95
    answer = connect(server).get(serve_bytes(SMALL)).answer()  # the client refuses a field that comes twice

    assert answer.fields["server"] == "selfhost"
    assert "date" in answer.fields


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 2_000_000, 2_097_151, 2_097_152])
def test_sizes_around_the_limits(
    size: int, server: SystemStatusServer, connect: Any, serve_bytes: Any
) -> None:
    """Every size comes whole, twice over one connection."""  # catalogue 79
    target = serve_bytes(LARGE[:size])
    client = connect(server)

    bodies = {client.get(target).answer().body for _ in range(2)}

    assert bodies == {LARGE[:size]}


@THREAD
def test_system_without_epoll(
    monkeypatch: pytest.MonkeyPatch, start_server: Any, connect: Any, serve_bytes: Any
) -> None:
    """With the standard selectors in place of epoll, small and waiting answers are the same."""
    monkeypatch.setattr(event_loop, "new_poller", SelectorPoller)
    target = serve_bytes(HUGE)
    client = connect(start_server(), receive_buffer=4096)

    assert client.get("/live").answer().status == 200
    assert client.get(target).answer().body == HUGE
    assert client.get(target).answer().body == HUGE


@THREAD
def test_known_heads_are_forgotten_in_time(
    server: SystemStatusServer, connect: Any, serve_bytes: Any
) -> None:
    """Clients that make up new heads for ever do not fill the memory."""
    target = serve_bytes(b"small")
    client = connect(server)

    for number in range(600):
        head = f"GET {target} HTTP/1.1\r\nHost: h\r\nX-Number: {number}\r\n\r\n".encode()
        assert client.send(head).answer().body == b"small"

    assert 0 < len(server._loop.known_heads) <= 256


@THREAD
def test_answer_that_leaves_in_two_parts(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A send that takes only a part of a small answer is followed by the rest, and by the next request."""
    target = serve_bytes(SMALL)
    connect(server).get(target).answer()
    original = connection.Connection._begin
    begun = []

    def begin(self: connection.Connection, now: float) -> bool:
        begun.append(len(self._out))
        return original(self, now)

    class Short(socket.socket):
        def send(self, data: Any, flags: int = 0) -> int:
            return super().send(memoryview(data)[:100] if not begun else data, flags)

    client = connect(server)
    assert client.get("/live").answer().status == 200
    monkeypatch.setattr(connection.Connection, "_begin", begin)
    (accepted,) = (c for c in server._loop.connections if c.sock.getpeername() == client.sock.getsockname())
    fd = accepted.sock.detach()
    accepted.sock = Short(fileno=fd)

    answers = [client.get(target).answer() for _ in range(3)]

    assert [answer.body for answer in answers] == [SMALL] * 3
    assert len(begun) == 1


@pytest.mark.parametrize("close", ["", "Connection: close\r\n"], ids=["kept", "closed"])
def test_known_head_gets_the_same_answer(
    close: str, server: SystemStatusServer, connect: Any, serve_bytes: Any
) -> None:
    """The short way of a head that came before gives what the long way gave, until the file is gone."""
    head = f"GET {serve_bytes(b'small')} HTTP/1.1\r\nHost: {server.address}\r\n{close}\r\n".encode()
    answers = [connect(server).send(head).answer() for _ in range(3)]
    for answer in answers:
        del answer.fields["date"]
    server.registry.unregister("m", "_base")

    assert answers[0].body == b"small"
    assert answers[1:] == answers[:-1]
    assert connect(server).send(head).answer().status == 404


@THREAD
@pytest.mark.parametrize("missing", [["memfd_create"], ["sendfile"], ["memfd_create", "sendfile"]])
def test_system_without_fast_calls(
    missing: list[str], monkeypatch: pytest.MonkeyPatch, start_server: Any, connect: Any, serve_bytes: Any
) -> None:
    """Without memfd or sendfile the bytes are the same."""
    for name in missing:
        monkeypatch.delattr(os, name)
    target = serve_bytes(LARGE)

    answer = connect(start_server()).get(target).answer()

    assert answer.body == LARGE


def test_large_file_leaves_sealed_memory(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, registry: MetadataArtifactRegistry
) -> None:
    """After a download the bytes are held once, in the sealed file that sendfile reads."""
    connect(server).get(serve_bytes(LARGE)).answer()

    (artifact,) = registry
    assert artifact.content.data is None
    assert artifact.content.read(0, len(LARGE)) == LARGE


def test_changed_file_keeps_its_answer(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, tmp_path: Path
) -> None:
    """Editing, truncating or deleting a registered file changes no answer."""  # catalogue 34, 35
    target = serve_bytes(LARGE)
    client = connect(server)

    (tmp_path / "f.json").write_bytes(b"other")
    edited = client.get(target).answer()
    (tmp_path / "f.json").unlink()
    deleted = client.get(target).answer()

    assert edited.body == deleted.body == LARGE


@pytest.fixture
def held_file(registry: MetadataArtifactRegistry, tmp_path: Path) -> Path:
    """Return a registered file that counts as too large for memory."""
    path = tmp_path / "huge.json"
    path.write_bytes(HUGE)
    content = pin_file(str(path), max_pinned_bytes=1000)
    assert isinstance(content, HeldFile)
    registry.register("m", "_base", "huge.json", content)
    return path


HELD_TARGET = "/v1/metadata/m/_base/huge.json"


def test_held_file_whole(server: SystemStatusServer, connect: Any, held_file: Path) -> None:
    """A file too large for memory comes whole."""
    assert connect(server).get(HELD_TARGET).answer().body == HUGE


def test_held_file_that_changed_is_refused(server: SystemStatusServer, connect: Any, held_file: Path) -> None:
    """A held file that changed after it was hashed is a 500, never other bytes."""  # catalogue 34
    held_file.write_bytes(HUGE[::-1])

    answer = connect(server).get(HELD_TARGET).answer()

    assert (answer.status, answer.body) == (500, b"Failed to read file\n")


@pytest.mark.parametrize("size", [0, 5_000_000, len(HUGE)])
def test_held_file_that_changes_midway_is_cut(
    size: int,
    server: SystemStatusServer,
    connect: Any,
    held_file: Path,
    wait_until: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A held file that is overwritten during its transfer ends the connection early; a warning tells."""
    client = connect(server, receive_buffer=65536).get(HELD_TARGET)
    head = client.read_some(1000)
    held_file.write_bytes(b"x" * size)  # catalogue 35

    received = head + client.rest()

    assert len(received) < len(HUGE)
    assert HUGE.startswith(received.partition(b"\r\n\r\n")[2])
    assert wait_until(lambda: "an answer was cut off" in caplog.text)
    caplog.clear()  # the record holds the error, and that the file


def test_range_of_a_large_file(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A range is cut out of the sealed file."""  # catalogue 70
    answer = connect(server).get(serve_bytes(LARGE), "Range: bytes=100000-1899999").answer()

    assert answer.status == 206
    assert answer.fields["content-range"] == f"bytes 100000-1899999/{len(LARGE)}"
    assert answer.body == LARGE[100000:1900000]


def test_range_bomb_gets_the_whole(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """Thousands of ranges cost no more than the file."""  # catalogue 39
    ranges = ",".join(["0-"] * 3000)

    answer = connect(server).get(serve_bytes(LARGE), f"Range: bytes={ranges}").answer()

    assert (answer.status, len(answer.body)) == (200, len(LARGE))


def test_conditional_request(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A known validator gets 304 and the connection goes on."""  # catalogue 60, 80
    target = serve_bytes(SMALL)
    client = connect(server)
    etag = client.get(target).answer().fields["etag"]

    answer = client.get(target, f"If-None-Match: {etag}").answer(body=False)

    assert answer.status == 304
    assert client.get(target).answer().body == SMALL


def test_head(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """HEAD has the fields of GET and no body, whatever the size."""  # catalogue 58
    small, large = serve_bytes(SMALL), serve_bytes(LARGE, "g.json")
    client = connect(server)
    for target in (small, large, "/nothing"):
        expected = client.get(target).answer().fields
        got = client.get(target, method="HEAD").answer(body=False).fields
        assert {**got, "date": ""} == {**expected, "date": ""}


@pytest.mark.parametrize("size", [10, 2_000_000])
@pytest.mark.parametrize(
    ("request_line", "option", "kept"),
    [
        ("GET {} HTTP/1.0", "X: y", False),
        ("GET {} HTTP/1.0", "Connection: keep-alive", True),
        ("GET {} HTTP/1.1", "Host: x\r\nConnection: close", False),
    ],
)
def test_connection_ends_as_asked(
    size: int, request_line: str, option: str, kept: bool,
    server: SystemStatusServer, connect: Any, serve_bytes: Any,
) -> None:  # fmt: skip
    """HTTP/1.0 closes unless asked not to, HTTP/1.1 only when asked to; the answer says which."""
    request = f"{request_line.format(serve_bytes(LARGE[:size]))}\r\n{option}\r\n\r\n".encode()  # catalogue 83
    client = connect(server)

    answer = client.send(request).answer()

    assert answer.body == LARGE[:size]
    assert answer.fields["connection"] == ("keep-alive" if kept else "close")
    assert client.send(request).answer().status == 200 if kept else client.rest() == b""


@pytest.mark.parametrize(
    "target", ["/", "/v1/metadata", "/v1/metadata/m/_base/", "/v1/metadata/m/_base/../f.json", "//etc/passwd"]
)
def test_unknown_path(target: str, server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """Whatever is not registered is the same 404."""  # catalogue 33
    serve_bytes(SMALL)

    answer = connect(server).get(target).answer()

    assert (answer.status, answer.body) == (404, b"Not found\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /v1/metadata/m/_base/none.json HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PUT /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.1\r\nHost: x\r\n\r\n",
    ],
)
def test_errors_tell_nothing(
    request_bytes: bytes, server: SystemStatusServer, connect: Any, serve_bytes: Any, tmp_path: Path
) -> None:
    """No error names a path of this machine, a version or a line of code."""  # catalogue 95
    serve_bytes(SMALL)

    text = connect(server).send(request_bytes).answer().body.decode()

    assert str(tmp_path) not in text
    assert not any(word in text for word in ("Traceback", "Python", "selfhost", ".py"))


def test_parallel_downloads(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """256 clients download 2 MB each at the same time, and each gets every byte."""
    target = serve_bytes(LARGE)
    clients = [connect(server, receive_buffer=65536).get(target) for _ in range(256)]

    digests = {hashlib.sha256(client.answer().body).digest() for client in clients}

    assert digests == {hashlib.sha256(LARGE).digest()}


def test_requests_are_not_logged(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a hit, a miss, a refusal nor a client that hangs up is worth a line at INFO."""
    caplog.set_level(logging.INFO)
    client = connect(server)
    client.get(serve_bytes(SMALL)).answer()
    client.get("/nothing").answer()
    client.get("/", method="PUT").answer()
    connect(server).get(serve_bytes(LARGE, "g.json")).close()

    assert connect(server).get("/live").answer().status == 200
    assert caplog.messages == []


def test_file_registered_while_running(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """What is registered or withdrawn counts from the very next request."""
    client = connect(server)
    before = client.get("/v1/metadata/m/_base/f.json").answer().status
    after = client.get(serve_bytes(SMALL)).answer().status
    server.registry.unregister("m", "_base")

    assert (before, after, client.get("/v1/metadata/m/_base/f.json").answer().status) == (404, 200, 404)


def test_file_withdrawn_during_its_transfer(
    server: SystemStatusServer, connect: Any, serve_bytes: Any
) -> None:
    """An answer on its way keeps its content until it is sent."""
    client = connect(server, receive_buffer=65536).get(serve_bytes(HUGE), "Connection: close")
    head = client.read_some(20)
    server.registry.unregister("m", "_base")

    assert (head + client.rest()).endswith(b"\r\n\r\n" + HUGE)


# ------------------------------------------------------------------ health


def test_health(start_server: Any, connect: Any) -> None:
    """Health names every endpoint and its state."""
    server = start_server(endpoints=lambda: {"generate": "ready"})

    answer = connect(server).get("/health").answer()

    state = json.loads(answer.body)
    assert answer.status == 200
    assert (state["status"], state["endpoints"]) == ("ready", {"generate": "ready"})
    assert set(state["uptime"]) == {"secs", "nanos"}


def test_health_of_an_endpoint_that_is_not_ready(start_server: Any, connect: Any) -> None:
    """One endpoint that is not ready makes /health 503; the server lives all the same."""
    server = start_server(endpoints=lambda: {"a": "ready", "b": "notready"})

    answers = [connect(server).get(path).answer() for path in ("/health", "/live")]

    assert [answer.status for answer in answers] == [503, 200]
    assert json.loads(answers[0].body)["status"] == "notready"


def _raise(error: BaseException) -> Callable[[], Any]:
    def endpoints() -> Any:
        raise error

    return endpoints


@pytest.mark.parametrize(
    "endpoints",
    [_raise(RuntimeError("secret")), _raise(SystemExit(3)), lambda: 5, lambda: {"a": {1}}],
    ids=["exception", "sys.exit", "no mapping", "no JSON"],
)
def test_broken_endpoints_callback(
    endpoints: Any, start_server: Any, connect: Any, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A host's callback that fails costs one request a 503, and is logged; the server lives."""
    # catalogue 146
    client = connect(start_server(endpoints=endpoints))

    answer = client.get("/health").answer()

    assert (answer.status, b"secret" in answer.body) == (503, False)
    assert client.get("/nothing").answer().status == 404
    assert b"not known" not in answer.body or wait_until(lambda: "state of the worker" in caplog.text)


def test_standard_client(server: SystemStatusServer, serve_bytes: Any) -> None:
    """The standard library's client agrees with all of it, over one kept connection."""
    target = serve_bytes(LARGE)
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    for _ in range(3):
        connection.request("GET", target)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, LARGE)
    connection.close()
