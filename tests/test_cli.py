"""The command line: what it prints, its exit codes, and that `serve` leaves nothing behind."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import selfhost
from selfhost import CheckedFile, Checksum, ModelDeploymentCard, SystemStatusServer, cli, demo
from selfhost.demo_model import write_demo_model
from selfhost.errors import SelfHostError, VerificationError

SECONDS = 30.0  # for a process to start or to end on a busy machine

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Make a model directory called my-model."""
    write_demo_model(str(tmp_path / "my-model"))
    return tmp_path / "my-model"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return the root of the file store that the commands use."""
    return tmp_path / "kv"


def command(*arguments: object) -> list[str]:
    """Return the command line of a selfhost process that reports every warning."""
    return [sys.executable, "-X", "dev", "-m", "selfhost", *map(str, arguments)]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Return a small environment: nothing set but what Python needs and what the test says."""
    package = Path(selfhost.__file__).parents[1]
    clean = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(package), "TMPDIR": str(tmp_path)}
    return {**clean, "DYN_FILE_KV": str(tmp_path / "kv"), **more}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one command to its end."""

    def run_to_end(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            env=environment(tmp_path, **more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    return run_to_end


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start one command; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_process(line: list[str], stdout: Any = subprocess.PIPE, **more: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE}
        process = subprocess.Popen(line, env=environment(tmp_path, **more), text=True, **pipes)
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


def lines_until_ready(process: subprocess.Popen[str]) -> list[str]:
    """Return what `serve` prints, up to the line that says that it serves."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("Serving "):
            return lines
    pytest.fail(f"it ended with {process.wait()}: {lines} {process.stderr and process.stderr.read()}")


def end(process: subprocess.Popen[str], number: Optional[signal.Signals] = None) -> tuple[int, str]:
    """Send a signal, if any; return the exit code and what is on stderr."""
    if number is not None:
        process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    return process.returncode, errors


def records(store: Path) -> list[Path]:
    """Return every file of a store."""
    return [path for path in store.rglob("*") if path.is_file()]


def card_published(store: Path) -> ModelDeploymentCard:
    """Return the one card of a store."""
    (record,) = (store / "v1" / "mdc").iterdir()
    return ModelDeploymentCard.from_json(json.dumps(json.loads(record.read_text())["card_json"]))


# ------------------------------------------------------------------ demo


def test_demo_verifies_every_file_and_leaves_nothing(run: Any, tmp_path: Path) -> None:
    """The first command of the README reports each file and removes its model."""
    result = run("demo")

    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[-1] for line in result.stdout.splitlines() if line.startswith("  ok ")] == [
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    ]  # fmt: skip
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
    """One wrong byte on the way: exit code 1, one line that names URL, expectation and finding."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fetch = demo.fetch
    monkeypatch.setattr(demo, "fetch", lambda *limits: (200, b"X" + fetch(*limits)[1][1:]))

    assert cli.main(["demo"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("selfhost: error: http://127.0.0.1:")
    assert "expected status 200 and 305 bytes" in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def served(model_dir: Path) -> Iterator[CheckedFile]:
    """Serve one file and return it as a card would have it."""
    registry = selfhost.MetadataArtifactRegistry()
    local = CheckedFile.from_disk(model_dir / "config.json")
    registration = registry.register("m", "_base", "config.json", local.path)
    with SystemStatusServer(registry) as server, registration:
        yield local.move_to_url(f"http://{server.address}{registration.targets['config.json']}")


def test_fetch_returns_promised_bytes(served: CheckedFile, model_dir: Path) -> None:
    """What is fetched is the file."""
    assert demo.fetch_verified(served) == (model_dir / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"checksum": Checksum.of(b"other")}, "status 200 and 305 bytes"),
        ({"size": 304}, "status 200 and 305 bytes"),
        ({"size": 306}, "status 200 and 305 bytes"),
        ({"path": "/missing"}, "status 404"),
    ],
)
def test_fetch_refuses_other_bytes(served: CheckedFile, change: dict[str, Any], found: str) -> None:
    """Another checksum, a size off by one either way and another status are told as what was found."""
    values = {"path": served.path, "checksum": served.checksum, "size": served.size, **change}
    values["path"] = served.path + change.get("path", "")

    with pytest.raises(VerificationError, match=f"found {found}"):
        demo.fetch_verified(CheckedFile(**values))


def test_fetch_refuses_another_status() -> None:
    """The right bytes under a status that is no 200 are no answer."""

    class Odd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.0 500 Odd\r\nContent-Length: 5\r\n\r\nhello")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(VerificationError, match="found status 500"):
            demo.fetch_verified(
                CheckedFile(f"http://127.0.0.1:{server.server_port}/x", Checksum.of(b"hello"), 5)
            )
        thread.join()


def test_fetch_from_nobody(served: CheckedFile) -> None:
    """Where nobody answers, the error names the URL and the cause."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        file = served.move_to_url(f"http://127.0.0.1:{unused.getsockname()[1]}/x")
        with pytest.raises(SelfHostError, match=r"cannot fetch http://127.*ConnectionRefused"):
            demo.fetch_verified(file)


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
    lines_until_ready(start(command("serve", model_dir, "--port", 0)))
    published = card_published(store)

    assert published.mdcsum == card.mdcsum
    assert {difference.field.rpartition(".")[2] for difference in card.diff(published)} == {"path"}


