"""What a progress callback is told."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Optional

import pytest

from selfhost._threads import start_thread
from selfhost.card.checksum import Checksum
from selfhost.frontend.progress import Progress, ProgressMeter
from selfhost.frontend.wanted import WantedBlob


def blob(name: str, size: Optional[int]) -> WantedBlob:
    """Return a blob that is wanted."""
    return WantedBlob(Checksum.of(name.encode()), (name,), size, size or 1 << 20)


def test_counts_bytes_and_files_of_all() -> None:
    """Each report tells about one file and about all of them."""
    told: list[Progress] = []
    large, small = blob("large", 100), blob("small", 10)
    meter = ProgressMeter([large, small], told.append)

    meter.report(large, 60)
    meter.report(small, 10)
    meter.done(small, None)
    meter.done(large, 100)

    assert told == [
        Progress("large", 60, 100, 60, 110, 0, 2),
        Progress("small", 10, 10, 70, 110, 0, 2),
        Progress("small", 10, 10, 70, 110, 1, 2),
        Progress("large", 100, 100, 110, 110, 2, 2),
    ]


def test_total_is_unknown_until_the_last_size_is() -> None:
    """A file without a declared size has one when it is done."""
    told: list[Progress] = []
    sized, unsized = blob("sized", 100), blob("unsized", None)
    meter = ProgressMeter([sized, unsized], told.append)

    meter.report(unsized, 7)
    meter.done(unsized, None)

    assert [progress.total_bytes for progress in told] == [None, 107]
    assert told[0].file_size is None


def test_shorter_than_declared_ends_at_the_total() -> None:
    """A card may overstate a size; in the end everything is done."""
    told: list[Progress] = []
    overstated = blob("f", 100)
    meter = ProgressMeter([overstated], told.append)

    meter.report(overstated, 60)
    meter.done(overstated, None)

    assert (told[-1].done_bytes, told[-1].total_bytes) == (60, 60)


def test_restart_goes_back() -> None:
    """When a transfer starts over, so do its bytes."""
    told: list[Progress] = []
    file = blob("f", 100)
    meter = ProgressMeter([file], told.append)

    meter.report(file, 60)
    meter.report(file, 0)

    assert [progress.done_bytes for progress in told] == [60, 0]


def test_callback_that_fails_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """An error in somebody's display is logged once and stops no download."""
    calls = []

    def display(progress: Progress) -> None:
        calls.append(progress)
        raise ValueError("no terminal")

    file = blob("f", 100)
    meter = ProgressMeter([file], display)
    with caplog.at_level(logging.ERROR):
        meter.report(file, 1)
        meter.report(file, 2)
        meter.done(file, None)

    assert len(calls) == 1
    assert len(caplog.records) == 1


def test_callback_is_called_with_the_hosts_signals() -> None:
    """What it launches can be ended, though no signal reaches the threads that fetch."""
    blocked: list[set[int]] = []

    def note(*_: object) -> None:
        blocked.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())})

    meter = ProgressMeter([blob("f", 1)], note)

    def fetch() -> None:
        note()
        meter.done(blob("f", 1), None)
        note()

    thread = threading.Thread(target=fetch)
    start_thread(thread)
    thread.join()
    ours, hosts, again = blocked

    assert {signal.SIGINT, signal.SIGTERM} <= ours
    assert not {signal.SIGINT, signal.SIGTERM} & hosts
    assert again == ours


def test_interrupt_in_the_callback_passes() -> None:
    """What is no error of the display is not swallowed."""

    def display(progress: Progress) -> None:
        raise KeyboardInterrupt

    file = blob("f", 100)
    with pytest.raises(KeyboardInterrupt):
        ProgressMeter([file], display).report(file, 1)


def test_callback_runs_in_one_thread_at_a_time() -> None:
    """Displays need no lock."""
    inside = []
    overlaps = []

    def display(progress: Progress) -> None:
        overlaps.append(bool(inside))
        inside.append(1)
        time.sleep(0.001)
        inside.pop()

    blobs = [blob(str(number), 100) for number in range(4)]
    meter = ProgressMeter(blobs, display)
    threads = [
        threading.Thread(target=lambda file=file: [meter.report(file, count) for count in range(20)])
        for file in blobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not any(overlaps)
    assert len(overlaps) == 80


def test_without_callback_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A meter may have no callback."""
    file = blob("f", 100)
    meter = ProgressMeter([file], None)

    meter.report(file, 1)
    meter.done(file, None)

    assert caplog.records == []
