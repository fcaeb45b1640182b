"""The table of transports, the caps of downloads, and what counts as one origin."""

from __future__ import annotations

import pytest

from selfhost.errors import SchemeNotAllowed
from selfhost.frontend.transport import PATH_SCHEME, FetchLimits, origin_of, scheme_of, transport_for
from selfhost.frontend.transport_file import FileTransport
from selfhost.frontend.transport_http import HttpTransport
from selfhost.frontend.transports import default_transports


def test_default_table() -> None:
    """Both of HTTP's schemes share one transport; paths and file URLs are not in it."""
    table = default_transports()

    assert sorted(table) == ["hf", "http", "https"]
    assert isinstance(table["http"], HttpTransport)
    assert table["http"] is table["https"]


def test_folders_that_are_named_open_paths(tmp_path: object) -> None:
    """With roots there is one transport for paths and file URLs."""
    table = default_transports(file_roots=[str(tmp_path)])

    assert sorted(table) == [PATH_SCHEME, "file", "hf", "http", "https"]
    assert isinstance(table["file"], FileTransport)
    assert table["file"] is table[PATH_SCHEME]


def test_limits_reach_http() -> None:
    """The table's options are its transports' options."""
    limits = FetchLimits(total_seconds=1.0)
    http = default_transports(limits=limits)["http"]

    assert isinstance(http, HttpTransport)
    assert http.limits is limits


def test_table_can_be_extended() -> None:
    """Each call makes a new table, to which users add their own schemes."""
    table = default_transports()
    table["s3"] = table["http"]

    assert transport_for(table, "s3://bucket/key") is table["http"]
    assert "s3" not in default_transports()


# catalogue 8
@pytest.mark.parametrize(
    ("location", "scheme"),
    [
        ("file:///etc/passwd", "file"),
        ("FILE:///etc/passwd", "file"),
        ("/etc/passwd", ""),
        ("etc/passwd", ""),
        ("data:,x", "data"),
        ("ftp://127.0.0.1/x", "ftp"),
        ("gopher://127.0.0.1/x", "gopher"),
        ("C:\\x", "c"),
    ],
)
def test_other_schemes_are_refused(location: str, scheme: str) -> None:
    """What is not in the table is refused by name, and the message lists what would be allowed."""
    with pytest.raises(SchemeNotAllowed, match="'hf', 'http', 'https'") as caught:
        transport_for(default_transports(), location)

    assert (caught.value.scheme, caught.value.url) == (scheme, location)


@pytest.mark.parametrize(
    ("location", "scheme", "origin"),
    [
        ("http://w:9090/a?b", "http", "http://w:9090"),
        ("HTTPS://w/a", "https", "https://w"),
        ("http://[::1]:80/a", "http", "http://[::1]:80"),
        ("hf://org/model/a", "hf", "hf://org"),
        ("/a/b", "", "/a/b"),
        ("file:///a/b", "file", "file:///a/b"),
    ],
)
def test_scheme_and_origin(location: str, scheme: str, origin: str) -> None:
    """A URL has a scheme and fails with its host; a path fails alone."""
    assert (scheme_of(location), origin_of(location)) == (scheme, origin)


@pytest.mark.parametrize(
    ("size", "cap"), [(None, 64 << 20), (0, 0), (17, 17), (1 << 30, 1 << 30), ((1 << 30) + 1, 1 << 30)]
)
def test_caps(size: int | None, cap: int) -> None:
    """A known size is the cap, up to 1 GiB; an unknown one allows 64 MiB."""
    assert FetchLimits().cap(size) == cap
