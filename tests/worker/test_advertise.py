"""The advertised address: found from what is bound, or read from a base URL."""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Optional

import pytest

from selfhost.errors import SettingsError, StatusServerError
from selfhost.worker import advertise
from selfhost.worker.advertise import (
    AdvertisedAddress,
    InterfaceAddress,
    advertised_address,
    local_interfaces,
)

LO = InterfaceAddress("lo", "127.0.0.1")
LO_V6 = InterfaceAddress("lo", "::1")
ETH_V4 = InterfaceAddress("eth0", "192.0.2.7")
ETH_V6 = InterfaceAddress("eth0", "2001:db8::7")
ETH_LINK_LOCAL = InterfaceAddress("eth0", "fe80::7%eth0")
SELF_GIVEN = InterfaceAddress("eth0", "169.254.3.4")
DOWN = InterfaceAddress("eth1", "198.51.100.1", is_up=False)
SECOND = InterfaceAddress("eth2", "203.0.113.2")


@pytest.mark.parametrize(
    ("bound", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9090"),
        ("192.0.2.1", "http://192.0.2.1:9090"),
        ("::1", "http://[::1]:9090"),
        ("2001:DB8:0:0::1", "http://[2001:db8::1]:9090"),
        ("::ffff:127.0.0.1", "http://127.0.0.1:9090"),
        ("fe80::1%eth0", "http://[fe80::1]:9090"),
    ],
)
def test_bound_address_is_itself(bound: str, url: str) -> None:
    """A specific address is itself: brackets round IPv6, no scope, mapped as IPv4. # catalogue 112."""
    assert advertised_address(bound, 9090, interfaces=[ETH_V4, ETH_V6]).base_url == url


@pytest.mark.parametrize(
    ("bound", "interfaces", "host"),
    [
        ("0.0.0.0", [LO, ETH_V4, SECOND], "192.0.2.7"),
        ("0.0.0.0", [LO, DOWN, SECOND, ETH_V4], "203.0.113.2"),
        ("0.0.0.0", [LO, SELF_GIVEN, ETH_V4], "169.254.3.4"),
        ("0.0.0.0", [ETH_V6, LO_V6, ETH_V4], "192.0.2.7"),
        ("::ffff:0.0.0.0", [ETH_V6, ETH_V4], "192.0.2.7"),
        ("::", [LO, LO_V6, ETH_V4, ETH_LINK_LOCAL, ETH_V6], "2001:db8::7"),
        ("::", [LO, ETH_LINK_LOCAL, ETH_V4], "192.0.2.7"),
    ],
)
def test_wildcard_stands_for_the_first_reachable_address(
    bound: str, interfaces: list[InterfaceAddress], host: str
) -> None:
    """Up, not loopback, in the system's order; IPv6 only where that was bound. # catalogue 45."""
    assert advertised_address(bound, 80, interfaces=interfaces).host == host


@pytest.mark.parametrize(
    ("bound", "interfaces"),
    [
        ("0.0.0.0", []),
        ("0.0.0.0", [LO, LO_V6, ETH_V6, DOWN]),
        ("::", [LO, LO_V6, ETH_LINK_LOCAL]),
        ("::", [InterfaceAddress("odd", address) for address in ("0.0.0.0", "::", "")]),
    ],
)
def test_wildcard_without_a_reachable_address_is_an_error(
    bound: str, interfaces: list[InterfaceAddress]
) -> None:
    """Neither loopback nor a wildcard is ever published in its place. # catalogue 45."""
    with pytest.raises(StatusServerError, match="DYN_SYSTEM_ADVERTISE_URL") as caught:
        advertised_address(bound, 9090, interfaces=interfaces)

    assert caught.value.address == bound


@pytest.mark.parametrize("bound", ["", "localhost", "/run/socket", "1.2.3"])
def test_what_is_no_ip_address_is_an_error(bound: str) -> None:
    """The bound address is wanted, not the name that it was asked for by."""
    with pytest.raises(StatusServerError, match="bound IP address"):
        advertised_address(bound, 9090, interfaces=[ETH_V4])


def test_scheme_is_kept() -> None:
    """A server that speaks TLS says https."""
    assert advertised_address("127.0.0.1", 443, scheme="https").base_url == "https://127.0.0.1"


