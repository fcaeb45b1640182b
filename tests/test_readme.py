"""What the README shows is run."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional
from urllib.parse import urlsplit

import documents
import pytest
from documents import SECONDS, environment, run

from selfhost import DistributedRuntime, LocalModel, Settings

README = documents.read("README.md")
SAMPLES = {name: text for name, text in documents.samples(README).items() if name.endswith(".py")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the samples and the model directory that they name."""
    return documents.write_samples(tmp_path, SAMPLES)


def records(store: Path) -> list[Path]:
    """Return every file of a store."""
    return [path for path in store.rglob("*") if path.is_file()]


def test_every_python_block_is_a_sample() -> None:
    """No block of Python goes untested, and each stays short."""
    assert set(SAMPLES) == {"worker.py", "frontend.py", "gateway.py", "wsgi.py", "threaded.py"}
    assert README.count("```python") == len(SAMPLES)
    assert len(SAMPLES["worker.py"].strip().splitlines()) <= 11
    assert len(SAMPLES["frontend.py"].strip().splitlines()) <= 10


def test_worker_sample(folder: Path) -> None:
    """The worker prints a URL for each file of the model and leaves no record."""
    lines = run(folder, sys.executable, "-X", "dev", "worker.py")

    assert [line.split()[0].rpartition("/")[2] for line in lines] == [
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    ]  # fmt: skip
    assert records(folder / "kv") == []


def test_frontend_sample(folder: Path) -> None:
    """The frontend takes each file from a worker that lives, keeps it where Dynamo does, then needs none."""
    settings = Settings(
        self_host_metadata=True, system_host="127.0.0.1", system_port=0, discovery_backend="mem"
    )
    (folder / "cards").mkdir()
    with DistributedRuntime(settings) as runtime, DistributedRuntime(settings) as dead:
        for name, worker in (("a", dead), ("b", runtime)):
            model = LocalModel.load(folder / "my-model", name="my/model").attach(
                worker.endpoint("ns.comp.ep")
            )
            (folder / "cards" / name).write_text(model.card.to_json())
        dead.close()
        paths = run(folder, sys.executable, "-X", "dev", "frontend.py")
    again = run(folder, sys.executable, "-X", "dev", "frontend.py")

    assert (again, len(paths)) == (paths, 5)
    below = f"{folder}/.cache/dynamo/mdc/by-slug/my_model/"
    for path in map(Path, paths):
        assert str(path).startswith(below)
        assert path.read_bytes() == (folder / "my-model" / path.name).read_bytes()


def test_gateway_sample(folder: Path) -> None:
    """The watcher finds a published model by itself, and says that it is ready."""
    settings = Settings(True, "127.0.0.1", 0, file_kv=str(folder / "kv"))
    with DistributedRuntime(settings) as runtime:
        model = LocalModel.load(folder / "my-model", name="my/model")
        model.attach(runtime.endpoint("ns.comp.ep"))
        directory, status = run(folder, sys.executable, "-X", "dev", "gateway.py")

    assert Path(directory).parent.name == "my_model"
    assert {path.name for path in Path(directory).iterdir()} == {
        path.name for path in (folder / "my-model").iterdir()
    }
    assert status.split() == ["my/model", "ready"]


def test_threaded_sample(folder: Path) -> None:
    """Three models of three threads share one server."""
    urls = [urlsplit(line) for line in run(folder, sys.executable, "-X", "dev", "threaded.py")]

    assert [url.path.split("/")[3] for url in urls] == ["one", "two", "three"]
    assert len({url.netloc for url in urls}) == 1
    assert records(folder / "kv") == []


def test_vendoring_command(folder: Path) -> None:
    """The copied folder runs its demo."""
    (command,) = re.findall(r"```sh\n(python3 docs/vendor.py .*)\n```", README)
    (folder / "docs").symlink_to(Path(__file__).parents[1] / "docs")

    assert sum(line.startswith("  ok ") for line in run(folder, "sh", "-c", command)) == 5


# ------------------------------------------------------------------ gunicorn


@pytest.fixture
def gunicorn(folder: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Run the WSGI sample as the README says, on a port of loopback."""
    started: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "-w", "2", "wsgi:app"]
        variables = {
            "DYN_SYSTEM_ADVERTISE_URL": f"http://127.0.0.1:{port}",
            "DYN_SYSTEM_SHARED_DIR": str(folder / "share"),
            "DYN_FILE_KV": str(folder / "kv"),
        }
        process = subprocess.Popen(command, cwd=folder, env=environment(folder, **variables))
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=SECONDS)


def test_mounted_sample(gunicorn: Callable[[int], subprocess.Popen[bytes]], folder: Path) -> None:
    """All gunicorn workers serve the model, one publishes it, until gunicorn is told to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = gunicorn(port)
    served = wait_for(lambda: get(port, "/v1/metadata/my_model/_base/config.json"))
    wait_for(lambda: len(records(folder / "kv")) == 2)

    assert served == (folder / "my-model" / "config.json").read_bytes()

    process.terminate()
    assert process.wait(timeout=SECONDS) == 0
    assert records(folder / "kv") == []


def get(port: int, path: str) -> Optional[bytes]:
    """Return the body of a 200, None where nobody answers yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read()
    except ConnectionError:
        return None
    finally:
        connection.close()


def wait_for(condition: Callable[[], object]) -> object:
    """Return the first true result of a condition."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    pytest.fail("it never came true")
