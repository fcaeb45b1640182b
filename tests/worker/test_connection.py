"""One connection of the status server: many requests, odd requests, clients that go away."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import pytest

from selfhost.settings import ServerLimits
from selfhost.worker.server import SystemStatusServer

SMALL = b'{"a": 1}'
LARGE = os.urandom(300_000)
HUGE = os.urandom(2_000_000) * 6  # more than the kernel's buffers take


def request_for(target: str, *lines: str) -> bytes:
    """Return a whole GET."""
    return "\r\n".join((f"GET {target} HTTP/1.1", "Host: x", *lines, "", "")).encode()


# ------------------------------------------------------------------ pipelining


def test_thousand_pipelined_requests(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A thousand requests that come at once are answered one by one, in order."""
    targets = [serve_bytes(SMALL), serve_bytes(LARGE[:5000], "g.json"), "/nothing", "/live"]
    sizes = [len(SMALL), 5000, len(b"Not found\n")]
    client = connect(server)
    sender = threading.Thread(target=client.send, args=(b"".join(map(request_for, targets)) * 250,))
    sender.start()

    answers = [client.answer() for _ in range(1000)]

    sender.join()
    assert [answer.status for answer in answers] == [200, 200, 404, 200] * 250
    assert [len(answer.body) for answer in answers if b"uptime" not in answer.body] == sizes * 250


