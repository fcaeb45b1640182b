"""A few threads that work off a list together with the thread that has it.

Knows nothing of what the work is. Threads are started one after the other, each only if work still waits a
moment later: on a fast network one connection is the fastest, on a slow one several are. They are joined, so
nothing runs on after the call (but see `run` for interrupts). They are daemons all the same: the exit of the
interpreter waits for other threads, and would wait for those of a call that nobody waits for any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Callable, Generic, Optional, TypeVar

from .._threads import start_thread
from . import waits

logger = logging.getLogger(__name__)

Job = TypeVar("Job")

# Whoever interrupts wants an end now: a thread that a silent source holds ends by itself, at its time-out.
_INTERRUPT_SECONDS = 0.5


class Crew(Generic[Job]):
    """Does each of the jobs once, in their order, with up to `size` threads; the calling one is among them.

    The first job that raises ends it all: no other is begun, and `stop` is set, at which those under way
    should end soon, with whatever exception they like. An interrupt (what is no Exception) comes before any
    error. Whoever sets `stop` from outside ends it as well: `run` returns then. One crew works off one list.
    """

    def __init__(
        self,
        work: Callable[[Job], None],
        *,
        size: int,
        stagger_seconds: float,
        stop: threading.Event,
    ) -> None:
        self._work = work
        self._size = size
        self._stagger_seconds = stagger_seconds
        self._stop = stop
        self._jobs: deque[Job] = deque()
        self._nothing_waits = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._first_error: Optional[BaseException] = None

    def run(self, jobs: Iterable[Job]) -> None:
        """Do the jobs; return when all threads have ended. Raises what the first failing job raised.

        An interrupt (KeyboardInterrupt, SystemExit) waits half a second for them at most.
        """
        self._jobs.extend(jobs)
        try:
            if len(self._jobs) > 1:
                self._start_thread()
            self._work_off()
            self._join(_INTERRUPT_SECONDS if _is_interrupt(self._first_error) else None)
        except BaseException:  # of this very thread: an interrupt, most likely
            self._halt()
            self._join(_INTERRUPT_SECONDS)
            raise
        self._raise_first()

    def _work_off(self) -> None:
        while not self._stop.is_set():
            try:
                job = self._jobs.popleft()
            except IndexError:
                break
            if not self._jobs:
                self._nothing_waits.set()
            try:
                self._work(job)
            except BaseException as error:  # noqa: BLE001 - raised again, in the thread that called `run`
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            is_first = self._first_error is None and not self._stop.is_set()
            if is_first or (_is_interrupt(error) and not _is_interrupt(self._first_error)):
                self._first_error = error
        self._halt()

    def _halt(self) -> None:
        self._stop.set()
        self._nothing_waits.set()

    def _raise_first(self) -> None:
        error, self._first_error = self._first_error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback leads back here

    def _start_thread(self) -> None:
        if len(self._threads) + 1 >= self._size:
            return
        thread = threading.Thread(target=self._help, name="selfhost-fetch", daemon=True)
        self._threads.append(thread)  # first, so that an interrupt does not make us forget one that runs
        try:
            start_thread(thread)
        except RuntimeError as error:  # the system gives no more threads: those that there are will do
            self._threads.remove(thread)
            logger.warning("fetching with %d threads only: %s", len(self._threads) + 1, error)

    def _help(self) -> None:
        if not self._nothing_waits.wait(self._stagger_seconds):
            self._start_thread()
            self._work_off()

    def _join(self, seconds: Optional[float] = None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:  # grows meanwhile: a thread starts the next one before it works or ends
            waits.join(thread, None if deadline is None else deadline - time.monotonic())


def _is_interrupt(error: Optional[BaseException]) -> bool:
    return error is not None and not isinstance(error, Exception)
