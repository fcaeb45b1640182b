"""Files come whole from every kind of server that may hold them (catalogue 110, 116, 126).

nginx and lighttpd are tested where they are installed, the others always. The real Dynamo worker is a matter
of the interop tests.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import pytest
from helpers import TIMEOUT, MemorySink, make_card, poll_until

import selfhost
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver
from selfhost.frontend.transport_http import HttpTransport
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

FILES = {
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer.json": bytes(range(256)) * 12_000,  # 3 MB
    "tokenizer_config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "empty.txt": b"",
    "naïve 模型 100%#1?.json": b"a name that has to be encoded",
}
LARGE = "tokenizer.json"
ROUTE = "/v1/metadata/m/_base"

Started = AbstractContextManager[str]  # gives the URL below which the files are


class Origin(NamedTuple):
    """A kind of server, and how one is run for the files of a folder."""

    start: Callable[[Path], Started]
    can_resume: bool
    program: Optional[str] = None  # that must be installed

    @property
    def path(self) -> Optional[str]:
        """Where the program is; servers stand where only root used to look."""
        return shutil.which(str(self.program), path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


# ------------------------------------------------------------------ processes


@contextmanager
def process(*command: object, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server; it ends with the `with`."""
    environ = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    with subprocess.Popen([str(word) for word in command], env=environ, **output) as server:
        try:
            yield server
        finally:
            server.terminate()  # not killed: gunicorn has a worker to take with it
            server.wait(TIMEOUT)


def free_port() -> int:
    """Return a port on loopback that nobody listens at, of those that the system gives nobody by itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def is_listening(port: int) -> bool:
    """Tell whether a port on loopback takes connections."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def configured(name: str, folder: Path, text: str, *options: str) -> Iterator[str]:
    """Run a server that is told by a file where to listen."""
    port = free_port()
    conf = folder.parent / f"{name}.conf"
    conf.write_text(text.replace("PORT", str(port)).replace("FOLDER", str(folder)))
    with process(ORIGINS[name].path, *options, conf) as server:
        assert poll_until(lambda: server.poll() is not None or is_listening(port))
        assert server.poll() is None, f"{name} ended with {server.returncode}"
        yield f"http://127.0.0.1:{port}"


