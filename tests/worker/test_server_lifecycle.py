"""How the status server comes and goes: start, stop, and addresses that cannot be bound."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import pytest
from helpers import needs_ipv6

from selfhost.errors import StatusServerError
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

HUGE = os.urandom(2_000_000) * 6  # more than the kernel's buffers take
pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture(params=["thread", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    """Return where the server runs."""
    return str(request.param)


def is_free(port: int) -> bool:
    """Tell whether nobody listens on a port of loopback."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


# ------------------------------------------------------------------ start and stop


def test_start_and_stop_again_and_again(
    registry: MetadataArtifactRegistry, connect: Any, isolation: str
) -> None:
    """Threads and descriptors are at the base line each time, and the very port is free again."""
    server = SystemStatusServer(registry, isolation=isolation).start()  # catalogue 145
    port, threads = server.port, threading.active_count() - 1
    server.close()
    descriptors = len(os.listdir("/dev/fd"))
    for _ in range(200 if isolation == "thread" else 20):
        with SystemStatusServer(registry, port=port, isolation=isolation) as server:
            client = connect(server).get("/live")
            assert client.answer().status == 200
            client.close()
        assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == descriptors
    assert is_free(port)


def test_stop_twice(server: SystemStatusServer) -> None:
    """Stopping again, or what never ran, is harmless."""
    server.close()
    server.close()

    SystemStatusServer(server.registry, isolation=server.isolation).close()
    assert not server.is_running


def test_start_twice(server: SystemStatusServer) -> None:
    """A running server stays as it is."""
    port, threads = server.port, threading.active_count()

    assert server.start() is server
    assert (server.port, threading.active_count()) == (port, threads)


def test_start_after_stop(server: SystemStatusServer, connect: Any, serve_bytes: Any) -> None:
    """A server that was stopped can be started again, and serves the same."""
    target = serve_bytes(b"{}")
    server.close()
    server.start()

    assert connect(server).get(target).answer().body == b"{}"


def test_start_and_stop_from_many_threads(server: SystemStatusServer) -> None:
    """Starts and stops that race leave one server or none."""
    actions = [server.start, server.close] * 10
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    server.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("selfhost-status-")]


def test_address_is_told(start_server: Any) -> None:
    """Port 0 becomes the real one; before the start and after the stop it is what was asked for."""
    server = start_server("localhost", 0)
    assert server.host in ("127.0.0.1", "::1")
    assert server.port > 0
    assert str(server.port) in repr(server)

    server.close()
    assert (server.host, server.port) == ("localhost", 0)


@needs_ipv6
def test_ipv6(start_server: Any, connect: Any) -> None:
    """An IPv6 address can be bound, and is written in brackets."""  # catalogue 112
    server = start_server("::1")

    assert connect(server).get("/live").answer().status == 200
    assert server.address == f"[::1]:{server.port}"


# ------------------------------------------------------------------ stop within a transfer


def test_stop_lets_a_transfer_finish(
    server: SystemStatusServer, connect: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """An answer on its way comes whole; the stop does not wait longer than for that."""
    client = connect(server, receive_buffer=65536).get(serve_bytes(HUGE))
    head = client.read_some(1000)
    port, started = server.port, time.monotonic()
    stopping = threading.Thread(target=server.close, kwargs={"timeout": 8.0})
    stopping.start()
    assert wait_until(lambda: is_free(port))

    assert (head + client.rest()).endswith(HUGE)
    stopping.join()
    assert time.monotonic() - started < 4.0


def test_stop_cuts_a_transfer_at_the_deadline(
    server: SystemStatusServer, connect: Any, serve_bytes: Any
) -> None:
    """A client that does not take its answer holds the stop up for the given time only."""
    client = connect(server, receive_buffer=65536).get(serve_bytes(HUGE))
    client.read_some(1000)
    started = time.monotonic()
    server.close(timeout=0.2)

    assert 0.15 < time.monotonic() - started < 5.0  # a client that stalls has 20
    assert len(client.rest()) < len(HUGE) - 1000


def test_stop_does_not_wait_for_silent_clients(
    server: SystemStatusServer, connect: Any, wait_until: Any
) -> None:
    """Clients without a request, or with half of one, do not hold the stop up."""
    clients = [connect(server).send(b"GET /live" * (number % 2)) for number in range(10)]
    assert wait_until(lambda: server.open_connections == 10)
    started = time.monotonic()
    server.close(timeout=8.0)

    assert time.monotonic() - started < 4.0
    assert [client.rest() for client in clients] == [b""] * 10


def test_stop_from_the_callback(
    registry: MetadataArtifactRegistry, connect: Any, wait_until: Any, isolation: str
) -> None:
    """A host that stops the server from within its own callback is not waited for by itself."""
    is_started = threading.Event()

    def stop_once_started() -> dict[str, str]:
        if is_started.is_set():
            server.close()
        return {}

    server = SystemStatusServer(registry, endpoints=stop_once_started, isolation=isolation).start()
    port = server.port
    is_started.set()
    connect(server).get("/health")

    assert wait_until(lambda: is_free(port) and not server.is_running)


# ------------------------------------------------------------------ what cannot be bound


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("203.0.113.9", 0),  # RFC 5737: nobody's
        ("a..b", 0),
        ("x" * 300, 0),
        ("127.0.0.1", 70000),
        ("127.0.0.1", -1),
    ],
)
def test_unusable_address(host: str, port: int, registry: MetadataArtifactRegistry, isolation: str) -> None:
    """An address that cannot be bound raises in the caller, names it and says what to do."""
    with pytest.raises(StatusServerError, match="DYN_SYSTEM_HOST") as caught:
        SystemStatusServer(registry, host, port, isolation=isolation).start()

    assert caught.value.address == f"{host}:{port}"


