"""One table of requests and answers, the same for the embedded server and for the app under other servers.

Every answer that comes over a socket is read by h11, which refuses what is malformed and what is too long.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import quote, unquote_to_bytes
from wsgiref.validate import WSGIWarning, validator

import pytest
from blake3 import blake3
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.test import create_environ, run_wsgi_app

import selfhost
from selfhost.worker.access import Access
from selfhost.worker.app import MetadataApp
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

HERE = Path(__file__).parent
SITE = runpy.run_path(str(HERE / "site_app.py"))
DIGITS, LARGE, FILES, PREFIX = SITE["DIGITS"], SITE["LARGE"], SITE["FILES"], SITE["PREFIX"]
CONFIG = FILES[0][3]
BASE = "/v1/metadata/m/_base"
TEXT = "text/plain; charset=utf-8"
WHOLE = {"Accept-Ranges": "bytes", "Cache-Control": "no-cache, no-transform"}


class Case(NamedTuple):
    """A request and what must come back; a value of None in `fields` means that the field is absent."""

    target: str
    status: int = 200
    body: Optional[bytes] = None  # None: any
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    fields: dict[str, Optional[str]] = {}  # noqa: RUF012 - never changed
    is_old: bool = False  # an HTTP/1.0 request without Host

    def __str__(self) -> str:
        headers = " ".join(f"{name}={value[:12]}" for name, value in self.headers)
        return f"{self.method} {self.target[:60]} {headers}{'HTTP/1.0' * self.is_old}"


def tag(data: bytes) -> str:
    """Return the entity tag of `data`, by blake3 itself."""
    return f'"{blake3(data).hexdigest()}"'


def digest(data: bytes) -> str:
    """Return the query that selects `data`."""
    return f"?blake3={blake3(data).hexdigest()}"


def hit(target: str, data: bytes, media_type: str, method: str = "GET") -> Case:
    """Return the case of a whole file."""
    fields: dict[str, Optional[str]] = {
        **WHOLE,
        "ETag": tag(data),
        "Content-Length": str(len(data)),
        "Content-Type": media_type,
        "X-Content-Type-Options": "nosniff",
        "Content-Range": None,
        "Last-Modified": None,
        "Content-Encoding": None,
        "Location": None,
    }
    return Case(target, 200, data if method == "GET" else b"", method, (), fields)


def on_digits(
    status: int, body: Optional[bytes], content_range: Optional[str] = None, **headers: str
) -> Case:
    """Return the case of a GET for the ten digits with header fields."""
    fields: dict[str, Optional[str]] = {"Content-Range": content_range, "ETag": tag(DIGITS)}
    if status == 416:
        del fields["ETag"]
    if status in (200, 206):
        fields |= {**WHOLE, "Content-Length": str(len(body or b"")), "Content-Type": TEXT}
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Case(f"{BASE}/digits.txt", status, body, "GET", named, fields)


def missing(target: str) -> Case:
    """Return the case of what is not there."""
    return Case(target, 404, b"Not found\n", fields={"ETag": None, "X-Inj": None, "Location": None})


HITS = [
    hit(f"{BASE}/config.json", CONFIG, "application/json"),  # catalogue 57
    hit(f"{BASE}/config.json", CONFIG, "application/json", "HEAD"),  # catalogue 58
    hit(f"{BASE}/large.bin", LARGE, "application/octet-stream"),
    hit(f"{BASE}/large.bin", LARGE, "application/octet-stream", "HEAD"),
    hit(f"{BASE}/empty.txt", b"", TEXT),  # catalogue 79
    hit(f"{BASE}/empty.txt", b"", TEXT, "HEAD"),
    hit(f"{BASE}/page.html", b"<script>alert(1)</script>", "application/octet-stream"),  # catalogue 94
    hit("/v1/metadata/m/lora-a/config.json", b"adapter", "application/json"),  # catalogue 48
    hit("/v1/metadata//_base/config.json", FILES[8][3], "application/json"),
    hit("/v1/met%61data/m/%5Fbase/config%2Ejson", CONFIG, "application/json"),
    hit(f"{BASE}/config.json?other=1", CONFIG, "application/json"),
    hit(f"{BASE}/config.json{digest(CONFIG)}", CONFIG, "application/json"),
    hit(f"{BASE}/twice.json", b"first", "application/json"),
    hit(f"{BASE}/twice.json{digest(b'first')}", b"first", "application/json"),
    hit(f"{BASE}/twice.json{digest(b'second')}", b"second", "application/json"),
    hit(f"{BASE}/twice.json{digest(b'second')}", b"second", "application/json", "HEAD"),
]

CARD_TEXTS = [text.encode() for _, _, text in SITE["CARDS"]]
CARDS = [
    hit(BASE, CARD_TEXTS[0], "application/json"),
    hit(BASE, CARD_TEXTS[0], "application/json", "HEAD"),
    hit(f"{BASE}{digest(CARD_TEXTS[0])}", CARD_TEXTS[0], "application/json"),
    hit(f"{BASE}{digest(CARD_TEXTS[1])}", CARD_TEXTS[1], "application/json"),
    hit("/v1/metadata/m/lora-a", CARD_TEXTS[2], "application/json"),
    hit("/v1/metadata//_base", CARD_TEXTS[3], "application/json"),
    hit("/v1/metadata/m/%5Fbase?other=1", CARD_TEXTS[0], "application/json"),
    Case(BASE, 304, b"", "GET", (("If-None-Match", tag(CARD_TEXTS[0])),), {"ETag": tag(CARD_TEXTS[0])}),
    Case(BASE, 412, None, "GET", (("If-Match", tag(CARD_TEXTS[1])),)),
    Case(BASE, 206, CARD_TEXTS[0][2:9], "GET", (("Range", "bytes=2-8"),), {"Content-Length": "7"}),
]

HOSTILE = [  # catalogue 32, 40: what the card says is what a client can fetch
    Case(f"/v1/metadata/hostile/_base/{quote(name, safe='')}", 200, name.encode(), fields={"X-Inj": None})
    for name in SITE["HOSTILE_NAMES"]
]

CONDITIONS = [
    on_digits(304, b"", If_None_Match=tag(DIGITS)),  # catalogue 80
    on_digits(304, b"", If_None_Match=tag(DIGITS), Range="bytes=0-1"),  # catalogue 60
    on_digits(412, None, If_Match=tag(b"")),  # catalogue 62
    on_digits(412, None, If_Match=tag(b""), Range="bytes=0-1"),
    on_digits(200, DIGITS, If_Match="*"),
    on_digits(412, None, If_Match=f"W/{tag(DIGITS)}"),  # catalogue 64
    on_digits(304, b"", If_None_Match="*"),  # catalogue 66
    on_digits(304, b"", If_None_Match=f'"x", {tag(DIGITS)}'),
    on_digits(304, b"", If_None_Match=f"W/{tag(DIGITS)}"),
    on_digits(200, DIGITS, If_None_Match='"x"'),
    on_digits(200, DIGITS, If_Modified_Since="Sun, 06 Nov 2094 08:49:37 GMT"),
    on_digits(200, DIGITS, If_Unmodified_Since="Sun, 06 Nov 1994 08:49:37 GMT"),
    on_digits(206, b"01", "bytes 0-1/10", Range="bytes=0-1", If_Range=tag(DIGITS)),  # catalogue 68
    on_digits(200, DIGITS, Range="bytes=0-1", If_Range=tag(b"")),
    on_digits(200, DIGITS, Range="bytes=0-1", If_Range=f"W/{tag(DIGITS)}"),
    on_digits(200, DIGITS, Range="bytes=0-1", If_Range=tag(DIGITS)[1:-1]),
    on_digits(200, DIGITS, Range="bytes=0-1", If_Range="Sun, 06 Nov 2094 08:49:37 GMT"),
]

RANGES = [
    on_digits(206, b"0", "bytes 0-0/10", Range="bytes=0-0"),  # catalogue 70, 81
    on_digits(206, DIGITS, "bytes 0-9/10", Range="bytes=0-"),
    on_digits(206, b"9", "bytes 9-9/10", Range="bytes=-1"),
    on_digits(206, b"56789", "bytes 5-9/10", Range="bytes=5-99999"),
    on_digits(206, b"9", "bytes 9-9/10", Range="bytes=9-9"),
    on_digits(206, DIGITS, "bytes 0-9/10", Range="bytes=-11"),  # catalogue 71
    on_digits(416, None, "bytes */10", Range="bytes=10-"),
    on_digits(416, None, "bytes */10", Range="bytes=-0"),
    on_digits(200, DIGITS, Range="items=0-1"),  # catalogue 73
    *[on_digits(200, DIGITS, Range=f"bytes={x}") for x in ("5-1", "abc", "+0-1", "0x0-1", "0--1")],  # 74
    on_digits(200, DIGITS, Range="bytes=\xd9\xa0-\xd9\xa1"),  # Arabic digits
    on_digits(206, DIGITS, "bytes 0-9/10", Range=f"bytes=0-{'9' * 20}"),  # catalogue 75
    on_digits(416, None, "bytes */10", Range=f"bytes={'9' * 20}-"),
    on_digits(206, b"01", "bytes 0-1/10", Range="bytes=0-1,"),  # catalogue 77
    on_digits(200, DIGITS, Range="bytes=" + "0-," * 2000),  # catalogue 39
    Case(
        f"{BASE}/digits.txt", 200, DIGITS, "GET", (("Range", "bytes=0-1"), ("Range", "bytes=3-4")),
        {"Content-Range": None},
    ),
    Case(f"{BASE}/digits.txt", 200, b"", "HEAD", (("Range", "bytes=0-1"),), {"Content-Length": "10"}),
    Case(f"{BASE}/empty.txt", 200, b"", "GET", (("Range", "bytes=0-1"),), {"Content-Length": "0"}),
    Case(
        f"{BASE}/large.bin", 206, LARGE[200_000:], "GET", (("Range", "bytes=200000-"),),
        {"Content-Range": f"bytes 200000-{len(LARGE) - 1}/{len(LARGE)}", "ETag": tag(LARGE)},
    ),
    Case(  # the resume of a complete file, as `curl -C -` sends it
        f"{BASE}/large.bin", 416, None, "GET", (("Range", f"bytes={len(LARGE)}-"),),
        {"Content-Range": f"bytes */{len(LARGE)}"},
    ),
    Case(  # and of half of one
        f"{BASE}/twice.json{digest(b'second')}", 206, b"ond", "GET", (("Range", "bytes=3-"),), {},
    ),
]  # fmt: skip

MISSING = [
    missing(target)
    for target in (
        "/",
        "/v1",
        "/v1/metadata",
        "/v1/metadata/",
        "/v1/metadata/m",
        "/v1/metadata/hostile/_base",  # catalogue 86: files and no card
        "/v1/metadata/m/_base/",
        "/v1/metadata//m/_base",
        "/v1/metadata/_base",
        f"{BASE}{digest(CARD_TEXTS[2])}",
        "/v1/metadata/m/_base/secret.txt",  # catalogue 33
        "/v1/metadata/m/_base/unheard-of.txt",
        "/v1/metadata/m/lora-a/digits.txt",
        "/v1/metadata/n/_base/config.json",
        "/v1/metadata/m/_base/config.json/",  # catalogue 88
        "/v1/metadata/m/_base//config.json",
        "/v1/metadata//m/_base/config.json",
        "/v1//metadata/m/_base/config.json",
        "/v1/metadata/m/_base/x/../config.json",
        "/v1/metadata/m/_base/./config.json",
        "/v1/metadata/m/_base/..%2f_base%2fconfig.json",  # catalogue 32
        "/v1/metadata/m/_base/%2e%2e/_base/config.json",
        "/v1/metadata/m/_base/%252e%252e%252fconfig.json",
        "/v1/metadata/m/_base/%c0%ae%c0%ae%c0%afconfig.json",
        "/v1/metadata/m/_base/config.json%00",
        "/v1/metadata/m/_base/%00",
        "/v1/metadata/m/_base/..%5cconfig.json",
        "/v1/metadata/m/_base/config.json;x",
        "/v1/metadata/m/_base/%FF",
        "/v1/metadata/m/_base/%zz",
        "/v1/metadata/m/_base/%",
        "/v1/metadata/m/_base/config.json%20",
        "/v1/metadata/m/_base/%2Fetc%2Fpasswd",
        "/v1/metadata/m/_base/x%0d%0aX-Inj:1",  # catalogue 40
        "/v1/metadata/m/_base/config.json?blake3=",
        f"/v1/metadata/m/_base/config.json{digest(b'another')}",
        f"/v1/metadata/m/_base/config.json{digest(CONFIG).upper().replace('BLAKE3', 'blake3')}",
        "/v1/metadata/hostile/_base/what",
        "/v1/metadata/hostile/_base/what?.json",
        "/v1/metadata/hostile/_base/A.json",
        "/v1/metadata/hostile/_base/%41.json",
    )
]

METHODS = [  # catalogue 59
    Case(
        f"{BASE}/digits.txt",
        405,
        None,
        method,
        (("Content-Length", "0"),),
        {"Allow": "GET, HEAD", "ETag": None},
    )
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO")
]

# Under a server with a token and an index: the same files, and who may see them.
TOKEN = "table-0123456789abcdef"
HTML = (("Accept", "text/html,*/*;q=0.8"),)
NEEDED = b"A valid bearer token is needed\n"


def with_token(case: Case) -> Case:
    """Return the case as it is asked by who may."""
    return case._replace(headers=(*case.headers, ("Authorization", f"Bearer {TOKEN}")))


def refused(target: str, authorization: Optional[str] = None, *, invalid: bool = False) -> Case:
    """Return the case of who may not; `invalid` where a token was given."""
    challenge = 'Bearer realm="selfhost"' + ', error="invalid_token"' * invalid
    headers = () if authorization is None else (("Authorization", authorization),)
    fields: dict[str, Optional[str]] = {"WWW-Authenticate": challenge, "ETag": None, "Content-Range": None}
    return Case(target, 401, NEEDED, "GET", headers, {**fields, "Content-Type": TEXT})


REFUSED = [
    *[refused(c.target) for c in (*HITS, *CARDS, *MISSING) if c.target.startswith("/v1/metadata")],
    refused("/v1/met%61data/m/%5Fbase"),
    refused(f"{BASE}/config.json")._replace(method="HEAD", body=b""),
    refused(f"{BASE}/config.json")._replace(is_old=True),
    refused(f"{BASE}/config.json?access_token={TOKEN}"),
    refused(f"{BASE}/config.json", "Bearer"),
    refused(f"{BASE}/config.json", f"Basic {TOKEN}"),
    refused(f"{BASE}/config.json", TOKEN),
    refused(f"{BASE}/config.json", f"Bearer {TOKEN}x", invalid=True),
    refused(f"{BASE}/config.json", f"Bearer {TOKEN[:-1]}", invalid=True),
    refused(f"{BASE}/config.json", f"Bearer {TOKEN.upper()}", invalid=True),
    refused(f"{BASE}/config.json", "Bearer \xff", invalid=True),
    refused(f"{BASE}/unheard-of", f"Bearer {TOKEN}x", invalid=True),  # catalogue 33
    refused("/v1/metadata", f"Bearer {TOKEN}x", invalid=True),
]

LISTED = [
    Case("/v1/metadata", fields={"Content-Type": "application/json", "Vary": "Accept"}),
    Case("/v1/metadata", 200, b"", "HEAD", (), {"Content-Type": "application/json", "Vary": "Accept"}),
    Case("/v1/metadata?after=m/_base", fields={"Content-Type": "application/json"}),
    Case("/v1/met%61data", headers=HTML, fields={"Content-Type": "text/html; charset=utf-8"}),
    Case("/v1/metadata", 304, b"", "GET", (("If-None-Match", "*"),), {"Vary": "Accept"}),
    Case("/v1/metadata", 206, b"{", "GET", (("Range", "bytes=0-0"),)),
]

# catalogue 83
OLD = [case._replace(is_old=True) for case in (HITS[0], HITS[1], HITS[2], CARDS[0], RANGES[0], MISSING[0])]

CASES = [*OLD, *HITS, *CARDS, *HOSTILE, *CONDITIONS, *RANGES, *MISSING, *METHODS]


# ------------------------------------------------------------------ who answers

Ask = Callable[[Case], Any]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> MetadataArtifactRegistry:
    """Return a registry with the table's files."""
    return SITE["fill"](str(tmp_path_factory.mktemp("site")))


