"""What the server counts, by every way in which an answer can leave, with TLS and without."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from selfhost.worker.counters import ServerCounters

BODIES = [b'{"a": 1}', os.urandom(70_000), os.urandom(300_000), os.urandom(2_000_000) * 3]
REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 405: "Method Not Allowed"}


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_every_answer_and_byte_counts(
    secure: bool, start_server: Any, start_tls: Any, connect: Any, connect_tls: Any, serve_bytes: Any,
    wait_until: Any,
) -> None:  # fmt: skip
    """Known heads, single sends, pieces and sendfile, ranges and refusals: by status, to the byte."""
    server = (start_tls if secure else start_server)()
    client = (connect_tls if secure else connect)(server)
    targets = [serve_bytes(body, f"{len(body)}.bin") for body in BODIES]
    asked = [(target,) for target in (*targets * 2, "/nothing", "/live")]
    asked += [(target, "Range: bytes=-5") for target in targets]
    answers = [client.get(*request).answer() for request in asked]
    answers.append(client.get("/", method="PUT").answer())

    assert wait_until(lambda: server.counters().sent_bytes == sum(map(size_on_the_wire, answers)))
    counters = server.counters()
    assert counters.requests == {200: 9, 206: 4, 404: 1, 405: 1}
    assert (counters.accepted, counters.refused_busy, counters.handshake_failures) == (1, 0, 0)


def size_on_the_wire(answer: Any) -> int:
    """Return how many bytes an answer had."""
    lines = [f"HTTP/1.1 {answer.status} {REASONS[answer.status]}\r\n\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in answer.fields.items()]
    return len("".join(lines)) + len(answer.body)


def test_open_connections_come_and_go(start_server: Any, connect: Any, wait_until: Any) -> None:
    """Those that are open are counted as such, those that were as accepted."""
    server = start_server()
    clients = [connect(server) for _ in range(5)]
    assert wait_until(lambda: server.counters().open_connections == 5)
    for client in clients[:3]:
        client.close()

    assert wait_until(lambda: server.counters().open_connections == 2)
    assert server.counters().accepted == 5


def test_counters_travel() -> None:
    """As a dictionary that JSON can hold, and back; the dictionary does not change with them."""
    counters = ServerCounters({200: 3, 404: 1}, sent_bytes=5, accepted=2, handshake_failures=1)
    travelled = json.loads(json.dumps(counters.as_dict()))
    kept = counters.as_dict()
    counters.count(200)
    counters.count(500)

    assert kept == travelled
    assert ServerCounters.from_dict(travelled).requests == {200: 3, 404: 1}
    assert counters.requests == {200: 4, 404: 1, 500: 1}
