"""A cache among enemies and on bad disks: planted links, foreign owners, full and read-only file systems."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest
from cache_kit import DATA, HOUR, MODEL, Clock, blob_path, names, put, put_model, run_python, tree

from selfhost.card.checksum import Checksum
from selfhost.errors import CacheError
from selfhost.frontend import roots
from selfhost.frontend.cache import BlobCache

WANTED = {name: Checksum.of(data) for name, data in DATA.items()}
TOKENIZER = WANTED["tokenizer.json"]


@pytest.fixture
def cache(tmp_path: Path, leaves_nothing: None) -> BlobCache:
    """Return a cache with one model."""
    cache = BlobCache(tmp_path / "mdc")
    put_model(cache)
    return cache


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a folder outside the cache that must stay as it is."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "id_rsa").write_text("secret")
    return folder


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a file another user's: really, if we are root; else we are somebody else from now on."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534, follow_symlinks=False)
        else:
            other = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: other)

    return give


# --- planted links: catalogue 27


@pytest.mark.parametrize("folder", ["blobs", "by-slug", "by-slug/llama", f"by-slug/llama/{MODEL.mdcsum}"])
def test_planted_folder_is_not_followed(cache: BlobCache, victim: Path, folder: str) -> None:
    """A link in place of a folder stops everything that would go through it."""
    path = Path(cache.root, folder)
    path.rename(path.with_name("moved"))
    path.symlink_to(victim)
    before = tree(victim)

    for call in (cache.find_model, cache.publish_model):
        with pytest.raises(CacheError, match=r"links are not followed: remove it"):
            call(MODEL, WANTED)
    cache.collect(max_bytes=0) if folder.endswith(MODEL.mdcsum) else None
    assert tree(victim) == before


def test_planted_blob_folder_takes_no_bytes(cache: BlobCache, victim: Path) -> None:
    """Not even a temporary one."""
    Path(cache.root, "blobs").rename(Path(cache.root, "moved"))
    Path(cache.root, "blobs").symlink_to(victim)

    with pytest.raises(CacheError, match="links are not followed"):
        put(cache, b"data")
    with pytest.raises(CacheError, match="links are not followed"):
        cache.find(TOKENIZER)
    assert names(victim) == ["id_rsa"]


def test_planted_stamps_folder_costs_a_hash(cache: BlobCache, victim: Path) -> None:
    """Stamps save work only."""
    Path(cache.root, "stamps").mkdir(exist_ok=True)
    Path(cache.root, "stamps").rename(Path(cache.root, "moved"))
    Path(cache.root, "stamps").symlink_to(victim)

    put(cache, b"data")
    assert BlobCache(cache.root).find(TOKENIZER)
    assert names(victim) == ["id_rsa"]


@pytest.mark.parametrize("target", ["right bytes", "secret", "nowhere"])
def test_planted_blob_is_not_followed(cache: BlobCache, victim: Path, target: str) -> None:
    """Even if it leads to the right bytes; it is set aside, its target is not touched."""
    (victim / "right bytes").write_bytes(DATA["tokenizer.json"])
    path = blob_path(cache, TOKENIZER)
    path.unlink()
    path.symlink_to(victim / ("id_rsa" if target == "secret" else target))
    before = tree(victim)

    assert cache.find(TOKENIZER) is None
    assert cache.find_model(MODEL, WANTED) is None
    put_model(cache)
    assert cache.find_model(MODEL, WANTED)
    assert not path.is_symlink()
    assert tree(victim) == before


def test_planted_folders_in_place_of_a_blob(cache: BlobCache, tmp_path: Path) -> None:
    """However often, and whatever is in them: each is set aside, and goes an hour later."""
    path = blob_path(cache, TOKENIZER)
    for _ in range(3):
        path.unlink()
        (path / "deeper").mkdir(parents=True)
        (path / "deeper" / "file").write_text("x")
        (path / "link").symlink_to(tmp_path)
        assert cache.find(TOKENIZER) is None
        put_model(cache)
        assert cache.find_model(MODEL, WANTED)
    (path.parent / ("1" * 64)).mkdir()
    clock = Clock()
    clock.ahead = 2 * HOUR
    collected = BlobCache(cache.root, clock=clock).collect()

    assert (collected.set_aside, collected.blobs) == (3, 1)
    assert names(path.parent) == sorted(checksum.hex for checksum in WANTED.values())


def test_planted_folder_in_place_of_what_was_set_aside(cache: BlobCache) -> None:
    """A wrong file finds another name."""
    path = blob_path(cache, TOKENIZER)
    Path(f"{path}.corrupt", "x").mkdir(parents=True)
    path.unlink()
    path.write_text("wrong")

    assert cache.find(TOKENIZER) is None
    assert cache.find(put(cache, DATA["tokenizer.json"]))
    assert cache.stats().set_aside == 2


@pytest.mark.parametrize("target", ["victim/id_rsa", "victim/nowhere", "moved/tokenizer", "/dev/zero"])
def test_planted_name_is_replaced(cache: BlobCache, victim: Path, tmp_path: Path, target: str) -> None:
    """A link out of the cache is no hit, whatever is there, and is replaced without a look at its target."""
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "tokenizer").write_bytes(DATA["tokenizer.json"])
    name = Path(cache.root, "by-slug", "llama", MODEL.mdcsum, "tokenizer.json")
    name.unlink()
    name.symlink_to(tmp_path / target)
    before = tree(victim)

    assert cache.find_model(MODEL, WANTED) is None
    assert cache.publish_model(MODEL, WANTED) == str(name.parent)
    assert name.read_bytes() == DATA["tokenizer.json"]
    assert tree(victim) == before


def test_planted_file_name_is_replaced(cache: BlobCache) -> None:
    """A file of other bytes, or one that nobody can read through, gives way to the link."""
    folder = Path(cache.root, "by-slug", "llama", MODEL.mdcsum)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("poison")

    assert cache.find_model(MODEL, WANTED) is None
    assert cache.publish_model(MODEL, WANTED)
    assert {name: (folder / name).read_bytes() for name in DATA} == DATA


def test_planted_temporary_name_is_not_used(
    cache: BlobCache, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should somebody guess it: the file must be new, and a link is not followed."""
    monkeypatch.setattr(os, "urandom", lambda size: bytes(size))
    guessed = Path(cache.root, "blobs", f"{Checksum.of(b'x').hex}.tmp.{os.getpid()}.{'0' * 32}")
    guessed.symlink_to(victim / "id_rsa")

    with pytest.raises(CacheError, match="File exists"):
        put(cache, b"x")
    assert (victim / "id_rsa").read_text() == "secret"
    assert guessed.is_symlink()  # it is not ours to remove


