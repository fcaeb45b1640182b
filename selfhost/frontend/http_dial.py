"""From a host and a port to a connected socket that the peer policy agrees with.

No proxy, whatever the environment says. Name resolution takes as long as the system's resolver lets it: there
is no way to interrupt it, but the time counts.
"""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple, Optional, Union

from ..card.url import Url
from ..errors import ConnectFailed, FetchError, HostNotFound, PeerNotAllowed, shown
from .peer_policy import Peer, PeerPolicy
from .transport import Watch
from .waits import connect

PORTS = {"http": 80, "https": 443}
MAX_ADDRESSES = 8  # of one host that are tried: a resolver's answer may have thousands

# What is wrong with this process or machine, and says nothing about the origin.
_OUR_OWN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Origin(NamedTuple):
    """What a connection is for."""

    scheme: str
    host: str  # an IPv6 address without its brackets
    port: int

    @classmethod
    def of(cls, url: Optional[Url]) -> Optional[Origin]:
        """Return the origin of a URL, None if that is no http or https URL with a host."""
        if url is None or url.scheme not in PORTS or not url.host:
            return None
        return cls(url.scheme, url.host.strip("[]"), PORTS[url.scheme] if url.port is None else url.port)


class _Failure(NamedTuple):
    """Why one address was not connected to."""

    address: str
    why: str
    kind: str  # "refused" by the policy, "timeout" or "error"
    seconds: float = 0.0  # that were waited for an answer
    errno: Optional[int] = None


def dial(origin: Origin, watch: Watch, allows: PeerPolicy) -> socket.socket:
    """Connect to the first address of the origin that the policy allows and that answers.

    All of them together have `connect_seconds`: each waits for its share of what is left, so that silent
    addresses keep none from being tried. Nothing is sent to an address that the policy refuses. Raises
    PeerNotAllowed if it refuses them all, and FetchTimeout or FetchError if no other one answers.
    """
    watch.observer.dialing()
    addresses = _resolve(origin, watch)[:MAX_ADDRESSES]
    watch.observer.resolved(origin.host, [sockaddr[0] for _, sockaddr in addresses])
    failures: list[_Failure] = []
    started, spent = watch.clock(), 0.0
    for index, (family, sockaddr) in enumerate(addresses):
        share = max(0.0, watch.limits.connect_seconds - spent) / (len(addresses) - index)
        outcome = _connect(family, sockaddr, origin, watch, allows, seconds=share)
        if not isinstance(outcome, _Failure):
            watch.observer.connected(sockaddr[0], origin.port)
            return outcome
        failures.append(outcome)
        spent = watch.clock() - started
    raise _error_of(failures, origin, watch)


def _resolve(origin: Origin, watch: Watch) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:  # UnicodeError: a label that is empty or has more than 63 bytes
        if isinstance(err, OSError) and err.errno in _OUR_OWN and not isinstance(err, socket.gaierror):
            raise _own_error(err, origin, watch) from err
        why = f"no address for host {shown(origin.host)}: {getattr(err, 'strerror', None) or err}"
        is_transient = getattr(err, "errno", None) == socket.EAI_AGAIN
        message = str(watch.error(why))
        raise HostNotFound(message, url=watch.url, host=origin.host, is_transient=is_transient) from err
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]  # type: ignore[misc]


def _connect(
    family: int,
    sockaddr: tuple[str, int],
    origin: Origin,
    watch: Watch,
    allows: PeerPolicy,
    *,
    seconds: float,
) -> Union[socket.socket, _Failure]:
    address = sockaddr[0]
    if not allows(Peer(origin.host, address, origin.port)):
        return _Failure(address, "refused by the peer policy, nothing was sent", "refused")
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        connect(sock, sockaddr, watch.allow(seconds))
        if not allows(Peer(origin.host, sock.getpeername()[0], origin.port)):
            sock.close()
            return _Failure(address, "refused by the peer policy, nothing was requested", "refused")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException as err:
        if sock is not None:
            sock.close()
        if isinstance(err, socket.timeout):
            return _Failure(address, f"no answer in {seconds:.2g} s", "timeout", seconds)
        if isinstance(err, OSError):
            if err.errno in _OUR_OWN:
                raise _own_error(err, origin, watch) from err
            return _Failure(address, err.strerror or str(err), "error", errno=err.errno)
        raise
    return sock


def _own_error(err: OSError, origin: Origin, watch: Watch) -> FetchError:
    """Return the error for a shortage on this side, most likely of descriptors."""
    why = f"cannot connect to {shown(origin.host)} port {origin.port}"
    what = "this process has too many open files" if err.errno == errno.EMFILE else err.strerror
    return watch.error(f"{why}: {what}")


def _error_of(failures: list[_Failure], origin: Origin, watch: Watch) -> FetchError:
    """Return one error for all addresses: of a time-out if there was one, of the policy if that is all."""
    found = "; ".join(f"{failure.address}: {failure.why}" for failure in failures) or "it has no address"
    why = f"cannot connect to {shown(origin.host)} port {origin.port} ({found})"
    message = str(watch.error(why))
    kinds = {failure.kind for failure in failures}
    if "timeout" in kinds:
        waited = sum(failure.seconds for failure in failures)
        return watch.timeout("connect", round(waited, 2), why)
    if kinds == {"refused"}:
        return PeerNotAllowed(message, url=watch.url, host=origin.host, address=failures[0].address)
    code = failures[-1].errno if failures else None
    return ConnectFailed(message, url=watch.url, host=origin.host, port=origin.port, errno=code)
