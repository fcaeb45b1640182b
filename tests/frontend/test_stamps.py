"""Stamps: which changes they see, when they are not taken, and who shares them."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from cache_kit import Clock, blob_path, date_all_changes_alike, date_each_change, put

from selfhost.card.checksum import Checksum
from selfhost.errors import CacheError
from selfhost.frontend import stamps
from selfhost.frontend.cache import BlobCache

DATA = b"0123456789" * 1000


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note the size of each file that is hashed in order to verify it."""
    sizes: list[int] = []
    hash_fd = stamps.hash_fd

    def note(fd: int, expected_bytes: int) -> tuple[Checksum, int]:
        sizes.append(expected_bytes)
        return hash_fd(fd, expected_bytes)

    monkeypatch.setattr(stamps, "hash_fd", note)
    return sizes


def flip(path: Path) -> None:
    """Change one byte in place."""
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"X")


def flip_and_set_times_back(path: Path) -> None:
    """Change one byte and hide it, as far as that goes."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_through_a_mapping(path: Path) -> None:
    """Change one byte without any call of write."""
    path.chmod(0o644)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[100:101] = b"X"
        mapped.flush()


def put_another_in_its_place(path: Path) -> None:
    """Replace the file by one of the same size and times."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"X" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change", [flip, flip_and_set_times_back, flip_through_a_mapping, put_another_in_its_place]
)
@pytest.mark.parametrize("is_new_process", [False, True])
@pytest.mark.parametrize("dates", ["as they are", "all alike"])
def test_changed_blob_is_no_hit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    is_new_process: bool,
    dates: str,
) -> None:
    """However a published blob is changed, and be it in the tick in which it was. # catalogue 17"""
    with monkeypatch.context() as patch:
        clock = date_all_changes_alike(patch) if dates == "all alike" else Clock()
        cache = BlobCache(tmp_path / "mdc", clock=clock)
        checksum = put(cache, DATA)
        assert cache.find(checksum)
        change(blob_path(cache, checksum))

        assert (BlobCache(cache.root, clock=clock) if is_new_process else cache).find(checksum) is None
    assert not blob_path(cache, checksum).exists()


