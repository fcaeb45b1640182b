"""The directory store: what is on the disk, who lives and who is dead, and what goes wrong there."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from selfhost.discovery import Bucket, FileDiscovery, RecordKey
from selfhost.discovery.file import TTL_SECONDS
from selfhost.discovery.owned import OwnedRecord
from selfhost.errors import DiscoveryError

KEY = RecordKey("my-ns", "comp", "ep", 0xABC)
NAME = "my%2Dns%2Fcomp%2Fep%2Fabc"
OTHER = RecordKey("ns", "comp", "ep", 1)
OTHER_NAME = "ns%2Fcomp%2Fep%2F1"

Eventually = Callable[[Callable[[], object]], None]
Watch = Callable[..., Any]


def names(folder: Path) -> list[str]:
    """Return what lies in the folder."""
    return sorted(path.name for path in folder.iterdir())


def age(path: Path, seconds: float) -> None:
    """Make a file look as if nobody had touched it for so long."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def keep_alive_threads() -> list[threading.Thread]:
    """Return the threads that keep records alive."""
    return [thread for thread in threading.enumerate() if thread.name == "selfhost-keepalive"]


# --- on the disk


def test_record_is_a_file_of_dynamos_name_and_mode(store: FileDiscovery, folder: Path) -> None:
    """The text and nothing else, readable by everybody whatever the umask; no temporary file stays."""
    before = os.umask(0o027)
    try:
        store.publish(Bucket.MODELS, KEY, '{"a":"é"}')
    finally:
        os.umask(before)

    assert names(folder) == [NAME]
    assert (folder / NAME).read_bytes() == '{"a":"é"}'.encode()
    assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o644


def test_record_is_dated_by_the_clock(open_store: Callable[..., FileDiscovery], folder: Path) -> None:
    """Not by the file server's, whose time may differ."""
    store = open_store(ttl_seconds=60, clock=lambda: 1234.5)

    store.publish(Bucket.MODELS, KEY, "{}")

    assert (folder / NAME).stat().st_mtime == 1234.5


def test_withdrawal_leaves_nothing(store: FileDiscovery, folder: Path) -> None:
    """The file goes at once, and nothing is left beside it."""
    publication = store.publish(Bucket.MODELS, KEY, "{}")

    publication.withdraw()

    assert names(folder) == []


def test_relative_root_is_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that changes its directory does not move the store."""
    monkeypatch.chdir(tmp_path)
    with FileDiscovery("store") as store:
        monkeypatch.chdir("/")
        store.publish(Bucket.MODELS, KEY, "{}")

        assert names(tmp_path / "store" / "v1" / "mdc") == [NAME]


# --- alive


def test_default_lifetime_is_dynamos(tmp_path: Path) -> None:
    """Real participants remove whatever is older than ten seconds."""
    assert FileDiscovery(tmp_path).ttl_seconds == TTL_SECONDS == 10.0


def test_published_record_is_kept_alive(store: FileDiscovery, folder: Path, eventually: Eventually) -> None:
    """The owner touches the very file again and again; others see it all the time."""
    store.publish(Bucket.MODELS, KEY, "{}")
    before = (folder / NAME).stat()

    eventually(lambda: (folder / NAME).stat().st_mtime > before.st_mtime + 0.35)

    assert (folder / NAME).stat().st_ino == before.st_ino
    assert store.records(Bucket.MODELS) == {KEY: "{}"}


def test_clock_that_is_set_costs_no_record(open_store: Callable[..., FileDiscovery], folder: Path) -> None:
    """Ours are touched by the new time; those of others get their time to do the same. # catalogue 135."""
    offset = [0.0]
    store = open_store(ttl_seconds=60, clock=lambda: time.time() + offset[0])
    other = open_store(ttl_seconds=60, clock=lambda: time.time() + offset[0])
    store.publish(Bucket.MODELS, KEY, "{}")
    other.publish(Bucket.MODELS, OTHER, "{}")
    inodes = [(folder / name).stat().st_ino for name in (NAME, OTHER_NAME)]
    store._tick()

    offset[0] = 3600.0
    store._tick()

    assert [(folder / name).stat().st_ino for name in (NAME, OTHER_NAME)] == inodes
    assert (folder / NAME).stat().st_mtime > time.time() + 3000


# --- dead


def test_dead_owners_record_is_removed_by_a_publisher(
    store: FileDiscovery, folder: Path, eventually: Eventually
) -> None:
    """With what it left half made; in every bucket."""
    store.publish(Bucket.INSTANCES, KEY, "{}")
    folder.mkdir()
    for name in (OTHER_NAME, ".tmp_0123456789abcdef"):
        (folder / name).write_text("{}")
        age(folder / name, 5.0)

    eventually(lambda: names(folder) == [])


