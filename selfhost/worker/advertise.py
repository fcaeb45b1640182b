"""The address that other machines should use to reach this worker.

It is found from the address that is really bound, as Dynamo 1.6.1 does, or given outright as a base URL. A
wildcard (0.0.0.0, ::) and the scope of an IPv6 address mean nothing to another machine and are never
published; loopback is published only where loopback was bound. No packet is sent to find an address: the
interfaces of this machine are listed, with the standard library alone. Everything here is a pure function of
its arguments except `local_interfaces`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional, Union

from ..errors import SettingsError, StatusServerError

_IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_OVERRIDE = "DYN_SYSTEM_ADVERTISE_URL"
_ACCEPTED = "http(s)://host[:port][/prefix], with an IPv6 address in brackets"

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)")
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?P<colon>:)?(?P<port>.*)")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*")
# The last label decides: the WHATWG parser reads such a host as an IPv4 address ("0x0" and "127.1" too).
_LAST_LABEL_IS_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)")
_PATH = re.compile(r"(?:/|%[0-9A-Fa-f]{2}|[A-Za-z0-9._~!$&'()*+,;=:@-])*")  # RFC 3986 section 3.3
_DOT_SEGMENT = re.compile(r"(?i)(?:\.|%2e){1,2}")


@dataclass(frozen=True)
class AdvertisedAddress:
    """Where clients reach the metadata routes; every URL of a card starts with `base_url`."""

    scheme: str  # "http" or "https"
    host: str  # without brackets
    port: Optional[int]  # None: the scheme's default
    prefix: str = ""  # "" or "/..." without a slash at its end

    @classmethod
    def parse(cls, url: str, *, variable: str = "advertise_url") -> AdvertisedAddress:
        """Read a base URL that an operator gave; `variable` is what the error calls it.

        Raises SettingsError for anything but http(s)://host[:port][/prefix], and for 0.0.0.0 and [::],
        which are nobody's address.
        """
        try:
            return _parse(url)
        except ValueError as err:
            shown = _without_secrets(url)
            message = f"{variable}={shown!r} cannot be used: {err}; expected {_ACCEPTED}"
            raise SettingsError(message, variable=variable, value=shown, accepted=_ACCEPTED) from None

    @property
    def base_url(self) -> str:
        """The URL that a path such as `/v1/metadata/...` is appended to; no slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port is None or self.port == _DEFAULT_PORTS.get(self.scheme):
            return f"{self.scheme}://{host}{self.prefix}"
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    def __str__(self) -> str:
        return self.base_url


@dataclass(frozen=True)
class InterfaceAddress:
    """One address of one network interface of this machine."""

    interface: str
    address: str
    is_up: bool = True


def advertised_address(
    bind_host: str,
    port: int,
    *,
    scheme: str = "http",
    interfaces: Optional[Sequence[InterfaceAddress]] = None,
) -> AdvertisedAddress:
    """Return the address to publish for a server bound to the IP address `bind_host` and to `port`.

    A specific address is itself. 0.0.0.0 becomes the first IPv4 address of an interface that is up and not
    loopback; :: the first such IPv6 address that is not link-local, else the first IPv4 one. `interfaces`
    is in the system's order (None: ask the system). Raises StatusServerError where a wildcard is bound
    and no address but loopback is there: Dynamo would publish 127.0.0.1, which each reader takes for itself.
    """
    bound = _bound_ip(bind_host)
    if bound is None:
        message = f"cannot advertise {bind_host!r}: expected the bound IP address; set {_OVERRIDE} instead"
        raise StatusServerError(message, address=bind_host)
    if not bound.is_unspecified:
        return AdvertisedAddress(scheme, str(bound), port)
    found = _reachable(bound.version, local_interfaces() if interfaces is None else interfaces)
    if found is None:
        raise StatusServerError(
            f"bound to {bound}, port {port}, but no interface that is up has an address other than loopback, "
            f"so none can be published; bind one address, or set {_OVERRIDE} to the base URL for frontends",
            address=str(bound),
        )
    return AdvertisedAddress(scheme, str(found), port)


def _reachable(version: int, interfaces: Sequence[InterfaceAddress]) -> Optional[_IPAddress]:
    """Return the first address that a wildcard of this IP version stands for."""
    parsed = (_bound_ip(entry.address) for entry in interfaces if entry.is_up)
    usable = [ip for ip in parsed if ip is not None and not ip.is_loopback and not ip.is_unspecified]
    fours = [ip for ip in usable if ip.version == 4]  # 169.254.x.x counts, as in Dynamo
    sixes = [ip for ip in usable if ip.version == 6 and not ip.is_link_local]
    candidates = fours if version == 4 else sixes + fours
    return candidates[0] if candidates else None


