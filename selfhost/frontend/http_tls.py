"""TLS on a connected socket: whom it believes, what it shows, and the handshake under a deadline."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, NoReturn, Optional, Union

from ..errors import FetchError, SettingsError, TLSFailed, shown
from .renewable import Renewable
from .transport import Watch
from .waits import on_socket

if TYPE_CHECKING:
    import ssl

    from .http_dial import Origin

_Path = Union[str, "os.PathLike[str]"]

# What `TLSFailed.problem` may be: of the server's certificate, of the client's, of the conversation.
EXPIRED, NOT_YET_VALID, WRONG_HOST = "expired", "not yet valid", "wrong host"
UNKNOWN_CA, BAD_CERTIFICATE = "unknown authority", "bad certificate"
CLIENT_WANTED, CLIENT_REFUSED = "client certificate wanted", "client certificate refused"
NO_TLS, TLS_WANTED = "no TLS", "TLS wanted"
OLD_TLS, REFUSED = "no common TLS version", "handshake refused"
BROKEN_OFF, OTHER = "broken off", "other"

_VERIFY_CODES = {9: NOT_YET_VALID, 10: EXPIRED, 62: WRONG_HOST, 64: WRONG_HOST}  # X509_V_ERR_..., x509_vfy.h
_VERIFY_CODES |= dict.fromkeys((2, 18, 19, 20, 21), UNKNOWN_CA)
_REASONS = {  # OpenSSL's, of which releases have different ones for the same
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": CLIENT_WANTED,
    "SSLV3_ALERT_BAD_CERTIFICATE": CLIENT_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": CLIENT_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": CLIENT_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": CLIENT_REFUSED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": CLIENT_REFUSED,
    "TLSV1_ALERT_UNKNOWN_CA": CLIENT_REFUSED,
    "TLSV1_ALERT_ACCESS_DENIED": CLIENT_REFUSED,
    "TLSV1_ALERT_DECRYPT_ERROR": CLIENT_REFUSED,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": REFUSED,
    "WRONG_VERSION_NUMBER": NO_TLS,
    "PACKET_LENGTH_TOO_LONG": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "HTTP_REQUEST": NO_TLS,
    "UNSUPPORTED_PROTOCOL": OLD_TLS,
    "TLSV1_ALERT_PROTOCOL_VERSION": OLD_TLS,
}


_FILES = {  # how else each is set, and what it is to be
    "ca_file": ("--ca, DYN_MDC_TLS_CA", "a PEM file of certificates"),
    "cert_file": ("--cert, DYN_MDC_TLS_CERT", "PEM files of a certificate and its unencrypted key"),
    "key_file": ("--key, DYN_MDC_TLS_KEY", "a PEM file of the certificate's unencrypted key"),
}
_CERTIFICATE, _KEY = b"CERTIFICATE-----", b"PRIVATE KEY-----"
_MAX_PEM_BYTES = 4 << 20  # a bundle of every public CA has 0.2 MB


def secure(sock: socket.socket, origin: Origin, watch: Watch, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Shake hands on a connected socket; closes it and raises FetchTimeout or FetchError if that fails."""
    seconds = watch.limits.connect_seconds
    try:
        name = origin.host.rstrip(".")
        secured = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        sock = secured  # the one that was wrapped has no descriptor any more
        on_socket(secured, secured.do_handshake, watch.allow(seconds))
        return secured
    except BaseException as err:
        sock.close()
        if isinstance(err, socket.timeout):
            raise watch.timeout("tls", seconds, "no TLS handshake") from None
        if isinstance(err, (OSError, ValueError)):  # ValueError: a host that no certificate can bear
            raise _tls_failed(watch, err, "the TLS handshake failed") from err
        raise


def broken(watch: Watch, err: Exception) -> FetchError:
    """Return the error for a connection that broke; worth another try unless TLS itself was refused."""
    import ssl

    what = "the connection broke"
    if isinstance(err, ssl.SSLError) and not _is_cut(err):
        return _tls_failed(watch, err, what)
    return watch.error(f"{what}: {_text(err)}", is_transient=isinstance(err, OSError))


def _tls_failed(watch: Watch, err: Exception, what: str) -> TLSFailed:
    problem, why = _problem_of(err)
    message = str(watch.error(f"{what}: {why}"))
    return TLSFailed(message, url=watch.url, problem=problem, is_transient=problem == BROKEN_OFF)


def _problem_of(err: Exception) -> tuple[str, str]:
    """Return what is wrong, as one of the words above and as a text."""
    import ssl

    if isinstance(err, ssl.SSLCertVerificationError):
        problem = _VERIFY_CODES.get(err.verify_code, BAD_CERTIFICATE)
        return problem, f"the server's certificate is not accepted: {err.verify_message or err.reason}"
    if isinstance(err, ssl.SSLError) and not _is_cut(err):
        problem = _REASONS.get(err.reason or "", OTHER)
        return problem, f"{err.reason or err}" + ("" if problem == OTHER else f" ({problem})")
    return BROKEN_OFF if isinstance(err, OSError) else OTHER, _text(err)


