"""HttpTransport over TLS: whom it believes, and that it never goes on without.

The certificates are made for the test; all of them are for loopback names and addresses.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import trustme
import wire
from helpers import MemorySink

import selfhost
from selfhost.errors import FetchError, FetchTimeout, SettingsError, TLSFailed
from selfhost.frontend.http_tls import (
    BROKEN_OFF,
    CLIENT_REFUSED,
    CLIENT_WANTED,
    EXPIRED,
    NO_TLS,
    NOT_YET_VALID,
    OLD_TLS,
    REFUSED,
    TLS_WANTED,
    UNKNOWN_CA,
    WRONG_HOST,
    ClientTls,
)
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.transport_http import HttpTransport, tls_context
from selfhost.frontend.transports import default_transports

BODY = b"over TLS"
QUICK = FetchLimits(connect_seconds=0.5, read_seconds=0.5)

Serve = Callable[..., wire.WireServer]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return the certificate authority that the client trusts."""
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file with its certificate."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def serve(leaves_nothing: None) -> Iterator[Serve]:
    """Start TLS servers (authority, names, answers); they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(issuer: trustme.CA, *names: str, answer: Any = None, **options: Any) -> wire.WireServer:
            context = server_context(issuer, *names, **options)
            return stack.enter_context(wire.WireServer(answer or wire.ok(BODY), tls=context))

        yield start


def server_context(issuer: trustme.CA, *names: str, **options: Any) -> ssl.SSLContext:
    """Return a server's context with a certificate for `names` or addresses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issuer.issue_cert(*names, **options).configure_cert(context)
    return context


def fetch(url: str, context: ssl.SSLContext) -> bytes:
    """Fetch with a transport of its own."""
    sink = MemorySink()
    with HttpTransport(limits=QUICK, tls=context) as transport:
        transport.fetch(url, sink, max_bytes=1000)
    return bytes(sink.data)


def refusal(server: wire.WireServer, context: ssl.SSLContext, *, host: str = "127.0.0.1") -> str:
    """Fetch, which must fail for a reason that stays; return what is said. Nothing was requested."""
    with pytest.raises(FetchError, match="cannot fetch") as caught:
        fetch(server.url.replace("127.0.0.1", host), context)
    assert not caught.value.is_transient
    assert server.requests == []
    assert server.connections == 1, "it was tried again, or without TLS"
    return str(caught.value)


