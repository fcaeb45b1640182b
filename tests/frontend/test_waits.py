"""Waits end at a signal, also at one that came just before the system call began, or to another thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from helpers import TIMEOUT, MemorySink, RudeOrigin, full_queue, poll_until

from selfhost.discovery import MemoryDiscovery
from selfhost.frontend import MetadataResolver, ModelWatcher, waits
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.crew import Crew
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.transport_http import HttpTransport

PATIENT = FetchLimits(connect_seconds=60.0, read_seconds=60.0)


@contextlib.contextmanager
def signal_that_ends_no_call(when: Callable[[], Any]) -> Iterator[None]:
    """Interrupt what is inside the `with` once `when()` is true; check that it ended, and soon.

    Another thread takes the signal. For this one it is as if it had come just before a system call began: the
    handler is to run, and nothing ends the call.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sent_at: list[float] = []
    entered = threading.Event()

    def interrupt() -> None:
        entered.wait(TIMEOUT)  # else it might end the whole test run
        poll_until(when)
        time.sleep(0.05)  # by now the system call is under way
        sent_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - not a moment earlier
            entered.set()
            yield
        assert time.monotonic() - sent_at[0] < TIMEOUT
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        sender.join(TIMEOUT)
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, leaves_nothing: None) -> None:
    """Make the short waits shorter."""
    monkeypatch.setattr(waits, "SHORT_SECONDS", 0.05)


def fetch(url: str) -> None:
    """Fetch with all the patience that a transport may have."""
    with HttpTransport(limits=PATIENT) as transport:
        transport.fetch(url, MemorySink(), max_bytes=1000)


@pytest.mark.parametrize("behaviour", ["stalled_before_status", "stalled_in_header", "stalled_in_body"])
def test_silent_origin(behaviour: str) -> None:
    """Whatever is waited for, header or body, the wait ends."""
    with RudeOrigin({"f": b"some"}, behaviour) as origin, signal_that_ends_no_call(lambda: origin.requests):
        fetch(origin.url_of("f"))


def test_silent_handshake() -> None:
    """So does that for a TLS handshake."""
    with RudeOrigin({}, "never_reads") as origin, signal_that_ends_no_call(lambda: origin.connections):
        fetch(origin.url_of("f").replace("http:", "https:"))


def test_silent_address() -> None:
    """So does that for a connection, here to a listener whose queue is full."""
    with full_queue() as url, signal_that_ends_no_call(lambda: True):
        fetch(f"{url}/f")


def test_pause() -> None:
    """So does a pause before a source is asked again."""
    with signal_that_ends_no_call(lambda: True):
        waits.sleep(threading.Event(), 60.0)


def test_wait_for_threads() -> None:
    """So does the wait of a crew for its threads, which learn of it."""
    helping, caller = threading.Event(), threading.current_thread()
    stop = threading.Event()

    def work(job: Any) -> None:
        if threading.current_thread() is caller:
            assert helping.wait(TIMEOUT)
        else:
            helping.set()
            stop.wait(60.0)

    crew = Crew(work, size=2, stagger_seconds=0.0, stop=stop)
    with signal_that_ends_no_call(helping.is_set):
        crew.run(range(2))

    assert stop.is_set()


def test_wait_for_a_model(tmp_path: Any) -> None:
    """So does the wait for a model that nobody publishes."""
    with contextlib.ExitStack() as stack:
        resolver = stack.enter_context(MetadataResolver(BlobCache(tmp_path / "cache")))
        discovery = stack.enter_context(MemoryDiscovery())
        watcher = stack.enter_context(ModelWatcher(discovery, resolver))
        with signal_that_ends_no_call(lambda: True):
            watcher.wait_ready("m", 60.0)


# ------------------------------------------------------------------ what else they keep


def test_pause_ends_at_its_event() -> None:
    """Whoever sets the event ends the pause; without it, it lasts as long as it should."""
    event = threading.Event()
    began = time.monotonic()
    waits.sleep(event, 0.12)
    assert time.monotonic() - began >= 0.12

    event.set()
    waits.sleep(event, 60.0)


def test_join_gives_up_in_time() -> None:
    """A thread that goes on is waited for as long as said, one that ended or never began not at all."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(TIMEOUT,))
    waits.join(thread)
    thread.start()
    waits.join(thread, 0.12)
    assert thread.is_alive()

    end.set()
    waits.join(thread)
    assert not thread.is_alive()


def test_time_out_is_that_of_the_caller() -> None:
    """Short waits add up to what was asked for, and end with a time-out."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        began = time.monotonic()
        with pytest.raises(socket.timeout):
            waits.on_socket(ours, lambda: ours.recv(1), 0.12)
        assert 0.12 <= time.monotonic() - began < TIMEOUT

        theirs.send(b"x")
        assert waits.on_socket(ours, lambda: ours.recv(1), 60.0) == b"x"
