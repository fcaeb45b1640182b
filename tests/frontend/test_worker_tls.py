"""Frontend and embedded server by mutual TLS and token: all is well, and doctor names what lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from helpers import make_card

from selfhost import MetadataArtifactRegistry, SystemStatusServer
from selfhost.frontend import ClientTls, diagnose
from selfhost.worker.access import Access
from selfhost.worker.tls import TlsFiles

TOKEN = "t0ken-0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the files of both sides."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server"))
    authority.issue_cert("frontend.test").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "client")
    )
    return tmp_path


@pytest.fixture
def url(folder: Path, leaves_nothing: None) -> Iterator[str]:
    """Serve a card; return its URL."""
    registry = MetadataArtifactRegistry()
    tls = TlsFiles(str(folder / "server"), client_ca=str(folder / "ca"))
    with SystemStatusServer(registry, tls=tls, access=Access(token=TOKEN)) as server:
        registry.register_card("m", "_base", make_card({}, "http://w").to_json())
        yield f"https://{server.address}/v1/metadata/m/_base"


def test_both_sides(folder: Path, url: str) -> None:
    """Each thing that lacks is named."""
    origin, ca, client = url.partition("/v1")[0], folder / "ca", folder / "client"
    assert diagnose(url, tls=ClientTls(ca, client), tokens={origin: TOKEN}).is_ok
    assert diagnose(url, tls=ClientTls(ca, client)).problems == ("status 401",)
    assert diagnose(url).problems == ("tls, unknown authority",)
    (problem,) = diagnose(url, tls=ClientTls(ca), tokens={origin: TOKEN}).problems
    assert problem in ("tls, client certificate wanted", "tls, broken off")
