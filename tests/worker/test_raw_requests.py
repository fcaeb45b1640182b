"""Requests that servers and proxies read differently: each is answered once, and the connection closed.

Behind every shape stands a whole request for a file: what a proxy would take for a part of the shape's body,
and another server for the next client's request. Its content must never come back.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, Callable

import h11
import helpers
import pytest

from selfhost.settings import ServerLimits
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

SECRET = b"you have been served what nobody asked for"
ROUTE = b"/v1/metadata/m/_base/"
SMUGGLED = b"GET " + ROUTE + b"secret.txt HTTP/1.1\r\nHost: x\r\n\r\n"
GOOD = b"GET " + ROUTE + b"good.txt HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: %d" % len(SMUGGLED)

Shapes = dict[str, bytes]


def get(*lines: bytes, target: bytes = b"/x", method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    """Return the head of a request with a Host field before `lines`."""
    return b"\r\n".join([b" ".join((method, target, version)), b"Host: x", *lines, b"", b""])


def each(what: str, values: list[bytes], make: Callable[[bytes], bytes]) -> Shapes:
    """Return one shape for each value, named after it."""
    return {f"{what} {value[:40]!r}": make(value) for value in values}


def table(shapes: dict[int, Shapes]) -> list[Any]:
    """Return (shape, status) for each shape, by name."""
    return [pytest.param(shape, n, id=f"{n} {name}") for n in shapes for name, shape in shapes[n].items()]


# ------------------------------------------------------------------ what is refused

CODINGS = [
    b"chunked", b"Chunked", b"xchunked", b"chunkedx", b"identity", b"gzip, chunked", b"chunked, identity",
    b"identity, chunked", b"chunked, chunked", b'"chunked"', b"chunked;a=b", b",chunked", b"\tchunked", b"",
    b"\x0bchunked", b"chunked\x00", b"chunked\xa0", b"\r\n chunked", b"chunk\r\n ed", b"chunked\nX: y",
    b"chunked\rX: y",
]  # fmt: skip
LENGTHS = [
    b"1", b"+0", b"-0", b"-1", b"00", b"0x0", b"0 0", b"0,0", b"0, 5", b"0;", b"0.0", b"1e0", b"", b"\xb2",
    b"0\x00", b"0\r\n 5", b"0\nX: y", b"9" * 400, b"NaN",
]  # fmt: skip
TE_NAMES = [
    b"Transfer-Encoding ", b"Transfer-Encoding\t", b" Transfer-Encoding", b"Transfer-Encoding\x00",
    b"\x00Transfer-Encoding", b"Transfer Encoding", b"Transfer-Encoding\xff", b"X: y\nTransfer-Encoding",
]  # fmt: skip
FIELDS = [
    b"A : b", b"A\t: b", b" A: b", b"\tA: b", b"A", b":", b": b", b"A(: b", b"A\x00: b", b"A: \x00",
    b"A: \x1b[0m", b"A: \x7f", b"\xc3\xa9: b", b"A b: c", b"A: b\r\n c", b"GET / HTTP/1.1",
]  # fmt: skip
HOSTS = [
    b"", b"Host: x\r\nHost: x\r\n", b"Host: x\r\nhost: y\r\n", b"Host : x\r\n", b"Host: a b\r\n",
    b"Host: a/b\r\n", b"Host: u@a\r\n", b"Host: a, b\r\n", b"Host: a\\b\r\n", b"Host: a#b\r\n",
    b"Host: \x00\r\n", b"Host: a?b\r\n",
]  # fmt: skip
BEFORE = [b"\r\n", b"\n", b"\r\n\r\n", b" ", b"\t", b"\x00", b"\xef\xbb\xbf"]
LINE_ENDS = [b"\n", b"\r", b"\n\r", b"\r\r\n", b"\r\n\n", b"\x0b", b"\x0c", b"\x00", b"\r\n \r\n", b"\r\n\t"]

BODIES: Shapes = {
    **each("TE", CODINGS, lambda coding: get(b"Transfer-Encoding:" + coding) + b"0\r\n\r\n"),
    **each("CL and TE", CODINGS, lambda coding: get(LENGTH, b"Transfer-Encoding: " + coding)),
    **each("TE named", TE_NAMES, lambda name: get(name + b": chunked") + b"0\r\n\r\n"),
    **each("CL", LENGTHS, lambda length: get(b"Content-Length:" + length)),
    **each("CL 0 and", [b"0", b"5", b"+0"], lambda n: get(b"Content-Length: 0", b"CONTENT-length: " + n)),
    "TE twice": get(CHUNKED, b"Transfer-Encoding: identity") + b"0\r\n\r\n",
    "TE before CL": get(CHUNKED, LENGTH) + b"0\r\n\r\n",
    "CL to the end of the smuggled": get(LENGTH),
    "CL of HTTP/1.0": get(LENGTH, version=b"HTTP/1.0"),
    "TE of HTTP/1.0": get(CHUNKED, version=b"HTTP/1.0"),
    "TE of HEAD": get(CHUNKED, method=b"HEAD") + b"0\r\n\r\n",
    "CL named by Connection": get(LENGTH, b"Connection: Content-Length"),
    "huge chunk size": get(CHUNKED) + b"F" * 30 + b"\r\n",
}

LINES: Shapes = {
    **each("request line, then", LINE_ENDS, lambda end: b"GET /x HTTP/1.1" + end + b"Host: x\r\n\r\n"),
    **each("field, then", LINE_ENDS, lambda end: get(b"A: b" + end + b"C: d")),
    **each("head, then", [b"\n\n", b"\r\r", b"\n\r\n"], lambda end: b"GET /x HTTP/1.1\r\nHost: x" + end),
    **each("field", FIELDS, lambda field: get(field)),
    **each("before", BEFORE, lambda blank: blank + get()),
    **each("hosts", HOSTS, lambda hosts: b"GET /x HTTP/1.1\r\n" + hosts + b"\r\n"),
}

TARGETS = [
    b"", b"*", b"x", b"x:80", b"http:/x", b"http://", b"http:///x", b"http://u@x/", b"ftp://x/", b"/a b",
    b"/\x00", b"/\t", b"/\r", b"/\n", b"/\x7f", b"/\xc3\xa9", b"/a#b", b"#", b"\\x", b"?", b"javascript:x",
]  # fmt: skip
VERSIONS = [
    b"", b"HTTP", b"HTTP/", b"HTTP/1", b"HTTP/1.", b"HTTP/.1", b"HTTP/11", b"HTTP/1.10", b"HTTP/01.1",
    b"HTTP/1.1x", b"http/1.1", b"HTTP/1,1", b"HTTP/1.1 ", b"HTTP/ 1.1", b"XTTP/1.1", b"HTTP/1.\xb1",
    b"HTTP/-1.1",
    b"ICY",
]  # fmt: skip
METHODS = [b"", b"G ET", b"GET\t", b"G\x00T", b"G(T", b"\xc7ET", b"GET:", b'"GET"']

REQUEST_LINES: Shapes = {
    **each("target", TARGETS, lambda target: get(target=target)),
    **each("version", VERSIONS, lambda version: get(version=version)),
    **each("method", METHODS, lambda method: get(method=method)),
    "HTTP/0.9": b"GET /x\r\n",
    "HTTP/0.9 and a head": b"GET /x\r\nHost: x\r\n\r\n",
    "two spaces": b"GET  /x  HTTP/1.1\r\nHost: x\r\n\r\n",
    "tabs": b"GET\t/x\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "invalid request with a body": b"GET /x HTTP/1.1 HTTP/1.1\r\n" + LENGTH + b"\r\n\r\n",
    "a TLS client": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"r" * 40,
    "SSLv2": b"\x80\x2e\x01\x03\x01" + b"r" * 40,
    "PROXY protocol": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 80\r\n",
    "PROXY protocol 2": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + b"a" * 12,
    "mail": b"EHLO x\r\nMAIL FROM:<a@b>\r\n",
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "NULs": b"\x00" * 50_000,
    "FastCGI": b"\x01\x01\x00\x01\x00\x08\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00",
}  # fmt: skip

OTHER_VERSIONS: Shapes = {
    **each("version", [b"HTTP/0.9", b"HTTP/2.0", b"HTTP/3.0", b"HTTP/9.9"], lambda v: get(version=v)),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9,
}

OTHERS = [
    b"POST", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"BREW", b"get", b"Get", b"GETS", b"HEADS", b"PRI",
    b"M" * 10_000,
]  # fmt: skip

OTHER_METHODS: Shapes = {
    **each("method", OTHERS, lambda method: get(method=method)),
    "CONNECT": get(target=b"x:80", method=b"CONNECT"),
    "OPTIONS *": get(target=b"*", method=b"OPTIONS"),
    "POST by CL": get(LENGTH, method=b"POST"),
    "POST by two CL": get(b"Content-Length: 5", method=b"POST") + b"hello",
    "POST by CL and TE": get(LENGTH, CHUNKED, method=b"POST") + b"0\r\n\r\n",
    "POST in chunks": get(CHUNKED, method=b"POST") + b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    "POST in bad chunks": get(CHUNKED, method=b"POST") + b"5\nhello\n0\n\n",
    "POST that waits to continue": get(LENGTH, b"Expect: 100-continue", method=b"POST"),
}  # fmt: skip

AMOUNTS: Shapes = {
    "101 fields": get(*[b"A: b"] * 100),
    "many fields": get(*[b"A%d: b" % number for number in range(1500)]),
    "many lines that end nowhere": get()[:-2] + b"A: b\r\n" * 10_000,
    "long value": get(b"A: " + b"b" * 20_000),
    "long name": get(b"A" * 20_000 + b": b"),
    "long target": get(target=b"/" + b"a" * 20_000),
    "long method": get(method=b"M" * 20_000),
    "long version": get(version=b"HTTP/1." + b"1" * 20_000),
    "line without an end": b"G" * 100_000,
    "empty folded lines": get()[:-2] + b" \r\n" * 10_000,
}

REFUSED = {400: {**BODIES, **LINES, **REQUEST_LINES}, 405: OTHER_METHODS, 431: AMOUNTS, 505: OTHER_VERSIONS}
REFUSED_TABLE = table(REFUSED)

# ------------------------------------------------------------------ what is odd but has one meaning

FILE = ROUTE + b"good.txt"
LAST = b"Connection: close"
UNKNOWN = [
    b"//x", b"/%00", b"/%", b"/%z", b"/%zz", b"/%0d%0aX:y", b"/..", b"/%2e%2e/x", b"/x;y", b"/\"<>'", b"/?", b"http://x",
    b"http://x?" + FILE, FILE + b"/", FILE + b"%20", FILE + b"%00", b"/x" + FILE, b"/x/.." + FILE,
    FILE.replace(b"/m/", b"%2fm/"),
]  # fmt: skip
SERVED: dict[int, Shapes] = {
    200: {
        "plain": get(LAST, target=FILE),
        "HTTP/1.0": get(target=FILE, version=b"HTTP/1.0"),
        "HTTP/1.0 without Host": b"GET " + FILE + b" HTTP/1.0\r\n\r\n",
        "HTTP/1.2": get(LAST, target=FILE, version=b"HTTP/1.2"),
        "absolute form": get(LAST, target=b"http://x" + FILE),
        "absolute form of another host": get(LAST, target=b"HTTPS://y:1" + FILE + b"?q"),
        "empty Host": b"GET " + FILE + b" HTTP/1.1\r\nHost:\r\n" + LAST + b"\r\n\r\n",
        "CL 0": get(b"Content-Length: 0", LAST, target=FILE),
        "close among others": get(b"Connection: x, CLOSE ,keep-alive", target=FILE),
        "close in two lines": get(b"Connection: keep-alive", LAST, target=FILE),
        "TE with an underscore": get(b"Transfer_Encoding: chunked", LAST, target=FILE) + b"0\r\n\r\n",
        "CL with an underscore": get(b"Content_Length: 5", LAST, target=FILE) + b"hello",
        "upgrade": get(b"Connection: Upgrade, HTTP2-Settings, close", b"Upgrade: h2c", target=FILE),
        "expectation": get(b"Expect: 100-continue", LAST, target=FILE),
        "another path by a field": get(b"X-Original-URL: /live", LAST, target=FILE),
        "another method by a field": get(b"X-HTTP-Method-Override: PUT", LAST, target=FILE),
        "percent-encoded": get(LAST, target=FILE.replace(b"good", b"g%6F%6fd")),
    },
    404: each("target", UNKNOWN, lambda target: get(LAST, target=target)),
}
SERVED_TABLE = table(SERVED)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Serve two files to every test of this module; return the server's address."""
    registry = MetadataArtifactRegistry()
    limits = ServerLimits(linger_seconds=5.0)
    with helpers.nothing_left(), SystemStatusServer(registry, limits=limits) as server:
        for name, content in (("secret.txt", SECRET), ("good.txt", b"good")):
            registry.register("m", "_base", name, pin_bytes(content))
        yield server.host, server.port
        registry.unregister("m", "_base")


