"""HttpTransport against servers that send what a test says: answers, continuations, limits, connections."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable

import pytest
import wire
from helpers import MemorySink, needs_ipv6

import selfhost
from selfhost.errors import FetchError, FetchTimeout, HTTPStatusError, PeerNotAllowed, SizeLimitExceeded
from selfhost.frontend import http_connection, http_dial, http_pool
from selfhost.frontend.http_rules import retry_after
from selfhost.frontend.peer_policy import Peer
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.transport_http import HttpTransport

BODY = bytes(range(256)) * 40
CAP = 1 << 20
ETAG = '"v1"'
QUICK = FetchLimits(connect_seconds=0.3, read_seconds=0.3, total_seconds=20.0)
IN_TIME = 5.0  # seconds that a fetch with the quick limits has on a busy machine; a hanging one takes ten
A_WHILE = 9.0

Serve = Callable[..., wire.WireServer]


@pytest.fixture
def serve(leaves_nothing: None) -> Iterator[Serve]:
    """Start servers (answers); they end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *answers, **options: stack.enter_context(wire.WireServer(*answers, **options))


@pytest.fixture
def transport(serve: Serve) -> Iterator[HttpTransport]:
    """Return a transport that has little patience."""
    with HttpTransport(limits=QUICK) as transport:
        yield transport


def fetch(transport: HttpTransport, url: str, *, max_bytes: int = CAP) -> bytes:
    """Fetch into a new sink and return what came."""
    sink = MemorySink()
    transport.fetch(url, sink, max_bytes=max_bytes)
    return bytes(sink.data)


def begun(data: bytes, validator: str | None = ETAG) -> MemorySink:
    """Return a sink that an earlier transfer left behind."""
    sink = MemorySink()
    sink.data += data
    sink.validator = validator
    return sink


def fails(transport: HttpTransport, url: str, sink: MemorySink | None = None, **options: Any) -> FetchError:
    """Fetch, which must fail in time, and return the error."""
    started = time.monotonic()
    with pytest.raises(FetchError) as caught:
        transport.fetch(url, sink or MemorySink(), **{"max_bytes": CAP, **options})
    assert time.monotonic() - started < IN_TIME
    assert caught.value.url == url
    assert url[:40] in str(caught.value)
    return caught.value


# ------------------------------------------------------------------ what is asked


def test_request_is_exactly_this(transport: HttpTransport, serve: Serve) -> None:
    """No cookie, no credentials, nothing compressed; query kept, fragment dropped."""
    server = serve(wire.ok(BODY, "Set-Cookie: a=b"))

    assert fetch(transport, f"{server.url}%20.json?blake3=0#part") == BODY
    assert fetch(transport, server.url) == BODY
    agent = f"selfhost/{selfhost.__version__}"
    assert server.requests[0].decode().split("\r\n") == [
        "GET /f%20.json?blake3=0 HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Accept: */*",
        "Accept-Encoding: identity", f"User-Agent: {agent}", "", "",
    ]  # fmt: skip
    assert server.requests[1] == server.requests[0].replace(b"/f%20.json?blake3=0", b"/f")


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://localhost/x", "localhost", 80),
        ("https://LOCALHOST/x", "localhost", 443),
        ("http://[::1]/x", "::1", 80),
        ("http://0x7f000001:81", "127.0.0.1", 81),
    ],
)
def test_policy_is_asked_about_hosts_and_default_ports(url: str, host: str, port: int) -> None:
    """The policy hears of the host as URLs have it, and of the port that would be used."""
    asked: list[Peer] = []
    with pytest.raises(PeerNotAllowed):
        HttpTransport(peer_policy=lambda peer: bool(asked.append(peer))).fetch(url, MemorySink(), max_bytes=1)

    assert {(peer.host, peer.port) for peer in asked} == {(host, port)}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a\nb", "http://127.0.0.1:1/a b", "http://127.0.0.1:1/\x7f", " http://127.0.0.1:1/",
        "ftp://127.0.0.1:1/", "http://", "http://127.0.0.1:99999/", "/etc/passwd", "http://[fe80::1%25lo]/x",
        "http://a..b:1/", "http://" + "a" * 64 + ":1/",
    ],
)  # fmt: skip
def test_urls_that_cannot_be_fetched(url: str) -> None:
    """A URL that cannot stand in a request, or has no host for HTTP, is refused with its text."""
    with pytest.raises(FetchError, match="cannot fetch") as caught:
        HttpTransport().fetch(url, MemorySink(), max_bytes=1)

    assert not caught.value.is_transient


def test_credentials_in_a_url_are_refused_and_not_repeated(transport: HttpTransport, serve: Serve) -> None:
    """A password in a URL goes nowhere: not to the server, not into the message."""
    server = serve(wire.ok())
    with pytest.raises(FetchError, match="would not be sent") as caught:
        fetch(transport, server.url.replace("//", "//me:secret@"))

    assert "secret" not in str(caught.value) + caught.value.url
    assert server.connections == 0


