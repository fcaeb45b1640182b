"""What the worker's tests share: servers and runtimes that end with their test, raw clients, a leak check."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import urlsplit

import pytest
import trustme
from helpers import AT_ONCE, TIMEOUT, poll_until

import selfhost
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.demo_model import write_demo_model
from selfhost.discovery import Bucket, Event, MemoryDiscovery, Publication, RecordKey
from selfhost.errors import DiscoveryError
from selfhost.settings import Settings
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.runtime import DistributedRuntime
from selfhost.worker.server import SystemStatusServer
from selfhost.worker.tls import TlsFiles


class RawAnswer(NamedTuple):
    """One answer as it came; field names in lower case."""

    status: int
    fields: dict[str, str]
    body: bytes


class RawClient:
    """A plain socket to a server, and the least that is needed to read answers from it."""

    def __init__(self, server: SystemStatusServer, receive_buffer: int) -> None:
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        self.sock = socket.socket(family)
        self.sock.settimeout(TIMEOUT)
        if receive_buffer:  # a small one, so that a large answer has to wait for us
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect((server.host, server.port))
        self._file = self.sock.makefile("rb")

    def send(self, data: bytes) -> RawClient:
        """Send all of `data`."""
        self.sock.sendall(data)
        return self

    def get(self, target: str, *lines: str, method: str = "GET") -> RawClient:
        """Send one HTTP/1.1 request with more header lines."""
        return self.send("\r\n".join((f"{method} {target} HTTP/1.1", "Host: x", *lines, "", "")).encode())

    def answer(self, *, body: bool = True) -> RawAnswer:
        """Read one answer; `body` False for the answer to a HEAD."""
        status = int(self._file.readline().split()[1])
        fields = {}
        for line in iter(self._file.readline, b"\r\n"):
            name, _, value = line.decode("latin-1").partition(":")
            assert name.lower() not in fields, f"{name} came twice"
            fields[name.lower()] = value.strip()
        size = int(fields.get("content-length", "0")) if body else 0
        return RawAnswer(status, fields, self._file.read(size))

    def read_some(self, size: int) -> bytes:
        """Read exactly `size` bytes of whatever comes."""
        return self._file.read(size)

    def rest(self) -> bytes:
        """Read up to the end of the connection; ConnectionResetError where that is no clean one."""
        return self._file.read()

    def close(self) -> None:
        """Hang up; harmless when repeated."""
        self._file.close()
        self.sock.close()


@pytest.fixture
def wait_until() -> Callable[..., bool]:
    """Return the function that waits for a condition."""
    return poll_until


@pytest.fixture
def isolation() -> str:
    """Return where the test's servers run; test modules with tests for both have a fixture of this name."""
    return "thread"


@pytest.fixture
def start_server(
    leaves_nothing: None, registry: MetadataArtifactRegistry, isolation: str
) -> Iterator[Callable[..., SystemStatusServer]]:
    """Start servers over the test's registry; they end with the test, and what is registered goes."""
    servers: list[SystemStatusServer] = []

    def start(*address: Any, **options: Any) -> SystemStatusServer:
        servers.append(SystemStatusServer(registry, *address, **{"isolation": isolation, **options}))
        return servers[-1].start()

    yield start
    for server in servers:
        server.close(timeout=0.1)
    for artifact in registry:  # pytest still holds the registry when the descriptors are counted
        registry.unregister(artifact.slug, artifact.suffix)


@pytest.fixture
def server(start_server: Callable[..., SystemStatusServer]) -> SystemStatusServer:
    """Return one running server."""
    return start_server()


@pytest.fixture
def connect(leaves_nothing: None) -> Iterator[Callable[..., RawClient]]:
    """Connect raw clients to a server; they hang up with the test."""
    clients: list[RawClient] = []

    def connect_to(server: SystemStatusServer, *, receive_buffer: int = 0) -> RawClient:
        clients.append(RawClient(server, receive_buffer))
        return clients[-1]

    yield connect_to
    for client in clients:
        client.close()


