"""Threads that share a list of work: who works, what a failure ends, what is left over."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any, Callable

import pytest
from helpers import TIMEOUT, nothing_left

from selfhost.frontend.crew import Crew

Job = Any


def crew_of(work: Callable[[Job], None], **options: Any) -> Crew[Job]:
    """Return a crew of four that does not wait before it starts a thread."""
    return Crew(work, **{"size": 4, "stagger_seconds": 0.0, "stop": threading.Event(), **options})


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    """Check after each test that every thread has ended."""
    with nothing_left():
        yield


def test_each_job_is_done_once() -> None:
    """A hundred jobs, four threads, no job twice and none forgotten."""
    done: list[Job] = []

    crew_of(done.append).run(range(100))

    assert sorted(done) == list(range(100))


def test_no_jobs_no_work() -> None:
    """An empty list is worked off at once."""
    crew_of(lambda job: pytest.fail("there is nothing to do")).run([])


def test_single_job_starts_no_thread() -> None:
    """What one thread can do, the calling one does."""
    threads: list[threading.Thread] = []

    crew_of(lambda job: threads.append(threading.current_thread())).run(["job"])

    assert threads == [threading.current_thread()]


def test_up_to_size_threads_work_at_once() -> None:
    """Jobs that wait for each other get four threads, the calling one among them, and no fifth."""
    met = threading.Barrier(4, timeout=TIMEOUT)
    threads = set()

    def work(job: Job) -> None:
        threads.add(threading.current_thread())
        met.wait()

    crew_of(work).run(range(8))

    assert len(threads) == 4
    assert threading.current_thread() in threads
    assert all(thread.daemon for thread in threads - {threading.current_thread()})


def test_threads_take_no_signals() -> None:
    """But the calling one, which is somebody else's."""
    met = threading.Barrier(2, timeout=TIMEOUT)
    blocked: dict[bool, set[int]] = {}

    def work(job: Job) -> None:
        is_caller = threading.current_thread() is caller
        blocked[is_caller] = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        met.wait()

    caller = threading.current_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    crew_of(work, size=2).run(range(2))

    assert blocked[True] == before
    assert {signal.SIGINT, signal.SIGTERM} <= blocked[False]


def test_size_one_works_alone() -> None:
    """A crew of one is the calling thread."""
    threads = set()

    crew_of(lambda job: threads.add(threading.current_thread()), size=1).run(range(5))

    assert threads == {threading.current_thread()}


def test_no_further_thread_while_nothing_waits() -> None:
    """Threads come one after the other: jobs that are done in less than the stagger are done by one."""
    threads = set()

    crew_of(lambda job: threads.add(threading.current_thread()), stagger_seconds=TIMEOUT).run(range(50))

    assert threads == {threading.current_thread()}


def test_first_failure_ends_the_rest() -> None:
    """No job is begun after one failed, and that one's error is what the caller gets."""
    begun: list[Job] = []

    def work(job: Job) -> None:
        begun.append(job)
        if job == 2:
            raise ValueError("job 2")

    with pytest.raises(ValueError, match="job 2"):
        crew_of(work, size=1).run(range(10))

    assert begun == [0, 1, 2]


def test_failure_in_a_helping_thread_reaches_the_caller() -> None:
    """Whoever fails, the calling thread raises; those under way learn of it by the event."""
    stop = threading.Event()
    begun = threading.Event()
    stopped = []

    def work(job: Job) -> None:
        if threading.current_thread() is not caller:
            assert begun.wait(TIMEOUT)
            raise OSError("a helper's")
        begun.set()
        stopped.append(stop.wait(TIMEOUT))
        raise RuntimeError("what the others raise when they are stopped does not matter")

    caller = threading.current_thread()
    with pytest.raises(OSError, match="a helper's"):
        crew_of(work, stop=stop, size=2).run(range(2))

    assert stopped == [True]


def test_interrupt_of_the_caller_stops_the_others() -> None:
    """Control-C ends the work of every thread, and is what is raised."""
    stop = threading.Event()
    helping = threading.Event()
    ended = []

    def work(job: Job) -> None:
        if threading.current_thread() is caller:
            assert helping.wait(TIMEOUT)
            raise KeyboardInterrupt
        helping.set()
        ended.append(stop.wait(TIMEOUT))

    caller = threading.current_thread()
    with pytest.raises(KeyboardInterrupt):
        crew_of(work, stop=stop, size=2).run(range(2))

    assert ended == [True]


@pytest.mark.parametrize("interrupted", ["the caller", "a helper"])
def test_interrupt_comes_before_an_error(interrupted: str) -> None:
    """Control-C is what is raised, also when another job has failed by then."""
    stop = threading.Event()
    both = threading.Barrier(2, timeout=TIMEOUT)

    def work(job: Job) -> None:
        both.wait()
        is_caller = threading.current_thread() is caller
        if is_caller == (interrupted == "the caller"):
            assert stop.wait(TIMEOUT)
            raise KeyboardInterrupt
        raise OSError("first, but only an error")

    caller = threading.current_thread()
    with pytest.raises(KeyboardInterrupt):
        crew_of(work, stop=stop, size=2).run(range(2))


def test_stop_from_outside_ends_it_quietly() -> None:
    """Whoever sets the event knows why; what jobs raise at that is nobody's matter."""
    stop = threading.Event()
    begun: list[Job] = []

    def work(job: Job) -> None:
        begun.append(job)
        stop.set()
        raise OSError("ended")

    crew_of(work, stop=stop, size=1).run(range(5))

    assert begun == [0]


def test_interrupt_while_waiting_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C that comes while the caller waits for its threads stops them and waits for them once more."""
    stop = threading.Event()
    helping = threading.Event()
    joins = []
    ended = []
    join = threading.Thread.join

    def interrupted_join(thread: threading.Thread, timeout: Any = None) -> None:
        joins.append(thread)
        if len(joins) == 1:
            raise KeyboardInterrupt
        join(thread, timeout)

    def work(job: Job) -> None:
        if threading.current_thread() is not caller:
            helping.set()
            ended.append(stop.wait(TIMEOUT))
        else:
            assert helping.wait(TIMEOUT)  # so that the other job is a helper's

    caller = threading.current_thread()
    monkeypatch.setattr(threading.Thread, "join", interrupted_join)
    with pytest.raises(KeyboardInterrupt):
        crew_of(work, stop=stop, size=2).run(range(2))

    assert ended == [True]


def test_goes_on_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A system that gives no more threads costs speed only, and is told once."""

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[Job] = []
    monkeypatch.setattr(threading.Thread, "start", no_more)
    with caplog.at_level(logging.WARNING):
        crew_of(done.append).run(range(10))

    assert done == list(range(10))
    assert [record.getMessage() for record in caplog.records] == [
        "fetching with 1 threads only: can't start new thread"
    ]
