"""Bearer tokens: which one goes to which origin, to nobody else, and that none is ever shown."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import wire
from helpers import MemorySink, RudeOrigin, make_card

from selfhost.errors import FetchError, HTTPStatusError, SettingsError
from selfhost.frontend import BlobCache, MetadataResolver, Tokens
from selfhost.frontend.http_dial import Origin
from selfhost.frontend.tokens import MAX_FILE_BYTES, origin_text, read_token
from selfhost.frontend.transport_http import HttpTransport
from selfhost.frontend.transports import default_transports

TOKEN = "s3cret-T0ken.~+/="
HERE = Origin("https", "gpu7", 9090)


def fetch(url: str, tokens: Any) -> bytes:
    """Fetch with a transport that has these tokens."""
    sink = MemorySink()
    with HttpTransport(tokens=tokens) as transport:
        transport.fetch(url, sink, max_bytes=1000)
    return bytes(sink.data)


def sent(request: bytes) -> list[bytes]:
    """Return the tokens in a request, with their scheme."""
    lines = request.split(b"\r\n")
    return [line.partition(b": ")[2] for line in lines if line.lower().startswith(b"authorization:")]


@pytest.fixture
def server(leaves_nothing: None) -> Iterator[wire.WireServer]:
    """Return a server that has a file for everybody, and counts."""
    with wire.WireServer(wire.ok(b"some")) as running:
        yield running


# ------------------------------------------------------------------ to whom


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://gpu7:9090", HERE),
        ("HTTPS://GPU7:9090/", HERE),
        ("https://gpu7", Origin("https", "gpu7", 443)),
        ("https://gpu7:443", Origin("https", "gpu7", 443)),
        ("http://gpu7", Origin("http", "gpu7", 80)),
        ("http://[::1]:80", Origin("http", "::1", 80)),
        ("http://127.1:8", Origin("http", "127.0.0.1", 8)),
    ],
)
def test_origin_is_normalized(given: str, origin: Origin) -> None:
    """Scheme, host and port count, however they are written."""
    assert Tokens({given: TOKEN}).of(origin) == TOKEN


@pytest.mark.parametrize(
    "other",
    [
        HERE._replace(scheme="http"),
        HERE._replace(host="gpu7.example"),
        HERE._replace(host="gpu7."),
        HERE._replace(host="7"),
        HERE._replace(port=443),
        HERE._replace(port=909),
    ],
)
def test_other_origins_have_no_token(other: Origin) -> None:
    """Whatever differs makes it another origin."""
    assert Tokens({"https://gpu7:9090": TOKEN}).of(other) is None


def test_token_is_sent_to_its_origin_alone(server: wire.WireServer) -> None:
    """The configured origin gets the token with each request, another port of the same host does not."""
    with wire.WireServer(wire.ok(b"some")) as other:
        tokens = {server.url.rpartition("/")[0]: TOKEN}
        assert fetch(server.url, tokens) == fetch(other.url, tokens) == b"some"

    assert [sent(request) for request in server.requests] == [[b"Bearer " + TOKEN.encode()]]
    assert [sent(request) for request in other.requests] == [[]]


def test_token_is_in_no_variable_of_a_traceback(leaves_nothing: None) -> None:
    """Those who log tracebacks with the variables of each frame log no token."""
    with wire.WireServer(wire.closing(b"")) as server:
        tokens = Tokens({server.url.rpartition("/")[0]: TOKEN})
        with pytest.raises(FetchError) as caught:
            fetch(server.url, tokens)

    told = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "watch = " in told
    assert TOKEN not in told
    assert len(sent(server.requests[0])) == 1


def test_token_goes_with_a_continuation(leaves_nothing: None) -> None:
    """Whoever asks for the rest shows the token, too."""
    body = b"0123456789"
    cut = wire.closing(wire.head("Content-Length: 10", 'ETag: "a"') + body[:4])
    with wire.WireServer(cut, wire.part(4, body[4:], 10, 'ETag: "a"')) as server:
        sink = MemorySink()
        with HttpTransport(tokens={server.url.rpartition("/")[0]: TOKEN}) as transport:
            with contextlib.suppress(Exception):
                transport.fetch(server.url, sink, max_bytes=10)
            transport.fetch(server.url, sink, max_bytes=10)

    assert bytes(sink.data) == body
    assert [len(sent(request)) for request in server.requests] == [1, 1]


def test_redirect_gets_no_token(server: wire.WireServer) -> None:
    """An origin that sends us elsewhere is not followed, with the token or without."""
    moved = wire.ok(b"", f"Location: {server.url}", status="302 Found")
    with wire.WireServer(moved) as origin:
        tokens = {origin.url.rpartition("/")[0]: TOKEN, server.url.rpartition("/")[0]: TOKEN}
        with pytest.raises(HTTPStatusError):
            fetch(origin.url, tokens)

    assert server.connections == 0


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_refusal_says_what_to_do(status: str, leaves_nothing: None) -> None:
    """It names the origin and whether it got a token, and shows none; it is no matter of trying again."""
    with wire.WireServer(wire.ok(b"no", status=status)) as server:
        origin = server.url.rpartition("/")[0]
        for tokens, said in (({}, "no bearer token is configured"), ({origin: TOKEN}, "does not accept")):
            with pytest.raises(HTTPStatusError) as caught:
                fetch(server.url, tokens)
            told = "".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))
            assert origin in str(caught.value)
            assert said in str(caught.value)
            assert TOKEN not in told
            assert not caught.value.is_transient


def test_refused_replica_is_asked_once(
    leaves_nothing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next replica has the file; what is logged and counted shows no token."""
    files = {"config.json": b"{}"}
    with wire.WireServer(wire.ok(b"", status="401 Unauthorized")) as strict, RudeOrigin(files) as other:
        origin = strict.url.rpartition("/")[0]
        cards = [make_card(files, origin), make_card(files, other.url)]
        table = default_transports(tokens={origin: TOKEN})
        with MetadataResolver(BlobCache(tmp_path / "cache"), transports=table) as resolver:
            with caplog.at_level(logging.DEBUG):
                resolver.resolve(cards[0], replicas=cards[1:])
            told = f"{caplog.text}{resolver!r}{table!r}{vars(table['http'])}{resolver.counters()}"
        table["http"].close()

    assert len(strict.requests) == 1
    assert "401" in caplog.text
    assert TOKEN not in told


