"""How much a card may ask for, and how hard a resolve tries."""

from __future__ import annotations

from dataclasses import dataclass, field

from .transport import FetchLimits


@dataclass(frozen=True)
class ResolverLimits:
    """The limits of a resolver; those of a single request and file are `fetch`."""

    max_files: int = 1000  # of one card
    max_total_bytes: int = 4 << 30  # of one card, as declared; an unknown size counts as the most it may be
    connections: int = 4  # of one resolve, at most: measured to be best, both on a disk and in memory
    stagger_seconds: float = 0.005  # until one more connection is used, if files still wait
    rounds: int = 3  # so often is one source asked for one file, if what failed may be over soon
    first_pause_seconds: float = 0.1  # before a source is asked again; doubles, with jitter
    max_pause_seconds: float = 5.0  # whatever its Retry-After asks for
    first_backoff_seconds: float = 1.0  # for which a source that failed goes last; doubles, with jitter
    max_backoff_seconds: float = 30.0  # as long as Dynamo's frontend waits between its tries
    slow_seconds: float = 5.0  # how long a source may be slow while another one has not been asked yet
    slow_bytes_per_second: int = 100_000  # slow is less than this, over each `slow_seconds` of a transfer
    fetch: FetchLimits = field(default_factory=FetchLimits)
