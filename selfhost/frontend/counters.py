"""What a resolver counts, for whoever watches it: plain numbers, no names of any monitoring."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

FETCHED = "ok"  # the outcome of an attempt that brought its file; others are called as their error's class


@dataclass(frozen=True)
class ResolverCounters:
    """What a resolver did since it was made (in a forked child: since its first use there); none ever falls.

    Files of equal content count once. A resolve that `close` or its `stop` ended counts as failed.
    """

    resolved: int = 0  # calls of `resolve` that returned a model
    failed: int = 0  # those that raised
    cache_hits: int = 0  # files that were in the cache
    cache_misses: int = 0  # files that were not, when a resolve looked for them
    fetched_files: int = 0
    fetched_bytes: int = 0  # of these files
    attempts: Mapping[str, int] = field(default_factory=dict)  # by outcome: "ok", or the class of an error


class Counts:
    """The counters while they count; any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a signal handler may resolve, too
        self._numbers: Counter[str] = Counter()
        self._attempts: Counter[str] = Counter()

    def add(self, **numbers: int) -> None:
        """Add to the fields of ResolverCounters that are named."""
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] += number

    def attempt(self, outcome: str) -> None:
        """Count an attempt to fetch one file from one source."""
        with self._lock:
            self._attempts[outcome] += 1

    def snapshot(self) -> ResolverCounters:
        """Return the numbers as they are now."""
        with self._lock:
            return ResolverCounters(**self._numbers, attempts=dict(self._attempts))