def test_proxies_of_the_environment_are_ignored(
    transport: HttpTransport, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traffic between pods goes through a proxy that somebody set for other things."""
    server, proxy = serve(wire.ok(BODY)), serve(wire.ok(b"proxy"))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy.url)

    assert fetch(transport, server.url) == BODY
    assert proxy.connections == 0


def test_user_agent_can_be_set_but_not_break_out(transport: HttpTransport, serve: Serve) -> None:
    """An own User-Agent is sent; one with a line break is refused."""
    server = serve(wire.ok())
    with HttpTransport(user_agent="gateway/1 (x)") as own:
        fetch(own, server.url)

    assert b"\r\nUser-Agent: gateway/1 (x)\r\n" in server.requests[0]
    with pytest.raises(ValueError, match="User-Agent"):
        HttpTransport(user_agent="a\r\nX: y")


# ------------------------------------------------------------------ answers that bring a file


@pytest.mark.parametrize(
    "answer",
    [
        wire.ok(BODY),
        wire.ok(BODY, "Content-Encoding: identity"),
        wire.head(f"CONTENT-length:{len(BODY)} \t ", "content-encoding:\tIdentity ") + BODY,
        wire.chunked(BODY[:1], BODY[1:]),
        wire.chunked(*(BODY[at : at + 1] for at in range(len(BODY)))),
        wire.chunked(BODY, end=b"0;last=1\r\nTrailer: x\r\n\r\n"),
        wire.closing(wire.head() + BODY),
        wire.closing(wire.ok(BODY).replace(b"HTTP/1.1", b"HTTP/1.0")),
        wire.closing(wire.ok(BODY, "Connection: close")),
        wire.head(status="100 Continue") * 3 + wire.head(status="103 Early Hints") * 3 + wire.ok(BODY),
    ],
    ids=[
        "length",
        "identity",
        "spaces",
        "chunks",
        "tiny chunks",
        "trailer",
        "until close",
        "1.0",
        "close",
        "interim",
    ],
)
def test_body_however_it_is_framed(transport: HttpTransport, serve: Serve, answer: Any) -> None:
    """Each of HTTP's ways to say where a body ends brings the same bytes."""
    server = serve(answer)

    assert fetch(transport, server.url, max_bytes=len(BODY)) == BODY


# catalogue 124
@pytest.mark.parametrize("answer", [wire.ok(), wire.chunked(), wire.closing(wire.head())])
def test_empty_file(transport: HttpTransport, serve: Serve, answer: Any) -> None:
    """No bytes are a file, too, even where none are allowed."""
    assert fetch(transport, serve(answer).url, max_bytes=0) == b""


def test_large_file_comes_in_large_pieces(
    transport: HttpTransport, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file larger than the buffer is handed over in few pieces, none larger than a megabyte."""
    monkeypatch.setattr(http_connection, "PIECE_SECONDS", A_WHILE)
    body = os.urandom((3 << 20) + 5)
    sizes: list[int] = []

    class CountingSink(MemorySink):
        def write(self, data: Any) -> None:
            sizes.append(len(data))
            super().write(data)

    sink = CountingSink()
    transport.fetch(serve(wire.ok(body)).url, sink, max_bytes=len(body))

    assert sink.data == body
    assert sizes == [1 << 20, 1 << 20, 1 << 20, 5]


@pytest.mark.parametrize(
    ("field", "validator"),
    [
        ('ETag: "abc"', '"abc"'),
        ('ETag: W/"abc"', None),
        ("ETag: abc", None),
        ('ETag: "a b"', None),
        (f'ETag: "{"x" * 257}"', None),
        ('ETag: "a"\r\nETag: "b"', None),
        ("X: y", None),
    ],
)
def test_only_strong_tags_are_kept(
    transport: HttpTransport, serve: Serve, field: str, validator: str | None
) -> None:
    """The sink learns the entity tag that a continuation can rely on, and no other."""
    sink = MemorySink()
    transport.fetch(serve(wire.ok(BODY, field)).url, sink, max_bytes=CAP)

    assert sink.validator == validator


def test_ordinary_server(transport: HttpTransport, leaves_nothing: None) -> None:
    """Python's http.server, which closes after each answer, is understood."""  # catalogue 126

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        got = [fetch(transport, f"http://127.0.0.1:{server.server_port}/") for _ in range(2)]
        server.shutdown()
        thread.join()

    assert got == [BODY, BODY]


# ------------------------------------------------------------------ continuations

HALF, REST = BODY[:5000], BODY[5000:]
TAG = f"ETag: {ETAG}"


# catalogue 49, 116
@pytest.mark.parametrize(
    "first",
    [
        wire.ok(BODY, TAG),
        wire.ok(BODY, 'ETag: "v2"'),
        wire.ok(BODY),
        wire.part(5000, REST, len(BODY), 'ETag: "v2"'),
        wire.part(5000, REST, len(BODY), f"ETag: W/{ETAG}"),
        wire.part(5000, REST, len(BODY)),
        wire.part(4999, REST, len(BODY), TAG),
        wire.part(5000, REST[:-1], len(BODY), TAG),
        wire.part(0, BODY, len(BODY), TAG),
        wire.ok(REST, TAG, "Content-Range: bytes 4999-10239/10240", status="206 Partial Content"),
        wire.ok(REST, TAG, "Content-Range: bytes 5000-10238/10240", status="206 Partial Content"),
        wire.ok(REST, TAG, f"Content-Range: bytes 5000-{len(BODY) - 1}/*", status="206 Partial Content"),
        wire.ok(REST, TAG, "Content-Range: items 5000-10239/10240", status="206 Partial Content"),
        wire.ok(REST, TAG, status="206 Partial Content"),
        wire.ok(REST[:9], TAG, "Content-Range: bytes 5000-10239/10240", status="206 Partial Content"),
        wire.ok(b"--x", TAG, "Content-Type: multipart/byteranges; boundary=x", status="206 Partial Content"),
        wire.ok(b"no", "Content-Range: bytes */10240", status="416 Range Not Satisfiable"),
        wire.silent_after(wire.part(5000, b"", 1 << 62, TAG)),
    ],
    ids=[
        "range ignored", "new version", "no tag", "206 of a new version", "206 weak", "206 no tag",
        "206 starts early", "206 ends early", "206 whole", "206 odd start", "206 odd end",
        "206 unknown total", "206 unit", "206 no range", "206 other length", "multipart", "416",
        "206 nonsense",
    ],
)  # fmt: skip
def test_doubtful_continuation_starts_anew(transport: HttpTransport, serve: Serve, first: Any) -> None:
    """Whatever is not surely the rest of the same file makes the transport bring it from its first byte."""
    server = serve(first, wire.ok(BODY))
    sink = begun(HALF)
    transport.fetch(server.url, sink, max_bytes=CAP)

    assert (bytes(sink.data), sink.restarts) == (BODY, 1)
    assert b"\r\nRange: bytes=5000-\r\nIf-Range: " + ETAG.encode() in server.requests[0]
    assert [b"Range" in request for request in server.requests[1:]] in ([], [False])


@pytest.mark.parametrize("answer", [wire.part(5000, REST, len(BODY), TAG)])
def test_continuation(transport: HttpTransport, serve: Serve, answer: bytes) -> None:
    """A 206 of the same strong tag goes on where the first transfer broke off, with one request."""
    server = serve(answer)
    sink = begun(HALF)
    transport.fetch(server.url, sink, max_bytes=len(BODY))

    assert (bytes(sink.data), sink.restarts, sink.validator) == (BODY, 0, ETAG)
    assert len(server.requests) == 1


@pytest.mark.parametrize("sink", [begun(HALF, None), begun(HALF, f"W/{ETAG}"), begun(HALF, '"\r\nX: y"')])
def test_without_a_strong_tag_nothing_is_continued(
    transport: HttpTransport, serve: Serve, sink: MemorySink
) -> None:
    """Bytes of an unknown version are dropped, when the new ones come."""
    server = serve(wire.ok(BODY))
    transport.fetch(server.url, sink, max_bytes=CAP)

    assert bytes(sink.data) == BODY
    assert b"Range" not in server.requests[0]


def test_full_sink_is_not_continued(transport: HttpTransport, serve: Serve) -> None:
    """There is nothing to ask for behind as many bytes as the file may have."""
    server = serve(wire.ok(BODY))
    sink = begun(b"x" * len(BODY))
    transport.fetch(server.url, sink, max_bytes=len(BODY))

    assert bytes(sink.data) == BODY
    assert b"Range" not in server.requests[0]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (wire.ok(b"", status="503 Busy"), HTTPStatusError),
        (wire.ok(b"", status="404 Not Found"), HTTPStatusError),
        (wire.ok(BODY, "Content-Encoding: gzip"), FetchError),
        (wire.closing(b""), FetchError),
        (wire.part(5000, REST + b"x", len(BODY) + 1, TAG), SizeLimitExceeded),
        (
            wire.silent_after(
                wire.head("Content-Range: bytes 5000-99999/100000", TAG, status="206 Partial Content")
            ),
            SizeLimitExceeded,
        ),
    ],
)
def test_failed_continuation_leaves_the_bytes(
    transport: HttpTransport, serve: Serve, answer: Any, error: type
) -> None:
    """An answer that brings nothing takes nothing: the next source can still continue."""
    sink = begun(HALF)
    caught = fails(transport, serve(answer).url, sink, max_bytes=len(BODY))

    assert type(caught) is error
    assert (bytes(sink.data), sink.validator, sink.restarts) == (HALF, ETAG, 0)


