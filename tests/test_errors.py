"""The tree of errors: their journey to another process, and what their messages show of URLs."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from selfhost.errors import (
    Attempt,
    BlobMissing,
    FetchTimeout,
    HTTPStatusError,
    ResolveError,
    SelfHostError,
    VerificationError,
    shown_url,
    without_userinfo,
)
from selfhost.frontend.http_connection import StaleConnection

ARGUMENTS: dict[str, Any] = {
    "issues": ("one", "two"), "status": 404, "seconds": 2.5, "limit": 10, "received": 11, "errno": 13,
    "is_transient": True, "retry_after": 7.0, "size": 3, "missing": ["blake3:00"], "checksums": ("blake3:1",),
}  # fmt: skip


def every_class(base: type = SelfHostError) -> Iterator[type]:
    """Yield the classes of the tree."""
    yield base
    for known in base.__subclasses__():
        yield from every_class(known)


def make(kind: type) -> SelfHostError:
    """Return an error with something in every attribute."""
    if "__init__" not in vars(kind) and kind is SelfHostError:
        return SelfHostError("what happened")
    names = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    ]
    arguments = {name: ARGUMENTS.get(name, f"a {name}") for name in names}
    if "attempts" in names:
        inner = VerificationError("wrong", url="http://w/a", expected="x", actual="y", size=3)
        arguments["attempts"] = [Attempt("http://w/a", inner, 0.5)]
    error: SelfHostError = kind("what happened", **arguments)
    return error


def state(value: object) -> object:
    """Return what can be compared of an error, and of the errors in it."""
    if isinstance(value, BaseException):
        return type(value), value.args, str(value), state(vars(value))
    if isinstance(value, dict):
        return {name: state(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return type(value), tuple(map(state, value))
    return value


FAILING_WORK = """
from selfhost.errors import Attempt, HTTPStatusError, ResolveError

inner = HTTPStatusError("no", url="http://w/a", status=404)
raise ResolveError("no source", file="a", attempts=[Attempt("http://w/a", inner, 0.5)])
"""


def test_the_whole_tree_is_looked_at() -> None:
    """Errors of other modules are among them."""
    assert {StaleConnection, BlobMissing, ResolveError, FetchTimeout} <= set(every_class())


@pytest.mark.parametrize("kind", list(every_class()), ids=lambda kind: kind.__name__)
def test_copies_are_equal(kind: type) -> None:
    """Pickled by any protocol, or copied, an error keeps its type, its text and every attribute."""
    error = make(kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert state(pickle.loads(pickle.dumps(error, protocol))) == state(error)
    assert state(copy.copy(error)) == state(copy.deepcopy(error)) == state(error)


def test_what_was_added_is_kept() -> None:
    """An attribute that somebody set on an error travels, too."""
    error = make(ResolveError)
    error.model = "org/model"  # type: ignore[attr-defined]

    assert pickle.loads(pickle.dumps(error)).model == "org/model"


def test_pool_of_processes_brings_the_error() -> None:
    """What a worker process raises is caught by its own type in the process that waits for it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = pool.submit(exec, FAILING_WORK, {})
        with pytest.raises(ResolveError, match="no source") as caught:
            work.result(30)

    (attempt,) = caught.value.attempts
    assert isinstance(attempt.error, HTTPStatusError)
    assert (caught.value.file, attempt.error.status) == ("a", 404)


# ------------------------------------------------------------------ URLs in messages

OWN_QUERY = "?blake3=" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://w:1/a", "http://w:1/a"),
        ("http://me:s3cret@w:1/a", "http://***@w:1/a"),
        ("http://me@w/a@b", "http://***@w/a@b"),
        ("http://a@b:s3cret@w/", "http://***@w/"),
        ("HTTP:\\\\me:s3cret@w\\a@b", "HTTP:\\\\***@w\\a@b"),
        ("http:me:s3cret@w/a", "http:***@w/a"),
        ("http:////me:s3cret@w/a", "http:////***@w/a"),
        (" ht\ntp:/\t/me:s3\ncret@w/a", " http://***@w/a"),
        ("ftp://me:s3cret@w/a", "ftp://***@w/a"),
        ("s3://key:s3\\cret@bucket/a", "s3://***@bucket/a"),
        ("s3:key:s3cret@bucket", "s3:***@bucket"),
        ("hf://org/model@v1/a", "hf://org/model@v1/a"),
        ("http://evil\\x@w/a", "http://evil\\x@w/a"),
        ("/home/me@work/a?b#c", "/home/me@work/a?b#c"),
        ("http://w/a?sig=s3cret", "http://w/a?..."),
        ("http://w/a#s3cret", "http://w/a#..."),
        ("http://w/a?b#s3cret", "http://w/a?..."),
        ("ht\ntp://w/a?s3cret\n", "ht\ntp://w/a?..."),
        ("http://w/a" + OWN_QUERY, "http://w/a" + OWN_QUERY),
        ("http://w/a" + OWN_QUERY + "&sig=s3cret", "http://w/a?..."),
        ("http://w/a" + OWN_QUERY + "\n", "http://w/a?..."),
        ("", ""),
    ],
)
def test_secrets_of_urls_are_not_shown(url: str, found: str) -> None:
    """User names, passwords and signed queries stay out of messages; host and path are there."""
    assert shown_url(url) == repr(found)


def test_shown_url_is_bounded() -> None:
    """A long URL is cut in its middle; one of a worker is shown whole."""
    usual = (
        "http://10.10.10.10:9090/v1/metadata/some-organisation_some-model/0/tokenizer_config.json" + OWN_QUERY
    )

    assert shown_url(usual) == repr(usual)
    assert len(shown_url("http://w/" + "x" * 10_000)) < 300
    assert len(shown_url("http://w/" + "@" * 10_000)) < 300


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://me:s3cret@w:1/a?b#c", "http://w:1/a?b#c"),
        ("http://w:1/a@b", "http://w:1/a@b"),
        ("/home/me@work/a\n", "/home/me@work/a\n"),
    ],
)
def test_without_userinfo(url: str, found: str) -> None:
    """All but the user name and password stays."""
    assert without_userinfo(url) == found
