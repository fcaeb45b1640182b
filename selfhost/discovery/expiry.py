"""When a record is dead: its owner has not touched the file for longer than the time to live.

Ages are differences of wall-clock times, because modification times are; so a clock that is set must not
look like everybody's death. A jump shows as wall clock and monotonic clock drifting apart; after one, nothing
is stale for one time to live, in which every living owner touches its records by the new time.

A file of the future, touched before the clock was set back or by a host whose clock is ahead, has no age. It
is dead once nobody has been seen to touch it for one time to live.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Callable, Optional

from . import layout

_MOST_AHEAD = 10_000  # files of the future that are remembered; names come and go


class Expiry:
    """Tell stale modification times from fresh ones. Any thread may ask."""

    def __init__(
        self, ttl_seconds: float, clock: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self.ttl_seconds = ttl_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._offset: Optional[float] = None  # wall clock minus monotonic, when last asked
        self._trusted_from = float("-inf")  # monotonic
        self._ahead: dict[str, tuple[float, float]] = {}  # by path: mtime, and since when (monotonic)

    def is_stale(self, path: str, mtime: float) -> bool:
        """Tell whether the file, last touched at `mtime` (wall clock), has outlived its time."""
        wall, monotonic = self._clock(), self._monotonic()
        offset = wall - monotonic
        if self._offset is not None and abs(offset - self._offset) > self.ttl_seconds / 3:
            self._trusted_from = monotonic + self.ttl_seconds
        self._offset = offset  # each time anew: a clock that is only slewed never jumps
        if mtime > wall + self.ttl_seconds / 3:
            return self._has_stood_still(path, mtime, monotonic)
        return monotonic >= self._trusted_from and wall - mtime > self.ttl_seconds

    def _has_stood_still(self, path: str, mtime: float, monotonic: float) -> bool:
        seen = self._ahead.get(path)
        if seen is not None and seen[0] == mtime:
            return monotonic - seen[1] > self.ttl_seconds
        if len(self._ahead) >= _MOST_AHEAD:
            self._ahead.clear()
        self._ahead[path] = mtime, monotonic
        return False


def sweep(directory: str, expiry: Expiry, keep: Callable[[str], bool]) -> Iterator[OSError]:
    """Remove the stale records and temporary files in a directory, except where `keep(path)`.

    Yields each error that kept something from being removed. What is no record of this layout stays.
    """
    try:
        entries = list(os.scandir(directory))
    except FileNotFoundError:
        return
    except OSError as err:
        yield err
        return
    for entry in entries:
        try:
            if _is_dead(entry, expiry) and not keep(entry.path):
                os.unlink(entry.path)
        except FileNotFoundError:
            continue  # another participant was faster
        except OSError as err:
            yield err


def _is_dead(entry: os.DirEntry[str], expiry: Expiry) -> bool:
    if not layout.is_temporary(entry.name) and layout.key_of(entry.name) is None:
        return False
    found = entry.stat(follow_symlinks=False)
    return stat.S_ISREG(found.st_mode) and expiry.is_stale(entry.path, found.st_mtime)