# ------------------------------------------------------------------ files


def tokens_in(path: Path, text: str) -> Tokens:
    """Write a file of tokens and return what reads it."""
    path.write_text(text)
    return Tokens(file=path)


def test_file_has_comments(tmp_path: Path) -> None:
    """Lines have an origin and a token; empty ones and comments are passed over."""
    text = f"# gateways\n\n  https://gpu7:9090\t{TOKEN}  \r\nhttp://gpu8 other\n   # the end"
    tokens = tokens_in(tmp_path / "tokens", text)

    assert tokens.of(HERE) == TOKEN
    assert tokens.of(Origin("http", "gpu8", 80)) == "other"


def test_given_tokens_come_first(tmp_path: Path) -> None:
    """What is given counts more than what the file says of the same origin."""
    (tmp_path / "tokens").write_text("https://gpu7:9090 of-the-file\nhttps://gpu8 other")
    tokens = Tokens({"https://gpu7:9090": TOKEN}, file=tmp_path / "tokens")

    assert tokens.of(HERE) == TOKEN
    assert tokens.of(Origin("https", "gpu8", 443)) == "other"


def test_renewed_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new token counts from the next request on; what cannot be read leaves the old one, and a warning."""
    path = tmp_path / "tokens"
    tokens = tokens_in(path, f"https://gpu7:9090 {TOKEN}")
    assert tokens.of(HERE) == TOKEN

    for name, text in (("new", "https://gpu7:9090 newer"), ("bad", f"{TOKEN} https://gpu7:9090 x")):
        (tmp_path / name).write_text(text)
        os.replace(tmp_path / name, path)
        assert [tokens.of(HERE), tokens.of(HERE)] == ["newer", "newer"]
    path.unlink()
    assert tokens.of(HERE) == "newer"
    tokens_in(path, "# nobody")
    assert tokens.of(HERE) is None
    assert len(caplog.records) == 2, "each state of the file is complained about once"
    assert "what was read before stays in use" in caplog.text
    assert TOKEN not in caplog.text


def test_renewed_file_is_read_once_that_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortage at the moment of a change passes, and the new token counts, not the old one for ever."""
    tokens = tokens_in(tmp_path / "tokens", f"https://gpu7:9090 {TOKEN}")
    assert tokens.of(HERE) == TOKEN
    tokens_in(tmp_path / "tokens", "https://gpu7:9090 newer-one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
        assert tokens.of(HERE) == TOKEN

    assert tokens.of(HERE) == "newer-one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{TOKEN}\n", "line 1 is not `ORIGIN TOKEN`"),
        (f"# x\n{TOKEN} https://gpu7\n", "line 2 is not `ORIGIN TOKEN`"),
        (f"https://gpu7 Bearer {TOKEN}\n", "line 1 is not `ORIGIN TOKEN`"),
        (f"https://gpu7/path {TOKEN}\n", "line 1 is not `ORIGIN TOKEN`"),
        (f"https://me@gpu7 {TOKEN}\n", "line 1 is not `ORIGIN TOKEN`"),
        (f"ftp://gpu7 {TOKEN}\n", "line 1 is not `ORIGIN TOKEN`"),
        (f"https://gpu7 {TOKEN}é\n", "line 1 has no token"),
        (f"https://gpu7 {TOKEN}\nhttps://GPU7:443 {TOKEN}\n", "line 2 names an origin once more"),
        (f"https://gpu7 {TOKEN * 1000}", "line 1 has no token"),
        ("#" * (MAX_FILE_BYTES + 1), "has more than"),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    """The file and the line are named, and nothing of what is in it."""
    tokens = tokens_in(tmp_path / "tokens", text)
    with pytest.raises(SettingsError, match=said) as caught:
        tokens.of(HERE)

    told = "".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))
    assert "tokens'" in told
    assert TOKEN not in f"{told}{vars(caught.value)}{tokens!r}"


