"""Hostile clients under TLS, many kinds at once, at the limits that are set; and what of it is logged.

The same without TLS: test_event_loop.py and test_connection.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import struct
import threading
import time
from typing import Any, Callable, Optional

import pytest
from helpers import AT_ONCE

from selfhost.settings import ServerLimits

SMALL = b'{"a": 1}'
HUGE = os.urandom(2_000_000) * 6  # more than the kernel's buffers take
HEAD = b"GET / HTTP/1.1\r\nHost: x\r\nX: "
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"


@pytest.fixture
def client_hello(client_tls: ssl.SSLContext) -> bytes:
    """Return what a client says first."""
    said = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client_tls.wrap_bio(ssl.MemoryBIO(), said, server_hostname="127.0.0.1").do_handshake()
    return said.read()


def drip(clients: list[Any], text: bytes) -> Callable[[], None]:
    """Return a step that sends one more byte to each client; one that is hung up on gets no more."""
    bytes_left = iter(text)

    def step() -> None:
        byte = bytes([next(bytes_left, ord("a"))])
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(byte)

    return step


# ------------------------------------------------------------------ before and in the handshake


def test_silent_before_the_handshake(
    start_tls: Any, connect: Any, serves_another: Any, wait_until: Any
) -> None:
    """300 clients that never begin one take no thread, delay nobody and are let go."""  # catalogue 41
    threads = threading.active_count()
    server = start_tls(limits=ServerLimits(handshake_seconds=3.0))
    silent = [connect(server) for _ in range(300)]

    assert serves_another(server)
    assert server.open_connections >= 300
    assert threading.active_count() == threads + 1
    assert wait_until(lambda: server.open_connections == 0)
    assert [client.rest() for client in silent] == [b""] * 300
    assert server.counters().handshake_failures == 300


@pytest.mark.parametrize("said", [5, None])
def test_silent_within_the_handshake(
    said: int, start_tls: Any, connect: Any, client_hello: bytes,
    serves_another: Any, wait_until: Any,
) -> None:  # fmt: skip
    """60 clients that stop somewhere in it delay nobody; idle time is no help to them."""
    server = start_tls(limits=ServerLimits(handshake_seconds=1.5, idle_seconds=60.0))
    for _ in range(60):
        connect(server).send(client_hello[:said])

    assert serves_another(server)
    assert wait_until(lambda: server.counters().handshake_failures == 60)
    assert server.open_connections == 0


def test_slow_handshakes(
    start_tls: Any,
    connect: Any,
    client_hello: bytes,
    serves_another: Any,
    wait_until: Any,
) -> None:
    """60 clients that drip their handshakes delay nobody, and dripping wins them no time."""  # catalogue 42
    server = start_tls(limits=ServerLimits(handshake_seconds=1.5))
    step = drip([connect(server) for _ in range(60)], client_hello)

    assert wait_until(lambda: (step(), serves_another(server), server.counters().handshake_failures == 60)[2])


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00" * 50_000,
        b"\r\n" * 99,
        b"~" + os.urandom(3000),
    ],
)
def test_what_is_no_tls(
    said: bytes, start_tls: Any, connect: Any, serves_another: Any, wait_until: Any
) -> None:
    """Plain HTTP and noise get no answer but an alert of TLS, by which clients see what is wanted."""
    server = start_tls()
    client = connect(server).send(said)
    assert client.rest() == b"\x15\x03\x01\x00\x02\x02\x0a"

    assert wait_until(lambda: server.counters().handshake_failures == 1)
    client.close()
    assert serves_another(server)
    assert set(server.counters().requests) == {200}


def test_no_tls_and_a_log_that_raises(
    start_tls: Any, connect: Any, wait_until: Any, broken_log: None
) -> None:
    """A handshake that fails ends its connection, whether or not that can be logged."""
    server = start_tls()
    connect(server).get("/live").rest()

    assert wait_until(lambda: server.open_connections == 0)


def test_reset_within_the_handshake(
    start_tls: Any,
    connect: Any,
    client_hello: bytes,
    serves_another: Any,
    wait_until: Any,
) -> None:
    """Clients that break off, in order or by a reset, leave nothing."""
    server = start_tls()
    for number in range(60):
        client = connect(server).send(client_hello[: 20 * number])
        if number % 2:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    assert serves_another(server)
    assert wait_until(lambda: server.open_connections == 0)


@pytest.mark.parametrize(
    "said", [None, b"\x00", b"\x80", b" ", b"\r", b"\n", b"\x15\x03\x01\x00\x02\x02\x28"]
)
def test_what_begins_no_request(
    said: Optional[bytes], start_server: Any, connect: Any, client_hello: bytes
) -> None:
    """What comes to plain HTTP and begins as no method does is refused at once, TLS above all."""
    server = start_server(limits=ServerLimits(head_seconds=900.0, idle_seconds=900.0))
    client = connect(server).send(client_hello if said is None else said)

    assert client.answer().status == 400
    assert client.rest() == b""


def test_tls_client_of_plain_http(start_server: Any, connect_tls: Any) -> None:
    """A client that wants TLS is told by plain HTTP, in the very handshake, that there is none."""
    server = start_server(limits=ServerLimits(head_seconds=900.0))

    with pytest.raises(ssl.SSLError, match=r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE"):
        connect_tls(server)


# ------------------------------------------------------------------ after the handshake


def test_slow_heads(start_tls: Any, connect_tls: Any, serves_another: Any, wait_until: Any) -> None:
    """60 clients that drip their heads by TLS delay nobody, and dripping wins no time."""  # catalogue 42
    server = start_tls(limits=ServerLimits(head_seconds=0.3))
    step = drip([connect_tls(server) for _ in range(60)], HEAD)

    assert wait_until(lambda: (step(), serves_another(server), server.open_connections == 0)[2])


def test_slow_bodies(start_tls: Any, connect_tls: Any, serves_another: Any, wait_until: Any) -> None:
    """60 clients that drip a body nobody asked for delay nobody and are let go."""  # catalogue 42
    server = start_tls(limits=ServerLimits(linger_seconds=0.3))
    clients = [connect_tls(server).send(POST) for _ in range(60)]
    step = drip(clients, b"")

    assert wait_until(lambda: (step(), serves_another(server), server.open_connections == 0)[2])
    assert server.counters().requests[405] == 60


def test_slow_readers(
    start_tls: Any, connect_tls: Any, serves_another: Any, serve_bytes: Any, wait_until: Any, client_tls: Any
) -> None:
    """60 clients that do not read their downloads delay nobody and are cut off."""  # catalogue 42
    client_tls.options &= ~0x80  # SSL_OP_IGNORE_UNEXPECTED_EOF, which Python 3.9 sets and has no name for
    target = serve_bytes(HUGE)
    server = start_tls(limits=ServerLimits(stall_seconds=2.0))
    readers = [connect_tls(server, receive_buffer=65536).get(target) for _ in range(60)]
    assert wait_until(lambda: server.counters().requests.get(200) == 60)

    assert serves_another(server)
    assert wait_until(lambda: server.open_connections == 0)
    readers[0].sock.suppress_ragged_eofs = False
    with pytest.raises((ssl.SSLError, ConnectionResetError)):  # TLS itself tells that this was no end
        readers[0].rest()


def test_full_house(
    start_tls: Any, connect: Any, connect_tls: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """A full server hangs up on newcomers before the handshake; downloads go on, then there is room."""
    target = serve_bytes(HUGE)
    server = start_tls(limits=ServerLimits(max_connections=2))
    busy = [connect_tls(server, receive_buffer=65536).get(target) for _ in range(2)]
    assert wait_until(lambda: server.counters().requests.get(200) == 2)

    assert connect(server).rest() == b""
    assert server.counters().refused_busy == 1
    assert [client.answer().body == HUGE for client in busy] == [True, True]
    assert connect_tls(server).get("/live").answer().status == 200


def test_newcomers_let_one_another_shake_hands(
    start_tls: Any, connect: Any, connect_tls: Any, client_tls: ssl.SSLContext, wait_until: Any
) -> None:
    """When all places are taken those who wait for longest make room, not those who have just come."""
    server = start_tls(limits=ServerLimits(max_connections=4))
    kept = [connect_tls(server) for _ in range(4)]
    assert [client.get("/live").answer().status for client in kept] == [200] * 4
    newcomers = [connect(server) for _ in range(3)]
    assert wait_until(lambda: server.counters().accepted == 7)

    for client in newcomers:
        with client_tls.wrap_socket(client.sock, server_hostname=server.host) as sock:
            sock.sendall(b"GET /live HTTP/1.0\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")


# ------------------------------------------------------------------ all of them at once


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_all_kinds_at_once(
    secure: bool, start_server: Any, start_tls: Any, connect: Any, connect_tls: Any, serve_bytes: Any,
    wait_until: Any,
) -> None:  # fmt: skip
    """300 half-open connections and 60 of each slow kind: others are served at once throughout."""
    # catalogue 41, 42
    other, target = serve_bytes(SMALL, "other.json"), serve_bytes(HUGE)
    limits = ServerLimits(
        handshake_seconds=5.0, idle_seconds=5.0, head_seconds=5.0, stall_seconds=5.0, linger_seconds=5.0
    )
    start, open_one = (start_tls, connect_tls) if secure else (start_server, connect)
    server = start(limits=limits)
    threads = threading.active_count()
    heads = drip([open_one(server) for _ in range(60)], HEAD)
    bodies = drip([open_one(server).send(POST) for _ in range(60)], b"")
    for _ in range(60):
        open_one(server, receive_buffer=65536).get(target)
    for _ in range(300):  # last: those take no time, and all are to be there at once
        connect(server)
    assert wait_until(lambda: server.open_connections >= 480)

    slowest = 0.0
    until = time.monotonic() + 30.0
    while server.open_connections and time.monotonic() < until:
        heads()
        bodies()
        started = time.monotonic()
        client = open_one(server).get(other)
        assert client.answer().body == SMALL
        slowest = max(slowest, time.monotonic() - started)
        client.close()
        time.sleep(0.02)

    assert slowest < AT_ONCE
    assert threading.active_count() == threads
    assert wait_until(lambda: server.open_connections == 0)


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("limit", [200, 1000, 16_384, 100_000])
def test_head_bytes(limit: int, start_server: Any, connect: Any) -> None:
    """A head of exactly as many bytes as are allowed is answered, one of a byte more is refused."""
    server = start_server(limits=ServerLimits(max_head_bytes=limit))
    bare = b"GET /live HTTP/1.1\r\nHost: x\r\nX: \r\n\r\n"
    fits = bare.replace(b"X: ", b"X: " + b"a" * (limit - len(bare)))

    assert connect(server).send(fits).answer().status == 200
    refusal = connect(server).send(fits.replace(b"X: ", b"X: a")).answer()
    assert (refusal.status, refusal.body) == (431, f"request head larger than {limit} bytes\n".encode())


def test_head_bytes_of_an_unfinished_head(start_server: Any, connect: Any) -> None:
    """What has grown past the limit is refused before it ends."""
    client = connect(start_server(limits=ServerLimits(max_head_bytes=200))).send(HEAD + b"a" * 200)

    assert client.answer().status == 431
    assert client.rest() == b""


# ------------------------------------------------------------------ logs


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return a function that tells everything that was logged, each record as handlers write it."""
    caplog.set_level(logging.DEBUG)
    formatter = logging.Formatter("%(name)s %(message)s")
    return lambda: "\0".join(map(formatter.format, caplog.records))


