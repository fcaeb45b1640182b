"""Our app, mounted into somebody else's server under a prefix, serves the real frontend too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import selfhost

MOUNTED = '''
"""A host application that gives its metadata the prefix /internal."""

import os

from werkzeug.middleware.dispatcher import DispatcherMiddleware

import selfhost

registry = selfhost.MetadataArtifactRegistry()
runtime = selfhost.DistributedRuntime(registry=registry)


def attach():
    runtime.start()
    selfhost.register_model(
        selfhost.ModelInput.Tokens,
        selfhost.ModelType.Chat | selfhost.ModelType.Completions,
        runtime.endpoint("ns.comp.ep"),
        os.environ["MODEL_DIR"],
        "mounted",
        worker_type=selfhost.WorkerType.Aggregated,
    )


def host(environ, start_response):
    start_response("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", "0")])
    return []


app = DispatcherMiddleware(host, {"/internal": selfhost.MetadataApp(registry)})
'''

CONFIGURATION = '''
"""Each worker process publishes for itself, and withdraws when it ends."""


def post_worker_init(worker):
    import mounted

    mounted.attach()


def worker_exit(server, worker):
    import mounted

    mounted.runtime.close()
'''


@pytest.fixture
def gunicorn(
    tmp_path: Path, file_kv: Path, free_port: Callable[[], int]
) -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Start gunicorn with the mounted app for a model directory; it is stopped as an operator would."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "mounted.py").write_text(MOUNTED)
    (site / "gunicorn.conf.py").write_text(CONFIGURATION)
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        address = f"127.0.0.1:{free_port()}"
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(Path(selfhost.__file__).parents[1]),
            "MODEL_DIR": str(folder),
            "DYN_SELF_HOST_METADATA": "1",
            "DYN_FILE_KV": str(file_kv),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_SYSTEM_ADVERTISE_URL": f"http://{address}/internal",
        }
        options = ["--bind", address, "--workers", "2", "--threads", "4", "--graceful-timeout", "5"]
        command = [sys.executable, "-m", "gunicorn", *options, "mounted:app"]
        process = subprocess.Popen(command, cwd=site, env=environment, stdin=subprocess.DEVNULL)
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=15)


def test_mounted_under_gunicorn(
    dynamo_frontend: Any,
    model_dir: Any,
    file_kv: Path,
    gunicorn: Callable[[Path], subprocess.Popen[bytes]],
    read_published_cards: Callable[[Path], dict[str, str]],
) -> None:
    """A frontend loads from two gunicorn workers at an advertised URL; the model goes when they do."""
    folder = model_dir(files={"extra file?.json": b"{}"})
    frontend = dynamo_frontend()
    server = gunicorn(folder)
    frontend.wait_for("mounted")

    card = selfhost.ModelDeploymentCard.from_json(read_published_cards(file_kv)["mounted"])
    cached = frontend.cached(card.slug, card.mdcsum)
    assert sorted(cached.values()) == sorted(path.read_bytes() for path in folder.iterdir())
    assert all("/internal/v1/metadata/" in file.path for file, _ in card.iter_metadata_files())

    server.terminate()
    frontend.wait_gone("mounted", seconds=8)