@pytest.mark.parametrize("kind", ["missing", "a folder", "a FIFO", "no UTF-8"])
def test_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    """So is one that is not there, or no text."""
    path = {"missing": tmp_path / "none", "a folder": tmp_path}.get(kind, tmp_path / "bytes")
    if kind == "no UTF-8":
        path.write_bytes(b"https://gpu7 \xff\xfe")
    if kind == "a FIFO":  # which would be waited for
        os.mkfifo(path)
    with pytest.raises(SettingsError, match="for tokens") as caught:
        Tokens(file=path).of(HERE)

    assert caught.value.variable == "DYN_MDC_TOKENS_FILE"
    assert "(DYN_MDC_TOKENS_FILE)" in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"https://gpu7/": "two words"}, {"https://gpu7": ""}, {"https://gpu7": f"{TOKEN}\r\nX: y"},
        {"https://gpu7": f"{TOKEN}é"}, {"gpu7": TOKEN}, {"https://gpu7/v1": TOKEN}, {"https://gpu7?a": TOKEN},
        {"https://me:pass@gpu7": TOKEN}, {"ws://gpu7": TOKEN}, {"https://": TOKEN},
        {TOKEN: "https://gpu7"},
    ],
)  # fmt: skip
def test_given_tokens_that_cannot_be_used(given: Mapping[str, str]) -> None:
    """They are refused at once, and not shown."""
    with pytest.raises(SettingsError) as caught:
        HttpTransport(tokens=given)

    told = "".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))
    told += f"{vars(caught.value)}"
    assert not any(secret in told for secret in (TOKEN, "two words", "me:pass"))


def test_given_token_in_the_wrong_place() -> None:
    """The entry is told by its number."""
    with pytest.raises(SettingsError, match=r"cannot use entry 2 of tokens= \(not shown\)"):
        Tokens({"https://gpu8": TOKEN, TOKEN: "https://gpu7"})


def test_file_with_one_token(tmp_path: Path) -> None:
    """A file that holds a token and nothing else is what a worker has, too."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(str(tmp_path / "token")) == TOKEN

    (tmp_path / "token").write_text(f"{TOKEN} {TOKEN}")
    for path in ("token", "none"):
        with pytest.raises(SettingsError) as caught:
            read_token(str(tmp_path / path))
        assert TOKEN not in str(caught.value)


def test_origin_of_a_url() -> None:
    """It is what a token can be given for."""
    url = "https://me:pass@gpu7:9090/v1/metadata/m/_base?a#b"

    assert Tokens({origin_text(url): TOKEN}).of(HERE) == TOKEN
    with pytest.raises(SettingsError, match="'ftp://gpu7/'"):
        origin_text("ftp://gpu7/v1")


# ------------------------------------------------------------------ from the environment


def test_tokens_of_the_environment(
    server: wire.WireServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transports that nobody gave tokens read the file of DYN_MDC_TOKENS_FILE, for the first request."""
    monkeypatch.setenv("DYN_MDC_TOKENS_FILE", str(tmp_path / "tokens"))
    table = default_transports()
    (tmp_path / "tokens").write_text(f"{server.url.rpartition('/')[0]} {TOKEN}")
    table["http"].fetch(server.url, MemorySink(), max_bytes=1000)
    table["http"].close()
    given = default_transports(tokens={})
    given["http"].fetch(server.url, MemorySink(), max_bytes=1000)
    given["http"].close()

    assert [len(sent(request)) for request in server.requests] == [1, 0]