def test_pipelined_large_files(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """Large answers do not run into those behind them."""
    large, small = serve_bytes(LARGE), serve_bytes(SMALL, "g.json")
    client = connect(server).send(b"".join(map(request_for, [large, small, large, small])))

    assert [client.answer().body for _ in range(4)] == [LARGE, SMALL, LARGE, SMALL]


def test_pipeline_ends_at_close(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """What follows a request that asks to close is not answered."""
    target = serve_bytes(SMALL)
    client = connect(server).send(request_for(target, "Connection: close") + request_for(target) * 3)

    assert client.answer().body == SMALL
    assert client.rest() == b""


def test_pipeline_ends_at_refusal(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """What follows a request that is not understood is not answered: its body may look like a request."""
    target = serve_bytes(SMALL)
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
    client = connect(server).send(request_for(target) + post + request_for(target) * 3)

    assert [client.answer().status for _ in range(2)] == [200, 405]
    assert client.rest() == b""


def test_pipelining_client_does_not_keep_others_waiting(
    start_server: Any, connect: Any, serve_bytes: Any
) -> None:
    """While one client pipelines without reading, another is served."""
    server, target = start_server(), serve_bytes(LARGE)
    greedy = connect(server, receive_buffer=65536)
    greedy.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while greedy.sock.send(request_for(target) * 100):
            pass

    assert connect(server).get(target).answer().body == LARGE


# ------------------------------------------------------------------ heads


def test_head_byte_by_byte(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A head may come in as many pieces as it has bytes."""
    client = connect(server)
    for byte in request_for(serve_bytes(SMALL)):
        client.send(bytes([byte]))

    assert client.answer().body == SMALL


def test_head_cut_at_its_end(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """The empty line may be cut in the middle, and the next head begin in the same packet."""
    head = request_for(serve_bytes(SMALL))
    client = connect(server).send(head[:-3])
    assert wait_until(lambda: server.open_connections == 1)
    client.send(head[-3:] + head[:10])

    assert client.answer().body == SMALL
    assert client.send(head[10:]).answer().body == SMALL


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000, 431),
        (b"GET /" + b"a" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ],
)
def test_refusal(request_bytes: bytes, status: int, server: SystemStatusServer, connect: Any) -> None:
    """What cannot be served is refused with a reason, and the connection ends cleanly."""
    client = connect(server).send(request_bytes)

    answer = client.answer()

    assert (answer.status, answer.fields["connection"]) == (status, "close")
    assert client.rest() == b""  # a reset would raise


def test_other_method_names_those_allowed(server: SystemStatusServer, connect: Any) -> None:
    """A 405 says what is allowed."""  # catalogue 59
    assert connect(server).get("/", method="PATCH").answer().fields["allow"] == "GET, HEAD"


@pytest.mark.parametrize("size", [10_000, 200_000])
def test_body_is_thrown_away_before_the_close(size: int, server: SystemStatusServer, connect: Any) -> None:
    """A POST with a body gets its 405 and an end of stream, not a reset that swallows both."""
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
    client = connect(server).send(head)

    assert client.answer().status == 405
    assert client.send(b"x" * size).rest() == b""


def test_endless_body_is_cut(server: SystemStatusServer, connect: Any, wait_until: Any) -> None:
    """Nobody may go on sending a body after the refusal for ever."""
    client = connect(server).send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n")
    assert client.answer().status == 405

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.send(b"x" * 64_000_000)
    assert wait_until(lambda: server.open_connections == 0)


def test_wake_up_without_a_cause_after_a_refusal(
    start_server: Any, connect: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Woken while nothing has come, a connection goes on throwing away what the client sends."""
    server = start_server(limits=ServerLimits(linger_seconds=900.0))
    client = connect(server).send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    assert client.answer().status == 405
    (lingering,) = server._loop.connections
    turns: list[object] = []
    original = server._loop._turn
    monkeypatch.setattr(
        server._loop, "_turn", lambda: (turns.append(lingering.on_event(time.monotonic())), original())
    )

    assert wait_until(lambda: len(turns) > 1)
    assert server.open_connections == 1


def test_refused_client_that_stays_is_let_go(start_server: Any, connect: Any, wait_until: Any) -> None:
    """A client that neither sends nor closes after a refusal is let go after a moment."""
    server = start_server(limits=ServerLimits(linger_seconds=0.05))
    client = connect(server).get("/", method="PUT")
    assert client.answer().status == 405

    assert wait_until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("close", [(), ("Connection: close",)], ids=["kept", "closed"])
@pytest.mark.parametrize("size", [0, 65_536, 65_537, 300_000])
def test_known_head_gets_the_same_answer(
    size: int, close: tuple[str, ...], server: SystemStatusServer, connect: Any, serve_bytes: Any
) -> None:
    """A head that came before is answered as the first time, whatever the size, until the file is gone."""
    head = request_for(serve_bytes(LARGE[:size]), *close)
    answers = []
    for _ in range(3):
        client = connect(server).send(head)
        answers.append(client.answer())
        del answers[-1].fields["date"]
        assert client.rest() == b"" if close else client.send(head).answer().body == LARGE[:size]
    server.registry.unregister("m", "_base")

    assert answers[0].body == LARGE[:size]
    assert answers[1:] == answers[:-1]
    assert connect(server).send(head).answer().status == 404


def test_known_head_of_a_client_that_does_not_read(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """Larger files by a known head wait for their client, and come whole and in order."""
    head = request_for(serve_bytes(LARGE))
    connect(server).send(head).answer()
    client = connect(server, receive_buffer=4096)
    for _ in range(40):
        client.send(head)
    assert wait_until(lambda: any(c.is_sending for c in set(server._loop.connections)))

    assert {client.answer().body for _ in range(40)} == {LARGE}


# ------------------------------------------------------------------ clients that go away


def test_client_that_leaves_midway(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """A client that hangs up in the middle of a download is forgotten; others go on."""
    target = serve_bytes(HUGE)
    client = connect(server, receive_buffer=65536).get(target)
    client.read_some(100_000)
    client.close()

    assert wait_until(lambda: server.open_connections == 0)
    assert connect(server).get(target).answer().body == HUGE


def test_client_that_leaves_at_once(server: SystemStatusServer, connect: Any, wait_until: Any) -> None:
    """Clients that connect and leave, with half a head or none, leave nothing."""
    for number in range(100):
        connect(server).send(b"GET / HT" * (number % 2)).close()

    assert connect(server).get("/live").close() is None
    assert wait_until(lambda: server.open_connections == 0)


def test_client_that_closes_its_half(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A client that sends its request and then its end of stream still gets the answer."""
    client = connect(server).get(serve_bytes(HUGE))
    client.sock.shutdown(1)

    assert client.answer().body == HUGE
    assert client.rest() == b""


def test_small_answers_to_a_client_that_does_not_read(
    start_server: Any, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """Small answers that the client does not take wait for it, and come whole and in order."""
    data = [LARGE[:60_000], LARGE[60_000:120_000]]
    requests = b"".join(request_for(serve_bytes(part, f"{n}.json")) for n, part in enumerate(data))
    server = start_server()
    client = connect(server, receive_buffer=65536).send(requests * 100)  # 12 MB of answers
    assert wait_until(lambda: any(c.is_sending for c in set(server._loop.connections)))

    assert [client.answer().body for _ in range(200)] == data * 100
