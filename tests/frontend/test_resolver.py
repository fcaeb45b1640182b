"""MetadataResolver: from cards to verified directories, with origins that answer out of memory."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import simulator
from helpers import make_card, nothing_left
from simulator import FakeClock, OriginSimulator, Script

import selfhost
from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.slots import ModelSlot
from selfhost.errors import (
    CacheError,
    CardError,
    FetchError,
    FetchTimeout,
    HTTPStatusError,
    ResolveError,
    SchemeNotAllowed,
    SizeLimitExceeded,
    SourceDrifted,
    VerificationError,
)
from selfhost.frontend.cache import BlobCache, BlobMissing
from selfhost.frontend.resolver import MetadataResolver, Progress, ResolvedModel, ResolverLimits
from selfhost.frontend.transport import PATH_SCHEME, FetchLimits

A, B, C = "http://a:9090/m", "http://b:9090/m", "http://c:9090/m"
ONE_BY_ONE = ResolverLimits(connections=1)

MakeResolver = Callable[..., MetadataResolver]
Serve = Callable[..., ModelDeploymentCard]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Check after each test that every thread has ended and every descriptor is closed."""
    with nothing_left():
        yield


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still unless somebody sleeps."""
    return FakeClock()


@pytest.fixture
def origins() -> OriginSimulator:
    """Return origins that have nothing yet."""
    return OriginSimulator()


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def make_resolver(cache: BlobCache, origins: OriginSimulator, clock: FakeClock) -> Iterator[MakeResolver]:
    """Make resolvers over the cache and the origins; they end with the test."""
    made = []

    def make(**options: Any) -> MetadataResolver:
        given = {"transports": {"http": origins}, "clock": clock, "sleep": clock.sleep, "random": lambda: 0.5}
        made.append(MetadataResolver(cache, **{**given, **options}))
        return made[-1]

    yield make
    for resolver in made:
        resolver.close()


@pytest.fixture
def resolver(make_resolver: MakeResolver) -> MetadataResolver:
    """Return a resolver that fetches one file after the other, so that the order is known."""
    return make_resolver(limits=ONE_BY_ONE)


@pytest.fixture
def serve(origins: OriginSimulator) -> Serve:
    """Serve files at an address; return the card of the model."""

    def serve_at(base: str, files: dict[str, bytes], **options: Any) -> ModelDeploymentCard:
        card = make_card(files, base, **options)
        by_digest = {Checksum.of(data): data for data in files.values()}
        origins.files.update({file.path: by_digest[file.checksum] for file, _ in card.iter_metadata_files()})
        return card

    return serve_at


def contents(model: ResolvedModel) -> dict[str, bytes]:
    """Return what is in the directory of a model."""
    return {path.name: path.read_bytes() for path in Path(model.local_dir).iterdir()}


def leftovers(cache: BlobCache) -> list[str]:
    """Return everything below the blobs folder that is no whole blob."""
    blobs = Path(cache.root) / "blobs"
    names = [path.name for path in blobs.iterdir()] if blobs.exists() else []
    return [name for name in names if not re.fullmatch("[0-9a-f]{64}", name)]


def extra(path: str, data: bytes, **changes: Any) -> CheckedFile:
    """Return a file that a card may list."""
    return replace(CheckedFile(path, Checksum.of(data), len(data)), **changes)


# ------------------------------------------------------------------ what comes out


def test_every_file_is_local_and_right(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], cache: BlobCache
) -> None:
    """A card with URLs becomes the same card with paths, in the directory that Dynamo would use."""
    card = serve(A, files)

    model = resolver.resolve(card)

    assert contents(model) == files
    assert model.local_dir == os.path.join(cache.root, "by-slug", card.slug, card.mdcsum)
    assert sorted(model.fetched) == sorted(files)
    assert {file.local_path for file, _ in model.card.iter_metadata_files()} == {
        os.path.join(model.local_dir, name) for name in files
    }
    assert all(file.matches(file.path) for file, _ in model.card.iter_metadata_files())
    assert model.card.mdcsum == card.mdcsum


def test_warm_makes_no_request(
    resolver: MetadataResolver,
    make_resolver: MakeResolver,
    serve: Serve,
    files: dict[str, bytes],
    origins: OriginSimulator,
) -> None:
    """What is in the cache is verified there, by this resolver and by the next one."""
    card = serve(A, files)
    first = resolver.resolve(card)
    origins.asked.clear()

    again = resolver.resolve(card)
    elsewhere = make_resolver().resolve(ModelDeploymentCard.from_json(card.to_json()))

    assert origins.asked == []
    assert again.fetched == elsewhere.fetched == ()
    assert again.card == elsewhere.card == first.card
    assert again.local_dir == elsewhere.local_dir == first.local_dir


def test_warm_only_looks(
    resolver: MetadataResolver,
    serve: Serve,
    files: dict[str, bytes],
    cache: BlobCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that is there is neither fetched nor published again: its lookup is all that is done."""
    card = serve(A, files)
    resolver.resolve(card)
    for method in ("find", "write", "lock", "publish_model"):
        monkeypatch.setattr(cache, method, lambda *args: pytest.fail("more than a look"))

    assert contents(resolver.resolve(card)) == files