def test_own_authority_is_trusted(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """A certificate of the own CA is accepted for an address and for a name; connections are kept."""
    server = serve(authority, "127.0.0.1", "localhost")
    with HttpTransport(tls=tls_context(ca_file=ca_file)) as transport:
        for _ in range(3):
            sink = MemorySink()
            transport.fetch(server.url, sink, max_bytes=1000)

    assert bytes(sink.data) == BODY
    assert (server.connections, server.handshakes) == (1, 1)


def test_large_file(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """A file of many TLS records arrives whole."""
    body = bytes(range(256)) * 10_000
    server = serve(authority, "127.0.0.1", answer=wire.ok(body))
    sink = MemorySink()
    with HttpTransport(tls=tls_context(ca_file=ca_file)) as transport:
        transport.fetch(server.url, sink, max_bytes=len(body))

    assert bytes(sink.data) == body


# catalogue 55
def test_wrong_host(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """A certificate for another name or address is refused, and the message says so."""
    context = tls_context(ca_file=ca_file)

    assert "ddress mismatch" in refusal(serve(authority, "127.0.0.2"), context)
    assert "ostname mismatch" in refusal(serve(authority, "other.test"), context, host="localhost")


# catalogue 55
def test_expired_certificate(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """A certificate of the past is refused."""
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=2)
    server = serve(authority, "127.0.0.1", not_before=past - datetime.timedelta(days=9), not_after=past)

    assert "certificate has expired" in refusal(server, tls_context(ca_file=ca_file))


# catalogue 55
def test_unknown_authority(serve: Serve, ca_file: Path) -> None:
    """A certificate of a CA that nobody knows is refused, by the own CA and by the system's roots."""
    context = tls_context(ca_file=ca_file)

    assert "unable to get local issuer" in refusal(serve(trustme.CA(), "127.0.0.1"), context)
    assert "unable to get local issuer" in refusal(serve(trustme.CA(), "127.0.0.1"), tls_context())


# catalogue 55
@pytest.mark.parametrize("newest", ["TLSv1", "TLSv1_1"])
def test_old_protocols(serve: Serve, authority: trustme.CA, ca_file: Path, newest: str) -> None:
    """A server that speaks nothing newer than TLS 1.1 is refused."""
    server_tls = server_context(authority, "127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server_tls.minimum_version = ssl.TLSVersion.TLSv1
        server_tls.maximum_version = ssl.TLSVersion[newest]
    server_tls.set_ciphers("ALL:@SECLEVEL=0")
    with wire.WireServer(wire.ok(BODY), tls=server_tls) as server:
        message = refusal(server, tls_context(ca_file=ca_file))

    assert "PROTOCOL" in message


def test_client_certificate(serve: Serve, authority: trustme.CA, ca_file: Path, tmp_path: Path) -> None:
    """A server that asks for a client's certificate gets the one that is set, whole or in two files."""
    cert = authority.issue_cert("frontend.test")
    for name, blobs in (("chain", cert.cert_chain_pems), ("key", [cert.private_key_pem])):
        (tmp_path / name).write_bytes(b"".join(blob.bytes() for blob in blobs))
    cert.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both"))
    server_tls = server_context(authority, "127.0.0.1")
    server_tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server_tls)
    with wire.WireServer(wire.ok(BODY), tls=server_tls) as server:
        for files in ({"cert_file": "both"}, {"cert_file": "chain", "key_file": "key"}):
            options = {option: tmp_path / name for option, name in files.items()}
            assert fetch(server.url, tls_context(ca_file=ca_file, **options)) == BODY

        with pytest.raises(FetchError) as caught:
            fetch(server.url, tls_context(ca_file=ca_file))

    assert len(server.requests) == 2
    assert "cannot fetch" in str(caught.value)


def test_server_without_tls(leaves_nothing: None, ca_file: Path) -> None:
    """A plain server behind an https URL is an error; nothing is asked of it in the clear."""
    with wire.WireServer(wire.ok(BODY)) as server:
        server.url = server.url.replace("http:", "https:")
        with pytest.raises(FetchError, match="TLS handshake"):
            fetch(server.url, tls_context(ca_file=ca_file))

    assert server.requests == []


def test_handshake_that_does_not_come(leaves_nothing: None, ca_file: Path) -> None:
    """A server that is silent in place of a handshake costs `connect_seconds`."""
    with wire.WireServer(wire.ok()) as server, pytest.raises(FetchTimeout) as caught:
        fetch(server.url.replace("http:", "https:"), tls_context(ca_file=ca_file))

    assert (caught.value.phase, caught.value.seconds) == ("tls", 0.5)


def test_truncated_body(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """A connection that is cut within the body, with TLS's goodbye or without, is a broken transfer."""
    cut = wire.closing(wire.head("Content-Length: 100") + b"some")
    server = serve(authority, "127.0.0.1", answer=cut)
    sink = MemorySink()
    with HttpTransport(tls=tls_context(ca_file=ca_file)) as transport, pytest.raises(FetchError) as caught:
        transport.fetch(server.url, sink, max_bytes=1000)

    assert caught.value.is_transient
    assert bytes(sink.data) == b"some"


def test_silence_within_tls(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """The limits hold on encrypted connections, too."""
    server = serve(authority, "127.0.0.1", answer=wire.silent_after(wire.head("Content-Length: 9") + b"x"))
    with pytest.raises(FetchTimeout) as caught:
        fetch(server.url, tls_context(ca_file=ca_file))

    assert caught.value.phase == "body"


def test_connection_with_bytes_left_is_not_kept(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """Bytes after the answer are noticed though they are decrypted already."""

    def play(sock: socket.socket, closing: threading.Event) -> None:
        sock.sendall(wire.head("Content-Length: 12000"))
        sock.sendall(b"y" * 12001)  # one record, whose end nobody reads
        closing.wait(wire.SECONDS)

    server = serve(authority, "127.0.0.1", answer=play)
    with HttpTransport(tls=tls_context(ca_file=ca_file)) as transport:
        for _ in range(2):
            transport.fetch(server.url, MemorySink(), max_bytes=100_000)

    assert server.connections == 2


def test_name_with_a_final_dot(
    authority: trustme.CA, ca_file: Path, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dot of a fully qualified name stands in no certificate, and is not sent (RFC 6066, 3)."""
    names: list[Optional[str]] = []
    context = server_context(authority, "worker.test")
    context.sni_callback = lambda sock, name, context: names.append(name)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    with wire.WireServer(wire.ok(BODY), tls=context) as server:
        url = server.url.replace("127.0.0.1", "worker.test.")

        assert fetch(url, tls_context(ca_file=ca_file)) == BODY
    assert names == ["worker.test"]


# ------------------------------------------------------------------ what is wrong, in a word


def test_problems_of_certificates(serve: Serve, authority: trustme.CA, ca_file: Path) -> None:
    """What is wrong with the server's certificate is told as a word, too."""
    now, days = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=2)
    past = {"not_before": now - 2 * days, "not_after": now - days}
    coming = {"not_before": now + days, "not_after": now + 2 * days}
    found = {
        problem_with(serve(authority, "127.0.0.1", **past), ca_file): EXPIRED,
        problem_with(serve(authority, "127.0.0.1", **coming), ca_file): NOT_YET_VALID,
        problem_with(serve(authority, "127.0.0.2"), ca_file): WRONG_HOST,
        problem_with(serve(trustme.CA(), "127.0.0.1"), ca_file): UNKNOWN_CA,
    }

    assert all(problem == expected for problem, expected in found.items())
    assert len(found) == 4


def test_problems_of_client_certificates(authority: trustme.CA, ca_file: Path, tmp_path: Path) -> None:
    """A certificate that is missing, or of an authority that the server does not trust, is told apart."""
    trustme.CA().issue_cert("frontend.test").private_key_and_cert_chain_pem.write_to_path(tmp_path / "other")
    for newest, missing in (("TLSv1_3", CLIENT_WANTED), ("TLSv1_2", REFUSED)):
        server_tls = server_context(authority, "127.0.0.1")
        server_tls.maximum_version = ssl.TLSVersion[newest]
        server_tls.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(server_tls)
        with wire.WireServer(wire.ok(BODY), tls=server_tls) as server:
            assert problem_with(server, ca_file) in (missing, "cut")
            assert problem_with(server, ca_file, tmp_path / "other") in (CLIENT_REFUSED, "cut")
            assert server.requests == []


@pytest.mark.parametrize(
    ("greeting", "problem"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", NO_TLS),
        (b"220 mail.test ESMTP\r\n", NO_TLS),
        (b"\x15\x03\x01\x00\x02\x02\x46", OLD_TLS),
        (b"\x15\x03\x01\x00\x02\x02\x28", REFUSED),
        (b"", BROKEN_OFF),
    ],
)
def test_problems_of_the_other_side(
    leaves_nothing: None, ca_file: Path, greeting: bytes, problem: str
) -> None:
    """Who speaks plain HTTP, refuses to talk or hangs up is told as such."""
    with peer_that_says(greeting) as port, pytest.raises(TLSFailed) as caught:
        fetch(f"https://127.0.0.1:{port}/f", tls_context(ca_file=ca_file))

    assert caught.value.problem == problem
    assert caught.value.is_transient == (problem == BROKEN_OFF)


def test_plain_http_to_a_tls_server(leaves_nothing: None) -> None:
    """Who speaks TLS where plain HTTP was meant says so by an alert."""
    with peer_that_says(b"\x15\x03\x01\x00\x02\x02\x46") as port, pytest.raises(TLSFailed) as caught:
        fetch(f"http://127.0.0.1:{port}/f", tls_context())

    assert caught.value.problem == TLS_WANTED


@contextlib.contextmanager
def peer_that_says(greeting: bytes) -> Iterator[int]:
    """Answer whatever one client says first, and hang up; give the port."""

    def greet() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1 << 16)  # all that there is, so that hanging up is no reset
            sock.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def problem_with(server: wire.WireServer, ca_file: Path, cert_file: Optional[Path] = None) -> str:
    """Fetch, which must fail; return the word for why, "cut" where the reason was lost on the way."""
    with pytest.raises(FetchError) as caught:
        fetch(server.url, tls_context(ca_file=ca_file, cert_file=cert_file))
    if isinstance(caught.value, TLSFailed):
        return caught.value.problem
    assert re.search("reset|EOF", str(caught.value))
    return "cut"


# ------------------------------------------------------------------ files that are renewed


def test_renewed_files_count_for_new_connections(
    authority: trustme.CA, leaves_nothing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A transport that lives long shows the new certificate; half-renewed files leave the old one in use."""
    names: list[Any] = []
    server_tls = server_context(authority, "127.0.0.1")
    server_tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server_tls)

    def answer(sock: Any, closing: threading.Event) -> None:
        names.append(dict(field[0] for field in sock.getpeercert()["subject"]).get("commonName"))
        sock.sendall(wire.ok(BODY))  # and close: each fetch has a connection of its own

    def renew(cert: trustme.LeafCert, *, with_key: bool = True) -> None:
        blobs = {"cert": b"".join(blob.bytes() for blob in cert.cert_chain_pems)}
        if with_key:
            blobs["key"] = cert.private_key_pem.bytes()
        for name, data in blobs.items():
            (tmp_path / "new").write_bytes(data)
            os.replace(tmp_path / "new", tmp_path / name)

    authority.cert_pem.write_to_path(tmp_path / "ca")
    renew(authority.issue_cert("a.test", common_name="first"))
    tls = ClientTls(tmp_path / "ca", tmp_path / "cert", tmp_path / "key")
    with wire.WireServer(answer, tls=server_tls) as server, HttpTransport(limits=QUICK, tls=tls) as transport:
        for number in range(4):
            transport.fetch(server.url, MemorySink(), max_bytes=100)
            if number == 1:
                renew(authority.issue_cert("b.test", common_name="half"), with_key=False)
            elif number == 2:
                renew(authority.issue_cert("c.test", common_name="last"))

    assert names == ["first", "first", "first", "last"]
    (record,) = caplog.records
    assert "what was read before stays in use" in record.getMessage()


def test_files_are_read_for_the_first_https_url(tmp_path: Path) -> None:
    """They may come late; half a configuration is an error at once."""
    tls = ClientTls(tmp_path / "ca")
    with pytest.raises(SettingsError, match="ca_file"):
        tls.context()
    with pytest.raises(SettingsError, match="DYN_MDC_TLS_CERT"):
        ClientTls(key_file=tmp_path / "key")


def test_context_is_made_once(ca_file: Path) -> None:
    """As long as the files stay as they are."""
    tls = ClientTls(ca_file)

    assert tls.context() is tls.context()


def test_files_of_the_environment(
    serve: Serve, authority: trustme.CA, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transports that are given no files use those of the environment."""
    server = serve(authority, "127.0.0.1")
    monkeypatch.setenv("DYN_MDC_TLS_CA", str(ca_file))
    table = default_transports()
    sink = MemorySink()
    table["https"].fetch(server.url, sink, max_bytes=100)
    table["https"].close()

    assert bytes(sink.data) == BODY
    monkeypatch.setenv("DYN_MDC_TLS_KEY", "key.pem")
    with pytest.raises(SettingsError, match=r"'key\.pem' without a certificate"):
        default_transports()


# ------------------------------------------------------------------ contexts


def test_context_is_strict() -> None:
    """Certificates and host names are checked, from TLS 1.2 on, against the system's roots."""
    context = tls_context()

    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_minimum_is_not_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS 1.2 is the least also where interpreter and system would allow less."""

    make = ssl.SSLContext.__new__

    def make_lax(kind: type[ssl.SSLContext], protocol: int) -> ssl.SSLContext:
        context = make(kind, protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
        return context

    monkeypatch.setattr(ssl.SSLContext, "__new__", make_lax)

    assert tls_context().minimum_version == ssl.TLSVersion.TLSv1_2


def test_own_authority_replaces_the_roots(ca_file: Path) -> None:
    """With an own CA nobody else's certificates count."""
    assert tls_context(ca_file=ca_file).cert_store_stats()["x509_ca"] == 1


def test_keys_are_never_logged(
    serve: Serve, authority: trustme.CA, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSLKEYLOGFILE, which opens the traffic to whoever reads that file, is ignored."""
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))

    assert fetch(serve(authority, "127.0.0.1").url, tls_context(ca_file=ca_file)) == BODY
    assert not log.exists()


@pytest.mark.parametrize(
    ("options", "named", "found"),
    [
        ({"key_file": "empty"}, "cert_file", "without a certificate"),
        ({"cert_file": "empty"}, "cert_file", "no certificate in it (0 bytes)"),
        ({"cert_file": "missing"}, "cert_file", "No such file or directory"),
        ({"cert_file": "chain"}, "cert_file", "no private key in it"),
        (
            {"cert_file": "chain", "key_file": "other"},
            "cert_file",
            "a key that belongs to another certificate; its key_file is '",
        ),
        ({"cert_file": "chain", "key_file": "torn"}, "cert_file", "/torn'"),
        ({"cert_file": "chain", "key_file": "missing"}, "key_file", "No such file or directory"),
        ({"cert_file": "chain", "key_file": "chain"}, "key_file", "no private key in it"),
        ({"cert_file": "locked"}, "cert_file", "the key is encrypted"),
        ({"cert_file": "torn"}, "cert_file", "found: damaged PEM"),
        ({"ca_file": "empty"}, "ca_file", "no certificate in it (0 bytes)"),
        ({"ca_file": "missing"}, "ca_file", "No such file or directory"),
        ({"ca_file": "FIFO"}, "ca_file", "it is no regular file"),
        ({"ca_file": "torn"}, "ca_file", "found: damaged PEM"),
    ],
)
def test_half_a_configuration(
    options: dict[str, str], named: str, found: str, authority: trustme.CA, tmp_path: Path
) -> None:
    """A file that is missing, not PEM, does not fit or asks for a password is refused, and named."""
    cert = authority.issue_cert("frontend.test")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "chain").write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    (tmp_path / "other").write_bytes(authority.issue_cert("other.test").private_key_pem.bytes())
    (tmp_path / "locked").write_bytes(_with_encrypted_key(cert))
    (tmp_path / "torn").write_bytes(b"-----BEGIN CERTIFICATE-----\nAA\n-----BEGIN PRIVATE KEY-----\nAA")
    os.mkfifo(tmp_path / "FIFO")
    with pytest.raises(SettingsError) as caught:
        tls_context(**{option: tmp_path / name for option, name in options.items()})

    assert caught.value.variable == named
    assert f"DYN_MDC_TLS_{named[:-5].upper()}" in str(caught.value)
    assert found in str(caught.value)


def test_no_file_is_not_the_one_of_the_certificate(authority: trustme.CA, tmp_path: Path) -> None:
    """A key that is given as an empty path is missing, whatever else holds one."""
    both = tmp_path / "both"
    both.write_bytes(authority.issue_cert("frontend.test").private_key_and_cert_chain_pem.bytes())

    with pytest.raises(SettingsError, match=r"cannot use '' as key_file .*: No such file"):
        tls_context(cert_file=both, key_file="")


def _with_encrypted_key(cert: trustme.LeafCert) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(cert.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    return bytes(encrypted + cert.cert_chain_pems[0].bytes())


def test_nothing_of_http_is_loaded_before_the_first_fetch() -> None:
    """A frontend whose cache holds everything pays for neither http.client nor roots."""
    code = (
        "import sys; from selfhost.frontend.transport_http import HttpTransport; HttpTransport().close();"
        "print({'http.client', 'ssl'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout == "set()\n"
