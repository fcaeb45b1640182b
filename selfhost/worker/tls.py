"""TlsFiles: the certificate, key and client CA of the embedded server, and the context made from them.

TLS 1.2 and 1.3 only, ephemeral key exchange and AEAD ciphers only, no compression, no renegotiation. With a
client CA a client must show a certificate that it has signed. Whatever cannot be used is a SettingsError that
names the file: there is no fall-back to plain HTTP or to clients without certificates.

`ssl` is imported when a context is made, not before.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NoReturn, Optional

from ..errors import SettingsError, shown

if TYPE_CHECKING:
    import ssl

# Of TLS 1.2; those of 1.3 are OpenSSL's, all of this kind. Level 2 refuses SHA-1, and RSA below 2048 bits.
_CIPHERS = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"
_WEAK = ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK")  # what OpenSSL says below level 2
_MAX_FILE_BYTES = 4 * 1024 * 1024  # a bundle of every public CA has 0.2 MB

_CERT, _KEY, _CLIENT_CA = "DYN_SYSTEM_TLS_CERT", "DYN_SYSTEM_TLS_KEY", "DYN_SYSTEM_TLS_CLIENT_CA"
_CERT_PEM = "a PEM file with the server's certificate and its chain"
_KEY_PEM = "a PEM file with the certificate's own, unencrypted private key"
_CLIENT_CA_PEM = "a PEM file with the certificates of the CAs that sign for clients"

Stamp = Optional[tuple[int, int, int, int, int]]


@dataclass(frozen=True)
class TlsFiles:
    """Which PEM files the server uses. Paths become absolute: the host may change its directory."""

    cert: str  # with the chain; the private key, too, where `key` is None
    key: Optional[str] = None
    client_ca: Optional[str] = None  # None: clients need no certificate

    def __post_init__(self) -> None:
        for each in fields(self):
            path = getattr(self, each.name)
            object.__setattr__(self, each.name, path and os.path.abspath(os.fspath(path)))

    @classmethod
    def of(
        cls, cert: Optional[str] = None, key: Optional[str] = None, client_ca: Optional[str] = None
    ) -> Optional[TlsFiles]:
        """Return the files that these settings ask for, None where none is set.

        Raises SettingsError for a key or a client CA without a certificate.
        """
        if cert is not None:
            return cls(cert, key, client_ca)
        for variable, path in ((_KEY, key), (_CLIENT_CA, client_ca)):
            if path is not None:
                message = f"{variable} is {shown(path)}, but TLS needs a certificate, too: set {_CERT}"
                raise SettingsError(message, variable=_CERT, value=None, accepted=_CERT_PEM)
        return None

    def check(self) -> None:
        """Raise SettingsError, naming the file and what was found, if the server could not use them."""
        self.context()

    def stamps(self) -> tuple[Stamp, ...]:
        """Return what changes with a file's content, owner or mode, and with links to another one."""
        return tuple(_stamp(path) for path in (self.cert, self.key, self.client_ca) if path)

    def context(self) -> ssl.SSLContext:
        """Read the files into a new context; SettingsError. Never asks for a password on the terminal."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_ciphers(_CIPHERS)
        context.set_alpn_protocols(["http/1.1"])
        # First by itself: of certificate and key together OpenSSL does not say which one it cannot read.
        _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), _CERT, self.cert, _CERT_PEM)
        self._load_pair(context)
        if self.client_ca is not None:
            _load_certificates(context, _CLIENT_CA, self.client_ca, _CLIENT_CA_PEM)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _load_pair(self, context: ssl.SSLContext) -> None:
        key_file = self.key or self.cert
        _require_pem(_KEY, key_file, b"PRIVATE KEY-----", _KEY_PEM)
        try:
            context.load_cert_chain(self.cert, self.key, password=_refuse_to_ask)
        except (OSError, ValueError) as error:
            found = _reason(error)
            if found in _WEAK:
                raise _unusable(_CERT, self.cert, _CERT_PEM, found) from error
            found = f"{found} (with {_CERT}={shown(self.cert)})"
            raise _unusable(_KEY, key_file, _KEY_PEM, found) from error


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)  # of what links lead to
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _load_certificates(context: ssl.SSLContext, variable: str, path: str, accepted: str) -> None:
    _require_pem(variable, path, b"CERTIFICATE-----", accepted)
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise _unusable(variable, path, accepted, _reason(error)) from error


def _require_pem(variable: str, path: str, marker: bytes, accepted: str) -> None:
    """Look for what OpenSSL would only call a `PEM lib` error, without a word about the file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would wait for its writer
            raise OSError(errno.EINVAL, "it is no regular file")
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unusable(variable, path, accepted, _reason(error)) from error
    if marker not in data:
        what = marker.decode().rstrip("-").lower()
        raise _unusable(variable, path, accepted, f"no {what} in it ({len(data)} bytes)")


def _refuse_to_ask() -> NoReturn:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # of an SSLError
    if reason == "KEY_VALUES_MISMATCH":
        return "the key belongs to another certificate"
    return reason or getattr(error, "strerror", None) or str(error)


def _unusable(variable: str, path: str, accepted: str, found: str) -> SettingsError:
    message = f"cannot use {shown(path)} as {variable}: expected {accepted}, found: {found}"
    return SettingsError(message, variable=variable, value=path, accepted=accepted)
