"""One record of ours on the disk: it comes back when lost, and somebody else's is left alone."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Callable

import pytest

from selfhost.discovery import Bucket, FileDiscovery, RecordKey
from selfhost.discovery.owned import NotOurs, OwnedRecord
from selfhost.errors import DiscoveryError

KEY = RecordKey("my-ns", "comp", "ep", 0xABC)
NAME = "my%2Dns%2Fcomp%2Fep%2Fabc"
OTHER = RecordKey("ns", "comp", "ep", 1)
OTHER_NAME = "ns%2Fcomp%2Fep%2F1"

Eventually = Callable[[Callable[[], object]], None]


def names(folder: Path) -> list[str]:
    """Return what lies in the folder."""
    return sorted(path.name for path in folder.iterdir())


def age(path: Path, seconds: float) -> None:
    """Make a file look as if nobody had touched it for so long."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_replacing_is_one_step_for_readers(store: FileDiscovery, folder: Path) -> None:
    """A reader finds the old text or the new one at any moment, and nothing is left beside it."""
    publication = store.publish(Bucket.MODELS, KEY, '{"n":0}')
    texts: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            texts.add((folder / NAME).read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 200):
        publication.replace(f'{{"n":{number}}}')
    done.set()
    reader.join()

    assert texts <= {f'{{"n":{number}}}' for number in range(200)}
    assert names(folder) == [NAME]


@pytest.mark.parametrize("lost", ["record", "everything"])
def test_lost_record_is_made_again(
    store: FileDiscovery, folder: Path, tmp_path: Path, eventually: Eventually, lost: str
) -> None:
    """Somebody removed it, or took us for dead while we stood still: it comes back by itself."""
    store.publish(Bucket.MODELS, KEY, '{"a":1}')

    if lost == "record":
        (folder / NAME).unlink()
    else:
        os.rename(tmp_path / "v1", tmp_path / "moved")

    eventually((folder / NAME).exists)
    assert store.records(Bucket.MODELS) == {KEY: '{"a":1}'}


@pytest.fixture
def swept_once_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which somebody sweeps the record as soon as its owner has looked at it."""
    look = OwnedRecord._look

    def look_and_lose(record: OwnedRecord) -> object:
        state = look(record)
        (folder / NAME).unlink(missing_ok=True)
        return state

    return lambda: monkeypatch.setattr(OwnedRecord, "_look", look_and_lose)


def test_record_swept_while_it_is_adopted_is_made_anew(
    slow_store: FileDiscovery, folder: Path, swept_once_seen: Callable[[], None]
) -> None:
    """What dead workers left is stale by the time that new ones come, and everybody sweeps."""
    slow_store.publish(Bucket.MODELS, KEY, "{}").abandon()
    swept_once_seen()

    slow_store.publish(Bucket.MODELS, KEY, "{}", adopt=True)

    assert (folder / NAME).read_text() == "{}"


def test_record_swept_while_it_is_touched_is_made_again(
    slow_store: FileDiscovery,
    folder: Path,
    swept_once_seen: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At once, without a word of trouble."""
    slow_store.publish(Bucket.MODELS, KEY, "{}")
    swept_once_seen()

    slow_store._tick()

    assert (folder / NAME).read_text() == "{}"
    assert caplog.text == ""


def test_replaced_text_is_what_comes_back(store: FileDiscovery, folder: Path, eventually: Eventually) -> None:
    """Not the text of the first publication."""
    store.publish(Bucket.MODELS, KEY, '{"a":1}').replace('{"a":2}')

    (folder / NAME).unlink()

    eventually((folder / NAME).exists)
    assert (folder / NAME).read_text() == '{"a":2}'


def test_withdrawn_record_does_not_come_back(store: FileDiscovery, folder: Path) -> None:
    """A touch that finds the file gone must not undo a withdrawal, at any moment."""
    store.publish(Bucket.MODELS, OTHER, "{}")  # keeps the thread at work
    for _ in range(100):
        store.publish(Bucket.MODELS, KEY, "{}").withdraw()

    store._tick()

    assert names(folder) == [OTHER_NAME]


def test_record_withdrawn_before_it_was_made_is_never_made(tmp_path: Path) -> None:
    """Whoever withdraws it first has nothing to remove, so the maker must not begin."""
    record = OwnedRecord(str(tmp_path / "record"), b"{}", time.time_ns)

    record.remove()

    with pytest.raises(NotOurs, match="closed"):
        record.create()
    record.refresh()
    assert names(tmp_path) == []


def test_somebody_elses_record_under_our_key_is_left_alone(
    slow_store: FileDiscovery, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is neither touched nor overwritten; one warning. When it goes, ours comes back."""
    publication = slow_store.publish(Bucket.MODELS, KEY, '{"ours":1}')
    (folder / "new").write_text('{"theirs":1}')
    os.replace(folder / "new", folder / NAME)
    age(folder / NAME, 60.0)
    before = (folder / NAME).stat().st_mtime_ns

    with pytest.raises(DiscoveryError, match="somebody else"):
        publication.replace('{"ours":2}')
    slow_store._tick()
    slow_store._tick()
    assert (folder / NAME).read_text() == '{"theirs":1}'
    assert (folder / NAME).stat().st_mtime_ns == before
    assert caplog.text.count("somebody else's record") == 1

    (folder / NAME).unlink()
    slow_store._tick()
    assert (folder / NAME).read_text() == '{"ours":1}'


def test_somebody_elses_record_is_not_withdrawn(slow_store: FileDiscovery, folder: Path) -> None:
    """Even if it has the size of ours."""
    publication = slow_store.publish(Bucket.MODELS, KEY, '{"a":1}')
    (folder / NAME).write_text('{"b":1}')

    publication.withdraw()

    assert (folder / NAME).read_text() == '{"b":1}'


def test_record_that_others_touched_is_still_ours(store: FileDiscovery, folder: Path) -> None:
    """A copy with the same bytes, or another time, does not make a stranger of it."""
    publication = store.publish(Bucket.MODELS, KEY, '{"a":1}')
    (folder / "new").write_text('{"a":1}')
    os.replace(folder / "new", folder / NAME)
    age(folder / NAME, 5.0)

    publication.withdraw()

    assert names(folder) == []
