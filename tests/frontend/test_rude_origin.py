"""What a resolver makes of an origin that misbehaves: the right bytes, or one error that says what failed.

The misbehaviours stand in misbehaviours.py, one function each; here stands what each must come to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import misbehaviours
import pytest
from helpers import MemorySink, RudeOrigin, make_card

import selfhost
from selfhost.card.checksum import hash_file
from selfhost.errors import (
    ConnectFailed,
    FetchError,
    FetchTimeout,
    HTTPStatusError,
    ResolveError,
    SizeLimitExceeded,
    VerificationError,
)
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver, ResolvedModel, ResolverLimits
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.transport_http import HttpTransport

DEADLINE = 5.0  # seconds for what should take 0.3: one time-out for silence, and no more
LIMITS = ResolverLimits(
    connections=1,  # one file after the other: which of them fails, and how often, is no matter of chance
    first_pause_seconds=0.01,
    max_pause_seconds=0.02,
    fetch=FetchLimits(connect_seconds=0.3, read_seconds=0.3, total_seconds=2.0, max_unsized_bytes=1 << 20),
)


class Fails(NamedTuple):
    """Every attempt fails with an error of exactly this type, whose attributes have these values."""

    error: type[Exception]
    attributes: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __str__(self) -> str:
        return " ".join((self.error.__name__, *(f"{key}={value}" for key, value in self.attributes.items())))


def status(code: int, **attributes: Any) -> Fails:
    """Return what a status comes to."""
    return Fails(HTTPStatusError, {"status": code, **attributes})


RIGHT = None  # the right bytes, in spite of all
BROKEN = Fails(FetchError, {"is_transient": True})  # asked again, in vain
NONSENSE = Fails(FetchError, {"is_transient": False})  # not asked again
WRONG = Fails(VerificationError)
TOO_LARGE = Fails(SizeLimitExceeded)
SILENT = Fails(FetchTimeout, {"phase": "headers", "seconds": 0.3})
SLOW = Fails(FetchTimeout, {"phase": "body", "seconds": 0.3})
TOO_LONG = Fails(FetchTimeout, {"phase": "total", "seconds": 2.0})  # the one large file; small ones arrive

EXPECTED: dict[str, Optional[Fails]] = {
    # bodies: catalogue 1, 2, 4, 123
    "short_body": BROKEN,
    "long_body": TOO_LARGE,
    "flipped_bit": WRONG,
    "other_bytes_shorter": WRONG,
    "endless_body_announced": TOO_LARGE,
    "endless_body_without_length": TOO_LARGE,
    "endless_body_chunked": TOO_LARGE,
    "endless_rest": RIGHT,
    "second_answer_after_the_body": RIGHT,
    "content_changes": RIGHT,
    # silence: catalogue 7
    "never_reads": SILENT,
    "stalled_before_status": SILENT,
    "stalled_in_header": SILENT,
    "slow_loris_header": SILENT,
    "stalled_in_body": SLOW,
    "dripping_body": SLOW,
    "steady_drip": TOO_LONG,
    # Content-Length
    "length_short": WRONG,
    "length_long": TOO_LARGE,
    "length_negative": NONSENSE,
    "length_not_a_number": NONSENSE,
    "length_with_sign": NONSENSE,
    "lengths_differ": NONSENSE,
    "length_of_20_digits": NONSENSE,
    "length_of_5000_digits": NONSENSE,
    "length_and_chunked": NONSENSE,
    "no_length": RIGHT,
    "no_length_and_cut": WRONG,
    # ranges: catalogue 49, 116, 118
    "unasked_206": status(206),
    "unasked_416": status(416),
    "range_ignored": RIGHT,
    "range_refused": RIGHT,
    "range_with_wrong_start": RIGHT,
    "range_with_wrong_end": RIGHT,
    "range_with_wrong_total": RIGHT,
    "range_without_content_range": RIGHT,
    "range_in_other_unit": RIGHT,
    "range_that_is_junk": RIGHT,
    "range_as_multipart": RIGHT,
    "range_of_another_version": RIGHT,
    "range_with_wrong_bytes": RIGHT,
    "range_cut_again": BROKEN,
    "weak_tag": RIGHT,
    # encodings: catalogue 52
    "gzip_encoded": NONSENSE,
    "gzip_bomb": NONSENSE,
    "deflate_announced": NONSENSE,
    "unknown_transfer_encoding": NONSENSE,
    # redirects: catalogue 11, 12
    "redirect_loop": status(302),
    "redirect_to_other_host": status(307),
    "redirect_to_file": status(301),
    "redirect_to_metadata_address": status(308),
    # headers: catalogue 53
    "header_flood": NONSENSE,
    "header_line_of_1_mib": NONSENSE,
    "endless_header": NONSENSE,
    "endless_continue": NONSENSE,
    "early_hints_flood": NONSENSE,
    "header_absurd_but_legal": RIGHT,
    "header_folded": RIGHT,
    "header_in_small_pieces": RIGHT,
    "header_with_nul": RIGHT,
    # no HTTP
    "garbage": NONSENSE,
    "endless_garbage": NONSENSE,
    "http_0_9": NONSENSE,
    "http_2_preface": NONSENSE,
    "http_9_status_line": NONSENSE,
    "tls_on_a_plain_port": SILENT,
    # connections that end
    "refuses": Fails(ConnectFailed, {"is_transient": True}),
    "closes_on_accept": BROKEN,
    "empty_reply": BROKEN,
    "reset_before_answer": BROKEN,
    "reset_in_header": BROKEN,
    "reset_in_body": BROKEN,
    "closed_when_idle": RIGHT,
    "late_endless_rest": RIGHT,
    "late_garbage": RIGHT,
    "late_reset_in_header": RIGHT,
    # chunks
    "chunks_that_are_legal": RIGHT,
    "chunk_cut": BROKEN,
    "chunks_without_last": BROKEN,
    "chunk_size_is_junk": BROKEN,
    "chunk_size_negative": BROKEN,
    "chunk_size_huge": TOO_LARGE,
    "chunk_extension_flood": NONSENSE,
    "chunks_of_nothing": NONSENSE,
    "endless_trailers": NONSENSE,
    # statuses: catalogue 118, 119, 120, 121
    "status_500_twice": RIGHT,
    "status_500": status(500, is_transient=True),
    "status_503_retry_after_1": RIGHT,
    "status_503_retry_after_3600": status(503, is_transient=True, retry_after=3600.0),
    "status_503_retry_after_junk": RIGHT,
    "status_503_retry_after_date": RIGHT,
    "status_429": RIGHT,
    "status_404": status(404, is_transient=False),
    "status_401": status(401, is_transient=False),
    "status_204": status(204),
    "status_304": status(304),
    "status_101": status(101),
    "error_body_of_1_mib": status(404),
    "html_200": WRONG,
    "empty_200": WRONG,
}

StartOrigin = Callable[..., RudeOrigin]


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    """Return a cache of the test's own."""
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def resolver(leaves_nothing: None, cache: BlobCache) -> Iterator[MetadataResolver]:
    """Return a resolver that is quickly impatient."""
    transport = HttpTransport(limits=LIMITS.fetch)
    with MetadataResolver(cache, transports={"http": transport}, limits=LIMITS) as resolver:
        yield resolver
    transport.close()


