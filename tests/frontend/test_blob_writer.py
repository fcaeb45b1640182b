"""Writing a blob: only right bytes get a digest's name, in the right order, and nothing else stays."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import helpers
import pytest
from cache_kit import Clock, blob_path, names, put, run_python, temporaries

from selfhost.card.checksum import Checksum
from selfhost.errors import CacheError, VerificationError
from selfhost.frontend.cache import BlobCache

DATA = b"0123456789" * 1000
CHECKSUM = Checksum.of(DATA)


@pytest.fixture
def cache(tmp_path: Path, leaves_nothing: None) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(tmp_path / "mdc")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Return os.umask; the test's own comes back after it."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


def blobs(cache: BlobCache) -> list[str]:
    """Return what lies in the folder of blobs."""
    return names(Path(cache.root, "blobs"))


# --- what is published


@pytest.mark.parametrize("data", [b"", b"x", DATA, os.urandom(3 << 20)])
def test_right_bytes_get_the_name_of_their_digest(cache: BlobCache, data: bytes) -> None:
    """And nothing else is there; an empty file is a file like any other. # catalogue 124"""
    checksum = put(cache, data)

    assert cache.find(checksum) == str(blob_path(cache, checksum))
    assert blob_path(cache, checksum).read_bytes() == data
    assert blobs(cache) == [checksum.hex]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    """Nobody may write to a blob, and nobody else may enter a root that we made. # catalogue 138"""
    umask(mask)
    cache = BlobCache(tmp_path / "mdc")
    put(cache, DATA)

    assert stat.S_IMODE(blob_path(cache, CHECKSUM).stat().st_mode) == 0o444
    assert stat.S_IMODE(Path(cache.root).stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(cache.root, "blobs").stat().st_mode) & 0o022 == 0


def test_wrong_bytes_get_no_name(cache: BlobCache) -> None:
    """The error tells source, expected and found; nothing stays when the writer is left."""
    with cache.write(CHECKSUM) as writer:
        writer.write(DATA[:-1])
        with pytest.raises(VerificationError) as caught:
            writer.publish("http://worker/x")

    err = caught.value
    assert (err.url, err.expected, err.size) == ("http://worker/x", str(CHECKSUM), len(DATA) - 1)
    assert err.actual == str(Checksum.of(DATA[:-1]))
    assert blobs(cache) == []


def test_writer_can_start_anew_after_wrong_bytes(cache: BlobCache) -> None:
    """A file made of two sources may be wrong without the second one's fault."""
    with cache.write(CHECKSUM) as writer:
        writer.write(b"wrong" * 5000)
        writer.validator = '"abc"'
        with pytest.raises(VerificationError):
            writer.publish("a")
        writer.restart()
        assert (writer.received, writer.validator) == (0, None)
        writer.write(DATA)
        writer.publish("b")

    assert blob_path(cache, CHECKSUM).read_bytes() == DATA


def test_writer_counts_and_copies_what_comes(cache: BlobCache) -> None:
    """A transport may use its buffer again, and continue what has come so far."""
    buffer = bytearray(DATA[:5000])
    with cache.write(CHECKSUM) as writer:
        writer.write(memoryview(buffer))
        buffer[:] = b"X" * 5000
        assert writer.received == 5000
        writer.write(DATA[5000:])
        path = writer.publish("test")

    assert Path(path).read_bytes() == DATA


def test_writer_that_is_left_leaves_nothing(cache: BlobCache) -> None:
    """Whatever ends the `with`."""
    with contextlib.suppress(KeyError), cache.write(CHECKSUM) as writer:
        writer.write(DATA)
        assert len(temporaries(Path(cache.root))) == 1
        raise KeyError

    assert blobs(cache) == []


def test_nothing_is_made_before_the_first_byte(cache: BlobCache) -> None:
    """A source that cannot be reached costs no file."""
    with cache.write(CHECKSUM):
        assert names(Path(cache.root)) == []


def test_temporary_file_is_private_and_locked(cache: BlobCache) -> None:
    """Named as Dynamo names them, so that everybody knows what it is."""
    with cache.write(CHECKSUM) as writer:
        writer.write(b"x")
        (name,) = blobs(cache)
        path = Path(cache.root, "blobs", name)

        assert name.startswith(f"{CHECKSUM.hex}.tmp.{os.getpid()}.")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with open(path) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_writer_holds_few_descriptors(cache: BlobCache) -> None:
    """Its file and two folders; none before the first byte."""
    with cache.write(CHECKSUM) as writer:
        before = helpers.open_descriptors()
        writer.write(b"x")
        assert helpers.open_descriptors() == before + 3


# --- what is there already


def test_right_blob_that_is_there_stays(cache: BlobCache) -> None:
    """Of two writers the second drops its own: a published blob never changes. # catalogue 25"""
    with cache.write(CHECKSUM) as slow:
        slow.write(DATA)
        put(cache, DATA)
        before = blob_path(cache, CHECKSUM).stat()
        slow.publish("test")

    assert os.path.samestat(before, blob_path(cache, CHECKSUM).stat())
    assert blobs(cache) == [CHECKSUM.hex]


def test_wrong_blob_that_is_there_is_set_aside(cache: BlobCache, caplog: pytest.LogCaptureFixture) -> None:
    """What somebody put there meanwhile is kept for a look, not in the way. # catalogue 17, 29"""
    with cache.write(CHECKSUM) as writer:
        writer.write(DATA)
        blob_path(cache, CHECKSUM).write_bytes(b"poison")
        writer.publish("test")

    assert blob_path(cache, CHECKSUM).read_bytes() == DATA
    assert blobs(cache) == [CHECKSUM.hex, CHECKSUM.hex + ".corrupt"]
    assert "its 6 bytes hash to blake3:" in caplog.text


