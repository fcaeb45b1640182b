"""MetadataResolver with many threads: what is shared, what a failure ends, what is left over."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import simulator
from helpers import TIMEOUT, make_card, nothing_left, poll_until
from simulator import OriginSimulator, Transfer

from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import FetchError, ResolveError
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver, Progress, ResolvedModel, ResolverLimits

A, B = "http://a:9090", "http://b:9090"
EIGHT = {f"{number}.json": b"%d" % number * 1500 for number in range(8)}
AT_ONCE = ResolverLimits(connections=4, stagger_seconds=0.0)

MakeResolver = Callable[..., MetadataResolver]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Check after each test that every thread has ended and every descriptor is closed."""
    with nothing_left():
        yield


@pytest.fixture
def origins() -> OriginSimulator:
    """Return origins A and B that both have eight files."""
    return OriginSimulator({f"{base}/{name}": data for base in (A, B) for name, data in EIGHT.items()})


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def card() -> ModelDeploymentCard:
    """Return the card of the eight files on A."""
    return make_card(EIGHT, A)


@pytest.fixture
def replica() -> ModelDeploymentCard:
    """Return the card of the eight files on B."""
    return make_card(EIGHT, B)


@pytest.fixture
def make_resolver(cache: BlobCache, origins: OriginSimulator) -> MakeResolver:
    """Make resolvers that start all of their threads at once."""
    return lambda **options: MetadataResolver(
        cache, **{"transports": {"http": origins}, "limits": AT_ONCE, **options}
    )


def contents(model: ResolvedModel) -> dict[str, bytes]:
    """Return what is in the directory of a model."""
    return {path.name: path.read_bytes() for path in Path(model.local_dir).iterdir()}


def blobs(cache: BlobCache) -> list[str]:
    """Return everything in the blobs folder, whole or not."""
    folder = Path(cache.root) / "blobs"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Do the work in so many threads that begin together; return what each returned or raised."""
    results: list[Any] = [None] * count
    ready = threading.Barrier(count, timeout=TIMEOUT)

    def run(number: int) -> None:
        ready.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    return results


# ------------------------------------------------------------------ who works


def test_single_missing_file_starts_no_thread(make_resolver: MakeResolver, origins: OriginSimulator) -> None:
    """One file is fetched by the thread that asks for it."""
    make_resolver().resolve(make_card({"0.json": EIGHT["0.json"]}, A))

    assert [asked.thread for asked in origins.asked] == [threading.current_thread()]


def test_quick_files_are_fetched_by_one_thread(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """While nothing waits for long there is one connection, which is the fastest way."""
    make_resolver(limits=ResolverLimits(stagger_seconds=TIMEOUT)).resolve(card)

    assert {asked.thread for asked in origins.asked} == {threading.current_thread()}


def test_slow_files_are_fetched_side_by_side(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """When files wait, up to four threads fetch, and no more."""
    met = threading.Barrier(4, timeout=TIMEOUT)
    origins.on_request = lambda url: met.wait()

    assert contents(make_resolver().resolve(card)) == EIGHT
    assert len({asked.thread for asked in origins.asked}) == 4


# ------------------------------------------------------------------ what is shared


def test_threads_that_want_the_same_model_fetch_it_once(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """Sixteen threads, two resolvers, one card: one request per file."""
    resolvers = [make_resolver(), make_resolver()]

    models = at_once(16, lambda number: resolvers[number % 2].resolve(card))

    assert [contents(model) for model in models] == [EIGHT] * 16
    assert len(origins.asked) == len(EIGHT)
    assert sorted(name for model in models for name in model.fetched) == sorted(EIGHT)


def test_without_locks_everything_is_right_too(
    tmp_path: Path, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """Locks save work; where none is ever granted in time, files are fetched more than once and are right."""
    cache = BlobCache(tmp_path / "unlocked", lock_seconds=0.0)
    resolver = MetadataResolver(cache, transports={"http": origins}, limits=AT_ONCE)

    models = at_once(8, lambda number: resolver.resolve(card))

    assert [contents(model) for model in models] == [EIGHT] * 8
    assert sorted(blobs(cache)) == sorted(checksum.hex for checksum in _digests(card))


def _digests(card: ModelDeploymentCard) -> list[Any]:
    return [file.checksum for file, _ in card.iter_metadata_files()]


def test_those_who_wait_do_not_repeat_a_failure(
    make_resolver: MakeResolver, origins: OriginSimulator
) -> None:
    """Eight threads wait for one that finds nobody: one request, eight errors."""
    resolver = make_resolver(limits=ResolverLimits(first_backoff_seconds=TIMEOUT))
    card = make_card({"gone.json": b"gone"}, A)
    origins.script(A, simulator.status(404), times=None)

    errors = at_once(8, lambda number: resolver.resolve(card))

    assert all(isinstance(error, ResolveError) for error in errors)
    assert len(origins.asked) == 1
    assert all("404" in str(error) for error in errors)


def test_hanging_origin_is_waited_for_by_each_thread_once(
    make_resolver: MakeResolver,
    origins: OriginSimulator,
    card: ModelDeploymentCard,
    replica: ModelDeploymentCard,
) -> None:
    """Four threads meet the worker that hangs at the same time; afterwards nobody asks it again."""
    met = threading.Barrier(4, timeout=TIMEOUT)
    origins.script(A, simulator.silent(wait=lambda seconds: met.wait()), times=None)

    assert contents(make_resolver().resolve(card, replicas=[replica])) == EIGHT
    assert Counter(url[:8] for url in origins.urls) == {"http://a": 4, "http://b": 8}


def test_dead_origin_goes_last_at_once(
    make_resolver: MakeResolver,
    origins: OriginSimulator,
    card: ModelDeploymentCard,
    replica: ModelDeploymentCard,
) -> None:
    """A thread that begins a file after another thread's connection was refused asks the replica first."""
    origins.script(A, simulator.refused, times=None)

    assert (
        contents(make_resolver(limits=ResolverLimits(connections=1)).resolve(card, replicas=[replica]))
        == EIGHT
    )
    assert Counter(url[:8] for url in origins.urls) == {"http://a": 1, "http://b": 8}