@pytest.fixture
def hasty_resolver(resolver: MetadataResolver, cache: BlobCache) -> Iterator[MetadataResolver]:
    """Return one that fetches all files at once."""
    limits = replace(LIMITS, connections=4, stagger_seconds=0.0)
    with MetadataResolver(cache, limits=limits) as resolver:
        yield resolver


def content(model: ResolvedModel) -> dict[str, bytes]:
    """Return the files of a resolved model, by name."""
    return {name: Path(model.local_dir, name).read_bytes() for name in os.listdir(model.local_dir)}


def assert_clean(cache: BlobCache, *, models: int) -> None:
    """Check that the cache holds right blobs and whole models only, and that no thread is left at work."""
    found: dict[str, list[str]] = {"blobs": [], "by-slug": []}
    for folder, _, names in os.walk(cache.root):
        top = os.path.relpath(folder, cache.root).partition(os.sep)[0]
        found.setdefault(top, []).extend(os.path.join(folder, name) for name in names)
    assert set(found) <= {".", "blobs", "by-slug", "locks", "stamps"}
    assert found.get(".", []) == []
    for path in found["blobs"]:  # a temporary file or one that was set aside has another name
        assert os.path.basename(path) == hash_file(path)[0].hex
    assert bool(found["by-slug"]) == bool(models)
    assert len(cache.models()) == models
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("selfhost")]


