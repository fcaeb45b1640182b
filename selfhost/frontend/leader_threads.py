"""Threads that wait for work and do it, as many as the work needs at the moment.

One thread leads: it waits for the next job. When it has one, another thread takes the lead, a new one if none
is free, and the first does its job; then it leads again, or ends if somebody else does. So a job that hangs
keeps one thread busy and no other job waiting, up to a number of threads, and all but one go when they are
done. What the jobs are, and which is next, others know.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable, Generic, Optional, TypeVar

from .._threads import log_safely, start_thread

logger = logging.getLogger(__name__)

Job = TypeVar("Job")


class LeaderThreads(Generic[Job]):
    """Up to `most` daemon threads that do what `take` returns; `take` waits for it in one thread at a time.

    They end when `take` returns None, those that work when their job is done.
    """

    def __init__(
        self, take: Callable[[], Optional[Job]], work: Callable[[Job], None], *, most: int, name: str
    ) -> None:
        self._take = take
        self._work = work
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._has_leader = False
        self._count = 0  # of the threads that lead or work
        self._threads: list[threading.Thread] = []  # those, and some that have ended

    def start(self) -> None:
        """Begin to wait for jobs; RuntimeError where the system has no thread to give."""
        with self._lock:
            self._start_leader()

    def join(self, timeout: float) -> None:
        """Wait until all threads have ended, but for the calling one; `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _start_leader(self) -> None:
        """Start a thread that leads, unless there are enough: then the first that is free will."""
        if self._count >= self._most:
            return
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            start_thread(thread)
        except RuntimeError as error:  # the system gives no more threads, or the interpreter exits
            if not self._count:
                raise
            log_safely(logger, logging.WARNING, "going on with %d threads: %s", self._count, error)
            return
        self._has_leader = True
        self._count += 1
        self._threads = [*(known for known in self._threads if known.is_alive()), thread]

    def _run(self) -> None:
        while True:
            job = self._take()
            if job is None:  # there is still a leader, as far as the others are concerned: they end as well
                return
            with self._lock:
                self._has_leader = False
                self._start_leader()
            try:
                self._work(job)
            except BaseException:  # noqa: BLE001 - a defect takes neither the thread nor its place
                log_safely(logger, logging.ERROR, "a job in the thread %r failed", self._name, exc_info=True)
            with self._lock:
                if self._has_leader:
                    self._count -= 1
                    return
                self._has_leader = True
