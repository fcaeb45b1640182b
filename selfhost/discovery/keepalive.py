"""A thread that does one thing at regular intervals, and ends when it should.

It is a daemon thread, and its user must see to it that an atexit hook stops it: the interpreter joins all
other threads *before* it runs atexit hooks, so one that waits to be told would hang every exit.
"""

from __future__ import annotations

import logging
import threading
from typing import Callable

from .._threads import log_safely, start_thread

logger = logging.getLogger(__name__)


class KeepAlive:
    """Call `tick` every `seconds` in a thread of its own, from `start` to `stop`; each is called once."""

    def __init__(self, tick: Callable[[], None], seconds: float) -> None:
        self._tick = tick
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="selfhost-keepalive", daemon=True)

    def start(self) -> None:
        """Start the thread; RuntimeError where the system has none to give."""
        try:
            start_thread(self._thread)
        except BaseException:  # of a signal handler of the host's: then the thread runs
            self._stopped.set()
            raise

    def stop(self, timeout: float = 2.0) -> None:
        """Tell the thread to end and wait for it up to `timeout` seconds (it may hang on a dead disk)."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._tick()
            except Exception:  # noqa: BLE001 - it is logged, and every record would expire with the thread
                message = "the keep-alive of discovery records failed; it goes on"
                log_safely(logger, logging.ERROR, message, exc_info=True)