def test_mistyped_misbehaviour_is_none() -> None:
    """A name that nobody has is an error, not a decent server."""
    with pytest.raises(KeyError):
        RudeOrigin({}, "dripping_boddy")


def test_every_misbehaviour_has_its_outcome() -> None:
    """The table lacks none."""
    names = {*misbehaviours.ON_REQUEST, *misbehaviours.ON_ACCEPT, misbehaviours.REFUSES}

    assert set(EXPECTED) == names
    assert len(names) >= 90


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items(), ids=map(str, EXPECTED))
def test_alone(
    rude_origin: StartOrigin,
    files: dict[str, bytes],
    resolver: MetadataResolver,
    cache: BlobCache,
    name: str,
    expected: Optional[Fails],
) -> None:
    """A rude origin gives the right bytes or one error, soon, and nothing is left over."""
    origin = rude_origin(files, name)
    started = time.monotonic()
    found, error = None, None

    try:
        found = content(resolver.resolve(make_card(files, origin.url)))
    except ResolveError as err:
        error = err

    assert time.monotonic() - started < DEADLINE
    assert_clean(cache, models=int(error is None))
    if expected is None:
        assert (found, error) == (files, None)
    else:
        assert error is not None, f"got {found}"
        assert error.file in files
        assert_each(error, expected)


def assert_each(error: ResolveError, expected: Fails) -> None:
    """Check that every attempt failed as expected, and that the message names each source."""
    assert error.attempts
    for attempt in error.attempts:
        assert type(attempt.error) is expected.error, attempt
        found = {name: getattr(attempt.error, name) for name in expected.attributes}
        assert found == expected.attributes, attempt
        assert attempt.url in str(error)
        assert 0 <= attempt.seconds < DEADLINE


@pytest.mark.parametrize("name", EXPECTED)
def test_before_a_good_replica(
    rude_origin: StartOrigin,
    files: dict[str, bytes],
    hasty_resolver: MetadataResolver,
    cache: BlobCache,
    name: str,
) -> None:
    """With a good replica no misbehaviour matters, or costs more than a time-out (catalogue 114)."""
    rude, good = rude_origin(files, name), rude_origin(files)
    card, replica = (make_card(files, origin.url) for origin in (rude, good))
    started = time.monotonic()

    model = hasty_resolver.resolve(card, replicas=[replica])

    assert time.monotonic() - started < DEADLINE
    assert content(model) == files
    assert_clean(cache, models=1)


@pytest.mark.parametrize("name", ["flipped_bit", "no_length_and_cut", "html_200"])
def test_unsized_card(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver, cache: BlobCache, name: str
) -> None:
    """Where the card tells no sizes, the hash still decides."""
    origin = rude_origin(files, name)

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(make_card(files, origin.url, sized=False))
    assert_each(caught.value, WRONG)
    assert_clean(cache, models=0)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("endless_body")])
def test_endless_body_of_unknown_size(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver, cache: BlobCache, name: str
) -> None:
    """Where the card tells no sizes, the frontend's own limit ends an endless body (catalogue 4)."""
    origin = rude_origin(files, name)

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(make_card(files, origin.url, sized=False))
    assert_each(caught.value, Fails(SizeLimitExceeded, {"limit": 1 << 20}))
    assert_clean(cache, models=0)


# ------------------------------------------------------------------ what was asked for


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("redirect_")])
def test_redirects_are_not_followed(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver, name: str
) -> None:
    """Nobody is asked for where a redirect points to, nor the same origin again (catalogue 11, 12)."""
    origin = rude_origin(files, name)

    with pytest.raises(ResolveError, match="redirects are not followed"):
        resolver.resolve(make_card(files, origin.url))
    assert all(origin.count(file) <= 1 for file in files)
    assert not [request for request in origin.requests if "elsewhere" in request.target]


@pytest.mark.parametrize("name", ["status_404", "flipped_bit", "stalled_in_body", "garbage"])
def test_not_asked_again(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver, name: str
) -> None:
    """What will not be better in a moment is asked for once (catalogue 121)."""
    origin = rude_origin(files, name)

    with pytest.raises(ResolveError):
        resolver.resolve(make_card(files, origin.url))
    assert all(origin.count(file) <= 1 for file in files)


