"""Reading a bucket's directory again and again, opening only the files that changed.

Who watches asks often, to be quick, and most often nothing has happened: one look at the directory tells
whether a name came or went. What that does not tell is found at the next scan of every file, a second later.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from dataclasses import dataclass
from typing import Callable, Optional

from . import layout
from .base import RecordKey, sorted_by_key
from .expiry import Expiry

logger = logging.getLogger(__name__)

SCAN_SECONDS = 1.0  # between scans of every file: some are written in place, some grow stale
# A directory that changed so shortly ago may change again without its modification time showing it: file
# systems count in ticks of 4 ms, some network ones in 10.
_TICK_SECONDS = 0.05


@dataclass(frozen=True)
class _Seen:
    key: RecordKey
    stamp: tuple[int, ...]
    text: Optional[str]  # the last usable one; None: there was none yet
    is_usable: bool


class Scanner:
    """The live records of one directory. For one thread at a time.

    A file that cannot be read or is no record (yet) is skipped with one warning and read again when it
    changes; until then the last usable text under that name counts. What `keep(path)` claims is never stale.
    """

    def __init__(
        self,
        directory: str,
        expiry: Expiry,
        keep: Callable[[str], bool],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._expiry = expiry
        self._keep = keep
        self._monotonic = monotonic
        self._stamp: Optional[int] = None  # of the directory as it was scanned; None: scan it again
        self._next_scan = 0.0
        self._seen: dict[str, _Seen] = {}
        self.last: dict[RecordKey, str] = {}  # what scan() returned last

    def refresh(self) -> dict[RecordKey, str]:
        """Return the records; scan for them only if a name came or went, or it is time. Raises OSError."""
        stamp, now = self._directory_stamp(), self._monotonic()
        if stamp is None or stamp != self._stamp or now >= self._next_scan:
            self.scan()
            self._stamp, self._next_scan = stamp, now + SCAN_SECONDS
        return self.last

    def _directory_stamp(self) -> Optional[int]:
        """Return when the directory changed last, None if that was too shortly ago to tell it from now."""
        try:
            changed = os.stat(self._directory).st_mtime_ns
        except FileNotFoundError:
            return None
        return changed if time.time_ns() - changed > _TICK_SECONDS * 1e9 else None

    def scan(self) -> dict[RecordKey, str]:
        """Return the records, sorted by key; none where there is no directory. Raises OSError."""
        try:
            entries = list(os.scandir(self._directory))
        except FileNotFoundError:
            entries = []
        current = ((entry.name, self._look(entry)) for entry in entries)
        self._seen = {name: seen for name, seen in current if seen is not None}
        records: dict[RecordKey, str] = {}
        for name, seen in self._seen.items():
            # One key may have two spellings; the one that Dynamo writes counts.
            if seen.text is not None and (seen.key not in records or name == layout.file_name(seen.key)):
                records[seen.key] = seen.text
        self.last = sorted_by_key(records)
        return self.last

    def _look(self, entry: os.DirEntry[str]) -> Optional[_Seen]:
        """Return what there is to know about one directory entry, None where it is no live record."""
        before = self._seen.get(entry.name)
        key = before.key if before else layout.key_of(entry.name)
        if key is None:
            return None
        try:
            found = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                return None
            if self._expiry.is_stale(entry.path, found.st_mtime) and not self._keep(entry.path):
                return None
            # ctime too: it tells of a changed mode
            stamp = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if before and before.stamp == stamp:
                return before
            return self._read(entry.path, key, stamp, before)
        except FileNotFoundError:
            return None

    def _read(self, path: str, key: RecordKey, stamp: tuple[int, ...], before: Optional[_Seen]) -> _Seen:
        reason: object = "it is no JSON object (yet)"
        try:
            text = layout.text_of(layout.read_bytes(path))
        except FileNotFoundError:
            raise
        except OSError as err:
            text, reason = None, err
        if text is not None:
            return _Seen(key, stamp, text, True)
        if before is None or before.is_usable:
            logger.warning("skipped the discovery record %r: %s", path, reason)
        return _Seen(key, stamp, before.text if before else None, False)
