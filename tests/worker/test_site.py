"""What a server answers beyond the files: health with its reason, who is let in, and that nothing raises."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, Callable, Optional

import pytest

from selfhost.worker.access import UNAUTHORIZED, Access
from selfhost.worker.answer import FAILED, NOT_FOUND
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.site import Site

TOKEN = "0123456789abcdef"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def health(site: Site) -> tuple[int, dict[str, Any]]:
    """Return status and body of /health."""
    answer = site.answer("GET", "/health", {})
    return answer.status, json.loads(answer.body)


def raising(error: BaseException) -> Callable[[], Mapping[str, str]]:
    """Return an `endpoints` that fails."""

    def endpoints() -> Mapping[str, str]:
        raise error

    return endpoints


# ------------------------------------------------------------------ health


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        (None, None),
        ({"generate": "ready"}, None),
        ({"generate": "ready", "embed": "ready"}, None),
        ({}, "no endpoint has a model yet"),
        ({"generate": "notready"}, "endpoint 'generate' is notready"),
        ({"a": "ready", "b": "starting"}, "endpoint 'b' is starting"),
        ({"a": "notready", "b": "starting"}, "endpoint 'a' is notready, endpoint 'b' is starting"),
        ({"a\nb": "notready"}, "endpoint 'a\\nb' is notready"),
    ],
)
def test_health_says_why(
    registry: MetadataArtifactRegistry, states: Optional[dict[str, str]], reason: Optional[str]
) -> None:
    """Ready without a reason, or not ready with one; beside it what Dynamo's route tells."""
    site = Site(registry, endpoints=None if states is None else lambda: states, clock=lambda: 7.25)
    status, body = health(site)

    assert status == (503 if reason else 200)
    assert body.pop("reason", None) == reason
    assert body == {
        "status": "notready" if reason else "ready",
        "uptime": {"secs": 0, "nanos": 0},
        "endpoints": states or {},
    }


@pytest.mark.parametrize(
    "error",
    [ValueError("secret"), KeyError(), SystemExit(1), asyncio.CancelledError(), BaseException()],
)
def test_unknown_state_is_not_ready(
    registry: MetadataArtifactRegistry, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the host cannot tell, the worker is not ready; the log has the error, the client has not."""
    status, body = health(Site(registry, endpoints=raising(error)))

    assert (status, body["reason"], body["endpoints"]) == (503, "the worker's state is not known", {})
    assert "secret" not in json.dumps(body)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("states", [None, 5, [("a",)], {"a": object()}])
def test_odd_states_are_not_ready(registry: MetadataArtifactRegistry, states: Any) -> None:
    """What is no mapping of texts makes no answer fail."""
    status, body = health(Site(registry, endpoints=lambda: states))

    assert (status, body["status"]) == (503, "notready")


def test_uptime_counts(registry: MetadataArtifactRegistry) -> None:
    """Whole seconds and nanoseconds since the site was made, the same at both routes."""
    times = iter([100.0, 163.5, 163.5])
    site = Site(registry, clock=lambda: next(times))
    live, ready = (json.loads(site.answer("GET", target, {}).body) for target in ("/live", "/health"))

    assert live == {"status": "live", "uptime": {"secs": 63, "nanos": 500_000_000}}
    assert ready["uptime"] == live["uptime"]


def test_live_asks_nobody(registry: MetadataArtifactRegistry) -> None:
    """A worker that is not ready, or does not know, is alive."""
    assert Site(registry, endpoints=raising(ValueError())).answer("GET", "/live", {}).status == 200


# ------------------------------------------------------------------ with a token


def test_health_stays_open(registry: MetadataArtifactRegistry) -> None:
    """Whoever probes a worker has no token."""
    site = Site(registry, access=Access(TOKEN))

    assert [site.answer("GET", target, {}).status for target in ("/health", "/live", "/")] == [200, 200, 404]


@pytest.mark.parametrize(
    "target",
    [
        "/v1/metadata",
        "/v1/metadata/",
        "/v1/metadata/m/_base",
        "/v1/metadata/m/_base/f.json",
        "/v1/metadata/m/_base/f.json?blake3=0",
        "/v1/met%61data/m/_base/f.json",
        "/v1%2fmetadata/m/_base/f.json",
        "/v1/metadata/never/heard/of",
        "/v1/metadata/%zz",
        "/v1/metadata/../../health",
    ],
)
def test_without_token_everything_below_the_route_is_one(
    registry: MetadataArtifactRegistry, target: str
) -> None:
    """What is registered and what is not are the very same answer."""  # catalogue 33
    registry.register("m", "_base", "f.json", pin_bytes(b"{}"))
    site = Site(registry, access=Access(TOKEN), index=True)

    assert site.answer("GET", target, {}) is UNAUTHORIZED
    assert site.answer("HEAD", target, {}) is UNAUTHORIZED


def test_with_token_it_is_as_without_access(registry: MetadataArtifactRegistry) -> None:
    """The token opens what is there, and what is not there is not there."""
    registry.register("m", "_base", "f.json", pin_bytes(b"{}"))
    site = Site(registry, access=Access(TOKEN))

    assert site.answer("GET", "/v1/metadata/m/_base/f.json", BEARER).status == 200
    assert site.answer("GET", "/v1/metadata/m/_base/g.json", BEARER) is NOT_FOUND
    assert site.answer("GET", "/v1/metadata", BEARER) is NOT_FOUND  # the index is off


# ------------------------------------------------------------------ whatever fails


def test_unexpected_error_is_one_short_answer(
    registry: MetadataArtifactRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of ours is 500 without a word about it; the log has it, with the target as a literal."""
    monkeypatch.setattr(registry, "get", raising(RuntimeError("inner")))
    answer = Site(registry).answer("GET", "/v1/metadata/m/_base/%0aforged", {})

    assert answer is FAILED
    assert "cannot answer '/v1/metadata/m/_base/%0aforged'" in caplog.text