def nginx(folder: Path) -> Started:
    """Run nginx as one process without a daemon."""
    places = "\n".join(
        f"{kind}_temp_path {folder.parent}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = f"""
        daemon off; master_process off; pid {folder.parent}/pid; error_log /dev/null;
        events {{}}
        http {{
            access_log off;
            {places}
            server {{ listen 127.0.0.1:PORT; location / {{ root FOLDER; }} }}
        }}"""
    return configured("nginx", folder, text, "-p", str(folder.parent), "-c")


def lighttpd(folder: Path) -> Started:
    """Run lighttpd in the foreground."""
    text = """
        server.port = PORT
        server.bind = "127.0.0.1"
        server.document-root = "FOLDER"
        mimetype.assign = ("" => "application/octet-stream")  # without a type it makes no ETag
    """
    return configured("lighttpd", folder, text, "-D", "-f")


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """Run the standard library's server, which knows no ranges and speaks HTTP/1.0."""
    command = (sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", folder, 0)
    with process(*command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        words = server.stdout.readline().decode().split()  # Serving HTTP on 127.0.0.1 port N
        yield f"http://127.0.0.1:{words[words.index('port') + 1]}"


# ------------------------------------------------------------------ our app, and our server

APP = """
import os, socket, sys
from selfhost.worker.app import MetadataApp
from selfhost.worker.registry import MetadataArtifactRegistry

registry = MetadataArtifactRegistry()
folder = os.environ.get("MODEL_FOLDER") or sys.argv[2]
registry.register_files("m", "_base", {name: os.path.join(folder, name) for name in os.listdir(folder)})
app = MetadataApp(registry)
if __name__ == "__main__":
    import waitress

    waitress.serve(app, sockets=[socket.socket(fileno=int(sys.argv[1]))])
"""


@contextmanager
def serve_app(folder: Path, *command: object) -> Iterator[str]:
    """Run a WSGI server over our app, on a socket that listens before it starts: `FD` in its command."""
    (folder.parent / "model_app.py").write_text(APP)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        fd = listener.fileno()
        with process(*(str(word).replace("FD", str(fd)) for word in command), pass_fds=[fd]):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}{ROUTE}"


def waitress(folder: Path) -> Started:
    """Run our app in waitress."""
    return serve_app(folder, sys.executable, folder.parent / "model_app.py", "FD", folder)


def gunicorn(folder: Path, *options: str) -> Started:
    """Run our app in gunicorn."""
    from gunicorn.config import KNOWN_SETTINGS

    if any("--no-control-socket" in (setting.cli or ()) for setting in KNOWN_SETTINGS):
        options += ("--no-control-socket",)  # otherwise it opens one in the home directory
    places = (
        "--pythonpath",
        folder.parent,
        "--worker-tmp-dir",
        folder.parent,
        "--env",
        f"MODEL_FOLDER={folder}",
    )
    return serve_app(
        folder, sys.executable, "-m", "gunicorn", "-b", "fd://FD", *places, *options, "model_app:app"
    )


def gunicorn_gthread(folder: Path) -> Started:
    """Run our app in gunicorn's threaded worker."""
    return gunicorn(folder, "--threads", "2")


@contextmanager
def embedded(folder: Path) -> Iterator[str]:
    """Run our own server inside this process."""
    registry = MetadataArtifactRegistry()
    files = {name: str(folder / name) for name in FILES}
    with registry.register_files("m", "_base", files), SystemStatusServer(registry, "127.0.0.1", 0) as server:
        yield f"http://{server.address}{ROUTE}"


ORIGINS = {
    "nginx": Origin(nginx, True, "nginx"),
    "lighttpd": Origin(lighttpd, True, "lighttpd"),
    "http.server": Origin(http_server, False),
    "gunicorn-sync": Origin(gunicorn, True),
    "gunicorn-gthread": Origin(gunicorn_gthread, True),
    "waitress": Origin(waitress, True),
    "embedded": Origin(embedded, True),
}


@pytest.fixture(params=ORIGINS)
def origin(request: pytest.FixtureRequest, leaves_nothing: None) -> Origin:
    """Return each kind of server that is installed."""
    found = ORIGINS[request.param]
    if found.program and not found.path:
        pytest.skip(f"{found.program} is not installed")
    return found


@pytest.fixture
def base_url(origin: Origin, tmp_path: Path) -> Iterator[str]:
    """Run the server over a folder with the files."""
    folder = tmp_path / "site" / "files"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    with origin.start(folder) as url:
        yield url


@pytest.fixture
def card(base_url: str) -> ModelDeploymentCard:
    """Return the card of the model that the server has."""
    return make_card(FILES, base_url)


def test_every_file_comes(card: ModelDeploymentCard, tmp_path: Path) -> None:
    """Each file is fetched and verified, the empty and the oddly named one too, and then no more is asked."""
    with MetadataResolver(BlobCache(tmp_path / "cache")) as resolver:
        model = resolver.resolve(card)
        again = resolver.resolve(card)

    for file, _ in model.card.iter_metadata_files():
        assert file.is_local
        assert file.matches(file.path)
    assert len(model.fetched) == len(FILES)
    assert sorted(Path(model.local_dir, name).read_bytes() for name in os.listdir(model.local_dir)) == sorted(
        FILES.values()
    )
    assert again.fetched == ()


def test_broken_transfer_is_continued(origin: Origin, card: ModelDeploymentCard) -> None:
    """What came of a transfer that broke is kept where the server has ranges, else fetched again."""
    assert card.tokenizer is not None
    url, data = card.tokenizer.file.path, FILES[LARGE]
    half, whole = MemorySink(), MemorySink()
    transport = HttpTransport()
    transport.fetch(url, whole, max_bytes=len(data))
    half.write(data[:1_000_001])
    half.validator = whole.validator

    transport.fetch(url, half, max_bytes=len(data))
    transport.close()
    assert bytes(half.data) == data
    assert half.restarts == (0 if origin.can_resume else 1)


def test_changed_file_is_not_continued(card: ModelDeploymentCard) -> None:
    """Bytes of another version are thrown away, whatever the server knows of ranges."""
    assert card.tokenizer is not None
    sink = MemorySink()
    sink.write(b"of yesterday")
    sink.validator = '"yesterday"'
    transport = HttpTransport()

    transport.fetch(card.tokenizer.file.path, sink, max_bytes=len(FILES[LARGE]))
    transport.close()
    assert bytes(sink.data) == FILES[LARGE]
    assert sink.restarts == 1
