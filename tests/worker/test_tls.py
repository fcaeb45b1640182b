"""The server under TLS: to whom it speaks, how, and that answers are the same as without.

Clients that are slow or hostile: test_hostile_clients.py. The files: test_tls_files.py.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import ssl
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import trustme
from helpers import TIMEOUT

from selfhost.settings import ServerLimits
from selfhost.worker import tls_connection
from selfhost.worker.content import HeldFile, pin_file
from selfhost.worker.poller import READ, WRITE
from selfhost.worker.tls import TlsFiles

SMALL = b'{"a": 1}'
LARGE = os.urandom(2_100_000)
HUGE = LARGE * 6  # more than the kernel's buffers take

IGNORE_UNEXPECTED_EOF = 0x80  # as ssl.OP_IGNORE_UNEXPECTED_EOF, which Python 3.9 does not name

Context = Callable[..., ssl.SSLContext]


def request_for(target: str, *lines: str) -> bytes:
    """Return a whole GET."""
    return "\r\n".join((f"GET {target} HTTP/1.1", "Host: x", *lines, "", "")).encode()


@pytest.fixture
def context(authority: trustme.CA) -> Context:
    """Return a function that makes clients' contexts, with a certificate and up to a version if given."""

    def make(
        cert: Optional[trustme.LeafCert] = None, *, newest: str = "TLSv1_3", ciphers: str = ""
    ) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made.minimum_version = ssl.TLSVersion.TLSv1
            made.maximum_version = ssl.TLSVersion[newest]
        if ciphers or newest < "TLSv1_2":
            made.set_ciphers(f"{ciphers or 'ALL'}:@SECLEVEL=0")
        if cert is not None:
            cert.configure_cert(made)
        return made

    return make


class BioClient:
    """A client whose every byte the test holds in its hands: what it says waits in `said`."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.heard, self.said = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.heard, self.said, server_hostname="127.0.0.1")

    def until(self, act: Callable[[], Any], *, piece: int = 1 << 20) -> Any:
        """Repeat `act` until it needs nothing more of the server; send what it says in pieces."""
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                self.flush(piece)
                self.heard.write(self.sock.recv(1 << 16))

    def flush(self, piece: int = 1 << 20) -> None:
        """Send what was said."""
        data = self.said.read()
        for start in range(0, len(data), piece):
            self.sock.sendall(data[start : start + piece])

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes of answers."""
        data = self.read_some(size)
        return data if len(data) == size else data + self.read(size - len(data))

    def read_some(self, size: int = 1 << 16) -> bytes:
        """Read what comes next, `size` bytes at most."""
        data: bytes = self.until(lambda: self.tls.read(size))
        return data


@pytest.fixture
def bio_client(connect: Any, client_tls: ssl.SSLContext) -> Callable[..., BioClient]:
    """Return a function that connects such a client."""
    return lambda server: BioClient(connect(server).sock, client_tls)


# ------------------------------------------------------------------ the same answers


@pytest.mark.parametrize("size", [0, 1, 16_384, 65_536, 65_537, 300_000, len(LARGE), len(HUGE)])
@pytest.mark.parametrize("newest", ["TLSv1_2", "TLSv1_3"])
def test_every_size_comes_whole(
    size: int, newest: str, start_tls: Any, connect_tls: Any, serve_bytes: Any, context: Context
) -> None:
    """Every size comes whole, three times over one connection; the third time the head is known."""
    target = serve_bytes(HUGE[:size])
    client = connect_tls(start_tls(), context(newest=newest))

    for _ in range(3):
        assert client.get(target).answer().body == HUGE[:size]


def test_answers_are_those_of_plain_http(
    start_server: Any, start_tls: Any, connect: Any, connect_tls: Any, serve_bytes: Any
) -> None:
    """Status, fields and body are the same with TLS and without."""
    target = serve_bytes(LARGE)
    requests = [
        request_for(target), request_for(target, "Range: bytes=100-99999"), request_for("/nothing"),
        request_for(target, "If-None-Match: *"), request_for(target).replace(b"GET", b"HEAD"),
        request_for(target, "Connection: close"), request_for("/x").replace(b"GET", b"PUT"),
        b"nonsense\r\n\r\n",
    ]  # fmt: skip
    for request in requests:
        answers = []
        for server, open_one in ((start_server(), connect), (start_tls(), connect_tls)):
            client = open_one(server).send(request)
            answers.append(client.answer(body=b"HEAD" not in request and b"None" not in request))
            answers[-1].fields.pop("date")
        assert answers[0] == answers[1], request


