"""Frontend and worker together, where the worker asks for a token: what one sends is what the other takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from helpers import make_card, poll_until

from selfhost import BlobCache, MetadataApp, MetadataArtifactRegistry, MetadataResolver
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import HTTPStatusError, ResolveError
from selfhost.frontend import Tokens, default_transports, diagnose, fetch_card

FILES = {"config.json": b"{}", "tokenizer.json": b"[]"}
FIRST, SECOND = "first-0123456789abcdef", "second-0123456789abcdef"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Return the worker's file with its token."""
    (tmp_path / "token").write_text(f"{FIRST}\n")
    return tmp_path / "token"


@pytest.fixture
def card(leaves_nothing: None, token_file: Path) -> Iterator[ModelDeploymentCard]:
    """Serve a model, under this token; return its card."""
    registry = MetadataArtifactRegistry()
    app: Any = MetadataApp(registry, token_file=token_file)
    with make_server("127.0.0.1", 0, app, handler_class=QuietHandler) as server:
        made = make_card(FILES, f"http://127.0.0.1:{server.server_port}/v1/metadata/m/_base")
        for name, data in FILES.items():
            (token_file.parent / name).write_bytes(data)
            registry.register("m", "_base", name, token_file.parent / name)
        registry.register_card("m", "_base", made.to_json())
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


class QuietHandler(WSGIRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def base_url(card: ModelDeploymentCard) -> str:
    """Return where the card itself is."""
    return next(file.path for file, _ in card.iter_metadata_files()).rpartition("/")[0]


def origin_of(card: ModelDeploymentCard) -> str:
    """Return what a token is configured for."""
    return base_url(card).partition("/v1")[0]


def test_token_opens_the_worker(card: ModelDeploymentCard, tmp_path: Path) -> None:
    """Card and files come to whoever has the token, and to nobody else."""
    right = default_transports(tokens={origin_of(card): FIRST})
    wrong = default_transports(tokens={origin_of(card): SECOND})
    assert fetch_card(base_url(card), right).mdcsum == card.mdcsum
    with MetadataResolver(BlobCache(tmp_path / "one"), transports=right) as resolver:
        assert len(resolver.resolve(card).fetched) == len(FILES)
    resolver = MetadataResolver(BlobCache(tmp_path / "two"), transports=wrong)
    with resolver, pytest.raises(ResolveError, match="does not accept the bearer token") as caught:
        resolver.resolve(card)
    for table in (right, wrong):
        table["http"].close()

    assert [type(attempt.error) for attempt in caught.value.attempts] == [HTTPStatusError]


def test_renewed_token_is_used(card: ModelDeploymentCard, token_file: Path, tmp_path: Path) -> None:
    """A frontend that runs on has a new token as soon as it is in its file, a worker within a second."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{origin_of(card)} {FIRST}")
    table = default_transports(tokens=Tokens(file=tokens))
    assert fetch_card(base_url(card), table)

    token_file.write_text(SECOND)
    tokens.write_text(f"{origin_of(card)} {SECOND}")
    assert poll_until(lambda: is_let_in(card, table))
    table["http"].close()


def is_let_in(card: ModelDeploymentCard, table: Any) -> bool:
    """Tell whether the worker gives its card."""
    try:
        fetch_card(base_url(card), table)
    except HTTPStatusError:
        return False
    return True


def test_doctor_knows_both_sides(card: ModelDeploymentCard) -> None:
    """With the token all is well; without it the status is the cause, and the remedy names the token."""
    assert diagnose(base_url(card), tokens={origin_of(card): FIRST}).is_ok

    found = diagnose(base_url(card))
    assert found.problems == ("status 401",)
    assert "--token-file" in found.steps[-1].remedy
