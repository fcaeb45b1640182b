"""TLS on a connected socket: whom it believes, and the handshake under a deadline."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Optional, Union

from ..errors import FetchError, SettingsError, shown
from .transport import Watch

if TYPE_CHECKING:
    import ssl

    from .http_dial import Origin

_Path = Union[str, "os.PathLike[str]"]


def secure(sock: socket.socket, origin: Origin, watch: Watch, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Shake hands on a connected socket; closes it and raises FetchTimeout or FetchError if that fails."""
    seconds = watch.limits.connect_seconds
    try:
        sock.settimeout(watch.allow(seconds))  # a deadline of the whole handshake, not of each of its reads
        return context.wrap_socket(sock, server_hostname=origin.host.rstrip("."))
    except BaseException as err:
        sock.close()
        if isinstance(err, socket.timeout):
            raise watch.timeout("tls", seconds, "no TLS handshake") from None
        if isinstance(err, (OSError, ValueError)):  # ValueError: a host that no certificate can bear
            raise broken(watch, err, "the TLS handshake failed") from err
        raise


def broken(watch: Watch, err: Exception, what: str) -> FetchError:
    """Return the FetchError for an error of a socket; worth another try unless TLS itself was refused."""
    import ssl

    if isinstance(err, ssl.SSLCertVerificationError):
        why = f"the server's certificate is not accepted: {err.verify_message or err.reason}"
        return watch.error(f"{what}: {why}")
    if isinstance(err, ssl.SSLError) and not isinstance(err, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return watch.error(f"{what}: {err.reason or err}")
    why = (err.strerror if isinstance(err, OSError) else None) or str(err)
    return watch.error(f"{what}: {why}", is_transient=isinstance(err, OSError))


def tls_context(
    *, ca_file: Optional[_Path] = None, cert_file: Optional[_Path] = None, key_file: Optional[_Path] = None
) -> ssl.SSLContext:
    """Return a context that checks certificate and host name, from TLS 1.2 on.

    Trusts the system's roots (OpenSSL's; SSL_CERT_FILE, SSL_CERT_DIR move them) or only those in `ca_file`.
    `cert_file` is the client's certificate with its chain, `key_file` its key where that file does not hold
    it, all PEM; an encrypted key cannot be used. Raises SettingsError, naming the file that cannot be used.
    """
    import ssl

    if key_file is not None and cert_file is None:
        raise SettingsError(
            f"cannot use the key {shown(os.fspath(key_file))} without a certificate: give cert_file, too",
            variable="cert_file", value=None, accepted="a PEM file with the certificate of that key",
        )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies; ssl.create_default_context() also logs keys
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        if ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(cafile=os.fspath(ca_file))
    except OSError as err:
        raise _unusable("ca_file", ca_file, "a PEM file of certificates", err) from err
    if cert_file is not None:
        key = None if key_file is None else os.fspath(key_file)
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(os.fspath(cert_file), key, password=lambda: b"")
        except (OSError, ValueError) as err:
            accepted = "PEM files of a certificate and its unencrypted key"
            raise _unusable("cert_file", cert_file, accepted, err) from err
    return context


def _unusable(variable: str, path: Optional[_Path], accepted: str, err: Exception) -> SettingsError:
    value = None if path is None else os.fspath(path)
    message = f"cannot use {shown(value)} as {variable}: expected {accepted}, found: {err}"
    return SettingsError(message, variable=variable, value=value, accepted=accepted)