def test_there_are_enough_of_them() -> None:
    """The table has not shrunk to nothing."""
    assert len(REFUSED_TABLE) + len(SERVED_TABLE) > 200


@pytest.mark.parametrize(("shape", "status"), REFUSED_TABLE)
def test_refused_once(shape: bytes, status: int, address: Any, exchange: Any) -> None:
    """One answer that says why in a word or two, then the end; what follows is not even looked at."""
    (reply,) = exchange(address, shape + SMUGGLED, ["GET"])

    assert (reply.status, reply.get("connection")) == (status, "close")
    assert SECRET not in reply.body
    assert len(reply.body) < 100


@pytest.mark.parametrize(("shape", "status"), REFUSED_TABLE)
def test_refused_once_behind_a_good_one(shape: bytes, status: int, address: Any, exchange: Any) -> None:
    """The request before is answered, the shape is refused, and nothing behind it is answered."""
    replies = exchange(address, GOOD + GOOD + shape + SMUGGLED, ["GET"] * 3)

    assert [reply.status for reply in replies] == [200, 200, status]
    assert [reply.body for reply in replies[:2]] == [b"good"] * 2


@pytest.mark.parametrize(("shape", "status"), [row for row in REFUSED_TABLE if len(row.values[0]) < 2000])
def test_refused_once_in_pieces(shape: bytes, status: int, address: Any, parse: Any) -> None:
    """It makes no difference where the network cuts."""
    data = shape + SMUGGLED
    with socket.create_connection(address, timeout=helpers.TIMEOUT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), 7):
            sock.sendall(data[start : start + 7])
        received = b"".join(iter(lambda: sock.recv(1 << 16), b""))

    assert [reply.status for reply in parse(received, ["GET"])] == [status]


