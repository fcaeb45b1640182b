"""Threads inside somebody else's process: they take none of its signals and outlive its log handlers."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import weakref
from collections.abc import Iterator

# What a thread's own instructions raise: blocked, it would end the process without a word of faulthandler.
# Not every system has all of them.
_FAULTS = {
    getattr(signal, name, None)
    for name in ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
}

# By thread: what the host's had blocked that started it, or the one that started it.
_starters: weakref.WeakKeyDictionary[threading.Thread, set[int | signal.Signals]] = (
    weakref.WeakKeyDictionary()
)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread to which the kernel delivers no signal; RuntimeError where the system has none to give.

    The host may have blocked one in its own threads, to wait for it there (sigwait, signalfd) or to finish
    something first: delivered here, it would run its handler all the same, or end the process. A thread
    inherits the mask of the one that starts it; set from inside, it would come too late, and where gevent has
    patched threading, it would be that of the whole process.
    """
    if not hasattr(signal, "pthread_sigmask"):
        thread.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:  # from here on: a handler of the host's may raise as soon as the mask has changed
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
        _starters[thread] = _starters.get(threading.current_thread(), before)
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def host_signals() -> Iterator[None]:
    """Call the host's code in such a thread: a program that it launches there can be ended by a signal.

    A child process inherits the mask of the thread that made it. What has come, and waits because the host
    has blocked it since, is not taken here.
    """
    mask = _starters.get(threading.current_thread())
    if mask is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_SETMASK, mask | signal.sigpending())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def log_safely(
    logger: logging.Logger, level: int, message: str, *args: object, exc_info: bool | BaseException = False
) -> None:
    """Log from a thread that must go on: a filter or a handler of the host's that raises is not heard.

    One that would end the program ends the host's own threads alone.
    """
    try:
        logger.log(level, message, *args, exc_info=exc_info, stacklevel=2)
    except BaseException as error:  # there is nobody left to tell
        if not isinstance(error, Exception) and threading.current_thread() not in _starters:
            raise
