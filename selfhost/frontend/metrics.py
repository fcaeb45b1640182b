"""What a frontend fetches and keeps, as metrics for Prometheus.

`FrontendCollector` tells, at each scrape, what there is then. Nothing runs between scrapes. The package
prometheus_client is loaded when a collector is made. Sharing: any number of threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, Optional

from ..errors import SelfHostError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .resolver import MetadataResolver
    from .watcher import ModelWatcher

logger = logging.getLogger(__name__)

_PREFIX = "selfhost_frontend_"
# To know the size of a cache, every file in it is looked at: 70 ms for ten thousand.
CACHE_SECONDS = 60.0


class FrontendCollector:
    """A collector of a frontend's metrics, for `prometheus_client.REGISTRY.register`.

    `watcher` adds the states of its models. The cache is looked at every `cache_seconds` at most. A scrape
    never fails because of this: what cannot be told is left out, and logged. Raises SelfHostError if
    prometheus_client is missing.
    """

    def __init__(
        self,
        resolver: MetadataResolver,
        watcher: Optional[ModelWatcher] = None,
        *,
        cache_seconds: float = CACHE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = _prometheus_core()
        self._resolver = resolver
        self._watcher = watcher
        self._cache_seconds = cache_seconds
        self._clock = clock
        self._cache_due = float("-inf")
        self._cache_bytes = 0

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, as a Prometheus registry asks for them."""
        for part in (self._resolved, self._watched, self._cached):
            try:
                yield from list(part())
            except Exception:  # the host's other metrics must not go with ours
                logger.exception("some metrics cannot be told")

    def _resolved(self) -> Iterator[Metric]:
        counters = self._resolver.counters()
        resolves = {"ok": counters.resolved, "failed": counters.failed}
        yield self._counters("resolves", "Calls of `resolve`, by outcome.", "outcome", resolves)
        text = "Tries to fetch a file from a source, by outcome: ok, or the kind of failure."
        yield self._counters("attempts", text, "outcome", counters.attempts)
        yield self._counter("fetched_files", "Files that were fetched.", counters.fetched_files)
        yield self._counter("fetched_bytes", "Bytes of these.", counters.fetched_bytes)
        yield self._counter(
            "cache_hits", "Files that were in the cache when looked for.", counters.cache_hits
        )
        yield self._counter("cache_misses", "Files that were not.", counters.cache_misses)

    def _watched(self) -> Iterator[Metric]:
        if self._watcher is not None:
            models = self._core.GaugeMetricFamily(_PREFIX + "models", "Models, by state.", labels=["state"])
            for state, count in self._watcher.counts().items():
                models.add_metric([state.value], count)
            yield models

    def _cached(self) -> Iterator[Metric]:
        if self._clock() >= self._cache_due:
            self._cache_bytes = self._resolver.cache.stats().bytes
            self._cache_due = self._clock() + self._cache_seconds
        yield self._core.GaugeMetricFamily(
            _PREFIX + "cache_bytes", "Bytes of all files in the cache.", value=self._cache_bytes
        )

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family: Metric = self._core.CounterMetricFamily(_PREFIX + name, text, value=value)
        return family

    def _counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = self._core.CounterMetricFamily(_PREFIX + name, text, labels=[label])
        for value, number in sorted(values.items()):
            family.add_metric([value], number)
        counters: Metric = family
        return counters


def _prometheus_core() -> Any:
    try:
        from prometheus_client import core
    except ImportError as err:
        raise SelfHostError(
            f"metrics need the package `prometheus_client`, which cannot be imported ({err}): "
            "run `pip install 'selfhost[metrics]'`, or `pip install prometheus_client`"
        ) from err
    return core