@pytest.mark.parametrize(("shape", "status"), SERVED_TABLE)
def test_served_once(shape: bytes, status: int, address: Any, exchange: Any) -> None:
    """What has one meaning is answered once, and what stands behind a request that closes is not read."""
    (reply,) = exchange(address, shape + SMUGGLED, ["GET"])

    assert (reply.status, reply.body) == (status, b"good" if status == 200 else b"Not found\n")


@pytest.mark.parametrize(("shape", "status"), SERVED_TABLE)
def test_another_parser_agrees_on_what_is_served(shape: bytes, status: int) -> None:
    """What we serve, h11 reads as one request without a body, which ends where we think it does."""
    judge = h11.Connection(h11.SERVER)
    judge.receive_data(shape + SMUGGLED)
    request = judge.next_event()

    assert isinstance(request, h11.Request)
    assert isinstance(judge.next_event(), h11.EndOfMessage)
    assert judge.trailing_data[0] == shape[shape.index(b"\r\n\r\n") + 4 :] + SMUGGLED
    assert request.target == shape.split(b" ")[1]


@pytest.mark.parametrize("size", [0, 1, 5, 20, len(GOOD) - 1])
def test_part_of_a_request_is_not_answered(size: int, address: Any) -> None:
    """A client that ends its stream within a head gets the end of ours, and no answer."""
    with socket.create_connection(address, timeout=helpers.TIMEOUT) as sock:
        sock.sendall(GOOD[:size])
        sock.shutdown(socket.SHUT_WR)

        assert sock.recv(100) == b""
