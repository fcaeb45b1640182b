"""Waits that a signal ends soon, at whatever moment it comes.

Python runs a signal's handler when the system call under way comes back. A signal that arrives in the moment
before a call begins does not bring it back: a Control-C would be answered when the wait is over, ten seconds
later where an origin is silent. So a long wait is made of short ones here. Name resolution is the one wait
that cannot be cut into pieces.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from typing import Any, Callable, Optional, TypeVar

SHORT_SECONDS = 0.5  # how much later a signal is answered, at worst; to wake up twice a second costs nothing

Result = TypeVar("Result")


def on_socket(sock: socket.socket, step: Callable[[], Result], seconds: float) -> Result:
    """Return what `step`, a read or handshake of the socket, returns; socket.timeout if it takes longer.

    A step that a time-out ended must be one that can be begun again.
    """
    while True:
        short = min(seconds, SHORT_SECONDS)
        if sock.gettimeout() != short:  # setting it is a system call
            sock.settimeout(short)
        try:
            return step()
        except socket.timeout:
            seconds -= short
            if seconds <= 0:
                raise


def connect(sock: socket.socket, address: Any, seconds: float) -> None:
    """Connect the socket; raises OSError, socket.timeout if it takes longer."""
    sock.setblocking(False)
    error = sock.connect_ex(address)
    if error == errno.EINPROGRESS:
        writable = select.poll()
        writable.register(sock, select.POLLOUT)
        while not writable.poll(1000 * min(seconds, SHORT_SECONDS)):
            seconds -= SHORT_SECONDS
            if seconds <= 0:
                raise socket.timeout("timed out")
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def join(thread: threading.Thread, seconds: Optional[float] = None) -> None:
    """Wait until a thread has ended, for so long at most (None: as long as it takes)."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while thread.is_alive():
        left = SHORT_SECONDS if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return
        thread.join(min(left, SHORT_SECONDS))


def sleep(event: threading.Event, seconds: float) -> None:
    """Wait for so long, or until the event is set."""
    while seconds > 0 and not event.wait(min(seconds, SHORT_SECONDS)):
        seconds -= SHORT_SECONDS
