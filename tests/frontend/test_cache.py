"""The cache as its users see it: blobs, models, roots, lower caches, copies, export and import."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from cache_kit import (
    DATA,
    HOUR,
    MODEL,
    OTHER_MODEL,
    Clock,
    blob_path,
    names,
    put,
    put_model,
    run_python,
    temporaries,
    tree,
)

from selfhost.card.checksum import Checksum
from selfhost.errors import BlobMissing, CacheError, CardError, VerificationError
from selfhost.frontend import roots
from selfhost.frontend.cache import BlobCache, ModelKey

WANTED = {name: Checksum.of(data) for name, data in DATA.items()}


@pytest.fixture
def root(tmp_path: Path, leaves_nothing: None) -> Path:
    """Return where the cache will be."""
    return tmp_path / "mdc"


@pytest.fixture
def cache(root: Path) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(root)


def contents(folder: object) -> dict[str, bytes]:
    """Return the files of a directory."""
    return {name: Path(str(folder), name).read_bytes() for name in os.listdir(str(folder))}


def model_path(cache: BlobCache, model: ModelKey = MODEL) -> Path:
    """Return where a model's directory is or would be."""
    return Path(cache.root, "by-slug", model.slug, model.mdcsum)


def refuse(code: int) -> Callable[..., Any]:
    """Return a function that fails as a system call does."""

    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


# --- models


def test_model_is_a_directory_of_links(cache: BlobCache, root: Path) -> None:
    """Dynamo's layout, with relative links; nothing else is made. # catalogue 140"""
    put_model(cache)

    assert cache.find_model(MODEL, WANTED) == str(model_path(cache))
    assert contents(model_path(cache)) == DATA
    target = os.readlink(model_path(cache) / "config.json")
    assert target == f"../../../blobs/{WANTED['config.json'].hex}"
    assert set(names(root)) - {"stamps"} == {"blobs", "by-slug", "locks"}
    assert names(root / "by-slug" / "llama") == ["a" * 64]


def test_model_with_an_empty_slug(cache: BlobCache, root: Path) -> None:
    """A name without a Latin letter or digit has none; Dynamo leaves the component out."""
    key = ModelKey("", "a" * 64)
    put_model(cache, key)

    assert cache.find_model(key, WANTED) == str(root / "by-slug" / key.mdcsum)
    assert os.readlink(root / "by-slug" / key.mdcsum / "config.json").startswith("../../blobs/")
    assert [model.key for model in cache.models()] == [key]


def test_moved_cache_still_works(cache: BlobCache, root: Path, tmp_path: Path) -> None:
    """Relative links mean the same wherever the root is mounted. # catalogue 140"""
    put_model(cache)
    root.rename(tmp_path / "elsewhere")

    assert BlobCache(tmp_path / "elsewhere").find_model(MODEL, WANTED)
    assert contents(tmp_path / "elsewhere" / "by-slug" / "llama" / MODEL.mdcsum) == DATA


def test_dynamos_directory_is_used_as_it_is(cache: BlobCache, root: Path) -> None:
    """Its blobs have other modes, its links are absolute; nothing is made anew. # catalogue 140"""
    (root / "blobs").mkdir()
    model_path(cache).mkdir(parents=True)
    for name, data in DATA.items():
        blob_path(cache, WANTED[name]).write_bytes(data)
        (model_path(cache) / name).symlink_to(blob_path(cache, WANTED[name]))
    before = tree(root)

    assert cache.find_model(MODEL, WANTED) == cache.publish_model(MODEL, WANTED)
    after = tree(root)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= {"locks", "locks/collect"}


@pytest.mark.parametrize("present", [[], ["config.json"]])
def test_half_made_directory_is_filled(cache: BlobCache, present: list[str]) -> None:
    """Dynamo makes a directory first and its links one by one."""
    put_model(cache)
    for name in set(DATA) - set(present):
        (model_path(cache) / name).unlink()

    assert cache.find_model(MODEL, WANTED) is None
    cache.publish_model(MODEL, WANTED)
    assert contents(model_path(cache)) == DATA


