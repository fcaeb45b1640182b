"""diagnose: each cause by its name, with a remedy, from origins that really have it."""

from __future__ import annotations

import contextlib
import datetime
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme
import wire
from helpers import RudeOrigin, full_queue, make_card

from selfhost.card.checksum import Checksum
from selfhost.errors import SettingsError
from selfhost.frontend import AllowList, ClientTls, Diagnosis, diagnose, http_tls, remedies
from selfhost.frontend import diagnosis as module
from selfhost.frontend.diagnosis import Step
from selfhost.frontend.limits import ResolverLimits
from selfhost.frontend.transport import FetchLimits

FILES = {"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": bytes(range(256)) * 200}
SHORT = FetchLimits(connect_seconds=0.4, read_seconds=0.3, total_seconds=1.0, max_unsized_bytes=1 << 20)
LIMITS = ResolverLimits(fetch=SHORT)

StartOrigin = Callable[..., RudeOrigin]


def examine(source: Any, **options: Any) -> Diagnosis:
    """Diagnose with little patience; every problem found has a remedy."""
    told: list[Step] = []
    found = diagnose(source, limits=LIMITS, tell=told.append, **options)
    assert told == list(found.steps)
    assert all(bool(step.problem) == bool(step.remedy) for step in found.steps)
    assert all(step.seconds >= 0 for step in found.steps)
    return found


def failed(found: Diagnosis) -> Step:
    """Return the one step that failed."""
    (step,) = [step for step in found.steps if step.problem]
    assert not found.is_ok
    assert step.problem in found.summary
    return step


@pytest.fixture
def origin(rude_origin: StartOrigin) -> RudeOrigin:
    """Return an origin with the files and the card of a model."""
    started = rude_origin(FILES)
    started.files["/card"] = make_card(FILES, started.url).to_json().encode()
    return started


# ------------------------------------------------------------------ all is well


@pytest.mark.parametrize("given", ["url", "text", "card"])
def test_sound_model(origin: RudeOrigin, given: str) -> None:
    """Each step is told, in order; each file with size and checksum; each was asked for once."""
    card = make_card(FILES, origin.url)
    found = examine({"url": origin.url_of("card"), "text": card.to_json().encode(), "card": card}[given])

    of_the_card = ["connect", "answer", "content"] if given == "url" else ["content"]
    assert [step.name for step in found.steps if step.subject == "card"] == of_the_card
    assert (found.is_ok, found.problems) == (True, ())
    assert {file.name: (file.size, file.received, file.checksum) for file in found.files} == {
        name: (len(data), len(data), str(Checksum.of(data))) for name, data in FILES.items()
    }
    assert found.summary.startswith("all files (2) are what they should be: 51224 bytes in ")
    assert [origin.count(name) for name in FILES] == [1, 1]


def test_one_file_by_its_url(origin: RudeOrigin) -> None:
    """The URL that a worker publishes says itself what the file must hash to."""
    digest = Checksum.of(FILES["config.json"]).hex
    found = examine(f"{origin.url_of('config.json')}?blake3={digest}")
    wrong = examine(f"{origin.url_of('tokenizer.json')}?blake3={digest}")

    assert [(file.name, file.problem) for file in found.files] == [("config.json", "")]
    assert failed(wrong).problem == "wrong hash"