@pytest.mark.parametrize("name", ["status_500", "short_body", "empty_reply"])
def test_asked_again_within_bounds(rude_origin: StartOrigin, resolver: MetadataResolver, name: str) -> None:
    """What may be over in a moment is asked for as often as the limits say (catalogue 120)."""
    files = {"config.json": b"0123456789"}
    origin = rude_origin(files, name)

    with pytest.raises(ResolveError):
        resolver.resolve(make_card(files, origin.url))
    assert origin.count("config.json") == LIMITS.rounds


def test_continues_where_it_broke_off(rude_origin: StartOrigin, resolver: MetadataResolver) -> None:
    """The second request asks for the second half alone, on condition that the file is the same."""
    files = {"config.json": b"0123456789"}
    origin = rude_origin(files, "short_body", times=1)

    assert content(resolver.resolve(make_card(files, origin.url))) == files
    first, second = origin.requests
    assert "range" not in first.fields
    assert second.fields["range"] == "bytes=5-"
    assert second.fields["if-range"].startswith('"')


def test_continues_at_another_replica(rude_origin: StartOrigin, resolver: MetadataResolver) -> None:
    """What one replica began another one ends: their tags are equal."""
    files = {"config.json": b"0123456789"}
    rude, good = rude_origin(files, "stalled_in_body"), rude_origin(files)
    card, replica = (make_card(files, origin.url) for origin in (rude, good))

    assert content(resolver.resolve(card, replicas=[replica])) == files
    assert [request.fields.get("range") for request in good.requests] == ["bytes=5-"]


def test_weak_tag_is_not_continued(rude_origin: StartOrigin, resolver: MetadataResolver) -> None:
    """A weak tag does not promise the same bytes, so no range is asked for."""
    files = {"config.json": b"0123456789"}
    origin = rude_origin(files, "weak_tag")

    assert content(resolver.resolve(make_card(files, origin.url))) == files
    assert [request.fields.get("range") for request in origin.requests] == [None, None]


@pytest.mark.parametrize("name", ["second_answer_after_the_body", "endless_rest", "closed_when_idle"])
def test_odd_connection_is_not_used_again(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver, name: str
) -> None:
    """Bytes behind an answer poison no later one: each request has its own connection (catalogue 123)."""
    origin = rude_origin(files, name)

    assert content(resolver.resolve(make_card(files, origin.url))) == files
    assert len({request.connection for request in origin.requests}) == len(files)


@pytest.mark.parametrize("name", ["late_endless_rest", "late_garbage"])
def test_rest_that_comes_late(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver, name: str
) -> None:
    """What is no answer may still belong to the last one: asked on a new connection (catalogue 123)."""
    origin = rude_origin(files, name)

    assert content(resolver.resolve(make_card(files, origin.url))) == files
    assert len(origin.requests) == 2 * len(files) - 1


def test_no_encoding_and_no_credentials(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver
) -> None:
    """A request asks for the bytes as they are, and carries nothing that is not needed (catalogue 52)."""
    origin = rude_origin(files)
    resolver.resolve(make_card(files, origin.url))

    for request in origin.requests:
        assert request.fields["accept-encoding"] == "identity"
        assert not {"authorization", "cookie", "proxy-authorization", "referer"} & set(request.fields)


def test_captive_portal(
    rude_origin: StartOrigin, files: dict[str, bytes], resolver: MetadataResolver
) -> None:
    """A page for humans in the place of a file is called by its name (catalogue 119)."""
    origin = rude_origin(files, "html_200")

    with pytest.raises(ResolveError, match="HTML"):
        resolver.resolve(make_card(files, origin.url))


# ------------------------------------------------------------------ memory

FLOODS = [
    "endless_body_announced",
    "endless_body_without_length",
    "endless_body_chunked",
    "endless_rest",
    "gzip_bomb",
    "header_flood",
    "header_line_of_1_mib",
    "endless_header",
    "endless_continue",
    "early_hints_flood",
    "endless_garbage",
    "chunk_size_huge",
    "chunk_extension_flood",
    "chunks_of_nothing",
    "endless_trailers",
    "error_body_of_1_mib",
]