def test_really_bound_sockets_can_be_reached_at_what_is_advertised() -> None:
    """A wildcard's advertised address leads back to the very socket, wherever this machine has one."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        try:
            found = advertised_address(*server.getsockname())
        except StatusServerError:
            pytest.skip("this machine has loopback only")

        assert not ipaddress.ip_address(found.host).is_loopback
        assert found.port is not None
        with socket.create_connection((found.host, found.port), timeout=5) as client:
            assert client.getpeername()[1] == server.getsockname()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loopback may be missing from the host's name")
def test_interfaces_of_this_machine_include_loopback() -> None:
    """The kernel is really asked: loopback is there, and every entry is an address without a scope."""
    found = local_interfaces()

    assert any(ipaddress.ip_address(entry.address).is_loopback for entry in found)


def test_host_name_is_asked_where_the_system_is_not_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel's lists the host's own name is resolved, IPv4 first."""
    monkeypatch.setattr(sys, "platform", "plan9")
    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    answers = [(socket.AF_INET6, 0, 0, "", ("::1", 0, 0, 0)), (socket.AF_INET, 0, 0, "", ("192.0.2.9", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers)

    assert [entry.address for entry in local_interfaces()] == ["192.0.2.9", "::1"]


def test_host_name_that_does_not_resolve_gives_no_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no crash: advertised_address then says what to set."""

    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    assert list(advertise._of_host_name()) == []


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", AdvertisedAddress("http", "h", None)),
        ("HTTP://Gateway.Example:8080/", AdvertisedAddress("http", "gateway.example", 8080)),
        ("https://h/a/b//", AdvertisedAddress("https", "h", None, "/a/b")),
        ("https://h:443", AdvertisedAddress("https", "h", 443)),
        ("http://[2001:DB8::0:1]:9/x%20y", AdvertisedAddress("http", "2001:db8::1", 9, "/x%20y")),
        ("http://[::ffff:192.0.2.1]", AdvertisedAddress("http", "192.0.2.1", None)),
        ("http://192.0.2.1:65535", AdvertisedAddress("http", "192.0.2.1", 65535)),
        ("http://my_svc.ns-1.x/~u/@x", AdvertisedAddress("http", "my_svc.ns-1.x", None, "/~u/@x")),
        ("http://localhost:1", AdvertisedAddress("http", "localhost", 1)),
    ],
)
def test_base_url_is_read(url: str, address: AdvertisedAddress) -> None:
    """Host and scheme in lower case, no slash at the end, an address in its shortest form."""
    assert AdvertisedAddress.parse(url) == address


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://h:80/", "http://h"),
        ("https://h:443/p/", "https://h/p"),
        ("http://h:443", "http://h:443"),
        ("http://[::1]:9090/prefix/", "http://[::1]:9090/prefix"),
    ],
)
def test_base_url_is_in_normal_form(url: str, normal: str) -> None:
    """What is published is what URL parsers make of it, and reads back as the same address."""
    address = AdvertisedAddress.parse(url)

    assert address.base_url == str(address) == normal
    assert AdvertisedAddress.parse(normal).base_url == normal


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "start with"),
        ("h:80", "start with"),
        ("//h", "start with"),
        ("ftp://h", "start with"),
        ("http:/h", "start with"),
        ("file:///etc", "start with"),
        ("http://", "host is missing"),
        ("http:///p", "host is missing"),
        ("http://:80", "host is missing"),
        ("http://h:", "port"),
        ("http://h:0", "port"),
        ("http://h:65536", "port"),
        ("http://h:8o", "port"),
        ("http://h:-1", "port"),
        ("http://::1", "brackets"),
        ("http://2001:db8::1/p", "brackets"),
        ("http://[::1", "host and port"),
        ("http://[::1]9", "host and port"),
        ("http://[h]", "no IP address"),
        ("http://[192.0.2.1]", "no IP address"),
        ("http://[fe80::1%25eth0]", "scope"),
        ("http://[fe80::1%eth0]", "scope"),
        ("http://0.0.0.0:9", "none to connect to"),
        ("http://[::]:9", "none to connect to"),
        ("http://[::ffff:0.0.0.0]", "none to connect to"),
        ("http://0", "no IP address"),
        ("http://0x0", "no IP address"),
        ("http://127.1", "no IP address"),
        ("http://a.b.0x7f", "no IP address"),
        ("http://256.0.0.1", "no IP address"),
        ("http://192.000.2.1", "no IP address"),
        ("http://-h", "no host name"),
        ("http://a..b", "no host name"),
        ("http://" + "a" * 64, "no host name"),
        ("http://h!", "no host name"),
        ("http://user@h", "user name"),
        ("http://h?q", "query"),
        ("http://h/?", "query"),
        ("http://h/#f", "fragment"),
        ("http://h/a b", "spaces"),
        ("http://h\n", "control"),
        ("http://h/\x7f", "control"),
        ("http://h\x00", "control"),
        ("http://höst", "ASCII"),
        ("http://h/%zz", "%XX"),
        ("http://h/a\\b", "%XX"),
        ('http://h/"', "%XX"),
        ("http://h/a/../b", "segments"),
        ("http://h/%2E%2e", "segments"),
        ("http://h/./x", "segments"),
    ],
)
def test_unusable_base_url_is_an_error_with_the_reason(url: str, reason: str) -> None:
    """Each for what is wrong with it; the error names the setting and what is accepted."""
    with pytest.raises(SettingsError) as caught:
        AdvertisedAddress.parse(url, variable="DYN_SYSTEM_ADVERTISE_URL")

    assert reason in str(caught.value)
    assert str(caught.value).startswith("DYN_SYSTEM_ADVERTISE_URL=")
    assert caught.value.variable == "DYN_SYSTEM_ADVERTISE_URL"
    assert caught.value.accepted in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://u:hunter2@h/", "http://u:hunter2/x@h", "http://h/?token=hunter2", "http://u:hunter2@h\n"]
)
def test_secrets_in_a_base_url_are_not_repeated(url: str) -> None:
    """The error may end up in a log; a password or a token must not."""
    with pytest.raises(SettingsError) as caught:
        AdvertisedAddress.parse(url)

    assert "hunter2" not in f"{caught.value} {caught.value.value}"


@pytest.mark.parametrize("port", [None, 80, 8080])
def test_host_of_six_is_bracketed(port: Optional[int]) -> None:
    """Every IPv6 host stands in brackets, with a port and without. # catalogue 112."""
    assert AdvertisedAddress("http", "::1", port, "/p").base_url.startswith("http://[::1]")
