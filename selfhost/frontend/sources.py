"""Where the bytes of a digest are to be had, and in which order the places are asked.

Rules
- Sources of a file are its own URL and, after it, the URLs of the same digest in the cards of the replicas.
- Every source is asked once. Those that failed for a reason that may be over soon (a status such as 503, a
  broken or refused connection) are asked again, each after a pause of its own, until the rounds are over.
- Sources that rest because they failed lately go last. If all of them failed for good lately, none is asked.
- What failed for good since the resolve began, for whichever file, is not asked again within it: an origin
  that hangs costs one time-out, not one for each file.
- A slow source is given up as long as another one was not asked yet and does not rest; in the later rounds it
  may take its time. What is slow, and how that is found out, is no matter of this module.

Nothing here opens, sleeps or remembers: values and a memo of failures go in, the next source comes out.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from random import random as random_fraction
from typing import Callable, NamedTuple, Optional

from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from .failures import FailureMemo, Source, SourceError
from .limits import ResolverLimits


def sources_by_digest(
    cards: Iterable[ModelDeploymentCard], wanted: Collection[Checksum]
) -> dict[Checksum, tuple[Source, ...]]:
    """Map each wanted digest to its sources in the cards, in the order of the cards, each once."""
    urls: dict[Checksum, dict[str, None]] = {checksum: {} for checksum in wanted}
    for card in cards:
        for file, _ in card.iter_metadata_files():
            if file.checksum in urls:
                urls[file.checksum][file.path] = None
    return {checksum: tuple(map(Source.at, found)) for checksum, found in urls.items()}


class Turn(NamedTuple):
    """A source whose turn it is, after so many seconds."""

    source: Source
    pause_seconds: float
    may_be_slow: bool  # False: there is another one, and then this one once more


class Rounds:
    """The order in which the sources of one file are asked; for one thread.

    Call `next` for the source to ask, and `failed` when it failed; over when `next` returns None.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        failures: FailureMemo,
        *,
        since: int,  # the mark at which the resolve began
        limits: Optional[ResolverLimits] = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_fraction,
    ) -> None:
        self.sources = tuple(sources)
        self._failures = failures
        self._since = since
        self._limits = limits or ResolverLimits()
        self._clock = clock
        self._random = random
        self._round = 1
        self._left = dict.fromkeys(self.sources, 0.0)  # to be asked in this round, and from when on
        self._again: dict[Source, float] = {}  # the same for the next round

    @property
    def seconds_blocked(self) -> Optional[float]:
        """For how long all sources rest because they failed for good; None if one of them does not."""
        seconds = [self._failures.seconds_blocked(source) for source in self.sources]
        return min(seconds) if seconds and all(seconds) else None

    def next(self) -> Optional[Turn]:
        """Return whose turn it is, None if no source is left."""
        self._drop_spent()
        if not self._left and self._again:
            self._round += 1
            self._left, self._again = self._again, {}
            self._drop_spent()
        if not self._left:
            return None
        source = min(self._left, key=lambda known: (self._failures.is_resting(known), self._left[known]))
        pause = max(0.0, self._left.pop(source) - self._clock())
        return Turn(source, pause, may_be_slow=not self._is_replaceable())

    def _is_replaceable(self) -> bool:
        """Whether a good source waits for its first turn, and the one whose turn it is will have another."""
        is_first_of_several = self._round == 1 and self._limits.rounds > 1
        return is_first_of_several and not all(map(self._failures.is_resting, self._left))

    def _drop_spent(self) -> None:
        for source in list(self._left):
            if self._failures.is_spent(source, since=self._since):
                del self._left[source]

    def failed(self, source: Source, error: SourceError) -> bool:
        """Take note that the source failed; tell whether that is final, so that it is not asked again."""
        is_final = not getattr(error, "is_transient", False) or self._round >= self._limits.rounds
        if not is_final:
            self._again[source] = self._clock() + self._pause(getattr(error, "retry_after", None))
        return is_final

    def _pause(self, asked: Optional[float]) -> float:
        seconds = self._limits.first_pause_seconds * 2.0 ** (self._round - 1) * (0.5 + self._random())
        return min(self._limits.max_pause_seconds, max(seconds, asked or 0.0))
