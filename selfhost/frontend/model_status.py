"""What a watcher tells of a model, its state and why, and how it tells it."""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Callable, Optional

from .._threads import host_signals, log_safely
from ..discovery.base import RecordKey
from .plans import ResolvedModel

logger = logging.getLogger(__name__)


class ModelState(str, enum.Enum):
    """What has become of a published model."""

    PENDING = "pending"  # its files are being fetched
    READY = "ready"  # all of them are here, verified
    FAILED = "failed"  # they could not be had; another try follows
    QUARANTINED = "quarantined"  # its card differs from the one that is served for the same endpoint
    GONE = "gone"  # no worker publishes it any more


@dataclass(frozen=True)
class ModelStatus:
    """The state of one configuration of one model; `workers` are the records that publish it.

    A record that holds no card has its key as its name, and no mdcsum.
    """

    name: str
    mdcsum: str
    state: ModelState
    reason: str = ""  # why it failed or waits in quarantine
    workers: tuple[RecordKey, ...] = ()
    model: Optional[ResolvedModel] = None  # when ready
    failures: int = 0  # in a row
    retry_seconds: Optional[float] = None  # from now to the next try, when failed


class News:
    """Statuses on their way to a callback: one call at a time, in the order in which they were added.

    Any number of threads; statuses may be added with locks held that a callback asks for.
    """

    def __init__(self, callback: Optional[Callable[[ModelStatus], None]]) -> None:
        self._callback = callback
        self._statuses: deque[ModelStatus] = deque()
        self._delivering = threading.Lock()

    def add(self, status: ModelStatus) -> None:
        """Have a status delivered, later."""
        if self._callback is not None:
            self._statuses.append(status)

    def deliver(self) -> None:
        """Call the callback, unless another thread is at it, which will then deliver ours, too."""
        while self._statuses and self._delivering.acquire(blocking=False):
            try:
                while self._statuses:
                    self._tell(self._statuses.popleft())
            finally:
                self._delivering.release()

    def _tell(self, status: ModelStatus) -> None:
        if self._callback is not None:
            try:
                with host_signals():
                    self._callback(status)
            except Exception:  # noqa: BLE001 - of the host's; the next status is told all the same
                log_safely(logger, logging.ERROR, "on_change failed for %r", status.name, exc_info=True)
