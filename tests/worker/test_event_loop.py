"""What clients may cost: slow, silent and many of them, and what the others notice."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import needs_ipv6

from selfhost._threads import start_thread
from selfhost.settings import ServerLimits
from selfhost.worker import event_loop
from selfhost.worker.access import Access
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

SMALL = b'{"a": 1}'
HUGE = os.urandom(2_000_000) * 6  # more than the kernel's buffers take


# ------------------------------------------------------------------ slow and silent


def test_half_open_connections(start_server: Any, connect: Any, serves_another: Any, wait_until: Any) -> None:
    """300 clients that say nothing take no thread, delay nobody and are let go."""  # catalogue 41
    threads = threading.active_count()
    server = start_server(limits=ServerLimits(idle_seconds=3.0))
    silent = [connect(server) for _ in range(300)]

    assert serves_another(server)
    assert server.open_connections >= 300
    assert threading.active_count() == threads + 1
    assert wait_until(lambda: server.open_connections == 0)
    assert [client.rest() for client in silent] == [b""] * 300


def _drip(server: SystemStatusServer, connect: Any, text: bytes) -> Callable[[], None]:
    """Open 60 connections; each call sends one more byte on every one of them, in the end an `a`."""
    clients, bytes_left = [connect(server) for _ in range(60)], iter(text)

    def step() -> None:
        byte = bytes([next(bytes_left, ord("a"))])
        for client in clients:
            client.send(byte)

    return step


def _ends_in_reset(step: Callable[[], object]) -> bool:
    """Repeat a step until the server has hung up; tell whether it did so in time."""
    until = time.monotonic() + 10.0
    try:
        while time.monotonic() < until:
            step()
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def test_slow_heads(start_server: Any, connect: Any, serves_another: Any) -> None:
    """60 clients that drip their heads delay nobody, and dripping wins them no time."""  # catalogue 42
    server = start_server(limits=ServerLimits(head_seconds=0.3))
    step = _drip(server, connect, b"GET / HTTP/1.1\r\nX: ")

    assert _ends_in_reset(lambda: (step(), serves_another(server)))
    assert serves_another(server)


def test_slow_bodies(start_server: Any, connect: Any, serves_another: Any, wait_until: Any) -> None:
    """60 clients that drip a body nobody asked for delay nobody and are let go."""  # catalogue 42
    server = start_server(limits=ServerLimits(linger_seconds=0.3))
    step = _drip(server, connect, b"P / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")

    assert _ends_in_reset(step)
    assert serves_another(server)
    assert wait_until(lambda: server.open_connections == 0)


def test_slow_readers(
    start_server: Any, connect: Any, serves_another: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """60 clients that do not read their downloads delay nobody and are cut off."""  # catalogue 42
    server, target = start_server(limits=ServerLimits(stall_seconds=2.0)), serve_bytes(HUGE)
    readers = [connect(server, receive_buffer=65536).get(target) for _ in range(60)]
    assert wait_until(lambda: server.open_connections == 60)

    assert serves_another(server)
    assert wait_until(lambda: server.open_connections == 0)
    assert len(readers[0].rest()) < len(HUGE)


def test_reader_below_the_least_rate(
    start_server: Any, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """A client that takes a few bytes now and then, to win time, is cut off by the average rate."""
    limits = ServerLimits(stall_seconds=1.0, min_bytes_per_second=100_000_000)  # 12 MB in 1.12 s
    server = start_server(limits=limits)
    client = connect(server, receive_buffer=65536).get(serve_bytes(HUGE))

    def sips_and_is_cut() -> bool:
        client.read_some(50_000)
        time.sleep(0.02)
        return server.open_connections == 0

    assert wait_until(sips_and_is_cut, 4.0)  # the whole would take longer


def test_reader_above_the_least_rate(start_server: Any, connect: Any, serve_bytes: Any) -> None:
    """A slow client that keeps to the least rate gets everything, however long that takes."""
    server = start_server(limits=ServerLimits(stall_seconds=1.0, min_bytes_per_second=1_000_000))
    client = connect(server, receive_buffer=65536).get(serve_bytes(HUGE), "Connection: close")
    pieces = []
    for _ in range(12):
        time.sleep(0.12)
        pieces.append(client.read_some(1_000_000))

    assert (b"".join(pieces) + client.rest()).endswith(b"\r\n\r\n" + HUGE)


def test_slow_reader_is_not_taken_for_stalled(start_server: Any, connect: Any, serve_bytes: Any) -> None:
    """A client that takes small pieces all the time is served, however much the kernel could hold for it."""
    client = connect(start_server(limits=ServerLimits(stall_seconds=1.2)))
    client.get(serve_bytes(HUGE), "Connection: close")
    pieces = []
    for _ in range(60):
        time.sleep(0.04)
        pieces.append(client.read_some(16_000))

    assert (b"".join(pieces) + client.rest()).endswith(b"\r\n\r\n" + HUGE)


def test_idle_client_is_let_go(start_server: Any, connect: Any) -> None:
    """A kept connection without a next request ends, cleanly, after its idle time."""
    client = connect(start_server(limits=ServerLimits(idle_seconds=0.5))).get("/nothing")

    assert client.answer().status == 404
    assert client.rest() == b""


def test_active_client_is_kept(start_server: Any, connect: Any) -> None:
    """Each request gives a kept connection its idle time anew."""
    client = connect(start_server(limits=ServerLimits(idle_seconds=1.5)))
    for _ in range(4):
        assert client.get("/nothing").answer().status == 404
        time.sleep(0.6)

    assert client.get("/nothing").answer().status == 404


# ------------------------------------------------------------------ too many


def test_oldest_waiting_client_makes_room(start_server: Any, connect: Any) -> None:
    """When all places are taken, whoever has waited longest is let go for the newcomer."""
    server = start_server(limits=ServerLimits(max_connections=3))
    clients = []
    for _ in range(4):
        clients.append(connect(server).get("/nothing"))
        assert clients[-1].answer().status == 404
        time.sleep(0.01)  # those who come in one turn of the loop are equally old

    assert clients[0].rest() == b""
    assert [client.get("/nothing").answer().status for client in clients[1:]] == [404] * 3
    assert server.open_connections == 3


def test_slow_head_is_older_than_an_idle_client(start_server: Any, connect: Any, wait_until: Any) -> None:
    """A head makes nobody younger until it is whole: who drips it makes room before those who ask."""
    server = start_server(limits=ServerLimits(max_connections=2, head_seconds=900.0))
    slow = connect(server).get("/nothing")
    assert slow.answer().status == 404
    quick = connect(server).get("/nothing")
    assert quick.answer().status == 404
    slow.send(b"GET / HT")
    assert wait_until(lambda: max(c.deadline for c in set(server._loop.connections)) > time.monotonic() + 500)

    assert connect(server).get("/nothing").answer().status == 404
    assert slow.rest() == b""
    assert quick.get("/nothing").answer().status == 404


def test_client_that_has_begun_to_ask_again_has_waited_since_its_answer(
    start_server: Any, connect: Any
) -> None:
    """A head of which a part came with the one before does not make its client the oldest."""
    server = start_server(limits=ServerLimits(max_connections=2))
    busy = connect(server).get("/nothing")
    assert busy.answer().status == 404
    time.sleep(0.01)  # those who come in one turn of the loop are equally old
    idle = connect(server).get("/nothing")
    assert idle.answer().status == 404
    time.sleep(0.01)
    head = b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n"
    assert busy.send(head + head[:9]).answer().status == 404

    assert connect(server).get("/nothing").answer().status == 404
    assert idle.rest() == b""
    assert busy.send(head[9:]).answer().status == 404


def test_full_house(start_server: Any, connect: Any, serve_bytes: Any, wait_until: Any) -> None:
    """While every place is taken by a download, newcomers are told to come back, downloads go on."""
    server, target = start_server(limits=ServerLimits(max_connections=2)), serve_bytes(HUGE)
    busy = [connect(server, receive_buffer=65536).get(target) for _ in range(2)]
    assert wait_until(lambda: server.open_connections == 2)

    newcomer = connect(server).get("/live").answer()

    assert (newcomer.status, newcomer.fields["retry-after"]) == (503, "1")
    assert [client.answer().body == HUGE for client in busy] == [True, True]
    assert wait_until(lambda: connect(server).get("/live").answer().status == 200)


def test_stalled_downloads_make_room(
    start_server: Any, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """Clients that take every place and then nothing keep others out for a second, not for the time-out."""
    server, target = start_server(limits=ServerLimits(max_connections=2)), serve_bytes(HUGE)
    for _ in range(2):
        connect(server, receive_buffer=65536).get(target)
    assert wait_until(lambda: server.open_connections == 2)

    assert wait_until(lambda: connect(server).get("/live").answer().status == 200)


def test_newcomer_is_told_whatever_it_sends(
    start_server: Any, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """The refusal of a full server reaches a client that has sent its request already."""
    server = start_server(limits=ServerLimits(max_connections=1))
    connect(server, receive_buffer=65536).get(serve_bytes(HUGE))
    assert wait_until(lambda: server.open_connections == 1)

    for _ in range(20):
        newcomer = connect(server).send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert newcomer.answer().status == 503
        assert newcomer.rest() == b""


OUT_OF_DESCRIPTORS = """
import http.client, logging, os, resource, socket, sys, time
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")

