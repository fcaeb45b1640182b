"""Which addresses may be fetched from.

Somebody else wrote the card, and its URLs make this process connect. A peer policy is asked about each
address before anything is sent to it, and again about the one that was really connected to: a name can stand
for any address, and for another one at the next look-up. Policies hold no state that changes; threads may
share them.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional, Union

from ..card import url as urls
from ..errors import shown

_Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
_Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Peer(NamedTuple):
    """Whom a connection would reach, or has reached."""

    host: str  # as in the URL, without the brackets of an IPv6 address
    address: str  # numeric
    port: int


PeerPolicy = Callable[[Peer], bool]

# Link-local, where clouds keep a machine's secrets, and the addresses outside it that serve the same.
_SECRETS = (
    ipaddress.ip_network("169.254.0.0/16"),
    ipaddress.ip_network("fe80::/10"),
    ipaddress.ip_network("fd00:ec2::254/128"),  # AWS
    ipaddress.ip_network("fd00:ec2::23/128"),  # AWS, identities of pods
    ipaddress.ip_network("fd20:ce::254/128"),  # Google Cloud
    ipaddress.ip_network("fd00:c1::a9fe:a9fe/128"),  # Oracle Cloud
    ipaddress.ip_network("192.0.0.192/32"),  # Oracle Cloud, classic
    ipaddress.ip_network("fd00:42::42/128"),  # Scaleway
    ipaddress.ip_network("100.100.100.200/32"),  # Alibaba Cloud
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's wire server
)

# IPv6 addresses that mean an IPv4 one, and how many bits stand to the right of it.
_IPV4_WITHIN = (
    (ipaddress.ip_network("::ffff:0:0/96"), 0),  # mapped, RFC 4291
    (ipaddress.ip_network("::/96"), 0),  # compatible, RFC 4291
    (ipaddress.ip_network("::ffff:0:0:0/96"), 0),  # translated, RFC 2765
    (ipaddress.ip_network("64:ff9b::/96"), 0),  # NAT64, RFC 6052
    (ipaddress.ip_network("64:ff9b:1::/48"), 0),  # NAT64 of a site, RFC 8215, as it is used: /96 prefixes
    (ipaddress.ip_network("2002::/16"), 80),  # 6to4, RFC 3056
)


def not_link_local(peer: Peer) -> bool:
    """Allow every address but link-local ones and the metadata services of clouds, however they are written.

    This machine's own addresses are allowed: workers and frontends share hosts.
    """
    address = _parse_address(peer.address)
    if address is None:
        return False
    return not any(form in network for form in _forms(address) for network in _SECRETS)


class AllowList:
    """Allow the hosts, addresses and networks that are named, and nothing else.

    A host name is compared with the URL's host and trusts whatever that name stands for, but never an address
    that `not_link_local` refuses: such a one has to be named itself. Raises ValueError for an entry that is
    no host name, no address and no network (`10.0.0.0/8`).
    """

    def __init__(self, *entries: Union[str, _Address, _Network]) -> None:
        self._entries = entries
        self._networks: list[_Network] = []
        self._hosts: set[str] = set()
        for entry in entries:
            network = _parse_network(entry)
            if network is not None:
                self._networks.append(network)
            else:
                self._hosts.add(_host_name(str(entry)))

    def __call__(self, peer: Peer) -> bool:
        """Tell whether the peer is on the list."""
        address = _parse_address(peer.address)
        if address is None:
            return False
        if any(_plain(address) in network or address in network for network in self._networks):
            return True
        return _same_name(peer.host) in self._hosts and not_link_local(peer)

    def __repr__(self) -> str:
        return f"AllowList({', '.join(repr(str(entry)) for entry in self._entries)})"


def same_host(publisher: str) -> PeerPolicy:
    """Return the policy that allows the host that published a card: its name and the addresses behind it.

    `publisher` is a host name or an address, with or without a port, or a URL, whose host counts; ValueError
    if it is none of these. A name never opens an address that `not_link_local` refuses; a publisher that is
    given as such an address does. Asks the resolver when a URL has another host than the publisher.
    """
    host = _publisher_host(publisher)
    address = _parse_address(host)
    if address is not None:
        return AllowList(_plain(address))

    def is_same_host(peer: Peer) -> bool:
        if not not_link_local(peer):
            return False
        return _same_name(peer.host) == host or _parse_plain(peer.address) in _addresses_of(host)

    return is_same_host


# ------------------------------------------------------------------ addresses


def _parse_address(text: str) -> Optional[_Address]:
    """Return the address without its zone, None if `text` is none."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _forms(address: _Address) -> Iterator[_Address]:
    """Yield the address, and the IPv4 address that it means."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        for network, shift in _IPV4_WITHIN:
            if address in network:
                yield ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF)


def _plain(address: _Address) -> _Address:
    """Return an IPv4 address for an IPv4-mapped one: to the system they are the same peer."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def _parse_plain(text: str) -> Optional[_Address]:
    address = _parse_address(text)
    return None if address is None else _plain(address)


def _addresses_of(host: str) -> set[Optional[_Address]]:
    """Ask the resolver; a host that it does not know stands for nothing."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {_parse_plain(str(address[0])) for *_, address in found} - {None}


# ------------------------------------------------------------------ entries

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.(?!-)[a-z0-9_-]{1,63})*")


def _same_name(host: str) -> str:
    """Return what two spellings of one host name have in common."""
    return host.lower().rstrip(".")


def _parse_network(entry: Union[str, _Address, _Network]) -> Optional[_Network]:
    """Return the network that an entry means; an address is a network of one."""
    text = str(entry)
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        return ipaddress.ip_network(text)
    except ValueError as err:
        if "/" in text:  # no host name: say what is wrong with the network
            raise ValueError(f"cannot allow {shown(entry)}: {err}") from None
        return None


def _host_name(text: str) -> str:
    """Return a host name as URLs have it, ValueError for anything else."""
    parsed = urls.parse(f"http://{text}/") if not re.search(r"[\s/?#@:\\%]", text) else None
    name = _same_name(parsed.host or "") if parsed is not None else ""
    if not _NAME.fullmatch(name) or _parse_address(name) is not None:
        raise ValueError(
            f"cannot allow {shown(text)}: expected a host name without port, an address or a network"
        )
    return name


def _publisher_host(publisher: str) -> str:
    """Return the host of a publisher: a name in lower case, or an address without brackets."""
    if _parse_address(publisher) is not None:
        return publisher
    parsed = urls.parse(publisher if "://" in publisher else f"http://{publisher}/")
    if parsed is None or not parsed.host:
        raise ValueError(f"cannot tell the host of {shown(publisher)}: expected a host or a URL")
    return _same_name(parsed.host.strip("[]"))
