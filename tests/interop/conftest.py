"""The real Dynamo 1.6.1 as a peer: its frontend and its worker, each in a process of its own.

`SELFHOST_DYNAMO_PYTHON` names an interpreter in whose environment both are installed
(`make_environment.sh` makes one). Without it every test of this folder is deselected. Every process
started here listens on loopback, has a private HOME and is killed when its test ends.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from selfhost.demo_model import write_demo_model

HERE = Path(__file__).parent
VARIABLE = "SELFHOST_DYNAMO_PYTHON"
START_SECONDS = 30.0  # a cold start on a busy machine; warm it takes half a second
LOG_FILTER = "info,dynamo_llm::http=warn"  # without a line for every poll
LOAD_SECONDS = 15.0  # a model of loopback files; usually under half a second


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark everything in this folder `interop`, and leave it out where there is no Dynamo to run."""
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.interop)
    if ours and not os.environ.get(VARIABLE):
        items[:] = [item for item in items if HERE not in item.path.parents]
        config.hook.pytest_deselected(items=ours)


class Peer:
    """One process of the real Dynamo; what it prints is kept in a file."""

    def __init__(self, command: list[str], environment: dict[str, str], home: Path, name: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._log = home / f"{name}.log"
        clean = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "DYN_LOG": "info,dynamo_llm::http=warn",
        }
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**clean, "DYN_SDK_DISABLE_ANSI_LOGGING": "1", **environment},
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        """Return everything printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, what: str, condition: Callable[[], Any], seconds: float) -> Any:
        """Return the first true result of `condition`, or fail with the end of the log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            result = condition()
            if result:
                return result
            if self._process.poll() is not None:
                break
            time.sleep(0.03)
        pytest.fail(f"{what}: not within {seconds:g} s; the log ends:\n{self.log[-4000:]}")

    def kill(self) -> None:
        """End the process without ceremony, as a crash would."""
        self._process.kill()
        self._process.wait(timeout=10)


