"""Request heads: what is accepted, what is refused with which status, and that h11 reads them alike."""

from __future__ import annotations

import re
import time

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfhost.worker.http1 import MAX_FIELDS, BadRequest, Request, parse_head

HOST = b"Host: worker:9090\r\n"


def get(*lines: bytes, target: bytes = b"/x", version: bytes = b"HTTP/1.1") -> bytes:
    """Return a GET with `lines` as further fields."""
    return b"\r\n".join([b"GET " + target + b" " + version, HOST.strip(), *lines, b"", b""])


# ------------------------------------------------------------------ accepted


def test_plain_get() -> None:
    """The everyday request."""
    request = parse_head(get(b"Accept: */*"))

    assert request == Request(
        "GET", "/x", False, True, {"host": "worker:9090", "accept": "*/*"}, is_plain=True
    )


@pytest.mark.parametrize(
    ("head", "keep_alive"),
    [
        (get(), True),
        (get(b"Connection: close"), False),
        (get(b"Connection: foo, CLOSE"), False),
        (get(b"Connection: foo", b"Connection: close"), False),
        (get(b"Connection: keep-alive, close"), False),
        (get(b"Connection: closed"), True),
        (get(version=b"HTTP/1.0"), False),
        (get(b"Connection: Keep-Alive", version=b"HTTP/1.0"), True),
        (b"GET / HTTP/1.0\r\n\r\n", False),
    ],
)
def test_keep_alive(head: bytes, keep_alive: bool) -> None:
    """1.1 keeps the connection unless asked to close it, 1.0 closes it unless asked to keep it."""
    assert parse_head(head).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"A:1", "1"),
        (b"A: 1", "1"),
        (b"A: \t 1 \t ", "1"),
        (b"A:", ""),
        (b"A: \t", ""),
        (b"A: a\tb  c", "a\tb  c"),
        (b"A: a:b", "a:b"),
        (b"A: \xe9", "é"),
    ],
)
def test_field_values_are_trimmed(line: bytes, value: str) -> None:
    """White space around a value is no part of it, inside it is."""
    assert parse_head(get(line)).fields["a"] == value


def test_repeated_fields_are_joined() -> None:
    """Two lines of one list field are one list, in order."""  # catalogue 77
    assert parse_head(get(b"Range: bytes=0-1", b"RANGE: 2-3")).fields["range"] == "bytes=0-1, 2-3"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/a%20b?c", "/a%20b?c"),
        (b"//a", "//a"),
        (b"http://host:1/a?b", "/a?b"),  # catalogue 83
        (b"HTTPS://host/a", "/a"),
        (b"http://host", "/"),
        (b"http://host?b", "/?b"),
        (b"http://[::1]:9/a@b", "/a@b"),
    ],
)
def test_targets(target: bytes, expected: str) -> None:
    """The origin-form stays as sent; the absolute-form loses scheme and authority."""
    assert parse_head(get(target=target)).target == expected


@pytest.mark.parametrize(
    ("head", "plain"),
    [
        (get(), True),
        (get(b"If-Range: x", b"If-Modified-Since: x"), True),  # mean nothing without Range, or to us
        (get(b"Range: bytes=0-1"), False),
        (get(b"If-Match: *"), False),
        (get(b"If-None-Match: *"), False),
        (get(b"Connection: close"), True),
        (get(version=b"HTTP/1.0"), False),
        (get(b"Connection: keep-alive", version=b"HTTP/1.0"), False),
        (get().replace(b"GET", b"HEAD", 1), False),
    ],
)
def test_only_unconditional_gets_are_plain(head: bytes, plain: bool) -> None:
    """The prepared answer is only for a request that nothing could change the answer to."""
    assert parse_head(head).is_plain is plain


def test_as_many_fields_as_allowed() -> None:
    """The limit itself is still accepted."""
    assert len(parse_head(get(*[b"A%d: 1" % i for i in range(MAX_FIELDS - 1)])).fields) == MAX_FIELDS


# ------------------------------------------------------------------ refused