def test_swapped_temporary_file_is_not_believed(cache: BlobCache) -> None:
    """Who may write to the folder may put other bytes under the private name; they are found out."""
    with cache.write(CHECKSUM) as writer:
        writer.write(DATA)
        (temporary,) = temporaries(Path(cache.root))
        Path(cache.root, temporary).unlink()
        Path(cache.root, temporary).write_bytes(b"X" * len(DATA))
        with pytest.raises(CacheError, match="somebody changed"):
            writer.publish("test")

    assert cache.find(CHECKSUM) is None


# --- the order of things


def test_order_of_a_publication(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and mode reach the disk before the name is given, the name before it is told."""
    # catalogue 18, 21
    put(cache, b"so that the folders are there")
    calls: list[str] = []
    for name in ("write", "fchmod", "fsync", "rename", "symlink"):
        monkeypatch.setattr(os, name, recorder(calls, name, getattr(os, name)))
    with cache.write(CHECKSUM) as writer:
        writer.write(DATA)
        writer.publish("test")

    assert calls[:5] == ["write file", "fchmod file", "fsync file", "rename", "fsync folder"]
    assert set(calls[5:]) <= {"fchmod file", "symlink"}  # the stamp, last of all


def recorder(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of os so that each call is noted, with the kind of what it is about."""

    def call(*args: Any, **options: Any) -> Any:
        kind = ""
        if isinstance(args[0], int):
            kind = " folder" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else " file"
        calls.append(name + kind)
        return function(*args, **options)

    return call


def test_without_fsync_nothing_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no stamp outlives the process, because a power cut may leave less than it says."""
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", recorder(calls, "fsync", os.fsync))
    cache = BlobCache(tmp_path / "mdc", fsync=False)
    put(cache, DATA)

    assert cache.find(CHECKSUM)
    assert calls == []
    assert names(tmp_path / "mdc" / "stamps") == []


# --- what the disk says


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("function", ["write", "fsync", "rename", "fchmod"])
def test_refusal_is_typed_and_leaves_nothing(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    """The error says what to do, and the next try works. # catalogue 20, 128"""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with pytest.raises(CacheError, match=os.strerror(code) + ": ") as caught:
            put(cache, DATA)

    assert (caught.value.errno, caught.value.path) == (code, cache.root + "/blobs")
    assert blobs(cache) == []
    assert cache.find(put(cache, DATA))


def test_short_writes_are_continued(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is nearly full, or a large piece, takes less than it is given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))

    assert Path(str(cache.find(put(cache, DATA[:100])))).read_bytes() == DATA[:100]


def test_file_size_limit(tmp_path: Path) -> None:
    """A process that may not write large files gets an error, not a signal. # catalogue 129"""
    script = """
        import resource, sys
        from cache_kit import put
        from selfhost.errors import CacheError
        from selfhost.frontend.cache import BlobCache

        cache = BlobCache(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            put(cache, bytes(10000))
        except CacheError as err:
            print(err.errno, err)
        cache.find(put(cache, bytes(1000))) and print("next one works")
    """
    done = run_python(script, tmp_path / "mdc")

    assert done.stdout.startswith(f"{errno.EFBIG} cannot write")
    assert "next one works" in done.stdout
    assert temporaries(tmp_path) == []


def test_reaped_while_it_was_written(cache: BlobCache) -> None:
    """Somebody with a wild clock took our file for an orphan: an error, and the next try works."""
    with cache.write(CHECKSUM) as writer:
        writer.write(DATA)
        (temporary,) = temporaries(Path(cache.root))
        Path(cache.root, temporary).unlink()
        with pytest.raises(CacheError, match="somebody removed it") as caught:
            writer.publish("test")

    assert caught.value.errno == errno.ENOENT
    assert cache.find(put(cache, DATA))


def test_cache_that_is_removed_is_made_again(cache: BlobCache) -> None:
    """Somebody cleans up below a running process."""
    put(cache, DATA)
    for path in sorted(Path(cache.root).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    Path(cache.root).rmdir()

    assert cache.find(CHECKSUM) is None
    assert cache.find(put(cache, DATA))


# --- orphans


def test_first_writer_reaps_orphans(tmp_path: Path) -> None:
    """What dead writers left, ours or Dynamo's, goes when it is an hour old; what is written to stays."""
    clock = Clock()
    folder = tmp_path / "mdc" / "blobs"
    folder.mkdir(parents=True)
    for name in (f"{'1' * 64}.tmp.7.{'2' * 32}", f"{'1' * 64}.tmp.7.dynamos-uuid", "of-nobody.tmp.1.2"):
        (folder / name).write_bytes(b"x")
    with BlobCache(tmp_path / "mdc").write(CHECKSUM) as living:
        living.write(b"x")
        put(BlobCache(tmp_path / "mdc", clock=clock), b"too early")
        assert len(names(folder)) == 5
        clock.ahead = 3700.0
        put(BlobCache(tmp_path / "mdc", clock=clock), b"late enough")

        left = [name for name in names(folder) if ".tmp." in name]
        assert [name.split(".")[0] for name in left] == [CHECKSUM.hex, "of-nobody"]


def test_a_writer_looks_for_orphans_once(tmp_path: Path) -> None:
    """Only the first one pays for the look."""
    clock = Clock()
    cache = BlobCache(tmp_path / "mdc", clock=clock)
    put(cache, b"first")
    orphan = tmp_path / "mdc" / "blobs" / f"{'1' * 64}.tmp.7.x"
    orphan.write_bytes(b"")
    clock.ahead = 3700.0
    put(cache, b"second")

    assert orphan.exists()
