"""The command line as a whole: exit codes, errors, help, what is loaded, the demo."""

from __future__ import annotations

import io
import logging
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest

import selfhost
from selfhost import cli
from selfhost.frontend.transport_http import HttpTransport

# ------------------------------------------------------------------ demo


def test_demo_verifies_every_file_and_leaves_nothing(run: Any, tmp_path: Path) -> None:
    """The first command of the README reports each file and removes its model."""
    result = run("demo")

    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[-1] for line in result.stdout.splitlines() if line.startswith("  ok ")] == [
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    ]  # fmt: skip
    assert "Resolved once more: " in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_demo_keeps_its_model_on_request(run: Any, tmp_path: Path) -> None:
    """With --keep the directory stays and the last line names it."""
    result = run("demo", "--keep")

    (kept,) = tmp_path.glob("selfhost-demo-*")
    assert (kept / "config.json").is_file()
    assert f"selfhost serve {kept}" in result.stdout.splitlines()[-1]


def test_demo_fails_when_bytes_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One wrong byte on the way: exit code 1, and a line that names URL, expectation and finding."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fetch = HttpTransport.fetch

    class Flipping:
        def __init__(self, sink: Any) -> None:
            self.sink = sink

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sink, name)

        def write(self, data: Any) -> None:
            self.sink.write(b"X" + bytes(data)[1:])

    monkeypatch.setattr(
        HttpTransport, "fetch", lambda self, url, sink, **named: fetch(self, url, Flipping(sink), **named)
    )

    assert cli.main(["demo"]) == 1
    error, *lines = capsys.readouterr().err.splitlines()
    assert error.startswith("selfhost: error: cannot get ")
    assert re.search(
        r"http://127\.0\.0\.1:.*blake3:[0-9a-f]{64}.*blake3:[0-9a-f]{64}", "\n".join(lines), re.DOTALL
    )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ exit codes and help


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["card", "missing"], {}, "model directory 'missing'"),
        (["serve", "missing", "--port", "0"], {}, "model directory 'missing'"),
        (["serve", "."], {"DYN_SYSTEM_PORT": "http"}, "DYN_SYSTEM_PORT='http'"),
        (["fetch", "missing"], {}, "'missing': No such file or directory"),
        (["verify", "missing", "."], {}, "'missing': No such file or directory"),
        (["doctor", "missing"], {}, "'missing': No such file or directory"),
        (["doctor", "/dev/null"], {"DYN_MDC_TLS_KEY": "k.pem"}, "'k.pem' without a certificate"),
        (["doctor", "/dev/null", "--token-file", "t"], {}, "--token-file is for the origin of a URL"),
        (["doctor", "http://127.0.0.1:1/", "--token-file", "t"], {}, "'t' for tokens"),
        (["fetch", "/dev/null", "--key", "k.pem"], {}, "'k.pem' without a certificate"),
        (["fetch", "/dev/null", "--ca", "no.pem"], {}, "'no.pem'"),
        (["cache", "ls"], {"DYN_MDC_CACHE": "", "HOME": ""}, "set --cache DIR, DYN_MDC_CACHE or HOME"),
        (["cache", "ls", "--cache", "missing"], {}, "'missing': No such file or directory"),
        (["cache", "stats"], {"DYN_MDC_CACHE": "/dev/null"}, "'/dev/null'"),
        (["cache", "import", "missing", "."], {}, "'missing': No such file or directory"),
    ],
)
def test_error_is_one_line(run: Any, arguments: list[str], variables: dict[str, str], said: str) -> None:
    """What goes wrong is told in one line on stderr, with exit code 1 and without a traceback."""
    result = run(*arguments, **variables)

    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    assert line.startswith("selfhost: error: ")
    assert said in line


@pytest.mark.parametrize(
    ("number", "arguments", "said"),
    [
        (0, ["fetch", "-"], "stdin is closed"),
        (0, ["verify", "-", "."], "stdin is closed"),
        (1, ["card", "{model}"], "stdout is closed"),
        (1, ["fetch", "{card}", "--file-root", "{model}"], "stdout is closed"),
        (1, ["cache", "import", "{card}", "{model}"], "stdout is closed"),
    ],
)
def test_closed_stream_is_an_error_of_one_line(
    run: Any, run_without: Any, model_dir: Path, tmp_path: Path, number: int, arguments: list[str], said: str
) -> None:
    """A process may be started without stdin or stdout; what needs one says so."""
    (tmp_path / "card.json").write_text(run("card", model_dir).stdout)
    places = {"model": model_dir, "card": tmp_path / "card.json"}
    result = run_without(number, *(argument.format(**places) for argument in arguments))

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"selfhost: error: {said}"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["cache", "ls"], ["cache", "stats"], ["cache", "gc"], ["demo"]])
def test_tables_need_no_stdout(run_without: Any, arguments: list[str]) -> None:
    """What is only told, is told to nobody where stdout is closed, and done."""
    result = run_without(1, *arguments)

    assert (result.returncode, result.stderr) == (0, "")


