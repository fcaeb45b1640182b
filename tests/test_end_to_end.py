"""The whole way: a worker's directory, its own server, a store, and a frontend that checks every byte."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional
from urllib.parse import unquote, urlsplit

import pytest

import selfhost
from selfhost import DistributedRuntime, ModelDeploymentCard, Settings, register_model
from selfhost.demo_model import write_demo_model
from selfhost.discovery import Bucket, FileDiscovery

TTL_SECONDS = 60.0  # of records; Dynamo's are 10, and a machine that is busy needs some for an interpreter
SOON_SECONDS = 2.0  # of records that are to expire


def get(url: str) -> tuple[int, bytes]:
    """GET a URL; return status and body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def settings(root: Path, **variables: str) -> Settings:
    """Return the settings that an environment gives, with a port and a store of the test's own."""
    loopback = {"DYN_SYSTEM_HOST": "127.0.0.1", "DYN_SYSTEM_PORT": "0", "DYN_FILE_KV": str(root / "kv")}
    return Settings.from_env({**loopback, **variables})


def cards_in(root: Path, ttl_seconds: float = TTL_SECONDS) -> dict[str, ModelDeploymentCard]:
    """Read the cards of a store, as another process does; by display name."""
    with FileDiscovery(root / "kv", ttl_seconds=ttl_seconds) as store:
        records = [json.loads(text) for text in store.records(Bucket.MODELS).values()]
    cards = [ModelDeploymentCard.from_json(json.dumps(record["card_json"])) for record in records]
    return {card.display_name: card for card in cards}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return a small model directory with one more file."""
    directory = tmp_path / "my-model"
    write_demo_model(str(directory))
    (directory / "we?ird name.txt").write_bytes(b"odd")
    return str(directory)


# ------------------------------------------------------------------ one process


def test_worker_hosts_its_files(tmp_path: Path, model: str) -> None:
    """With self-hosting on, the status server serves the model's config, and 404 for what it has not."""
    on = settings(tmp_path, DYN_SELF_HOST_METADATA="true")
    with DistributedRuntime(on) as runtime:
        register_model(
            "Tokens", "Chat", runtime.endpoint("ns.comp.ep"), model, "org/My.Model", worker_type="aggregated"
        )
        server = runtime.status_server
        assert server is not None
        routes = f"http://{server.address}/v1/metadata/org_my_model/_base"

        status, body = get(f"{routes}/config.json")
        assert (status, json.loads(body)["model_type"]) == (200, "llama")
        assert get(f"{routes}/no-such-file.json")[0] == 404
        assert get(f"{routes}/weights.safetensors")[0] == 404


def test_worker_without_the_variable(tmp_path: Path, model: str) -> None:
    """With the variable unset the card keeps its local paths, and every metadata URL is 404."""
    with DistributedRuntime(settings(tmp_path)) as runtime:
        register_model("Tokens", "Chat", runtime.endpoint("ns.comp.ep"), model, "m", worker_type=None)
        card = cards_in(tmp_path)["m"]
        server = runtime.status_server
        assert server is not None
        statuses = {
            get(f"http://{server.address}/v1/metadata/m/_base/{file.basename}")[0]
            for file, _ in card.iter_metadata_files()
        }

    assert all(file.is_local for file, _ in card.iter_metadata_files())
    assert all(file.matches(file.path) for file, _ in card.iter_metadata_files())
    assert statuses == {404}


def test_card_read_back_is_the_card(tmp_path: Path, model: str) -> None:
    """The card in the store has the checksum of the card that the worker holds."""
    on = settings(tmp_path, DYN_SELF_HOST_METADATA="1")
    with DistributedRuntime(on) as runtime:
        attached = register_model(
            "Tokens", "Chat", runtime.endpoint("ns.comp.ep"), model, "m", worker_type=None
        )
        assert cards_in(tmp_path)["m"].mdcsum == attached.card.mdcsum
    assert cards_in(tmp_path) == {}


# ------------------------------------------------------------------ several processes

WORKER = """
import sys, threading
from selfhost import DistributedRuntime, LocalModel, Settings
from selfhost.discovery import FileDiscovery

settings = Settings.from_env()
with FileDiscovery(settings.file_kv, ttl_seconds=float(sys.argv[2])) as store:
    with DistributedRuntime(settings, discovery=store) as runtime:
        base = LocalModel.load(sys.argv[1], name="org/M").attach(runtime.endpoint("ns.comp.ep"))
        lora = base.derive_lora("adapter").attach(runtime.endpoint("ns.comp.ep"))
        print("ready", flush=True)
        sys.stdin.read()
print("gone", flush=True)
"""

FRONTEND = """
import json, os, sys
from selfhost import BlobCache, MetadataResolver, ModelDeploymentCard
from selfhost.discovery import Bucket, FileDiscovery

with FileDiscovery(sys.argv[1], ttl_seconds=float(sys.argv[2])) as store:
    records = [json.loads(text) for text in store.records(Bucket.MODELS).values()]
replicas = {}
for record in records:
    card = ModelDeploymentCard.from_json(json.dumps(record["card_json"]))
    replicas.setdefault(card.display_name, []).append(card)
with MetadataResolver(BlobCache(sys.argv[3])) as resolver:
    for name, cards in sorted(replicas.items(), reverse=True):
        resolved = resolver.resolve(cards[0], replicas=cards[1:])
        print(name, len(cards), len(resolved.fetched), *sorted(os.listdir(resolved.local_dir)))
assert not {"werkzeug", "selfhost.worker"} & set(sys.modules)
"""

