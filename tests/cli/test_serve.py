"""`selfhost serve` and `selfhost card`: what they print, and that `serve` leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import trustme

from selfhost import CheckedFile, Checksum, ModelDeploymentCard, cli
from selfhost.cli.serve import serve_settings
from selfhost.settings import Settings
from selfhost.worker.self_check import fetch

Start = Callable[..., Any]
TIMEOUT = 10.0  # seconds


def records(store: Path) -> list[Path]:
    """Return every file of a store."""
    return [path for path in store.rglob("*") if path.is_file()]


def card_published(store: Path) -> ModelDeploymentCard:
    """Return the one card of a store."""
    (record,) = (store / "v1" / "mdc").iterdir()
    return ModelDeploymentCard.from_json(json.dumps(json.loads(record.read_text())["card_json"]))


# ------------------------------------------------------------------ card


def test_card_prints_json(run: Any, model_dir: Path) -> None:
    """The card goes to stdout as one JSON text, named after the directory."""
    result = run("card", model_dir)

    card = ModelDeploymentCard.from_json(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert (card.display_name, card.source_path) == ("my-model", str(model_dir))
    assert card.model_info is not None
    assert card.model_info.file == CheckedFile.from_disk(model_dir / "config.json")


def test_card_takes_name_template_and_lora(run: Any, model_dir: Path, tmp_path: Path) -> None:
    """Name and template are those given; with --lora the card is the adapter's."""
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    base = ModelDeploymentCard.from_json(
        run("card", model_dir, "--name", "模型", "--template", template).stdout
    )
    lora = ModelDeploymentCard.from_json(run("card", model_dir, "--lora", "ad").stdout)

    assert base.display_name == "模型"
    assert (str(template), True) in [(file.path, custom) for file, custom in base.iter_metadata_files()]
    assert (lora.display_name, lora.lora and lora.lora["name"]) == ("ad", "ad")


def test_card_is_what_serve_publishes(run: Any, start: Start, model_dir: Path, store: Path) -> None:
    """Both commands make the same card, but for where the files are."""
    card = ModelDeploymentCard.from_json(run("card", model_dir).stdout)
    start("serve", model_dir, "--port", 0).lines_until("Serving ")
    published = card_published(store)

    assert published.mdcsum == card.mdcsum
    assert {difference.field.rpartition(".")[2] for difference in card.diff(published)} == {"path"}


def test_card_survives_a_reader_that_leaves(start: Start, model_dir: Path, closed_pipe: int) -> None:
    """A closed pipe ends the command with 1, without a word."""
    assert start("card", model_dir, stdout=closed_pipe).end() == (1, "")


# ------------------------------------------------------------------ serve


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_until_signal(start: Start, model_dir: Path, store: Path, number: signal.Signals) -> None:
    """It serves what it prints, and a signal ends it with 0, the records withdrawn and the port closed."""
    serve = start("serve", model_dir, "--name", "a/b", "--port", 0)
    heading, *rows, see_it, fetch_it, last = serve.lines_until("Serving ")
    files = [row.split() for row in rows]
    for size, checksum, url in files:
        status, data = fetch(url, int(size) + 1, TIMEOUT)
        assert (status, len(data), str(Checksum.of(data))) == (200, int(size), checksum)

    assert heading.split() == ["BYTES", "CHECKSUM", "URL"]
    assert len({row.index("http://127.0.0.1:") for row in rows}) == 1
    assert files[0][2].endswith("/v1/metadata/a_b/_base/config.json")
    assert fetch_it == "Fetch it: selfhost fetch " + files[0][2].rpartition("/")[0]
    assert see_it == "See it all: " + files[0][2].rpartition("/a_b/")[0]
    assert f"DYN_FILE_KV={store} " in last
    assert len(records(store)) == 2

    assert serve.end(number) == (0, "")
    assert records(store) == []
    with pytest.raises(ConnectionRefusedError):
        fetch(files[0][2], 1, TIMEOUT)


