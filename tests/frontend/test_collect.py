"""Garbage collection: what goes, what stays whatever the limits, and what a clock that jumps does."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cache_kit import (
    DATA,
    HOUR,
    MODEL,
    OTHER_MODEL,
    Clock,
    blob_path,
    environment,
    names,
    put,
    put_model,
    run_python,
    temporaries,
    tree,
)

from selfhost.card.checksum import hash_file
from selfhost.errors import CacheError
from selfhost.frontend.cache import BlobCache, ModelKey
from selfhost.frontend.collect import Collected

DAY = 24 * HOUR
NOTHING = Collected(models=(), blobs=0, bytes=0, temporary_files=0, set_aside=0, kept_bytes=0)
KEYS = [ModelKey("m", str(index) * 64) for index in range(4)]


@pytest.fixture
def clock() -> Clock:
    """Return the cache's clock."""
    return Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock, leaves_nothing: None) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(tmp_path / "mdc", clock=clock)


@pytest.fixture
def four(cache: BlobCache, clock: Clock) -> BlobCache:
    """Return a cache of four models, of 1,000 bytes each and 500 in common; the first was used first."""
    for index, key in enumerate(KEYS):
        put_model(cache, key, {"own.json": str(index).encode() * 1000, "common.json": b"c" * 500})
        then = clock() - (len(KEYS) - index) * DAY
        os.utime(model_path(cache, key), (then, then))
    clock.ahead = 3 * HOUR
    return cache


def model_path(cache: BlobCache, model: ModelKey = MODEL) -> Path:
    """Return where a model's directory is or would be."""
    return Path(cache.root, "by-slug", model.slug, model.mdcsum)


def keys(cache: BlobCache) -> list[ModelKey]:
    """Return the models that are there, least recently used first."""
    return [model.key for model in cache.models()]


# --- limits


def test_without_limits_models_stay(four: BlobCache) -> None:
    """Nothing is removed that somebody may want."""
    assert four.collect() == Collected((), 0, 0, 0, 0, kept_bytes=4500)
    assert keys(four) == KEYS


def test_oldest_go_until_the_rest_fits(four: BlobCache) -> None:
    """A blob that another model shares stays, and is not counted as freed."""
    collected = four.collect(max_bytes=2600)

    assert collected == Collected((KEYS[0], KEYS[1]), 2, 2000, 0, 0, kept_bytes=2500)
    assert keys(four) == KEYS[2:]
    assert four.stats().bytes == 2500
    assert set(names(Path(four.root, "stamps"))) <= set(names(Path(four.root, "blobs")))


def test_last_user_takes_the_shared_blob_along(four: BlobCache) -> None:
    """With the last model everything goes, the slug's folder too."""
    collected = four.collect(max_bytes=0)

    assert collected == Collected(tuple(KEYS), 5, 4500, 0, 0, kept_bytes=0)
    assert names(Path(four.root, "by-slug")) == names(Path(four.root, "blobs")) == []


def test_unused_for_long_go(four: BlobCache) -> None:
    """Age counts from the last use, which is known to the hour."""
    assert four.collect(max_age_seconds=3 * DAY).models == (KEYS[0], KEYS[1])
    assert keys(four) == KEYS[2:]


def test_used_model_is_no_longer_the_oldest(four: BlobCache) -> None:
    """Finding it is a use."""
    files = {path.name: hash_file(path)[0] for path in model_path(four, KEYS[0]).iterdir()}
    assert four.find_model(KEYS[0], files)

    assert four.collect(max_bytes=3600).models == (KEYS[1],)


@pytest.mark.parametrize("ahead", [0.0, 0.5 * HOUR, 1.9 * HOUR])
def test_young_stays(cache: BlobCache, clock: Clock, ahead: float) -> None:
    """A use may be an hour older than it looks, and another hour is left to whoever is about to use it."""
    put_model(cache)
    clock.ahead = ahead

    assert cache.collect(max_bytes=0, max_age_seconds=0).models == ()
    assert keys(cache) == [MODEL]


