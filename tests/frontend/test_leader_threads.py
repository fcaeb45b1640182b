"""Threads that take turns in waiting for work: how many there are, and that none is lost."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any, Optional

import pytest
from helpers import TIMEOUT, poll_until

from selfhost.frontend.leader_threads import LeaderThreads

pytestmark = pytest.mark.usefixtures("leaves_nothing")


class Jobs:
    """Jobs in a queue, each done when its event is set; counts who waits for one."""

    def __init__(self, most: int) -> None:
        self.waiting: queue.Queue[Optional[threading.Event]] = queue.Queue()
        self.begun: list[threading.Event] = []
        self.leaders: list[int] = []  # how many waited at the same time
        self._leading = 0
        self.threads = LeaderThreads(self._take, self._work, most=most, name="test-leader")

    def _take(self) -> Optional[threading.Event]:
        self._leading += 1
        self.leaders.append(self._leading)
        job = self.waiting.get()
        self._leading -= 1
        return job

    def _work(self, job: threading.Event) -> None:
        self.begun.append(job)
        assert job.wait(TIMEOUT)

    def put(self) -> threading.Event:
        """Add a job."""
        job = threading.Event()
        self.waiting.put(job)
        return job


def alive() -> int:
    """Count the threads."""
    return sum(thread.name == "test-leader" for thread in threading.enumerate())


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    """Return jobs for three threads, which end with the test."""
    made = Jobs(3)
    made.threads.start()
    yield made
    for job in made.begun:
        job.set()
    made.waiting.put(None)
    made.threads.join(TIMEOUT)
    assert alive() == 0


def test_one_thread_waits(jobs: Jobs) -> None:
    """While there is nothing to do there is one thread."""
    assert poll_until(lambda: jobs.leaders == [1])
    assert alive() == 1


def test_threads_come_with_jobs_that_last_and_go_with_them(jobs: Jobs) -> None:
    """Each job that hangs has a thread of its own, up to the bound; in the end one is left, which waits."""
    hanging = [jobs.put() for _ in range(5)]
    assert poll_until(lambda: len(jobs.begun) == 3)
    assert alive() == 3
    for job in hanging:
        job.set()

    assert poll_until(lambda: len(jobs.begun) == 5)
    assert poll_until(lambda: alive() == 1)
    assert set(jobs.leaders) == {1}


def test_thread_that_is_free_first_goes_on(jobs: Jobs) -> None:
    """When all threads hang, whichever ends its job takes what waits."""
    hanging = [jobs.put() for _ in range(3)]
    assert poll_until(lambda: len(jobs.begun) == 3)
    late = jobs.put()
    hanging[1].set()

    assert poll_until(lambda: late in jobs.begun)


@pytest.mark.parametrize("is_broken", [False, True])
def test_job_that_fails_costs_no_thread(
    is_broken: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect in a job is logged; its thread, and the place that it counts for, are there for the next.

    So they are where a handler of the host's raises as well.
    """
    jobs = Jobs(1)

    def work(job: Any) -> None:
        jobs.begun.append(job)
        raise SystemExit("a defect")

    if is_broken:
        handler = logging.Handler()
        monkeypatch.setattr(handler, "emit", lambda record: 1 / 0)
        monkeypatch.setattr(logging.getLogger("selfhost"), "handlers", [handler])
    jobs.threads._work = work
    jobs.threads.start()
    with caplog.at_level(logging.ERROR):
        jobs.put()
        jobs.put()
        jobs.waiting.put(None)
        jobs.threads.join(TIMEOUT)

    assert len(jobs.begun) == 2
    assert caplog.text.count("a job in the thread 'test-leader' failed") == (0 if is_broken else 2)


def test_goes_on_where_no_thread_can_be_started(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A system that gives no more threads makes jobs wait, not fail."""

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    one, two = jobs.put(), jobs.put()
    assert poll_until(lambda: jobs.begun == [one])
    one.set()

    assert poll_until(lambda: jobs.begun == [one, two])
    assert "going on with 1 threads" in caplog.text