@pytest.fixture
def serve_bytes(registry: MetadataArtifactRegistry, tmp_path: Path) -> Callable[..., str]:
    """Register bytes as a file of a model `m`; return the path of its URL."""

    def serve(data: bytes, name: str = "f.json") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return registry.register("m", "_base", name, path).targets[name]

    return serve


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process of its own, which sees this very package."""

    def run(code: str, *args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])}
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


class BrokenHandler(logging.Handler):
    """A handler of the host's that lets the threads of the package know that its sink is down."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise, unless it is the host itself that logs."""
        if str(record.threadName).startswith("selfhost-"):
            raise RuntimeError("the sink is down")


@pytest.fixture
def broken_log() -> Iterator[None]:
    """Let whatever a thread of the package logs raise, that for debugging, too."""
    package, handler = logging.getLogger("selfhost"), BrokenHandler()
    level, propagates = package.level, package.propagate
    package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    package.propagate = False
    yield
    package.removeHandler(handler)
    package.setLevel(level)
    package.propagate = propagates


# ------------------------------------------------------------------ models and runtimes


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., str]:
    """Write a small model directory, with more files or other contents where given; return its path."""

    def make(name: str = "model", **files: bytes) -> str:
        folder = tmp_path / name
        write_demo_model(str(folder))
        for filename, content in files.items():
            (folder / filename.replace("__", ".")).write_bytes(content)
        return str(folder)

    return make


def get_url(url: str) -> tuple[int, bytes]:
    """GET a URL with a client that knows nothing of us; return status and body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture
def fetch() -> Callable[[str], tuple[int, bytes]]:
    """Return the function that GETs a URL."""
    return get_url


@pytest.fixture
def fetch_files() -> Callable[[ModelDeploymentCard], dict[str, bytes]]:
    """Return a function that fetches and verifies each file of a card, as a frontend does."""

    def fetch_all(card: ModelDeploymentCard) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for file, _ in card.iter_metadata_files():
            status, data = get_url(file.path)
            assert (status, Checksum.of(data)) == (200, file.checksum), file.path
            assert file.basename not in found, "two files of one name end up in one directory"
            found[str(file.basename)] = data
        return found

    return fetch_all


class SpyDiscovery:
    """A discovery of one process that tells what happens when, and fails when told to."""

    name = "spy"

    def __init__(self) -> None:
        self.inner = MemoryDiscovery()
        self.is_closed = False
        self.fail_on: Optional[Bucket] = None  # publishing in this bucket raises
        self.on_call: Callable[[str, Bucket], object] = lambda action, bucket: None

    def publish(self, bucket: Bucket, key: RecordKey, text: str) -> Publication:
        """Publish, unless told to fail."""
        if bucket is self.fail_on:
            raise DiscoveryError("told to fail", backend=self.name, key=str(key))
        self.on_call("publish", bucket)
        inner = self.inner.publish(bucket, key, text)

        def withdraw() -> None:
            inner.withdraw()
            self.on_call("withdraw", bucket)

        return Publication(bucket, key, withdraw=withdraw, replace=inner.replace)

    def records(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return what is published."""
        return self.inner.records(bucket)

    def watch(self, bucket: Bucket, **options: Any) -> Iterator[Event]:
        """Yield the events of the store."""
        return self.inner.watch(bucket, **options)

    def close(self) -> None:
        """Remember that this was called."""
        self.is_closed = True
        self.inner.close()

    def __enter__(self) -> SpyDiscovery:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def cards(self) -> dict[str, dict[str, Any]]:
        """Return the JSON of each published card, by key."""
        return {str(key): json.loads(text)["card_json"] for key, text in self.records(Bucket.MODELS).items()}

    def card(self) -> ModelDeploymentCard:
        """Return the one card that is published, as a frontend reads it."""
        (card,) = self.cards().values()
        return ModelDeploymentCard.from_json(json.dumps(card))

    def is_empty(self) -> bool:
        """Tell whether no record of any kind is published."""
        return not any(self.records(bucket) for bucket in Bucket)


