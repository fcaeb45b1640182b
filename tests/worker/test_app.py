"""The WSGI application by itself: what no server can show, and what no request may reach."""

from __future__ import annotations

import gc
import itertools
from typing import Any, Callable

import pytest
from werkzeug.test import Client, EnvironBuilder

from selfhost.errors import SettingsError
from selfhost.worker.answer import find, split_target
from selfhost.worker.app import PIECE_BYTES, MetadataApp
from selfhost.worker.content import pin_bytes, pin_file
from selfhost.worker.registry import MetadataArtifactRegistry

PATH = "/v1/metadata/m/_base/f.bin"
DATA = bytes(range(256)) * 4096  # 1 MiB: several pieces


@pytest.fixture
def app(registry: MetadataArtifactRegistry) -> MetadataApp:
    """Return an app that serves one file from memory."""
    registry.register("m", "_base", "f.bin", pin_bytes(DATA))
    return MetadataApp(registry)


def call(app: MetadataApp, **environ: Any) -> tuple[str, Any]:
    """Call the app as a server would; return the status and what is to be iterated."""
    base = EnvironBuilder(path=PATH, environ_overrides=environ).get_environ()
    told: list[str] = []
    body = app(base, lambda status, headers, exc_info=None: told.append(status) or (lambda data: None))
    return told[0], body


def test_hit_is_one_piece(app: MetadataApp) -> None:
    """A whole file from memory leaves as the very object that is kept, without a copy."""
    _, body = call(app)

    assert len(body) == 1
    assert body[0] is app.registry.get("m", "_base", "f.bin").content.data


def test_ranges_come_in_pieces(app: MetadataApp) -> None:
    """A slice is never held as a whole beside the content."""
    status, body = call(app, HTTP_RANGE="bytes=1-")
    pieces = list(body)

    assert status.startswith("206 ")
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert b"".join(pieces) == DATA[1:]


def test_content_that_went_to_a_sealed_file_is_served(app: MetadataApp) -> None:
    """An embedded server beside the app may have moved the bytes into a memfd."""
    assert app.registry.get("m", "_base", "f.bin").content.sealed() is not None
    status, body = call(app)

    assert (status, b"".join(body)) == ("200 OK", DATA)


def test_file_wrapper_is_not_used(app: MetadataApp, make_file: Callable[[str, bytes], str]) -> None:
    """A server's file wrapper would send whatever the file holds by then."""  # pitfall 2
    app.registry.register("m", "_base", "held", pin_file(make_file("held", DATA), max_pinned_bytes=0))
    environ = {"PATH_INFO": "/v1/metadata/m/_base/held", "wsgi.file_wrapper": None}

    assert b"".join(call(app, **environ)[1]) == DATA


@pytest.mark.parametrize(
    "environ",
    [
        {"PATH_INFO": ""},
        {"PATH_INFO": "/"},
        {"PATH_INFO": "x"},
        {"PATH_INFO": PATH[1:]},
        {"PATH_INFO": PATH, "QUERY_STRING": "blake3"},
        {"PATH_INFO": "\xff\xfe"},
        {"SCRIPT_NAME": "/v1/metadata", "PATH_INFO": "/m/_base/f.bin"},
        {"HTTP_HOST": "", "SERVER_NAME": ""},
        {"HTTP_HOST": "a b\x00", "wsgi.url_scheme": "gopher"},
        {"CONTENT_LENGTH": "x", "CONTENT_TYPE": "\xff"},
        {"HTTP_RANGE": "\x00", "HTTP_IF_RANGE": "\xff"},
        {"HTTP_IF_NONE_MATCH": '\xff\x00"', "HTTP_IF_MATCH": "*"},
        {"HTTP_ACCEPT_ENCODING": "gzip", "HTTP_ACCEPT": "nothing"},
        {"HTTP_CONNECTION": "upgrade", "HTTP_UPGRADE": "websocket"},
    ],
)
def test_nothing_makes_it_fail(app: MetadataApp, environ: dict[str, str]) -> None:
    """Whatever a server lets through is answered with 200 or 404."""  # catalogue 83
    status, body = call(app, **environ)

    assert status.split()[0] in ("200", "404")
    assert b"".join(body) in (DATA, b"Not found\n")


@pytest.mark.parametrize("missing", ["QUERY_STRING", "PATH_INFO", "HTTP_HOST"])
def test_optional_variables_may_be_missing(app: MetadataApp, missing: str) -> None:
    """PEP 3333 lets a server leave out what is empty."""
    environ = EnvironBuilder(path=PATH).get_environ()
    environ.pop(missing)
    told: list[str] = []
    app(environ, lambda status, headers, exc_info=None: told.append(status) or (lambda data: None))

    assert told in (["200 OK"], ["404 NOT FOUND"])


