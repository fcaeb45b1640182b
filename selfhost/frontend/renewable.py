"""What is made of files that somebody renews while this process runs: certificates, tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Callable, Generic, Optional, TypeVar

from ..errors import SettingsError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class Renewable(Generic[Value]):
    """A value made of files, when it is first asked for, and anew when one of them has changed.

    `make` raises SettingsError for files that cannot be used. The first time that is raised; later the value
    before stays in use, each look tries anew, and a warning says why, once for each state of the files:
    whoever renews two of them does so one after the other. Each look costs a stat of each file. Any number
    of threads may ask.
    """

    def __init__(self, make: Callable[[], Value], paths: Sequence[str]) -> None:
        self._make = make
        self._paths = tuple(paths)
        self._made: Optional[tuple[object, Value]] = None  # with what the files looked like before
        self._warned_of: object = None  # what they looked like when they could not be used

    def get(self) -> Value:
        """Return the value."""
        made = self._made
        stamp = tuple(map(_stamp, self._paths))
        if made is None or made[0] != stamp:
            made = self._made = self._renewed(stamp, made)
        return made[1]

    def _renewed(self, stamp: object, before: Optional[tuple[object, Value]]) -> tuple[object, Value]:
        try:
            return stamp, self._make()
        except SettingsError as error:
            if before is None:
                raise
            if stamp != self._warned_of:
                self._warned_of = stamp
                logger.warning("%s; what was read before stays in use", error)
            return before


def _stamp(path: str) -> Optional[tuple[int, ...]]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
