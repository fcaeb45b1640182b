"""What the README shows is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import foreign
import pytest
from documents import SECONDS, records, run
from helpers import poll_until

README = documents.read("README.md")
SAMPLES = {name: text for name, text in documents.samples(README).items() if name.endswith(".py")}
PROMPT = "Serve requests here. Enter withdraws the card, then closes the server."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the samples and the model directory that they name."""
    return documents.write_samples(tmp_path, SAMPLES)


def test_every_python_block_is_a_sample() -> None:
    """No block of Python goes untested, and each stays short, as does all of it."""
    assert set(SAMPLES) == {"worker.py", "frontend.py", "mounted.py"}
    assert README.count("```python") == len(SAMPLES)
    assert len(SAMPLES["worker.py"].strip().splitlines()) <= 11
    assert len(SAMPLES["frontend.py"].strip().splitlines()) <= 10
    assert len(README.splitlines()) <= 125


def test_every_document_is_there_and_linked() -> None:
    """The README leads to each document, and no link in any of them leads to none."""
    links = {
        name: set(re.findall(r"\]\((?:docs/)?([\w.]+\.md)\)", documents.read(name)))
        for name in documents.DOCUMENTS
    }
    there = {name.rpartition("/")[2] for name in documents.DOCUMENTS}

    assert there - {"README.md"} == links["README.md"] - {"CHANGELOG.md"}
    assert set().union(*links.values()) <= there | {"CHANGELOG.md"}


def test_first_steps(tmp_path: Path) -> None:
    """In two shells a model directory is made, served and fetched, as it stands there but for the port."""
    serve, fetch = re.findall(r"```sh\n\. \.venv/bin/activate\n(.*?)```", README, re.DOTALL)
    path = command_path(tmp_path / "bin")
    with documents.running(tmp_path, "sh", "-c", serve, DYN_SYSTEM_PORT="0", PATH=path) as serving:
        url = first_url(serving)
        command, taken = re.subn("http://127.0.0.1:9090/v1/metadata/my_model/_base", url, fetch)
        (directory,) = run(tmp_path, "sh", "-c", f"exec 2>said\n{command}", PATH=path)

    assert taken == 1
    assert names(Path(directory)) == names(tmp_path / "my-model")
    assert records(tmp_path / "dynamo_store_kv") == []


def command_path(folder: Path) -> str:
    """Return a PATH on which this Python and the package are `python` and `selfhost`, from the folder."""
    folder.mkdir()
    for name, arguments in (("python", ""), ("selfhost", " -m selfhost")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def first_url(process: subprocess.Popen[str]) -> str:
    """Read what a process says up to the URL of a card; return that."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        found = re.search(r"http://127\.0\.0\.1:\d+/v1/metadata/my_model/_base\b(?!/)", line)
        if found:
            return found[0]
    pytest.fail("".join(said))


def names(folder: Path) -> set[str]:
    """Return the names of what is in a folder."""
    return {path.name for path in folder.iterdir()}


def test_worker_and_frontend_samples(folder: Path) -> None:
    """The frontend takes each file from a worker that lives, keeps it where Dynamo does; no record stays."""
    frontend = (sys.executable, "-X", "dev", "frontend.py")
    with documents.running(folder, sys.executable, "-X", "dev", "worker.py") as worker:
        url = first_url(worker)
        with documents.running(folder, sys.executable, "worker.py") as another:
            paths = run(folder, *frontend, url, first_url(another))
        again = run(folder, *frontend, url)
        print(file=worker.stdin, flush=True)
        (rest,) = worker.stdout or ()

    assert (worker.returncode, rest.strip()) == (0, PROMPT)
    assert (again, len(paths)) == (paths, 5)
    below = f"{folder}/.cache/dynamo/mdc/by-slug/my_model/"
    for path in map(Path, paths):
        assert str(path).startswith(below)
        assert path.read_bytes() == (folder / "my-model" / path.name).read_bytes()
    assert records(folder / "kv") == []


def test_vendoring_command(folder: Path) -> None:
    """The copied folder runs its demo."""
    (command,) = re.findall(r"```sh\n(python3 docs/vendor.py .*)\n```", README)
    (folder / "docs").symlink_to(Path(__file__).parents[1] / "docs")

    assert sum(line.startswith("  ok ") for line in run(folder, "sh", "-c", command)) == 5


# ------------------------------------------------------------------ gunicorn


def test_mounted_sample(folder: Path) -> None:
    """All gunicorn workers serve the model, one publishes it, until gunicorn is told to end."""
    env = foreign.environment(
        folder,
        DYN_SYSTEM_ADVERTISE_URL="URL",
        DYN_SYSTEM_SHARED_DIR=str(folder / "share"),
        DYN_FILE_KV=str(folder / "kv"),
    )
    with foreign.running(foreign.gunicorn("-w", "2", "mounted:app"), folder, env) as server:
        served = server.get("/v1/metadata/my_model/_base/config.json")
        assert poll_until(lambda: len(records(folder / "kv")) == 2, SECONDS)

        assert (served.status, served.body) == (200, (folder / "my-model" / "config.json").read_bytes())
        assert server.stop() == 0
    assert records(folder / "kv") == []
