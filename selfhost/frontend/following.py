"""A thread that follows the models of a discovery, whatever interrupts it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Set as AbstractSet
from typing import Callable

from .._threads import log_safely, start_thread
from ..discovery.base import Bucket, Discovery, Event, RecordKey
from ..errors import DiscoveryError

logger = logging.getLogger(__name__)


class Follower:
    """Calls `apply` with each event, in a daemon thread, until `stop` is set.

    A discovery that fails is asked again after `poll_seconds`, and after a defect when `retry_seconds` says,
    which is given the number of defects in a row. What went away meanwhile is told, too: `known` returns the
    records that were told and not withdrawn. An event whose `apply` raises is logged, and keeps nobody from
    the others.
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        apply: Callable[[Event], None],
        known: Callable[[], AbstractSet[RecordKey]],
        stop: threading.Event,
        poll_seconds: float,
        retry_seconds: Callable[[int], float],
    ) -> None:
        self._discovery = discovery
        self._apply = apply
        self._known = known
        self._stop = stop
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds
        self._thread = threading.Thread(target=self._run, name="selfhost-watcher", daemon=True)

    def start(self) -> None:
        """Begin; RuntimeError where the system has no thread to give."""
        start_thread(self._thread)

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, if it began and is not the calling one."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        defects = 0  # in a row
        while not self._stop.is_set():
            seconds = self._poll_seconds
            try:
                self._follow()
                defects = 0
            except DiscoveryError as error:
                log_safely(logger, logging.WARNING, "cannot follow the discovery, trying again: %s", error)
            except Exception:  # noqa: BLE001 - models that are here are served on, the discovery may recover
                defects += 1
                seconds = self._retry_seconds(defects)
                what = "following the discovery failed unexpectedly, next try in %.1f s"
                log_safely(logger, logging.ERROR, what, seconds, exc_info=True)
            self._stop.wait(seconds)

    def _follow(self) -> None:
        """Apply what the discovery tells, until it is interrupted or `stop` is set."""
        self._forget_withdrawn()
        for event in self._discovery.watch(Bucket.MODELS, stop=self._stop, poll_seconds=self._poll_seconds):
            try:
                self._apply(event)
            except Exception:  # noqa: BLE001 - a defect: one record must not keep us from the others
                what = "the record %s could not be taken in"
                log_safely(logger, logging.ERROR, what, event.key, exc_info=True)

    def _forget_withdrawn(self) -> None:
        """After an interruption: a new watch tells what is there, but not what went away meanwhile."""
        known = self._known()
        if known:
            for key in known - set(self._discovery.records(Bucket.MODELS)):
                self._apply(Event("removed", Bucket.MODELS, key, ""))
