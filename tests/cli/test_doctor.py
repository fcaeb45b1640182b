"""`selfhost doctor`: what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import wire
from helpers import RudeOrigin, make_card

FILES = {"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": b'{"version": "1.0"}'}
TOKEN = "s3cret-token"


@pytest.fixture
def origin() -> Iterator[RudeOrigin]:
    """Return an origin with the files and the card of a model."""
    with RudeOrigin(FILES) as started:
        started.files["/card"] = make_card(FILES, started.url).to_json().encode()
        yield started


def test_sound_model(run: Any, origin: RudeOrigin, tmp_path: Path) -> None:
    """A line for each step, each file and each notice, and a last one; nothing on stderr, nothing left."""
    result = run("doctor", origin.url_of("card"))

    assert (result.returncode, result.stderr) == (0, "")
    *steps, notice, last = result.stdout.splitlines()
    assert [line.split()[:3] for line in steps] == [
        ["ok", "card:", "connect"], ["ok", "card:", "answer"], ["ok", "card:", "content"],
        ["ok", "config.json:", "content"], ["ok", "tokenizer.json:", "content"],
    ]  # fmt: skip
    assert all(" ms  " in line for line in steps)
    assert notice.startswith(f"notice  {origin.url} is published")
    assert last.startswith("ok      all files (2) are what they should be: 42 bytes in ")
    assert list(tmp_path.iterdir()) == []


def test_what_failed_has_a_remedy_below(run: Any, origin: RudeOrigin) -> None:
    """The step is marked, what to do stands below it, and the last line says how it ended."""
    origin.behaviours["/tokenizer.json"] = "flipped_bit"
    result = run("doctor", origin.url_of("card"))

    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("FAILED"))
    assert lines[at].split()[1:3] == ["tokenizer.json:", "content"]
    assert lines[at + 1].startswith("        wrong hash: the worker serves other bytes")
    assert lines[-1] == "FAILED  1 of 2 files are not to be had: wrong hash"


@pytest.mark.parametrize("given", ["file", "stdin"])
def test_card_from_elsewhere(run: Any, origin: RudeOrigin, tmp_path: Path, given: str) -> None:
    """A card may be in a file or come from stdin, also within a record of a discovery."""
    card = origin.files["/card"].decode()
    (tmp_path / "card.json").write_text(card)
    record = f'{{"type": "Model", "card_json": {card}}}'
    result = run("doctor", tmp_path / "card.json") if given == "file" else run("doctor", "-", stdin=record)

    assert result.returncode == 0, result.stdout


def test_json(run: Any, origin: RudeOrigin) -> None:
    """For machines there is one object, with the same exit code."""
    origin.behaviours["/config.json"] = "short_body"
    result = run("doctor", origin.url_of("card"), "--json")

    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert (result.returncode, result.stderr, found["ok"]) == (1, "", False)
    assert sorted(found) == ["files", "notices", "ok", "steps", "summary"]
    assert [(file["name"], file["size"], file["problem"]) for file in found["files"]] == [
        ("config.json", 24, "connection broke"), ("tokenizer.json", 18, ""),
    ]  # fmt: skip
    assert [step["remedy"] != "" for step in found["steps"] if step["problem"]] == [True]


def test_paths_are_read_where_allowed(run: Any, model_dir: Path) -> None:
    """--file-root is the same as for fetch."""
    card = run("card", model_dir).stdout

    assert "local path: " in run("doctor", "-", stdin=card).stdout
    assert run("doctor", "-", "--file-root", model_dir, stdin=card).returncode == 0


def test_hostile_card_moves_no_cursor(run: Any, origin: RudeOrigin) -> None:
    """What a card or an origin says reaches no terminal as it came."""
    evil = "\x1b[2J\x07\n ok all is well"
    card = make_card(FILES, origin.url, name=evil).to_json()
    result = run("doctor", "-", stdin=card)

    assert set(result.stdout) & set("\x1b\x07") == set()
    assert not any(line.startswith(" ok") for line in result.stdout.splitlines())


# ------------------------------------------------------------------ tokens and certificates


@pytest.fixture
def strict(origin: RudeOrigin) -> Iterator[wire.WireServer]:
    """Return a server that answers with the card if the token is right, else with 401."""

    def answer(sock: Any, _: object) -> None:
        is_right = server.requests[-1].find(f"Authorization: Bearer {TOKEN}\r\n".encode()) > 0
        right, wrong = wire.ok(origin.files["/card"]), wire.ok(b"", status="401 Unauthorized")
        sock.sendall(right if is_right else wrong)

    with wire.WireServer(answer) as server:
        yield server


def test_token_of_a_file(run: Any, strict: wire.WireServer, origin: RudeOrigin, tmp_path: Path) -> None:
    """It goes to the origin on the command line, not to that of the files, and is never shown."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "wrong").write_text(f"not-{TOKEN}\n")
    right, wrong, none = (
        run(command, strict.url, *options, "-v")
        for command, options in (
            ("doctor", ("--token-file", tmp_path / "token")),
            ("doctor", ("--token-file", tmp_path / "wrong")),
            ("doctor", ()),
        )
    )
    fetched = run("fetch", strict.url, "--token-file", tmp_path / "token")

    assert (right.returncode, wrong.returncode, none.returncode, fetched.returncode) == (0, 1, 1, 0)
    assert "does not accept the bearer token" in wrong.stdout
    assert "no bearer token is configured" in none.stdout
    assert not any("authorization" in request.fields for request in origin.requests)
    assert TOKEN not in "".join(done.stdout + done.stderr for done in (right, wrong, none, fetched))