def status():
    connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
    connection.request("GET", "/live")
    answer = connection.getresponse().status
    connection.close()
    return answer

with SystemStatusServer(MetadataArtifactRegistry()) as server:
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        os.close(taken.pop())
    late = socket.create_connection((server.host, server.port))  # the last descriptor: none for the server
    late.sendall(b"GET /live HTTP/1.0\\r\\n\\r\\n")
    used = time.process_time()
    time.sleep(1.3)  # time for several tries
    assert time.process_time() - used < 0.15, "the loop spins"
    for fd in taken:
        os.close(fd)
    late.settimeout(5)
    assert late.recv(100).startswith(b"HTTP/1.1 200"), "the client that waited"
    assert status() == 200
    late.close()
print("lived")
"""


def test_out_of_descriptors(run_script: Any) -> None:
    """Out of descriptors, the server waits without spinning, says so once, and goes on when it can."""
    done = run_script(OUT_OF_DESCRIPTORS)

    assert done.stderr == ""
    assert done.stdout.endswith("lived\n")
    assert "cannot accept a connection: [Errno 24]" in done.stdout
    assert done.stdout.count("cannot accept") == 1


FEW_DESCRIPTORS = """
import logging, os, resource, socket, subprocess, sys
from selfhost.settings import ServerLimits
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

