"""The table of worker/test_http_table.py under more servers: inside other applications, and behind a proxy.

That module itself runs it under wsgiref, waitress, gunicorn's sync and gthread workers and our own server.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Callable

import pytest
from foreign import HERE, NGINX, Address, connect, environment, gunicorn, nginx, running

TABLE = runpy.run_path(str(HERE / "worker" / "test_http_table.py"))
PREFIX: str = TABLE["PREFIX"]
LOCATIONS = f"""
merge_slashes off;
location / {{ proxy_pass http://UPSTREAM; }}
location {PREFIX}/ {{ proxy_pass http://UPSTREAM/; }}
"""

# kind -> the prefix that its clients use, and gunicorn's options; DIR is where the files are
KINDS = {
    "gevent": ("", "-k gevent site_app:make('DIR')"),
    "flask": (PREFIX, "--threads 2 sites:flask('DIR')"),
    "django": (PREFIX, "--threads 2 sites:django('DIR')"),
    "nginx": ("", "--threads 2 site_app:make('DIR')"),
    "nginx-prefix": (PREFIX, "--threads 2 site_app:make('DIR')"),
}
HOSTS, PROXIES = ["gevent", "flask", "django"], ["nginx", "nginx-prefix"]

# nginx refuses some requests itself, and resolves the dots in a path from which it takes a prefix away.
NGINX_OWN = re.compile(r"(%00|%|%zz)$|/(\.\.?|%2e%2e)(/|%2f)")
PROXIED = [case for case in TABLE["CASES"] if case.method != "TRACE" and not NGINX_OWN.search(case.target)]


@pytest.fixture(scope="module")
def ask(request: pytest.FixtureRequest, tmp_path_factory: Any, parse: Any) -> Iterator[Callable[[Any], Any]]:
    """Return a function that sends one case to one kind of server and reads the answer strictly."""
    kind = request.param
    if kind in HOSTS:
        pytest.importorskip(kind)
    elif NGINX is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("site")
    prefix, options = KINDS[kind]
    with ExitStack() as stack:
        command = gunicorn(*options.replace("DIR", str(folder)).split())
        env = environment(folder, HERE / "worker", HERE / "mounted")
        server = stack.enter_context(running(command, folder, env))
        address: Address = server.address
        if kind in PROXIES:
            upstream = server.url.partition("//")[2]
            address = stack.enter_context(nginx(LOCATIONS.replace("UPSTREAM", upstream)))

        def send(case: Any) -> Any:
            with connect(address) as sock:
                sock.sendall(TABLE["request_bytes"](case, prefix, "Connection: close"))
                return parse(b"".join(iter(lambda: sock.recv(1 << 20), b"")), [case.method])[0]

        yield send


@pytest.mark.parametrize("ask", HOSTS, indirect=True)
@pytest.mark.parametrize("case", TABLE["CASES"], ids=str)
def test_table_in_other_hosts(ask: Callable[[Any], Any], case: Any) -> None:
    """Every server gives the same answer."""  # catalogue 88, 144
    check(ask(case), case)


@pytest.mark.parametrize("ask", PROXIES, indirect=True)
@pytest.mark.parametrize("case", PROXIED, ids=str)
def test_table_behind_a_proxy(ask: Callable[[Any], Any], case: Any) -> None:
    """Nothing on the way changes it."""
    check(ask(case), case)


def check(reply: Any, case: Any) -> None:
    """Compare an answer with what the table says; none redirects."""
    assert reply.status == case.status
    if case.body is not None:
        assert reply.body == case.body
    assert {name: reply.get(name.lower()) for name in case.fields} == case.fields
    assert reply.get("date") is not None  # one, not two
    assert reply.get("x-content-type-options") == "nosniff"
    assert reply.get("location") is None


@pytest.mark.parametrize("ask", HOSTS + PROXIES, indirect=True)
@pytest.mark.parametrize("target", ["/v1/metadata/m%2F_base", "/v1/metadata/m/_base%2fdigits.txt"])
def test_encoded_slash_separates_nothing(
    ask: Callable[[Any], Any], request: pytest.FixtureRequest, target: str
) -> None:
    """Behind nginx it does where nginx takes a prefix away: it writes the path anew, decoded."""
    is_told = request.node.callspec.params["ask"] != "nginx-prefix"

    assert ask(TABLE["missing"](target)).status == (404 if is_told else 200)
