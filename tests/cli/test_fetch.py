"""`selfhost fetch` and `selfhost verify`: from a card, wherever it is, to files that are what it says."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import pytest

import selfhost
from selfhost import BlobCache, Checksum, DistributedRuntime, LocalModel, Settings, cli
from selfhost.card.checksum import hash_fd
from selfhost.frontend import stamps

NAMES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
]


class Worker(NamedTuple):
    """A worker that serves my-model in this process."""

    runtime: DistributedRuntime
    model: LocalModel
    url: str  # of its card

    @property
    def origin(self) -> str:
        """What its URLs start with."""
        return self.runtime.base_url()

    @property
    def card(self) -> str:
        """The text of its card."""
        return self.model.card.to_json()


@pytest.fixture
def worker(model_dir: Path) -> Iterator[Worker]:
    """Serve my-model under its own name."""
    settings = Settings(True, "127.0.0.1", 0, discovery_backend="mem")
    with DistributedRuntime(settings) as runtime:
        model = LocalModel.load(model_dir, name="org/M").attach(runtime.endpoint("ns.comp.ep"))
        yield Worker(runtime, model, str(model.card_url))


@pytest.fixture
def card_file(worker: Worker, tmp_path: Path) -> Path:
    """Return a file with the worker's card."""
    path = tmp_path / "card.json"
    path.write_text(worker.card)
    return path


def same_files(found: Path, expected: Path) -> bool:
    """Tell whether two directories have the same files with the same bytes."""
    names = sorted(os.listdir(found))
    return names == sorted(os.listdir(expected)) and all(
        (found / name).read_bytes() == (expected / name).read_bytes() for name in names
    )


# ------------------------------------------------------------------ fetch


def test_fetch_by_url(run: Any, worker: Worker, model_dir: Path, tmp_path: Path) -> None:
    """One line on stdout: the directory, in the cache, with every file; a line for each file on stderr."""
    result = run("fetch", worker.url)

    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line == str(tmp_path / "cache" / "by-slug" / "org_m" / worker.model.card.mdcsum)
    assert same_files(Path(line), model_dir)
    told = result.stderr.splitlines()
    assert [line.split()[1] for line in told] == [f"{n}/5" for n in range(1, 6)]
    assert {line.split()[2] for line in told} == set(NAMES)


@pytest.mark.parametrize("source", ["file", "stdin", "record", "replica"])
def test_fetch_of_a_card_from_elsewhere(
    source: str, run: Any, worker: Worker, card_file: Path, model_dir: Path
) -> None:
    """A card comes from a file, stdin or a discovery record, too; a replica's is another source of files."""
    if source == "file":
        result = run("fetch", card_file)
    elif source == "stdin":
        result = run("fetch", "-", stdin=worker.card)
    elif source == "record":
        result = run("fetch", "-", stdin=f'{{"type": "Model", "card_json": {worker.card}}}')
    else:
        with helpers.RudeOrigin({}, "refuses") as dead:
            replicas = ("--replica", worker.url, "--replica", f"{dead.url}/card")
            result = run("fetch", "-", *replicas, stdin=worker.card.replace(worker.origin, dead.url))
        assert f"WARNING: the replica '{dead.url}/card' is left out: " in result.stderr

    assert result.returncode == 0, result.stderr
    assert same_files(Path(result.stdout.rstrip("\n")), model_dir)


def test_fetch_again_asks_nobody(run: Any, worker: Worker, card_file: Path) -> None:
    """What is in the cache needs no worker, and offline no network; nothing is told but the directory."""
    first = run("fetch", card_file)
    worker.runtime.close()

    for options in ((), ("--offline",), ("--verify", "always")):
        again = run("fetch", card_file, *options)
        assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")


def test_fetch_into_a_plain_directory(run: Any, worker: Worker, model_dir: Path, tmp_path: Path) -> None:
    """With --to there are real files, which need no cache any more, in the directory that is printed."""
    result = run("fetch", worker.url, "--to", tmp_path / "plain")

    assert result.stdout == f"{tmp_path / 'plain'}\n"
    assert same_files(tmp_path / "plain", model_dir)
    assert not any(path.is_symlink() for path in (tmp_path / "plain").iterdir())


