"""MetadataResolver: a card with URLs becomes a card whose files are on this disk, verified.

A model that is in the cache is verified by the cache and costs no request. Otherwise the missing files are
fetched side by side, each digest once, from the card's own URLs and those of its replicas; then the model's
directory appears, whole. Or there is one error that lists every attempt.

The hash is the authority, and it comes from the card: this gives integrity, not authenticity, and no
protection from an old card that is played again.

A resolve that is to end (`close`, its `stop` event) ends at the next piece that comes, or when what it waits
for is over: within the time limits of its transport.

Sharing: any number of threads may use one resolver, any number of processes one cache. A forked child may use
its parent's resolver; it begins with no failures remembered and connections of its own. Threads live within
a call of `resolve` only, and keep no interpreter from its exit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from random import random as random_fraction
from typing import Callable, Optional

from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from ..errors import BlobMissing
from .cache import BlobCache
from .counters import Counts, ResolverCounters
from .crew import Crew
from .failures import FailureMemo
from .fetching import BlobFetcher, Surroundings
from .limits import ResolverLimits
from .plans import Plan, Plans, ResolvedModel
from .progress import Progress, ProgressCallback, ProgressMeter
from .sources import sources_by_digest
from .transport import Transport
from .wanted import WantedBlob

__all__ = ["MetadataResolver", "Progress", "ResolvedModel", "ResolverCounters", "ResolverLimits"]

logger = logging.getLogger(__name__)

_PUBLISH_TRIES = 3  # somebody who collects garbage all the time is to be heard of


class MetadataResolver:
    """Brings the files of cards to this disk; a context manager, see the module's docstring.

    Without a `cache` Dynamo's own place is used, without `transports` http, https and hf are. Transports that
    are passed in stay the caller's to close. `offline` uses of each only what needs no network, see
    `Transport.offline`. `clock` is monotonic (seconds).
    """

    def __init__(
        self,
        cache: Optional[BlobCache] = None,
        *,
        transports: Optional[Mapping[str, Transport]] = None,
        limits: Optional[ResolverLimits] = None,
        offline: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Optional[Callable[[float], object]] = None,  # None: a wait that ends when the resolve fails
        random: Callable[[], float] = random_fraction,
    ) -> None:
        self.cache = BlobCache() if cache is None else cache
        self.limits = limits or ResolverLimits()
        self.offline = offline
        self._given_transports = transports
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._plans = Plans(self.limits)
        self._closed = False
        self._own_transports: Optional[dict[str, Transport]] = None
        self._begin()

    def _begin(self) -> None:
        """Set up what a forked child must not share with its parent."""
        inherited, self._own_transports = self._own_transports, None
        _close_all(inherited or {})  # which the parent's peers do not see
        # For dictionary work only. Reentrant: a signal handler may close the resolver that it interrupts.
        self._lock = threading.RLock()
        self._running: set[threading.Event] = set()  # the stop events of the resolves that fetch
        self._failures = FailureMemo(
            first_seconds=self.limits.first_backoff_seconds,
            max_seconds=self.limits.max_backoff_seconds,
            clock=self._clock,
            random=self._random,
        )
        self._counts = Counts()
        self._pid = os.getpid()  # last: another thread that sees it set finds the rest

    def resolve(
        self,
        card: ModelDeploymentCard,
        *,
        replicas: Iterable[ModelDeploymentCard] = (),
        progress: Optional[ProgressCallback] = None,
        stop: Optional[threading.Event] = None,
    ) -> ResolvedModel:
        """Return the card with every file local and verified; fetch what is not in the cache.

        Files of the `replicas` that have the same digest are further sources. Raises CardError if the card
        asks for what no card may (names, number, bytes), ResolveError if a file is to be had nowhere,
        CacheError if the cache cannot keep it. Blocks; with all files in the cache for well below 1 ms.

        `stop`, an event of this one call, ends it when it is set; a call that fails sets it itself. Raises
        RuntimeError if it was ended so, or by `close`, before or meanwhile.
        """
        try:
            answer = self._resolve(card, replicas, progress, stop)
        except BaseException:
            self._counts.add(failed=1)
            raise
        return answer

    def counters(self) -> ResolverCounters:
        """Return what this resolver has done so far, as it is now."""
        self._require_own()
        return self._counts.snapshot()

    def forget_failures(self) -> None:
        """Ask every source again at the next resolve, whatever failed lately."""
        self._failures.clear()

    def close(self) -> None:
        """End the resolves that run, without waiting for that, and close what this resolver opened.

        Harmless when repeated.
        """
        self._require_own()
        with self._lock:
            self._closed = True
            running = list(self._running)
            transports, self._own_transports = self._own_transports, None
        for stop in running:
            stop.set()
        _close_all(transports or {})

    def __enter__(self) -> MetadataResolver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "offline" if self.offline else "online"
        return f"<MetadataResolver {state} cache={self.cache.root!r}>"

    # -------------------------------------------------------------- what is not in the cache

    def _resolve(
        self,
        card: ModelDeploymentCard,
        replicas: Iterable[ModelDeploymentCard],
        progress: Optional[ProgressCallback],
        stop: Optional[threading.Event],
    ) -> ResolvedModel:
        self._require_usable()
        _require_card(card)
        plan = self._plans.of(card)
        local_dir = self.cache.find_model(plan.key, plan.files)
        if local_dir is not None:
            self._counts.add(resolved=1, cache_hits=len(plan.blobs))
            return plan.answer(card, local_dir)
        stop = threading.Event() if stop is None else stop
        with self._ended_by_close(stop):
            made = self._make(plan, [card, *replicas], progress, stop)
        self._counts.add(resolved=1)
        return made

    def _make(
        self,
        plan: Plan,
        cards: list[ModelDeploymentCard],
        progress: Optional[ProgressCallback],
        stop: threading.Event,
    ) -> ResolvedModel:
        """Fetch what is missing, and let the model's directory appear."""
        for card in cards:
            _require_card(card)
        fetched: set[Checksum] = set()
        for tries_left in reversed(range(_PUBLISH_TRIES)):
            fetched |= self._fetch_missing(plan, cards, progress, stop)
            if stop.is_set():
                self._require_usable()
                raise RuntimeError(f"the resolve of {plan.name!r} was ended by its stop event")
            try:
                local_dir = self.cache.publish_model(plan.key, plan.files)
                break
            except BlobMissing as error:  # it was there, and has been collected since
                if not tries_left:
                    raise
                logger.debug("once more: %s", error)
        logger.info("resolved %r, %d of %d blobs fetched", plan.name, len(fetched), len(plan.blobs))
        return plan.answer(cards[0], local_dir, fetched)

    def _fetch_missing(
        self,
        plan: Plan,
        cards: list[ModelDeploymentCard],
        progress: Optional[ProgressCallback],
        stop: threading.Event,
    ) -> set[Checksum]:
        """Bring the missing blobs into the cache; return the digests of those that came from a source."""
        missing = [blob for blob in plan.blobs if self.cache.find(blob.checksum) is None]
        self._counts.add(cache_misses=len(missing), cache_hits=len(plan.blobs) - len(missing))
        if not missing:
            return set()
        sources = sources_by_digest(cards, {blob.checksum for blob in missing})
        fetcher = BlobFetcher(self._surroundings(), sources, ProgressMeter(missing, progress), stop)
        crew: Crew[WantedBlob] = Crew(
            fetcher.fetch,
            size=self.limits.connections,
            stagger_seconds=self.limits.stagger_seconds,
            stop=stop,
        )
        crew.run(missing)
        fetcher.raise_given_up()
        return fetcher.fetched

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            cache=self.cache,
            counts=self._counts,
            transports=self._transports(),
            failures=self._failures,
            limits=self.limits,
            offline=self.offline,
            clock=self._clock,
            sleep=self._sleep,
            random=self._random,
        )

    def _transports(self) -> Mapping[str, Transport]:
        table = self._open_transports() if self._given_transports is None else self._given_transports
        return _without_network(table) if self.offline else table

    def _open_transports(self) -> Mapping[str, Transport]:
        """Return the transports of this resolver's own, made when something is first to be fetched."""
        if self._own_transports is not None:
            return self._own_transports
        from .transports import default_transports  # http.client and ssl: not for those who only look up

        made = default_transports(limits=self.limits.fetch, offline=self.offline)
        with self._lock:
            if self._own_transports is None and not self._closed:
                self._own_transports = made
            kept = self._own_transports
        if kept is not made:  # another thread was faster
            _close_all(made)
        if kept is None:
            raise _closed()
        return kept

    # -------------------------------------------------------------- its life

    def _require_usable(self) -> None:
        self._require_own()
        if self._closed:
            raise _closed()

    def _require_own(self) -> None:
        if self._pid != os.getpid():
            self._begin()  # what a parent has is not this child's

    @contextlib.contextmanager
    def _ended_by_close(self, stop: threading.Event) -> Iterator[None]:
        """Let `close` set the event for the time of a `with`."""
        with self._lock:
            self._require_usable()
            self._running.add(stop)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(stop)


def _require_card(card: object) -> None:
    if not isinstance(card, ModelDeploymentCard):
        raise TypeError(
            f"expected a ModelDeploymentCard, found {type(card).__name__}: "
            "read the text of a card with ModelDeploymentCard.from_json"
        )


def _closed() -> RuntimeError:
    return RuntimeError("this resolver is closed: make a new MetadataResolver")


def _without_network(transports: Mapping[str, Transport]) -> dict[str, Transport]:
    """Return what is left of a table when nothing may be asked of the network."""
    views = {scheme: transport.offline() for scheme, transport in transports.items()}
    return {scheme: view for scheme, view in views.items() if view is not None}


def _close_all(transports: Mapping[str, Transport]) -> None:
    """Close each transport once; one may serve several schemes."""
    for transport in {id(transport): transport for transport in transports.values()}.values():
        transport.close()