def test_names_of_others_in_the_directory_stay(cache: BlobCache) -> None:
    """Dynamo links the neighbours of local files, too."""
    put_model(cache)
    (model_path(cache) / "README.md").write_text("x")

    assert cache.find_model(MODEL, WANTED)
    cache.publish_model(MODEL, WANTED)
    assert (model_path(cache) / "README.md").exists()


def test_two_names_of_one_digest(cache: BlobCache) -> None:
    """One blob, two links."""
    files = put_model(cache, MODEL, {"a.json": b"same", "b.json": b"same"})

    assert len(names(Path(cache.root, "blobs"))) == 1
    assert cache.find_model(MODEL, files)


def test_other_blob_under_the_name_is_a_collision(cache: BlobCache) -> None:
    """Two cards of one name and checksum that mean different files: nobody guesses which is right."""
    put_model(cache)
    other = put(cache, b"other")
    before = tree(model_path(cache))

    assert cache.find_model(MODEL, {**WANTED, "config.json": other}) is None
    with pytest.raises(CacheError, match=r"has blake3:\w+ as 'config.json'.* remove the directory") as caught:
        cache.publish_model(MODEL, {**WANTED, "config.json": other})
    assert caught.value.path == str(model_path(cache))
    assert tree(model_path(cache)) == before


def test_missing_blob_is_told(cache: BlobCache) -> None:
    """All of them at once, and no directory is made for the rest."""
    put(cache, DATA["config.json"])

    with pytest.raises(BlobMissing, match="fetch again") as caught:
        cache.publish_model(MODEL, WANTED)
    assert caught.value.checksums == (str(WANTED["tokenizer.json"]),)
    assert names(Path(cache.root, "by-slug")) == []


@pytest.mark.parametrize("damage", ["removed", "flipped", "emptied"])
def test_model_with_a_damaged_blob_is_no_hit(cache: BlobCache, damage: str) -> None:
    """One byte rotten, or nothing left after a power cut: a miss, and the next fetch repairs it."""
    # catalogue 17, 18
    put_model(cache)
    path = blob_path(cache, WANTED["tokenizer.json"])
    path.chmod(0o644)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "emptied" else b"X" + DATA["tokenizer.json"][1:])

    assert cache.find_model(MODEL, WANTED) is None
    assert cache.find_model(MODEL, {"config.json": WANTED["config.json"]})
    put_model(cache)
    assert contents(model_path(cache)) == DATA