def request_bytes(case: Case, prefix: str = "", *more: str) -> bytes:
    """Return the request as a client sends it."""
    start = f"{case.method} {prefix}{case.target} HTTP/1."
    lines = [f"{start}0", *more] if case.is_old else [f"{start}1", "Host: worker", *more]
    lines += [f"{name}: {value}" for name, value in case.headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def serve_in_process(site: MetadataArtifactRegistry, parse: Any, **options: Any) -> Iterator[Ask]:
    """Call the app, watched by two checkers of WSGI; what comes is read as if a socket had carried it."""
    app = MetadataApp(site, **options)

    def ask(case: Case) -> Any:
        path, _, query = case.target.partition("?")
        environ = create_environ(method=case.method, headers=list(case.headers), input_stream=io.BytesIO())
        environ.update(PATH_INFO=unquote_to_bytes(path).decode("latin-1"), QUERY_STRING=query)
        environ.update(REQUEST_URI=case.target, RAW_URI=case.target)
        if case.is_old:
            del environ["HTTP_HOST"]
            environ["SERVER_PROTOCOL"] = "HTTP/1.0"
        checked = app if case.method == "HEAD" else LintMiddleware(app)  # it knows no answer without body
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unknown REQUEST_METHOD", WSGIWarning)
            body, status, headers = run_wsgi_app(validator(checked), environ, buffered=True)
        head = [f"HTTP/1.1 {status}", "Date: now", *(f"{name}: {value}" for name, value in headers), "", ""]
        return parse("\r\n".join(head).encode("latin-1") + b"".join(body), [case.method])[0]

    yield ask


def serve_embedded(site: MetadataArtifactRegistry, exchange: Any, **options: Any) -> Iterator[Ask]:
    """Ask the embedded server."""
    with SystemStatusServer(site, **options) as server:
        yield lambda case: exchange(
            (server.host, server.port), request_bytes(case, "", "Connection: close"), [case.method]
        )[0]


def command(kind: str, fd: int, directory: str) -> list[str]:
    """Return the command that runs a foreign server on a listening socket."""
    if not kind.startswith("gunicorn"):
        return [sys.executable, str(HERE / "site_app.py"), kind, str(fd), directory]
    from gunicorn.config import KNOWN_SETTINGS

    options = ["--workers", "1", "--worker-tmp-dir", directory, "--log-level", "error"]
    options += ["--threads", "2"] if kind != "gunicorn-sync" else []  # above 1: gthread
    if any("--no-control-socket" in (setting.cli or ()) for setting in KNOWN_SETTINGS):
        options += ["--no-control-socket"]  # otherwise it opens one in the home directory
    app = f"site_app:make({directory!r})"
    return [sys.executable, "-m", "gunicorn", "-b", f"fd://{fd}", *options, "--pythonpath", str(HERE), app]


def serve_foreign(kind: str, directory: Path, exchange: Any) -> Iterator[Ask]:
    """Ask a WSGI server in a process of its own, on a socket that listens before it starts."""
    prefix = PREFIX if kind in ("dispatcher", "gunicorn-script-name") else ""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        environ = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])}
        if kind == "gunicorn-script-name":
            environ["SCRIPT_NAME"] = PREFIX
        process = subprocess.Popen(
            command(kind, listener.fileno(), str(directory)), pass_fds=[listener.fileno()], env=environ,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield lambda case: exchange(
                listener.getsockname(), request_bytes(case, prefix, "Connection: close"), [case.method]
            )[0]
        finally:
            process.terminate()
            process.wait(10)


KINDS = [
    "app", "embedded", "embedded-process", "wsgiref", "dispatcher", "waitress", "gunicorn-sync",
    "gunicorn-gthread", "gunicorn-script-name",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def ask(
    request: pytest.FixtureRequest,
    site: MetadataArtifactRegistry,
    tmp_path_factory: pytest.TempPathFactory,
    parse: Any,
    exchange: Any,
) -> Iterator[Ask]:
    """Return a function that sends one case to one of the servers."""  # catalogue 89, 90, 144
    kind = request.param
    if kind == "app":
        yield from serve_in_process(site, parse)
    elif kind.startswith("embedded"):
        yield from serve_embedded(site, exchange, isolation="process" if "-" in kind else "thread")
    else:
        yield from serve_foreign(kind, tmp_path_factory.mktemp(kind), exchange)


@pytest.fixture(scope="module", params=["app", "embedded", "embedded-process"])
def ask_guarded(
    request: pytest.FixtureRequest, site: MetadataArtifactRegistry, parse: Any, exchange: Any
) -> Iterator[Ask]:
    """Return a function that sends one case to the app or the server, with a token and an index."""
    if request.param == "app":
        yield from serve_in_process(site, parse, token=TOKEN, index=True)
    else:
        isolation = "process" if "-" in request.param else "thread"
        yield from serve_embedded(site, exchange, access=Access(TOKEN), index=True, isolation=isolation)


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize("case", CASES, ids=str)
def test_table(ask: Ask, case: Case) -> None:
    """Every server gives the same answer."""
    check(ask, case)


@pytest.mark.parametrize(
    "case", [*REFUSED, *map(with_token, LISTED), *[c for c in CASES if c.status == 405]], ids=str
)
def test_guarded(ask_guarded: Ask, case: Case) -> None:
    """App and server refuse alike, and list alike to whoever is let in."""
    check(ask_guarded, case)


@pytest.mark.parametrize("case", [c for c in CASES if c.target != "/v1/metadata"], ids=str)
def test_token_opens_the_table(ask_guarded: Ask, case: Case) -> None:
    """With the token every answer is what it is without a guard, but for the index."""
    check(ask_guarded, with_token(case))


def check(ask: Ask, case: Case) -> None:
    """Send the case and compare what comes."""
    reply = ask(case)

    assert reply.status == case.status
    if case.body is not None:
        assert reply.body == case.body
    assert {name: reply.get(name.lower()) for name in case.fields} == case.fields
    assert reply.get("date") is not None  # one, not two
    assert reply.get("x-content-type-options") == "nosniff"


@pytest.mark.parametrize("case", [c for c in CASES if c.status >= 400][::4], ids=str)
def test_error_bodies_tell_nothing(ask: Ask, case: Case) -> None:
    """An error names no path, no version and no line of code, and is not the file."""  # catalogue 62, 95
    reply = ask(case)

    assert re.fullmatch(rb"[A-Za-z ',.-]+\n", reply.body)
    assert not re.search(rb"/|[0-9]|Traceback|Werkzeug|Python", reply.body)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/metadata/m%2F_base",
        "/v1/metadata/m/_base%2fdigits.txt",
        "/v1/metadata%2Fm/_base",
        "/v1%2fmetadata/m/_base",
    ],
)
def test_encoded_slash_separates_nothing(ask: Ask, request: pytest.FixtureRequest, target: str) -> None:
    """A slash that is encoded belongs to a name, and no name has one; wsgiref does not tell them apart."""
    is_told = request.node.callspec.params["ask"] not in ("wsgiref", "dispatcher")

    assert ask(missing(target)).status == (404 if is_told else 200)


