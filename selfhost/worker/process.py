"""ServerProcess: the status server in a small process of its own, to its host what EventLoop is.

For a host that hogs the interpreter: there any thread of ours waits for the host's. The process runs the same
event loop over the same content (see process_mirror.py for how it learns of it, process_launch.py for what it
inherits: nothing). Registrations are in force when `register` returns.

A supervisor, one thread of the host that sleeps while nothing happens, launches the process, tells it what
there is to tell, passes its log on, asks every few seconds whether its loop still turns, and launches another
one when it has ended or hangs. The host keeps the listening socket all the while, so the port never closes:
who connects meanwhile is served by the next process. One that fails again and again is launched more and more
slowly. Where the host tells its endpoints' states another thread asks it once a second: it may take its time,
or never come back.

The process ends with its host, however that ends, and keeps the rights that the host has when it launches it.
It is the host's child: a host that waits for any child at all may be told of it, which does no harm here.

Sharing: any number of threads. A forked child closes its copies of the descriptors.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Any, Callable, Optional

from .._threads import log_safely, start_thread
from ..errors import StatusServerError
from .counters import ServerCounters
from .process_channel import Message
from .process_launch import Child, wheels_folder
from .process_mirror import Mirror
from .registry import MetadataArtifactRegistry
from .site import EndpointStates

logger = logging.getLogger(__name__)

START_SECONDS = 30.0  # until it serves; a twentieth of a second unless the machine is overloaded
HUNG_SECONDS = 20.0  # without an answer, and a process is replaced
LATE_SECONDS = 1.0  # who looks so late for an answer was held up, and so may have been who is to give it
TURN_SECONDS = 5.0  # from the answer that the loop turns to the next question
END_SECONDS = 2.0  # more than a graceful end was given
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.1, 10.0  # before another launch, doubled each time
PROVEN_SECONDS = 10.0  # who has served for so long is replaced at once
STATES_SECONDS = 1.0
COUNTERS_SECONDS = 1.0
ASKER_SECONDS = 0.5  # for the host's callable to come back

_ROOT = __name__.rpartition(".worker.")[0]  # the package, by the name that it has here


class ServerProcess:
    """Serve `listener` from another process until `stop`; `options` returns its server's, as plain values.

    Owns the listener from here on; `close_descriptors` is for one that never started, and for a forked child.
    """

    def __init__(
        self,
        registry: MetadataArtifactRegistry,
        listener: socket.socket,
        options: Callable[[], dict[str, Any]],
        endpoints: Optional[EndpointStates] = None,
    ) -> None:
        self.bound: tuple[str, int] = listener.getsockname()[:2]
        self._registry = registry
        self._listener = listener
        self._options = options
        self._endpoints = endpoints
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for sock in (self._wake_receiver, self._wake_sender):
            sock.setblocking(False)
        self._mirror = Mirror(self._wake)
        self._unfollow: Callable[[], None] = lambda: None
        self._child: Optional[Child] = None
        self._is_told = False  # this child knows everything
        self._is_serving = False  # this child has said so
        self._is_stopping = False  # this child has been told to end
        self._answer_by = float("inf")  # to what it was told
        self._ask_at = float("inf")  # whether the loop turns
        self._turn_by = float("inf")  # and answers that
        self._stop_at = float("inf")
        self._closing = threading.Event()
        self._has_served = False
        self._started = threading.Event()  # or failed to
        self._asked = threading.Event()  # the endpoints' states are known
        self._failure: Optional[Exception] = None
        self._reason = ""  # why the last one could not be relaunched, as the log knows already
        self._supervisor = threading.Thread(
            target=self._supervise, name="selfhost-status-supervisor", daemon=True
        )
        self._asker = threading.Thread(target=self._ask_states, name="selfhost-status-asker", daemon=True)

    # -------------------------------------------------------------- from the host's threads

    def start(self) -> None:
        """Launch the process and wait until it serves; StatusServerError, OSError or RuntimeError if not."""
        if self._registry.shared is None:
            self._unfollow = self._registry.follow(self._mirror)
        try:
            if self._endpoints is not None:
                start_thread(self._asker)
                self._asked.wait(STATES_SECONDS)
            start_thread(self._supervisor)
            self._started.wait(START_SECONDS + 2 * END_SECONDS)
            if not self._has_served:
                raise self._failure or StatusServerError("its process does not serve", address="")
        except BaseException:
            self.stop(0)
            raise

    def stop(self, timeout: float) -> None:
        """End the process, after at most `timeout` seconds for the answers on their way."""
        self._unfollow()
        self._stop_at = time.monotonic() + timeout
        self._closing.set()
        self._wake()
        if self._supervisor.ident is None:  # it could not be started
            self._close_own()
        for thread, seconds in ((self._supervisor, timeout + 2 * END_SECONDS), (self._asker, ASKER_SECONDS)):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(seconds)

    def states_changed(self) -> None:
        """Ask for the endpoints' states and tell them; they are in force when this returns."""
        if self._endpoints is not None:
            self._mirror.ask_states(self._endpoints)
            self._mirror.settle()

    @property
    def counters(self) -> ServerCounters:
        """What the process has done since it was launched, as it says; waits for its answer a while."""
        return self._mirror.ask_counters(COUNTERS_SECONDS)

    def close_descriptors(self) -> None:
        """Close every descriptor, and tell nobody: the process is not this one's."""
        self._unfollow()
        if self._child is not None:
            self._child.disown()
        self._close_own()

    def _close_own(self) -> None:
        for sock in (self._listener, self._wake_receiver, self._wake_sender):
            sock.close()

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"x", getattr(socket, "MSG_NOSIGNAL", 0))
        except OSError:  # it will be awake, or is no more
            pass

    def _ask_states(self) -> None:
        while self._endpoints is not None and not self._closing.is_set():
            with contextlib.suppress(BaseException):  # it is noted, and this thread has nobody to hand it to
                self._mirror.ask_states(self._endpoints)
            self._asked.set()
            self._closing.wait(STATES_SECONDS)

    # -------------------------------------------------------------- the supervisor

    def _supervise(self) -> None:
        """Have a process serve until `stop`; nothing else ends this once one has served."""
        delay = 0.0
        try:
            while not self._closing.wait(delay):
                launched_at = time.monotonic()
                with contextlib.suppress(BaseException):  # whatever it is, the next process may do better
                    self._serve_once()
                if not self._has_served:
                    break
                is_proven = time.monotonic() - launched_at >= PROVEN_SECONDS
                delay = 0.0 if is_proven else min(max(2 * delay, FIRST_DELAY_SECONDS), MAX_DELAY_SECONDS)
        finally:
            self._close_own()
            self._mirror.clear()
            self._started.set()

    def _serve_once(self) -> None:
        """Launch a process and stay with it until it has ended; raises no Exception."""
        try:
            child = self._child = Child(self._listener)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed
            self._failure = error
            self._mirror.end()
            if self._has_served:
                self._report_failure(str(error))
            return
        is_hung = False
        try:
            self._introduce(child)
            while not is_hung:
                is_hung = self._turn(child)
        except (EOFError, ConnectionError):  # it has ended
            pass
        except Exception:  # noqa: BLE001 - whatever it is, the next process may do better
            message = "the status server's process is replaced after an unexpected error"
            log_safely(logger, logging.ERROR, message, exc_info=True)
        finally:
            how = child.end(at_once=is_hung)
            self._mirror.end()  # not before: one that hangs could go on, and answer what it knows
            self._child = None
            self._report(child.pid, f"it did not answer; {how}" if is_hung else how)

    def _introduce(self, child: Child) -> None:
        """Send what a process needs before anything else."""
        self._is_told = self._is_serving = self._is_stopping = False
        self._answer_by = time.monotonic() + START_SECONDS
        self._ask_at = self._turn_by = float("inf")
        options = {
            **self._options(),
            "shared": self._registry.shared,
            "has_states": self._endpoints is not None,
            "log_level": logging.getLogger(_ROOT).getEffectiveLevel(),
            "wheels": wheels_folder(),
        }
        child.channel.send(Message({"options": options}))
        for message in self._mirror.replay():
            child.channel.send(message)

    def _turn(self, child: Child) -> bool:
        """Wait for something to do, and do it; tell whether the process has been silent for too long."""
        if self._closing.is_set():
            self._tell_end(child)
        else:
            self._tell(child)
        self._ask_whether_it_turns(child)
        until = min(self._deadline(), self._ask_at)
        ready = child.wait(self._wake_receiver, until - time.monotonic())
        if self._wake_receiver.fileno() in ready:
            self._wake_receiver.recv(4096)
        for message in child.messages(ready):
            self._hear(message)
        return self._is_hung()

    def _is_hung(self) -> bool:
        """Tell whether the process has been silent for too long, while we, too, were not suspended, say."""
        now = time.monotonic()
        if now - self._deadline() > LATE_SECONDS:
            self._answer_by = max(self._answer_by, now + HUNG_SECONDS)
            self._turn_by = max(self._turn_by, now + HUNG_SECONDS)
        return now >= self._deadline()

    def _deadline(self) -> float:
        return min(self._answer_by, self._turn_by, self._stop_at + END_SECONDS)

    def _tell(self, child: Child) -> None:
        """Send what it does not know yet, as far as it takes it; let it serve when it knows everything."""
        while not child.channel.has_unsent:
            messages = self._mirror.next()
            if not messages:
                break
            if self._is_serving:
                self._answer_by = min(self._answer_by, time.monotonic() + HUNG_SECONDS)
            for message in messages:
                child.channel.send(message)
        if not self._is_told and not child.channel.has_unsent and self._mirror.begin():
            self._is_told = True
            child.channel.send(Message({"serve": True}))

    def _ask_whether_it_turns(self, child: Child) -> None:
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at, self._turn_by = float("inf"), now + HUNG_SECONDS
            child.channel.send(Message({"turn": True}))

    def _tell_end(self, child: Child) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._listener.close()
            self._mirror.end()
            child.channel.send(Message({"stop": max(self._stop_at - time.monotonic(), 0)}))

    def _hear(self, message: Message) -> None:
        head = message.head
        if "log" in head:
            log_safely(logging.getLogger(f"{_ROOT}.{head['logger']}"), head["level"], "%s", head["log"])
        elif "serving" in head:
            self._has_served = self._is_serving = True
            self._started.set()
            self._ask_at = time.monotonic() + TURN_SECONDS
        elif "turned" in head:
            self._ask_at, self._turn_by = time.monotonic() + TURN_SECONDS, float("inf")
        elif "number" in head:
            self._mirror.acknowledge(head["number"], ServerCounters.from_dict(head["counters"]))
        if self._is_serving:
            self._answer_by = float("inf") if self._mirror.is_answered else time.monotonic() + HUNG_SECONDS

    def _report(self, pid: int, how: str) -> None:
        if self._closing.is_set():
            log_safely(logger, logging.DEBUG, "the status server's process %d has ended: %s", pid, how)
        elif self._is_serving:
            self._reason = ""
            message = "the status server's process %d has ended (%s); another takes its place"
            log_safely(logger, logging.WARNING, message, pid, how)
        elif self._has_served:
            self._report_failure(how)
        else:
            self._failure = StatusServerError(f"its process has ended: {how}", address="")

    def _report_failure(self, reason: str) -> None:
        """Say why there is no process to take the other's place: once, while the reason stays the same."""
        level = logging.DEBUG if reason == self._reason else logging.WARNING
        self._reason = reason
        message = "the status server's process cannot be relaunched: %s; trying again"
        log_safely(logger, level, message, reason)
