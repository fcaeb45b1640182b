"""What a frontend tells Prometheus, read back with Prometheus's own parser."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from simulator import ONE_BY_ONE, FakeClock, MakeResolver, OriginSimulator, Serve

from selfhost.errors import CacheError, ResolveError
from selfhost.frontend.metrics import CACHE_SECONDS, FrontendCollector
from selfhost.frontend.model_status import ModelState
from selfhost.frontend.resolver import MetadataResolver

FILES = {"config.json": b"{}", "tokenizer.json": b"t" * 1000}
ALWAYS = {
    "resolves_totalok", "resolves_totalfailed", "fetched_files_total", "fetched_bytes_total",
    "cache_hits_total", "cache_misses_total",
}  # fmt: skip


def scrape(collector: FrontendCollector) -> dict[str, float]:
    """Return every sample of a collector, by its name and labels as they are written."""
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        sample.name.replace("selfhost_frontend_", "") + "".join(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_nothing_was_done_yet(resolver: MetadataResolver) -> None:
    """All that is not by kind is there from the beginning, and zero."""
    assert scrape(FrontendCollector(resolver)) == dict.fromkeys({*ALWAYS, "cache_bytes"}, 0)


def test_fetched_then_found(resolver: MetadataResolver, serve: Serve) -> None:
    """What is fetched and what is found in the cache are told apart."""
    card = serve("http://a", FILES)
    collector = FrontendCollector(resolver, cache_seconds=0)
    resolver.resolve(card)
    resolver.resolve(card)
    told = scrape(collector)

    assert (told["resolves_totalok"], told["resolves_totalfailed"], told["attempts_totalok"]) == (2, 0, 2)
    assert (told["fetched_files_total"], told["fetched_bytes_total"], told["cache_bytes"]) == (2, 1002, 1002)
    assert (told["cache_hits_total"], told["cache_misses_total"]) == (2, 2)


def test_failures_are_told_by_kind(
    make_resolver: MakeResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """An attempt that fails counts under the class of its error."""
    resolver = make_resolver(limits=ONE_BY_ONE)
    card = serve("http://a", FILES)
    origins.files.clear()
    with pytest.raises(ResolveError):
        resolver.resolve(card)
    told = scrape(FrontendCollector(resolver))

    assert told["resolves_totalfailed"] == 1
    assert told["attempts_totalHTTPStatusError"] == 1


def test_models_by_state(resolver: MetadataResolver) -> None:
    """A watcher's models are told by state, those of which there are none as well."""
    states = {state: 0 for state in ModelState if state is not ModelState.GONE}
    watcher = SimpleNamespace(counts=lambda: {**states, ModelState.READY: 2})
    told = scrape(FrontendCollector(resolver, watcher))  # type: ignore[arg-type]

    assert {name: value for name, value in told.items() if name.startswith("models")} == {
        "modelspending": 0,
        "modelsready": 2,
        "modelsfailed": 0,
        "modelsquarantined": 0,
    }


def test_cache_is_looked_at_now_and_then(
    resolver: MetadataResolver, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is scraped, the cache is gone over once in a while only."""
    sizes = iter([1, 2])
    monkeypatch.setattr(resolver.cache, "stats", lambda: SimpleNamespace(bytes=next(sizes)))
    collector = FrontendCollector(resolver, clock=clock)
    told = [scrape(collector)["cache_bytes"] for _ in range(2)]
    clock.sleep(CACHE_SECONDS)

    assert [*told, scrape(collector)["cache_bytes"]] == [1, 1, 2]


def test_failing_part_is_left_out(
    resolver: MetadataResolver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape of the host goes on without the cache that cannot be looked at."""

    def fail() -> object:
        raise CacheError("gone", path="/gone")

    monkeypatch.setattr(resolver.cache, "stats", fail)
    with caplog.at_level(logging.ERROR):
        told = scrape(FrontendCollector(resolver))

    assert set(told) == ALWAYS
    assert "some metrics cannot be told" in caplog.text
