"""What the README shows is run, and what it says about settings is compared with the code."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional
from urllib.parse import urlsplit

import pytest

import selfhost
from selfhost import DistributedRuntime, LocalModel, Settings
from selfhost.demo_model import write_demo_model
from selfhost.errors import SettingsError
from selfhost.settings import FrontendSettings
from selfhost.worker.advertise import AdvertisedAddress

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL))
SECONDS = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the samples and the model directory that they name."""
    write_demo_model(str(tmp_path / "my-model"))
    for name, text in SAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment with nothing but what Python and the sample need."""
    package = str(Path(selfhost.__file__).parents[1])
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    return {"PATH": path, "PYTHONPATH": package, "HOME": str(folder), "TMPDIR": str(folder), **more}


def run(folder: Path, *command: str) -> list[str]:
    """Run a command in the folder to its end; return what it prints, line by line."""
    result = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=SECONDS
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


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
    (command,) = re.findall(r"```sh\n(mkdir .*_vendor.*)\n```", README)
    (folder / "selfhost").symlink_to(Path(selfhost.__file__).parent)

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
    """Each gunicorn worker serves and publishes the model, and withdraws it when gunicorn is told to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = gunicorn(port)
    served = wait_for(lambda: get(port, "/v1/metadata/my_model/_base/config.json"))
    wait_for(lambda: len(records(folder / "kv")) == 4)

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


# ------------------------------------------------------------------ settings

ROWS = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| .*? \| (.*?) ?\|$", README, re.MULTILINE)


def test_table_has_every_setting() -> None:
    """Each variable that the code reads is in the table, and no other."""

    class Asked(dict[str, str]):
        def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
            asked.add(name)
            return default

    asked: set[str] = set()
    Settings.from_env(Asked())
    FrontendSettings.from_env(Asked())
    mentioned = {name for _, default, _ in ROWS for name in re.findall(r"\$(\w+)", default)}

    assert {name for name, _, _ in ROWS} | mentioned == asked


@pytest.mark.parametrize("text", [error.strip("`") for _, _, error in ROWS if error])
def test_table_has_the_real_error(text: str) -> None:
    """The error of a row is what its value really raises."""
    variable, value = re.findall(r"^(\w+)='(.*?)' cannot", text)[0]

    assert error_of(variable, value) == text


def error_of(variable: str, value: str) -> str:
    """Return what is said about a value, whether it is read or used."""
    try:
        url = Settings.from_env({variable: value}).advertise_url
        AdvertisedAddress.parse(str(url), variable=variable)
    except SettingsError as error:
        return str(error)
    return ""


def test_table_has_the_real_defaults() -> None:
    """Without a variable the settings are what the table says."""
    defaults = {name: default.strip("`") for name, default, _ in ROWS}
    settings = Settings.from_env({"TMPDIR": "$TMPDIR"})

    assert defaults["DYN_SYSTEM_HOST"] == settings.system_host
    assert defaults["DYN_DISCOVERY_BACKEND"] == settings.discovery_backend
    assert defaults["DYN_FILE_KV"] == settings.file_kv
    frontend = FrontendSettings.from_env({"HOME": "/home"})
    assert defaults["DYN_MDC_CACHE"].replace("$HOME", "/home") == frontend.cache_root
    assert f"{frontend.hf_hub_cache}`" in defaults["HF_HUB_CACHE"].replace("$HOME", "/home") + "`"
    assert (settings.self_host_metadata, settings.system_port, settings.advertise_url) == (False, None, None)
