"""The table of transports, the caps of downloads, and what counts as one origin."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import RudeOrigin, make_card

from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import ResolveError, SchemeNotAllowed
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.peer_policy import AllowList, not_link_local
from selfhost.frontend.resolver import MetadataResolver, ResolverLimits
from selfhost.frontend.transport import PATH_SCHEME, FetchLimits, origin_of, scheme_of, transport_for
from selfhost.frontend.transport_file import FileTransport
from selfhost.frontend.transport_http import HttpTransport
from selfhost.frontend.transports import default_transports

QUICK = ResolverLimits(rounds=1, fetch=FetchLimits(connect_seconds=0.5, read_seconds=0.5))


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


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({}, True),
        ({"peer_policy": not_link_local}, True),
        ({"peer_policy": AllowList("10.0.0.0/8")}, False),
        ({"peer_policy": AllowList("10.0.0.0/8"), "ask_hub": True}, True),
        ({"ask_hub": False}, False),
        ({"ask_hub": True, "offline": True}, False),
    ],
)
def test_hub_and_peer_policy(options: dict[str, Any], asks: bool) -> None:
    """Whom huggingface_hub talks to no policy decides: with one it is not asked, unless one says so."""
    assert f"network={asks}>" in repr(default_transports(**options)["hf"])


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


def test_refused_url_keeps_its_secrets() -> None:
    """Neither the message nor the URL on the error has the password."""
    with pytest.raises(SchemeNotAllowed, match="ftp") as caught:
        transport_for(default_transports(), "ftp://me:s3cret@w/x?sig=s3cret")

    assert "s3cret" not in str(caught.value)
    assert caught.value.url == "ftp://w/x?sig=s3cret"


ODD = ["//[foo/a.json", "http://[x/a.json", "hf://\u2100/a.json", "http://w:99999/a.json"]


@pytest.mark.parametrize("path", ODD)
def test_odd_locations_spoil_no_good_source(
    path: str, counting_origin: RudeOrigin, files: dict[str, bytes], tmp_path: Path
) -> None:
    """A card whose paths no parser likes fails for its files; a good card that has it as replica does not."""
    good = make_card(files, counting_origin.url)
    paths = {name: path.replace("a.json", name) for name in files}
    odd = ModelDeploymentCard.from_json(
        good.map_files(lambda file: replace(file, path=paths[file.basename])).to_json()
    )
    with MetadataResolver(BlobCache(tmp_path / "a"), limits=QUICK) as resolver:
        assert resolver.resolve(good, replicas=[odd]).local_dir
    with MetadataResolver(BlobCache(tmp_path / "b"), limits=QUICK) as resolver:
        assert resolver.resolve(odd, replicas=[good]).local_dir
    with MetadataResolver(BlobCache(tmp_path / "c"), limits=QUICK) as resolver, pytest.raises(ResolveError):
        resolver.resolve(odd)


@pytest.mark.parametrize(
    ("location", "scheme", "origin"),
    [
        ("http://w:9090/a?b", "http", "http://w:9090"),
        ("HTTPS://w/a", "https", "https://w"),
        ("http://[::1]:80/a", "http", "http://[::1]"),
        ("http://[0:0::1]:81/a", "http", "http://[::1]:81"),
        ("http:\\\\me:secret@W:80\\a", "http", "http://w"),
        (" http:/w:1/a", "http", "http://w:1"),
        ("hf://org/model/a", "hf", "hf://org"),
        ("/a/b", "", "/a/b"),
        ("file:///a/b", "file", "file:///a/b"),
        ("data:,x", "data", "data:,x"),
        ("//[foo/config.json", "", "//[foo/config.json"),
        ("http://[x/config.json", "", "http://[x/config.json"),
        ("http://w:99999/a", "", "http://w:99999/a"),
        ("hf://\u2100/x", "hf", "hf://%E2%84%80"),
        ("http://\udcff/x", "", "http://\udcff/x"),
        ("", "", ""),
    ],
)
def test_scheme_and_origin(location: str, scheme: str, origin: str) -> None:
    """A URL has a scheme and fails with its host; a path, and what only looks like a URL, fails alone."""
    assert (scheme_of(location), origin_of(location)) == (scheme, origin)


@pytest.mark.parametrize(
    ("size", "cap"), [(None, 64 << 20), (0, 0), (17, 17), (1 << 30, 1 << 30), ((1 << 30) + 1, 1 << 30)]
)
def test_caps(size: int | None, cap: int) -> None:
    """A known size is the cap, up to 1 GiB; an unknown one allows 64 MiB."""
    assert FetchLimits().cap(size) == cap


@pytest.mark.parametrize("field", [field.name for field in fields(FetchLimits)])
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, "5"])
def test_limits_above_zero(field: str, value: object) -> None:
    """A limit of nothing, or of no number, is refused by name where it is set."""
    with pytest.raises(ValueError, match=f"{field}: expected a finite number above 0, found") as caught:
        FetchLimits(**{field: value})  # type: ignore[arg-type]

    assert repr(value) in str(caught.value)


def test_http_needs_the_network() -> None:
    """Offline, nothing of it is left."""
    assert HttpTransport().offline() is None  # type: ignore[func-returns-value]