def test_serve_prints_the_url_of_its_card(start: Start, model_dir: Path, store: Path) -> None:
    """What is to be fetched is the card that is published; each adapter has its own."""
    lines = start("serve", model_dir, "--lora", "ad", "--port", 0).lines_until("Serving ")
    urls = [line.split()[-1] for line in lines if line.startswith("Fetch it: selfhost fetch ")]
    cards = [ModelDeploymentCard.from_json(fetch(url, 1 << 20, TIMEOUT)[1]) for url in urls]

    assert [card.display_name for card in cards] == ["my-model", "ad"]
    published = [json.loads(path.read_text())["card_json"] for path in (store / "v1" / "mdc").iterdir()]
    assert {card.to_json() for card in cards} == {
        ModelDeploymentCard.from_json(json.dumps(card)).to_json() for card in published
    }


SIGNALS_AT_EVERY_STEP = """
import os, signal, sys
from selfhost import cli
from selfhost.cli import serve
from selfhost.worker.runtime import DistributedRuntime

def signals_first(function):
    def call(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **named)
    return call

for name in sys.argv[1].split():
    owner = serve if hasattr(serve, name) else DistributedRuntime
    setattr(owner, name, signals_first(getattr(owner, name)))
code = cli.main(sys.argv[2:])
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


@pytest.mark.parametrize("step", ["serve_settings", "_load_all", "start", "close"])
def test_serve_takes_signals_at_any_time(start: Start, model_dir: Path, store: Path, step: str) -> None:
    """Signals before it is ready are not lost, more of them while it closes change nothing."""
    serve = start(step, "serve", model_dir, "--port", 0, script=SIGNALS_AT_EVERY_STEP)
    if step == "close":
        serve.lines_until("Serving ")
        serve.process.send_signal(signal.SIGTERM)

    assert serve.end() == (0, "")
    assert records(store) == []


SLOW_LOADING = """
import sys, time
from selfhost import cli
from selfhost.cli import serve

def load(*_):
    print("loading", flush=True)
    time.sleep(60)

serve._load_all = load
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_loading(start: Start, model_dir: Path, store: Path, number: signal.Signals) -> None:
    """While a large model is being read, a signal ends the command at once, with nothing published."""
    serve = start("serve", model_dir, "--port", 0, script=SLOW_LOADING)
    serve.lines_until("loading")

    assert serve.end(number) == (0, "")
    assert not store.exists()