def test_name_and_its_addresses(origin: RudeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a name stands for is told."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    found = examine(origin.url_of("card").replace("127.0.0.1", "gpu7.test"))

    assert [step.detail for step in found.steps if step.name == "name"] == ["'gpu7.test' is 127.0.0.1"]


def test_nothing_is_written(origin: RudeOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache is made, nor looked into."""
    for variable in ("DYN_MDC_CACHE", "HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert examine(origin.url_of("card")).is_ok

    assert list(tmp_path.rglob("*")) == []


# ------------------------------------------------------------------ what can be wrong, on the way to a card

BEHAVIOURS = {
    "refuses": ("connect", "connection refused"),
    "stalled_before_status": ("answer", "time-out, headers"),
    "stalled_in_header": ("answer", "time-out, headers"),
    "stalled_in_body": ("content", "time-out, body"),
    "steady_drip": ("content", "time-out, total"),
    "short_body": ("content", "connection broke"),
    "reset_before_answer": ("answer", "hung up"),
    "redirect_loop": ("answer", "status 302"),
    "gzip_encoded": ("content", "encoded answer"),
    "endless_body_announced": ("content", "no card"),
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_card_that_does_not_come(rude_origin: StartOrigin, behaviour: str) -> None:
    """The step at which it ends is named, and the cause."""
    step = failed(examine(rude_origin({"card": b"{}" * 20_000}, behaviour).url_of("card")))

    assert (step.subject, step.name, step.problem) == ("card", *BEHAVIOURS[behaviour])


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        ("401 Unauthorized", "status 401"), ("403 Forbidden", "status 403"), ("404 Not Found", "status 404"),
        ("400 Bad Request", "status 4xx"), ("500 Oops", "status 5xx"), ("503 Busy", "status 5xx"),
        ("101 Switching", ""),
    ],
)  # fmt: skip
def test_status(leaves_nothing: None, status: str, problem: str) -> None:
    """Each status is told as it came, and has the remedy of its kind."""
    with wire.WireServer(wire.ok(b"", status=status)) as server:
        step = failed(examine(f"{server.url}/v1/metadata/m/_base"))

    assert (step.name, step.problem) == ("answer", f"status {status[:3]}")
    assert step.remedy == remedies.REMEDIES.get(problem, remedies.OTHERWISE)
    assert status.split()[0] in step.detail
    assert "cannot fetch" not in step.detail


@pytest.mark.parametrize(
    ("text", "problem"), [(b"", "no card"), (b"{}", "no card"), (b"<!DOCTYPE html><p>Log in", "HTML page")]
)
@pytest.mark.parametrize("given", ["url", "text"])
def test_no_card(rude_origin: StartOrigin, text: bytes, problem: str, given: str) -> None:
    """What is no card is told as such, and a page as a page."""
    step = failed(examine(rude_origin({"card": text}).url_of("card") if given == "url" else text))

    assert (step.subject, step.name, step.problem) == ("card", "content", problem)


def test_unknown_name(leaves_nothing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that nobody knows is the resolver's word; nothing else is tried."""

    def unknown(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    step = failed(examine("http://nonexistent.invalid/card"))

    assert (step.name, step.problem) == ("name", "host not found")
    assert "nonexistent.invalid" in step.detail


def test_silent_address(leaves_nothing: None) -> None:
    """An address that takes no connection, here a listener whose queue is full, is no silent server."""
    with full_queue() as url:
        step = failed(examine(f"{url}/card"))

    assert (step.name, step.problem) == ("connect", "time-out, connect")


def test_peer_policy(origin: RudeOrigin) -> None:
    """An address that the policy refuses is not connected to."""
    step = failed(examine(origin.url_of("card"), peer_policy=AllowList("10.0.0.0/8")))

    assert (step.name, step.problem) == ("connect", "peer policy")
    assert origin.connections == 0


# ------------------------------------------------------------------ TLS


@pytest.fixture
def authority() -> trustme.CA:
    """Return the certificate authority that the frontend trusts."""
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    """Return the file with its certificate."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


@pytest.fixture
def serve_card(authority: trustme.CA, leaves_nothing: None) -> Iterator[Callable[..., str]]:
    """Serve a card without files by https, with a certificate for this name; return its URL."""
    with contextlib.ExitStack() as stack:

        def start(name: str, *, wants_client: bool = False, **options: Any) -> str:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert(name, **options).configure_cert(context)
            if wants_client:
                context.verify_mode = ssl.CERT_REQUIRED
                authority.configure_trust(context)
            body = make_card({}, "http://w").to_json().encode()
            return stack.enter_context(wire.WireServer(wire.ok(body), tls=context)).url

        yield start


def in_days(days: int) -> datetime.datetime:
    """Return the time so many days from now."""
    return datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days, minutes=5)


def test_certificate_and_its_end(serve_card: Callable[..., str], ca_file: Path) -> None:
    """How long the certificate is valid is told; that it ends soon is a notice."""
    tls = ClientTls(ca_file)
    late, soon = (examine(serve_card("127.0.0.1", not_after=in_days(days)), tls=tls) for days in (400, 12))

    (step,) = [step for step in late.steps if step.name == "tls"]
    assert re.fullmatch(r"TLSv1\.[23], the certificate expires in 400 days", step.detail)
    assert late.notices == ()
    assert [re.sub("[0-9]{5}", "PORT", notice) for notice in soon.notices] == [
        "the certificate of https://127.0.0.1:PORT expires in 12 days"
    ]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("127.0.0.1", {"not_before": in_days(-9), "not_after": in_days(-2)}, "tls, expired"),
        ("127.0.0.1", {"not_before": in_days(2)}, "tls, not yet valid"),
        ("127.0.0.2", {}, "tls, wrong host"),
    ],
)
def test_certificate_that_is_wrong(
    serve_card: Callable[..., str], ca_file: Path, name: str, options: dict[str, Any], problem: str
) -> None:
    """What is wrong with it is the cause."""
    step = failed(examine(serve_card(name, **options), tls=ClientTls(ca_file)))

    assert (step.name, step.problem) == ("tls", problem)


def test_unknown_authority(serve_card: Callable[..., str]) -> None:
    """So is an authority that this host does not know."""
    assert failed(examine(serve_card("127.0.0.1"))).problem == "tls, unknown authority"


def test_client_certificate_is_wanted(serve_card: Callable[..., str], ca_file: Path) -> None:
    """A server that wants one says so, or breaks the connection off; the remedy is the same."""
    step = failed(examine(serve_card("127.0.0.1", wants_client=True), tls=ClientTls(ca_file)))

    assert step.problem in ("tls, client certificate wanted", "tls, broken off")
    assert "--cert" in step.remedy


def test_plain_http_on_the_other_side(leaves_nothing: None) -> None:
    """So does a server without TLS."""
    with wire.WireServer(lambda sock, _: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as server:
        silent = failed(examine(server.url.replace("http:", "https:")))

    assert (silent.name, silent.problem) == ("tls", "time-out, tls")
    assert "http://" in silent.remedy


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """What this side lacks is no finding but an error."""
    with pytest.raises(SettingsError, match="ca_file"):
        examine("https://127.0.0.1:1/card", tls=ClientTls(tmp_path / "none"))


# ------------------------------------------------------------------ what can be wrong with a file


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        ("flipped_bit", "wrong hash"),
        ("other_bytes_shorter", "wrong size"),
        ("long_body", "wrong size"),
        ("short_body", "connection broke"),
        ("stalled_in_body", "time-out, body"),
        ("html_page", "HTML page"),
    ],
)
def test_file_that_is_wrong(origin: RudeOrigin, behaviour: str, problem: str) -> None:
    """The file and its URL are named, and the others are examined all the same."""
    if behaviour == "html_page":
        origin.files["/tokenizer.json"] = b"<html>Log in</html>"
    else:
        origin.behaviours["/tokenizer.json"] = behaviour
    found = examine(origin.url_of("card"))
    step = failed(found)

    assert (step.subject, step.name, step.problem) == ("tokenizer.json", "content", problem)
    assert origin.url_of("tokenizer.json") in step.detail
    assert [(file.name, file.problem) for file in found.files] == [
        ("config.json", ""), ("tokenizer.json", problem),
    ]  # fmt: skip
    assert found.summary == f"1 of 2 files are not to be had: {problem}"


def test_card_without_sizes(origin: RudeOrigin) -> None:
    """It works, which is a notice, up to the bytes that are taken of such a file."""
    card = make_card(FILES, origin.url, sized=False)
    assert any("no size for 2 files" in notice for notice in examine(card).notices)

    origin.behaviours["/config.json"] = "endless_body_announced"
    assert failed(examine(card)).problem == "too large without a size"


@pytest.mark.parametrize(
    ("base", "problem"), [("/models/m", "local path"), ("s3://bucket/m", "scheme not allowed")]
)
def test_card_that_was_not_self_hosted(base: str, problem: str) -> None:
    """Paths of the worker's disk, and what no transport fetches, are told; nothing is opened."""
    found = examine(make_card(FILES, base))

    assert found.problems == (problem,)
    assert len(found.files) == 2


def test_paths_that_are_allowed(tmp_path: Path) -> None:
    """They are read below folders that the operator names."""
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)

    assert examine(make_card(FILES, str(tmp_path)), file_roots=[tmp_path]).is_ok


def test_card_that_asks_for_too_much() -> None:
    """A card that a frontend refuses is refused here, too; nobody is asked for its files."""
    found = diagnose(make_card(FILES, "http://w1"), limits=replace(LIMITS, max_files=1))

    assert [(step.subject, step.name, step.problem) for step in found.steps] == [
        ("card", "content", "card refused")
    ]
    assert found.files == ()


@pytest.mark.parametrize("url", ["https://", "http://[::1", "HTTP://h:99999/card", "http:"])
def test_url_that_is_none(url: str) -> None:
    """What was meant as a URL is not taken for a path on a disk."""
    assert failed(examine(url)).problem == "no card"


def test_silent_origin_is_waited_for_once(rude_origin: StartOrigin) -> None:
    """With a thousand files each time-out would count; the other files have its problem, too."""
    silent = rude_origin(dict.fromkeys(FILES, b""), "stalled_before_status")
    found = examine(make_card(FILES, silent.url))

    assert [file.problem for file in found.files] == ["time-out, headers"] * 2
    assert "is not asked again" in found.steps[-1].detail
    assert len(silent.requests) == 1


def test_many_origins_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of the files in the end grows with their number alone."""
    card = make_card({f"{number}.json": b"%d" % number for number in range(100)}, "http://127.0.0.1")
    card = card.map_files(
        lambda file: replace(file, path=file.path.replace(".1/", f".{file.basename[:-5]}/"))
    )
    asked: list[str] = []
    split = module.origin_of
    monkeypatch.setattr(module, "origin_of", lambda url: asked.append(url) or split(url))
    found = diagnose(card, peer_policy=lambda peer: False)

    assert len(found.files) == 100
    assert len(asked) < 1000


# ------------------------------------------------------------------ what is noticed though it works


def notices(found: Diagnosis, port: int) -> list[str]:
    """Return what was noticed, with a word for the port."""
    assert found.is_ok, found.summary
    return [notice.replace(str(port), "PORT") for notice in found.notices]


def test_loopback_is_noticed(origin: RudeOrigin) -> None:
    """What only this host can reach helps no other."""
    assert notices(examine(origin.url_of("card")), origin.port) == [
        "http://127.0.0.1:PORT is published: only this host reaches that (DYN_SYSTEM_ADVERTISE_URL)"
    ]


def test_other_origin_is_noticed(origin: RudeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose files are elsewhere says so."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    base = origin.url.replace("127.0.0.1", "worker.test")
    origin.files["/card"] = make_card(FILES, base).to_json().encode()

    assert notices(examine(origin.url_of("card")), origin.port) == [
        "http://worker.test:PORT is published for the files: that is not where the card is from"
    ]


def test_no_ranges_are_noticed(leaves_nothing: None) -> None:
    """An origin that cannot continue a transfer is told once."""
    with wire.WireServer(wire.ok(b"{}")) as server:
        found = examine(make_card({"a.json": b"{}", "b.json": b"{}"}, server.url.rpartition("/")[0]))

        assert notices(found, server.port)[1:] == [
            "http://127.0.0.1:PORT offers no ranges: what breaks off is fetched anew"
        ]


def test_slow_origin_is_noticed(origin: RudeOrigin) -> None:
    """So is one that brings less than a megabyte in a second."""
    files = {"large.bin": bytes(300_000)}
    origin.files["/large.bin"] = files["large.bin"]
    now = [0.0]

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    found = diagnose(make_card(files, origin.url), clock=clock)

    assert re.search(r"http://127.0.0.1:[0-9]+ is slow: 0\.[0-9]{2} MB/s", " ".join(found.notices))
    assert " at " in found.steps[-1].detail


# ------------------------------------------------------------------ remedies


def test_every_word_of_tls_has_a_remedy() -> None:
    """No cause is without advice, but the one that has no name."""
    words = {value for name, value in vars(http_tls).items() if name.isupper() and isinstance(value, str)}

    assert {f"tls, {word}" for word in words - {http_tls.OTHER}} <= set(remedies.REMEDIES)
    assert {remedies.HTML, remedies.NO_SIZE, remedies.WRONG_SIZE, remedies.DRIFTED} <= set(remedies.REMEDIES)


def test_secrets_are_not_shown(origin: RudeOrigin) -> None:
    """Neither a password nor a token of the URLs, nor one that is sent, is in what is found."""
    base = origin.url.replace("//", "//me:hush@")
    found = examine(make_card(FILES, f"{base}/gone"), tokens={origin.url: "hush-hush"})
    by_url = examine(f"{origin.url_of('card')}?token=hush", tokens={origin.url: "hush-hush"})

    assert not found.is_ok
    assert "hush" not in f"{found}{by_url}"
