"""From a host and a port to a connected socket that the peer policy agrees with, and to TLS on it.

No proxy, whatever the environment says. Name resolution takes as long as the system's resolver lets it: there
is no way to interrupt it, but the time counts.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

from ..errors import FetchError, PeerNotAllowed, SettingsError, shown
from .http_watch import Watch
from .peer_policy import Peer, PeerPolicy

if TYPE_CHECKING:
    import ssl

_Path = Union[str, "os.PathLike[str]"]

MAX_ADDRESSES = 8  # of one host that are tried: a resolver's answer may have thousands


class Origin(NamedTuple):
    """What a connection is for."""

    scheme: str
    host: str  # an IPv6 address without its brackets
    port: int


class _Failure(NamedTuple):
    """Why one address was not connected to."""

    address: str
    why: str
    kind: str  # "refused" by the policy, "timeout" or "error"


def dial(origin: Origin, watch: Watch, allows: PeerPolicy) -> socket.socket:
    """Connect to the first address of the origin that the policy allows and that answers.

    Nothing is sent to an address that the policy refuses. Raises PeerNotAllowed if it refuses them all, and
    FetchTimeout or FetchError if no other one answers.
    """
    failures = []
    for family, sockaddr in _resolve(origin, watch)[:MAX_ADDRESSES]:
        outcome = _connect(family, sockaddr, origin, watch, allows)
        if not isinstance(outcome, _Failure):
            return outcome
        failures.append(outcome)
    raise _error_of(failures, origin, watch)


def _resolve(origin: Origin, watch: Watch) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:  # UnicodeError: a label that is empty or has more than 63 bytes
        why = f"no address for host {shown(origin.host)}: {getattr(err, 'strerror', None) or err}"
        raise watch.error(why, is_transient=getattr(err, "errno", None) == socket.EAI_AGAIN) from err
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]  # type: ignore[misc]


def _connect(
    family: int, sockaddr: tuple[str, int], origin: Origin, watch: Watch, allows: PeerPolicy
) -> Union[socket.socket, _Failure]:
    address = sockaddr[0]
    if not allows(Peer(origin.host, address, origin.port)):
        return _Failure(address, "refused by the peer policy, nothing was sent", "refused")
    seconds = watch.limits.connect_seconds
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(watch.allow(seconds))
        sock.connect(sockaddr)
        if not allows(Peer(origin.host, sock.getpeername()[0], origin.port)):
            sock.close()
            return _Failure(sockaddr[0], "refused by the peer policy, nothing was requested", "refused")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException as err:
        if sock is not None:
            sock.close()
        if isinstance(err, socket.timeout):
            return _Failure(address, "no answer", "timeout")
        if isinstance(err, OSError):
            return _Failure(address, err.strerror or str(err), "error")
        raise
    return sock


def _error_of(failures: list[_Failure], origin: Origin, watch: Watch) -> FetchError:
    """Return one error for all addresses: of a time-out if there was one, of the policy if that is all."""
    found = "; ".join(f"{failure.address}: {failure.why}" for failure in failures) or "it has no address"
    why = f"cannot connect to {shown(origin.host)} port {origin.port} ({found})"
    kinds = {failure.kind for failure in failures}
    if "timeout" in kinds:
        return watch.timeout("connect", watch.limits.connect_seconds, why)
    if kinds == {"refused"}:
        message = str(watch.error(why))
        return PeerNotAllowed(message, url=watch.url, host=origin.host, address=failures[0].address)
    return watch.error(why, is_transient=True)


# ------------------------------------------------------------------ TLS


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