def test_pipelined_records(start_tls: Any, bio_client: Any, serve_bytes: Any) -> None:
    """Requests in several records of one packet, and one in as many records as it has bytes, are answered."""
    server, target = start_tls(), serve_bytes(SMALL)
    client = bio_client(server)
    client.until(client.tls.do_handshake)
    for piece in [request_for(target)] * 40 + [bytes([byte]) for byte in request_for(target)]:
        client.tls.write(piece)
    client.flush()
    answers = b""
    while answers.count(SMALL) < 41:
        answers += client.read_some()

    assert answers.count(b"HTTP/1.1 200") == 41


def test_handshake_byte_by_byte(start_tls: Any, bio_client: Any, serve_bytes: Any) -> None:
    """Handshake and request may come in as many packets as they have bytes."""
    server, target = start_tls(), serve_bytes(SMALL)
    client = bio_client(server)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.until(client.tls.do_handshake, piece=1)
    client.tls.write(request_for(target))
    client.flush(piece=1)

    assert client.read(15) == b"HTTP/1.1 200 OK"


def test_handshake_that_waits_to_send(
    start_tls: Any, connect: Any, client_tls: ssl.SSLContext, tls_files: TlsFiles, authority: trustme.CA,
    wait_until: Any,
) -> None:  # fmt: skip
    """A certificate's chain that is longer than what the kernel takes at once leaves in several steps."""
    with open(tls_files.cert, "ab") as file:
        file.write(authority.cert_pem.bytes() * 120)
    server = start_tls()
    server._loop._listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # accepted sockets inherit it
    client = BioClient(connect(server, receive_buffer=4096).sock, client_tls)
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.do_handshake()
    client.flush()
    assert wait_until(lambda: {c.sock.wants for c in list(server._loop.connections)} == {WRITE})
    client.until(client.tls.do_handshake)
    client.tls.write(request_for("/live"))
    client.flush()

    assert client.read(15) == b"HTTP/1.1 200 OK"


def test_request_in_the_packet_that_ends_the_handshake(start_tls: Any, bio_client: Any) -> None:
    """A request that comes before the server knows that the handshake is over is answered."""
    client = bio_client(start_tls())
    client.until(client.tls.do_handshake)  # by TLS 1.3, what ends it is still to be sent
    assert client.said.pending
    client.tls.write(request_for("/live"))
    client.flush()

    assert client.read(15) == b"HTTP/1.1 200 OK"


def test_waiting_answer_goes_on(start_tls: Any, connect_tls: Any, serve_bytes: Any, wait_until: Any) -> None:
    """An answer that has to wait for its client within a piece goes on where it was, before the next one."""
    large, small = serve_bytes(HUGE), serve_bytes(SMALL, "g.json")
    server = start_tls()
    client = connect_tls(server, receive_buffer=4096)
    client.send(request_for(large) + request_for(small) + request_for(large))
    assert wait_until(lambda: any(c.is_sending for c in list(server._loop.connections)))

    assert [client.answer().body for _ in range(3)] == [HUGE, SMALL, HUGE]


def test_waiting_small_answers_go_on(
    start_tls: Any, connect_tls: Any, serve_bytes: Any, wait_until: Any
) -> None:
    """Small answers by known heads that the client does not take wait for it, and come in order."""
    data = [LARGE[:60_000], LARGE[60_000:120_000]]
    requests = b"".join(request_for(serve_bytes(part, f"{n}.json")) for n, part in enumerate(data))
    server = start_tls()
    client = connect_tls(server, receive_buffer=4096).send(requests * 100)
    assert wait_until(lambda: any(c.is_sending for c in list(server._loop.connections)))

    assert [client.answer().body for _ in range(200)] == data * 100


# ------------------------------------------------------------------ bounded memory