def test_tokens_of_the_environment(run: Any, strict: wire.WireServer, tmp_path: Path) -> None:
    """DYN_MDC_TOKENS_FILE says which origin gets which; the one of --token-file comes first."""
    strict_origin = strict.url.rpartition("/")[0]
    (tmp_path / "tokens").write_text(f"# workers\n{strict_origin} {TOKEN}\n")
    (tmp_path / "wrong").write_text("other")
    variables = {"DYN_MDC_TOKENS_FILE": str(tmp_path / "tokens")}

    assert run("doctor", strict.url, **variables).returncode == 0
    assert run("doctor", strict.url, "--token-file", tmp_path / "wrong", **variables).returncode == 1


def test_certificates(run: Any, tmp_path: Path) -> None:
    """--ca, --cert and --key are those of the environment, too; each option wins over its variable."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    cert = authority.issue_cert("frontend.test")
    cert.private_key_pem.write_to_path(str(tmp_path / "key"))
    cert.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    with wire.WireServer(
        wire.ok(make_card({}, "http://w").to_json().encode()), tls=mutual(authority)
    ) as server:
        options = ("--ca", tmp_path / "ca", "--cert", tmp_path / "cert", "--key", tmp_path / "key")
        variables = {f"DYN_MDC_TLS_{name.upper()}": str(tmp_path / name) for name in ("ca", "cert", "key")}
        by_option = run("doctor", server.url, *options)
        by_variable = run("doctor", server.url, **variables)
        mixed = run("doctor", server.url, *options[:2], **{**variables, "DYN_MDC_TLS_CA": "/none"})
        without = run("doctor", server.url, *options[:2])
        half = run("doctor", server.url, *options[4:], **variables)

    codes = [done.returncode for done in (by_option, by_variable, mixed, without, half)]
    assert codes == [0, 0, 0, 1, 1], by_option.stdout + by_variable.stdout + mixed.stdout + mixed.stderr
    assert "--cert" in without.stdout
    assert "without a certificate" in half.stderr


def mutual(authority: trustme.CA) -> Any:
    """Return a server's context that wants certificates of this authority."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    return context
