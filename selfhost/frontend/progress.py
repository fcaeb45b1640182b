"""How far a resolve is, told to whoever asked: numbers only, no display."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable, Optional

from .._threads import host_signals, log_safely
from .wanted import WantedBlob

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a resolve is, as one fetching thread sees it.

    Only what had to be fetched counts. Byte counts go back when a transfer starts over. A file that is done
    counts with the bytes that it has, so at the end `done_bytes` is `total_bytes`.
    """

    filename: str  # the file that this thread is at
    file_bytes: int  # of it that are here
    file_size: Optional[int]  # as the card declares it, None if it does not
    done_bytes: int  # of all files
    total_bytes: Optional[int]  # None while the size of a file is not known
    done_files: int
    total_files: int


ProgressCallback = Callable[[Progress], None]


class ProgressMeter:
    """Counts what fetching threads report, and tells the callback, in one thread at a time.

    The callback runs in a fetching thread and should be quick: the others wait for it. One that raises is
    not called again.
    """

    def __init__(self, blobs: Sequence[WantedBlob], callback: Optional[ProgressCallback]) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._sizes = {blob.checksum: blob.size for blob in blobs}
        self._received = {blob.checksum: 0 for blob in blobs}
        self._done_files = 0

    def report(self, blob: WantedBlob, received: int) -> None:
        """Tell that so many bytes of a blob are here."""
        if self._callback is not None:
            with self._lock:
                self._tell(blob, received)

    def done(self, blob: WantedBlob, size: Optional[int]) -> None:
        """Tell that a blob is here, and how many bytes it has (None: as many as were received)."""
        with self._lock:
            self._done_files += 1
            size = self._received[blob.checksum] if size is None else size
            self._sizes[blob.checksum] = size
            self._tell(blob, size)

    def _tell(self, blob: WantedBlob, received: int) -> None:
        self._received[blob.checksum] = received
        if self._callback is None:
            return
        sizes = [size for size in self._sizes.values() if size is not None]
        progress = Progress(
            filename=blob.names[0],
            file_bytes=received,
            file_size=blob.size,
            done_bytes=sum(self._received.values()),
            total_bytes=sum(sizes) if len(sizes) == len(self._sizes) else None,
            done_files=self._done_files,
            total_files=len(self._sizes),
        )
        try:
            with host_signals():
                self._callback(progress)
        except Exception:  # noqa: BLE001 - of the host's
            self._callback = None
            what = "the progress callback failed and is not called again"
            log_safely(logger, logging.ERROR, what, exc_info=True)