# ------------------------------------------------------------------ what a failure ends


def endless(transfer: Transfer) -> None:
    """Send the first piece again and again, until the sink does not take it."""
    while True:
        if transfer.sink.received:
            transfer.sink.restart()
        transfer.sink.write(b"x")
        time.sleep(0.001)


def test_failure_of_one_file_stops_the_others(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard, cache: BlobCache
) -> None:
    """When one file is to be had nowhere, what is under way ends at its next piece."""
    met = threading.Barrier(4, timeout=TIMEOUT)

    origins.on_request = lambda url: met.wait()
    origins.script(A, endless, times=None)
    origins.script(f"{A}/2.json", simulator.status(404), times=None)

    with pytest.raises(ResolveError) as caught:
        make_resolver().resolve(card)

    assert caught.value.file == "2.json"
    assert len(origins.asked) == 4
    assert blobs(cache) == []


def test_failure_ends_the_pauses_of_the_others(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """A thread that waits for a busy worker does not hold up the error of another."""
    origins.script(f"{A}/0.json", simulator.status(503, retry_after=3600.0), times=None)

    def fail_second(transfer: Transfer) -> None:
        poll_until(lambda: any(url.endswith("0.json") for url in origins.urls))
        simulator.status(404)(transfer)

    origins.script(f"{A}/1.json", fail_second, times=None)
    limits = ResolverLimits(connections=2, stagger_seconds=0.0, max_pause_seconds=3600.0)

    with pytest.raises(ResolveError) as caught:
        make_resolver(limits=limits).resolve(card)

    assert caught.value.file == "1.json"
    assert origins.urls.count(f"{A}/0.json") == 1


def test_failure_ends_the_wait_for_a_lock(
    origins: OriginSimulator, card: ModelDeploymentCard, cache: BlobCache
) -> None:
    """A thread that waits for another process's fetch does not hold up the error of another."""
    first, second = [file.checksum for file, _ in card.iter_metadata_files()][:2]
    origins.script(f"{A}/1.json", simulator.status(404), times=None)
    limits = ResolverLimits(connections=2, stagger_seconds=0.0)
    patient = BlobCache(cache.root, lock_seconds=3600.0)

    resolver = MetadataResolver(patient, transports={"http": origins}, limits=limits)
    with cache.lock(first), pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert caught.value.file == "1.json"
    assert f"{A}/0.json" not in origins.urls
    assert patient.find(second) is None


def test_interrupt_stops_everything(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard, cache: BlobCache
) -> None:
    """Control-C in the calling thread: every thread ends, nothing is left but whole blobs."""
    met = threading.Barrier(4, timeout=TIMEOUT)
    caller = threading.current_thread()

    def interrupt(url: str) -> None:
        met.wait()
        if threading.current_thread() is caller:
            raise KeyboardInterrupt

    origins.on_request = interrupt
    origins.script(A, endless, times=None)

    with pytest.raises(KeyboardInterrupt):
        make_resolver().resolve(card)

    assert len(origins.asked) == 4
    assert blobs(cache) == []


def test_next_resolve_after_an_interrupt_is_right(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """An interrupt leaves nothing that would be in the way: no failure, no lock."""
    resolver = make_resolver()
    interrupts = iter([True])

    def interrupt(url: str) -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt

    origins.on_request = interrupt
    with pytest.raises(KeyboardInterrupt):
        resolver.resolve(card)

    assert contents(resolver.resolve(card)) == EIGHT


# ------------------------------------------------------------------ the rest


def test_progress_is_told_by_one_thread_at_a_time(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """Four threads fetch, their reports come one after the other, and end with everything."""
    inside: list[int] = []
    overlaps: list[bool] = []
    told: list[Progress] = []

    def display(progress: Progress) -> None:
        overlaps.append(bool(inside))
        inside.append(1)
        told.append(progress)
        time.sleep(0.0005)
        inside.pop()

    met = threading.Barrier(4, timeout=TIMEOUT)
    origins.on_request = lambda url: met.wait()
    make_resolver().resolve(card, progress=display)

    assert not any(overlaps)
    assert (told[-1].done_files, told[-1].done_bytes) == (8, sum(map(len, EIGHT.values())))


def test_forked_child_may_use_its_parents_resolver(
    make_resolver: MakeResolver, origins: OriginSimulator, card: ModelDeploymentCard
) -> None:
    """Locks that other threads of the parent held when it forked, and its failures, are not the child's."""
    resolver = make_resolver()
    origins.script(A, simulator.status(404))
    with pytest.raises(ResolveError):
        resolver.resolve(card)
    with resolver._lock, resolver._failures._lock:  # as if another thread were in the middle of something
        pid = os.fork()
        if pid == 0:
            try:
                is_right = contents(resolver.resolve(card)) == EIGHT
            finally:
                os._exit(0 if is_right else 1)

    deadline = time.monotonic() + TIMEOUT
    ended, status = 0, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert (ended, status) == (pid, 0)


def test_many_threads_and_models_with_origins_that_fail(cache: BlobCache) -> None:
    """Threads, models that share files, every third request broken: all is right, each file came once."""
    files = {f"{number}.json": b"%d" % number * 3000 for number in range(10)}
    origins = OriginSimulator({f"{base}/{name}": data for base in (A, B) for name, data in files.items()})
    counter = iter(range(10**6))
    good: list[str] = []

    def sometimes(transfer: Transfer) -> None:
        if next(counter) % 3 == 0:
            simulator.send(transfer, transfer.origins.files[transfer.url][:2000])
            raise FetchError("broken", url=transfer.url, is_transient=True)
        simulator.well(transfer)
        good.append(transfer.url.rpartition("/")[2])

    origins.script(A, sometimes, times=None)
    origins.script(B, sometimes, times=None)
    names = list(files)
    models = [{name: files[name] for name in names[start % 7 : start % 7 + 4]} for start in range(12)]
    limits = ResolverLimits(stagger_seconds=0.0, rounds=8, first_pause_seconds=0.001)
    resolver = MetadataResolver(cache, transports={"http": origins}, limits=limits)

    def work(number: int) -> list[bool]:
        return [
            contents(resolver.resolve(make_card(model, A, name=f"m{index}"), replicas=[make_card(model, B)]))
            == model
            for index, model in enumerate(models[number:] + models[:number])
        ]

    assert at_once(8, work) == [[True] * 12] * 8
    assert sorted(good) == sorted(names)