def test_dead_owners_record_is_removed_by_a_watcher(
    store: FileDiscovery, folder: Path, watching: Watch, eventually: Eventually
) -> None:
    """A frontend alone, which publishes nothing, forgets it and clears it away."""
    folder.mkdir(parents=True)
    (folder / OTHER_NAME).write_text("{}")
    age(folder / OTHER_NAME, -60.0)
    watch = watching(store)
    assert watch.next() == ("added", str(OTHER), "{}")

    age(folder / OTHER_NAME, 5.0)

    assert watch.next() == ("removed", str(OTHER), "{}")
    eventually(lambda: names(folder) == [])


def test_stale_record_is_not_shown(store: FileDiscovery, folder: Path) -> None:
    """Not even before anybody removed it; looking removes nothing."""
    folder.mkdir(parents=True)
    (folder / OTHER_NAME).write_text("{}")
    age(folder / OTHER_NAME, 5.0)

    assert store.records(Bucket.MODELS) == {}
    assert names(folder) == [OTHER_NAME]


def test_dead_owners_key_can_be_taken(store: FileDiscovery, folder: Path) -> None:
    """A worker that restarts with the id of its dead predecessor does not wait for anybody to clean up."""
    folder.mkdir(parents=True)
    (folder / NAME).write_text('{"old":1}')
    age(folder / NAME, 5.0)

    store.publish(Bucket.MODELS, KEY, '{"new":1}')

    assert (folder / NAME).read_text() == '{"new":1}'


# --- trouble


