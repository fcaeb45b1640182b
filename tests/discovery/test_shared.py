"""One publisher per host: who holds the record, who takes it over, and that it is never gone meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Callable, Optional

import pytest
from publishers import KEY, NAME, OTHER, Participant

from selfhost.discovery import Bucket, FileDiscovery, SharedDiscovery

Eventually = Callable[[Callable[[], object]], None]


class Sight:
    """What a frontend that looks all the time sees of the record: its texts in turn, None for none."""

    def __init__(self, path: Path) -> None:
        self.texts: list[Optional[str]] = []
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._note()
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.0002):
            self._note()

    def _note(self) -> None:
        try:
            text: Optional[str] = self._path.read_text()
        except FileNotFoundError:
            text = None
        if self.texts[-1:] != [text]:
            self.texts.append(text)

    def __enter__(self) -> Sight:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


# --- who holds the record


def test_one_process_holds_the_record(start: Callable[..., Participant], record: Path) -> None:
    """Of four that publish it; the others see it as their own."""
    participants = [start() for _ in range(4)]

    leading = [each.publish() for each in participants]

    assert leading == [True, False, False, False]
    assert [path.name for path in record.parent.iterdir()] == [NAME]
    assert all(each.do("list(discovery.records(Bucket.MODELS)) == [key]") == "True" for each in participants)


def test_processes_lead_record_by_record(start: Callable[..., Participant], tmp_path: Path) -> None:
    """Who has a LoRA of its own publishes that, whoever holds the base model's record."""
    first, second = start(), start()
    first.publish()
    second.publish()

    second.do('discovery.publish(Bucket.MODELS, RecordKey("ns", "comp", "ep", 0xABC, "lora"), "{}")')

    assert list(FileDiscovery(tmp_path).records(Bucket.MODELS)) == [KEY, OTHER]


def test_holder_of_another_discovery_in_the_process_stays_the_holder(
    share: Callable[..., SharedDiscovery], start: Callable[..., Participant]
) -> None:
    """A process loses its locks on a file when it closes it anywhere, so it must not."""
    one, other = share(), share()
    one.publish(Bucket.MODELS, KEY, "{}")
    other.publish(Bucket.MODELS, OTHER, "{}").withdraw()
    other.close()

    assert not start().publish()


# --- the hand-over


def test_withdrawn_record_stays_for_those_who_stand_by(
    start: Callable[..., Participant], record: Path, eventually: Eventually
) -> None:
    """Its holder hands it over; the very file stays and is kept alive, and only the last one removes it."""
    first, second = start(), start()
    first.publish()
    second.publish()
    inode = record.stat().st_ino

    with Sight(record) as sight:
        first.do("publication.withdraw()")
        eventually(second.is_leading)

    assert sight.texts == ["{}"]
    assert record.stat().st_ino == inode
    second.do("publication.withdraw()")
    assert not record.exists()


@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGKILL])
def test_record_outlives_its_holder(
    start: Callable[..., Participant], record: Path, eventually: Eventually, how: Optional[signal.Signals]
) -> None:
    """However the process ends, another has the record before anybody misses it."""  # catalogue 142
    first, second = start(), start()
    first.publish()
    second.publish()

    with Sight(record) as sight:
        first.end(how)
        eventually(second.is_leading)

    assert sight.texts == ["{}"]


def test_successor_publishes_its_own_text(
    start: Callable[..., Participant], record: Path, eventually: Eventually
) -> None:
    """As new workers do that were started with another model: one text follows on the other."""
    first, second = start(), start()
    first.publish('{"a":1}')
    second.publish('{"a":2}')

    with Sight(record) as sight:
        first.end(signal.SIGKILL)
        eventually(lambda: len(sight.texts) == 2)
        second.do("""publication.replace('{"a":3}')""")
        eventually(lambda: len(sight.texts) == 3)

    assert sight.texts == ['{"a":1}', '{"a":2}', '{"a":3}']


def test_replacing_while_standing_by_counts_after_the_take_over(
    start: Callable[..., Participant], record: Path, eventually: Eventually
) -> None:
    """Until then the record is the holder's."""
    first, second = start(), start()
    first.publish('{"a":1}')
    second.publish('{"a":2}')

    second.do("""publication.replace('{"a":3}')""")

    assert record.read_text() == '{"a":1}'
    first.do("publication.withdraw()")
    eventually(lambda: record.read_text() == '{"a":3}')


def test_of_many_that_go_at_once_the_last_removes_the_record(
    start: Callable[..., Participant], record: Path
) -> None:
    """None may go in the belief that another one takes over."""
    participants = [start() for _ in range(4)]
    for _ in range(10):
        for each in participants:
            each.publish()
        for each in participants:
            each.tell("publication.withdraw()")

        assert [each.answer() for each in participants] == ["None"] * 4
        assert not record.exists()


def test_dead_holders_record_is_removed_by_a_successor(
    start: Callable[..., Participant], record: Path
) -> None:
    """Even if it goes before it has taken over."""
    first, second = start(), start()
    first.publish()
    second.do('setattr(shared, "STAND_BY_SECONDS", 3600)')
    second.publish()
    first.end(signal.SIGKILL)

    second.end()

    assert not record.exists()


def test_next_run_takes_over_what_a_killed_one_left(start: Callable[..., Participant], record: Path) -> None:
    """At once, where a store alone would refuse the key until the record has expired."""
    first = start()
    first.publish('{"a":1}')
    first.end(signal.SIGKILL)

    assert start().publish('{"a":2}')
    assert record.read_text() == '{"a":2}'


def test_stopped_holder_stays_the_holder(
    start: Callable[..., Participant], tmp_path: Path, eventually: Eventually
) -> None:
    """Its record expires as it would without the others, who are not held up, and comes back with it."""
    first, second = start(0.3), start(0.3)
    first.publish()
    store = FileDiscovery(tmp_path, ttl_seconds=0.3)

    first.process.send_signal(signal.SIGSTOP)
    assert not second.publish()
    eventually(lambda: store.records(Bucket.MODELS) == {})
    first.process.send_signal(signal.SIGCONT)

    eventually(lambda: store.records(Bucket.MODELS) == {KEY: "{}"})
    assert first.is_leading()


# --- forks


def test_forked_child_does_not_keep_its_dead_parent_in_office(
    start: Callable[..., Participant], eventually: Eventually
) -> None:
    """As it would with locks that children inherit."""
    first, second = start(), start()
    first.publish()
    second.publish()
    child = int(first.do("os.fork() or [time.sleep(60), os._exit(0)]"))

    try:
        first.process.kill()
        eventually(second.is_leading)
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_forked_child_leaves_its_parents_record_alone(
    start: Callable[..., Participant], record: Path
) -> None:
    """It withdraws and replaces nothing; what it publishes itself under that key stands by."""
    first, second = start(), start()
    first.publish()
    child = (
        "publication.withdraw(), publish('{\"a\":2}'), stands_by := 'leading=0' in repr(discovery), "
        "publication.withdraw(), discovery.close(), os._exit(7 * stands_by)"
    )

    status = first.do(f"os.waitstatus_to_exitcode(os.waitpid(os.fork() or [{child}], 0)[1])")

    assert status == "7"
    assert record.read_text() == "{}"
    assert first.is_leading()
    assert not second.publish()