class Frontend(Peer):
    """`python -m dynamo.frontend`: discovers models in a file store and downloads their files."""

    def __init__(self, python: str, file_kv: Path, home: Path) -> None:
        self.port = unused_port()
        arguments = ["--http-host", "127.0.0.1", "--http-port", str(self.port), "--discovery-backend", "file"]
        planes = ["--request-plane", "tcp", "--event-plane", "zmq"]
        loopback = {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1"}
        super().__init__(
            [python, "-m", "dynamo.frontend", *arguments, *planes],
            {"DYN_FILE_KV": str(file_kv), **loopback},
            home,
            "frontend",
        )

    def models(self) -> list[str]:
        """Return the ids that /v1/models lists, sorted."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/v1/models")
            answer = connection.getresponse()
            assert answer.status == 200, answer.status
            return sorted(model["id"] for model in json.loads(answer.read())["data"])
        finally:
            connection.close()

    def wait_ready(self) -> None:
        """Wait until it answers at all."""
        self.wait_until("the frontend answers /v1/models", self._answers, START_SECONDS)

    def _answers(self) -> bool:
        try:
            self.models()
        except OSError:
            return False
        return True

    def wait_for(self, model: str, seconds: float = LOAD_SECONDS) -> None:
        """Wait until `model` is listed."""
        self.wait_until(f"{model!r} is listed", lambda: model in self.models(), seconds)

    def wait_gone(self, model: str, seconds: float = LOAD_SECONDS) -> None:
        """Wait until `model` is listed no more."""
        self.wait_until(f"{model!r} is gone", lambda: model not in self.models(), seconds)

    def cache_dir(self, slug: str, mdcsum: str) -> Path:
        """Return the directory of links that it keeps for one card."""
        return self.home / ".cache" / "dynamo" / "mdc" / "by-slug" / slug / mdcsum

    def cached(self, slug: str, mdcsum: str) -> dict[str, bytes]:
        """Return name and content of every file in that directory; {} where there is none."""
        folder = self.cache_dir(slug, mdcsum)
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


class Worker(Peer):
    """`dynamo_worker.py`: the real worker, which hosts the files of the models given."""

    def __init__(self, python: str, file_kv: Path, home: Path, models: list[dict[str, Any]]) -> None:
        self.file_kv = file_kv
        self._expected = sum(1 + len(model.get("loras", ())) for model in models)
        environment = {
            "DYN_FILE_KV": str(file_kv),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_SYSTEM_HOST": "127.0.0.1",
            "DYN_SYSTEM_PORT": "0",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        }
        command = [python, str(HERE / "dynamo_worker.py"), json.dumps(models)]
        super().__init__(command, environment, home, "worker")

    def wait_ready(self) -> None:
        """Wait until all of its models are registered."""
        self.wait_until("the worker has registered", self._registered, START_SECONDS)

    def _registered(self) -> bool:
        return self.log.count("registered ") >= self._expected and len(self.cards()) >= self._expected

    def cards(self) -> dict[str, str]:
        """Return the JSON text of every card in its store, by display name."""
        return published_cards(self.file_kv)


def published_cards(file_kv: Path) -> dict[str, str]:
    """Return the JSON text of every card in a file store, by display name."""
    folder = file_kv / "v1" / "mdc"
    names = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    cards = [json.loads(name.read_text(encoding="utf-8"))["card_json"] for name in names]
    return {card["display_name"]: json.dumps(card, ensure_ascii=False) for card in cards}


def unused_port() -> int:
    """Return a TCP port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def dynamo_python() -> str:
    """Return the interpreter that has the real Dynamo."""
    return os.environ[VARIABLE]


@pytest.fixture
def file_kv(tmp_path: Path) -> Path:
    """Return the root of a file store that one test's processes share."""
    root = tmp_path / "kv"
    root.mkdir()
    return root


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """Collect the processes of one test, to be killed at its end."""
    started: list[Peer] = []
    yield started
    for peer in reversed(started):
        peer.kill()


@pytest.fixture
def dynamo_frontend(
    dynamo_python: str, file_kv: Path, tmp_path: Path, peers: list[Peer]
) -> Callable[..., Frontend]:
    """Start the real frontend on a store, with a HOME of its own."""

    def start(store: Optional[Path] = None, home: Optional[Path] = None) -> Frontend:
        frontend = Frontend(dynamo_python, store or file_kv, home or tmp_path / f"frontend{len(peers)}")
        peers.append(frontend)
        frontend.wait_ready()
        return frontend

    return start


@pytest.fixture
def dynamo_worker(
    dynamo_python: str, file_kv: Path, tmp_path: Path, peers: list[Peer]
) -> Callable[..., Worker]:
    """Start the real worker; each model is a dict as `dynamo_worker.py` describes it."""

    def start(*models: dict[str, Any], store: Optional[Path] = None) -> Worker:
        worker = Worker(dynamo_python, store or file_kv, tmp_path / f"worker{len(peers)}", list(models))
        peers.append(worker)
        worker.wait_ready()
        return worker

    return start


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Return the function that finds a free port."""
    return unused_port


@pytest.fixture
def dynamo_mdcsum(dynamo_python: str, tmp_path: Path) -> Callable[[str], str]:
    """Return the real Dynamo's own function from a card's JSON text to its mdcsum."""
    script = "import sys; from dynamo._core import ModelDeploymentCard as Card; "
    script += "print(Card.from_json_str(sys.stdin.read()).local_dir())"

    def ask(card_json: str) -> str:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(tmp_path), "DYN_LOG": "off"}
        command = [dynamo_python, "-c", script]
        done = subprocess.run(
            command, input=card_json, capture_output=True, encoding="utf-8", check=True, env=environment
        )
        return Path(done.stdout.strip()).name

    return ask


@pytest.fixture
def read_published_cards() -> Callable[[Path], dict[str, str]]:
    """Return the function that reads every card of a file store."""
    return published_cards


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Make a real, small model directory, with more files or other contents where given."""

    def make(name: str = "model", files: Optional[dict[str, bytes]] = None) -> Path:
        folder = tmp_path / name
        write_demo_model(str(folder))
        for filename, content in (files or {}).items():
            (folder / filename).write_bytes(content)
        return folder

    return make