def test_blobs_of_another_model_make_no_request(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """The second model of equal content gets a directory of its own and nothing is fetched."""
    first = resolver.resolve(serve(A, files))
    origins.asked.clear()

    second = resolver.resolve(serve(B, files, name="org/other"))

    assert origins.asked == []
    assert second.fetched == ()
    assert second.local_dir != first.local_dir
    assert contents(second) == files


def test_equal_content_is_fetched_once(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """One request per digest, whatever the files are called."""
    model = resolver.resolve(serve(A, {"a.txt": b"same", "b.txt": b"same", "c.txt": b"other"}))

    assert len(origins.asked) == 2
    assert contents(model) == {"a.txt": b"same", "b.txt": b"same", "c.txt": b"other"}
    assert sorted(model.fetched) == ["a.txt", "b.txt", "c.txt"]


def test_largest_file_is_fetched_first(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """What takes longest does not begin last."""
    resolver.resolve(serve(A, {"a.txt": b"a", "b.txt": b"b" * 3000, "c.txt": b"c" * 200}))

    assert [url[-5:] for url in origins.urls] == ["b.txt", "c.txt", "a.txt"]


def test_custom_template_is_fetched(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """A template that the user chose is fetched as every other file, and stays marked."""
    origins.files["http://a/my.jinja"] = b"{{ messages }}"
    slot = ModelSlot("hf_chat_template", extra("http://a/my.jinja", b"{{ messages }}"), is_custom=True)

    model = resolver.resolve(ModelDeploymentCard("m", chat_template_file=slot))

    assert contents(model) == {"my.jinja": b"{{ messages }}"}
    assert model.card.chat_template_file.is_custom
    assert model.card.chat_template_file.file.path == os.path.join(model.local_dir, "my.jinja")


def test_adapter_has_a_directory_of_its_own(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """A LoRA adapter that shares its base's files costs no request after the base."""
    base = serve(A, files)
    lora = base.derive_lora("my-adapter")
    resolver.resolve(base)
    origins.asked.clear()

    model = resolver.resolve(lora)

    assert origins.asked == []
    assert model.local_dir.split(os.sep)[-2:] == ["my-adapter", lora.mdcsum]
    assert model.card.lora == lora.lora
    assert contents(model) == files


def test_legacy_card_without_sizes(resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]) -> None:
    """A card that tells no sizes is fetched by its hashes, within the cap of such files."""
    assert contents(resolver.resolve(serve(A, files, sized=False))) == files


def test_unsized_file_is_capped(make_resolver: MakeResolver, serve: Serve, cache: BlobCache) -> None:
    """A file of unknown size may not be endless."""
    limits = ResolverLimits(fetch=FetchLimits(max_unsized_bytes=10))

    with pytest.raises(ResolveError) as caught:
        make_resolver(limits=limits).resolve(serve(A, {"config.json": b"x" * 11}, sized=False))

    assert isinstance(caught.value.__cause__, SizeLimitExceeded)
    assert leftovers(cache) == []


def test_overstated_size_is_accepted(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """A declared size is an upper bound, as in Dynamo; the hash decides."""
    origins.files["http://a/f"] = b"short"
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/f", b"short", size=1000),))

    assert contents(resolver.resolve(card)) == {"f": b"short"}


def test_understated_size_is_refused(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """Nobody takes more bytes than the card says."""
    origins.files["http://a/f"] = b"too long"
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/f", b"too long", size=3),))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.attempts[0].error, SizeLimitExceeded)


def test_empty_file_is_a_file(resolver: MetadataResolver, serve: Serve, origins: OriginSimulator) -> None:
    """A file of no bytes is fetched, kept and found like any other."""
    # catalogue 124
    card = serve(A, {"empty.txt": b"", "config.json": b"{}"})

    assert contents(resolver.resolve(card)) == {"empty.txt": b"", "config.json": b"{}"}
    assert len(origins.asked) == 2
    assert resolver.resolve(card).fetched == ()
    assert len(origins.asked) == 2


def test_card_without_files_has_an_empty_directory(
    resolver: MetadataResolver, origins: OriginSimulator
) -> None:
    """A model that needs no files is resolved, too."""
    model = resolver.resolve(ModelDeploymentCard("m"))

    assert contents(model) == {}
    assert origins.asked == []


@pytest.mark.parametrize("path", ["hf://org/m/config.json", "https://cdn/config.json", "/models/config.json"])
def test_every_scheme_with_a_transport_is_a_source(make_resolver: MakeResolver, path: str) -> None:
    """The files of a card may lie anywhere that a transport can reach; in the end they are local."""
    origins = OriginSimulator({path: b"{}"})
    table = {"hf": origins, "https": origins, PATH_SCHEME: origins}
    card = ModelDeploymentCard("m", extra_files=(extra(path, b"{}"),))

    model = make_resolver(transports=table).resolve(card)

    assert model.card.extra_files[0].path == os.path.join(model.local_dir, "config.json")
    assert contents(model) == {"config.json": b"{}"}


# ------------------------------------------------------------------ cards that ask for too much


@pytest.mark.parametrize("value", ["{}", b"{}", {}, None, 7])
def test_only_cards_are_taken(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], value: Any
) -> None:
    """Text has to be read first, and the error says by what."""
    with pytest.raises(TypeError, match=r"ModelDeploymentCard\.from_json"):
        resolver.resolve(value)
    with pytest.raises(TypeError, match=r"ModelDeploymentCard\.from_json"):
        resolver.resolve(serve(A, files), replicas=[value])


@pytest.mark.parametrize(
    "path",
    ["http://a/..%2f..%2fetc%2fcron.d%2fx", "http://a/%00", "http://a/", "http://a/CON", "http://a/a%5Cb"],
)
def test_bad_name_is_refused_before_anything_is_done(
    resolver: MetadataResolver, origins: OriginSimulator, cache: BlobCache, path: str
) -> None:
    """A card with one bad name gets nothing at all."""
    # catalogue 15
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/good", b"good"), extra(path, b"x")))

    with pytest.raises(CardError):
        resolver.resolve(card)

    assert origins.asked == []
    assert not (Path(cache.root) / "by-slug").exists()


def test_one_name_for_two_contents_is_refused(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """Two slots of one basename would overwrite each other."""
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/x/f", b"1"), extra("http://a/y/f", b"2")))

    with pytest.raises(CardError, match="two files of different content"):
        resolver.resolve(card)

    assert origins.asked == []


@pytest.mark.parametrize("limits", [ResolverLimits(max_files=2), ResolverLimits(max_total_bytes=100)])
def test_too_much_is_refused(
    make_resolver: MakeResolver,
    serve: Serve,
    files: dict[str, bytes],
    origins: OriginSimulator,
    limits: ResolverLimits,
) -> None:
    """Files and bytes of a card are bounded."""
    with pytest.raises(CardError, match="at most"):
        make_resolver(limits=limits).resolve(serve(A, files))

    assert origins.asked == []


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "ftp://a/f", "data:text/plain,f"])
def test_what_no_transport_may_fetch_is_not_fetched(
    resolver: MetadataResolver, origins: OriginSimulator, path: str
) -> None:
    """A card cannot make us read our own disk, or speak anything but HTTP."""
    # catalogue 8
    card = ModelDeploymentCard("m", extra_files=(extra(path, b"x"),))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.__cause__, SchemeNotAllowed)
    assert caught.value.retry_after is None
    assert origins.asked == []


# ------------------------------------------------------------------ one source after the other


def test_dead_replica_is_passed_over(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """The worker that published the card is gone; another one has the files."""
    # catalogue 113
    card, replica = serve(A, files), serve(B, files)
    origins.script("http://a:9090", simulator.refused, times=None)

    assert contents(resolver.resolve(card, replicas=[replica])) == files
    assert [url.startswith(A) for url in origins.urls] == [True, False, False, False]


def test_dead_corrupt_and_good_replica(
    resolver: MetadataResolver,
    serve: Serve,
    origins: OriginSimulator,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The wrong bytes are not kept, their source is named, the good one gives the file."""
    # catalogue 114
    cards = [serve(base, {"config.json": b"right"}) for base in (A, B, C)]
    origins.script("http://a:9090", simulator.silent(10.0, wait=clock.sleep), times=None)
    origins.script("http://b:9090", simulator.gives(b"wrong"), times=None)

    with caplog.at_level(logging.WARNING, "selfhost"):
        model = resolver.resolve(cards[0], replicas=cards[1:])

    assert contents(model) == {"config.json": b"right"}
    assert len(origins.urls) == 3
    assert clock.slept == [10.0]
    (warning,) = caplog.records
    assert f"'{B}/config.json'" in warning.getMessage()


def test_what_failed_goes_last_next_time(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """The next model does not begin with the worker that is known to be dead."""
    first = [serve(base, {"config.json": b"1"}) for base in (A, B)]
    second = [serve(base, {"other.json": b"2"}, name="other") for base in (A, B)]
    origins.script("http://a:9090", simulator.silent(), times=None)
    resolver.resolve(first[0], replicas=first[1:])
    origins.asked.clear()

    resolver.resolve(second[0], replicas=second[1:])

    assert origins.urls == [f"{B}/other.json"]


def test_what_works_again_is_in_its_place(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """A success ends the back-off at once: the next model begins with its own worker."""
    origins.script("http://a:9090", simulator.refused)
    resolver.resolve(serve(A, {"config.json": b"1"}))
    second = [serve(base, {"other.json": b"2"}, name="other") for base in (A, B)]
    origins.asked.clear()

    resolver.resolve(second[0], replicas=second[1:])

    assert origins.urls == [f"{A}/other.json"]


def test_hanging_origin_costs_one_time_out(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """Of eight files only the first waits for the worker that hangs, also when its back-off is over."""
    files = {f"{number}.json": b"%d" % number for number in range(8)}
    card, replica = serve(A, files), serve(B, files)
    origins.script("http://a:9090", simulator.silent(10.0, wait=clock.sleep), times=None)
    origins.on_request = lambda url: setattr(clock, "now", clock.now + 60)

    assert contents(resolver.resolve(card, replicas=[replica])) == files
    assert sum(url.startswith(A) for url in origins.urls) == 1
    assert clock.slept == [10.0]


def test_404_is_not_asked_again(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """A worker that does not have the file is asked once, then the next one."""
    # catalogue 121
    card, replica = serve(A, {"config.json": b"{}"}), serve(B, {"config.json": b"{}"})
    origins.script(A + "/config.json", simulator.status(404), times=None)

    resolver.resolve(card, replicas=[replica])

    assert origins.urls == [f"{A}/config.json", f"{B}/config.json"]
    assert clock.slept == []


@pytest.mark.parametrize(
    ("script", "slept"),
    [
        (simulator.refused, [0.1, 0.2]),
        (simulator.broken_after(1), [0.1, 0.2]),
        (simulator.status(503), [0.1, 0.2]),
        (simulator.status(503, retry_after=2.0), [2.0, 2.0]),
        (simulator.status(429, retry_after=3600.0), [5.0, 5.0]),
    ],
)
def test_what_may_be_over_soon_is_asked_again(
    resolver: MetadataResolver,
    serve: Serve,
    origins: OriginSimulator,
    clock: FakeClock,
    script: Script,
    slept: list[float],
) -> None:
    """Twice unavailable, then good: three requests, with bounded pauses."""
    # catalogue 120
    card = serve(A, {"config.json": b"{}"})
    origins.script("http://a:9090", script, times=2)

    resolver.resolve(card)

    assert len(origins.asked) == 3
    assert clock.slept == pytest.approx(slept)


def test_three_rounds_are_all(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """A worker that stays unavailable is given up."""
    card, replica = serve(A, {"config.json": b"{}"}), serve(B, {"config.json": b"{}"})
    for origin in ("http://a:9090", "http://b:9090"):
        origins.script(origin, simulator.status(503), times=None)

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card, replicas=[replica])

    assert [attempt.url[:8] for attempt in caught.value.attempts] == ["http://a", "http://b"] * 3
    assert sum(clock.slept) < 1


# ------------------------------------------------------------------ in the middle of a file


def test_continues_at_the_next_replica(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """What a broken transfer brought is kept; the next source sends the rest."""
    # catalogue 49
    data = {"tokenizer.json": bytes(range(256)) * 40}
    card, replica = serve(A, data), serve(B, data)
    origins.script("http://a:9090", simulator.broken_after(5000))

    assert contents(resolver.resolve(card, replicas=[replica])) == data
    assert [(asked.url[:8], asked.offset) for asked in origins.asked] == [("http://a", 0), ("http://b", 5000)]


def test_continues_at_the_same_source(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """A single worker whose connections break every now and then is enough."""
    data = {"tokenizer.json": bytes(range(256)) * 40}
    card = serve(A, data)
    origins.script("http://a:9090", simulator.broken_after(4000))
    origins.script("http://a:9090", simulator.broken_after(8000))

    assert contents(resolver.resolve(card)) == data
    assert [asked.offset for asked in origins.asked] == [0, 4000, 8000]


def test_replica_that_ignores_ranges(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """A source that sends the whole file anyway is taken from its first byte."""
    # catalogue 116
    data = {"tokenizer.json": bytes(range(256)) * 40}
    card, replica = serve(A, data), serve(B, data)
    origins.script("http://a:9090", simulator.broken_after(5000))
    origins.ignores_ranges = True

    assert contents(resolver.resolve(card, replicas=[replica])) == data


def test_other_version_is_taken_from_its_start(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """The half of another file, under another tag, is thrown away."""
    data = bytes(range(256)) * 40
    card, replica = serve(A, {"f": data}), serve(B, {"f": data})
    origins.files[A + "/f"] = b"an older version" * 1000
    origins.script("http://a:9090", simulator.broken_after(5000))

    assert contents(resolver.resolve(card, replicas=[replica])) == {"f": data}
    assert [asked.offset for asked in origins.asked] == [0, 0]


def test_honest_source_is_not_blamed_for_a_liars_half(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, caplog: pytest.LogCaptureFixture
) -> None:
    """If the two halves do not fit, the last source is asked for the whole, and gives it."""
    data = bytes(range(256)) * 40
    card, replica = serve(A, {"f": data}), serve(B, {"f": data})
    origins.etag = lambda url, data: '"the same for everything"'
    origins.files[A + "/f"] = bytes(reversed(data))
    origins.script("http://a:9090", simulator.broken_after(5000))

    with caplog.at_level(logging.WARNING, "selfhost"):
        model = resolver.resolve(card, replicas=[replica])

    assert contents(model) == {"f": data}
    assert [(asked.url[:8], asked.offset) for asked in origins.asked] == [
        ("http://a", 0), ("http://b", 5000), ("http://b", 0),
    ]  # fmt: skip
    assert caplog.records == []


def test_liar_is_asked_for_the_whole_once(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, caplog: pytest.LogCaptureFixture
) -> None:
    """A source whose continuation and whole are both wrong is blamed once, and the next one begins anew."""
    data = bytes(range(256)) * 40
    cards = [serve(base, {"f": data}) for base in (A, B, C)]
    origins.etag = lambda url, data: '"the same for everything"'
    origins.files[B + "/f"] = bytes(reversed(data))
    origins.script("http://a:9090", simulator.broken_after(5000))

    with caplog.at_level(logging.WARNING, "selfhost"):
        model = resolver.resolve(cards[0], replicas=cards[1:])

    assert contents(model) == {"f": data}
    assert [(asked.url[:8], asked.offset) for asked in origins.asked] == [
        ("http://a", 0), ("http://b", 5000), ("http://b", 0), ("http://c", 0),
    ]  # fmt: skip
    assert len(caplog.records) == 1


# ------------------------------------------------------------------ when nobody has it


def test_error_lists_every_attempt(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock, cache: BlobCache
) -> None:
    """Where, what and how long, for each source; what the operator can do; nothing is left behind."""
    cards = [serve(base, {"config.json": b"{}"}) for base in (A, B, C)]
    origins.script("http://a:9090", simulator.silent(10.0, wait=clock.sleep))
    origins.script("http://b:9090", simulator.status(404))
    origins.script("http://c:9090", simulator.gives(b"xx"))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(cards[0], replicas=cards[1:])

    error, message = caught.value, str(caught.value)
    assert error.file == "config.json"
    assert error.missing == (str(Checksum.of(b"{}")),)
    assert [type(attempt.error) for attempt in error.attempts] == [
        FetchTimeout, HTTPStatusError, VerificationError,
    ]  # fmt: skip
    assert [attempt.seconds for attempt in error.attempts] == [10.0, 0.0, 0.0]
    assert error.__cause__ is error.attempts[-1].error
    for part in (f"{A}/config.json", f"{B}/config.json", f"{C}/config.json", "404", "10.00 s", "config.json"):
        assert part in message
    assert leftovers(cache) == []
    assert not (Path(cache.root) / "by-slug").exists()


def test_message_is_bounded(resolver: MetadataResolver, serve: Serve, origins: OriginSimulator) -> None:
    """A hundred dead replicas with long URLs give a message that can be read; the attributes hold it all."""
    cards = [serve(f"http://w{number}/{'x' * 1000}", {"f": b"{}"}) for number in range(100)]
    for number in range(100):
        origins.script(f"http://w{number}", simulator.status(404))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(cards[0], replicas=cards[1:])

    assert len(caught.value.attempts) == 100
    assert len(str(caught.value)) < 20_000
    assert "and 80 more" in str(caught.value)


def test_message_has_a_line_for_each_attempt(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """What a transport writes over several lines is one line here, and can fake no other."""

    def chatty(transfer: simulator.Transfer) -> None:
        raise FetchError("first line\n  'http://b' is fine\r\nthird line", url=transfer.url)

    card = serve(A, {"config.json": b"{}"})
    origins.script("http://a:9090", chatty)

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert len(str(caught.value).splitlines()) == 3


def test_failure_is_remembered_for_a_while(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """The next resolve fails at once without a request, and says how long that will be so."""
    card = serve(A, {"config.json": b"{}"})
    origins.script("http://a:9090", simulator.status(404), times=None)
    with pytest.raises(ResolveError) as first:
        resolver.resolve(card)
    origins.asked.clear()

    with pytest.raises(ResolveError) as second:
        resolver.resolve(card)

    assert origins.asked == []
    assert first.value.retry_after == second.value.retry_after == pytest.approx(0.75)
    assert second.value.attempts == ()
    assert "404" in str(second.value)
    assert f"{A}/config.json" in str(second.value)


@pytest.mark.parametrize("how", ["time", "forget_failures", "another source"])
def test_failure_is_forgotten(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock, how: str
) -> None:
    """After the back-off, or on demand, or when there is anybody else, sources are asked again."""
    card, replica = serve(A, {"config.json": b"{}"}), serve(B, {"config.json": b"{}"})
    origins.script("http://a:9090", simulator.status(404))
    with pytest.raises(ResolveError):
        resolver.resolve(card)
    replicas = []
    if how == "time":
        clock.now += 1.0
    elif how == "forget_failures":
        resolver.forget_failures()
    else:
        origins.script("http://b:9090", simulator.status(404))
        replicas = [replica]

    assert contents(resolver.resolve(card, replicas=replicas)) == {"config.json": b"{}"}


def test_wrong_page_is_recognised(resolver: MetadataResolver, serve: Serve, origins: OriginSimulator) -> None:
    """A portal that answers everything with its own page is told from a corrupt file."""
    # catalogue 119
    card = serve(A, {"config.json": b" " * 1000})
    origins.script("http://a:9090", simulator.gives(b"\n<!DOCTYPE html><title>Log in</title>"))

    with pytest.raises(ResolveError, match="HTML page"):
        resolver.resolve(card)


def test_empty_answer_is_wrong(resolver: MetadataResolver, serve: Serve, origins: OriginSimulator) -> None:
    """No bytes under a 200 are not the file."""
    # catalogue 119
    card = serve(A, {"config.json": b"{}"})
    origins.script("http://a:9090", simulator.gives(b""))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.__cause__, VerificationError)


@pytest.mark.parametrize("data", [b"other", b"much longer than before"])
def test_branch_that_moved_on_is_drifted(make_resolver: MakeResolver, data: bytes) -> None:
    """Other bytes from a source that may change are called so, whether shorter or longer."""
    hub = OriginSimulator({"hf://org/m/config.json": data}, may_drift=True)
    card = ModelDeploymentCard("m", extra_files=(extra("hf://org/m/config.json", b"first"),))

    with pytest.raises(ResolveError, match="has moved on") as caught:
        make_resolver(transports={"hf": hub}).resolve(card)

    assert isinstance(caught.value.__cause__, SourceDrifted)


def test_wrong_blob_on_the_disk_is_fetched_again(
    resolver: MetadataResolver,
    make_resolver: MakeResolver,
    serve: Serve,
    files: dict[str, bytes],
    origins: OriginSimulator,
    cache: BlobCache,
) -> None:
    """A blob that rotted is repaired, and only that one is asked for."""
    # catalogue 17
    card = serve(A, files)
    resolver.resolve(card)
    origins.asked.clear()
    blob = Path(cache.root) / "blobs" / Checksum.of(files["config.json"]).hex
    blob.chmod(0o644)
    blob.write_bytes(b"rotten")

    model = resolver.resolve(card)

    assert contents(model) == files
    assert origins.urls == [f"{A}/config.json"]
    assert model.fetched == ("config.json",)


# ------------------------------------------------------------------ what stops at once


class FailingCache(BlobCache):
    """A cache whose disk is full, or whose blobs are collected behind our back."""

    is_full = False
    collected = 0

    def write(self, *args: Any, **options: Any) -> Any:
        """Fail, if the disk is full."""
        if self.is_full:
            raise CacheError("no space", path=self.root, errno=errno.ENOSPC)
        return super().write(*args, **options)

    def publish_model(self, *args: Any, **options: Any) -> str:
        """Remove all blobs before, so many times."""
        if self.collected:
            self.collected -= 1
            for blob in (Path(self.root) / "blobs").iterdir():
                blob.unlink()
        return super().publish_model(*args, **options)


def resolver_with(cache: BlobCache, origins: OriginSimulator) -> MetadataResolver:
    """Return a resolver over a certain cache."""
    return MetadataResolver(cache, transports={"http": origins}, limits=ONE_BY_ONE)


def test_cache_error_stops_at_once(tmp_path: Path, serve: Serve, origins: OriginSimulator) -> None:
    """Another source would not help a full disk."""
    cache = FailingCache(tmp_path / "full")
    cache.is_full = True
    card, replica = serve(A, {"f": b"1", "g": b"2"}), serve(B, {"f": b"1", "g": b"2"})

    with pytest.raises(CacheError, match="no space"):
        resolver_with(cache, origins).resolve(card, replicas=[replica])

    assert origins.asked == []


def test_blobs_that_were_collected_meanwhile_are_fetched_again(
    tmp_path: Path, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Garbage collection between the fetch and the directory costs another fetch."""
    cache = FailingCache(tmp_path / "collected")
    cache.collected = 2

    assert contents(resolver_with(cache, origins).resolve(serve(A, files))) == files
    assert len(origins.asked) == 3 * len(files)


def test_blobs_that_never_stay_are_given_up(
    tmp_path: Path, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Who collects everything all the time is to be heard of."""
    cache = FailingCache(tmp_path / "collected")
    cache.collected = 10

    with pytest.raises(BlobMissing):
        resolver_with(cache, origins).resolve(serve(A, files))

    assert len(origins.asked) == 3 * len(files)


def test_defect_of_a_transport_is_not_hidden(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, cache: BlobCache
) -> None:
    """An error that transports do not raise is a defect, and ends the resolve as it is."""

    def crash(transfer: simulator.Transfer) -> None:
        raise ZeroDivisionError

    card, replica = serve(A, {"f": b"1"}), serve(B, {"f": b"1"})
    origins.script("http://a:9090", crash)

    with pytest.raises(ZeroDivisionError):
        resolver.resolve(card, replicas=[replica])

    assert len(origins.asked) == 1
    assert leftovers(cache) == []


# ------------------------------------------------------------------ offline


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to make a socket fail the test."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("somebody made a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_offline_names_everything_that_is_missing(cache: BlobCache, no_sockets: None) -> None:
    """One error for all files, no socket, with the transports that everybody has."""
    card = make_card({"config.json": b"{}", "tokenizer.json": b"[]"}, "http://127.0.0.1:1")

    with MetadataResolver(cache, offline=True) as resolver, pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert sorted(caught.value.missing) == sorted(str(Checksum.of(data)) for data in (b"{}", b"[]"))
    for part in ("config.json", "tokenizer.json", *caught.value.missing):
        assert part in str(caught.value)
    assert caught.value.attempts == ()


def test_offline_message_leaves_nothing_out(make_resolver: MakeResolver, serve: Serve) -> None:
    """However many files are missing, each digest stands in the message."""
    card = serve(A, {f"{number}.json": b"%d" % number for number in range(100)})

    with pytest.raises(ResolveError) as caught:
        make_resolver(offline=True).resolve(card)

    assert len(caught.value.missing) == 100
    assert all(checksum in str(caught.value) for checksum in caught.value.missing)


def test_offline_does_not_ask_the_network(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Transports that say that they use the network are not asked, and nothing is remembered of that."""
    card = serve(A, files)
    with pytest.raises(ResolveError):
        make_resolver(offline=True).resolve(card)

    assert origins.asked == []


def test_offline_finds_what_is_in_the_cache(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """A model that was resolved once is there without a network."""
    card = serve(A, files)
    make_resolver().resolve(card)
    origins.asked.clear()

    assert contents(make_resolver(offline=True).resolve(card)) == files
    assert origins.asked == []


def test_offline_uses_local_sources(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """A transport that needs no network is asked; what it lacks is listed, and not remembered."""
    disk = OriginSimulator({"file:///m/a": b"a"}, uses_network=False)
    card = ModelDeploymentCard("m", extra_files=tuple(extra(f"file:///m/{n}", n.encode()) for n in "abc"))
    resolver = make_resolver(offline=True, transports={"http": origins, "file": disk})

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)
    disk.files.update({"file:///m/b": b"b", "file:///m/c": b"c"})

    assert sorted(caught.value.missing) == sorted(str(Checksum.of(data)) for data in (b"b", b"c"))
    assert sorted(attempt.url for attempt in caught.value.attempts) == ["file:///m/b", "file:///m/c"]
    assert contents(resolver.resolve(card)) == {"a": b"a", "b": b"b", "c": b"c"}


# ------------------------------------------------------------------ progress


def test_progress_ends_with_everything(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]
) -> None:
    """The numbers grow to the declared totals; a warm resolve has nothing to tell."""
    told: list[Progress] = []
    card = serve(A, files)

    resolver.resolve(card, progress=told.append)
    count = len(told)
    resolver.resolve(card, progress=told.append)

    total = sum(map(len, files.values()))
    assert (told[-1].done_bytes, told[-1].total_bytes) == (total, total)
    assert (told[-1].done_files, told[-1].total_files) == (len(files), len(files))
    assert [progress.done_bytes for progress in told] == sorted(progress.done_bytes for progress in told)
    assert len(told) == count


def test_progress_counts_only_what_is_fetched(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """Files that are in the cache are neither done nor to do."""
    told: list[Progress] = []
    resolver.resolve(serve(A, {"old": b"x" * 5000}))

    resolver.resolve(serve(A, {"old": b"x" * 5000, "new": b"y" * 300}), progress=told.append)

    assert {(progress.filename, progress.total_bytes, progress.total_files) for progress in told} == {
        ("new", 300, 1)
    }


def test_progress_goes_back_when_a_transfer_starts_over(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """What was thrown away is not done."""
    told: list[Progress] = []
    card, replica = serve(A, {"f": b"x" * 5000}), serve(B, {"f": b"x" * 5000})
    origins.script("http://a:9090", simulator.gives(b"y" * 5000))

    resolver.resolve(card, replicas=[replica], progress=told.append)

    done = [progress.done_bytes for progress in told]
    assert done[:7] == [1000, 2000, 3000, 4000, 5000, 0, 1000]
    assert done[-1] == 5000


class SharedCache(BlobCache):
    """A cache into which another process has put the blob by the time a lock is granted."""

    data = b""

    def lock(self, checksum: Checksum) -> Any:
        """Put the blob there first."""
        with self.write(checksum) as writer:
            writer.write(self.data)
            writer.publish("another process")
        return super().lock(checksum)


def test_file_that_another_process_brought_is_done(
    tmp_path: Path, serve: Serve, origins: OriginSimulator
) -> None:
    """Whoever waited for the lock looks again before asking, and counts what is there."""
    told: list[Progress] = []
    cache = SharedCache(tmp_path / "shared")
    cache.data = b"x" * 5000
    resolver = MetadataResolver(cache, transports={"http": origins})

    model = resolver.resolve(serve(A, {"f": b"x" * 5000}), progress=told.append)

    assert origins.asked == []
    assert model.fetched == ()
    assert [(progress.done_bytes, progress.done_files) for progress in told] == [(5000, 1)]


def test_progress_that_fails_stops_nothing(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]
) -> None:
    """A display that breaks costs its display."""

    def display(progress: Progress) -> None:
        raise OSError("no terminal")

    assert contents(resolver.resolve(serve(A, files), progress=display)) == files


# ------------------------------------------------------------------ its life


def test_transports_that_were_passed_in_stay_open(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Who opens closes."""
    with make_resolver() as resolver:
        resolver.resolve(serve(A, files))

    assert origins.closed == 0


def test_own_transports_are_closed_once(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch, serve: Serve, files: dict[str, bytes]
) -> None:
    """The resolver makes its transports when something is to be fetched, and closes each once."""
    from selfhost.frontend import transports

    made: list[OriginSimulator] = []
    asked_for: list[dict[str, Any]] = []

    def table(**options: Any) -> dict[str, OriginSimulator]:
        asked_for.append(options)
        made.append(OriginSimulator({f"{A}/{name}": data for name, data in files.items()}))
        return {"http": made[-1], "https": made[-1]}

    monkeypatch.setattr(transports, "default_transports", table)
    resolver = MetadataResolver(cache)
    assert made == []

    resolver.resolve(serve(A, files))
    resolver.resolve(serve(A, {f"{name}": data for name, data in files.items()}, name="other"))
    resolver.close()
    resolver.close()

    assert [origins.closed for origins in made] == [1]
    assert asked_for == [{"limits": resolver.limits.fetch, "offline": False}]


def test_closed_resolver_says_so(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """After close nothing is fetched, and the error does not look like a missing file."""
    card = serve(A, files)
    resolver.close()

    with pytest.raises(RuntimeError, match="this resolver is closed"):
        resolver.resolve(card)

    assert origins.asked == []


def test_repr_tells_state_and_place(make_resolver: MakeResolver, cache: BlobCache) -> None:
    """A log line with a resolver in it is of use."""
    resolver = make_resolver(offline=True)

    assert repr(resolver) == f"<MetadataResolver offline cache={cache.root!r}>"
    resolver.close()
    assert repr(resolver).startswith("<MetadataResolver closed")


def test_plans_go_with_their_cards(resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]) -> None:
    """What is kept of a card does not outlive it, nor is it mistaken for another's."""
    names = ["one", "two", "three"]

    for name in names:
        card: Optional[ModelDeploymentCard] = serve(A, files, name=name)
        assert resolver.resolve(card).card.display_name == name
        del card
        gc.collect()

    assert len(resolver._plans) == 0


def test_looking_up_loads_no_network_modules(
    cache: BlobCache, serve: Serve, files: dict[str, bytes], resolver: MetadataResolver
) -> None:
    """A process that finds everything in the cache never pays for http.client and ssl."""
    card = serve(A, files)
    resolver.resolve(card)
    code = """
        import sys
        from selfhost.card.model_card import ModelDeploymentCard
        from selfhost.frontend import BlobCache, MetadataResolver
        card = ModelDeploymentCard.from_json(sys.stdin.read())
        with MetadataResolver(BlobCache(sys.argv[1])) as resolver:
            assert resolver.resolve(card).fetched == ()
        print(*sorted({"http.client", "ssl", "werkzeug"} & set(sys.modules)))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), cache.root],
        input=card.to_json(), capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])},
    )  # fmt: skip

    assert ran.stderr == ""
    assert ran.stdout == "\n"