def test_collector_follows_no_link(cache: BlobCache, victim: Path) -> None:
    """Planted links go, as names; what they lead to stays."""
    clock = Clock()
    staged = ".tmp.1." + "0" * 32
    Path(cache.root, "by-slug", staged).symlink_to(victim)
    Path(cache.root, "by-slug", "evil").symlink_to(victim)
    Path(cache.root, "blobs", f"{'1' * 64}.tmp.1.x").symlink_to(victim / "id_rsa")
    Path(cache.root, "by-slug", "llama", MODEL.mdcsum, "evil").symlink_to(victim)
    Path(cache.root, "blobs", "2" * 64).symlink_to(victim / "id_rsa")
    before = tree(victim)
    clock.ahead = 3 * HOUR
    collected = BlobCache(cache.root, clock=clock).collect(max_bytes=0)

    assert (collected.models, collected.temporary_files) == ((MODEL,), 2)
    assert names(Path(cache.root, "blobs")) == []
    assert names(Path(cache.root, "by-slug")) == ["evil"]
    assert tree(victim) == before


def test_root_that_is_our_own_link(cache: BlobCache, tmp_path: Path) -> None:
    """An operator may move the cache to a larger disk."""
    (tmp_path / "link").symlink_to(cache.root)

    assert BlobCache(tmp_path / "link").find_model(MODEL, WANTED)


def test_root_that_is_a_link_of_somebody_else(
    cache: BlobCache, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    """He could point it to another place at any time."""
    (tmp_path / "link").symlink_to(cache.root)
    give_away(tmp_path / "link")

    with pytest.raises(CacheError, match="is a link that user"):
        BlobCache(tmp_path / "link")


# --- foreign owners and open doors: catalogue 29, 30


@pytest.mark.parametrize("folder", [".", "blobs", "by-slug", "by-slug/llama"])
def test_folder_of_somebody_else(cache: BlobCache, give_away: Callable[[Path], None], folder: str) -> None:
    """Its owner could put anything there; the message says what to do."""
    give_away(Path(cache.root, folder))

    with pytest.raises(CacheError, match=r"who could put anything there; .* chown it, or use another root"):
        cache.find_model(MODEL, WANTED)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702 | 0o075])