def test_log_quotes_what_clients_send(
    start_server: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    """A target that gets into a log, for an error of ours, cannot write a line of its own."""
    server = start_server()
    monkeypatch.setattr("selfhost.worker.site.answer_registered", lambda *_: {}["oops"])
    answer = connect(server).get("/%0aERROR%20root%20%1b[2J").answer()

    assert (answer.status, answer.body) == (500, b"Internal error\n")
    assert "cannot answer '/%0aERROR%20root%20%1b[2J'" in logged()
    assert "\x1b" not in logged()


def test_log_has_nothing_secret(
    start_server: Any, start_tls: Any, connect: Any, connect_tls: Any, serve_bytes: Any, logged: Any,
    monkeypatch: pytest.MonkeyPatch, wait_until: Any,
) -> None:  # fmt: skip
    """Whatever becomes of a request, its Authorization field is in no log."""
    target = serve_bytes(SMALL)
    field = "Authorization: Bearer rosebud-0123456789"
    secured = start_tls()
    for server, open_one in ((start_server(), connect), (secured, connect_tls)):
        assert open_one(server).get(target, field).answer().status == 200
        assert open_one(server).get(target, field, " folded").answer().status == 400
        assert open_one(server).get(target, field, method="POST").answer().status == 405
        assert open_one(server).get(target, field, "X: " + "a" * 20_000).answer().status == 431
        open_one(server).send(field.encode()).close()
    with contextlib.suppress(OSError):
        connect(secured).get(target, field).rest()
    monkeypatch.setattr("selfhost.worker.site.answer_registered", lambda *_: {}["oops"])
    server = start_server()
    assert connect(server).get("/x", field).answer().status == 500
    monkeypatch.setattr(server._loop, "status_head", None)
    assert connect(server).get("/x", field).rest() == b""

    assert wait_until(lambda: "a request failed unexpectedly" in logged())
    assert wait_until(lambda: "TLS handshake failed" in logged())
    assert "rosebud" not in logged()


def test_error_bodies_tell_nothing(
    start_server: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """No path, no version, no traceback, nothing of the request: a few words of text."""  # catalogue 95
    server = start_server()
    requests = [
        b"GET /rosebud HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /rosebud HTTP/9.1\r\nHost: x\r\n\r\n",
        b"rosebud\r\n\r\n",
        b"POST /rosebud HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /rosebud HTTP/1.1\r\nrosebud: " + b"a" * 20_000,
        b"GET /rosebud HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: rosebud\r\n\r\n",
    ]
    answers = [connect(server).send(request).answer() for request in requests]
    monkeypatch.setattr(
        "selfhost.worker.site.answer_registered", lambda *_: (tmp_path / "rosebud").read_bytes()
    )
    answers.append(connect(server).send(requests[0]).answer())

    assert sorted(answer.status for answer in answers) == [400, 400, 404, 405, 431, 500, 505]
    for answer in answers:
        assert len(answer.body) < 60
        assert b"rosebud" not in answer.body
        assert answer.fields["server"] == "selfhost"
        assert not any(word in answer.body.lower() for word in (b"python", b"trace", b".py", b"tmp"))