def test_disk_errors_in_the_thread_are_logged_once_and_retried(
    store: FileDiscovery, folder: Path, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """The host hears of them in its log alone; when the disk is back, so is the record."""
    publication = store.publish(Bucket.MODELS, KEY, "{}")
    for number in range(100):
        os.rename(folder, folder.with_name(f"away-{number}"))
        with contextlib.suppress(IsADirectoryError):  # the thread has just made it anew
            folder.write_text("a file where the directory was")
            break

    for _ in range(5):
        store._tick()
    assert caplog.text.count("cannot keep a record alive") == 1
    assert caplog.text.count("cannot remove a stale record") == 1
    assert len(keep_alive_threads()) == 1

    folder.unlink()
    eventually(lambda: folder.is_dir() and names(folder) == [NAME])
    publication.withdraw()
    assert names(folder) == []


def test_trouble_that_comes_back_is_logged_again(
    slow_store: FileDiscovery, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once each time it comes, and once each time that all records are well again, not just some."""
    caplog.set_level("INFO")
    for bucket in Bucket:  # only one of them will be in trouble
        slow_store.publish(bucket, KEY, "{}")

    for time_of_trouble in (1, 2):
        os.rename(folder, folder.with_name("away"))
        folder.write_text("a file where the directory was")
        for _ in range(3):
            slow_store._tick()
        for action in ("keep a record alive", "remove a stale record"):
            assert caplog.text.count(f"cannot {action}") == time_of_trouble
            assert caplog.text.count(f"can {action} again") == time_of_trouble - 1
        folder.unlink()
        os.rename(folder.with_name("away"), folder)
        for _ in range(3):
            slow_store._tick()
        for action in ("keep a record alive", "remove a stale record"):
            assert caplog.text.count(f"can {action} again") == time_of_trouble


def test_watch_in_trouble_is_not_well_because_another_one_is(
    slow_store: FileDiscovery, folder: Path, watching: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """The directories of two buckets fail each for itself, so the log does not fill up."""
    caplog.set_level("INFO")
    slow_store.publish(Bucket.INSTANCES, KEY, "{}")
    folder.write_text("a file where the directory was")

    watching(slow_store, Bucket.INSTANCES)
    watch = watching(slow_store, Bucket.MODELS)
    assert watch.is_quiet(0.1)
    assert caplog.text.count("cannot read the mdc records") == 1
    assert "can read" not in caplog.text

    folder.unlink()
    slow_store.publish(Bucket.MODELS, KEY, "{}")
    assert watch.next() == ("added", str(KEY), "{}")
    assert caplog.text.count("can read the mdc records again") == 1


def test_withdrawal_that_the_disk_refuses_warns(
    store: FileDiscovery, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever detaches a model goes on; the record is kept alive no longer, so it expires."""
    publication = store.publish(Bucket.MODELS, KEY, "{}")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", raising(errno.EROFS))
        publication.withdraw()

    assert "could not remove" in caplog.text
    assert keep_alive_threads() == []


# --- publishing fails


def test_close_between_the_steps_of_publishing_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    """Neither a record that nobody would withdraw nor a thread; whoever publishes hears of it."""

    class ClosedMeanwhile(FileDiscovery):
        def _create(self, record: OwnedRecord, *, adopt: bool) -> None:
            self.close()
            super()._create(record, adopt=adopt)

    with pytest.raises(DiscoveryError, match="this discovery is closed"):
        ClosedMeanwhile(tmp_path).publish(Bucket.MODELS, KEY, "{}")

    assert not folder.exists()
    assert keep_alive_threads() == []


def test_key_of_this_process_is_refused_with_what_to_do(store: FileDiscovery) -> None:
    """The operator has named two things alike; the error says which and how to go on."""
    store.publish(Bucket.MODELS, KEY, "{}")

    advice = "already published by this process; withdraw it first or use another endpoint or name"
    with pytest.raises(DiscoveryError, match=f"'{KEY}': {advice}"):
        store.publish(Bucket.MODELS, KEY, "{}")


def test_store_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """The error names the key, the store and the variable that sets another, and has its cause."""
    (tmp_path / "file").write_text("")

    with FileDiscovery(tmp_path / "file") as store:
        for action in (lambda: store.publish(Bucket.MODELS, KEY, "{}"), lambda: store.records(Bucket.MODELS)):
            with pytest.raises(DiscoveryError, match=str(tmp_path / "file")) as caught:
                action()
            assert isinstance(caught.value.__cause__, OSError)

    assert keep_alive_threads() == []


def test_file_in_the_directorys_place_is_no_taken_key(store: FileDiscovery, folder: Path) -> None:
    """The error says what is wrong."""
    folder.parent.mkdir()
    folder.write_text("")

    with pytest.raises(DiscoveryError, match=r"no directory.*DYN_FILE_KV"):
        store.publish(Bucket.MODELS, KEY, "{}")


def test_name_that_is_too_long_for_the_disk_is_an_error(store: FileDiscovery, folder: Path) -> None:
    """Nothing is left of it, and the thread is gone."""
    key = RecordKey("n" * 300, "c", "e", 1)

    with pytest.raises(DiscoveryError, match="File name too long"):
        store.publish(Bucket.MODELS, key, "{}")

    assert names(folder) == []
    assert keep_alive_threads() == []


def test_full_disk_is_an_error_and_leaves_nothing(store: FileDiscovery, folder: Path) -> None:
    """Neither a torn record nor a temporary file; a record that is there keeps its text. # catalogue 129."""
    publication = store.publish(Bucket.MODELS, OTHER, "{}")
    large = '{"a":"' + "x" * 100_000 + '"}'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for action in (lambda: store.publish(Bucket.MODELS, KEY, large), lambda: publication.replace(large)):
            with pytest.raises(DiscoveryError, match="File too large") as caught:
                action()
            assert isinstance(caught.value.__cause__, OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert names(folder) == [OTHER_NAME]
    assert (folder / OTHER_NAME).read_text() == "{}"
    store.publish(Bucket.MODELS, KEY, large)
    assert names(folder) == [NAME, OTHER_NAME]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_file_system_without_links_will_do(
    open_store: Callable[..., FileDiscovery], folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Records are published, replaced and refused as ever. # catalogue 130."""
    monkeypatch.setattr(os, "link", raising(code))
    store, rival = open_store(ttl_seconds=60), open_store(ttl_seconds=60)

    publication = store.publish(Bucket.MODELS, KEY, '{"a":1}')
    with pytest.raises(DiscoveryError, match="somebody else"):
        rival.publish(Bucket.MODELS, KEY, "{}")
    publication.replace('{"a":2}')

    assert rival.records(Bucket.MODELS) == {KEY: '{"a":2}'}
    assert names(folder) == [NAME]


def raising(code: int) -> Callable[..., None]:
    """Return a function that always raises this OSError."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_what_a_dead_holder_left_is_removed(tmp_path: Path) -> None:
    """Without a thread, which none could be started at exit; a record that is not there is no error."""
    dead, survivor = FileDiscovery(tmp_path), FileDiscovery(tmp_path)
    with dead, survivor:
        dead.publish(Bucket.MODELS, KEY, "{}").abandon()
        assert list(survivor.records(Bucket.MODELS)) == [KEY]
        threads = threading.active_count()
        for _ in range(2):
            survivor.remove(Bucket.MODELS, KEY)

        assert threading.active_count() <= threads
        assert survivor.records(Bucket.MODELS) == {}


def test_key_that_is_none_is_not_removed(store: FileDiscovery) -> None:
    """It would be read as another one's."""
    with pytest.raises(DiscoveryError, match="cannot remove 'a/b/c/d/1'"):
        store.remove(Bucket.MODELS, RecordKey("a/b", "c", "d", 1))