def test_export_is_safe_from_a_collector(
    monkeypatch: pytest.MonkeyPatch, card_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    """While files are copied out, a collection in the same cache takes none of them away."""
    export = BlobCache.export_model

    def collect_first(cache: BlobCache, files: Any, directory: Any) -> None:
        for folder in (tmp_path / "cache" / "by-slug").glob("*/*"):
            os.utime(folder, (0, 0))
        assert BlobCache(cache.root).collect(max_age_seconds=1.0).models == ()
        export(cache, files, directory)

    monkeypatch.setattr(BlobCache, "export_model", collect_first)
    options = ["--cache", str(tmp_path / "cache"), "--to", str(tmp_path / "plain")]

    assert cli.main(["fetch", str(card_file), *options]) == 0
    assert same_files(tmp_path / "plain", model_dir)


@pytest.mark.parametrize(("options", "hashed"), [([], 0), (["--verify", "always"], 5)])
def test_fetch_may_hash_every_hit(
    monkeypatch: pytest.MonkeyPatch, card_file: Path, tmp_path: Path, options: list[str], hashed: int
) -> None:
    """A file in the cache is looked at, or read and hashed, as --verify says."""
    line = ["fetch", str(card_file), "--cache", str(tmp_path / "cache")]
    assert cli.main(line) == 0
    read: list[int] = []
    monkeypatch.setattr(stamps, "hash_fd", lambda *found: read.append(1) or hash_fd(*found))

    assert cli.main([*line, *options]) == 0
    assert len(read) == hashed


def test_fetch_says_what_was_tried(run: Any, worker: Worker, tmp_path: Path) -> None:
    """Where a file is to be had nowhere, each attempt has a line on stderr, and nothing is on stdout."""
    with helpers.RudeOrigin({}, "refuses") as one, helpers.RudeOrigin({}, "well") as two:
        (tmp_path / "two.json").write_text(worker.card.replace(worker.origin, two.url))
        dead = worker.card.replace(worker.origin, one.url)
        result = run("fetch", "-", "--replica", tmp_path / "two.json", stdin=dead)

    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    assert lines[0].startswith("selfhost: error: cannot get ")
    assert any(line.startswith("  ") and one.url in line and " s)" in line for line in lines)
    assert any(line.startswith("  ") and two.url in line and "404" in line for line in lines)
    assert "Traceback" not in result.stderr


def test_fetch_offline_opens_no_socket(run: Any, worker: Worker, card_file: Path) -> None:
    """Offline each missing digest is named; a card is not fetched either."""
    result = run("fetch", card_file, "--offline")
    assert result.returncode == 1
    assert all(str(file.checksum) in result.stderr for file in worker.model.files)

    with helpers.RudeOrigin({"card": worker.card.encode()}) as origin:
        by_url = run("fetch", f"{origin.url}/card", "--offline")
        assert (by_url.returncode, origin.connections) == (1, 0)
    assert "cannot be fetched offline" in by_url.stderr


@pytest.mark.parametrize(
    ("peer", "code"), [("127.0.0.0/8", 0), ("127.0.0.1", 0), ("10.0.0.0/8", 1), ("h.example", 1)]
)
def test_fetch_from_those_allowed(run: Any, worker: Worker, card_file: Path, peer: str, code: int) -> None:
    """With --allow nobody else is talked to."""
    result = run("fetch", card_file, "--allow", peer)

    assert result.returncode == code
    assert ("by the peer policy" in result.stderr) == bool(code)


@pytest.mark.parametrize(
    ("options", "is_asked"), [((), True), (("--allow", "w"), False), (("--allow", "w", "--allow-hub"), True)]
)
def test_hub_is_not_allowed_by_allow(
    run: Any, tmp_path: Path, options: tuple[str, ...], is_asked: bool
) -> None:
    """With --allow a card does not make anybody ask the hub, unless that is said, too."""
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('the hub would be asked')")
    card = helpers.make_card({"config.json": b"{}"}, "hf://org/name").to_json()
    path = os.pathsep.join((str(Path(selfhost.__file__).parents[1]), str(tmp_path)))
    commands = [run(name, "-", *options, stdin=card, PYTHONPATH=path) for name in ("fetch", "doctor")]

    assert [done.returncode for done in commands] == [1, 1]
    told = [done.stdout + done.stderr for done in commands]
    assert ["the hub would be asked" in text for text in told] == [is_asked] * 2


def test_fetch_goes_on_with_a_replicas_card(run: Any, worker: Worker, model_dir: Path) -> None:
    """A dead worker, or a portal page in its place, takes nobody down while another one has a card."""
    page = {"card": b"<html>Please log in</html>"}
    with helpers.RudeOrigin({}, "refuses") as dead, helpers.RudeOrigin(page) as portal:
        for bad in (f"{dead.url}/card", f"{portal.url}/card"):
            first = run("fetch", bad, "--replica", worker.url)
            last = run("fetch", worker.url, "--replica", bad, "--verify", "always")
            assert f"WARNING: {bad!r} gives no card, that of {worker.url!r} takes its place: " in first.stderr
            assert f"WARNING: the replica {bad!r} is left out: " in last.stderr
            assert (first.returncode, last.returncode) == (0, 0)
            assert first.stdout == last.stdout
    assert same_files(Path(first.stdout.rstrip("\n")), model_dir)


def test_fetch_lists_every_card_that_is_none(run: Any) -> None:
    """Where no source has a card, each has a line of its own."""
    with helpers.RudeOrigin({}, "refuses") as dead, helpers.RudeOrigin({"card": b"<html>"}) as portal:
        urls = [f"{dead.url}/card", f"{portal.url}/card"]
        result = run("fetch", urls[0], "--replica", urls[1])

    heading, *lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    assert heading == "selfhost: error: cannot get a card from any of these:"
    assert [line.startswith(f"  {url!r}: ") for url, line in zip(urls, lines)] == [True, True]
    assert len(lines) == 2


def test_messages_show_no_password(run: Any, worker: Worker) -> None:
    """A password that a URL has, or a token in its query, is in no log."""
    with helpers.RudeOrigin({"card": b"<html>"}, "well") as portal:
        url = f"http://me:hush@{portal.url.partition('//')[2]}/card?token=hush"
        for arguments in (
            (url,),
            (url, "--replica", url),
            (worker.url, "--replica", url),
            (url, "--offline"),
        ):
            result = run("fetch", *arguments)
            assert "***@" in result.stderr
            assert "hush" not in result.stderr


@pytest.mark.parametrize("given", ["no card", "missing"])
def test_fetch_refuses_a_replica_file_that_is_no_card(
    run: Any, worker: Worker, tmp_path: Path, given: str
) -> None:
    """A file is no matter of who is up: what is wrong with it is an error."""
    (tmp_path / "no card").write_text("<html>")
    result = run("fetch", worker.url, "--replica", tmp_path / given)

    assert result.returncode == 1
    assert f"selfhost: error: {str(tmp_path / given)!r}" in result.stderr


def test_fetch_without_a_place_for_a_cache(run: Any, worker: Worker, model_dir: Path, tmp_path: Path) -> None:
    """What is copied out needs no cache that lasts, and none is left; else there must be one."""
    nowhere = {"DYN_MDC_CACHE": "", "HOME": ""}
    copied = run("fetch", worker.url, "--to", tmp_path / "plain", **nowhere)
    kept = run("fetch", worker.url, **nowhere)

    assert copied.returncode == 0, copied.stderr
    assert same_files(tmp_path / "plain", model_dir)
    assert kept.returncode == 1
    assert "set --cache DIR, DYN_MDC_CACHE or HOME" in kept.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-model", "plain"]


def test_fetch_looks_into_lower_caches(run: Any, card_file: Path, model_dir: Path, tmp_path: Path) -> None:
    """A file in a cache that is only read is fetched from nowhere, and that cache stays as it is."""
    run("cache", "import", card_file, model_dir, "--cache", tmp_path / "lower")
    before = sorted(path for path in (tmp_path / "lower").rglob("*"))
    without = run("fetch", card_file, "--offline")
    found = run("fetch", card_file, "--offline", "--lower", tmp_path / "none", "--lower", tmp_path / "lower")

    assert without.returncode == 1
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{tmp_path / 'cache'}/")
    assert same_files(Path(found.stdout.rstrip("\n")), model_dir)
    assert sorted(path for path in (tmp_path / "lower").rglob("*")) == before


def test_fetch_of_local_paths(run: Any, model_dir: Path) -> None:
    """Paths of a card are read only below a folder that the operator names."""
    card = run("card", model_dir).stdout
    refused = run("fetch", "-", stdin=card)
    allowed = run("fetch", "-", "--file-root", model_dir, stdin=card)

    assert refused.returncode == 1
    assert "not allowed here" in refused.stderr
    assert same_files(Path(allowed.stdout.rstrip("\n")), model_dir)


def test_fetch_with_own_authority(run: Any, worker: Worker, tmp_path: Path) -> None:
    """--ca trusts one more authority; without it an unknown one is refused."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with https_server(authority.issue_cert("localhost"), worker.card.encode()) as port:
        url = f"https://localhost:{port}/card"
        assert run("fetch", url, "--ca", tmp_path / "ca.pem").returncode == 0
        refused = run("fetch", url)

    assert refused.returncode == 1
    assert "certificate" in refused.stderr


@contextlib.contextmanager
def https_server(certificate: Any, body: bytes) -> Iterator[int]:
    """Answer every GET by https with the same body; give the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


# ------------------------------------------------------------------ what is no card


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'-' is no card"),
        ("<html>", "'-' is no card"),
        ("{}", "'-' is no card"),
        ("[" * 100_000, "'-' is no card"),
        ('{"extra_files": [' + "{}, " * 10_000 + "{}]}", "'-' is no card"),
    ],
    ids=["nothing", "html", "empty", "deep", "all wrong"],
)
def test_fetch_of_no_card(run: Any, text: str, said: str) -> None:
    """What is no card is told in one line, which says where it came from."""
    result = run("fetch", "-", stdin=text)

    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    assert line.startswith(f"selfhost: error: {said}")
    assert len(line) < 5000