def test_interrupted_download_is_resumed(ask: Ask) -> None:
    """The part that came and the part asked for later make the file, as `curl -C -` puts them together."""
    target = f"{BASE}/large.bin"  # catalogue 82
    half = ask(Case(target, headers=(("Range", "bytes=0-99999"),)))
    rest = ask(Case(target, headers=(("Range", "bytes=100000-"), ("If-Range", half.get("etag")))))

    assert (half.status, rest.status) == (206, 206)
    assert half.body + rest.body == LARGE


def test_unregistered_file_looks_like_none(ask: Ask) -> None:
    """A file that exists beside registered ones is as unknown as one that does not."""  # catalogue 33
    there, not_there = (ask(missing(f"{BASE}/{name}")) for name in ("secret.txt", "nothing.txt"))

    assert there.status == not_there.status == 404
    assert [f for f in there.fields if f[0] != "date"] == [f for f in not_there.fields if f[0] != "date"]
    assert there.body == not_there.body


def test_refusal_tells_nothing(ask_guarded: Ask) -> None:
    """Who may not look learns not even what is there: the same bytes but for the date."""  # catalogue 33
    targets = (f"{BASE}/config.json", f"{BASE}/secret.txt", f"{BASE}/nothing.txt", "/v1/metadata", BASE)
    replies = [ask_guarded(refused(target)) for target in targets]

    assert {reply.body for reply in replies} == {NEEDED}
    assert len({tuple(f for f in reply.fields if f[0] != "date") for reply in replies}) == 1


def test_whole_table_through_one_connection(site: MetadataArtifactRegistry, exchange: Any) -> None:
    """Answers to pipelined requests come in order and each ends exactly where the next begins."""
    cases = [case for case in CASES if case.status != 405 and not case.is_old]  # catalogue 90
    requests = b"".join(map(request_bytes, cases[:-1])) + request_bytes(cases[-1], "", "Connection: close")
    with SystemStatusServer(site) as server:
        replies = exchange((server.host, server.port), requests, [case.method for case in cases])

    assert [reply.status for reply in replies] == [case.status for case in cases]
    assert [r.body for r, c in zip(replies, cases) if c.body is not None] == [
        c.body for c in cases if c.body is not None
    ]


def test_unread_body_is_no_request(site: MetadataArtifactRegistry, exchange: Any) -> None:
    """What follows a refused method is not taken for a request: the connection is closed."""  # catalogue 59
    hidden = request_bytes(HITS[0])
    case = Case(f"{BASE}/config.json", method="POST", headers=(("Content-Length", str(len(hidden))),))
    with SystemStatusServer(site) as server:
        (reply,) = exchange((server.host, server.port), request_bytes(case) + hidden, ["POST"])

    assert (reply.status, reply.get("connection")) == (405, "close")
