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

# A host that blocks a signal after our thread has started, is called by that, and fetches it when it suits.
BLOCKING_HOST = """
import os, signal, threading
from selfhost._threads import host_signals, start_thread
sent, called, end = threading.Event(), threading.Event(), threading.Event()
def run():
    sent.wait()
    with host_signals():
        called.set()
    end.wait()
start_thread(threading.Thread(target=run, daemon=True))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
sent.set()
called.wait()
print(signal.sigtimedwait({signal.SIGTERM}, 20).si_signo == signal.SIGTERM)
"""


def test_host_gets_the_signals_that_it_waits_for() -> None:
    """A thread that has not blocked it would take it, and the process would end."""
    assert run_script(BLOCKING_HOST) == (0, "True\n", "")


def run_script(text: str) -> tuple[int, str, str]:
    """Run a program, and return how it ended and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


# Ctrl-C in the very moment in which the mask is set; in the main thread, where its handler raises.
INTERRUPTED_HOST = """
import signal, threading
from selfhost._threads import start_thread
set_mask = signal.pthread_sigmask
def set_mask_and_interrupt(how, mask):
    before = set_mask(how, mask)
    if mask and how == signal.SIG_BLOCK:
        raise KeyboardInterrupt
    return before
signal.pthread_sigmask = set_mask_and_interrupt
try:
    start_thread(threading.Thread(target=print))
except KeyboardInterrupt:
    print(set_mask(signal.SIG_BLOCK, ()))
"""


def test_host_that_is_interrupted_has_nothing_blocked() -> None:
    """Its next Ctrl-C would not be heard."""
    assert run_script(INTERRUPTED_HOST) == (0, "set()\n", "")


# Windows has neither these signals nor masks.
POOR_SYSTEM = """
import signal, threading
del signal.pthread_sigmask, signal.SIGBUS, signal.SIGTRAP, signal.SIGSYS
from selfhost._threads import host_signals, start_thread
def call():
    with host_signals():
        print("called")
start_thread(threading.Thread(target=call))
"""


def test_system_without_masks() -> None:
    """Threads are started as they are."""
    assert run_script(POOR_SYSTEM) == (0, "called\n", "")


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


class Ending(logging.Handler):
    """A host's handler that ends its program."""

    def emit(self, record: logging.LogRecord) -> None:
        """End it."""
        sys.exit(1)


def test_handler_that_ends_the_program() -> None:
    """It ends no thread of ours, and is not kept from ending the host's."""
    logger, ending, went_on = logging.getLogger("selfhost.test_threads"), Ending(), threading.Event()

    def run() -> None:
        log_safely(logger, logging.ERROR, "this")
        went_on.set()

    logger.addHandler(ending)
    try:
        thread = threading.Thread(target=run)
        start_thread(thread)
        thread.join()
        with pytest.raises(SystemExit):
            run()
    finally:
        logger.removeHandler(ending)

    assert went_on.is_set()
