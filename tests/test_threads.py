"""selfhost._threads: threads that take no signals, and logging that does not raise."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading

import pytest
from helpers import TIMEOUT

from selfhost._threads import host_signals, log_safely, start_thread

# A host that blocks a signal after our thread has started, and fetches it when it suits.
BLOCKING_HOST = """
import os, signal, threading
from selfhost._threads import start_thread
end = threading.Event()
start_thread(threading.Thread(target=end.wait, daemon=True))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
print(signal.sigtimedwait({signal.SIGTERM}, 20).si_signo == signal.SIGTERM)
"""


def test_host_gets_the_signals_that_it_waits_for() -> None:
    """A thread that has not blocked it would take it, and the process would end."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKING_HOST], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_mask_of_the_starter_is_as_it_was() -> None:
    """Also where no thread is to be had."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    seen: list[set[int]] = []
    thread = threading.Thread(target=lambda: seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    start_thread(thread)
    thread.join()
    with pytest.raises(RuntimeError):
        start_thread(thread)

    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGPIPE} <= seen[0]
    assert not {signal.SIGSEGV, signal.SIGABRT} & seen[0]


def test_programs_of_the_host_can_be_ended() -> None:
    """What a callback launches in our thread has nothing blocked; the thread has, before and after."""
    masks: list[set[int]] = []

    def run() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        with host_signals():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            child.terminate()
            child.wait(TIMEOUT)
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    thread = threading.Thread(target=run)
    start_thread(thread)
    thread.join()

    assert len(masks) == 2
    assert signal.SIGTERM in masks[0] & masks[1]


def test_thread_of_a_thread_knows_the_host() -> None:
    """What the host's thread had blocked counts also where one of ours starts another one."""
    seen: list[set[int]] = []

    def look() -> None:
        with host_signals():
            seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    def pass_on() -> None:
        inner = threading.Thread(target=look)
        start_thread(inner)
        inner.join()

    outer = threading.Thread(target=pass_on)
    start_thread(outer)
    outer.join()

    assert seen == [signal.pthread_sigmask(signal.SIG_BLOCK, ())]


def test_elsewhere_nothing_changes() -> None:
    """In a thread of the host's own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        with host_signals():
            assert signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Broken(logging.Handler):
    """A host's handler whose sink is down."""

    def emit(self, record: logging.LogRecord) -> None:
        """Fail."""
        raise RuntimeError("no sink")


def test_broken_handler_is_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    """Others hear, and where it was logged."""
    logger, broken = logging.getLogger("selfhost.test_threads"), Broken()
    log_safely(logger, logging.WARNING, "%s first", "this")
    assert (caplog.records[-1].message, caplog.records[-1].funcName) == (
        "this first",
        "test_broken_handler_is_not_heard",
    )
    logger.addHandler(broken)
    try:
        log_safely(logger, logging.WARNING, "then %s", "this")
    finally:
        logger.removeHandler(broken)