def test_root_that_everybody_may_write_to(cache: BlobCache, mode: int) -> None:
    """Sticky or not."""
    Path(cache.root).chmod(mode)

    with pytest.raises(CacheError, match="run `chmod o-w`"):
        cache.find(TOKENIZER)
    with pytest.raises(CacheError, match="run `chmod o-w`"):
        BlobCache(cache.root)


def test_folder_that_everybody_may_write_to_in_an_open_root(cache: BlobCache) -> None:
    """In a root that others may enter it counts; behind a closed one it does not."""
    Path(cache.root, "blobs").chmod(0o777)
    assert cache.find(TOKENIZER)
    Path(cache.root).chmod(0o755)

    with pytest.raises(CacheError, match="run `chmod o-w`"):
        cache.find(TOKENIZER)


def test_root_of_somebody_else_is_not_used_unasked(
    cache: BlobCache, tmp_path: Path, give_away: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was only the usual one, fetching goes on in a temporary root."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("DYN_MDC_CACHE", cache.root)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(roots, "_private", {})
    give_away(Path(cache.root))
    before = tree(Path(cache.root))
    other = BlobCache()

    assert other.root.startswith(str(tmp_path / "tmp"))
    if os.geteuid() == 0:  # else we are somebody else, who owns nothing here
        assert other.find(put(other, b"x"))
    assert tree(Path(cache.root)) == before


def test_poisoned_blob_of_somebody_else(cache: BlobCache, give_away: Callable[[Path], None]) -> None:
    """A blob that lay there before is worth what its bytes are worth."""
    checksum = Checksum.of(b"wanted")
    blob_path(cache, checksum).write_bytes(b"poison")
    if os.geteuid() == 0:
        give_away(blob_path(cache, checksum))

    assert cache.find(checksum) is None
    assert cache.find(put(cache, b"wanted"))


def test_shared_lower_cache(tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    """A lower cache may be anybody's: the operator named it, and its bytes are verified."""
    lower = BlobCache(tmp_path / "lower")
    checksum = put(lower, b"shared")
    cache = BlobCache(tmp_path / "mdc", lower=[lower.root])
    if os.geteuid() == 0:
        give_away(Path(lower.root))
    Path(lower.root).chmod(0o755)

    assert cache.find(checksum) == str(blob_path(lower, checksum))


# --- lower caches that cannot be read


@pytest.mark.parametrize("kind", ["file", "loop", "blobs are a link", "blobs are a file"])
def test_broken_lower_cache_is_empty(
    cache: BlobCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """One warning names it; what is elsewhere is found, what is not is a miss."""
    lower, further = tmp_path / "lower", BlobCache(tmp_path / "further")
    checksum = put(further, b"further")
    if kind == "file":
        lower.write_text("")
    elif kind == "loop":
        lower.symlink_to(lower)
    else:
        lower.mkdir()
        blobs = lower / "blobs"
        blobs.write_text("") if kind == "blobs are a file" else blobs.symlink_to(tmp_path)
    above = BlobCache(tmp_path / "above", lower=[lower, further.root])

    assert above.find(Checksum.of(b"nowhere")) is None
    assert above.find(checksum) == str(blob_path(further, checksum))
    assert above.publish_model(MODEL, {"x": checksum}) == above.find_model(MODEL, {"x": checksum})
    assert [f"cannot read '{lower}'" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO, errno.ENOTCONN])
@pytest.mark.parametrize("function", ["open", "stat"])
def test_lower_cache_with_a_fault_is_empty(
    cache: BlobCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    code: int,
) -> None:
    """Whatever its file system says."""
    put(BlobCache(tmp_path / "lower"), b"lower")
    above = BlobCache(tmp_path / "above", lower=[tmp_path / "lower"])
    original = getattr(os, function)
    place = str(tmp_path / "lower") if function == "open" else Checksum.of(b"lower").hex

    def refuse(path: str, *args: Any, **options: Any) -> Any:
        if path == place:
            raise OSError(code, os.strerror(code))
        return original(path, *args, **options)

    monkeypatch.setattr(os, function, refuse)
    assert above.find(Checksum.of(b"lower")) is None
    assert above.find(Checksum.of(b"lower")) is None
    assert caplog.text.count(f"cannot read '{tmp_path}/lower': {os.strerror(code)}") == 1


def test_too_few_descriptors_for_a_lower_cache(
    cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That says nothing about it, so it is no miss."""
    above = BlobCache(tmp_path / "above", lower=[cache.root])
    os_open = os.open

    def refuse(path: str, *args: Any, **options: Any) -> int:
        if path == cache.root:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return os_open(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CacheError, match="raise the limit") as caught:
        above.find(TOKENIZER)
    assert caught.value.path == cache.root


# --- file systems that are full or closed: catalogue 128


def in_namespace(folder: Path, options: str) -> list[str]:
    """Return the command before a command that lets it see a small file system at `folder`."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    command = [*unshare, "sh", "-c", mount, str(folder)]
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here")
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.decode(errors='replace').strip()}")
    return command


FULL = """
    import errno, os, sys
    from pathlib import Path
    from cache_kit import DATA, MODEL, put, put_model, temporaries
    from selfhost.errors import CacheError
    from selfhost.frontend.cache import BlobCache

    root = Path(sys.argv[1], "mdc")
    cache = BlobCache(root)
    filler = Path(sys.argv[1], "filler")
    {fill}
    try:
        put_model(cache, MODEL, {{"a.bin": os.urandom(200_000), **DATA}})
    except CacheError as err:
        assert err.errno == errno.ENOSPC and "free some space" in str(err), err
    else:
        raise SystemExit("there was space")
    assert temporaries(root) == []
    {make_room}
    put_model(cache)
"""


def test_full_disk(tmp_path: Path) -> None:
    """A typed error that says what to do, nothing left over, and the next try works."""
    script = FULL.format(fill="filler.write_bytes(bytes(400_000))", make_room="filler.unlink()")

    run_python(script, tmp_path, wrapper=in_namespace(tmp_path, "size=512k"))


def test_no_inodes_left(tmp_path: Path) -> None:
    """The same, when it is names that are missing."""
    fill = """
    filler.mkdir()
    try:
        for index in range(100): (filler / str(index)).touch()
    except OSError: pass"""
    room = "[path.unlink() for path in filler.iterdir()]"

    run_python(
        FULL.format(fill=fill, make_room=room), tmp_path, wrapper=in_namespace(tmp_path, "nr_inodes=40")
    )


def test_cache_on_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    """What is in it is found; what is not is a typed error, or goes into a root above it."""
    script = """
        import errno, os, subprocess, sys
        from cache_kit import DATA, MODEL, OTHER_MODEL, put, put_model
        from selfhost.errors import CacheError
        from selfhost.frontend.cache import BlobCache

        root = sys.argv[1] + "/mdc"
        files = put_model(BlobCache(root))
        wrong = put(BlobCache(root), b"wrong")
        path = os.path.join(root, "blobs", wrong.hex)
        os.chmod(path, 0o644)
        open(path, "w").close()
        subprocess.run(["mount", "-o", "remount,ro,bind", sys.argv[1]], check=True)
        cache = BlobCache(root)
        assert cache.find_model(MODEL, files) and BlobCache(root, verify="always").find_model(MODEL, files)
        try:
            put(cache, b"new")
        except CacheError as err:
            assert err.errno == errno.EROFS and "lower cache" in str(err), err
        else:
            raise SystemExit("written")
        assert cache.verify() == [wrong] and os.path.exists(path)
        above = BlobCache(sys.argv[2], lower=[root])
        assert above.publish_model(OTHER_MODEL, files)
        assert above.find(put(above, b"new"))
    """
    disk = tmp_path / "disk"
    disk.mkdir()

    done = run_python(script, disk, tmp_path / "above", wrapper=in_namespace(disk, "size=4m"))
    assert "it cannot be set aside: [Errno 30]" in done.stderr
    assert stat.S_IMODE((tmp_path / "above").stat().st_mode) == 0o700
