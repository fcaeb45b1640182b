"""What the discovery tests share: stores, a thread that watches, and waiting for a condition."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from helpers import nothing_left
from publishers import NAME, Participant

from selfhost.discovery import Bucket, Discovery, Event, FileDiscovery, SharedDiscovery, shared

PATIENCE_SECONDS = 10.0  # for what takes milliseconds, on a machine that is busy


class Watching:
    """A watch in a thread of its own; what it yields is asked for with `next`."""

    def __init__(self, discovery: Discovery, bucket: Bucket, stop: Optional[threading.Event] = None) -> None:
        self.stop = threading.Event() if stop is None else stop
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._watch = discovery.watch(bucket, stop=self.stop, poll_seconds=0.01)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for event in self._watch:
            self._events.put(event)

    def next(self) -> tuple[str, str, str]:
        """Return kind, key and text of the next event."""
        event = self._events.get(timeout=PATIENCE_SECONDS)
        return event.kind, str(event.key), event.text

    def is_quiet(self, seconds: float = 0.05) -> bool:
        """Tell whether no event comes for so long."""
        try:
            self._events.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def ends(self) -> bool:
        """Tell whether the watch has ended by itself."""
        self._thread.join(PATIENCE_SECONDS)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End it."""
        self.stop.set()
        self._thread.join(PATIENCE_SECONDS)


@pytest.fixture
def watching() -> Iterator[Callable[..., Watching]]:
    """Start watches that end with the test."""
    started: list[Watching] = []

    def start(discovery: Discovery, bucket: Bucket = Bucket.MODELS) -> Watching:
        started.append(Watching(discovery, bucket))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds, or fail."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.005)

    return wait


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Name the directory of the model records; it is not made yet."""
    return tmp_path / "v1" / "mdc"


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., FileDiscovery]]:
    """Open participants of one store, whose records live as long as a test can wait."""
    opened: list[FileDiscovery] = []

    def make(ttl_seconds: float = 0.3, **options: Any) -> FileDiscovery:
        opened.append(FileDiscovery(tmp_path, ttl_seconds=ttl_seconds, **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def store(open_store: Callable[..., FileDiscovery]) -> FileDiscovery:
    """Open one participant."""
    return open_store()


@pytest.fixture
def slow_store(open_store: Callable[..., FileDiscovery]) -> FileDiscovery:
    """Open one whose thread does nothing for as long as a test lasts; its `_tick` is called instead."""
    return open_store(ttl_seconds=3600.0)


# ------------------------------------------------------------------ one publisher per host


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Participant]]:
    """Start processes that share a folder and a store; they are killed with the test."""
    started: list[Participant] = []

    def run(ttl_seconds: float = 10.0) -> Participant:
        started.append(Participant(tmp_path, ttl_seconds))
        return started[-1]

    yield run
    for each in started:
        each.end(signal.SIGKILL)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Name the file of the record."""
    return tmp_path / "v1" / "mdc" / NAME


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SharedDiscovery]]:
    """Make participants in this process, which look often; they are closed with the test."""
    monkeypatch.setattr(shared, "STAND_BY_SECONDS", 0.02)
    made: list[SharedDiscovery] = []

    def make(inner: Optional[Discovery] = None) -> SharedDiscovery:
        made.append(SharedDiscovery(inner or FileDiscovery(tmp_path), tmp_path / "share"))
        return made[-1]

    with nothing_left():
        yield make
        for each in made:
            each.close()