limit, of_host = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(of_host)]
CLIENTS = r'''
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
address = sys.argv[1], int(sys.argv[2])
silent = [socket.create_connection(address) for _ in range(200)]
for _ in range(5):
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(b"GET /live HTTP/1.0\\r\\n\\r\\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
'''
with SystemStatusServer(MetadataArtifactRegistry(), limits=ServerLimits(idle_seconds=900.0)) as server:
    subprocess.run([sys.executable, "-c", CLIENTS, server.host, str(server.port)], check=True)
    print("most:", server._loop.max_connections, flush=True)
"""


@pytest.mark.parametrize(("limit", "of_host"), [(160, 0), (160, 100)])
def test_silent_clients_where_descriptors_are_few(limit: int, of_host: int, run_script: Any) -> None:
    """Silent clients keep nobody out where descriptors end before the places; half of them are the host's."""
    done = run_script(FEW_DESCRIPTORS, str(limit), str(of_host), timeout=60)

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.endswith(f"most: {limit // 2}\n")
    assert done.stdout.count("at most 80 connections instead of 512") == 1
    assert done.stdout.count("cannot accept a connection") == bool(of_host)


# ------------------------------------------------------------------ the loop itself

BLOCKED_SIGNAL = """
import os, signal
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

server = SystemStatusServer(MetadataArtifactRegistry()).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
assert signal.sigwait({signal.SIGTERM}) == signal.SIGTERM
server.close()
print("in order")
"""


def test_signal_that_the_host_has_blocked(run_script: Any) -> None:
    """A signal waits for the host's own thread, which blocked it after the server had been started."""
    done = run_script(BLOCKED_SIGNAL)

    assert (done.returncode, done.stdout, done.stderr) == (0, "in order\n", "")