def _is_cut(err: ssl.SSLError) -> bool:
    """Tell whether the connection ended, in order or not."""
    import ssl

    return isinstance(err, (ssl.SSLEOFError, ssl.SSLZeroReturnError))


def _text(err: Exception) -> str:
    return (err.strerror if isinstance(err, OSError) else None) or str(err)


class ClientTls:
    """The TLS context that is made of these files, for new connections anew when one of them has changed.

    See `tls_context` for the files; without any it is that of the system's roots. Raises SettingsError for a
    key without a certificate. Any number of threads may share one.
    """

    def __init__(
        self,
        ca_file: Optional[_Path] = None,
        cert_file: Optional[_Path] = None,
        key_file: Optional[_Path] = None,
    ) -> None:
        _require_certificate(cert_file, key_file)
        files = [os.fspath(path) for path in (ca_file, cert_file, key_file) if path is not None]
        self._files = files
        self._context = Renewable(
            lambda: tls_context(ca_file=ca_file, cert_file=cert_file, key_file=key_file), files
        )

    def context(self) -> ssl.SSLContext:
        """Return the context; SettingsError for files that cannot be used, see Renewable."""
        return self._context.get()

    def __repr__(self) -> str:
        return f"<ClientTls {' '.join(map(repr, self._files)) or 'of the system'}>"


def tls_context(
    *, ca_file: Optional[_Path] = None, cert_file: Optional[_Path] = None, key_file: Optional[_Path] = None
) -> ssl.SSLContext:
    """Return a context that checks certificate and host name, from TLS 1.2 on.

    Trusts the system's roots (OpenSSL's; SSL_CERT_FILE, SSL_CERT_DIR move them) or only those in `ca_file`.
    `cert_file` is the client's certificate with its chain, `key_file` its key where that file does not hold
    it, all PEM; an encrypted key cannot be used. Raises SettingsError, naming the setting and its file.
    """
    import ssl

    _require_certificate(cert_file, key_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies; ssl.create_default_context() also logs keys
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is None:
        context.load_default_certs()
    else:
        path = _pem("ca_file", ca_file, _CERTIFICATE)
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ValueError) as err:
            raise _unusable("ca_file", path, _reason(err)) from err
    if cert_file is not None:
        cert = _pem("cert_file", cert_file, _CERTIFICATE)
        key = _pem("cert_file", cert_file, _KEY) if key_file is None else _pem("key_file", key_file, _KEY)
        try:
            context.load_cert_chain(cert, key, password=_refuse_to_ask)
        except (OSError, ValueError) as err:
            beside = "" if key_file is None else f"; its key_file is {shown(key)}"
            raise _unusable("cert_file", cert, _reason(err) + beside) from err
    return context


def _require_certificate(cert_file: Optional[_Path], key_file: Optional[_Path]) -> None:
    if key_file is not None and cert_file is None:
        raise SettingsError(
            f"cannot use the key {shown(os.fspath(key_file))} without a certificate: "
            "give its certificate, too (cert_file, --cert, DYN_MDC_TLS_CERT)",
            variable="cert_file", value=None, accepted="a PEM file with the certificate of that key",
        )  # fmt: skip


def _pem(variable: str, path: _Path, marker: bytes) -> str:
    """Return the path of a file in which there is what OpenSSL will look for.

    It would only call it a `PEM lib` error, without a word about the file.
    """
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would wait for its writer
            raise OSError(errno.EINVAL, "it is no regular file")
        with open(path, "rb") as file:
            data = file.read(_MAX_PEM_BYTES)
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        raise _unusable(variable, path, _reason(err)) from err
    if marker not in data:
        what = marker.decode().rstrip("-").lower()
        raise _unusable(variable, path, f"no {what} in it ({len(data)} bytes)")
    return path


def _refuse_to_ask() -> NoReturn:
    """Keep OpenSSL from asking for a password on the terminal."""
    raise ValueError("the key is encrypted")


def _reason(err: Exception) -> str:
    reason = getattr(err, "reason", "")  # of an SSLError; None where all it says is `PEM lib`
    if reason == "KEY_VALUES_MISMATCH":
        return "a key that belongs to another certificate"
    return f"damaged PEM ({_text(err)})" if reason is None else reason or _text(err)


def _unusable(variable: str, path: str, found: str) -> SettingsError:
    names, accepted = _FILES[variable]
    message = f"cannot use {shown(path)} as {variable} ({names}): expected {accepted}, found: {found}"
    return SettingsError(message, variable=variable, value=path, accepted=accepted)