StartWorker = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_worker(tmp_path: Path, model: str) -> Iterator[StartWorker]:
    """Start a worker process that publishes to the test's store; it dies with the test at the latest."""
    started: list[subprocess.Popen[str]] = []

    def start(ttl_seconds: float = TTL_SECONDS) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, model, str(ttl_seconds)],
            env=environment(tmp_path, DYN_SELF_HOST_METADATA="true"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def environment(root: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a process of these tests."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(selfhost.__file__).parents[1]),
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_SYSTEM_PORT": "0",
        "DYN_FILE_KV": str(root / "kv"),
        **variables,
    }


def run_frontend(root: Path, ttl_seconds: float = TTL_SECONDS) -> subprocess.CompletedProcess[str]:
    """Fetch and verify all that the store tells of, in a process of its own."""
    return subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-c",
            FRONTEND,
            str(root / "kv"),
            str(ttl_seconds),
            str(root / "cache"),
        ],
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=60,
    )


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Optional[float]:
    """Wait for a condition; return how long that took, None where it did not come true."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            return None
        time.sleep(0.02)
    return time.monotonic() - started


DEMO_NAMES = "chat_template.jinja config.json generation_config.json tokenizer.json tokenizer_config.json"
NAMES = f"{DEMO_NAMES} we%3Fird%20name.txt"


def test_another_process_fetches_every_file(tmp_path: Path, start_worker: StartWorker) -> None:
    """A process that knows only the store gets every byte that the cards promise, equal ones once."""
    start_worker()
    done = run_frontend(tmp_path)
    again = run_frontend(tmp_path)

    assert (done.stderr, again.stderr) == ("", "")
    assert done.stdout.splitlines() == [f"org/M 1 6 {NAMES}", f"adapter 1 0 {NAMES}"]
    assert again.stdout.splitlines() == [f"org/M 1 0 {NAMES}", f"adapter 1 0 {NAMES}"]


def test_command_line_fetches_from_a_worker(tmp_path: Path, model: str, start_worker: StartWorker) -> None:
    """The URL of a card is enough for `selfhost fetch`, and `selfhost verify` accepts what that leaves."""
    start_worker()
    file = cards_in(tmp_path)["org/M"].model_info.file  # type: ignore[union-attr]
    card_url = file.path.rpartition("/")[0]
    plain = tmp_path / "plain"
    for command in (["fetch", card_url, "--to", str(plain), "--cache", str(tmp_path / "c")],
                    ["verify", card_url, str(plain)]):  # fmt: skip
        line = [sys.executable, "-X", "dev", "-m", "selfhost", *command]
        done = subprocess.run(line, env=environment(tmp_path), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    assert sorted(path.name for path in plain.iterdir()) == NAMES.split()
    assert all(
        (plain / name).read_bytes() == Path(model, unquote(name)).read_bytes() for name in NAMES.split()
    )


def test_worker_that_ends_leaves_nothing(tmp_path: Path, start_worker: StartWorker) -> None:
    """A worker that ends in order takes its records with it at once, and says nothing."""
    worker = start_worker()
    assert set(cards_in(tmp_path)) == {"org/M", "adapter"}
    output, _ = worker.communicate(timeout=10)

    assert (output, worker.returncode) == ("gone\n", 0)
    assert [path for path in (tmp_path / "kv").rglob("*") if path.is_file()] == []


def test_killed_worker_expires(tmp_path: Path, start_worker: StartWorker) -> None:
    """What a killed worker leaves in the store is live no more after its time to live."""  # catalogue 113
    worker = start_worker(SOON_SECONDS)
    assert wait_until(lambda: not cards_in(tmp_path, SOON_SECONDS), SOON_SECONDS * 1.3) is None, (
        "it was kept alive until here"
    )
    worker.kill()
    worker.wait()
    assert set(cards_in(tmp_path, SOON_SECONDS)) == {"org/M", "adapter"}

    seconds = wait_until(lambda: not cards_in(tmp_path, SOON_SECONDS))
    assert seconds is not None
    assert seconds < 2 * SOON_SECONDS


def test_killed_worker_has_replicas(tmp_path: Path, start_worker: StartWorker) -> None:
    """While a killed worker's records still look live, its model is fetched from the other one, at once."""
    victim = start_worker()  # catalogue 113
    start_worker()
    victim.kill()
    victim.wait()
    done = run_frontend(tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"org/M 2 6 {NAMES}", f"adapter 2 0 {NAMES}"]


def test_replacement_of_a_killed_worker(tmp_path: Path, start_worker: StartWorker) -> None:
    """A second worker is found beside the dead one's records, which a frontend then no longer sees."""
    start_worker(SOON_SECONDS).kill()
    start_worker(SOON_SECONDS)
    assert wait_until(lambda: "org/M 1 " in run_frontend(tmp_path, SOON_SECONDS).stdout, 30.0) is not None
