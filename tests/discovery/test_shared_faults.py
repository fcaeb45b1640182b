"""One publisher per host, when something goes wrong: disks, locks, folders, other people's code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import TIMEOUT
from publishers import KEY, OTHER, PACKAGE, Participant

from selfhost.discovery import (
    Bucket,
    FileDiscovery,
    MemoryDiscovery,
    RecordKey,
    SharedDiscovery,
    base,
    claims,
    shared,
    shared_instance_id,
)
from selfhost.errors import DiscoveryError

Eventually = Callable[[Callable[[], object]], None]

# --- the record


class Failing(MemoryDiscovery):
    """Fails to publish so many times."""

    def __init__(self, error: Exception, failures: int) -> None:
        super().__init__()
        self.error = error
        self.failures = failures

    def publish(self, bucket: Bucket, key: RecordKey, text: str, **options: Any) -> base.Publication:
        """Fail, or publish."""
        self.failures -= 1
        if self.failures >= 0:
            raise self.error
        return super().publish(bucket, key, text, **options)


@pytest.mark.parametrize("error", [DiscoveryError("told to fail", backend="mem"), KeyError("told to fail")])
def test_failed_take_over_is_tried_again(
    share: Callable[..., SharedDiscovery],
    start: Callable[..., Participant],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """With one warning, until it works; a host's own discovery may raise anything."""
    first = start()
    first.publish()
    discovery = share(Failing(error, 3))
    discovery.publish(Bucket.MODELS, KEY, "{}")

    first.end(signal.SIGKILL)

    eventually(lambda: discovery.records(Bucket.MODELS))
    assert [each.message for each in caplog.records if each.levelname in ("WARNING", "ERROR")] == [
        f"cannot take over the record mdc/ns/comp/ep/abc (tried again): {error}"
    ]