def test_unknown_host(
    monkeypatch: pytest.MonkeyPatch, registry: MetadataArtifactRegistry, isolation: str
) -> None:
    """So does a name that nobody knows."""

    def nobody(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(StatusServerError, match=r"no-such-host.*not known"):
        SystemStatusServer(registry, "no-such-host", 0, isolation=isolation).start()


def test_taken_port(server: SystemStatusServer, connect: Any) -> None:
    """A port that is taken raises, and whoever has it goes on."""
    second = SystemStatusServer(server.registry, port=server.port, isolation=server.isolation)

    with pytest.raises(StatusServerError, match="in use"):
        second.start()

    assert not second.is_running
    assert connect(server).get("/live").answer().status == 200


def test_failed_start_may_be_repeated(server: SystemStatusServer, connect: Any) -> None:
    """Once the port is free the same object starts."""
    second = SystemStatusServer(server.registry, port=server.port, isolation=server.isolation)
    with pytest.raises(StatusServerError):
        second.start()
    server.close()

    with second:
        assert connect(second).get("/live").answer().status == 200


def test_name_with_an_address_of_an_unknown_family(
    registry: MetadataArtifactRegistry, monkeypatch: pytest.MonkeyPatch, connect: Any
) -> None:
    """Of the addresses of a name, the first that this kernel can bind is taken."""
    usable = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    unusable = [(socket.AF_UNIX + 200, *usable[0][1:])]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: unusable + usable)

    with SystemStatusServer(registry) as server:
        assert connect(server).get("/live").answer().status == 200


NO_THREAD = """
import os, resource, sys, threading
from selfhost.errors import StatusServerError
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

server = SystemStatusServer(MetadataArtifactRegistry(), isolation=sys.argv[1])
SystemStatusServer(server.registry, isolation=sys.argv[1]).start().close()
before = sorted(os.listdir("/dev/fd"))
threading.stack_size(1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
try:
    server.start()
except StatusServerError as error:
    print(error)
assert not server.is_running
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
threading.stack_size(0)
assert sorted(os.listdir("/dev/fd")) == before, os.listdir("/dev/fd")
server.start().close()
"""


def test_no_thread_to_be_had(run_script: Any, isolation: str) -> None:
    """A process that can have no more threads gets one clear error, and keeps no descriptor."""
    done = run_script(NO_THREAD, isolation)

    assert (done.stderr, done.returncode) == ("", 0)
    assert "can't start new thread" in done.stdout
    assert "limit of threads" in done.stdout


NO_DESCRIPTOR = """
import os, resource, sys
from selfhost.errors import StatusServerError
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

isolation, most = sys.argv[1], int(sys.argv[2])
server = SystemStatusServer(MetadataArtifactRegistry(), "127.0.0.1", isolation=isolation)
server.start().close()
used = len(os.listdir("/dev/fd")) - 1
for spare in range(most):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, 4096))
    try:
        server.start()
    except StatusServerError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    assert len(os.listdir("/dev/fd")) - 1 == used
server.start().close()
"""


def test_no_descriptor_to_be_had(run_script: Any, isolation: str) -> None:
    """Whichever descriptor is missing, the start raises one kind of error and keeps none of the others."""
    # A thread takes four: the listener, the selector and the pair that wakes it up. A process takes the
    # listener, two pairs and, while it is launched, two pipes and /dev/null.
    needed = 4 if isolation == "thread" else 10
    done = run_script(NO_DESCRIPTOR, isolation, str(needed))

    assert (done.stderr, done.returncode) == ("", 0)
    assert len(done.stdout.splitlines()) == needed