def test_collected_in_between_is_told(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that goes while the links are made is noticed at the end."""
    put_model(cache, OTHER_MODEL)
    rename = os.rename

    def rename_and_remove(*args: Any, **options: Any) -> None:
        rename(*args, **options)
        blob_path(cache, WANTED["config.json"]).unlink(missing_ok=True)

    monkeypatch.setattr(os, "rename", rename_and_remove)
    with pytest.raises(BlobMissing):
        cache.publish_model(MODEL, WANTED)


def test_folder_that_goes_in_between_is_made_again(
    cache: BlobCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector removes the last model of a slug just when another one comes."""
    for name in DATA:
        put(cache, DATA[name])
    mkdir = os.mkdir
    tries: list[str] = []

    def mkdir_elsewhere(path: str, *args: Any, **options: Any) -> None:
        if path.startswith(".tmp.") and not tries:
            tries.append(path)
            (root / "by-slug" / "llama").rmdir()
        mkdir(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", mkdir_elsewhere)
    assert cache.publish_model(MODEL, WANTED) == str(model_path(cache))
    assert len(tries) == 1


def test_two_at_once_is_success(cache: BlobCache, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that make the directory the second finds it there; nothing is left over."""
    for name in DATA:
        put(cache, DATA[name])
    rename = os.rename

    def rename_second(source: str, *args: Any, **options: Any) -> None:
        if source.startswith(".tmp."):
            monkeypatch.setattr(os, "rename", rename)
            BlobCache(root).publish_model(MODEL, WANTED)
        rename(source, *args, **options)

    monkeypatch.setattr(os, "rename", rename_second)
    assert cache.publish_model(MODEL, WANTED) == str(model_path(cache))
    assert temporaries(root) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "CON"])
def test_name_that_leads_elsewhere_is_refused(cache: BlobCache, name: str, tmp_path: Path) -> None:
    """The cache itself lets no such name in, whoever asks. # catalogue 15"""
    checksum = put(cache, b"x")

    for call in (cache.find_model, cache.publish_model):
        with pytest.raises(CardError):
            call(MODEL, {name: checksum})
    with pytest.raises(CardError):
        cache.export_model({name: checksum}, tmp_path / "out")


@pytest.mark.parametrize(
    "key", [("..", "a" * 64), ("a/b", "a" * 64), ("m", "a" * 63), ("m", ".."), ("m", "A" * 64)]
)
def test_key_that_leads_elsewhere_is_refused(cache: BlobCache, key: tuple[str, str]) -> None:
    """A slug and a digest, nothing else."""
    with pytest.raises(CardError):
        cache.find_model(ModelKey(*key), {})


def test_use_is_written_down_once_an_hour(root: Path) -> None:
    """Finding a warm model writes nothing, but tells the collector of it now and then."""
    clock = Clock()
    cache = BlobCache(root, clock=clock)
    put_model(cache)
    published = model_path(cache).stat().st_mtime_ns
    clock.ahead = HOUR - 60
    cache.find_model(MODEL, WANTED)
    assert model_path(cache).stat().st_mtime_ns == published
    clock.ahead = HOUR + 60
    cache.find_model(MODEL, WANTED)

    assert abs(model_path(cache).stat().st_mtime - clock()) < 60


def test_use_in_the_future_is_corrected(cache: BlobCache) -> None:
    """A clock that was ahead must not make a model look used for years. # catalogue 135"""
    put_model(cache)
    future = time.time() + 1000 * HOUR
    os.utime(model_path(cache), (future, future))
    cache.find_model(MODEL, WANTED)

    assert abs(model_path(cache).stat().st_mtime - time.time()) < 60


def test_order_of_a_publication(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links reach the disk before the directory has its name, the name before it is told. # catalogue 21"""
    put_model(cache, OTHER_MODEL)
    calls: list[str] = []

    def record(name: str, function: Callable[..., Any]) -> None:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("mkdir", "symlink", "fsync", "rename"):
        record(name, getattr(os, name))
    cache.publish_model(MODEL, WANTED)

    assert calls == ["mkdir", "symlink", "symlink", "fsync", "rename", "fsync"]


def test_warm_model_changes_nothing(cache: BlobCache, root: Path) -> None:
    """Not a file, not a time."""
    put_model(cache)
    before = tree(root)

    assert BlobCache(root).find_model(MODEL, WANTED)
    assert cache.find_model(MODEL, WANTED)
    assert tree(root) == before


# --- copies


def test_models_of_copies(root: Path) -> None:
    """Without links each name is a file, verified like a blob."""
    cache = BlobCache(root, links=False)
    put_model(cache)
    path = model_path(cache) / "tokenizer.json"

    assert cache.find_model(MODEL, WANTED) == BlobCache(root).find_model(MODEL, WANTED)
    assert contents(model_path(cache)) == DATA
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_rotten_copy_is_replaced(root: Path) -> None:
    """A copy is no better than its bytes. # catalogue 17"""
    cache = BlobCache(root, links=False)
    put_model(cache)
    path = model_path(cache) / "tokenizer.json"
    path.chmod(0o644)
    path.write_bytes(b"X" + DATA["tokenizer.json"][1:])

    assert cache.find_model(MODEL, WANTED) is None
    cache.publish_model(MODEL, WANTED)
    assert contents(model_path(cache)) == DATA
    assert temporaries(root) == []


def test_other_copy_under_the_name_is_a_collision(root: Path) -> None:
    """As it is for links; also an hour later, since a copy keeps its blob."""
    clock = Clock()
    cache = BlobCache(root, links=False, clock=clock)
    put_model(cache)
    other = put(cache, b"other")
    before = tree(model_path(cache))
    clock.ahead = 2 * HOUR
    assert cache.collect().blobs == 1
    put(cache, b"other")

    with pytest.raises(CacheError, match=r"has blake3:\w+ as 'config.json'.* remove the directory"):
        cache.publish_model(MODEL, {**WANTED, "config.json": other})
    assert tree(model_path(cache)) == before


def test_blob_that_changes_while_it_is_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is hashed, too; a wrong one never gets its name."""
    cache = BlobCache(root, links=False)
    for data in DATA.values():
        put(cache, data)
    readv = os.readv

    def meddle(fd: int, buffers: list[memoryview]) -> int:
        count = readv(fd, buffers)
        buffers[0][:1] = b"X"
        return count

    monkeypatch.setattr(os, "readv", meddle)
    with pytest.raises(BlobMissing, match="changed while it was copied"):
        cache.publish_model(MODEL, WANTED)
    assert not model_path(cache).exists()
    assert temporaries(root) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_links(cache: BlobCache, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It is found out when the first link is made; stamps stay in memory. # catalogue 130"""
    monkeypatch.setattr(os, "symlink", refuse(code))
    put_model(cache)

    assert cache.find_model(MODEL, WANTED)
    assert contents(model_path(cache)) == DATA
    assert names(Path(cache.root, "stamps")) == []


# --- lower caches


def test_lower_cache_is_read_and_never_written_to(tmp_path: Path, root: Path) -> None:
    """A hit there is verified and linked by its absolute path."""
    put_model(BlobCache(tmp_path / "lower"), OTHER_MODEL)
    before = tree(tmp_path / "lower")
    cache = BlobCache(root, lower=[tmp_path / "absent", tmp_path / "lower"])

    assert cache.find(WANTED["config.json"]) == f"{tmp_path}/lower/blobs/{WANTED['config.json'].hex}"
    assert cache.publish_model(MODEL, WANTED) == cache.find_model(MODEL, WANTED) == str(model_path(cache))
    assert os.readlink(model_path(cache) / "config.json").startswith(f"{tmp_path}/lower/blobs/")
    assert names(root / "blobs") == []
    assert tree(tmp_path / "lower") == before


def test_wrong_lower_blob_is_a_miss(tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stays where it is, is complained about once, and the own root gets the right one."""
    lower = BlobCache(tmp_path / "lower")
    put_model(lower)
    rotten = blob_path(lower, WANTED["config.json"])
    rotten.chmod(0o644)
    rotten.write_bytes(b"rotten")
    cache = BlobCache(root, lower=[tmp_path / "lower"])

    assert cache.find(WANTED["config.json"]) is None
    put(cache, DATA["config.json"])
    assert cache.publish_model(MODEL, WANTED)
    assert contents(model_path(cache)) == DATA
    assert rotten.read_bytes() == b"rotten"
    assert caplog.text.count("of a lower cache is not used") == 1


def test_copies_of_lower_blobs(tmp_path: Path, root: Path) -> None:
    """Without links the bytes come over."""
    put_model(BlobCache(tmp_path / "lower"))
    cache = BlobCache(root, lower=[tmp_path / "lower"], links=False)

    assert contents(cache.publish_model(MODEL, WANTED)) == DATA


def test_link_to_a_lower_cache_that_is_no_longer_one(tmp_path: Path, root: Path) -> None:
    """It leads out of what is trusted, so it is replaced."""
    put_model(BlobCache(tmp_path / "lower"))
    BlobCache(root, lower=[tmp_path / "lower"]).publish_model(MODEL, WANTED)
    cache = BlobCache(root)

    assert cache.find_model(MODEL, WANTED) is None
    put_model(cache)
    assert os.readlink(model_path(cache) / "config.json").startswith("../../../blobs/")


# --- roots


def test_root_is_made_for_us_alone(tmp_path: Path) -> None:
    """With the folders above it; a relative one means this directory now. # catalogue 138"""
    before = os.umask(0)
    try:
        cache = BlobCache(tmp_path / "a" / "b" / "mdc")
    finally:
        os.umask(before)

    for path in (cache.root, tmp_path / "a" / "b", tmp_path / "a"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert os.path.isabs(BlobCache(os.path.relpath(tmp_path / "c")).root)


@pytest.mark.parametrize("kind", ["file", "below a file", "loop"])
def test_given_root_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    """Nothing else is used instead of it."""
    path = tmp_path / "mdc"
    if kind == "loop":
        path.symlink_to(path)
    else:
        path.write_text("")

    with pytest.raises(CacheError, match="cannot use the cache root"):
        BlobCache(path / "deeper" if kind == "below a file" else path)


def test_unknown_way_to_verify(tmp_path: Path) -> None:
    """A typing error must not mean less than was asked for."""
    with pytest.raises(ValueError, match="expected 'stamp' or 'always'"):
        BlobCache(tmp_path / "mdc", verify="allways")  # type: ignore[arg-type]

    assert not (tmp_path / "mdc").exists()


def test_usual_root_is_dynamos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below HOME, unless a variable says otherwise."""
    monkeypatch.delenv("DYN_MDC_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BlobCache().root == str(tmp_path / ".cache" / "dynamo" / "mdc")
    monkeypatch.setenv("DYN_MDC_CACHE", str(tmp_path / "other"))

    assert BlobCache().root == str(tmp_path / "other")


@pytest.mark.parametrize("home", [None, "", "relative", "file"])
def test_without_a_home_there_is_a_temporary_root(tmp_path: Path, home: Optional[str]) -> None:
    """For this process alone, with one warning; it goes when the process does. # catalogue 139"""
    script = """
        import logging, os, stat, sys
        from cache_kit import DATA, MODEL, put_model
        from selfhost.frontend.cache import BlobCache

        logging.basicConfig(format="%(levelname)s", stream=sys.stdout)
        cache = BlobCache()
        files = put_model(cache)
        assert cache.find_model(MODEL, files) and stat.S_IMODE(os.stat(cache.root).st_mode) == 0o700
        if not os.fork():
            sys.exit()  # a child that ends leaves it to its parent
        os.wait()
        assert cache.find_model(MODEL, files)
        print(cache.root)
    """
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    variables = (
        [f"HOME={tmp_path / 'file' if home == 'file' else home}"] if home is not None else ["-u", "HOME"]
    )
    done = run_python(
        script,
        wrapper=["env", "-C", str(tmp_path), "-u", "DYN_MDC_CACHE", *variables, f"TMPDIR={tmp_path}/tmp"],
    )

    assert done.stdout.split() == ["WARNING", done.stdout.split()[1]]
    assert Path(done.stdout.split()[1]).parent == tmp_path / "tmp"
    assert names(tmp_path / "tmp") == []
    assert names(tmp_path) == ["file", "tmp"]


def test_usual_root_that_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is in it is used, new things go to a temporary root. # catalogue 139"""
    put_model(BlobCache(tmp_path / "usual"))
    monkeypatch.setenv("DYN_MDC_CACHE", str(tmp_path / "usual"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(roots, "_private", {})
    cache = BlobCache()

    assert str(cache.find(WANTED["config.json"])).startswith(str(tmp_path / "usual"))
    assert cache.publish_model(MODEL, WANTED).startswith(str(tmp_path / "tmp"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    shutil.rmtree(cache.root)


def test_one_temporary_root_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Caches of one process share what they fetch, and there is one warning; it says what was found."""
    monkeypatch.delenv("DYN_MDC_CACHE", raising=False)
    monkeypatch.setenv("HOME", "relative/home")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(roots, "_private", {})
    first, second = BlobCache(), BlobCache()

    assert second.find(put(first, b"x")) == first.find(Checksum.of(b"x"))
    assert names(tmp_path) == [os.path.basename(first.root)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "HOME is 'relative/home', no absolute path" in caplog.text
    shutil.rmtree(first.root)


# --- out of it and into it


def test_export_makes_a_plain_directory(cache: BlobCache, tmp_path: Path) -> None:
    """Files, not links, with the umask's modes."""
    files = put_model(cache)
    before = os.umask(0o022)
    try:
        cache.export_model(files, tmp_path / "new" / "out")
    finally:
        os.umask(before)

    assert contents(tmp_path / "new" / "out") == DATA
    modes = {stat.S_IMODE(path.lstat().st_mode) for path in (tmp_path / "new" / "out").iterdir()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "new" / "out").stat().st_mode) == 0o755
    assert names(tmp_path / "new") == ["out"]


def test_export_adds_to_a_directory(cache: BlobCache, tmp_path: Path) -> None:
    """What is there and right stays, so does what is none of ours."""
    files = put_model(cache)
    (tmp_path / "config.json").write_bytes(DATA["config.json"])
    (tmp_path / "mine.txt").write_text("x")
    before = (tmp_path / "config.json").stat()
    cache.export_model(files, tmp_path)
    cache.export_model(files, tmp_path)

    assert os.path.samestat((tmp_path / "config.json").stat(), before)
    assert (tmp_path / "tokenizer.json").read_bytes() == DATA["tokenizer.json"]
    assert names(tmp_path) == ["config.json", "mdc", "mine.txt", "tokenizer.json"]


def test_export_overwrites_nothing(cache: BlobCache, tmp_path: Path) -> None:
    """A file of that name and other bytes stops it before anything is changed."""
    files = put_model(cache)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")

    with pytest.raises(CacheError, match=r"tokenizer.json' is there already.*remove it"):
        cache.export_model(files, tmp_path / "out")
    assert contents(tmp_path / "out") == {"tokenizer.json": b"mine"}


@pytest.mark.parametrize("exists", [False, True])
def test_export_of_what_is_not_there(cache: BlobCache, tmp_path: Path, exists: bool) -> None:
    """All or nothing."""
    put(cache, DATA["config.json"])
    if exists:
        (tmp_path / "out").mkdir()

    with pytest.raises(BlobMissing, match=r"cannot export 'tokenizer.json'"):
        cache.export_model(WANTED, tmp_path / "out")
    assert names(tmp_path) == (["mdc", "out"] if exists else ["mdc"])
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("function", ["write", "fsync", "link", "rename"])
def test_export_to_a_full_disk(
    cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, exists: bool
) -> None:
    """A typed error, and nothing of it stays; the next one works. # catalogue 20"""
    files = put_model(cache)
    if exists:
        (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse(errno.ENOSPC))
        if function not in ("link", "rename") or exists == (function == "link"):
            with pytest.raises(CacheError, match="cannot export a model to") as caught:
                cache.export_model(files, tmp_path / "out")
            assert caught.value.errno == errno.ENOSPC
            assert names(tmp_path / "out") == []

    cache.export_model(files, tmp_path / "out")
    assert contents(tmp_path / "out") == DATA


def test_export_that_breaks_half_way_takes_back_what_it_moved(
    cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory gets all of the files or none."""
    files = put_model(cache)
    (tmp_path / "out").mkdir()
    link = os.link

    def link_one(source: str, target: str) -> None:
        if target.endswith("tokenizer.json"):
            raise OSError(errno.EIO, "Input/output error")
        link(source, target)

    monkeypatch.setattr(os, "link", link_one)
    with pytest.raises(CacheError):
        cache.export_model(files, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_import_brings_a_file_in(cache: BlobCache, make_file: Callable[[str, bytes], str]) -> None:
    """Verified; a model can be made of it."""
    files = {name: Checksum.of(data) for name, data in DATA.items()}
    for name, data in DATA.items():
        assert cache.import_blob(make_file(name, data), files[name]) == cache.find(files[name])

    assert contents(cache.publish_model(MODEL, files)) == DATA


def test_import_of_wrong_bytes(cache: BlobCache, make_file: Callable[[str, bytes], str]) -> None:
    """The error names the file; nothing stays."""
    path = make_file("config.json", b"wrong")

    with pytest.raises(VerificationError) as caught:
        cache.import_blob(path, WANTED["config.json"])
    assert caught.value.url == path
    assert names(Path(cache.root, "blobs")) == []


@pytest.mark.parametrize("kind", ["absent", "folder", "fifo", "nul"])
def test_import_of_what_is_no_file(cache: BlobCache, tmp_path: Path, kind: str) -> None:
    """A typed error, at once: nobody waits for a FIFO's writer."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)

    with pytest.raises(CacheError, match="cannot import"):
        cache.import_blob("a\0b" if kind == "nul" else path, WANTED["config.json"])
    assert names(Path(cache.root)) == []


# --- looking


def test_stats_and_models(root: Path) -> None:
    """Each blob counts once, in the whole and in each model that has it."""
    cache = BlobCache(root)
    assert cache.stats().blobs == cache.stats().bytes == 0
    put_model(cache)
    put_model(cache, OTHER_MODEL, {"a": DATA["config.json"], "b": DATA["config.json"]})
    os.utime(model_path(cache), (1000, 1000))
    size = sum(map(len, DATA.values()))

    stats, models = cache.stats(), cache.models()
    assert (stats.blobs, stats.bytes, stats.models, stats.temporary_files) == (2, size, 2, 0)
    assert [(model.key, model.files, model.bytes) for model in models] == [
        (MODEL, 2, size),
        (OTHER_MODEL, 2, len(DATA["config.json"])),
    ]
    assert models[0].last_use == 1000.0
    assert models[0].path == str(model_path(cache))


def test_verify_finds_what_stamps_cannot_see(cache: BlobCache) -> None:
    """Every byte is read; what is wrong is told and set aside, and counts as such."""
    files = put_model(cache)
    path = blob_path(cache, files["config.json"])
    path.chmod(0o644)
    path.write_bytes(b"rotten")

    assert cache.verify() == [files["config.json"]]
    assert cache.verify() == []
    assert cache.stats().set_aside == 1
    assert path.with_name(path.name + ".corrupt").read_bytes() == b"rotten"


def test_verify_sets_nothing_aside_where_it_cannot(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong is told, and that it is still there; what went meanwhile is not wrong."""
    files = put_model(cache)
    path = blob_path(cache, files["config.json"])
    path.chmod(0o644)
    path.write_bytes(b"rotten")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse(errno.EROFS))
        assert cache.verify() == [files["config.json"]]
    assert path.read_bytes() == b"rotten"
    assert "it cannot be set aside" in caplog.text
    assert "it is now" not in caplog.text

    monkeypatch.setattr("selfhost.frontend.blobs.Verifier.why_wrong", refuse(errno.ENOENT))
    assert cache.verify() == []


def test_verify_of_a_cache_that_is_gone(cache: BlobCache, root: Path) -> None:
    """There is nothing wrong in it."""
    root.rmdir()

    assert cache.verify() == []


def test_repr_tells_where(cache: BlobCache, root: Path) -> None:
    """For logs."""
    assert repr(cache) == f"<BlobCache {str(root)!r} lower=0>"