def test_idle_server_sleeps(server: SystemStatusServer, connect: Any, wait_until: Any) -> None:
    """With nobody connected the thread does not wake up at all."""
    connect(server).get("/live").close()
    assert wait_until(lambda: server.open_connections == 0)
    turns: list[object] = []
    original = server._loop._turn  # type: ignore[union-attr]
    server._loop._turn = lambda: turns.append(original())  # type: ignore[union-attr, method-assign]
    time.sleep(0.6)

    assert len(turns) <= 1


@pytest.mark.parametrize("fault", [ZeroDivisionError("once"), asyncio.CancelledError()])
def test_failing_turn_does_not_end_the_server(
    fault: BaseException, server: SystemStatusServer, connect: Any, wait_until: Any,
    monkeypatch: pytest.MonkeyPatch, caplog: Any,
) -> None:  # fmt: skip
    """An error nobody thought of is logged, and the server goes on."""  # catalogue 146
    faults = iter([fault])
    original = server._loop._sweep  # type: ignore[union-attr]

    def sweep(now: float) -> None:
        for fault in faults:
            raise fault
        original(now)

    monkeypatch.setattr(server._loop, "_sweep", sweep)

    assert connect(server).get("/live").answer().status == 200
    assert wait_until(lambda: "goes on after an unexpected error" in caplog.text)
    assert connect(server).get("/live").answer().status == 200


