"""Fetching from a server that may be anything, within one deadline."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from selfhost.worker.local_model import LocalModel
from selfhost.worker.self_check import fetch

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def dripping() -> Iterator[str]:
    """Serve 100 bytes, ten a second; return the URL."""

    def drip() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            try:
                for _ in range(100):
                    client.sendall(b"x")
                    time.sleep(0.1)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join()


def test_deadline_counts_for_the_whole_fetch(dripping: str) -> None:
    """A server that sends a byte now and then does not keep us longer than was said."""
    began = time.monotonic()
    with pytest.raises(OSError, match="time"):
        fetch(dripping, 101, 0.4)

    assert time.monotonic() - began < 5  # the whole takes ten


def test_reads_no_more_than_asked(serve_bytes: Any, server: Any) -> None:
    """Of a large answer only the beginning is read."""
    assert fetch(f"http://{server.address}{serve_bytes(b'x' * 300_000)}", 100_000, 10) == (
        200,
        b"x" * 100_000,
    )


def test_smallest_file_is_asked_for(
    start_runtime: Any, model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check costs one request for the smallest file."""
    asked: list[int] = []
    monkeypatch.setattr(
        "selfhost.worker.local_model.can_fetch", lambda url, checksum, size, **_: not asked.append(size)
    )
    runtime = start_runtime(self_host_metadata=True)
    model = LocalModel.load(model_dir(tiny__txt=b"1")).attach(runtime.endpoint("a.b.c"))

    assert asked == [min(file.size for file in model.files)] == [1]


# ------------------------------------------------------------------ a worker that guards its port


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_guarded_worker_finds_itself(
    start_runtime: Any,
    model_dir: Any,
    tmp_path: Path,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    isolation: str,
) -> None:
    """It trusts its own certificate and shows its token, also when the host has left its directory since."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("0123456789abcdef")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path("pem")
    guard = {"tls_cert": "pem", "token_file": "token", "isolation": isolation}
    runtime = start_runtime(self_host_metadata=True, **guard)
    monkeypatch.chdir("/")
    model = LocalModel.load(model_dir()).attach(runtime.endpoint("a.b.c"))

    assert model.files[0].url.startswith("https://127.0.0.1:")
    assert caplog.messages == []


def test_certificate_for_another_host_is_found(
    start_runtime: Any, model_dir: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No frontend would take it: the worker says so, and names neither bytes nor token."""
    pem = trustme.CA().issue_cert("other.test").private_key_and_cert_chain_pem
    pem.write_to_path(str(tmp_path / "pem"))
    runtime = start_runtime(self_host_metadata=True, tls_cert=str(tmp_path / "pem"), token="0123456789abcdef")
    LocalModel.load(model_dir()).attach(runtime.endpoint("a.b.c"))

    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert "0123456789abcdef" not in caplog.text


def test_worker_that_wants_client_certificates_does_not_ask_itself(
    start_runtime: Any,
    model_dir: Any,
    tmp_path: Path,
    authority: trustme.CA,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has no certificate to show: what it found would say nothing of frontends."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pem"))
    guard = {"tls_cert": str(tmp_path / "pem"), "tls_client_ca": str(tmp_path / "ca")}
    runtime = start_runtime(self_host_metadata=True, **guard)
    LocalModel.load(model_dir()).attach(runtime.endpoint("a.b.c"))

    assert caplog.messages == []
    assert runtime.status_server.counters().accepted == 0
