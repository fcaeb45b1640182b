"""MetadataResolver over real sockets: origins that are dead, slow, wrong or lying, and the real cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import RudeOrigin, make_card

from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import FetchTimeout, HTTPStatusError, ResolveError, SizeLimitExceeded, VerificationError
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver, ResolverLimits
from selfhost.frontend.transport import FetchLimits

StartOrigin = Callable[..., RudeOrigin]
StartOrigins = Callable[..., tuple[list[RudeOrigin], list[ModelDeploymentCard]]]

# Time-outs that tests can afford; what is tested is how often they are paid.
SHORT = FetchLimits(connect_seconds=0.5, read_seconds=0.3, total_seconds=5.0)
LIMITS = ResolverLimits(first_pause_seconds=0.01, max_pause_seconds=0.05, fetch=SHORT)


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def resolver(leaves_nothing: None, cache: BlobCache) -> Iterator[MetadataResolver]:
    """Return a resolver with the transports that it has by default."""
    with MetadataResolver(cache, limits=LIMITS) as made:
        yield made


@pytest.fixture
def start(rude_origin: StartOrigin, files: dict[str, bytes]) -> StartOrigins:
    """Start origins that behave as named; return them and the cards of the model on each."""

    def start_all(*behaviours: str, **options: Any) -> tuple[list[RudeOrigin], list[ModelDeploymentCard]]:
        origins = [rude_origin(files, behaviour, **options) for behaviour in behaviours]
        return origins, [make_card(files, origin.url) for origin in origins]

    return start_all


def contents(local_dir: str) -> dict[str, bytes]:
    """Return what is in a directory."""
    return {path.name: path.read_bytes() for path in Path(local_dir).iterdir()}


def test_fetches_and_then_makes_no_request(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes]
) -> None:
    """One request per file, then none."""
    (origin,), (card,) = start("well")

    assert contents(resolver.resolve(card).local_dir) == files
    assert resolver.resolve(card).fetched == ()
    assert sorted(request.path[1:] for request in origin.requests) == sorted(files)


def test_worker_that_died(resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes]) -> None:
    """The card of a worker that is gone is served by a replica; without one the error names all."""
    # catalogue 113
    origins, cards = start("well", "well")
    origins[0].close()

    assert contents(resolver.resolve(cards[0], replicas=cards[1:]).local_dir) == files


def test_error_names_all_that_were_tried(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes], cache: BlobCache
) -> None:
    """Three dead workers are three URLs in the message."""
    # catalogue 113
    origins, cards = start("refuses", "refuses", "refuses")

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(cards[0], replicas=cards[1:])

    assert all(origin.url in str(caught.value) for origin in origins)
    assert not list((Path(cache.root) / "blobs").glob("*"))


def test_silent_corrupt_and_good_replica(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """One time-out for all files, one warning for each wrong file, and the right bytes."""
    # catalogue 114
    origins, cards = start("never_reads", "flipped_bit", "well")

    with caplog.at_level(logging.WARNING, "selfhost"):
        model = resolver.resolve(cards[0], replicas=cards[1:])

    assert contents(model.local_dir) == files
    assert origins[0].connections <= len(files)
    assert all(origins[1].url in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == len(files)


@pytest.mark.parametrize("behaviour", ["never_reads", "stalled_before_status", "stalled_in_body"])
def test_hanging_replica_is_paid_for_once(
    rude_origin: StartOrigin, resolver: MetadataResolver, behaviour: str
) -> None:
    """Of eight files that are fetched one by one only the first waits."""
    files = {f"{number}.json": b"%d" % number * 2000 for number in range(8)}
    hanging, good = rude_origin(files, behaviour), rude_origin(files)
    one_by_one = ResolverLimits(connections=1, fetch=SHORT)

    with MetadataResolver(resolver.cache, limits=one_by_one) as alone:
        model = alone.resolve(make_card(files, hanging.url), replicas=[make_card(files, good.url)])

    assert contents(model.local_dir) == files
    assert hanging.connections == 1


def test_continues_at_a_replica(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes]
) -> None:
    """The second half comes from the second worker, by Range and If-Range with the digest as the tag."""
    # catalogue 49
    origins, cards = start("short_body", "well")

    assert contents(resolver.resolve(cards[0], replicas=cards[1:]).local_dir) == files

    name = "tokenizer.json"
    (rest,) = [request for request in origins[1].requests if request.path == f"/{name}"]
    assert rest.fields["range"] == f"bytes={len(files[name]) // 2}-"
    assert rest.fields["if-range"] == f'"{Checksum.of(files[name]).hex}"'
    assert origins[0].count(name) == 1


@pytest.mark.parametrize("behaviour", ["range_of_another_version", "content_changes"])
def test_new_version_is_taken_from_its_start(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes], behaviour: str
) -> None:
    """The rest of another version is not put behind the half of the first."""
    # catalogue 49
    _, (card,) = start(behaviour)

    assert contents(resolver.resolve(card).local_dir) == files


@pytest.mark.parametrize("behaviour", ["range_ignored", "range_refused"])
def test_origin_without_ranges(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes], behaviour: str
) -> None:
    """What cannot be continued is fetched from its first byte."""
    # catalogue 116
    _, (card,) = start(behaviour)

    assert contents(resolver.resolve(card).local_dir) == files


def test_wrong_continuation_is_not_the_end(
    resolver: MetadataResolver, start: StartOrigins, files: dict[str, bytes]
) -> None:
    """Bytes that do not fit together are fetched once more, as a whole."""
    # catalogue 49
    _, (card,) = start("range_with_wrong_bytes")

    assert contents(resolver.resolve(card).local_dir) == files


def test_portal_page(resolver: MetadataResolver, start: StartOrigins) -> None:
    """A login page under 200 is refused for its size or hash, and the message says what it looks like."""
    # catalogue 119
    _, (card,) = start("html_200")

    with pytest.raises(ResolveError, match=r"(?i)html") as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.__cause__, (VerificationError, SizeLimitExceeded))


def test_missing_file_is_asked_for_once(
    rude_origin: StartOrigin, resolver: MetadataResolver, files: dict[str, bytes]
) -> None:
    """A worker without the file is not asked again, the next one has it."""
    # catalogue 121
    empty, good = rude_origin({}), rude_origin(files)

    model = resolver.resolve(make_card(files, empty.url), replicas=[make_card(files, good.url)])

    assert contents(model.local_dir) == files
    assert [empty.count(name) for name in files] == [1, 1, 1]


def test_time_out_ends_a_resolve_without_replicas(
    resolver: MetadataResolver, start: StartOrigins, cache: BlobCache
) -> None:
    """One worker that hangs is one typed error, and nothing is left."""
    _, (card,) = start("stalled_in_body")

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.__cause__, FetchTimeout)
    assert not list((Path(cache.root) / "blobs").glob("*"))


def test_known_dead_worker_is_not_asked(resolver: MetadataResolver, start: StartOrigins) -> None:
    """A second resolve within the back-off makes no connection."""
    (origin,), (card,) = start("never_reads")
    with pytest.raises(ResolveError):
        resolver.resolve(card)
    connections = origin.connections

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert origin.connections == connections
    assert caught.value.retry_after is not None


@pytest.mark.parametrize(
    ("behaviour", "requests"),
    [
        ("status_500_twice", 3),
        ("status_503_retry_after_1", 2),
        ("status_503_retry_after_date", 2),
        ("status_429", 2),
    ],
)
def test_overloaded_worker(
    rude_origin: StartOrigin, resolver: MetadataResolver, behaviour: str, requests: int
) -> None:
    """An origin that is unavailable for a moment is asked again, after a bounded pause."""
    # catalogue 120
    origin = rude_origin({"config.json": b"{}"}, behaviour)

    assert resolver.resolve(make_card({"config.json": b"{}"}, origin.url)).fetched == ("config.json",)
    assert origin.count("config.json") == requests


@pytest.mark.parametrize("behaviour", ["status_500", "status_503_retry_after_3600"])
def test_status_that_stays(rude_origin: StartOrigin, resolver: MetadataResolver, behaviour: str) -> None:
    """Three rounds, then an error with the status."""
    # catalogue 120
    origin = rude_origin({"config.json": b"{}"}, behaviour)

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(make_card({"config.json": b"{}"}, origin.url))

    assert isinstance(caught.value.__cause__, HTTPStatusError)
    assert origin.count("config.json") == 3