def test_published_blob_is_not_read_again(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was hashed while it was written needs no second look, in any process."""
    with monkeypatch.context() as patch:
        date_each_change(patch)
        cache = BlobCache(tmp_path / "mdc")
        checksum = put(cache, DATA)

        assert cache.find(checksum) == BlobCache(cache.root).find(checksum) == str(blob_path(cache, checksum))
    assert hashed == []


def test_published_blob_where_changes_may_be_dated_alike(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is hashed at each use, until it was left alone for long enough; once then."""
    with monkeypatch.context() as patch:
        stopped = date_all_changes_alike(patch)
        cache = BlobCache(tmp_path / "mdc", clock=stopped)
        checksum = put(cache, DATA)
        assert not (tmp_path / "mdc" / "stamps").exists()
        assert cache.find(checksum)
        assert cache.find(checksum)
        assert hashed == [len(DATA)] * 2

        cache = BlobCache(tmp_path / "mdc", clock=lambda: stopped() + 3.0)
        assert cache.find(checksum)
        assert cache.find(checksum)
        assert BlobCache(cache.root).find(checksum)
    assert hashed == [len(DATA)] * 3


def test_published_blob_on_the_file_system_of_the_tests(tmp_path: Path, hashed: list[int]) -> None:
    """Either it needs no second look at all, or each one until it was left alone."""
    cache = BlobCache(tmp_path / "mdc")
    checksum = put(cache, DATA)
    assert cache.find(checksum)
    assert BlobCache(cache.root).find(checksum)

    assert len(hashed) in (0, 2)
    assert (tmp_path / "mdc" / "stamps" / checksum.hex).is_symlink() == (not hashed)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_blob_that_changes_while_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A change between its hash and its stamp is not stamped, whether or not its date tells it at once."""
    rename = os.rename

    def meddle(source: str, target: str, **options: Any) -> None:
        folder = tmp_path / "mdc" / "blobs"
        if moment == "before":
            flip(folder / source)
        rename(source, target, **options)
        if moment == "after":
            flip(folder / target)

    cache = BlobCache(tmp_path / "mdc")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", meddle)
        with contextlib.suppress(CacheError):
            put(cache, DATA)
    assert cache.find(Checksum.of(DATA)) is None
    assert BlobCache(cache.root).find(Checksum.of(DATA)) is None


def test_found_blob_is_hashed_once(tmp_path: Path, hashed: list[int]) -> None:
    """Somebody else's blob is verified at its first use; from then on its stamp does, in any process."""
    clock = Clock()
    cache = BlobCache(tmp_path / "mdc", clock=clock)
    checksum = Checksum.of(DATA)
    blob_path(cache, checksum).parent.mkdir()
    blob_path(cache, checksum).write_bytes(DATA)
    clock.ahead = 3.0

    assert cache.find(checksum)
    assert cache.find(checksum)
    assert BlobCache(cache.root).find(checksum)
    assert hashed == [len(DATA)]


def test_blob_that_just_changed_gets_no_stamp(tmp_path: Path, hashed: list[int]) -> None:
    """The next change could fall into the same tick of the clock, so it is hashed again."""
    cache = BlobCache(tmp_path / "mdc")
    checksum = Checksum.of(DATA)
    blob_path(cache, checksum).parent.mkdir()
    blob_path(cache, checksum).write_bytes(DATA)

    assert cache.find(checksum)
    assert cache.find(checksum)
    assert hashed == [len(DATA)] * 2
    assert not (tmp_path / "mdc" / "stamps").exists()


def test_blob_that_cannot_be_synced_gets_no_stamp(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that are dirty in memory can change without a trace."""

    def refuse(fd: int) -> None:
        raise OSError(5, "Input/output error")

    clock = Clock()
    cache = BlobCache(tmp_path / "mdc", clock=clock)
    checksum = Checksum.of(DATA)
    blob_path(cache, checksum).parent.mkdir()
    blob_path(cache, checksum).write_bytes(DATA)
    clock.ahead = 3.0
    monkeypatch.setattr(os, "fsync", refuse)

    assert cache.find(checksum)
    assert cache.find(checksum)
    assert hashed == [len(DATA)] * 2


@pytest.mark.parametrize("what", ["touched", "replaced"])
def test_blob_that_changes_while_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Any doubt is a miss; but a good blob that took the place of a wrong one is not set aside with it."""
    cache = BlobCache(tmp_path / "mdc", verify="always")
    path = blob_path(cache, put(cache, DATA))
    hash_fd = stamps.hash_fd

    def meddle(fd: int, expected_bytes: int) -> tuple[Checksum, int]:
        checksum, size = hash_fd(fd, expected_bytes)
        if what == "touched":
            os.utime(path, (1, 1))
            return checksum, size
        other = path.with_name("other")
        other.write_bytes(DATA)
        other.replace(path)
        return Checksum("0" * 64), size

    with monkeypatch.context() as patch:
        patch.setattr(stamps, "hash_fd", meddle)
        assert cache.find(Checksum(path.name)) is None
    assert path.exists() == (what == "replaced")


def test_always_means_always(tmp_path: Path, hashed: list[int]) -> None:
    """With verify="always" a stamp is neither believed nor made."""
    checksum = put(BlobCache(tmp_path / "mdc"), DATA)
    cache = BlobCache(tmp_path / "mdc", verify="always")

    assert cache.find(checksum)
    assert cache.find(checksum)
    assert hashed == [len(DATA)] * 2


@pytest.mark.parametrize("folder", [".", "blobs"])
def test_no_stamps_where_the_group_may_write(tmp_path: Path, hashed: list[int], folder: str) -> None:
    """A folder that others may write to is used, and hashed each time."""
    cache = BlobCache(tmp_path / "mdc")
    checksum = put(cache, DATA)
    (tmp_path / "mdc").chmod(0o750)
    (tmp_path / "mdc" / folder).chmod(0o770)

    assert cache.find(checksum)
    assert cache.find(checksum)
    assert hashed == [len(DATA)] * 2


def test_group_may_write_where_it_cannot_enter(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A umask of 002 makes folders that the group may write to; inside a closed root that means nothing."""
    date_each_change(monkeypatch)
    cache = BlobCache(tmp_path / "mdc")
    checksum = put(cache, DATA)
    (tmp_path / "mdc" / "blobs").chmod(0o777)

    assert cache.find(checksum)
    assert hashed == []


@pytest.mark.parametrize("text", ["", "v1:0:0:0:0", "v2:1:2:3:4", "/etc/passwd", "v1"])
def test_foreign_stamp_is_worth_nothing(tmp_path: Path, hashed: list[int], text: str) -> None:
    """A stamp that says anything but what the blob is like costs a hash; it is never followed."""
    cache = BlobCache(tmp_path / "mdc")
    checksum = put(cache, DATA)
    stamp = tmp_path / "mdc" / "stamps" / checksum.hex
    stamp.parent.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    if text:
        stamp.symlink_to(text)
    else:
        stamp.write_text("")

    assert BlobCache(cache.root).find(checksum)
    assert hashed == [len(DATA)]


def test_stamps_of_lower_blobs_lie_in_the_own_root(tmp_path: Path, hashed: list[int]) -> None:
    """A lower cache is only read, so what is known of its blobs is kept above."""
    checksum = put(BlobCache(tmp_path / "lower"), DATA)
    clock = Clock()
    clock.ahead = 3.0

    for _ in range(2):
        cache = BlobCache(tmp_path / "mdc", lower=[tmp_path / "lower"], clock=clock)
        assert cache.find(checksum) == str(tmp_path / "lower" / "blobs" / checksum.hex)
    assert hashed == [len(DATA)]