def test_prefix_does_not_matter(app: MetadataApp) -> None:
    """Routing looks at PATH_INFO alone, whatever the app is mounted under."""  # catalogue 88
    for script_name in ("", "/a", "/v1/metadata/m/_base", "/%41/模".encode().decode("latin-1")):
        assert call(app, SCRIPT_NAME=script_name)[0] == "200 OK"


def test_abandoned_answers_keep_no_descriptor(
    app: MetadataApp, make_file: Callable[[str, bytes], str], leaves_nothing: None
) -> None:
    """An iterator that nobody exhausts or closes goes with its last reference."""  # catalogue 93
    held = app.registry.register("h", "_base", "f", pin_file(make_file("f", DATA), max_pinned_bytes=0))
    for _ in range(50):
        _, body = call(app, PATH_INFO="/v1/metadata/h/_base/f")
        next(iter(body))
    held.close()
    app.registry.unregister("m", "_base")
    del body, held
    gc.collect()


def test_answers_survive_unregistering(app: MetadataApp) -> None:
    """An answer that is on its way ends with the bytes that it began with."""
    _, body = call(app, HTTP_RANGE="bytes=1-")
    pieces = iter(body)
    first = next(pieces)
    app.registry.unregister("m", "_base")

    assert first + b"".join(pieces) == DATA[1:]


def test_token_comes_from_the_field_alone(registry: MetadataArtifactRegistry) -> None:
    """The app asks for the token wherever it is mounted, and takes it from no other place."""
    registry.register("m", "_base", "f.bin", pin_bytes(DATA))
    app = MetadataApp(registry, token="0123456789abcdef")
    bearer = {"HTTP_AUTHORIZATION": "Bearer 0123456789abcdef"}
    query = {"QUERY_STRING": "access_token=0123456789abcdef", "REMOTE_USER": "somebody"}

    assert [call(app, SCRIPT_NAME=name, **bearer)[0] for name in ("", "/a")] == ["200 OK"] * 2
    assert [call(app, SCRIPT_NAME=name, **query)[0] for name in ("", "/a")] == ["401 UNAUTHORIZED"] * 2


def test_token_file_is_read_when_the_app_is_made(
    registry: MetadataArtifactRegistry, make_file: Callable[[str, bytes], str]
) -> None:
    """A token that cannot be used is an error of the mounting, not of the first request."""
    path = make_file("token", b"0123456789abcdef\n")
    registry.register("m", "_base", "f.bin", pin_bytes(DATA))

    assert (
        call(MetadataApp(registry, token_file=path), HTTP_AUTHORIZATION="Bearer 0123456789abcdef")[0]
        == "200 OK"
    )
    with pytest.raises(SettingsError, match="DYN_SYSTEM_TOKEN_FILE"):
        MetadataApp(registry, token_file=make_file("empty", b""))
    with pytest.raises(SettingsError, match="either"):
        MetadataApp(registry, token="0123456789abcdef", token_file=path)


def test_index_needs_the_plain_path(registry: MetadataArtifactRegistry) -> None:
    """An encoded slash leads to no index, whatever the prefix; without `index` there is none."""
    index = {"PATH_INFO": "/v1/metadata"}
    app = MetadataApp(registry, index=True)
    statuses = [
        call(app, **index)[0],
        call(app, **index, REQUEST_URI="/a%2Fb/v1/metadata")[0],
        call(app, **index, REQUEST_URI="/v1%2Fmetadata")[0],
        call(app, PATH_INFO="/v1/metadata/")[0],
        call(MetadataApp(registry), **index)[0],
    ]

    assert [status[:3] for status in statuses] == ["200", "200", "404", "404", "404"]


DOTS = ["..", "%2e%2e", "．．", ".%2e", "%252e%252e", "..%00", "%c0%ae%c0%ae", "%uff0e", "....", "..;"]
SLASHES = ["/", "%2f", "%5c", "\\", "//", "%252f", "%c0%af", "/./", "%00/", "%u2215", "∕"]
STARTS = ["", "/v1/metadata/", "/v1/metadata/m/", "/v1/metadata/m/_base/", "/v1/metadata/m/_base/f.bin/"]
GOALS = ["etc/passwd", "f.bin", "secret.txt", "_base/f.bin.bak"]


def test_traversal_finds_nothing(app: MetadataApp, make_file: Callable[[str, bytes], str]) -> None:
    """Thousands of ways to spell "the directory above" all end in one 404."""  # catalogue 31, 32
    make_file("secret.txt", b"secret")
    client = Client(app)
    targets = [
        f"{start}{(dots + slash) * depth}{goal}"
        for start, dots, slash, depth, goal in itertools.product(STARTS, DOTS, SLASHES, (1, 3), GOALS)
    ]
    found = {target for target in targets if client.get(f"/{target.lstrip('/')}").status_code != 404}
    found |= {t for t in targets if find(app.registry, *split_target(t)) or app.registry.lookup(t)}

    assert len(targets) > 2_615
    assert found == set()