def test_grown_goes(cache: BlobCache, clock: Clock) -> None:
    """After both hours limits count."""
    put_model(cache)
    clock.ahead = 2.1 * HOUR

    assert cache.collect(max_bytes=0).models == (MODEL,)


def test_wanted_stays(four: BlobCache) -> None:
    """Whatever the limits say."""
    collected = four.collect(max_bytes=0, max_age_seconds=0, keep=[KEYS[0]])

    assert collected.models == tuple(KEYS[1:])
    assert names(model_path(four, KEYS[0])) == ["common.json", "own.json"]
    assert (model_path(four, KEYS[0]) / "common.json").read_bytes() == b"c" * 500


def test_held_stays(four: BlobCache) -> None:
    """Here or in another process; when it is let go, it goes."""
    script = (
        "import sys, time; from selfhost.frontend.cache import BlobCache\n"
        "with BlobCache(sys.argv[1]).hold(sys.argv[2]): print('held', flush=True); time.sleep(10)"
    )
    command = [sys.executable, "-c", script, four.root, str(model_path(four, KEYS[1]))]
    with four.hold(str(model_path(four, KEYS[0]))):
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            dry = four.collect(max_bytes=0, dry_run=True)
            assert four.collect(max_bytes=0) == dry
            assert keys(four) == KEYS[:2]
            child.send_signal(signal.SIGKILL)
        assert four.collect(max_bytes=0).models == (KEYS[1],)

    assert four.collect(max_bytes=0).models == (KEYS[0],)


def test_models_of_copies_are_counted_and_go(tmp_path: Path, clock: Clock) -> None:
    """They keep the blobs that they were copied from, so that they can be exported; both go together."""
    cache = BlobCache(tmp_path / "mdc", links=False, clock=clock)
    files = put_model(cache)
    size = sum(map(len, DATA.values()))
    assert cache.stats().bytes == 2 * size
    clock.ahead = 3 * HOUR

    assert cache.collect(max_bytes=2 * size) == Collected((), 0, 0, 0, 0, kept_bytes=2 * size)
    assert [model.bytes for model in cache.models()] == [size]
    cache.export_model(files, tmp_path / "out")
    assert names(tmp_path / "out") == sorted(DATA)
    assert cache.collect(max_bytes=2 * size - 1) == Collected((MODEL,), 2, 2 * size, 0, 0, kept_bytes=0)


def test_empty_slug(cache: BlobCache, clock: Clock) -> None:
    """Its models lie beside the slugs; one whose slug is a digest is none of them."""
    plain, digest_slug = ModelKey("", "a" * 64), ModelKey("b" * 64, "c" * 64)
    put_model(cache, plain)
    put_model(cache, digest_slug)
    assert sorted(keys(cache)) == [plain, digest_slug]
    clock.ahead = 3 * HOUR

    assert cache.collect(max_bytes=0, keep=[digest_slug]).models == (plain,)
    assert keys(cache) == [digest_slug]


def test_more_slugs_than_descriptors(tmp_path: Path) -> None:
    """Each folder is open for as long as it is looked at."""
    script = """
        import resource, sys
        from cache_kit import Clock, put
        from selfhost.frontend.cache import BlobCache, ModelKey

        clock = Clock()
        cache = BlobCache(sys.argv[1], clock=clock, fsync=False)
        files = {"x": put(cache, b"x")}
        for index in range(100):
            cache.publish_model(ModelKey(f"slug-{index}", "a" * 64), files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        clock.ahead = 3 * 3600.0
        assert cache.stats().models == len(cache.models()) == 100
        assert len(cache.collect(max_bytes=0, dry_run=True).models) == 100
        assert len(cache.collect(max_bytes=0).models) == 100
        assert cache.stats().models == cache.stats().blobs == 0
    """
    run_python(script, tmp_path / "mdc")