# ------------------------------------------------------------------ bodies that break

STARTED = wire.head(f"Content-Length: {len(BODY)}", TAG)


# catalogue 2, 56
@pytest.mark.parametrize(
    "answer",
    [
        wire.closing(STARTED + HALF),
        wire.closing(wire.head("Transfer-Encoding: chunked", TAG) + b"1388\r\n" + HALF + b"\r\n"),
        wire.closing(wire.head("Transfer-Encoding: chunked", TAG) + b"1388\r\n" + HALF + b"\r\nzz\r\n"),
        wire.closing(wire.head("Transfer-Encoding: chunked", TAG) + b"2710\r\n" + HALF),
    ],
    ids=["length", "chunks", "garbage", "within a chunk"],
)
def test_body_that_ends_early(transport: HttpTransport, serve: Serve, answer: Any) -> None:
    """A shorter body is an error worth another try, and what came can be continued."""
    server = serve(answer, wire.part(5000, REST, len(BODY), TAG))
    sink = MemorySink()
    error = fails(transport, server.url, sink)

    assert error.is_transient
    assert (bytes(sink.data), sink.validator) == (HALF, ETAG)
    transport.fetch(server.url, sink, max_bytes=CAP)
    assert bytes(sink.data) == BODY


def test_reset_in_the_body_leaves_what_came(transport: HttpTransport, serve: Serve) -> None:
    """Bytes that were received before a broken connection are in the sink, though they fill no buffer."""
    come = threading.Event()

    class TellingSink(MemorySink):
        def write(self, data: Any) -> None:
            super().write(data)
            if self.received >= 1 << 20:
                come.set()

    large = os.urandom(1 << 20) + HALF
    start = wire.head(f"Content-Length: {len(large) + 9}", TAG)
    sink = TellingSink()
    error = fails(transport, serve(wire.resetting(start + large, after=come)).url, sink, max_bytes=2 << 20)

    assert error.is_transient
    assert bytes(sink.data) in (large, large[: 1 << 20])  # a reset may overtake the last bytes


