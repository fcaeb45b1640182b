"""Threads inside somebody else's process: they take none of its signals and outlive its log handlers."""

from __future__ import annotations

import logging
import signal
import threading

# What a thread's own instructions raise: blocked, it would end the process without a word of faulthandler.
_FAULTS = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def log_safely(
    logger: logging.Logger, level: int, message: str, *args: object, exc_info: bool = False
) -> None:
    """Log from a thread that must go on: a filter or a handler of the host's that raises is not heard."""
    try:
        logger.log(level, message, *args, exc_info=exc_info, stacklevel=2)
    except Exception:  # noqa: BLE001 - there is nobody left to tell
        pass