@pytest.mark.parametrize("call", ["collect", "stats", "models"])
def test_too_few_descriptors_are_no_empty_cache(
    four: BlobCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A folder that cannot be opened for want of descriptors is there nevertheless."""
    before = tree(Path(four.root, "blobs"))
    os_open = os.open

    def refuse(path: str, *args: Any, **options: Any) -> int:
        if path == KEYS[2].mdcsum:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return os_open(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CacheError, match="too many open files: raise the limit"):
        getattr(four, call)()
    assert tree(Path(four.root, "blobs")) == before


def test_folder_that_cannot_be_looked_into(
    four: BlobCache, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left out and counted; what is in it may refer to any blob, so none is removed."""
    other = ModelKey("other", "b" * 64)
    put_model(four, other, {"own.json": b"o" * 10})
    clock.ahead += 3 * HOUR
    Path(four.root).chmod(0o755)
    Path(four.root, "by-slug", "other").chmod(0o777)

    assert keys(four) == KEYS
    assert four.stats().unreadable == 1
    assert "cannot look into" in caplog.text
    dry = four.collect(max_bytes=0, dry_run=True)
    assert four.collect(max_bytes=0) == dry
    assert (dry.models, dry.blobs) == (tuple(KEYS), 0)
    assert len(names(Path(four.root, "blobs"))) == 6
    Path(four.root, "by-slug", "other").chmod(0o755)
    assert four.collect().blobs == 5


# --- what was left over


def test_blobs_of_no_model_go_when_they_are_old(cache: BlobCache, clock: Clock) -> None:
    """An hour is what a fetch has to refer to them."""
    put(cache, b"x" * 100)
    clock.ahead = HOUR - 60
    assert cache.collect() == Collected((), 0, 0, 0, 0, kept_bytes=100)
    clock.ahead = HOUR + 60

    assert cache.collect() == Collected((), 1, 100, 0, 0, kept_bytes=0)
    assert names(Path(cache.root, "stamps")) == []


def test_links_made_elsewhere_are_references(cache: BlobCache, clock: Clock) -> None:
    """Dynamo's absolute links name the root by another path where it is mounted elsewhere."""
    checksum = put(cache, b"x" * 100)
    model_path(cache).mkdir(parents=True)
    (model_path(cache) / "x").symlink_to(f"/mounted/elsewhere/blobs/{checksum.hex}")
    clock.ahead = 3 * HOUR

    assert cache.collect().blobs == 0
    assert blob_path(cache, checksum).exists()


def test_orphans_and_wrong_blobs_go(cache: BlobCache, clock: Clock) -> None:
    """Temporary files of dead writers, staged folders and links, and what was set aside."""
    put_model(cache)
    staged = ".tmp.7." + "1" * 32
    (Path(cache.root, "blobs", f"{'1' * 64}.tmp.7.x")).write_bytes(b"12345")
    (model_path(cache).parent / staged).mkdir()
    (model_path(cache).parent / staged / "config.json").symlink_to("x")
    (model_path(cache) / staged).symlink_to("x")
    (Path(cache.root, "blobs", "2" * 64 + ".corrupt")).write_bytes(b"123")
    before = tree(Path(cache.root))
    assert cache.collect().temporary_files == 0
    clock.ahead = HOUR + 60
    dry = cache.collect(dry_run=True)
    assert tree(Path(cache.root)).keys() - {"locks/collect"} == before.keys() - {"locks/collect"}

    collected = cache.collect()
    assert (collected.temporary_files, collected.set_aside) == (3, 1)
    assert collected == dry
    assert temporaries(Path(cache.root)) == []
    assert cache.stats().set_aside == 0
    assert names(model_path(cache)) == sorted(DATA)


def test_living_writer_keeps_its_file(cache: BlobCache, clock: Clock) -> None:
    """However old it looks: its lock says that it lives."""
    data = b"slow"
    checksum = put(cache, data)
    blob_path(cache, checksum).unlink()
    with cache.write(checksum) as writer:
        writer.write(data)
        clock.ahead = 2 * HOUR
        assert cache.collect().temporary_files == 0
        writer.publish("test")

    assert cache.find(checksum)


def test_foreign_names_stay(cache: BlobCache, clock: Clock) -> None:
    """What is none of ours is not touched."""
    put_model(cache)
    foreign = [
        Path(cache.root, "blobs", "README"),
        Path(cache.root, "notes.txt"),
        Path(cache.root, "by-slug", "README"),
        Path(cache.root, "by-slug", "llama", "README"),
    ]
    for path in foreign:
        path.write_text("x")
    clock.ahead = 3 * HOUR
    cache.collect(max_bytes=0)

    assert all(path.exists() for path in foreign)
    assert cache.models() == []


# --- telling and doing


def test_dry_run_tells_the_same_and_changes_nothing(four: BlobCache) -> None:
    """Not even a lock."""
    before = tree(Path(four.root))
    told = four.collect(max_bytes=2600, max_age_seconds=3.5 * DAY, dry_run=True)

    assert tree(Path(four.root)) == before
    assert four.collect(max_bytes=2600, max_age_seconds=3.5 * DAY) == told
    assert told.models == (KEYS[0], KEYS[1])


def test_empty_cache(cache: BlobCache) -> None:
    """There is nothing to remove, and nothing is made."""
    assert cache.collect(max_bytes=0, dry_run=True) == NOTHING
    assert names(Path(cache.root)) == []
    assert cache.collect(max_bytes=0) == NOTHING


def test_removed_model_is_no_hit_and_comes_back(cache: BlobCache, clock: Clock) -> None:
    """Garbage collection costs a fetch, nothing else."""
    files = put_model(cache)
    clock.ahead = 3 * HOUR
    cache.collect(max_bytes=0)
    assert cache.find_model(MODEL, files) is None
    put_model(cache)

    assert cache.find_model(MODEL, files)


def test_model_used_at_the_last_moment_stays(
    four: BlobCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the lock somebody may come to use it."""
    flock = fcntl.flock
    target = model_path(four, KEYS[0])

    def use_it(fd: int, kind: int) -> None:
        flock(fd, kind)
        if os.path.samestat(os.fstat(fd), target.stat()):
            os.utime(target, (clock(), clock()))

    monkeypatch.setattr(fcntl, "flock", use_it)
    assert KEYS[0] not in four.collect(max_bytes=3600).models
    assert target.is_dir()


def test_model_used_after_the_last_look_comes_back(
    four: BlobCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A use that was written down just before the directory lost its name is seen, and it gets it back."""
    rename = os.rename
    target = model_path(four, KEYS[0])

    def use_it(source: str, *args: Any, **options: Any) -> None:
        if source == KEYS[0].mdcsum:
            os.utime(target, (clock(), clock()))
        rename(source, *args, **options)

    monkeypatch.setattr(os, "rename", use_it)
    assert KEYS[0] not in four.collect(max_bytes=3600).models
    assert names(target) == ["common.json", "own.json"]
    assert (target / "own.json").exists()
    assert temporaries(Path(four.root)) == []


def test_model_that_goes_while_it_is_found(
    cache: BlobCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that loses its name before the use of it is written down is no hit."""
    files = put_model(cache)
    clock.ahead = 3 * HOUR
    utime = os.utime

    def collect_first(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "utime", utime)
        assert BlobCache(cache.root, clock=clock).collect(max_bytes=0).models == (MODEL,)
        utime(*args, **options)

    monkeypatch.setattr(os, "utime", collect_first)
    assert cache.find_model(MODEL, files) is None


def test_unlockable_directories_stay(
    four: BlobCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody can tell whether a model is held, it is not removed."""

    def refuse(fd: int, kind: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert four.collect(max_bytes=0).models == ()
    assert keys(four) == KEYS
    assert "nobody can tell whether it is in use" in caplog.text


def test_held_directory_that_is_gone(cache: BlobCache, clock: Clock) -> None:
    """Whoever comes too late is told."""
    put_model(cache)
    clock.ahead = 3 * HOUR
    cache.collect(max_bytes=0)

    with pytest.raises(CacheError, match="cannot hold"), cache.hold(str(model_path(cache))):
        pass


def test_held_directory_that_is_replaced(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a directory that has lost its name holds nothing."""
    put_model(cache)
    path = model_path(cache)
    flock = fcntl.flock

    def replace_first(fd: int, kind: int) -> None:
        path.rename(path.with_name("collected"))
        path.mkdir()
        flock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    with pytest.raises(CacheError, match="was collected: resolve again"), cache.hold(str(path)):
        pass


def test_collector_that_is_killed_leaves_no_half_model(
    cache: BlobCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory goes by its name first; what is left of it is reaped."""
    files = put_model(cache)
    clock.ahead = 3 * HOUR

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", die)
        with pytest.raises(Killed):
            cache.collect(max_bytes=0)
    assert cache.find_model(MODEL, files) is None
    assert len(temporaries(Path(cache.root))) == 1
    clock.ahead = 6 * HOUR

    assert cache.collect().temporary_files == 1
    assert temporaries(Path(cache.root)) == []


def test_resolving_and_collecting_at_once(cache: BlobCache, clock: Clock) -> None:
    """While somebody collects all the time, models that were just made stay whole."""
    clock.ahead = 0.0
    stop = threading.Event()
    collector = BlobCache(cache.root, clock=clock)

    def collect() -> None:
        while not stop.wait(0.01):
            collector.collect(max_bytes=0, max_age_seconds=0)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for index in range(20):
            files = put_model(cache, ModelKey("m", f"{index:064x}"))
            with cache.hold(str(model_path(cache, ModelKey("m", f"{index:064x}")))):
                assert cache.find_model(ModelKey("m", f"{index:064x}"), files)
    finally:
        stop.set()
        thread.join()


# --- clocks that jump


def test_future_is_now(cache: BlobCache, clock: Clock) -> None:
    """What was used ten years from now is neither removed at once nor for ever there. # catalogue 135"""
    put_model(cache)
    put_model(cache, OTHER_MODEL, {"x": b"x"})
    future = clock() + 10 * 365 * DAY
    os.utime(model_path(cache), (future, future))
    clock.ahead = 3 * HOUR
    assert cache.collect(max_age_seconds=0).models == (OTHER_MODEL,)
    clock.ahead += DAY

    assert cache.collect(max_age_seconds=DAY / 2).models == (MODEL,)


def test_future_is_now_for_orphans(cache: BlobCache, clock: Clock) -> None:
    """A temporary file from the future grows old from now on. # catalogue 135"""
    put(cache, b"x")
    orphan = Path(cache.root, "blobs", "1" * 64 + ".tmp.1.x")
    orphan.write_bytes(b"x")
    os.utime(orphan, (clock() + DAY, clock() + DAY))
    assert cache.collect().temporary_files == 0
    clock.ahead = 1.1 * HOUR

    assert cache.collect().temporary_files == 1


@pytest.mark.parametrize("jump", [10 * 365 * DAY, -30 * 365 * DAY])
def test_clock_that_jumps_breaks_nothing(cache: BlobCache, clock: Clock, jump: float) -> None:
    """Publishing, finding and collecting go on, whatever the time is said to be. # catalogue 135"""
    files = put_model(cache)
    clock.ahead = jump
    assert cache.find_model(MODEL, files)
    assert cache.collect(max_bytes=0).models == ()  # it was used just now
    put_model(cache, OTHER_MODEL, {"x": b"x"})
    clock.ahead = 0.0

    assert cache.find_model(MODEL, files)
    assert MODEL not in cache.collect(max_age_seconds=DAY).models
    assert cache.find_model(MODEL, files)