def test_failed_serve_leaves_signals_alone(tmp_path: Path) -> None:
    """In a host's process a `serve` that fails leaves handlers and mask as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    assert cli.main(["serve", str(tmp_path / "missing"), "--port", "0"]) == 1
    assert [signal.getsignal(number) for number in numbers] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(numbers)


def test_serve_publishes_adapters(start: Start, model_dir: Path, store: Path) -> None:
    """Each --lora is one more card with URLs of its own."""
    serve = start("serve", model_dir, "--lora", "one", "--lora", "two", "--port", 0)
    rows = [line for line in serve.lines_until("Serving ") if "  blake3:" in line]

    assert {row.split("/")[-2] for row in rows} == {"_base", "one", "two"}
    assert len(list((store / "v1" / "mdc").iterdir())) == 3


def test_serve_flags_win_over_environment(start: Start, model_dir: Path, store: Path, tmp_path: Path) -> None:
    """Address, store and endpoint are what the flags say, the rest is what the environment says."""
    flags = ["--advertise", "https://127.0.0.1:9/x", "--discovery", f"file:{tmp_path / 'other'}"]
    flags += ["--namespace", "n", "--component", "c", "--endpoint", "e"]
    variables = {"DYN_SYSTEM_PORT": "0", "DYN_SYSTEM_ADVERTISE_URL": "http://a.example"}
    serve = start("serve", model_dir, *flags, **variables)
    rows = [line for line in serve.lines_until("Serving ") if "  blake3:" in line]

    assert all("  https://127.0.0.1:9/x/v1/metadata/my-model/_base/" in row for row in rows)
    assert [path.name[:10] for path in records(tmp_path / "other")] == ["n%2Fc%2Fe%"] * 2
    assert records(store) == []


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, [], ("127.0.0.1", 9090)),
        ({"DYN_SYSTEM_PORT": "-1"}, [], ("127.0.0.1", 9090)),
        ({"DYN_SYSTEM_HOST": "0.0.0.0", "DYN_SYSTEM_PORT": "0"}, [], ("0.0.0.0", 0)),
        ({"DYN_SYSTEM_HOST": "::", "DYN_SYSTEM_PORT": "1"}, ["--host", "h", "--port", "2"], ("h", 2)),
    ],
)
def test_serve_address(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], flags: list[str], expected: tuple[str, int]
) -> None:
    """Unless told otherwise it listens on one fixed port of loopback, and it always self-hosts."""
    settings = settings_of(monkeypatch, variables, flags)

    assert (settings.system_host, settings.system_port) == expected
    assert settings.self_host_metadata


def settings_of(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], flags: list[str]) -> Settings:
    """Return what `serve` makes of an environment and flags."""
    for variable in [name for name in os.environ if name.startswith("DYN_")]:
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    return serve_settings(cli.make_parser().parse_args(["serve", "x", *flags]))


@pytest.mark.parametrize(
    ("variable", "flags", "is_on"),
    [
        (None, [], True),
        ("", [], True),
        ("0", [], False),
        ("1", ["--no-index"], False),
        ("0", ["--index"], True),
        (None, ["--no-index"], False),
    ],
)
def test_serve_lists_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, variable: Optional[str], flags: list[str], is_on: bool
) -> None:
    """Here the index is on where neither flag nor variable says no; elsewhere it is off."""
    variables = {} if variable is None else {"DYN_SYSTEM_METADATA_INDEX": variable}

    assert settings_of(monkeypatch, variables, flags).metadata_index is is_on
    assert not Settings.from_env({}).metadata_index


@pytest.mark.parametrize(
    ("field", "variable", "flag"),
    [
        ("isolation", "DYN_SYSTEM_ISOLATION", "--isolation"),
        ("tls_cert", "DYN_SYSTEM_TLS_CERT", "--tls-cert"),
        ("tls_key", "DYN_SYSTEM_TLS_KEY", "--tls-key"),
        ("tls_client_ca", "DYN_SYSTEM_TLS_CLIENT_CA", "--tls-client-ca"),
        ("token_file", "DYN_SYSTEM_TOKEN_FILE", "--token-file"),
    ],
)
def test_serve_takes_each_from_flag_else_variable(
    monkeypatch: pytest.MonkeyPatch, field: str, variable: str, flag: str
) -> None:
    """A flag wins over its variable, the variable over nothing at all."""
    found = [
        getattr(settings_of(monkeypatch, variables, flags), field)
        for variables, flags in (
            ({}, []),
            ({variable: "process"}, []),
            ({variable: "process"}, [flag, "thread"]),
        )
    ]

    assert found == [getattr(Settings(), field), "process", "thread"]


def test_token_file_flag_wins_over_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's token is not a second one beside the file of the flag."""
    variables = {"DYN_SYSTEM_TOKEN": "0123456789abcdef", "DYN_SYSTEM_TOKEN_FILE": "a"}
    settings = settings_of(monkeypatch, variables, ["--token-file", "b"])

    assert (settings.token, settings.token_file) == (None, "b")


def test_no_flag_takes_a_token(run: Any, model_dir: Path) -> None:
    """What is in a command line, everybody on the machine can read."""
    assert run("serve", model_dir, "--token", "0123456789abcdef").returncode == 2


def test_serve_with_index(start: Start, model_dir: Path) -> None:
    """The address that it prints lists the model; without an index none is printed and none is there."""
    lines = start("serve", model_dir, "--port", 0).lines_until("Serving ")
    (address,) = [line.split()[-1] for line in lines if line.startswith("See it all: ")]
    (model,) = json.loads(fetch(address, 1 << 20, TIMEOUT)[1])["models"]
    assert model["name"] == "my-model"
    lines = start("serve", model_dir, "--port", 0, "--no-index").lines_until("Serving ")

    assert not [line for line in lines if line.startswith("See it all")]
    assert fetch(lines[1].split()[-1].partition("/my-model")[0], 100, TIMEOUT)[0] == 404