def test_connection_holds_a_piece(
    start_tls: Any, connect_tls: Any, registry: Any, tmp_path: Path, wait_until: Any
) -> None:
    """Of a file that is not in memory a waiting connection holds one piece, of one that is nothing."""
    path = tmp_path / "huge.json"
    path.write_bytes(HUGE)
    content = pin_file(str(path), max_pinned_bytes=1000)
    assert isinstance(content, HeldFile)
    registry.register("m", "_base", "held", content)
    registry.register("m", "_base", "pinned", path)
    server = start_tls()
    clients = [
        connect_tls(server, receive_buffer=4096).get(f"/v1/metadata/m/_base/{name}")
        for name in ("held", "pinned")
    ]
    assert wait_until(lambda: sum(c.is_sending for c in list(server._loop.connections)) == 2)
    held, pinned = sorted(server._loop.connections, key=lambda c: c._content.data is not None)

    assert 0 < held._out.nbytes <= tls_connection.PIECE_BYTES
    assert pinned._out.nbytes == 0
    assert [client.answer().body == HUGE for client in clients] == [True, True]


def test_send_takes_a_piece(tls_files: TlsFiles, client_tls: ssl.SSLContext) -> None:
    """One send encrypts one piece at most, whatever it is given: the others have their turn."""
    context = tls_files.context()
    context.sslsocket_class = tls_connection.TlsSocket
    ends = socket.socketpair()

    def read() -> None:
        with client_tls.wrap_socket(ends[0], server_hostname="127.0.0.1") as client:
            while client.recv(1 << 16):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    with context.wrap_socket(ends[1], server_side=True) as sock:
        assert sock.send(HUGE) == tls_connection.PIECE_BYTES
    reader.join()


def test_send_may_have_to_read(tls_files: TlsFiles) -> None:
    """Whichever way a call goes, it tells which way it has to wait."""
    context = tls_files.context()
    context.sslsocket_class = tls_connection.TlsSocket
    ends = socket.socketpair()
    ends[1].setblocking(False)
    with ends[0], context.wrap_socket(ends[1], server_side=True, do_handshake_on_connect=False) as sock:
        with pytest.raises(BlockingIOError):
            sock.send(b"x")  # before the handshake, which it begins by itself
        assert sock.wants == READ


# ------------------------------------------------------------------ which TLS


@pytest.mark.parametrize("newest", ["TLSv1", "TLSv1_1"])
def test_old_protocols(newest: str, start_tls: Any, connect_tls: Any, context: Context) -> None:
    """A client that speaks nothing newer than TLS 1.1 is refused, and told why."""  # catalogue 55
    server = start_tls()
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        connect_tls(server, context(newest=newest))

    assert server.counters().requests == {}


WEAK = ["ECDHE+AES+SHA1", "ECDHE+AES+SHA256:!AESGCM", "aNULL", "eNULL", "ARIA", "CAMELLIA", "AESCCM"]


@pytest.mark.parametrize("ciphers", WEAK)
def test_weak_ciphers(ciphers: str, start_tls: Any, connect_tls: Any, context: Context) -> None:
    """By TLS 1.2, keys that are not ephemeral, CBC, SHA-1 and the like are refused."""
    tls = context(newest="TLSv1_2", ciphers=ciphers)

    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        connect_tls(start_tls(), tls)


@pytest.mark.parametrize("ciphers", ["ECDHE+AESGCM", "ECDHE+CHACHA20"])
def test_good_ciphers(ciphers: str, start_tls: Any, connect_tls: Any, context: Context) -> None:
    """By TLS 1.2, ephemeral keys and AEAD ciphers are accepted; nothing is compressed."""
    client = connect_tls(start_tls(), context(newest="TLSv1_2", ciphers=ciphers))

    assert client.get("/live").answer().status == 200
    assert client.sock.compression() is None


def test_plain_http_is_hung_up_on(start_tls: Any, connect: Any) -> None:
    """Plain HTTP gets an alert and a clean end: not a reset, and nothing of HTTP."""
    client = connect(start_tls()).send(request_for("/live") * 1000)

    assert len(client.rest()) == 7