# Resolves one model, well, and then the others; prints by how many KiB the most memory it ever had grew.
# (Not from getrusage: that begins with what the process had that started this one.)
RESOLVE_ALL = """
import re, sys
from selfhost.errors import ResolveError
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver, ResolverLimits
from selfhost.card.model_card import ModelDeploymentCard

def peak():
    with open("/proc/self/status") as file:
        return int(re.search("VmHWM:[^0-9]*([0-9]+) kB", file.read())[1])

cards = [ModelDeploymentCard.from_json(line) for line in sys.stdin]
before = None
with MetadataResolver(BlobCache(sys.argv[1], fsync=False), limits=ResolverLimits(rounds=1)) as resolver:
    for card in cards:
        try:
            resolver.resolve(card)
        except ResolveError as error:
            print(card.display_name, type(error.attempts[0].error).__name__)
        else:
            print(card.display_name, "right")
        before = before or peak()
print("grown", peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads what Linux tells of a process")
def test_memory_is_bounded(leaves_nothing: None, tmp_path: Path) -> None:
    """Endless and exploding answers take less than 16 MiB, with the default limits (catalogue 4, 52)."""
    data = os.urandom(300_000)
    files = {name: name.encode() + data for name in ("well", *FLOODS)}
    with RudeOrigin(files) as origin:
        origin.behaviours = {f"/{name}": name for name in FLOODS}
        # Without sizes: up to 64 MiB of each endless body are taken.
        cards = [make_card({name: files[name]}, origin.url, name=name, sized=False) for name in files]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", RESOLVE_ALL, tmp_path / "cache"],
            input="\n".join(card.to_json() for card in cards),
            env={**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
        )
    results = dict(line.split() for line in done.stdout.splitlines())

    assert done.stderr == ""
    assert results["well"] == results["endless_rest"] == "right"
    assert results["endless_body_chunked"] == results["endless_body_without_length"] == "SizeLimitExceeded"
    assert int(results["grown"]) < 16 << 10


# ------------------------------------------------------------------ the transport alone


def test_slow_body_is_handed_over_while_it_comes(rude_origin: StartOrigin) -> None:
    """A sink sees the bytes of a slow source as they come, not when a buffer is full or the time is over."""
    data = os.urandom(200_000)
    origin = rude_origin({"f": data}, "steady_drip")

    class StoppingSink(MemorySink):
        def write(self, data: Any) -> None:
            super().write(data)
            if self.received >= 5000:
                raise InterruptedError

    sink, transport = StoppingSink(), HttpTransport()
    started = time.monotonic()
    with pytest.raises(InterruptedError):
        transport.fetch(origin.url_of("f"), sink, max_bytes=len(data))
    transport.close()

    assert time.monotonic() - started < DEADLINE  # the whole takes ten
    assert sink.data == data[: sink.received]
    assert sink.received < len(data) / 2


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in EXPECTED
        if name.startswith("range_") and name not in ("range_cut_again", "range_with_wrong_bytes")
    ],
)
def test_doubtful_continuation_starts_anew(rude_origin: StartOrigin, name: str) -> None:
    """Whatever is odd about a 206, the file is asked for from its first byte (catalogue 49, 116)."""
    data = bytes(range(100))
    origin = rude_origin({"f": data}, name)
    sink = MemorySink()
    transport = HttpTransport(limits=LIMITS.fetch)
    with pytest.raises(FetchError, match="expected 100 bytes, found 50"):
        transport.fetch(origin.url_of("f"), sink, max_bytes=100)

    transport.fetch(origin.url_of("f"), sink, max_bytes=100)
    transport.close()
    assert bytes(sink.data) == data
    assert sink.restarts == 1


def test_stops_one_byte_behind_the_cap(rude_origin: StartOrigin) -> None:
    """Of an endless body no more than the cap gets into the sink (catalogue 4)."""
    origin = rude_origin({"f": b"0123456789"}, "endless_body_chunked")
    sink = MemorySink()
    transport = HttpTransport(limits=LIMITS.fetch)

    with pytest.raises(SizeLimitExceeded) as caught:
        transport.fetch(origin.url_of("f"), sink, max_bytes=1000)
    transport.close()
    assert (caught.value.limit, caught.value.received) == (1000, 1001)
    assert len(sink.data) <= 1000
