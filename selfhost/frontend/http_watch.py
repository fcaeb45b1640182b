"""The clock of one fetch over HTTP, and the errors that its steps end with.

For one thread; knows limits and texts, touches no socket.
"""

from __future__ import annotations

import re
from typing import Callable

from ..errors import FetchError, FetchTimeout, shown
from .transport import FetchLimits

_CREDENTIALS = re.compile(r"(?<=//)[^/?#]*@")


def without_credentials(url: str) -> str:
    """Return the URL as it may stand in a log."""
    return _CREDENTIALS.sub("***@", url, count=1)


class StaleConnection(FetchError):
    """A kept connection turned out to be dead before the first byte of an answer; a new one may well work."""


class Watch:
    """How long each step of one fetch may still take, and the error for one that takes longer."""

    def __init__(self, url: str, limits: FetchLimits, clock: Callable[[], float]) -> None:
        self.url = without_credentials(url)
        self.limits = limits
        self.clock = clock
        self._ends = clock() + limits.total_seconds

    def allow(self, seconds: float) -> float:
        """Return how many of `seconds` a step may take; FetchTimeout if the whole fetch has no time left."""
        left = self._ends - self.clock()
        if left <= 0:
            raise self.timeout("total", self.limits.total_seconds, "it was not finished")
        return min(seconds, left)

    def timeout(self, phase: str, seconds: float, found: str) -> FetchTimeout:
        """Return the error for a step that got no further in `seconds`, or in what the fetch had left."""
        if self.clock() >= self._ends:
            phase, seconds = "total", self.limits.total_seconds
        message = f"cannot fetch {shown(self.url)}: {found} within {seconds:g} s ({phase})"
        return FetchTimeout(message, url=self.url, seconds=seconds, phase=phase)

    def error(self, why: str, *, is_transient: bool = False) -> FetchError:
        """Return the error for a step that failed."""
        message = f"cannot fetch {shown(self.url)}: {why}"
        return FetchError(message, url=self.url, is_transient=is_transient)