def test_card_survives_a_reader_that_leaves(start: Start, model_dir: Path) -> None:
    """A closed pipe ends the command with 1, without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(command("card", model_dir), stdout=writing)
    os.close(writing)

    assert end(process) == (1, "")


# ------------------------------------------------------------------ serve


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_until_signal(start: Start, model_dir: Path, store: Path, number: signal.Signals) -> None:
    """It serves what it prints, and a signal ends it with 0, the records withdrawn and the port closed."""
    process = start(
        [sys.executable, "-c", DEFAULT_SIGNALS, *command("serve", model_dir, "--name", "a/b", "--port", 0)]
    )
    heading, *rows, last = lines_until_ready(process)
    files = [row.split() for row in rows]
    for size, checksum, url in files:
        demo.fetch_verified(CheckedFile(url, Checksum.parse(checksum), int(size)))

    assert heading.split() == ["BYTES", "CHECKSUM", "URL"]
    assert len({row.index("http://127.0.0.1:") for row in rows}) == 1
    assert files[0][2].endswith("/v1/metadata/a_b/_base/config.json")
    assert f"DYN_FILE_KV={store} " in last
    assert len(records(store)) == 2

    assert end(process, number) == (0, "")
    assert records(store) == []
    with pytest.raises(SelfHostError, match="ConnectionRefused"):
        demo.fetch_verified(CheckedFile(files[0][2], Checksum.parse(files[0][1]), 1))


# Whatever ran the tests may have had signals ignored, which a process hands on.
DEFAULT_SIGNALS = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""

SIGNALS_AT_EVERY_STEP = """
import os, signal, sys
from selfhost import cli

def signals_first(function):
    def call(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **named)
    return call

for name in sys.argv[1].split():
    owner = cli if hasattr(cli, name) else cli.DistributedRuntime
    setattr(owner, name, signals_first(getattr(owner, name)))
code = cli.main(sys.argv[2:])
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


@pytest.mark.parametrize("step", ["serve_settings", "_load_all", "start", "close"])
def test_serve_takes_signals_at_any_time(start: Start, model_dir: Path, store: Path, step: str) -> None:
    """Signals before it is ready are not lost, more of them while it closes change nothing."""
    line = [sys.executable, "-X", "dev", "-c", SIGNALS_AT_EVERY_STEP, step]
    process = start([*line, "serve", str(model_dir), "--port", "0"])
    if step == "close":
        lines_until_ready(process)
        process.send_signal(signal.SIGTERM)

    assert end(process) == (0, "")
    assert records(store) == []


SLOW_LOADING = """
import sys, time
from selfhost import cli

def load(*_):
    print("loading", flush=True)
    time.sleep(60)

cli._load_all = load
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_loading(start: Start, model_dir: Path, store: Path, number: signal.Signals) -> None:
    """While a large model is being read, a signal ends the command at once, with nothing published."""
    line = [sys.executable, "-X", "dev", "-c", SLOW_LOADING, "serve", str(model_dir), "--port", "0"]
    process = start([sys.executable, "-c", DEFAULT_SIGNALS, *line])
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"

    assert end(process, number) == (0, "")
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
    process = start(command("serve", model_dir, "--lora", "one", "--lora", "two", "--port", 0))
    rows = lines_until_ready(process)[1:-1]

    assert {row.split("/")[-2] for row in rows} == {"_base", "one", "two"}
    assert len(list((store / "v1" / "mdc").iterdir())) == 3


def test_serve_flags_win_over_environment(start: Start, model_dir: Path, store: Path, tmp_path: Path) -> None:
    """Address, store and endpoint are what the flags say, the rest is what the environment says."""
    flags = ["--advertise", "https://127.0.0.1:9/x", "--discovery", f"file:{tmp_path / 'other'}"]
    flags += ["--namespace", "n", "--component", "c", "--endpoint", "e"]
    variables = {"DYN_SYSTEM_PORT": "0", "DYN_SYSTEM_ADVERTISE_URL": "http://a.example"}
    process = start(command("serve", model_dir, *flags), **variables)
    rows = lines_until_ready(process)[1:-1]

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
    for variable in [name for name in os.environ if name.startswith("DYN_")]:
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    settings = cli.serve_settings(cli.make_parser().parse_args(["serve", "x", *flags]))

    assert (settings.system_host, settings.system_port) == expected
    assert settings.self_host_metadata


def test_serve_with_port_taken(run: Any, model_dir: Path, store: Path) -> None:
    """A port that is taken is an error of one line, and nothing is published."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", model_dir, "--port", port)

    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert records(store) == []


def test_serve_survives_a_reader_that_leaves(start: Start, model_dir: Path, store: Path) -> None:
    """Nobody to print to: it withdraws, closes and ends with 1."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(command("serve", model_dir, "--port", 0), stdout=writing)
    os.close(writing)

    assert end(process) == (1, "")
    assert records(store) == []


# ------------------------------------------------------------------ exit codes and help


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["card", "missing"], {}, "model directory 'missing'"),
        (["serve", "missing", "--port", "0"], {}, "model directory 'missing'"),
        (["serve", "."], {"DYN_SYSTEM_PORT": "http"}, "DYN_SYSTEM_PORT='http'"),
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
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage ends with 2 before anything is done."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)

    assert caught.value.code == 2
    assert "usage: selfhost" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "serve", "card"])
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every example of a command's help is one that its parser takes."""
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    text = capsys.readouterr().out.partition("examples:")[2]
    examples = [line for line in text.splitlines() if line.startswith("  selfhost ")]

    assert caught.value.code == 0
    assert examples
    for example in examples:
        command_line = re.split(r" {2,}| \| ", example.strip())[0]
        assert cli.make_parser().parse_args(shlex.split(command_line)[1:]).run


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version says the version of the package."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"selfhost {selfhost.__version__}\n"
