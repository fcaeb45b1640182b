"""Kept connections: who is done with one leaves it here for whoever asks the same origin next.

Every use closes what has idled for too long, of whichever origin. There is no thread that does so in between:
what is idle when the last fetch ends, MAX_IDLE connections at most, stays open until the next one or `close`.

Any number of threads; a lock is held for work on a list only. A forked child never uses its parent's
connections: it drops them, which the parent's peers do not see, and begins with none.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Callable, Optional

if TYPE_CHECKING:
    from .http_connection import Connection
    from .http_dial import Origin

MAX_IDLE = 32  # of all origins: each takes a descriptor
MAX_IDLE_PER_ORIGIN = 8
MAX_IDLE_SECONDS = 30.0  # less than most servers and load balancers keep a silent connection


class _Idle:
    """The idle connections of one process, the one that was used last at the end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connections: list[Connection] = []


class Pool:
    """Hands out idle connections and takes them back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._is_closed = False
        self._by_process: dict[int, _Idle] = {os.getpid(): _Idle()}

    def take(self, origin: Origin) -> Optional[Connection]:
        """Return the connection to `origin` that was used last and is still good, None if there is none."""
        while True:
            found = self._take_any(origin)
            if found is None or found.is_quiet():
                return found
            found.close()

    def _take_any(self, origin: Origin) -> Optional[Connection]:
        idle = self._idle()
        with idle.lock:
            surplus = self._remove_surplus(idle.connections)
            found = next((kept for kept in reversed(idle.connections) if kept.origin == origin), None)
            if found is not None:
                idle.connections.remove(found)
        _close_all(surplus)
        return found

    def give(self, connection: Connection) -> None:
        """Keep a connection whose last answer was read to its end; close what is too old or too much."""
        connection.idle_since = self._clock()
        idle = self._idle()
        with idle.lock:
            idle.connections.append(connection)
            surplus = self._remove_surplus(idle.connections)
        _close_all(surplus)

    def _remove_surplus(self, connections: list[Connection]) -> list[Connection]:
        """Remove and return what is too old or too much, or everything if this pool is closed."""
        now = self._clock()
        kept: list[Connection] = []
        surplus: list[Connection] = []
        count_by_origin: dict[Origin, int] = {}
        for connection in reversed(connections):
            count = count_by_origin[connection.origin] = count_by_origin.get(connection.origin, 0) + 1
            is_young = now - connection.idle_since <= MAX_IDLE_SECONDS
            fits = is_young and count <= MAX_IDLE_PER_ORIGIN and len(kept) < MAX_IDLE
            (kept if fits and not self._is_closed else surplus).append(connection)
        connections[:] = reversed(kept)
        return surplus

    def close(self) -> None:
        """Close what is idle, and from now on what is given back; harmless when repeated."""
        idle = self._idle()
        with idle.lock:
            self._is_closed = True
            connections, idle.connections = idle.connections, []
        _close_all(connections)

    def __len__(self) -> int:
        return len(self._idle().connections)

    def _idle(self) -> _Idle:
        """Return this process's connections; a forked child drops its parent's first."""
        process = os.getpid()
        mine = self._by_process.get(process)
        if mine is not None:
            return mine
        mine = self._by_process.setdefault(process, _Idle())
        for other in list(self._by_process):
            inherited = None if other == process else self._by_process.pop(other, None)
            if inherited is not None:  # its lock may be held for ever, by a thread that only the parent has
                _close_all(inherited.connections)
        return mine


def _close_all(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
