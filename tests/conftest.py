"""Fixtures that several test modules share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import h11
import helpers
import pytest

from selfhost.worker.registry import MetadataArtifactRegistry


class Reply(NamedTuple):
    """One HTTP answer; `fields` as (lower-case name, value), in the order in which they came."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """Return the values of a field."""
        return [value for known, value in self.fields if known == name]

    def get(self, name: str) -> str | None:
        """Return the value of a field that may stand there once."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} stands there {len(values)} times"
        return values[0] if values else None


def parse_strictly(raw: bytes, methods: list[str]) -> list[Reply]:
    """Parse everything that a server sent in answer to `methods`; fail on anything that h11 refuses."""
    replies = []
    for method in methods:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(raw)
        client.receive_data(b"")
        head = client.next_event()
        assert isinstance(head, h11.Response), head
        body = b""
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage), event
        raw = client.trailing_data[0]
        fields = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
        replies.append(Reply(head.status_code, fields, body))
    assert raw == b"", f"bytes after the last answer: {raw[:100]!r}"
    return replies


def send_and_read(address: tuple[str, int], data: bytes, *, seconds: float = 10.0) -> bytes:
    """Send `data` and return everything that comes until the server closes the connection."""
    with socket.create_connection(address, timeout=seconds) as sock:
        sock.sendall(data)
        pieces = []
        while piece := sock.recv(1 << 20):
            pieces.append(piece)
    return b"".join(pieces)


@pytest.fixture(scope="session")
def parse() -> Callable[[bytes, list[str]], list[Reply]]:
    """Return the function that reads answers strictly."""
    return parse_strictly


@pytest.fixture(scope="session")
def exchange() -> Callable[[tuple[str, int], bytes, list[str]], list[Reply]]:
    """Return a function (address, request bytes, methods) -> replies; the last request asks to close."""
    return lambda address, data, methods: parse_strictly(send_and_read(address, data), methods)


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Check that no thread and no descriptor of the test outlives it."""
    with helpers.nothing_left():
        yield


@pytest.fixture
def registry() -> MetadataArtifactRegistry:
    """Return an empty registry."""
    return MetadataArtifactRegistry()


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[str, bytes], str]:
    """Return a function (name, data) -> path of a new file in `tmp_path`."""

    def make(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    return make