def test_errors_never_go_to_stdout(run_without: Any) -> None:
    """Where stderr is closed nothing takes its place: `dir=$(selfhost fetch ...)` would be the error."""
    result = run_without(2, "fetch", "missing")

    assert (result.returncode, result.stdout) == (1, "")


def test_stdout_of_text_only(monkeypatch: pytest.MonkeyPatch, model_dir: Path, capsys: Any) -> None:
    """A caller's stdout that takes no bytes is told as such."""
    monkeypatch.setattr("sys.stdout", io.StringIO())

    assert cli.main(["card", str(model_dir)]) == 1
    assert "stdout is no stream of bytes" in capsys.readouterr().err


def test_log_messages_are_printable() -> None:
    """What is logged of a name reaches no terminal as it is; a traceback would keep its lines."""
    record = logging.makeLogRecord({"levelname": "WARNING", "msg": "odd: %s", "args": ("a\x1b[2J\nb",)})
    record.exc_info = (ValueError, ValueError("x"), None)

    assert cli._Formatter("%(message)s").format(record) == "odd: a\\x1b[2J\\nb\nValueError: x"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["card"],
        ["card", "d", "--name", ""],
        ["card", "d", "--name", "\udcff"],
        ["serve", "d", "--port", "65536"],
        ["serve", "d", "--port", "-1"],
        ["serve", "d", "--port", "²"],
        ["serve", "d", "--advertise", "ftp://h"],
        ["serve", "d", "--advertise", "http://0.0.0.0:1"],
        ["serve", "d", "--discovery", "etcd"],
        ["serve", "d", "--discovery", "file:"],
        ["serve", "d", "--namespace", "a.b"],
        ["serve", "d", "--namespace", "a/b"],
        ["serve", "d", "--endpoint", "/"],
        ["fetch"],
        ["fetch", ""],
        ["fetch", "c", "--replica", ""],
        ["fetch", "c", "--to", ""],
        ["fetch", "c", "--lower", ""],
        ["fetch", "c", "--verify", "never"],
        ["fetch", "c", "--allow", "http://h/"],
        ["fetch", "c", "--allow", "10.0.0.0/33"],
        ["verify", "c"],
        ["doctor"],
        ["doctor", "c", "--allow", "http://h/"],
        ["doctor", "c", "--token-file", ""],
        ["cache"],
        ["cache", "rm"],
        ["cache", "gc", "--max-bytes", "much"],
        ["cache", "gc", "--max-age", "30"],
        ["cache", "ls", "--cache", ""],
        ["cache", "import", "c"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage ends with 2 before anything is done."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)

    assert caught.value.code == 2
    assert "usage: selfhost" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "fetch", "verify", "doctor", "cache import"])
@pytest.mark.parametrize("given", ["--token s3cret", "--token=s3cret"])
def test_token_on_the_command_line(command: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused with the way to give one, and not shown once more."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "x", *["y"] * (command in ("verify", "cache import")), *given.split()])
    error = capsys.readouterr().err

    assert caught.value.code == 2
    assert error.startswith(f"usage: selfhost {command} ")
    assert "give --token-file" in error
    assert "s3cret" not in error


@pytest.mark.parametrize("command", ["doctor", "fetch"])
@pytest.mark.parametrize(
    "card",
    ["127.0.0.1:9090/v1/metadata/m/_base", "gpu7:9090", "gpu7/v1/metadata/m/_base", "hf://o/n", "ftp://h/x"],
)
def test_card_that_was_meant_as_a_url(
    command: str, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What looks like a URL, and names no file, is told how a URL begins."""
    monkeypatch.setenv("DYN_MDC_CACHE", str(tmp_path / "cache"))

    assert cli.main([command, card]) == 1
    assert capsys.readouterr().err == (
        f"selfhost: error: {card!r} is no file: expected a file, or a URL that begins with http:// or https://\n"
    )


COMMANDS = ["demo", "serve", "card", "fetch", "verify", "doctor"]
COMMANDS += [f"cache {name}" for name in ("ls", "stats", "gc", "verify", "import")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every example of a command's help is one that its parser takes."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    text = capsys.readouterr().out.partition("examples:")[2]
    examples = [line for line in text.splitlines() if line.startswith("  selfhost ")]

    assert caught.value.code == 0
    assert examples
    for example in examples:
        command_line = re.split(r" {2,}| \| | && ", example.strip())[0]
        assert command_line.startswith(f"selfhost {name}")
        assert cli.make_parser().parse_args(shlex.split(command_line)[1:]).run


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version says the version of the package."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"selfhost {selfhost.__version__}\n"
