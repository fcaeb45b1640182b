"""The files of a server's TLS: what is made of them, what is refused, and that changed ones are taken up."""

from __future__ import annotations

import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from helpers import TIMEOUT

from selfhost.errors import SettingsError
from selfhost.worker import tls_connection
from selfhost.worker.tls import TlsFiles


def write(path: str, *pems: trustme.Blob) -> None:
    """Put PEM blobs into a file, which is replaced in one step."""
    Path(path + ".new").write_bytes(b"".join(pem.bytes() for pem in pems))
    os.replace(path + ".new", path)


# ------------------------------------------------------------------ settings


def test_nothing_set() -> None:
    """Without any of the settings there is no TLS."""
    assert TlsFiles.of() is None
    assert TlsFiles.of(None, None, None) is None


@pytest.mark.parametrize(
    ("files", "variable"),
    [
        ({"key": "k.pem"}, "DYN_SYSTEM_TLS_KEY"),
        ({"client_ca": "c.pem"}, "DYN_SYSTEM_TLS_CLIENT_CA"),
        ({"key": "k.pem", "client_ca": "c.pem"}, "DYN_SYSTEM_TLS_KEY"),
    ],
)
def test_half_a_configuration(files: dict[str, str], variable: str) -> None:
    """A key or a client CA without a certificate is an error that names both settings."""
    with pytest.raises(SettingsError, match=f"{variable} is .*set DYN_SYSTEM_TLS_CERT") as caught:
        TlsFiles.of(**files)

    assert caught.value.variable == "DYN_SYSTEM_TLS_CERT"


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that changes its directory changes nothing of what was meant."""
    monkeypatch.chdir(tmp_path)

    assert TlsFiles.of("a.pem", "b.pem") == TlsFiles(f"{tmp_path}/a.pem", f"{tmp_path}/b.pem", None)


def test_context_is_strict(tls_files: TlsFiles, authority: trustme.CA) -> None:
    """TLS 1.2 and up, ephemeral keys and AEAD alone, nothing compressed or renegotiated; CA as asked for."""
    context = tls_files.context()
    ca_file = tls_files.cert + ".ca"
    authority.cert_pem.write_to_path(ca_file)

    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_CIPHER_SERVER_PREFERENCE):
        assert context.options & option
    for cipher in context.get_ciphers():
        assert cipher["name"].startswith(("TLS_", "ECDHE-"))
        assert cipher["aead"]
    assert context.verify_mode == ssl.CERT_NONE
    assert TlsFiles(tls_files.cert, tls_files.key, ca_file).context().verify_mode == ssl.CERT_REQUIRED


def test_key_in_the_certificate_file(authority: trustme.CA, tmp_path: Path) -> None:
    """One file may hold the certificate, its chain and its key."""
    both = str(tmp_path / "both.pem")
    authority.create_child_ca().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(both)

    TlsFiles(both).check()


# ------------------------------------------------------------------ what cannot be used


@pytest.fixture
def folder(tmp_path: Path, authority: trustme.CA) -> Path:
    """Return a folder with good and bad files; the names tell which."""
    cert, other = (authority.issue_cert("127.0.0.1") for _ in range(2))
    write(str(tmp_path / "cert"), *cert.cert_chain_pems)
    write(str(tmp_path / "key"), cert.private_key_pem)
    write(str(tmp_path / "other-key"), other.private_key_pem)
    key = serialization.load_pem_private_key(cert.private_key_pem.bytes(), None)
    (tmp_path / "encrypted-key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"rosebud"),
        )
    )
    (tmp_path / "garbled-key").write_bytes(cert.private_key_pem.bytes().replace(b"M", b"N", 3))
    (tmp_path / "half-cert").write_bytes(cert.cert_chain_pems[0].bytes()[:300])
    (tmp_path / "text").write_text("not a certificate\n")
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


CERT, KEY, CLIENT_CA = "DYN_SYSTEM_TLS_CERT", "DYN_SYSTEM_TLS_KEY", "DYN_SYSTEM_TLS_CLIENT_CA"
UNUSABLE = [
    (("none", "key"), CERT, "No such file"),
    (("cert", "none"), KEY, "No such file"),
    (("cert", "key", "none"), CLIENT_CA, "No such file"),
    (("directory", "key"), CERT, "no regular file"),
    (("fifo", "key"), CERT, "no regular file"),
    (("cert", "fifo"), KEY, "no regular file"),
    (("nul\0", "key"), CERT, "null"),
    (("text", "key"), CERT, "no certificate in it"),
    (("empty", "key"), CERT, "no certificate in it .0 bytes"),
    (("key", "cert"), CERT, "no certificate in it"),
    (("cert", "cert"), KEY, "no private key in it"),
    (("cert",), KEY, "no private key in it"),
    (
        ("cert", "other-key"),
        KEY,
        "the key belongs to another certificate .with DYN_SYSTEM_TLS_CERT='.*/cert'",
    ),
    (("cert", "encrypted-key"), KEY, "the key is encrypted"),
    (("cert", "garbled-key"), KEY, "PEM|ASN1|DECODER|unsupported"),
    (("half-cert", "key"), CERT, "no certificate in it|PEM"),
    (("cert", "key", "key"), CLIENT_CA, "no certificate in it"),
    (("cert", "key", "empty"), CLIENT_CA, "no certificate in it"),
    (("cert", "key", "half-cert"), CLIENT_CA, "no certificate in it|PEM"),
]


@pytest.mark.parametrize(("names", "variable", "found"), UNUSABLE)
def test_unusable_file(names: tuple[str, ...], variable: str, found: str, folder: Path) -> None:
    """Each file that cannot be used is named, with what was expected and found, and nothing of a key."""
    with pytest.raises(SettingsError, match=f"cannot use '.*' as {variable}: .*found: .*({found})") as caught:
        TlsFiles(*(str(folder / name) for name in names)).check()

    assert caught.value.variable == variable
    secret = (folder / "key").read_text().splitlines()[1]
    assert secret not in str(caught.value)


def test_server_does_not_start_with_unusable_files(folder: Path, start_server: Any) -> None:
    """The error comes from `start`, before anybody could be served without TLS; nothing stays open."""
    with pytest.raises(SettingsError, match="another certificate"):
        start_server(tls=TlsFiles(str(folder / "cert"), str(folder / "other-key")))


# ------------------------------------------------------------------ files that change


@pytest.fixture(autouse=True)
def _look_at_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files as often as a client comes, not once a second."""
    monkeypatch.setattr(tls_connection, "CHECK_SECONDS", 0.0)


