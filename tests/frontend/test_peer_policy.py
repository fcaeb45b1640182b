"""Which addresses the peer policies allow. No address in here is ever connected to."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest

from selfhost.frontend.peer_policy import AllowList, Peer, not_link_local, same_host

SECRET = [
    "169.254.169.254",
    "169.254.0.1",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "::ffff:169.254.169.254",
    "::ffff:100.100.100.200",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::169.254.169.254",
    "2002:a9fe:a9fe::1",
]
HARMLESS = [
    "127.0.0.1",
    "::1",
    "10.1.2.3",
    "192.168.0.1",
    "8.8.8.8",
    "169.253.255.255",
    "169.255.0.0",
    "fec0::1",
    "fd00::1",
    "2001:db8::1",
    "::ffff:10.0.0.1",
    "64:ff9b::10.0.0.1",
    "2002:0a00:0001::1",
]


def peer(address: str, host: str = "worker") -> Peer:
    """Return a peer at an address."""
    return Peer(host, address, 9090)


# catalogue 10
@pytest.mark.parametrize("address", SECRET)
def test_secrets_of_clouds_are_refused(address: str) -> None:
    """Link-local addresses and metadata services are refused in each of their spellings."""
    assert not not_link_local(peer(address))


@pytest.mark.parametrize("address", HARMLESS)
def test_other_addresses_are_allowed(address: str) -> None:
    """All the rest is allowed by default, this machine and private networks among it."""
    assert not_link_local(peer(address))


@pytest.mark.parametrize("policy", [not_link_local, AllowList("worker"), same_host("worker")])
def test_what_is_no_address_is_refused(policy: Any) -> None:
    """A policy that cannot read the address does not trust the name."""
    assert not policy(peer("worker"))


@pytest.mark.parametrize(
    ("entry", "host", "address"),
    [
        ("worker", "worker", "10.0.0.1"),
        ("Worker.Example.", "WORKER.example", "10.0.0.1"),
        ("bücher.example", "xn--bcher-kva.example", "10.0.0.1"),
        ("10.0.0.1", "any", "10.0.0.1"),
        ("10.0.0.1", "any", "::ffff:10.0.0.1"),
        ("10.0.0.0/8", "any", "10.255.0.1"),
        ("::1", "any", "::1"),
        ("[::1]", "any", "::1"),
        ("fe80::/10", "any", "fe80::1%eth0"),
        ("169.254.169.254", "any", "169.254.169.254"),
        ("::ffff:10.0.0.1", "any", "::ffff:10.0.0.1"),
        (ipaddress.ip_network("10.0.0.0/8"), "any", "10.0.0.1"),
        (ipaddress.ip_address("10.0.0.1"), "any", "10.0.0.1"),
    ],
)
def test_allow_list_allows_what_it_names(entry: Any, host: str, address: str) -> None:
    """Names are compared without regard to case, addresses by what they mean."""
    assert AllowList("other", entry)(peer(address, host))


@pytest.mark.parametrize(
    ("entry", "host", "address"),
    [
        ("worker", "worker2", "10.0.0.1"),
        ("worker", "sub.worker", "10.0.0.1"),
        ("worker", "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "any", "10.0.0.2"),
        ("10.0.0.0/8", "10.0.0.1", "11.0.0.1"),  # a host that only looks like it
        ("worker", "worker", "169.254.169.254"),
        ("worker", "worker", "::ffff:169.254.169.254"),
    ],
)
def test_allow_list_refuses_the_rest(entry: str, host: str, address: str) -> None:
    """Neither like names nor other addresses pass, nor a good name that stands for a secret address."""
    assert not AllowList(entry)(peer(address, host))


def test_empty_allow_list_allows_nothing() -> None:
    """No entry, no peer."""
    assert not AllowList()(peer("127.0.0.1", "localhost"))


@pytest.mark.parametrize(
    "entry",
    [
        "", " ", "http://worker", "worker:80", "10.0.0.1:80", "[::1]:80", "10.0.0.1/8", "10.0.0.0/33", "a/b",
        "user@worker", "wor ker", "*.example", "a..b", "-a", "0x7f000001", "1.2.3", "wor\nker", "a" * 64,
    ],
)  # fmt: skip
def test_bad_entries_are_named(entry: str) -> None:
    """What is no host name, address or network is refused at once, by name."""
    with pytest.raises(ValueError, match="cannot allow") as caught:
        AllowList("worker", entry)

    assert repr(entry) in str(caught.value)


def test_allow_list_shows_its_entries() -> None:
    """Its text is how it was made."""
    assert repr(AllowList("worker", ipaddress.ip_address("::1"))) == "AllowList('worker', '::1')"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Let names stand for addresses; what is not in it does not exist."""
    names: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: Any, **_: Any) -> list[Any]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, 0)) for found in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.parametrize(
    "publisher", ["worker", "WORKER.", "worker:9090", "http://worker:9090/v1/metadata/m/_base/config.json"]
)
def test_same_host_by_name_and_by_address(publisher: str, resolver: dict[str, list[str]]) -> None:
    """The publisher's name is allowed, and so is each address that it stands for."""
    resolver["worker"] = ["10.0.0.1", "10.0.0.2"]
    policy = same_host(publisher)

    assert policy(peer("10.9.9.9", "worker"))
    assert policy(peer("10.0.0.2", "10.0.0.2"))
    assert policy(peer("::ffff:10.0.0.2", "alias"))
    assert not policy(peer("10.0.0.3", "10.0.0.3"))


@pytest.mark.parametrize("publisher", ["10.0.0.1", "10.0.0.1:9090", "http://10.0.0.1/x", "http://0xa000001/"])
def test_same_host_by_address_alone(publisher: str, resolver: dict[str, list[str]]) -> None:
    """A publisher known by its address is allowed under every name, and asks no resolver."""
    policy = same_host(publisher)

    assert policy(peer("10.0.0.1", "any"))
    assert not policy(peer("10.0.0.2", "10.0.0.1"))


@pytest.mark.parametrize("publisher", ["::1", "[::1]:9090", "http://[::1]/"])
def test_same_host_of_ipv6(publisher: str) -> None:
    """Brackets and ports do not matter."""
    assert same_host(publisher)(peer("::1", "::1"))


def test_same_host_never_opens_secrets_by_name(resolver: dict[str, list[str]]) -> None:
    """A name that stands for a metadata address is not followed there, but such a publisher may be named."""
    resolver["worker"] = ["169.254.169.254"]

    assert not same_host("worker")(peer("169.254.169.254", "worker"))
    assert same_host("169.254.169.254")(peer("169.254.169.254"))


def test_same_host_that_no_resolver_knows(resolver: dict[str, list[str]]) -> None:
    """A publisher without any address is still allowed by its name, and nothing else is."""
    policy = same_host("gone")

    assert policy(peer("10.0.0.1", "gone"))
    assert not policy(peer("10.0.0.1", "other"))


@pytest.mark.parametrize("publisher", ["", "http://", "a b", "hf://"])
def test_publisher_without_a_host(publisher: str) -> None:
    """What has no host is refused by name."""
    with pytest.raises(ValueError, match="cannot tell the host"):
        same_host(publisher)