REFUSED = [
    # request lines
    (b"\r\n\r\n", 400),
    (b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET /\r\n\r\n", 400),
    (b"GET / \r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b" GET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.1\r\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/11\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.10\r\n" + HOST + b"\r\n", 400),
    (b"GET / http/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.\xb1\r\n" + HOST + b"\r\n", 400),
    (b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),  # a TLS client
    (get(version=b"HTTP/0.9"), 505),
    (get(version=b"HTTP/2.0"), 505),
    (b"PRI * HTTP/2.0\r\n\r\n", 505),
    # targets
    (get(target=b"x"), 400),
    (get(target=b"*"), 400),
    (get(target=b"host:80"), 400),
    (get(target=b"/a b"), 400),
    (get(target=b"/a\x00b"), 400),
    (get(target=b"/a\tb"), 400),
    (get(target=b"/a\xc3\xa9"), 400),
    (get(target=b"/a#b"), 400),
    (get(target=b"ftp://host/a"), 400),
    (get(target=b"http:///a"), 400),
    (get(target=b"http://user@host/a"), 400),
    (get(target=b"\\x"), 400),
    # methods
    (get().replace(b"GET", b"get", 1), 405),
    *[(get().replace(b"GET", method, 1), 405) for method in (b"POST", b"TRACE", b"FOO", b"GETX", b"Head")],
    (b"CONNECT host:80 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    # hosts
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (get(HOST.strip()), 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    (b"GET / HTTP/1.0\r\nHost: a\\b\r\n\r\n", 400),
    # field lines
    (get(b"A : 1"), 400),
    (get(b"A\t: 1"), 400),
    (get(b" A: 1"), 400),
    (get(b"A: 1", b" folded"), 400),
    (get(b"A: 1", b"\tfolded"), 400),
    (get(b"A"), 400),
    (get(b": 1"), 400),
    (get(b"A(: 1"), 400),
    (get(b"\xc3\xa9: 1"), 400),
    (get(b"A: 1\nB: 2"), 400),
    (get(b"A: 1\rB: 2"), 400),
    (get(b"A: 1\r"), 400),
    (get(b"A: \x00"), 400),
    (get(b"A: \x0b"), 400),
    (get(b"A: \x7f"), 400),
    (get(b"A: 1\nTransfer-Encoding: chunked"), 400),
    # bodies
    (get(b"Content-Length: 1"), 400),
    (get(b"Content-Length: 0", b"Content-Length: 0"), 400),
    (get(b"Content-Length: 0", b"content-length: 5"), 400),
    (get(b"Content-Length: 0, 0"), 400),
    (get(b"Content-Length: +0"), 400),
    (get(b"Content-Length: -1"), 400),
    (get(b"Content-Length:"), 400),
    (get(b"Content-Length: 0x0"), 400),
    (get(b"Transfer-Encoding: chunked"), 400),
    (get(b"Transfer-Encoding: identity"), 400),
    (get(b"Transfer-Encoding: x", b"Transfer-Encoding: chunked"), 400),
    (get(b"Content-Length: 0", b"Transfer-Encoding: chunked"), 400),
    # amounts
    (get(*[b"A: 1"] * MAX_FIELDS), 431),
    (get(*[b"A%d: 1" % i for i in range(MAX_FIELDS)]), 431),
]


@pytest.mark.parametrize(("head", "status"), REFUSED)
def test_refused(head: bytes, status: int) -> None:
    """Whatever two programs could read in two ways is refused."""
    with pytest.raises(BadRequest) as caught:
        parse_head(head)

    assert caught.value.status == status
    assert re.fullmatch(r"[A-Za-z0-9 .,/-]+", caught.value.reason)


def test_length_zero_is_no_body() -> None:
    """Some clients say that there is no body."""
    assert parse_head(get(b"Content-Length: 0")).fields["content-length"] == "0"


@pytest.mark.parametrize(
    "line",
    [
        b"A:" + b" " * 15_000 + b"\x00",
        b"A:" + b" \t" * 7_500 + b"x" * 500 + b"\x00",
        b"A: " + b"x " * 7_500 + b"\x00",
        b"A" * 15_000,
        b"Host:" + b" " * 15_000 + b"\x7f",
    ],
)
def test_hostile_heads_are_refused_at_once(line: bytes) -> None:
    """No head makes the parser go back and forth: the event loop serves others meanwhile."""
    start = time.thread_time()  # not of who else uses the machine
    with pytest.raises(BadRequest):
        parse_head(get(line))

    assert time.thread_time() - start < 0.3


# ------------------------------------------------------------------ another parser's word

TOKEN = st.text("!#$%&'*+-.^_`|~09AZaz", min_size=1, max_size=8).map(str.encode)
VALUE = st.text([chr(c) for c in (9, *range(32, 127), *range(128, 256))], max_size=12).map(
    lambda text: text.encode("latin-1")
)
BLANK = st.sampled_from([b"", b" ", b"\t", b"  "])
ODD = st.sampled_from(
    [b"\n", b"\r", b"\r\n ", b"\0", b" :", b"\x7f", b"\xff", b" ", b"Content-Length: 0\r\n"]
)


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Draw a head that is nearly or wholly well-formed."""
    target = draw(st.text([chr(c) for c in range(33, 127)], max_size=10)).encode()
    names = draw(st.lists(st.one_of(TOKEN, st.sampled_from([b"Connection", b"Content-Length"])), max_size=4))
    lines = [n + b":" + draw(BLANK) + draw(st.one_of(VALUE, st.just(b"0"))) + draw(BLANK) for n in names]
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]))
    method = draw(st.sampled_from([b"GET", b"HEAD"]))
    head = b"\r\n".join([method + b" /" + target + b" " + version, HOST.strip(), *lines, b"", b""])
    if draw(st.booleans()):
        at = draw(st.integers(0, len(head) - 4))
        head = head[:at] + draw(ODD) + head[at:]
    return head if head.index(b"\r\n\r\n") == len(head) - 4 else get()


def h11_reads(head: bytes) -> h11.Request:
    """Parse `head` with h11, which must take it as a request without body."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(head)
    request = server.next_event()
    assert isinstance(request, h11.Request)
    assert isinstance(server.next_event(), h11.EndOfMessage)
    assert server.trailing_data[0] == b""
    return request


@settings(derandomize=True, database=None, deadline=None, max_examples=600)
@given(heads())
def test_h11_reads_alike_what_we_accept(head: bytes) -> None:
    """What we accept, h11 accepts too, with the same method, target, version, fields and end."""
    try:
        ours = parse_head(head)
    except BadRequest:
        return
    theirs = h11_reads(head)
    joined: dict[str, str] = {}
    for name, value in theirs.headers:
        key, text = name.decode(), value.decode("latin-1")
        joined[key] = f"{joined[key]}, {text}" if key in joined else text

    assert (ours.method, ours.target) == (theirs.method.decode(), theirs.target.decode())
    assert ours.http_1_0 == (theirs.http_version == b"1.0")
    assert ours.fields == joined


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.lists(st.tuples(TOKEN, VALUE), max_size=5), st.sampled_from([b"GET", b"HEAD"]))
def test_well_formed_heads_are_accepted(fields: list[tuple[bytes, bytes]], method: bytes) -> None:
    """A head by the grammar, without a body, is never refused."""
    lines = [b"X-" + name + b": " + value for name, value in fields]

    assert parse_head(get(*lines).replace(b"GET", method, 1)).method == method.decode()