def test_who_cannot_publish_lets_others_lead(
    share: Callable[..., SharedDiscovery],
    start: Callable[..., Participant],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As one that has no descriptor left: the record is somebody else's to keep."""
    first = start()
    first.publish()
    share(Failing(OSError(errno.EMFILE, "told to fail"), 10**9)).publish(Bucket.MODELS, KEY, "{}")
    first.end(signal.SIGKILL)
    eventually(lambda: "cannot take over" in caplog.text)
    second = start()

    second.publish()

    eventually(second.is_leading)


class Hanging(FileDiscovery):
    """A store whose disk hangs at the end of publishing, until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.hangs = threading.Event()
        self.let_go = threading.Event()

    def publish(self, bucket: Bucket, key: RecordKey, text: str, **options: Any) -> base.Publication:
        """Publish after all."""
        published = super().publish(bucket, key, text, **options)
        self.hangs.set()
        assert self.let_go.wait(TIMEOUT)
        return published


def test_record_withdrawn_while_it_is_taken_over_goes_when_the_disk_lets_go(
    share: Callable[..., SharedDiscovery],
    start: Callable[..., Participant],
    record: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:
    """Its files are not served any more, so nobody may keep it alive; the key is free then."""
    monkeypatch.setattr(shared, "_BUSY_SECONDS", 0.01)
    first, inner = start(), Hanging(tmp_path)
    first.publish()
    discovery = share(inner)
    publication = discovery.publish(Bucket.MODELS, KEY, "{}")
    first.end(signal.SIGKILL)
    assert inner.hangs.wait(TIMEOUT)

    publication.withdraw()

    assert record.exists()
    inner.let_go.set()
    eventually(lambda: not record.exists())
    eventually(lambda: is_free(discovery))


def is_free(discovery: SharedDiscovery) -> bool:
    """Publish the record; tell whether that worked."""
    try:
        discovery.publish(Bucket.MODELS, KEY, "{}")
    except DiscoveryError:
        return False
    return True


def test_discovery_closed_while_it_publishes_has_published_nothing(
    share: Callable[..., SharedDiscovery], record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever publishes hears of it."""
    monkeypatch.setattr(shared, "_BUSY_SECONDS", 0.01)
    inner = Hanging(tmp_path)
    discovery = share(inner)

    def close() -> None:
        inner.hangs.wait(TIMEOUT)
        discovery.close()
        inner.let_go.set()

    closing = threading.Thread(target=close)
    closing.start()

    with pytest.raises(DiscoveryError, match="this discovery is closed"):
        discovery.publish(Bucket.MODELS, KEY, "{}")
    closing.join()
    assert not record.exists()


def test_record_is_let_go_where_the_locks_fail(
    share: Callable[..., SharedDiscovery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It expires, and its key is free."""

    def refuse(*_: object) -> bool:
        raise OSError(errno.ENOLCK, "told to fail")

    inner = FileDiscovery(tmp_path)
    discovery = share(inner)
    publication = discovery.publish(Bucket.MODELS, KEY, "{}")
    with monkeypatch.context() as patch:
        patch.setattr(claims._ClaimFile, "take_turn", refuse)
        publication.withdraw()

    assert "published=0" in repr(inner)
    discovery.publish(Bucket.MODELS, KEY, "{}")
    assert "published=1 leading=1" in repr(discovery)


def test_withdrawing_never_raises(
    share: Callable[..., SharedDiscovery],
    start: Callable[..., Participant],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A host's own discovery may be unable to remove what a dead holder left."""

    class WithoutRemove(MemoryDiscovery):
        def remove(self, bucket: Bucket, key: RecordKey) -> None:
            raise AttributeError("remove")

    first, discovery = start(), share(WithoutRemove())
    first.publish()
    monkeypatch.setattr(shared, "STAND_BY_SECONDS", 3600)
    publication = discovery.publish(Bucket.MODELS, KEY, "{}")
    first.end(signal.SIGKILL)

    publication.withdraw()

    assert "could not withdraw the record mdc/ns/comp/ep/abc (remove); it expires" in caplog.text


# --- the folder


def test_folder_of_others_is_refused(share: Callable[..., SharedDiscovery], tmp_path: Path) -> None:
    """Whoever can lock its file can keep a record from being published."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share").chmod(0o755)

    with pytest.raises(
        DiscoveryError, match=r"user \d+ alone \(mode 700\), found one of user \d+ \(mode 755\)"
    ):
        share().publish(Bucket.MODELS, KEY, "{}")


def test_made_folders_are_private(share: Callable[..., SharedDiscovery], tmp_path: Path) -> None:
    """Whatever the umask; nothing in it tells a model's name."""
    share().publish(Bucket.MODELS, KEY, "{}")

    assert (tmp_path / "share").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["claims"]
    assert (tmp_path / "share" / "claims").read_bytes() == b""


def test_nothing_is_opened_before_something_is_published(tmp_path: Path) -> None:
    """Reading needs no folder."""
    with SharedDiscovery(FileDiscovery(tmp_path / "kv"), tmp_path / "share") as discovery:
        assert discovery.records(Bucket.MODELS) == {}

    assert list(tmp_path.iterdir()) == []


def test_process_that_stops_in_its_turn_delays_others_in_bounds(
    share: Callable[..., SharedDiscovery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing fails then, with nothing left behind; it works again when the other one is done."""
    monkeypatch.setattr(claims, "TURN_SECONDS", 0.05)
    discovery = share()
    discovery.publish(Bucket.MODELS, OTHER, "{}")
    with subprocess.Popen(
        [sys.executable, "-c", IN_TURN, str(tmp_path / "share" / "claims")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PACKAGE},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DiscoveryError, match=r"cannot publish 'ns/comp/ep/abc': .*waited 0.05 s"):
            discovery.publish(Bucket.MODELS, KEY, "{}")
        other.communicate(timeout=20)

    discovery.publish(Bucket.MODELS, KEY, "{}")
    assert list(discovery.records(Bucket.MODELS)) == [KEY, OTHER]


IN_TURN = """
import fcntl, sys
from selfhost.discovery import claims
with open(sys.argv[1], "r+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, claims._place_of("mdc/ns/comp/ep/abc"))
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_missing_thread_is_an_error(
    share: Callable[..., SharedDiscovery], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody would stand by; nothing is published then."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    discovery = share(MemoryDiscovery())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DiscoveryError, match="can't start new thread"):
            discovery.publish(Bucket.MODELS, KEY, "{}")

    assert discovery.records(Bucket.MODELS) == {}
    discovery.publish(Bucket.MODELS, KEY, "{}")


def test_refused_publication_leaves_no_claim(share: Callable[..., SharedDiscovery], tmp_path: Path) -> None:
    """Neither the key nor the thread nor the descriptor; the next one may have it."""
    (tmp_path / "v1").write_text("no directory")
    discovery = share()
    with pytest.raises(DiscoveryError, match="cannot publish"):
        discovery.publish(Bucket.MODELS, KEY, "{}")
    (tmp_path / "v1").unlink()

    discovery.publish(Bucket.MODELS, KEY, "{}")

    assert list(discovery.records(Bucket.MODELS)) == [KEY]
    assert repr(discovery) == f"<SharedDiscovery {str(tmp_path / 'share')!r} published=1 leading=1>"


# --- one instance


def test_processes_of_a_folder_are_one_instance(tmp_path: Path) -> None:
    """Whoever asks first, and however many at once."""
    code = "import sys; from selfhost.discovery import shared_instance_id as i; print(i(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "share")]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PACKAGE}
        )
        for _ in range(6)
    ]
    ids = {int(process.communicate(timeout=20)[0]) for process in processes}

    assert ids == {shared_instance_id(tmp_path / "share")}
    assert 0 < ids.pop() < 2**63
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["instance"]
    assert shared_instance_id(tmp_path / "other") != shared_instance_id(tmp_path / "share")


def test_instance_of_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """What lies there under that name, or may be changed by others, is not believed."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "junk").mkdir(mode=0o700)
    (tmp_path / "junk" / "instance").write_text("junk")

    for folder, reason in (("open", "mode 700"), ("junk", "junk/instance' holds something else: remove it")):
        with pytest.raises(DiscoveryError, match=f"cannot share an instance id in .*{folder}.*{reason}"):
            shared_instance_id(tmp_path / folder)


@pytest.mark.parametrize("left", [b"", bytes(16)])
def test_instance_lost_in_a_crash_of_the_machine_is_chosen_anew(tmp_path: Path, left: bytes) -> None:
    """The file is there, but what was in it never came to the disk."""
    (tmp_path / "share").mkdir(mode=0o700)
    (tmp_path / "share" / "instance").write_bytes(left)

    chosen = shared_instance_id(tmp_path / "share")

    assert 0 < chosen < 2**63
    assert shared_instance_id(tmp_path / "share") == chosen
