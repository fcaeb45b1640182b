"""The thread that keeps records alive: when it is there, and what it survives."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from helpers import TIMEOUT

from selfhost._threads import start_thread
from selfhost.discovery import Bucket, FileDiscovery, RecordKey, keepalive
from selfhost.discovery.keepalive import KeepAlive
from selfhost.errors import DiscoveryError

KEY = RecordKey("ns", "comp", "ep", 0xABC)
NAME = "ns%2Fcomp%2Fep%2Fabc"

Eventually = Callable[[Callable[[], object]], None]


def keep_alive_threads() -> list[threading.Thread]:
    """Return the threads that keep records alive."""
    return [thread for thread in threading.enumerate() if thread.name == "selfhost-keepalive"]


def test_thread_is_there_only_while_something_is_published(store: FileDiscovery) -> None:
    """One for all records; none before, none after."""
    assert keep_alive_threads() == []

    first = store.publish(Bucket.MODELS, KEY, "{}")
    second = store.publish(Bucket.INSTANCES, KEY, "{}")
    assert len(keep_alive_threads()) == 1
    first.withdraw()
    assert len(keep_alive_threads()) == 1
    second.withdraw()
    assert keep_alive_threads() == []
    store.publish(Bucket.MODELS, KEY, "{}")
    assert len(keep_alive_threads()) == 1


def test_start_that_is_interrupted(
    store: FileDiscovery, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A signal handler of the host's that raises in that moment leaves no thread behind."""

    def start_and_interrupt(thread: threading.Thread) -> None:
        start_thread(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(keepalive, "start_thread", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.publish(Bucket.MODELS, KEY, "{}")

    eventually(lambda: keep_alive_threads() == [])


def test_no_thread_to_be_had_is_an_error(
    store: FileDiscovery, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that nobody keeps alive is not published; where there are threads again it works."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DiscoveryError, match="can't start new thread"):
            store.publish(Bucket.MODELS, KEY, "{}")

    assert not folder.exists()
    store.publish(Bucket.MODELS, KEY, "{}")
    assert [path.name for path in folder.iterdir()] == [NAME]


def touch_twice_in_vain(
    store: FileDiscovery, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Let each touch fail, and wait for the second one."""
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(store, "_tick", fail)
    store.publish(Bucket.MODELS, KEY, "{}")

    eventually(lambda: len(calls) >= 2)


def test_bug_in_a_touch_does_not_end_the_thread(
    store: FileDiscovery,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, and the next touch is tried."""
    touch_twice_in_vain(store, monkeypatch, eventually)
    assert "ZeroDivisionError" in caplog.text


class Broken(logging.Handler):
    """A host's handler whose sink is down."""

    def emit(self, record: logging.LogRecord) -> None:
        """Fail."""
        raise RuntimeError("no sink")


@pytest.fixture
def broken_log() -> Iterator[None]:
    """Let whatever the discovery logs raise."""
    logger, broken = logging.getLogger("selfhost.discovery"), Broken()
    logger.addHandler(broken)
    yield
    logger.removeHandler(broken)


@pytest.mark.usefixtures("broken_log")
def test_broken_log_does_not_end_the_thread(
    store: FileDiscovery, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """All records would expire with it."""
    touch_twice_in_vain(store, monkeypatch, eventually)


@pytest.mark.usefixtures("broken_log")
def test_broken_log_keeps_no_other_record_from_being_touched(slow_store: FileDiscovery, folder: Path) -> None:
    """Whatever there is to say about the first one: it is a stranger's now."""
    for number in range(2):
        slow_store.publish(Bucket.MODELS, RecordKey("ns", "comp", "ep", number), "{}")
    stranger, ours = (folder / f"ns%2Fcomp%2Fep%2F{number}" for number in range(2))
    stranger.write_text("[]")
    os.utime(ours, (0, 0))

    slow_store._tick()

    assert ours.stat().st_mtime > 0


def test_thread_takes_no_signals() -> None:
    """The host may wait for one in its own way."""
    masks: list[set[int]] = []
    seen = threading.Event()

    def look() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        seen.set()

    keep_alive = KeepAlive(look, 0.001)
    keep_alive.start()
    assert seen.wait(TIMEOUT)
    keep_alive.stop()

    assert {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD} <= masks[0]
