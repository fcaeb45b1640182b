"""The thread that keeps records alive: when it is there, and what it survives."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Callable

import pytest

from selfhost.discovery import Bucket, FileDiscovery, RecordKey
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


def test_bug_in_a_touch_does_not_end_the_thread(
    store: FileDiscovery,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, and the next touch is tried."""
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(store, "_tick", fail)
    store.publish(Bucket.MODELS, KEY, "{}")

    eventually(lambda: len(calls) >= 2)
    assert "ZeroDivisionError" in caplog.text