# catalogue 7
@pytest.mark.parametrize(
    "framing", [f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked", "X: close"]
)
def test_stall_in_the_body(transport: HttpTransport, serve: Serve, framing: str) -> None:
    """Silence ends the fetch after `read_seconds`, and what came before it stays."""
    start = wire.head(framing, TAG) + (b"2710\r\n" if "chunked" in framing else b"")
    sink = MemorySink()
    error = fails(transport, serve(wire.silent_after(start + HALF)).url, sink)

    assert isinstance(error, FetchTimeout)
    assert (error.phase, error.seconds, error.is_transient) == ("body", 0.3, False)
    assert bytes(sink.data) == HALF


FRAMINGS = ["Content-Length: 1000000", "Transfer-Encoding: chunked", "X: close"]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_slow_body_is_handed_over_while_it_comes(serve: Serve, framing: str) -> None:
    """However a body is framed, what came of it is in the sink soon after, in order and once."""

    class FullSink(MemorySink):
        def write(self, data: Any) -> None:
            super().write(data)
            if len(pieces) == 3:
                raise InterruptedError
            pieces.append(len(data))

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(wire.head(framing))
        for number in range(400):
            data = b"%d," % number * 100
            sock.sendall(b"%x\r\n%s\r\n" % (len(data), data) if "chunked" in framing else data)
            closing.wait(0.02)

    pieces: list[int] = []
    sink = FullSink()
    with HttpTransport() as transport, pytest.raises(InterruptedError):
        transport.fetch(serve(play).url, sink, max_bytes=CAP)

    whole = b"".join(b"%d," % number * 100 for number in range(400))
    assert sink.received < len(whole) / 2
    assert whole.startswith(sink.data)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_dripping_body_in_small_pieces(serve: Serve, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That bytes are handed over at once makes a body that drips no faster."""
    monkeypatch.setattr(http_connection, "PIECE_SECONDS", 0.0)
    drop = b"1\r\nx\r\n" if "chunked" in framing else b"x"
    with HttpTransport(limits=QUICK) as transport:
        error = fails(transport, serve(wire.endless(wire.head(framing), drop, every=0.01)).url)

    assert isinstance(error, FetchTimeout)
    assert (error.phase, error.seconds) == ("body", 0.3)


def test_coding_is_bounded_over_all_pieces(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte handed over now and then buys no new room for chunk extensions."""
    monkeypatch.setattr(http_connection, "PIECE_SECONDS", 0.0)
    flood = b"1;" + b"x" * 60000 + b"\r\nx\r\n"
    with HttpTransport(limits=FetchLimits(read_seconds=A_WHILE)) as transport:
        error = fails(transport, serve(wire.endless(wire.head("Transfer-Encoding: chunked"), flood)).url)

    assert "coding" in str(error)


@pytest.mark.parametrize("framing", ["Content-Length: 10240", "Transfer-Encoding: chunked", "X: close"])
def test_body_in_smallest_pieces(serve: Serve, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is handed over whenever something came is whole."""
    monkeypatch.setattr(http_connection, "PIECE_SECONDS", 0.0)

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(wire.head(framing))
        for at in range(0, len(BODY), 640):
            data = BODY[at : at + 640]
            sock.sendall(b"280\r\n%s\r\n" % data if "chunked" in framing else data)
            closing.wait(0.002)
        sock.sendall(b"0\r\n\r\n" if "chunked" in framing else b"")
        sock.shutdown(socket.SHUT_WR)

    with HttpTransport(limits=QUICK) as transport:
        assert fetch(transport, serve(play).url) == BODY


@pytest.mark.parametrize("framing", FRAMINGS)
def test_dripping_body(transport: HttpTransport, serve: Serve, framing: str) -> None:
    """A byte now and then is as good as none: too few in `read_seconds` end the fetch."""
    drop = b"1\r\nx\r\n" if "chunked" in framing else b"x"
    error = fails(transport, serve(wire.endless(wire.head(framing), drop, every=0.01)).url)

    assert isinstance(error, FetchTimeout)
    assert (error.phase, error.seconds) == ("body", 0.3)


def test_slow_but_steady_body_is_fine(serve: Serve) -> None:
    """A body that takes several windows, each with enough bytes in it, arrives."""
    piece = BODY[:1024]

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(wire.head(f"Content-Length: {20 * len(piece)}"))
        for _ in range(20):
            sock.sendall(piece)
            closing.wait(0.1)

    limits = FetchLimits(read_seconds=0.7, min_bytes_per_second=1024)
    with HttpTransport(limits=limits) as patient:
        assert fetch(patient, serve(play).url) == 20 * piece


def test_slow_sink_is_not_the_servers_fault(serve: Serve) -> None:
    """Time that the sink takes does not count as the server's silence, nor what the server did before."""

    class SlowSink(MemorySink):
        def write(self, data: Any) -> None:
            time.sleep(0.4)
            super().write(data)

    body, sink = os.urandom((1 << 20) + 5000), SlowSink()

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(wire.head(f"Content-Length: {len(body)}") + body[: (1 << 20) - 3])
        for at, pause in ((-3, 0.2), (-2, 0.2), (-1, 0.1)):  # the last one into a new, still empty window
            closing.wait(pause)
            sock.sendall(body[(1 << 20) + at : (1 << 20) + at + 1])
        closing.wait(0.05)
        sock.sendall(body[1 << 20 :])

    with HttpTransport(limits=QUICK) as transport:
        transport.fetch(serve(play).url, sink, max_bytes=len(body))

    assert sink.data == body


def test_slow_sink_of_few_bytes_is_not_the_servers_fault(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where too few bytes had come before the sink took its time."""
    monkeypatch.setattr(http_connection, "PIECE_SECONDS", 0.0)

    class SlowSink(MemorySink):
        def write(self, data: Any) -> None:
            if not self.received:
                time.sleep(0.4)
            super().write(data)

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(wire.head(f"Content-Length: {len(BODY)}"))
        closing.wait(0.05)  # else the first piece has more than these bytes
        sock.sendall(BODY[:100])
        closing.wait(0.1)
        sock.sendall(BODY[100:])

    sink = SlowSink()
    with HttpTransport(limits=QUICK) as transport:
        transport.fetch(serve(play).url, sink, max_bytes=CAP)

    assert sink.data == BODY


def test_total_time_of_a_fetch(serve: Serve) -> None:
    """A body that is never slow enough for the other limits still ends with the total one."""
    server = serve(wire.endless(wire.head(), b"x" * 4096, every=0.01))
    with HttpTransport(limits=FetchLimits(read_seconds=5.0, total_seconds=0.4)) as transport:
        error = fails(transport, server.url, max_bytes=1 << 30)

    assert isinstance(error, FetchTimeout)
    assert (error.phase, error.seconds) == ("total", 0.4)


def test_total_time_cuts_a_silence_short(serve: Serve) -> None:
    """The last wait is no longer than the time that is left."""
    with HttpTransport(limits=FetchLimits(read_seconds=A_WHILE, total_seconds=0.3)) as transport:
        error = fails(transport, serve(wire.silent_after(STARTED)).url)

    assert isinstance(error, FetchTimeout)
    assert error.phase == "total"


@pytest.mark.parametrize(
    ("limits", "phase"),
    [
        (FetchLimits(connect_seconds=9.0, read_seconds=0.3, total_seconds=20.0), "headers"),
        (FetchLimits(connect_seconds=9.0, read_seconds=9.0, total_seconds=0.5), "total"),
    ],
)
def test_time_that_passes_between_two_steps(serve: Serve, limits: FetchLimits, phase: str) -> None:
    """A deadline that is over before a step begins is a time-out as well."""
    now = iter(range(1000))
    with HttpTransport(limits=limits, clock=lambda: next(now) / 5) as transport:
        error = fails(transport, serve(wire.ok(BODY)).url)

    assert isinstance(error, FetchTimeout)
    assert error.phase == phase


# ------------------------------------------------------------------ too much


# catalogue 4
@pytest.mark.parametrize(
    ("answer", "received"),
    [
        (wire.silent_after(wire.head("Content-Length: 101")), 101),
        (wire.silent_after(wire.head("Content-Length: 999999999999999999")), 999999999999999999),
        (wire.endless(wire.head("Transfer-Encoding: chunked"), b"9\r\nxxxxxxxxx\r\n"), 101),
        (wire.endless(wire.head(), b"x" * 9), 101),
    ],
)
def test_more_bytes_than_allowed(transport: HttpTransport, serve: Serve, answer: Any, received: int) -> None:
    """What is announced is refused unread, what is not is read to one byte behind the cap."""
    sink = MemorySink()
    error = fails(transport, serve(answer).url, sink, max_bytes=100)

    assert isinstance(error, SizeLimitExceeded)
    assert (error.limit, error.received) == (100, received)
    assert sink.received <= 100


def test_refused_size_tells_the_type(transport: HttpTransport, serve: Serve) -> None:
    """The page of a portal in the place of a small file is recognisable."""  # catalogue 119
    error = fails(transport, serve(wire.ok(BODY, "Content-Type: text/html")).url, max_bytes=100)

    assert "found 10240 or more of type 'text/html'" in str(error)


# catalogue 53
@pytest.mark.parametrize(
    "answer",
    [
        wire.endless(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096),
        wire.endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 500),
        wire.endless(b"", wire.head(status="100 Continue") * 100),
        wire.endless(b"", wire.head(status="103 Early Hints") * 100),
        wire.endless(b"", wire.head("X: " + "y" * 8192, status="102 Processing")),
        wire.endless(b"", b"x" * 4096),
        wire.endless(wire.head("Transfer-Encoding: chunked"), b";x" * 2048),
        wire.endless(wire.head("Transfer-Encoding: chunked") + b"5;", b"x" * 4096),
        wire.endless(wire.head("Transfer-Encoding: chunked"), b"1;" + b"x" * 60000 + b"\r\nx\r\n"),
        wire.endless(wire.head("Transfer-Encoding: chunked") + b"0\r\n", b"Trailer: x\r\n" * 300),
        wire.endless(wire.head("Transfer-Encoding: chunked") + b"0\r\n", b"x" * 4096),
    ],
    ids=[
        "endless field", "many fields", "100s", "103s", "large 102s", "endless status line", "chunk garbage",
        "endless extension", "large extensions", "trailers", "endless trailer",
    ],
)  # fmt: skip
def test_floods_end_soon(serve: Serve, answer: Any) -> None:
    """Header, interim answers, chunk extensions and trailers are bounded by bytes, not only by time."""
    with HttpTransport(limits=FetchLimits(read_seconds=A_WHILE)) as transport:
        error = fails(transport, serve(answer).url)

    assert not isinstance(error, FetchTimeout)


@pytest.mark.parametrize("every", [0.01, 10.0])
@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", wire.head(status="100 Continue")])
def test_header_that_does_not_end_in_time(
    transport: HttpTransport, serve: Serve, start: bytes, every: float
) -> None:
    """A header that drips, or does not come, ends the fetch after `read_seconds` in all."""
    error = fails(transport, serve(wire.endless(start, b"H", every=every)).url)

    assert isinstance(error, FetchTimeout)
    assert (error.phase, error.seconds) == ("headers", 0.3)


# ------------------------------------------------------------------ answers that bring no file


# catalogue 11, 12
@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
def test_redirects_are_not_followed(transport: HttpTransport, serve: Serve, status: str) -> None:
    """A redirect is an error that says, shortly, where it pointed; nobody goes there."""
    other = serve(wire.ok(BODY))
    error = fails(transport, serve(wire.ok(b"", f"Location: {other.url}", status=status)).url)

    assert isinstance(error, HTTPStatusError)
    assert (error.status, error.is_transient) == (int(status[:3]), False)
    assert "redirects are not followed" in str(error)
    assert other.url in str(error)
    assert other.connections == 0


def test_redirect_to_an_endless_place(transport: HttpTransport, serve: Serve) -> None:
    """The message stays short, whatever the server says."""
    long = "x" * 20000
    error = fails(transport, serve(wire.ok(b"", f"Location: {long}", status=f"302 {long}")).url)

    assert len(str(error)) < 500


# catalogue 118, 121
@pytest.mark.parametrize(
    ("status", "is_transient"),
    [
        (201, False), (202, False), (204, False), (205, False), (206, False), (300, False), (304, False),
        (400, False), (401, False), (403, False), (404, False), (410, False), (416, False), (501, False),
        (505, False), (101, False), (999, False),
        (408, True), (425, True), (429, True), (500, True), (502, True), (503, True), (504, True),
    ],
)  # fmt: skip
def test_statuses(transport: HttpTransport, serve: Serve, status: int, is_transient: bool) -> None:
    """Only 200 brings a file that was asked for whole; the error says whether to try again."""
    sink = MemorySink()
    error = fails(transport, serve(wire.ok(BODY, status=f"{status} Text")).url, sink)

    assert isinstance(error, HTTPStatusError)
    assert (error.status, error.is_transient, sink.received) == (status, is_transient, 0)


NOW = 784111777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110


# catalogue 120
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0), ("120", 120.0), ("-1", None), ("1.5", None), ("soon", None), ("", None), (None, None),
        ("9" * 30, None), ("١٢", None),
        ("Sun, 06 Nov 1994 08:50:07 GMT", 30.0), ("Sunday, 06-Nov-94 08:50:07 GMT", 30.0),
        ("Sun Nov  6 08:50:07 1994", 30.0), ("Sun, 06 Nov 1994 08:49:07 GMT", None),
        ("Sun, 99 Nov 99999999 99:99:99 GMT", None),
    ],
)  # fmt: skip
def test_retry_after(text: str | None, seconds: float | None) -> None:
    """Seconds and dates of the future count, anything else is as if it were not there."""
    assert retry_after(text, now=NOW) == seconds


def test_retry_after_reaches_the_error(transport: HttpTransport, serve: Serve) -> None:
    """What the server asks for is on the error."""
    error = fails(transport, serve(wire.ok(b"", "Retry-After: 7", status="503 Busy")).url)

    assert error.retry_after == 7.0


# catalogue 52
@pytest.mark.parametrize(
    "fields",
    [
        ["Content-Encoding: gzip"],
        ["Content-Encoding: identity, gzip"],
        ["Content-Encoding: identity", "Content-Encoding: br"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked "],  # legal, but http.client takes it for something else
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 5"],
        ["Content-Length: -5"],
        ["Content-Length: +5"],
        ["Content-Length: 0x5"],
        ["Content-Length: 5_0"],
        ["Content-Length: five"],
        ["Content-Length: " + "9" * 5000],
    ],
)
def test_codings_that_nobody_asked_for(transport: HttpTransport, serve: Serve, fields: list[str]) -> None:
    """A body that is compressed, or framed ambiguously, is refused unread and at once."""
    sink = begun(HALF, None)
    error = fails(transport, serve(wire.silent_after(wire.head(*fields) + b"5\r\nxxxxx")).url, sink)

    assert not isinstance(error, (FetchTimeout, HTTPStatusError))
    assert not error.is_transient
    assert bytes(sink.data) == HALF


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100 + b"\r\n\r\n", b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"<html>\r\n\r\n",
        b"HTTP/1.1 -200 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n", b"HTTP/1.1\r\n\r\n", b"\r\n\r\n",
        b"\x16\x03\x01\r\n",
    ],
)  # fmt: skip
def test_answers_that_are_no_http(transport: HttpTransport, serve: Serve, data: bytes) -> None:
    """Garbage is an error that says so, not worth another try."""
    error = fails(transport, serve(wire.closing(data)).url)

    assert "expected an HTTP/1.1 answer" in str(error)
    assert not error.is_transient


@pytest.mark.parametrize("size", [b"-1", b"-5", b"+3", b"0x3", b"", b" ", b"\xb2", b"1" * 40])
def test_chunk_sizes_that_are_none(transport: HttpTransport, serve: Serve, size: bytes) -> None:
    """Whatever http.client makes of an odd chunk size, the fetch ends, within its cap and in time."""
    sink = MemorySink()
    answer = wire.closing(
        wire.head("Transfer-Encoding: chunked") + size + b"\r\n" + b"abc\r\n0\r\n\r\n" * 2000
    )
    with contextlib.suppress(FetchError):
        transport.fetch(serve(answer).url, sink, max_bytes=100)

    assert sink.received <= 100


@pytest.mark.parametrize(
    "answer", [wire.closing(b""), wire.closing(wire.head(status="100 Continue")), wire.resetting(b"")]
)
def test_no_answer(transport: HttpTransport, serve: Serve, answer: Any) -> None:
    """A connection that ends before the answer is worth another try, which is the caller's to make."""
    server = serve(answer)
    error = fails(transport, server.url)

    assert error.is_transient
    assert server.connections == 1


# ------------------------------------------------------------------ connecting


def test_nobody_listens(transport: HttpTransport) -> None:
    """A refused connection names the address, and is worth another try."""
    with socket.socket() as deaf:  # bound, so that nobody else gets the port
        deaf.bind(("127.0.0.1", 0))
        error = fails(transport, f"http://127.0.0.1:{deaf.getsockname()[1]}/f")

    assert error.is_transient
    assert "127.0.0.1: Connection refused" in str(error)


def test_nobody_answers(transport: HttpTransport, leaves_nothing: None) -> None:
    """A connection that is not made in time says so."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # what the queue takes; further ones are not answered
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        error = fails(transport, f"http://127.0.0.1:{full.getsockname()[1]}/f")

    assert isinstance(error, FetchTimeout)
    assert (error.phase, error.seconds) == ("connect", 0.3)


Resolver = Callable[..., None]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Return a function that makes every host name stand for some addresses, for this process."""

    def stand_for(*addresses: str) -> None:
        def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
            return [
                (
                    family,
                    socket.SOCK_STREAM,
                    6,
                    "",
                    (address, port, 0, 0) if ":" in address else (address, port),
                )
                for family, address in zip(families, addresses)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return stand_for


def test_next_address_is_tried(transport: HttpTransport, serve: Serve, resolver: Resolver) -> None:
    """Of several addresses, one that refuses and one that the policy refuses are passed over."""
    server = serve(wire.ok(BODY))
    resolver("169.254.169.254", "127.0.0.2", "127.0.0.1")

    assert fetch(transport, f"http://worker:{server.port}/f") == BODY


def test_every_address_is_named(transport: HttpTransport, resolver: Resolver) -> None:
    """When none will do, the error says why for each."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    resolver("169.254.169.254", "127.0.0.2")
    error = fails(transport, f"http://worker:{port}/f")

    assert not isinstance(error, PeerNotAllowed)
    assert "169.254.169.254: refused by the peer policy" in str(error)
    assert "127.0.0.2: Connection refused" in str(error)


@pytest.fixture
def silent(serve: Serve) -> Iterator[Callable[[int], tuple[list[str], int]]]:
    """Return a function (count) -> addresses on which connections are not answered, and their port."""
    with contextlib.ExitStack() as stack:

        def start(count: int) -> tuple[list[str], int]:
            port = 0
            addresses = [f"127.0.0.{10 + number}" for number in range(count)]
            for address in addresses:
                full = stack.enter_context(socket.create_server((address, port), backlog=0))
                port = full.getsockname()[1]
                for _ in range(3):  # what the queue takes; further ones are not answered
                    filler = stack.enter_context(socket.socket())
                    filler.setblocking(False)
                    filler.connect_ex(full.getsockname())
            return addresses, port

        yield start


Silent = Callable[[int], tuple[list[str], int]]


def test_silent_addresses_share_the_time(resolver: Resolver, silent: Silent) -> None:
    """However many addresses of a host are silent, they cost `connect_seconds` together, which is said."""
    addresses, port = silent(4)
    resolver(*addresses)
    with HttpTransport(limits=FetchLimits(connect_seconds=1.6)) as transport:
        error = fails(transport, f"http://worker:{port}/f")  # one after the other, each its own time: 6.4

    shares = re.findall(r"(127\.0\.0\.\d+): no answer in ([0-9.e-]+) s", str(error))
    assert isinstance(error, FetchTimeout)
    assert [address for address, _ in shares] == addresses
    assert shares[0][1] == "0.4"  # what one takes too long, on a busy machine, the next ones have less
    assert sum(float(seconds) for _, seconds in shares) < 1.65
    assert error.phase == "connect"
    assert f"within {error.seconds:g} s" in str(error)


def test_silent_addresses_leave_time_for_a_good_one(resolver: Resolver, silent: Silent, serve: Serve) -> None:
    """The last address is tried, too, and what refuses at once costs the others nothing."""
    addresses, port = silent(2)
    resolver(addresses[0], "127.0.0.2", addresses[1], "127.0.0.1")
    server = serve(wire.ok(BODY), port=port)
    with HttpTransport(limits=FetchLimits(connect_seconds=0.8)) as transport:
        assert fetch(transport, f"http://worker:{server.port}/f") == BODY


def test_time_that_was_waited_is_told(resolver: Resolver, silent: Silent) -> None:
    """Where only one of the addresses was silent, the error tells its time and not all that was allowed."""
    addresses, port = silent(1)
    resolver(*addresses, "127.0.0.2")
    with HttpTransport(limits=FetchLimits(connect_seconds=0.8)) as transport:
        error = fails(transport, f"http://worker:{port}/f")

    assert isinstance(error, FetchTimeout)
    assert error.seconds == 0.4
    assert "127.0.0.2: Connection refused) within 0.4 s" in str(error)


def test_few_addresses_of_many_are_tried(transport: HttpTransport, resolver: Resolver) -> None:
    """Of a thousand addresses, eight are looked at."""
    asked: list[str] = []
    resolver(*(f"127.0.{number}.1" for number in range(1000)))
    with HttpTransport(peer_policy=lambda peer: bool(asked.append(peer.address))) as strict:
        fails(strict, "http://worker:1/f")

    assert asked == [f"127.0.{number}.1" for number in range(http_dial.MAX_ADDRESSES)]
    assert len(asked) == 8


def test_own_shortage_is_not_the_origins_fault(transport: HttpTransport, serve: Serve) -> None:
    """Without a descriptor left no other address is tried, and the error says whose fault it is."""
    server = serve(wire.ok(BODY))
    fetch(transport, server.url)  # what is loaded for it takes descriptors
    transport._pool._idle().connections.pop().close()
    server.hang_up()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        error = fails(transport, server.url)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert "this process has too many open files" in str(error)
    assert not isinstance(error, FetchTimeout)
    assert not error.is_transient
    assert fetch(transport, server.url) == BODY


# catalogue 10
@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "100.100.100.200"]
)
def test_secret_addresses_get_no_packet(
    transport: HttpTransport, resolver: Resolver, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """A name that stands for a metadata service is refused before there is even a socket."""
    resolver(address)
    monkeypatch.setattr(socket, "socket", None)
    error = fails(transport, "http://worker:80/latest/meta-data")

    assert isinstance(error, PeerNotAllowed)
    assert (error.host, error.address, error.is_transient) == ("worker", address, False)


def test_connected_address_is_checked_again(serve: Serve) -> None:
    """Where the second look says no, nothing is requested."""
    server = serve(wire.ok(BODY))
    answers = iter([True, False])
    with HttpTransport(peer_policy=lambda peer: next(answers)) as transport:
        error = fails(transport, server.url)

    assert isinstance(error, PeerNotAllowed)
    assert error.address == "127.0.0.1"
    assert server.requests == []


def test_own_port_can_be_refused(serve: Serve) -> None:
    """A callable of the user's sees the port, for one that must not be asked."""  # catalogue 10
    server = serve(wire.ok(BODY))
    with HttpTransport(peer_policy=lambda peer: peer.port != server.port) as transport:
        assert isinstance(fails(transport, server.url), PeerNotAllowed)

    assert server.connections == 0


def test_policy_that_fails_is_heard(serve: Serve) -> None:
    """An error of the user's own policy passes through, and leaves no socket behind."""
    with HttpTransport(peer_policy=lambda peer: 1 // 0 == 0) as transport, pytest.raises(ZeroDivisionError):
        fetch(transport, serve(wire.ok()).url)


def test_unknown_host(transport: HttpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without an address is an error; where the resolver is only busy, worth another try."""

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        code = socket.EAI_AGAIN if host == "busy" else socket.EAI_NONAME
        raise socket.gaierror(code, "resolver says no")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    assert "resolver says no" in str(fails(transport, "http://gone:1/f"))
    assert [fails(transport, f"http://{name}:1/f").is_transient for name in ("gone", "busy")] == [False, True]


# catalogue 112
@needs_ipv6
def test_ipv6(transport: HttpTransport, serve: Serve) -> None:
    """IPv6 hosts are connected to without, and named with their brackets."""
    server = serve(wire.ok(BODY), host="::1")

    assert fetch(transport, server.url) == BODY
    assert f"\r\nHost: [::1]:{server.port}\r\n".encode() in server.requests[0]


# ------------------------------------------------------------------ kept connections


@pytest.mark.parametrize("answer", [wire.ok(BODY), wire.ok(), wire.chunked(BODY), wire.chunked()])
def test_connection_is_kept(transport: HttpTransport, serve: Serve, answer: bytes) -> None:
    """Files that come one after the other share a connection."""
    server = serve(answer)
    for _ in range(5):
        fetch(transport, server.url)

    assert (server.connections, len(server.requests)) == (1, 5)


# catalogue 123
@pytest.mark.parametrize(
    "answer",
    [
        wire.ok(BODY) + b"x",
        wire.ok(BODY) + wire.ok(b"poison"),
        wire.ok() + b"x",
        wire.ok(BODY * 100) + b"x" * 100,
        wire.chunked(BODY) + b"x",
        wire.ok(BODY, "Connection: close"),
    ],
)
def test_connection_with_bytes_left_is_not_kept(
    transport: HttpTransport, serve: Serve, answer: bytes
) -> None:
    """What comes after the announced end is not taken for the next answer."""
    server = serve(answer, wire.ok(BODY))
    fetch(transport, server.url)

    assert fetch(transport, server.url) == BODY
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        wire.ok(BODY, status="404 Not Found"),
        wire.ok(BODY, status="503 Busy"),
        wire.ok(BODY * 200),
        wire.ok(BODY, "Content-Encoding: gzip"),
    ],
)
def test_connection_with_an_unread_body_is_not_kept(
    transport: HttpTransport, serve: Serve, answer: bytes
) -> None:
    """A refused body is not read only to keep the connection."""
    server = serve(answer, wire.ok(BODY))
    fails(transport, server.url)

    assert fetch(transport, server.url) == BODY
    assert server.connections == 2


def test_failing_sink_closes_the_connection(transport: HttpTransport, serve: Serve) -> None:
    """What the sink raises passes through, and the half-read connection goes."""

    class FullSink(MemorySink):
        def write(self, data: Any) -> None:
            raise KeyError("disk full")

    server = serve(wire.ok(BODY))
    with pytest.raises(KeyError):
        transport.fetch(server.url, FullSink(), max_bytes=CAP)

    assert fetch(transport, server.url) == BODY
    assert server.connections == 2


def test_closed_connection_is_noticed(transport: HttpTransport, serve: Serve) -> None:
    """A server that hung up in the meantime costs a new connection, no error."""
    server = serve(wire.ok(BODY))
    fetch(transport, server.url)
    server.hang_up()

    assert fetch(transport, server.url) == BODY
    assert server.connections == 2


@pytest.mark.parametrize("end", [wire.closing(b""), wire.resetting(b"")])
def test_dead_connection_is_replaced_once(transport: HttpTransport, serve: Serve, end: wire.Play) -> None:
    """A kept connection that ends in place of an answer is replaced by a new one, without any error."""
    server = serve(wire.ok(BODY), end, wire.ok(BODY))
    fetch(transport, server.url)

    assert fetch(transport, server.url) == BODY
    assert (server.connections, len(server.requests)) == (2, 3)


@pytest.mark.parametrize("end", [wire.closing(b""), wire.resetting(b"")])
def test_second_dead_connection_is_an_error(transport: HttpTransport, serve: Serve, end: wire.Play) -> None:
    """A new connection that ends likewise is not replaced again."""
    server = serve(wire.ok(BODY), end)
    fetch(transport, server.url)
    error = fails(transport, server.url)

    assert error.is_transient
    assert (server.connections, len(server.requests)) == (2, 3)


def test_answer_that_breaks_off_is_asked_for_once_more(transport: HttpTransport, serve: Serve) -> None:
    """On a kept connection, whose bytes may belong to the answer before; what a new one says is the truth."""

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(b"H")
        closing.wait(0.1)  # else the reset may overtake the byte
        wire.resetting(b"")(sock, closing)

    server = serve(wire.ok(BODY), play, play, wire.ok(BODY))
    fetch(transport, server.url)
    fails(transport, server.url)

    assert (server.connections, len(server.requests)) == (2, 3)


def test_silent_kept_connection_costs_one_time_out(transport: HttpTransport, serve: Serve) -> None:
    """A kept connection that does not answer is a time-out, as a new one is; it is not tried again."""
    server = serve(wire.ok(BODY), wire.silent_after())
    fetch(transport, server.url)

    assert isinstance(fails(transport, server.url), FetchTimeout)
    assert server.connections == 1


def test_old_connections_are_not_used(serve: Serve) -> None:
    """A connection that idled too long is closed, also when another one comes back."""
    now = [0.0]
    server, other = serve(wire.ok(BODY)), serve(wire.ok(BODY))
    with HttpTransport(clock=lambda: now[0]) as transport:
        fetch(transport, server.url)
        fetch(transport, other.url)
        now[0] += http_pool.MAX_IDLE_SECONDS + 1
        fetch(transport, server.url)

        assert server.connections == 2
        assert len(transport._pool) == 1


def test_every_use_closes_what_is_old(serve: Serve) -> None:
    """A connection that idled too long is closed when any other origin is asked, even in vain."""
    now = [0.0]
    server, other = serve(wire.ok(BODY)), serve(wire.closing(b""))
    with HttpTransport(clock=lambda: now[0]) as transport:
        fetch(transport, server.url)
        assert len(transport._pool) == 1
        now[0] += http_pool.MAX_IDLE_SECONDS + 1
        fails(transport, other.url)

        assert len(transport._pool) == 0


def test_idle_connections_are_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads fetch at once, few connections are kept for each origin, and few in all."""
    monkeypatch.setattr(http_pool, "MAX_IDLE_PER_ORIGIN", 2)
    monkeypatch.setattr(http_pool, "MAX_IDLE", 3)
    servers = [serve(_together(5)) for _ in range(2)]
    with HttpTransport() as transport:
        for server, kept in zip(servers, (2, 3)):
            threads = [threading.Thread(target=fetch, args=(transport, server.url)) for _ in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert server.connections == 5
            assert len(transport._pool) == kept


def _together(count: int) -> wire.Play:
    """Answer when so many requests are there, each on a connection of its own, and keep them open."""
    barrier = threading.Barrier(count)

    def play(sock: socket.socket, closing: threading.Event) -> None:
        barrier.wait(wire.SECONDS)
        sock.sendall(wire.ok(BODY))
        closing.wait(wire.SECONDS)

    return play


def test_threads_do_not_mix(transport: HttpTransport, serve: Serve) -> None:
    """Threads that share a transport each get their own file, over as many connections as threads at most."""

    servers = [serve(wire.ok(bytes([number]) * 50_000)) for number in range(3)]
    wrong = []

    def work(number: int) -> None:
        for turn in range(30):
            which = (number + turn) % 3
            if fetch(transport, servers[which].url) != bytes([which]) * 50_000:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert sum(len(server.requests) for server in servers) == 180
    assert all(server.connections <= 6 for server in servers)


def test_closed_transport_keeps_nothing(transport: HttpTransport, serve: Serve) -> None:
    """`close` ends the kept connections, may be repeated, and what is fetched later is not kept either."""
    server = serve(wire.ok(BODY))
    fetch(transport, server.url)
    transport.close()
    transport.close()

    assert len(transport._pool) == 0
    assert fetch(transport, server.url) == BODY
    assert len(transport._pool) == 0
    assert repr(transport) == "<HttpTransport idle=0>"


def test_forked_child_makes_its_own_connection(transport: HttpTransport, serve: Serve) -> None:
    """A child neither uses nor ends the parent's connections, though another thread held their lock."""
    server = serve(wire.ok(BODY))
    fetch(transport, server.url)
    lock = transport._pool._idle().lock
    with lock:
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if fetch(transport, server.url) == BODY and len(transport._pool) == 1 else 1)
            finally:
                os._exit(2)
    _, status = os.waitpid(child, 0)

    assert status == 0
    assert server.connections == 2
    assert fetch(transport, server.url) == BODY
    assert server.connections == 2


def test_memory_of_a_fetch(serve: Serve) -> None:
    """Eight threads that fetch much more take a megabyte each, whatever the file's size, and keep less."""
    import tracemalloc

    class NullSink(MemorySink):
        size = 0

        @property
        def received(self) -> int:
            return self.size

        def write(self, data: Any) -> None:
            self.size += len(data)

    body = bytes(24 << 20)
    server = serve(wire.ok(body))
    transport = HttpTransport()  # sixteen threads take turns: with little patience some would give up
    tracemalloc.start()
    threads = [
        threading.Thread(
            target=transport.fetch, args=(server.url, NullSink()), kwargs={"max_bytes": len(body)}
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    transport.close()

    assert peak < 10 << 20
    assert kept < 5 << 20