def test_protocol_is_named(start_tls: Any, connect_tls: Any, context: Context) -> None:
    """Of the protocols that a client offers HTTP/1.1 is chosen; one that offers others is served, too."""
    for offered, chosen in ((["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)):
        tls = context()
        if offered:
            tls.set_alpn_protocols(offered)
        client = connect_tls(start_tls(), tls)
        assert client.sock.selected_alpn_protocol() == chosen
        assert client.get("/live").answer().status == 200


# ------------------------------------------------------------------ clients' certificates


@pytest.fixture
def start_mtls(start_server: Any, tls_files: TlsFiles, authority: trustme.CA) -> Callable[..., Any]:
    """Start servers that ask clients for a certificate of the authority."""
    client_ca = tls_files.cert + ".ca"
    authority.cert_pem.write_to_path(client_ca)
    return lambda: start_server(tls=TlsFiles(tls_files.cert, tls_files.key, client_ca))


def past(days: int) -> datetime.datetime:
    """Return a time in the past."""
    return datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=days)


@pytest.mark.parametrize("newest", ["TLSv1_2", "TLSv1_3"])
def test_client_with_a_certificate(
    newest: str, start_mtls: Any, connect_tls: Any, authority: trustme.CA, context: Context
) -> None:
    """Who shows a certificate of the client CA is served, anew and by a ticket of the last time."""
    server, tls = start_mtls(), context(authority.issue_cert("frontend.test"), newest=newest)
    first = connect_tls(server, tls)
    assert first.get("/live").answer().status == 200
    session = first.sock.session

    sock = socket.create_connection((server.host, server.port), timeout=TIMEOUT)
    with tls.wrap_socket(sock, server_hostname=server.host, session=session) as resumed:
        resumed.sendall(request_for("/live", "Connection: close"))
        assert resumed.recv(15) == b"HTTP/1.1 200 OK"
        assert resumed.session_reused


@pytest.mark.parametrize("newest", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("whose", ["nobody's", "another CA's", "expired"])
def test_client_without_a_good_certificate(
    whose: str, newest: str, start_mtls: Any, connect_tls: Any, authority: trustme.CA, context: Context,
    wait_until: Any,
) -> None:  # fmt: skip
    """A client without a certificate, or with a wrong one, is told so and gets no answer."""  # catalogue 55
    cert, alert = None, "CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE"
    if whose == "another CA's":
        cert, alert = trustme.CA().issue_cert("frontend.test"), "UNKNOWN_CA"
    elif whose == "expired":
        cert = authority.issue_cert("frontend.test", not_before=past(9), not_after=past(2))
        alert = "CERTIFICATE_EXPIRED"
    server, tls = start_mtls(), context(cert, newest=newest)

    with pytest.raises(ssl.SSLError, match=alert):
        connect_tls(server, tls).get("/live").rest()

    assert wait_until(lambda: server.counters().handshake_failures == 1)
    assert server.counters().requests == {}


# ------------------------------------------------------------------ the end of a connection


def unsuppressed_end(client: Any) -> bytes:
    """Read to the end, which must be one by TLS: SSLEOFError where the connection just breaks off."""
    client.sock.suppress_ragged_eofs = False
    return b"".join(iter(lambda: client.sock.recv(1 << 16), b""))


@pytest.mark.parametrize(
    "said",
    [request_for("/live", "Connection: close"), b"nonsense\r\n\r\n", b"PUT / HTTP/1.1\r\nHost: x\r\n\r\n"],
)
def test_server_says_goodbye(said: bytes, start_tls: Any, connect_tls: Any) -> None:
    """After the last answer the server ends TLS before the connection: nothing was cut off."""
    client = connect_tls(start_tls()).send(said)

    assert unsuppressed_end(client).startswith(b"HTTP/1.1 ")


def test_server_says_goodbye_when_idle_and_when_closed(
    start_tls: Any, connect_tls: Any, wait_until: Any
) -> None:
    """Also after the idle time, and when the server is closed."""
    impatient = start_tls(limits=ServerLimits(idle_seconds=0.1))
    assert unsuppressed_end(connect_tls(impatient)) == b""

    server = start_tls()
    client = connect_tls(server)
    assert client.get("/live").answer().status == 200
    server.close()
    assert unsuppressed_end(client) == b""


def test_cut_off_answer_ends_without_goodbye(
    start_tls: Any, connect_tls: Any, client_tls: ssl.SSLContext, registry: Any, tmp_path: Path, caplog: Any
) -> None:
    """An answer that cannot go on is broken off, and TLS tells the client that this was not the end."""
    path = tmp_path / "huge.json"
    path.write_bytes(HUGE)
    registry.register("m", "_base", "held", pin_file(str(path), max_pinned_bytes=1000))
    client_tls.options &= ~IGNORE_UNEXPECTED_EOF  # Python 3.9 sets it
    client = connect_tls(start_tls(), receive_buffer=4096).get("/v1/metadata/m/_base/held")
    client.read_some(1000)
    path.write_bytes(b"x")

    with pytest.raises(ssl.SSLError, match="EOF"):
        unsuppressed_end(client)
    caplog.clear()  # the record holds the error, and that the file


@pytest.mark.parametrize("how", ["goodbye", "end", "reset", "end within a record"])
def test_client_that_leaves(
    how: str, start_tls: Any, bio_client: Any, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """However a client leaves, its connection is closed, and nobody is warned."""
    server = start_tls()
    client = bio_client(server)
    client.until(client.tls.do_handshake)
    client.tls.write(request_for("/live"))
    client.flush()
    client.read(15)
    if how == "goodbye":
        with contextlib.suppress(ssl.SSLError):
            client.tls.unwrap()
        client.flush()
    elif how == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(client.sock.detach())
    else:
        client.tls.write(request_for("/live"))
        client.sock.sendall(client.said.read()[: 20 if "record" in how else 0])
        client.sock.shutdown(socket.SHUT_WR)

    assert wait_until(lambda: server.open_connections == 0)
    assert caplog.messages == []
    assert server.counters().requests == {200: 1}


def test_garbage_after_the_handshake(start_tls: Any, connect_tls: Any, wait_until: Any) -> None:
    """Bytes that are no record of this connection end it, and are never read as a request."""
    server = start_tls()
    client = connect_tls(server)
    assert client.get("/live").answer().status == 200
    os.write(client.sock.fileno(), request_for("/live") * 3)

    assert wait_until(lambda: server.open_connections == 0)
    assert server.counters().requests == {200: 1}


def test_close_lets_a_download_finish(start_tls: Any, connect_tls: Any, serve_bytes: Any) -> None:
    """A server that is closed ends what it is sending; who has not shaken hands yet does not hold it up."""
    target = serve_bytes(HUGE)
    server = start_tls()
    client = connect_tls(server, receive_buffer=65536).get(target)
    head = client.read_some(15)
    closer = threading.Thread(target=server.close)
    closer.start()

    assert (head + client.rest()).endswith(HUGE)
    closer.join()


FORK = """
import os, socket, ssl, sys
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer
from selfhost.worker.tls import TlsFiles

context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
with SystemStatusServer(MetadataArtifactRegistry(), tls=TlsFiles(*sys.argv[1:])) as server:
    client = context.wrap_socket(socket.create_connection((server.host, server.port), timeout=5))
    def ask():
        client.sendall(b"GET /nothing HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        return client.recv(1000)[:12]
    print(ask())
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    print(ask(), server.open_connections)
    client.close()
"""


def test_forked_child_says_nothing(run_script: Any, tls_files: TlsFiles) -> None:
    """A forked child closes its copies of the connections without a word to the clients."""
    done = run_script(FORK, tls_files.cert, tls_files.key)

    assert done.stdout == "b'HTTP/1.1 404'\nb'HTTP/1.1 404' 1\n"


PLAIN = """
import socket, sys
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

with SystemStatusServer(MetadataArtifactRegistry()) as server:
    with socket.create_connection((server.host, server.port), timeout=5) as client:
        client.sendall(b"GET /nothing HTTP/1.0\\r\\n\\r\\n")
        client.recv(100)
print({"ssl", "_ssl", "hmac"} & set(sys.modules))
"""


def test_ssl_is_loaded_for_tls_alone(run_script: Any) -> None:
    """A server of plain HTTP never loads `ssl`."""
    assert run_script(PLAIN).stdout == "set()\n"