def _bound_ip(host: str) -> Optional[_IPAddress]:
    """Return the IP address without its scope, an IPv4-mapped one as IPv4; None where it is none."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip


# --- a base URL, given outright


def _parse(url: str) -> AdvertisedAddress:
    if not isinstance(url, str) or not url.isascii() or any(not "!" <= char <= "~" for char in url):
        raise ValueError("it holds spaces, control characters or letters outside ASCII (write those encoded)")
    match = _URL.fullmatch(url)
    if match is None or match["scheme"].lower() not in _DEFAULT_PORTS:
        raise ValueError("it does not start with http:// or https://")
    if match["rest"]:
        raise ValueError("a base URL has no query and no fragment")
    if "@" in match["authority"]:
        raise ValueError("every frontend would read the user name or password in it")
    host, port = _parse_authority(match["authority"])
    return AdvertisedAddress(match["scheme"].lower(), host, port, _parse_prefix(match["path"]))


def _parse_authority(text: str) -> tuple[str, Optional[int]]:
    match = _AUTHORITY.fullmatch(text)
    if match is None or (match["port"] and not match["colon"]):
        raise ValueError(f"{text!r} is no host and port")
    if not match["colon"]:
        return _parse_host(match["host"]), None
    digits = match["port"]
    if not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
        raise ValueError("its port is not one of 1 to 65535 (or an IPv6 address lacks its brackets)")
    return _parse_host(match["host"]), int(digits)


def _parse_host(text: str) -> str:
    if not text:
        raise ValueError("the host is missing")
    if not text.startswith("[") and not _LAST_LABEL_IS_NUMBER.fullmatch(text):
        if not _NAME.fullmatch(text):
            raise ValueError(f"{text!r} is no host name")
        return text.lower()
    ip = _strict_ip(text)
    if ip.is_unspecified:
        raise ValueError(f"{text} is every address of the machine that listens, and none to connect to")
    return str(ip)


def _strict_ip(text: str) -> _IPAddress:
    bracketed = text.startswith("[")
    inner = text[1:-1] if bracketed else text
    if "%" in inner:
        raise ValueError(f"the scope in {text} means nothing on another machine")
    ip = _bound_ip(inner)
    if ip is None or bracketed != (":" in inner):
        raise ValueError(f"{text!r} is no IP address")
    return ip


def _parse_prefix(path: str) -> str:
    prefix = path.rstrip("/")
    if not _PATH.fullmatch(prefix):
        raise ValueError(f"the prefix {path!r} holds characters that must be written as %XX")
    if any(_DOT_SEGMENT.fullmatch(segment) for segment in prefix.split("/")):
        raise ValueError(f"the prefix {path!r} holds . or .. segments, which clients resolve away")
    return prefix


def _without_secrets(url: object) -> str:
    """Return the URL for an error text: without user name, password and query."""
    text = re.sub(r"(?s)//.*@", "//***@", str(url))
    return re.sub(r"(?s)\?.*", "?***", text)


# --- the interfaces of this machine

_IFF_UP = 0x1  # <net/if.h>
_SIOCGIFFLAGS = 0x8913  # <bits/ioctls.h> of Linux; other systems number them differently
_SIOCGIFADDR = 0x8915
_NOT_USABLE = 0x08 | 0x40  # IFA_F_DADFAILED, IFA_F_TENTATIVE, as are those kept on an interface that is down
_SHORT_LIVED = 0x01 | 0x20  # IFA_F_TEMPORARY, IFA_F_DEPRECATED: used only where there is no other


def local_interfaces() -> list[InterfaceAddress]:
    """Return the addresses of this machine in the order of its interfaces, IPv4 before IPv6.

    On Linux the kernel is asked; there each interface counts with its first IPv4 address. Elsewhere, and
    where the kernel tells nothing, the addresses are those that the machine's own host name resolves to.
    """
    if sys.platform == "linux":
        found = [*_linux_v4(), *_linux_v6()]
        if found:
            return found
    return list(_of_host_name())


def _linux_v4() -> Iterator[InterfaceAddress]:
    import fcntl

    try:
        names = [name for _, name in socket.if_nameindex()]
        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    except OSError:
        return  # a sandbox that hides the interfaces, or a kernel without IPv4
    with probe:
        for name in names:
            request = struct.pack("256s", os.fsencode(name)[:15])
            try:
                flags = struct.unpack_from("H", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)[0]
                address = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # it has no IPv4 address, or is just going away
            yield InterfaceAddress(name, address, bool(flags & _IFF_UP))


def _linux_v6() -> Iterator[InterfaceAddress]:
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:
        return  # a kernel without IPv6, or a container without /proc
    for line in sorted(lines, key=lambda line: (int(line[1], 16), bool(int(line[4], 16) & _SHORT_LIVED))):
        address, flags, name = bytes.fromhex(line[0]), int(line[4], 16), line[5]
        yield InterfaceAddress(name, socket.inet_ntop(socket.AF_INET6, address), not flags & _NOT_USABLE)


def _of_host_name() -> Iterator[InterfaceAddress]:
    try:
        answers = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return
    for _, _, _, _, address in sorted(answers, key=lambda answer: answer[0] != socket.AF_INET):
        yield InterfaceAddress("", str(address[0]))
