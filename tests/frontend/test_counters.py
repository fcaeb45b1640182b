"""What a resolver counts."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading

import pytest
from simulator import ONE_BY_ONE, MakeResolver, OriginSimulator, Serve

from selfhost.errors import CardError, HTTPStatusError, ResolveError
from selfhost.frontend import ResolverCounters
from selfhost.frontend.counters import Counts
from selfhost.frontend.resolver import MetadataResolver

FILES = {"config.json": b"{}", "tokenizer.json": b"t" * 1000, "same.json": b"{}"}
BASE = "http://w1"


def test_nothing_was_done_yet(resolver: MetadataResolver) -> None:
    """All numbers begin at zero."""
    assert resolver.counters() == ResolverCounters()


def test_first_and_second_resolve(resolver: MetadataResolver, serve: Serve) -> None:
    """Files that are fetched are misses, the same ones hits the next time; equal ones count once."""
    card = serve(BASE, FILES)
    resolver.resolve(card)
    first = resolver.counters()
    resolver.resolve(card)

    assert first == ResolverCounters(
        resolved=1, cache_misses=2, fetched_files=2, fetched_bytes=1002, attempts={"ok": 2}
    )
    assert resolver.counters() == dataclasses.replace(first, resolved=2, cache_hits=2)


def test_blobs_of_another_model_are_hits(resolver: MetadataResolver, serve: Serve) -> None:
    """A model that is new may have files that are not."""
    resolver.resolve(serve(BASE, FILES))
    resolver.resolve(serve(BASE, {**FILES, "more.json": b"[]"}, name="other"))

    found = resolver.counters()
    assert (found.cache_hits, found.cache_misses, found.fetched_files) == (2, 3, 3)


def test_failures_are_counted_by_kind(
    make_resolver: MakeResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """Each attempt counts under the class of its error; a resolve that raises is a failed one."""
    resolver = make_resolver(limits=ONE_BY_ONE)
    good, gone = serve(BASE, {"config.json": b"{}"}), serve("http://w2", {"config.json": b"{}"})
    strange = serve("ftp://w3", {"config.json": b"{}"})
    del origins.files["http://w2/config.json"]
    resolver.resolve(gone, replicas=[strange, good])
    with pytest.raises(ResolveError):
        resolver.resolve(serve("ftp://w3", {"config.json": b"[]"}))
    with pytest.raises(TypeError):
        resolver.resolve({})  # type: ignore[arg-type]
    with pytest.raises(CardError):
        resolver.resolve(serve(BASE, {"..": b""}))

    found = resolver.counters()
    assert (found.resolved, found.failed) == (1, 3)
    assert found.attempts == {HTTPStatusError.__name__: 1, "SchemeNotAllowed": 2, "ok": 1}


def test_snapshots_stay_as_they_are(resolver: MetadataResolver, serve: Serve) -> None:
    """What was returned does not change any more."""
    before = resolver.counters()
    resolver.resolve(serve(BASE, FILES))

    assert before == ResolverCounters()


def test_no_count_is_lost() -> None:
    """Threads that count at the same time do not forget each other's."""
    counts = Counts()

    def count() -> None:
        for _ in range(2000):
            counts.add(resolved=1, cache_hits=3)
            counts.attempt("ok")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert counts.snapshot() == ResolverCounters(resolved=8000, cache_hits=24000, attempts={"ok": 8000})


def test_forked_child_counts_for_itself(resolver: MetadataResolver, serve: Serve) -> None:
    """It begins at zero, whatever its parent was doing, and its parent knows nothing of it."""
    card = serve(BASE, FILES)
    resolver.resolve(card)

    def resolve() -> None:
        found = [resolver.counters(), resolver.resolve(card) and resolver.counters()]
        os._exit(0 if found == [ResolverCounters(), ResolverCounters(resolved=1, cache_hits=2)] else 1)

    child = multiprocessing.get_context("fork").Process(target=resolve)
    with resolver._counts._lock:  # as another thread would hold it
        child.start()
    child.join(30)

    assert child.exitcode == 0
    assert resolver.counters().resolved == 1
