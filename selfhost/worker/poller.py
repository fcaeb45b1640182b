"""Readiness of many sockets: epoll where the system has it, the standard `selectors` elsewhere.

`selectors` builds three objects for every event, which costs a small answer a tenth of its time; epoll itself
names descriptors, and the event loop needs no more.
"""

from __future__ import annotations

import select
import selectors
from typing import Optional, Protocol

READ, WRITE = 1, 4  # as in epoll and poll


class Poller(Protocol):
    """What `select.epoll` offers, as far as it is used here."""

    def register(self, fd: int, interest: int, /) -> None:
        """Begin to wait for a descriptor."""

    def modify(self, fd: int, interest: int, /) -> None:
        """Wait for something else of it."""

    def unregister(self, fd: int, /) -> None:
        """Wait for it no longer."""

    def poll(self, timeout: Optional[float] = None) -> list[tuple[int, int]]:
        """Return what is ready as (descriptor, events), after `timeout` seconds at most (None: no limit)."""

    def close(self) -> None:
        """Free what the system keeps for it."""


class SelectorPoller:
    """The same on top of `selectors`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, interest: int, /) -> None:
        """Begin to wait for a descriptor."""
        self._selector.register(fd, _EVENTS[interest])

    def modify(self, fd: int, interest: int, /) -> None:
        """Wait for something else of it."""
        self._selector.modify(fd, _EVENTS[interest])

    def unregister(self, fd: int, /) -> None:
        """Wait for it no longer."""
        self._selector.unregister(fd)

    def poll(self, timeout: Optional[float] = None) -> list[tuple[int, int]]:
        """Return what is ready; a descriptor that is closed meanwhile is not."""
        return [(key.fd, events) for key, events in self._selector.select(timeout)]

    def close(self) -> None:
        """Free what the system keeps for it."""
        self._selector.close()


_EVENTS = {READ: selectors.EVENT_READ, WRITE: selectors.EVENT_WRITE}


def new_poller() -> Poller:
    """Return the best poller of this system."""
    return select.epoll() if hasattr(select, "epoll") else SelectorPoller()
