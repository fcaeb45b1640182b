"""From what an operator got wrong to the cause, by name, and to what can be done about it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import wire
from helpers import make_card

from selfhost.frontend import AllowList, diagnose, remedies, transport
from selfhost.frontend.diagnosis import Step
from selfhost.frontend.limits import ResolverLimits
from selfhost.frontend.transport import FetchLimits

FILES = {"config.json": b"{}", "notes.txt": b"an extra file"}
LIMITS = ResolverLimits(fetch=FetchLimits(read_seconds=0.3))
TOKEN = "s3cret-token"


def failed(source: Any, **options: Any) -> Step:
    """Return the first step of a diagnosis that failed."""
    return next(step for step in diagnose(source, limits=LIMITS, **options).steps if step.problem)


def test_every_word_has_a_remedy() -> None:
    """Whatever a transport calls the cause, and whatever a diagnosis does, has advice of its own."""
    words = {
        value
        for module in (transport, remedies)
        for name, value in vars(module).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str)
    } - {transport.PATH_SCHEME, remedies.OTHERWISE}

    assert {transport.NO_HTTP, remedies.OTHER_ORIGIN} < words <= set(remedies.REMEDIES)


# ------------------------------------------------------------------ the URL of a card


NOTHING = wire.ok(b"", status="404 Not Found")
NO_CARD = ("answer", "status 404, not a card's URL", "`selfhost serve` prints")
CASES = {
    "another protocol": ("/c", b"SSH-2.0-OpenSSH_9.2p1\r\n", ("answer", "no HTTP", "DYN_SYSTEM_PORT")),
    "words": ("/c", b"hello, this is no http\n", ("answer", "no HTTP", "DYN_SYSTEM_PORT")),
    "a password": ("me:hush@", NOTHING, ("url", "unusable URL", "--token-file")),
    "no path": ("", NOTHING, NO_CARD),
    "the root": ("/", NOTHING, NO_CARD),
    "a slug alone": ("/v1/metadata/my_model", NOTHING, NO_CARD),
    "a name with a slash": ("/v1/metadata/my/model/_base", NOTHING, NO_CARD),
    "withdrawn": ("/v1/metadata/m/_base", NOTHING, ("answer", "status 404", "withdrawn")),
    "another slug": ("/v1/metadata/n/_base", NOTHING, ("answer", "status 404", ".../v1/metadata lists")),
    "withdrawn, mounted": ("/a/b/v1/metadata/m/_base", NOTHING, ("answer", "status 404", "withdrawn")),
    "a file": ("/v1/metadata/m/_base/a.json", wire.ok(b"{}"), ("content", "a file's URL", "?blake3=")),
    "a page": ("/v1/metadata/m/_base/a", wire.ok(b"<!DOCTYPE html>"), ("content", "HTML page", "login")),
    "compressed": (
        "/c", wire.ok(b"{}", "Content-Encoding: gzip"), ("content", "encoded answer", "/v1/metadata"),
    ),
    "one byte": (
        "/c", wire.silent_after(wire.head("Content-Length: 99") + b"{"),
        ("content", "time-out, body", "stalled"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_card_by_url(leaves_nothing: None, case: str) -> None:
    """What is wrong with the URL, or with what answers there, is told as that, once, without secrets."""
    where, answer, (name, problem, remedy) = CASES[case]
    with wire.WireServer(answer) as server:
        host = f"127.0.0.1:{server.port}"
        url = f"http://{where}{host}/v1/metadata/m/_base" if where.endswith("@") else f"http://{host}{where}"
        step = failed(url)

    assert (step.name, step.problem) == (name, problem)
    assert remedy in step.remedy
    assert "hush" not in step.detail
    assert host not in step.detail
    assert "only 0 bytes" not in step.detail


# ------------------------------------------------------------------ where the files are


@pytest.mark.parametrize(
    ("base", "options", "found"),
    [
        ("file:///models/m", {}, ("url", "local path", "--file-root")),
        ("/models/m", {}, ("url", "local path", "--file-root")),
        ("/models/m", {"file_roots": ["{}"]}, ("answer", "local path", "--file-root")),
        ("file://{}", {"file_roots": ["{}"]}, ("answer", "local path", "--file-root")),
        ("s3://bucket/m", {}, ("url", "scheme not allowed", "http(s) URLs")),
        ("hf://org/name", {}, ("answer", "hub", "HF_HUB_CACHE")),
        ("hf://org/name", {"peer_policy": AllowList("w")}, ("answer", "hub not asked", "--allow-hub")),
        ("hf://..", {}, ("url", "unusable URL", "http(s)://")),
    ],
)
@pytest.mark.parametrize("status", [None, 404, 503])  # of the hub
def test_files_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    options: dict[str, Any],
    found: tuple[str, str, str],
    status: Optional[int],
) -> None:
    """What the card says of where its files are is told, and never as the fault of a worker that listens."""

    def refuse(*_: object, **__: object) -> None:
        error = OSError("hub says no")
        error.response = types.SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
        raise error

    hub: Any = types.SimpleNamespace(hf_hub_url=refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    options = {"hf_hub_cache": str(tmp_path), **options}
    if "file_roots" in options:
        options["file_roots"] = [str(tmp_path)]
    step = failed(make_card(FILES, base.format(tmp_path)), **options)

    assert (step.name, step.problem) == found[:2]
    assert found[2] in step.remedy


def test_without_the_package_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is to install it: whether this host reaches the hub is another matter."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    step = failed(make_card(FILES, "hf://org/name"), hf_hub_cache=str(tmp_path))

    assert (step.name, step.problem) == ("answer", "no huggingface_hub")
    assert "pip install 'selfhost[hf]'" in step.remedy
    assert "HF_HUB_CACHE" in step.remedy


# ------------------------------------------------------------------ tokens


@pytest.fixture
def strict(leaves_nothing: None) -> Iterator[wire.WireServer]:
    """Return a server that asks for the token; the files of its card are at another name of it."""

    def answer(sock: Any, _: object) -> None:
        is_right = server.requests[-1].find(f"Authorization: Bearer {TOKEN}\r\n".encode()) > 0
        card = make_card(FILES, f"http://localhost:{server.port}").to_json().encode()
        sock.sendall(wire.ok(card) if is_right else wire.ok(b"", status="401 Unauthorized"))

    with wire.WireServer(answer) as server:
        yield server


def test_token_for_the_card_alone(strict: wire.WireServer) -> None:
    """Where the files are at another origin the remedy is not to give the token that was given."""
    card_origin = f"http://127.0.0.1:{strict.port}"
    found = diagnose(f"{card_origin}/c", limits=LIMITS, tokens={card_origin: TOKEN})
    refused = diagnose(f"{card_origin}/c", limits=LIMITS, tokens={card_origin: "other"})

    assert found.problems == ("status 401, another origin",)
    assert "DYN_MDC_TOKENS_FILE" in found.steps[-1].remedy
    assert refused.problems == ("status 401",)
    published = f"http://localhost:{strict.port} is published"
    assert [notice for notice in found.notices if notice.startswith(published)] == [
        f"{published}: only this host reaches that (DYN_SYSTEM_ADVERTISE_URL)",
        f"{published} for the files: that is not where the card is from",
    ]
    assert f"the token was sent to {card_origin} in the clear" in " ".join(found.notices)
