"""MetadataResolver and its sources: who is asked, in which order, and what is told when nobody has a file."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Optional

import pytest
import simulator
from simulator import (
    A,
    B,
    C,
    FakeClock,
    MakeResolver,
    OriginSimulator,
    Script,
    Serve,
    contents,
    extra,
    leftovers,
)

from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import (
    FetchError,
    FetchTimeout,
    HTTPStatusError,
    ResolveError,
    SourceDrifted,
    VerificationError,
    shown_url,
)
from selfhost.frontend import strangers
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver

pytestmark = pytest.mark.usefixtures("leaves_nothing")


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


# ------------------------------------------------------------------ slow sources


def test_slow_source_is_given_up_for_a_replica(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """A source at 2 KB/s costs five seconds, its bytes are kept, and the next file begins elsewhere."""
    first, other = {"f": bytes(range(256)) * 200}, {"g": b"g" * 3000}
    cards = [serve(base, first) for base in (A, B)]
    origins.script("http://a:9090", simulator.drips(clock.sleep, seconds=0.5), times=None)

    assert contents(resolver.resolve(cards[0], replicas=cards[1:])) == first
    assert sum(clock.slept) == 5.5
    assert [(asked.url, asked.offset) for asked in origins.asked] == [(f"{A}/f", 0), (f"{B}/f", 11000)]

    clock.now += 20
    cards = [serve(base, other, name="other") for base in (A, B)]
    assert contents(resolver.resolve(cards[0], replicas=cards[1:])) == other
    assert origins.urls[2:] == [f"{B}/g"]


def test_slow_source_has_its_time_when_all_others_failed(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """In the next round the slow one goes on where it was, for as long as it takes."""
    data = {"f": bytes(range(256)) * 200}
    cards = [serve(base, data) for base in (A, B)]
    origins.script("http://a:9090", simulator.drips(clock.sleep, seconds=0.5), times=None)
    origins.script("http://b:9090", simulator.status(404), times=None)

    assert contents(resolver.resolve(cards[0], replicas=cards[1:])) == data
    assert [asked.offset for asked in origins.asked] == [0, 11000, 11000]


@pytest.mark.parametrize(
    ("seconds", "count"),
    [(0.009, 300_000), (0.5, 10_000)],
    ids=["fast enough", "over before it is too late"],
)
def test_source_that_is_not_slow_is_not_given_up(
    resolver: MetadataResolver,
    serve: Serve,
    origins: OriginSimulator,
    clock: FakeClock,
    seconds: float,
    count: int,
) -> None:
    """A source above the limit, or with a small file, has its time."""
    data = {"f": b"x" * count}
    cards = [serve(base, data) for base in (A, B)]
    origins.script("http://a:9090", simulator.drips(clock.sleep, seconds=seconds), times=None)

    assert contents(resolver.resolve(cards[0], replicas=cards[1:])) == data
    assert origins.urls == [f"{A}/f"]


def test_source_that_becomes_slow_is_given_up(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, clock: FakeClock
) -> None:
    """A quick beginning is no excuse for what follows."""
    data = {"f": b"x" * 3_000_000}
    cards = [serve(base, data) for base in (A, B)]
    pauses = iter([0.005] * 2000 + [0.5] * 1000)
    origins.script("http://a:9090", simulator.drips(lambda _: clock.sleep(next(pauses)), seconds=0.0))

    assert contents(resolver.resolve(cards[0], replicas=cards[1:])) == data
    assert 2_000_000 < origins.asked[1].offset < 2_030_000


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
def test_branch_that_moved_on_is_drifted(
    make_resolver: MakeResolver, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Other bytes from a source that may change are called so, whether shorter or longer."""
    hub = OriginSimulator({"hf://org/m/config.json": data}, may_drift=True)
    card = ModelDeploymentCard("m", extra_files=(extra("hf://org/m/config.json", b"first"),))

    with pytest.raises(ResolveError, match="has moved on") as caught:
        make_resolver(transports={"hf": hub}).resolve(card)

    assert isinstance(caught.value.__cause__, SourceDrifted)
    assert "drifted: 'hf://org/m/config.json' has moved on" in caplog.text
    assert "wrong bytes" not in caplog.text


@pytest.mark.parametrize("here", [b"right", b"older", None])
def test_branch_is_taken_from_here_if_it_is_right_here(
    make_resolver: MakeResolver, here: Optional[bytes]
) -> None:
    """A copy on this machine is used if the card means it, whatever the branch is by now; else the hub is."""
    url = "hf://org/m/config.json"
    nearby = OriginSimulator({} if here is None else {url: here}, needs_network=False, may_drift=True)
    if here is None:
        nearby.script(url, simulator.status(404))
    hub = OriginSimulator({url: b"newer" if here == b"right" else b"right"}, may_drift=True, nearby=nearby)
    card = ModelDeploymentCard("m", extra_files=(extra(url, b"right"),))

    model = make_resolver(transports={"hf": hub}).resolve(card)

    assert Path(model.local_dir, "config.json").read_bytes() == b"right"
    assert hub.urls == ([] if here == b"right" else [url])


def test_file_that_a_stranger_is_writing_is_waited_for(
    resolver: MetadataResolver,
    serve: Serve,
    origins: OriginSimulator,
    cache: BlobCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frontend that takes no locks, and is at it already, is not raced: nothing is asked for."""
    monkeypatch.setattr(strangers, "QUIET_SECONDS", 10.0)  # our stranger may be held up
    card = serve(A, {"config.json": b"{}"})
    blobs = Path(cache.root) / "blobs"
    blobs.mkdir(exist_ok=True)
    name = Checksum.of(b"{}").hex
    temporary = blobs / f"{name}.tmp.77.0123456789abcdef0123456789abcdef"
    temporary.write_bytes(b"{")

    def finish() -> None:
        time.sleep(0.1)
        temporary.write_bytes(b"{}")
        temporary.rename(blobs / name)

    stranger = threading.Thread(target=finish)
    stranger.start()
    model = resolver.resolve(card)
    stranger.join()

    assert (model.fetched, origins.asked) == ((), [])


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


def test_error_shows_no_password_and_no_query(
    resolver: MetadataResolver, origins: OriginSimulator, caplog: pytest.LogCaptureFixture
) -> None:
    """What may be a secret in a URL is neither in an error's text nor in the log; the attributes have it."""
    url = "http://user:secret@a:9090/f?token=secret"
    origins.script("http://user:secret@a:9090", simulator.status(404), times=None)
    card = ModelDeploymentCard("m", extra_files=(extra(url, b"{}"),))

    with caplog.at_level(logging.DEBUG, "selfhost"):
        errors = []
        for _ in range(2):  # asked, and not asked as it failed lately
            with pytest.raises(ResolveError) as caught:
                resolver.resolve(card)
            errors.append(caught.value)

    assert errors[0].attempts[0].url == url
    assert all("http://***@a:9090/f" in str(error) for error in errors)
    assert not any("secret" in text for text in (*map(str, errors), caplog.text))


def test_error_names_each_url_once(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """An error that tells its URL as errors do is not told twice."""

    def refuse(transfer: simulator.Transfer) -> None:
        raise FetchError(f"cannot fetch {shown_url(transfer.url)}: no", url=transfer.url)

    origins.script("http://a:9090", refuse)
    with pytest.raises(ResolveError) as caught:
        resolver.resolve(serve(A, {"config.json": b"{}"}))

    assert str(caught.value).count(A) == 1