@pytest.fixture
def spy() -> SpyDiscovery:
    """Return a discovery that tells what happens."""
    return SpyDiscovery()


@pytest.fixture
def start_runtime(
    leaves_nothing: None, registry: MetadataArtifactRegistry, spy: SpyDiscovery
) -> Iterator[Callable[..., DistributedRuntime]]:
    """Start runtimes with the test's registry and discovery; options are settings. They end with the test."""
    runtimes: list[DistributedRuntime] = []

    def start(**options: Any) -> DistributedRuntime:
        settings = Settings(**{"system_host": "127.0.0.1", "system_port": 0, **options})
        runtimes.append(DistributedRuntime(settings, registry=registry, discovery=spy))
        return runtimes[-1].start()

    yield start
    for runtime in runtimes:
        runtime.close(timeout=0.1)
    for artifact in registry:
        registry.unregister(artifact.slug, artifact.suffix)


@pytest.fixture
def runtime(start_runtime: Callable[..., DistributedRuntime]) -> DistributedRuntime:
    """Return a runtime that self-hosts."""
    return start_runtime(self_host_metadata=True)


# ------------------------------------------------------------------ TLS


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Return the certificate authority of servers and clients."""
    return trustme.CA()


@pytest.fixture
def tls_files(authority: trustme.CA, tmp_path: Path) -> TlsFiles:
    """Return the files of a server on loopback."""
    files = TlsFiles(str(tmp_path / "server.pem"), str(tmp_path / "server.key"))
    write_certificate(files, authority.issue_cert("127.0.0.1"))
    return files


def write_certificate(files: TlsFiles, cert: trustme.LeafCert) -> None:
    """Put a certificate and its key into the files of a server."""
    Path(files.cert).write_bytes(b"".join(pem.bytes() for pem in cert.cert_chain_pems))
    Path(files.key or files.cert).write_bytes(cert.private_key_pem.bytes())


@pytest.fixture
def start_tls(
    start_server: Callable[..., SystemStatusServer], tls_files: TlsFiles
) -> Callable[..., SystemStatusServer]:
    """Start servers with these files; they end with the test."""
    return functools.partial(start_server, tls=tls_files)


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return the context of a client that trusts the authority and has no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def connect_tls(connect: Any, client_tls: ssl.SSLContext) -> Callable[..., RawClient]:
    """Connect raw clients by TLS, with a context of their own where given; they hang up with the test."""

    def connect_to(
        server: SystemStatusServer, context: ssl.SSLContext = client_tls, **options: Any
    ) -> RawClient:
        client: RawClient = connect(server, **options)
        client._file.close()
        client.sock = context.wrap_socket(client.sock, server_hostname=server.host)
        client._file = client.sock.makefile("rb")
        return client

    return connect_to


@pytest.fixture
def serves_another(connect: Any, connect_tls: Any, serve_bytes: Any) -> Callable[[SystemStatusServer], bool]:
    """Return a function that makes five requests as a client that means well, each within moments."""
    body = b'{"a": 1}'
    target = serve_bytes(body, "other.json")

    def serve(server: SystemStatusServer) -> bool:
        for _ in range(5):
            started = time.monotonic()
            client = (connect_tls if server.scheme == "https" else connect)(server).get(target)
            assert client.answer().body == body
            client.close()
            assert time.monotonic() - started < AT_ONCE
        return True

    return serve


# ------------------------------------------------------------------ registries that processes share


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return the path of a folder that is not there yet."""
    return str(tmp_path / "shared")


@pytest.fixture
def shared(leaves_nothing: None, folder: str) -> Iterator[Callable[[], MetadataArtifactRegistry]]:
    """Open registries of this process on the folder, each like another process; closed with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(MetadataArtifactRegistry(shared=folder)))