@pytest.fixture
def shown(start_tls: Any, connect_tls: Any) -> Callable[[], Any]:
    """Return a function that makes a new connection and returns the certificate that it was shown."""
    server = start_tls()

    def show() -> Any:
        client = connect_tls(server)
        assert client.get("/live").answer().status == 200
        return client.sock.getpeercert(binary_form=True)

    return show


def der(cert: trustme.LeafCert) -> bytes:
    """Return a certificate as it goes over the wire."""
    return ssl.PEM_cert_to_DER_cert(cert.cert_chain_pems[0].bytes().decode())


def test_changed_files_count_for_new_connections(
    start_tls: Any, connect_tls: Any, tls_files: TlsFiles, authority: trustme.CA, caplog: Any
) -> None:
    """A connection that is open goes on, the next one gets the new certificate."""
    server, renewed = start_tls(), authority.issue_cert("127.0.0.1")
    old = connect_tls(server)
    write(tls_files.cert, *renewed.cert_chain_pems)
    write(str(tls_files.key), renewed.private_key_pem)
    new = connect_tls(server)

    assert new.sock.getpeercert(binary_form=True) == der(renewed) != old.sock.getpeercert(binary_form=True)
    assert [client.get("/live").answer().status for client in (old, new)] == [200, 200]
    assert caplog.messages == []