def test_fetch_of_a_file_that_is_not_there(run: Any) -> None:
    """A path that leads nowhere is told as such."""
    assert run("fetch", "/no/card").stderr == "selfhost: error: '/no/card': No such file or directory\n"


@pytest.mark.parametrize("behaviour", ["endless_body_without_length", "length_of_20_digits"])
def test_endless_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, behaviour: str
) -> None:
    """A card from a URL may have so many bytes, and no more are taken."""
    monkeypatch.setattr("selfhost.frontend.card_source.MAX_CARD_BYTES", 1 << 20)
    with helpers.nothing_left(), helpers.RudeOrigin({"card": b"{}"}, behaviour) as origin:
        assert cli.main(["fetch", f"{origin.url}/card", "--cache", str(tmp_path / "c")]) == 1
    assert "bytes" in capsys.readouterr().err


def test_large_card_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is read up to the same limit: /dev/zero ends, too."""
    monkeypatch.setattr("selfhost.frontend.card_source.MAX_CARD_BYTES", 1 << 20)

    assert cli.main(["fetch", "/dev/zero"]) == 1
    assert "'/dev/zero' is no card: it has more than 1048576 bytes" in capsys.readouterr().err


def test_hostile_card_moves_no_cursor(run: Any, worker: Worker, tmp_path: Path) -> None:
    """Control characters of a card reach no terminal, whatever is said about it."""
    evil = "\\u001b[2J\\u0007\\u009b\\u202e\\nselfhost: all is well"
    card = worker.card.replace('"org/M"', f'"{evil}"').replace(f"{worker.origin}/v1", f"/{evil}/v1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a\x1b[2J").touch()
    results = [run("fetch", "-", stdin=card), run("verify", "-", tmp_path / "model", stdin=card)]
    results.append(run("fetch", "-", "-v", "--offline", stdin=card))

    assert [result.returncode for result in results] == [1, 1, 1]
    told = "".join(result.stdout + result.stderr for result in results)
    assert set(told) & set("\x1b\x07\x9b\u202e") == set()
    assert "\nselfhost: all is well" not in told


# ------------------------------------------------------------------ processes


def test_fetch_is_interrupted(start: Any, worker: Worker, tmp_path: Path) -> None:
    """Ctrl-C ends it soon, with 1 and one line, though two files hang; no part of a file is left behind."""
    with helpers.RudeOrigin({}, "stalled_before_status") as origin:
        (tmp_path / "card.json").write_text(worker.card.replace(worker.origin, origin.url))
        fetch = start("fetch", tmp_path / "card.json")
        assert helpers.poll_until(lambda: len(origin.requests) > 1)
        began = time.monotonic()
        code, errors = fetch.end(signal.SIGINT)

    assert time.monotonic() - began < 5.0  # half of the time after which a silent origin is given up
    assert (code, errors) == (1, "selfhost: error: interrupted\n")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.parent.name != "locks"]
    assert left == ["locks"]


def test_progress_on_a_terminal(worker: Worker, environment: dict[str, str], read_terminal: Any) -> None:
    """On a terminal one line is redrawn and then cleared; stdout has the directory alone."""
    leader, follower = os.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-m", "selfhost", "fetch", worker.url],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=follower, timeout=30,
        )  # fmt: skip
    finally:
        os.close(follower)
    drawn = read_terminal(leader)
    os.close(leader)

    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1
    assert "/5 files" in drawn
    assert "\n" not in drawn
    assert drawn.endswith("\r\x1b[K")


LOADED = """
import sys
from selfhost import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
print(*sys.modules, sep="\\n", file=sys.stderr)
"""


def modules_of(start: Any, *arguments: object) -> set[str]:
    """Return the modules that a command loads."""
    code, errors = start(*arguments, script=LOADED).end()
    assert code == 0
    return set(errors.split())


def test_fetch_loads_no_worker(start: Any, card_file: Path) -> None:
    """A frontend's command loads neither the worker's modules nor Werkzeug."""
    loaded = modules_of(start, "fetch", card_file)

    assert "selfhost.frontend.resolver" in loaded
    assert "selfhost.frontend.transport_http" in loaded
    assert {name for name in loaded if name.startswith(("selfhost.worker", "selfhost.discovery"))} == set()
    assert "werkzeug" not in loaded


@pytest.mark.parametrize("command", [[], ["fetch"], ["serve"], ["cache", "gc"]])
def test_help_loads_next_to_nothing(start: Any, command: list[str]) -> None:
    """The parser alone needs no network, no hashing, no card."""
    loaded = modules_of(start, *command, "--help")

    assert loaded & {"ssl", "http.client", "socket", "blake3", "werkzeug", "ipaddress", "json"} == set()
    assert {name for name in loaded if name.startswith("selfhost.")} == {
        "selfhost.cli", "selfhost.cli.cache", "selfhost.cli.cache_options", "selfhost.cli.cards",
        "selfhost.cli.doctor", "selfhost.cli.fetch", "selfhost.cli.progress", "selfhost.cli.serve",
        "selfhost.cli.support",
        "selfhost.errors", "selfhost.settings", "selfhost._lazy", "selfhost._units",
    }  # fmt: skip


# ------------------------------------------------------------------ verify


def test_verify_of_a_true_directory(run: Any, worker: Worker, model_dir: Path) -> None:
    """Every file is ok; what the card does not name is told, and no fault."""
    (model_dir / "model.safetensors").write_bytes(b"weights")
    result = run("verify", worker.url, model_dir)

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        *(f"ok       {name}" for name in NAMES),
        "extra    model.safetensors",
    ]


def test_verify_names_each_fault(run: Any, worker: Worker, model_dir: Path) -> None:
    """Other bytes, a missing file and what is no file each have a line; the exit code is 1."""
    expected = worker.model.files[0].checksum
    (model_dir / "config.json").write_bytes(b"{}")
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer_config.json").unlink()
    os.mkfifo(model_dir / "tokenizer_config.json")
    result = run("verify", "-", model_dir, stdin=worker.card)

    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        f"differs  config.json: expected {expected}, found {Checksum.of(b'{}')} (2 bytes)",
        "missing  tokenizer.json",
        "differs  tokenizer_config.json: cannot be read: not a regular file",
    ]
    assert [line.split()[0] for line in lines[3:]] == ["ok", "ok"]
    assert result.stderr == (
        f"selfhost: error: 3 of 5 files in {str(model_dir)!r} are missing or not what the card says\n"
    )


def test_verify_of_what_was_fetched(run: Any, card_file: Path) -> None:
    """The directory that `fetch` prints is one that `verify` takes."""
    directory = run("fetch", card_file).stdout.rstrip("\n")

    assert run("verify", card_file, directory).returncode == 0
    assert run("verify", card_file, "/no/directory").returncode == 1


@pytest.fixture
def quoted(model_dir: Path) -> Iterator[str]:
    """Serve my-model with files whose names a URL has percent-encoded; return the URL of its card."""
    (model_dir / "my notes.txt").write_text("mine")
    (model_dir / "100%.txt").write_text("all")
    settings = Settings(True, "127.0.0.1", 0, discovery_backend="mem")
    with DistributedRuntime(settings) as runtime:
        model = LocalModel.load(model_dir, name="org/M").attach(runtime.endpoint("ns.comp.ep"))
        yield str(model.card_url)


def test_verify_takes_names_in_both_forms(run: Any, quoted: str, model_dir: Path, tmp_path: Path) -> None:
    """The worker's directory has plain names, one that was fetched has those of the URLs: both are right."""
    own = run("verify", quoted, model_dir)
    run("fetch", quoted, "--to", tmp_path / "plain")
    fetched = run("verify", quoted, tmp_path / "plain")

    assert {"ok       my notes.txt", "ok       100%.txt"} <= set(own.stdout.splitlines())
    assert {"ok       my%20notes.txt", "ok       100%25.txt"} <= set(fetched.stdout.splitlines())
    for result in (own, fetched):
        assert (result.returncode, result.stderr) == (0, "")
        assert {line.split()[0] for line in result.stdout.splitlines()} == {"ok"}


