"""Mirror: what the status server's process is to be told of its host, in order and each once.

Whatever thread changes something only notes it here. The supervisor's thread turns notes into messages, one
at a time, so what waits for the process waits as references and not as bytes. A process that takes the place
of another is told first what is open, then to serve.

A change is in force when the process has acknowledged it, or when there is none that serves: the next one
will know of it before its first answer. `settle` waits for either, but for `SETTLE_SECONDS` at most. Where no
process can be launched each attempt drops the notes so far, so what was withdrawn since is not kept for long.

Sharing: any number of threads. The lock is the last to be taken and held for dictionary work only. In a
forked child a mirror does nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

from .._threads import host_signals, log_safely
from .artifacts import Registration, Row
from .content import Content, Descriptor, HeldFile
from .counters import ServerCounters
from .process_channel import Message
from .site import EndpointStates

logger = logging.getLogger(__name__)

# A process answers within a millisecond; one that is stopped or starved must not stop its host.
SETTLE_SECONDS = 5.0
INLINE_BYTES = 64 * 1024  # up to here content is copied to the process, above it goes as a sealed file


class Note(NamedTuple):
    """Something to tell: one of the fields, or none of them to be answered only."""

    added: Optional[Registration] = None
    removed: Optional[Registration] = None
    states: Optional[dict[str, Any]] = None


class Mirror:
    """Follows a registry; `wake` is called, by any thread, when there is something to tell."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.counters = ServerCounters()  # as of the last answer
        self._wake = wake
        self._pid = os.getpid()
        self._changed = threading.Condition()  # re-entrant: a signal handler of the host may register, too
        self._notes: deque[Note] = deque()
        self._told = 0  # how many there were before those
        self._acknowledged = 0  # how many of all are in force
        self._is_serving = False  # a process has been told to
        self._open: dict[str, Registration] = {}  # as the process was told
        self._contents: dict[
            str, tuple[Content, int]
        ] = {}  # that the process has, and how many files need each
        self._states: Optional[dict[str, Any]] = None
        self._asks = itertools.count(1)
        self._states_asked = 0

    # -------------------------------------------------------------- from the host's threads

    def added(self, registration: Registration) -> None:
        """Note what was registered."""
        self._note(Note(added=registration))

    def removed(self, registration: Registration) -> None:
        """Note what was withdrawn."""
        self._note(Note(removed=registration))

    def ask_states(self, endpoints: EndpointStates) -> None:
        """Ask for the endpoints' states, here and now, and note them; whatever that call raises, too.

        Raises only what ends a program, KeyboardInterrupt and SystemExit: it may be meant for this thread.
        """
        number = next(self._asks)
        try:
            with host_signals():
                found = {str(name): str(state) for name, state in dict(endpoints()).items()}
            self._note_states(number, {"states": found})
        except BaseException as error:  # the host's; CancelledError and gevent's Timeout are no Exception
            self._note_states(number, {"failure": traceback.format_exc()})  # logged for who asks for /health
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise

    def _note_states(self, number: int, states: dict[str, Any]) -> None:
        with self._changed:
            if number > self._states_asked:  # a slow call must not undo what a later one has found
                self._states_asked = number
                self._note(Note(states=states))

    def ask_counters(self, timeout: float) -> ServerCounters:
        """Return the process's counters: those of its last answer if none comes in time."""
        self._note(Note())
        self._wait(timeout)
        return self.counters

    def settle(self) -> None:
        """Wait until what was noted is in force."""
        if not self._wait(SETTLE_SECONDS):
            log_safely(
                logger, logging.WARNING, "the status server's process has not answered for %.0f s: what was "
                "registered is served as soon as it goes on", SETTLE_SECONDS,
            )  # fmt: skip

    def _note(self, note: Note) -> None:
        if self._pid != os.getpid():
            return
        with self._changed:
            self._notes.append(note)
        self._wake()

    def _wait(self, timeout: float) -> bool:
        if self._pid != os.getpid():
            return True
        with self._changed:
            target = self._told + len(self._notes)
            return self._changed.wait_for(
                lambda: not self._is_serving or self._acknowledged >= target, timeout
            )

    # -------------------------------------------------------------- from the supervisor's thread

    @property
    def is_answered(self) -> bool:
        """Whether the process has acknowledged all that it was told."""
        with self._changed:
            return self._acknowledged >= self._told

    def replay(self) -> Iterator[Message]:
        """Return what a new process has to be told first: all that is open."""
        self._contents.clear()
        for registration in list(self._open.values()):
            yield from self._add(registration)
        if self._states is not None:
            yield Message(self._states)

    def next(self) -> list[Message]:
        """Return what comes next: the messages of one note, none where all are told."""
        with self._changed:
            if not self._notes:
                return []
            note = self._notes.popleft()
            self._told += 1
        return [*self._messages(note), Message({"number": self._told})]

    def begin(self) -> bool:
        """Tell whether the process knows everything; if so it is to serve, and changes wait for it."""
        with self._changed:
            if self._notes:
                return False
            self._is_serving = True
            self._acknowledged = self._told
            return True

    def acknowledge(self, number: int, counters: ServerCounters) -> None:
        """Note what the process has answered."""
        self.counters = counters
        with self._changed:
            self._acknowledged = max(self._acknowledged, number)
            self._changed.notify_all()

    def end(self) -> None:
        """Note that there is no process: nobody need wait for it, the next is told of all that is open."""
        self._contents.clear()
        with self._changed:
            self._is_serving = False
            while self._notes:
                self._told += 1
                self._take(self._notes.popleft())
            self._changed.notify_all()

    def clear(self) -> None:
        """Let go of everything: there will be no other process."""
        with self._changed:
            self._notes.clear()
        self._open.clear()
        self._contents.clear()

    def _take(self, note: Note) -> None:
        if note.added is not None:
            self._open[note.added.id] = note.added
        elif note.removed is not None:
            self._open.pop(note.removed.id, None)
        elif note.states is not None:
            self._states = note.states

    def _messages(self, note: Note) -> Iterator[Message]:
        is_known = note.removed is not None and note.removed.id in self._open
        self._take(note)
        if note.added is not None:
            yield from self._add(note.added)
        elif note.removed is not None and is_known:
            yield self._remove(note.removed)
        elif note.states is not None:
            yield Message(note.states)

    def _add(self, registration: Registration) -> Iterator[Message]:
        rows = registration.rows
        for row in rows:
            known, users = self._contents.get(row.content.hex, (None, 0))
            if known is not row.content and (known is None or isinstance(row.content, HeldFile)):
                yield content_message(row.content)
                known = row.content
            self._contents[row.content.hex] = known, users + 1
        files = [_file(row) for row in rows]
        yield Message(
            {"add": registration.id, "slug": registration.slug, "suffix": registration.suffix, "files": files}
        )

    def _remove(self, registration: Registration) -> Message:
        forget = []
        for row in registration.rows:
            content, users = self._contents.get(row.content.hex, (row.content, 0))
            self._contents[row.content.hex] = content, users - 1
            if users <= 1:
                del self._contents[row.content.hex]
                forget.append(row.content.hex)
        return Message({"remove": registration.id, "forget": forget})


def _file(row: Row) -> list[object]:
    return [row.filename, row.content.hex, row.serial, row.is_plain]


def content_message(content: Content) -> Message:
    """Return what hands over content: its descriptor, or its bytes where it has none or is small."""
    head: dict[str, Any] = {"content": content.hex, "size": content.size}
    if isinstance(content, HeldFile):
        return Message({**head, "path": content.path, "mtime_ns": content.mtime_ns}, b"", content.descriptor)
    sealed: Optional[Descriptor] = content.sealed() if content.size > INLINE_BYTES else None
    return Message(head, b"" if sealed else content.read(0, content.size), sealed)