def test_half_changed_files(
    shown: Any, tls_files: TlsFiles, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    """While certificate and key do not fit each other the last pair stays in use, and one warning says so."""
    first, renewed = shown(), authority.issue_cert("127.0.0.1")
    write(tls_files.cert, *renewed.cert_chain_pems)

    assert [shown() for _ in range(5)] == [first] * 5
    (warning,) = caplog.messages
    assert "the last good certificate stays in use: cannot use" in warning
    assert "another certificate" in warning

    write(str(tls_files.key), renewed.private_key_pem)
    assert shown() == der(renewed)
    assert len(caplog.messages) == 1


def test_half_changed_files_and_a_log_that_raises(
    shown: Any, tls_files: TlsFiles, authority: trustme.CA, broken_log: None
) -> None:
    """Whom a warning cannot reach costs no client its connection."""
    first, renewed = shown(), authority.issue_cert("127.0.0.1")
    write(tls_files.cert, *renewed.cert_chain_pems)
    assert shown() == first

    write(str(tls_files.key), renewed.private_key_pem)
    assert shown() == der(renewed)


@pytest.mark.parametrize("which", ["cert", "key"])
def test_files_that_go_and_come_back(
    which: str, shown: Any, tls_files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its files the server goes on with what it has read, and warns once."""
    path = getattr(tls_files, which)
    first = shown()
    os.rename(path, path + ".away")
    assert [shown() for _ in range(3)] == [first] * 3
    os.rename(path + ".away", path)
    assert shown() == first

    assert len(caplog.messages) == 1
    assert "No such file" in caplog.text


@pytest.mark.parametrize("text", [b"", b"-----BEGIN CERTIFICATE-----\nMIIB", b"\xff" * 100])
def test_half_written_file(
    text: bytes, shown: Any, tls_files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate that is being written in place does no harm; each state of it may be warned of once."""
    whole, first = Path(tls_files.cert).read_bytes(), shown()
    Path(tls_files.cert).write_bytes(text)
    assert [shown() for _ in range(3)] == [first] * 3
    Path(tls_files.cert).write_bytes(whole)

    assert shown() == first
    assert len(caplog.messages) == 1


def test_files_that_could_not_be_read_for_a_moment(
    shown: Any, tls_files: TlsFiles, authority: trustme.CA, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong may be no part of the files: they are read again until it is over, with one warning."""
    first, renewed = shown(), authority.issue_cert("127.0.0.1")
    with monkeypatch.context() as patch:
        error = SettingsError("too many open files", variable=CERT, value="", accepted="")
        patch.setattr(TlsFiles, "context", lambda _: raise_(error))
        write(tls_files.cert, *renewed.cert_chain_pems)
        write(str(tls_files.key), renewed.private_key_pem)
        assert [shown() for _ in range(3)] == [first] * 3

    assert shown() == der(renewed)
    assert len(caplog.messages) == 1


def raise_(error: Exception) -> NoReturn:
    """Raise an error where only an expression can stand."""
    raise error


def test_changed_rights_are_a_change(tls_files: TlsFiles) -> None:
    """A file that others may read from now on has changed, though its content and its time have not."""
    stamps = tls_files.stamps()
    status = os.stat(tls_files.cert)
    assert tls_files.stamps() == stamps
    while os.stat(tls_files.cert).st_ctime_ns == status.st_ctime_ns:  # its clock has ticks
        os.chmod(tls_files.cert, 0o600)

    assert os.stat(tls_files.cert).st_mtime_ns == status.st_mtime_ns
    assert tls_files.stamps() != stamps


def test_swapped_link(start_server: Any, connect_tls: Any, authority: trustme.CA, tmp_path: Path) -> None:
    """Files behind a link to a directory that is swapped, as Kubernetes mounts secrets, are taken up."""
    certs = [authority.issue_cert("127.0.0.1") for _ in range(2)]
    for number, cert in enumerate(certs):
        (tmp_path / f"..{number}").mkdir()
        write(str(tmp_path / f"..{number}" / "tls.crt"), *cert.cert_chain_pems)
        write(str(tmp_path / f"..{number}" / "tls.key"), cert.private_key_pem)
    (tmp_path / "..data").symlink_to("..0")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    server = start_server(tls=TlsFiles(str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")))
    shown = [connect_tls(server).sock.getpeercert(binary_form=True)]
    (tmp_path / "..new").symlink_to("..1")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    shown.append(connect_tls(server).sock.getpeercert(binary_form=True))

    assert shown == [der(cert) for cert in certs]


@pytest.mark.parametrize("newest", ["TLSv1_2", "TLSv1_3"])
def test_changed_client_ca(
    newest: str, start_server: Any, connect_tls: Any, tls_files: TlsFiles, authority: trustme.CA
) -> None:
    """Clients of the CA that was replaced are refused from then on, with a ticket of before, too."""
    ca_file = tls_files.cert + ".ca"
    write(ca_file, authority.cert_pem)
    server = start_server(tls=TlsFiles(tls_files.cert, tls_files.key, ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion[newest]
    authority.configure_trust(context)
    authority.issue_cert("frontend.test").configure_cert(context)
    client = connect_tls(server, context)
    assert client.get("/live").answer().status == 200
    write(ca_file, trustme.CA().cert_pem)

    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        connect_tls(server, context).get("/live").rest()
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        resume(server, context, client.sock.session)


def resume(server: Any, context: ssl.SSLContext, session: Optional[ssl.SSLSession]) -> bytes:
    """Ask by a connection that continues a session."""
    sock = socket.create_connection((server.host, server.port), timeout=TIMEOUT)
    with context.wrap_socket(sock, server_hostname=server.host, session=session) as resumed:
        resumed.sendall(b"GET /live HTTP/1.0\r\n\r\n")
        return resumed.recv(100)


def test_files_are_looked_at_once_a_second(
    start_tls: Any, connect_tls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred clients in a moment cost one look, or a second one where a second ends meanwhile."""
    monkeypatch.undo()
    looks: list[object] = []
    stamps = TlsFiles.stamps
    monkeypatch.setattr(TlsFiles, "stamps", lambda self: (looks.append(self), stamps(self))[1])
    server, started = start_tls(), time.monotonic()
    for _ in range(100):
        connect_tls(server).close()

    assert len(looks) <= 4 + (time.monotonic() - started) / tls_connection.CHECK_SECONDS