def test_serve_with_token(start: Start, model_dir: Path, tmp_path: Path) -> None:
    """Nobody is served without the token, and it says what clients need; it never says the token."""
    (tmp_path / "token").write_text("rosebud-0123456789\n")
    serve = start("serve", model_dir, "--port", 0, "--token-file", tmp_path / "token")
    lines = serve.lines_until("Serving ")
    url = lines[1].split()[-1]

    assert fetch(url, 100, TIMEOUT)[0] == 401
    assert fetch(url, 1 << 20, TIMEOUT, token="rosebud-0123456789")[0] == 200
    assert "Whoever fetches needs the bearer token (--token-file or DYN_MDC_TOKENS_FILE)" in lines
    assert lines[-1].endswith(
        "Dynamo's own frontend cannot fetch it: it sends neither a token nor a client certificate"
    )
    code, errors = serve.end(signal.SIGTERM)
    assert (code, errors) == (0, "")
    assert "rosebud" not in "".join(lines)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return the file with a certificate and its key."""
    cert = trustme.CA().issue_cert("127.0.0.1")
    cert.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "me.pem"))
    return tmp_path / "me.pem"


def test_serve_with_tls(start: Start, model_dir: Path, store: Path, certificate: Path) -> None:
    """It says whom clients need to trust, and how Dynamo's frontend is told; certificates it cannot show."""
    serve = ("serve", model_dir, "--port", 0, "--tls-cert", certificate)
    *_, needed, last = start(*serve).lines_until("Serving ")
    *_, both_needed, barred = start(*serve, "--tls-client-ca", certificate).lines_until("Serving ")

    assert needed.startswith("Whoever fetches needs to trust the certificate's CA")
    assert f"lists it: SSL_CERT_FILE=CA.pem DYN_FILE_KV={store} python -m dynamo.frontend" in last
    assert "and a client certificate" in both_needed
    assert "Dynamo's own frontend cannot fetch it" in barred


def test_serve_with_tls_that_is_not_published(start: Start, model_dir: Path, certificate: Path) -> None:
    """A base URL without TLS for a server that speaks it is warned of, and needs nobody's trust."""
    flags = ("--tls-cert", certificate, "--advertise", "http://127.0.0.1:9")
    serve = start("serve", model_dir, "--port", 0, *flags)
    lines = serve.lines_until("Serving ")
    code, errors = serve.end(signal.SIGTERM)

    assert code == 0
    (warning,) = [line for line in errors.splitlines() if "speaks TLS, and cards will say" in line]
    assert "say http://127.0.0.1:9: " in warning
    assert "DYN_SYSTEM_ADVERTISE_URL, --advertise" in warning
    assert not [line for line in lines if line.startswith("Whoever fetches") or "SSL_CERT_FILE" in line]


def test_serve_refuses_half_a_configuration(run: Any, model_dir: Path, store: Path, tmp_path: Path) -> None:
    """A key without a certificate and a token file that is empty each end it with one line."""
    (tmp_path / "empty").touch()
    for flags, said in (
        (["--tls-key", "k.pem"], "DYN_SYSTEM_TLS"),
        (["--token-file", tmp_path / "empty"], "empty"),
    ):
        result = run("serve", model_dir, "--port", 0, *flags)

        assert result.returncode == 1
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert records(store) == []


def test_serve_with_port_taken(run: Any, model_dir: Path, store: Path) -> None:
    """A port that is taken is an error of one line, and nothing is published."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", model_dir, "--port", port)

    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "--port or DYN_SYSTEM_PORT" in result.stderr
    assert records(store) == []


def test_serve_survives_a_reader_that_leaves(
    start: Start, model_dir: Path, store: Path, closed_pipe: int
) -> None:
    """Nobody to print to: it withdraws, closes and ends with 1."""
    assert start("serve", model_dir, "--port", 0, stdout=closed_pipe).end() == (1, "")
    assert records(store) == []