def test_failing_request_ends_only_its_connection(
    server: SystemStatusServer, connect: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """An unexpected error in one client's request costs the others nothing."""
    other = connect(server)
    monkeypatch.setattr(server._loop, "status_head", None)

    assert connect(server).get("/nothing").rest() == b""
    monkeypatch.undo()
    assert other.get("/nothing").answer().status == 404
    assert "a request failed unexpectedly" in caplog.text


def test_log_that_raises(
    broken_log: None, start_server: Any, connect: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever there is to log of requests and turns that fail, they end as they do otherwise."""
    server = start_server(endpoints=lambda: {}["oops"])
    left = [ZeroDivisionError("once")]
    original = server._loop._sweep

    def sweep(now: float) -> None:
        if left:
            raise left.pop()
        original(now)

    monkeypatch.setattr(server._loop, "_sweep", sweep)

    assert connect(server).get("/health").answer().status == 503
    assert wait_until(lambda: not left)
    with monkeypatch.context() as patch:
        patch.setattr("selfhost.worker.site.answer_registered", lambda *_: {}["oops"])
        assert connect(server).get("/x").answer().status == 500
        patch.setattr(server._loop, "status_head", None)
        assert connect(server).get("/x").rest() == b""
    assert connect(server).get("/live").answer().status == 200


def test_log_that_raises_keeps_no_client(
    broken_log: None, start_server: Any, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """Clients that are too slow, or leave in the middle of an answer, are let go all the same."""
    server, target = start_server(limits=ServerLimits(idle_seconds=0.1)), serve_bytes(HUGE)
    assert connect(server).rest() == b""

    client = connect(server, receive_buffer=65536).get(target)
    client.read_some(100_000)
    client.close()
    assert wait_until(lambda: server.open_connections == 0)


def test_log_that_raises_about_a_token(
    broken_log: None, start_server: Any, connect: Any, serve_bytes: Any, tmp_path: Path
) -> None:
    """A token that has changed, or cannot be read any more, costs nobody an answer."""
    file, now = tmp_path / "token", [0.0]
    file.write_text(OLD)
    server, target = start_server(access=Access(token_file=file, clock=lambda: now[0])), serve_bytes(SMALL)
    for text, token in ((NEW, NEW), ("", NEW)):
        file.write_text(text)
        now[0] += 1.0
        assert connect(server).get(target, f"Authorization: Bearer {token}").answer().status == 200


def test_start_that_is_interrupted(monkeypatch: pytest.MonkeyPatch, leaves_nothing: None) -> None:
    """A signal handler of the host's that raises in that moment leaves no thread behind."""
    threads: list[threading.Thread] = []

    def start_and_interrupt(thread: threading.Thread) -> None:
        threads.append(thread)
        start_thread(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(event_loop, "start_thread", start_and_interrupt)
    server = SystemStatusServer(MetadataArtifactRegistry())
    with pytest.raises(KeyboardInterrupt):
        server.start()

    assert not threads[0].is_alive()
    assert not server.is_running


@pytest.fixture
def stuck(start_server: Any, connect: Any) -> Iterator[tuple[SystemStatusServer, threading.Event]]:
    """Return a server whose thread waits for the host's callback, and the event that lets it come back."""
    is_asked, go_on = threading.Event(), threading.Event()
    server = start_server(endpoints=lambda: {str(is_asked.set()): str(go_on.wait(60.0))})
    connect(server).get("/health")
    assert is_asked.wait(10.0)
    yield server, go_on
    go_on.set()


def test_stop_while_the_callback_waits(
    stuck: tuple[SystemStatusServer, threading.Event], connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that does not come back keeps neither the stop nor the port."""
    server, go_on = stuck
    loop, port = server._loop, server.port
    server.close(0.1)
    assert "did not end within 0.1 s" in caplog.text
    caplog.clear()

    with SystemStatusServer(server.registry, port=port) as another:
        assert connect(another).get("/live").answer().status == 200
        go_on.set()
        loop._thread.join(10.0)  # type: ignore[union-attr]
        assert not loop._thread.is_alive()  # type: ignore[union-attr]
        assert connect(another).get("/live").answer().status == 200
    assert caplog.messages == []


def test_requests_that_came_before_the_stop(
    stuck: tuple[SystemStatusServer, threading.Event], connect: Any, wait_until: Any
) -> None:
    """Who has connected and asked before the stop is answered, also if the loop has not accepted it yet."""
    server, go_on = stuck
    clients = [connect(server).get("/live") for _ in range(100)]
    loop, closer = server._loop, threading.Thread(target=server.close, args=(30.0,))
    closer.start()
    assert wait_until(lambda: loop.is_closing)  # type: ignore[union-attr]
    go_on.set()

    answers = [client.answer() for client in clients]
    assert {(answer.status, answer.fields["connection"]) for answer in answers} == {(200, "close")}
    closer.join()


@needs_ipv6
def test_ipv4_client_of_an_ipv6_wildcard(start_server: Any) -> None:
    """A server on [::] serves IPv4 clients too."""
    server = start_server("::")
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"GET /live HTTP/1.0\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


# ------------------------------------------------------------------ heads that are answered from memory

OLD, NEW = "old-token-0123456789", "new-token-0123456789"


def test_only_hits_are_remembered(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """Of all that is asked, only what was found and is asked for as a whole is known the next time."""
    target = serve_bytes(SMALL)
    client = connect(server)
    for path in ("/live", "/health", "/nothing", target + "x", target + "/"):
        client.get(path).answer()
    client.get(target, "Range: bytes=0-0").answer()
    client.get(target, "If-None-Match: *").answer(body=False)
    client.get(target, method="HEAD").answer(body=False)
    assert server._loop.known_heads == {}  # type: ignore[union-attr]

    client.get(target).answer()
    assert len(server._loop.known_heads) == 1  # type: ignore[union-attr]


def test_known_head_with_a_token_that_was_changed(
    start_server: Any, connect: Any, serve_bytes: Any, tmp_path: Path
) -> None:
    """A head that was let in, and is answered from memory, is refused once its token is no longer the one."""
    file, now = tmp_path / "token", [0.0]
    file.write_text(OLD)
    server, target = start_server(access=Access(token_file=file, clock=lambda: now[0])), serve_bytes(SMALL)
    client = connect(server)

    def statuses(token: str) -> list[int]:
        return [client.get(target, f"Authorization: Bearer {token}").answer().status for _ in range(3)]

    assert (statuses(NEW), statuses(OLD)) == ([401] * 3, [200] * 3)
    assert len(server._loop.known_heads) == 1
    file.write_text(NEW)
    now[0] += 1.0
    assert (statuses(OLD), statuses(NEW)) == ([401] * 3, [200] * 3)
    assert len(server._loop.known_heads) == 1