def test_verify_names_faults_of_encoded_names(run: Any, quoted: str, model_dir: Path) -> None:
    """A plain name stands for its file, right or wrong; one that is missing is told as the card has it."""
    (model_dir / "my notes.txt").write_text("not mine")
    (model_dir / "100%.txt").unlink()
    lines = run("verify", quoted, model_dir).stdout.splitlines()

    assert [line.split(":")[0] for line in lines if not line.startswith("ok ")] == [
        "missing  100%25.txt",
        "differs  my notes.txt",
    ]


STOPS_BEFORE_MOVING = """
import sys, time
from selfhost import _atomic, cli

def stop(*_):
    print("staged", flush=True)
    time.sleep(60)

_atomic.place_absent = stop
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_verify_passes_over_what_a_killed_fetch_left(
    start: Any, run: Any, card_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The folder in which files were staged, in DIR or beside it, is nobody's extra file."""
    (tmp_path / "all" / "plain").mkdir(parents=True)
    fetch = start("fetch", card_file, "--to", tmp_path / "all" / "plain", script=STOPS_BEFORE_MOVING)
    fetch.lines_until("staged")
    fetch.end(number)
    (left,) = (tmp_path / "all" / "plain").iterdir()
    assert left.name.startswith(".tmp.")

    lines = run("verify", card_file, tmp_path / "all" / "plain").stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"missing"}
