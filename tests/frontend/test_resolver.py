"""MetadataResolver: from cards to verified directories, with origins that answer out of memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import simulator
from simulator import (
    ONE_BY_ONE,
    A,
    B,
    MakeResolver,
    OriginSimulator,
    Serve,
    contents,
    extra,
    leftovers,
)

from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.slots import ModelSlot
from selfhost.errors import (
    BlobMissing,
    CacheError,
    CardError,
    ResolveError,
    SchemeNotAllowed,
    SizeLimitExceeded,
)
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver, Progress, ResolverLimits
from selfhost.frontend.transport import PATH_SCHEME, FetchLimits

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# ------------------------------------------------------------------ what comes out


def test_every_file_is_local_and_right(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], cache: BlobCache
) -> None:
    """A card with URLs becomes the same card with paths, in the directory that Dynamo would use."""
    card = serve(A, files)

    model = resolver.resolve(card)

    assert contents(model) == files
    assert model.local_dir == os.path.join(cache.root, "by-slug", card.slug, card.mdcsum)
    assert sorted(model.fetched) == sorted(files)
    assert {file.local_path for file, _ in model.card.iter_metadata_files()} == {
        os.path.join(model.local_dir, name) for name in files
    }
    assert all(file.matches(file.path) for file, _ in model.card.iter_metadata_files())
    assert model.card.mdcsum == card.mdcsum


def test_warm_makes_no_request(
    resolver: MetadataResolver,
    make_resolver: MakeResolver,
    serve: Serve,
    files: dict[str, bytes],
    origins: OriginSimulator,
) -> None:
    """What is in the cache is verified there, by this resolver and by the next one."""
    card = serve(A, files)
    first = resolver.resolve(card)
    origins.asked.clear()

    again = resolver.resolve(card)
    elsewhere = make_resolver().resolve(ModelDeploymentCard.from_json(card.to_json()))

    assert origins.asked == []
    assert again.fetched == elsewhere.fetched == ()
    assert again.card == elsewhere.card == first.card
    assert again.local_dir == elsewhere.local_dir == first.local_dir


def test_warm_only_looks(
    resolver: MetadataResolver,
    serve: Serve,
    files: dict[str, bytes],
    cache: BlobCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that is there is neither fetched nor published again: its lookup is all that is done."""
    card = serve(A, files)
    resolver.resolve(card)
    for method in ("find", "write", "lock", "publish_model"):
        monkeypatch.setattr(cache, method, lambda *args: pytest.fail("more than a look"))

    assert contents(resolver.resolve(card)) == files


def test_blobs_of_another_model_make_no_request(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """The second model of equal content gets a directory of its own and nothing is fetched."""
    first = resolver.resolve(serve(A, files))
    origins.asked.clear()

    second = resolver.resolve(serve(B, files, name="org/other"))

    assert origins.asked == []
    assert second.fetched == ()
    assert second.local_dir != first.local_dir
    assert contents(second) == files


def test_equal_content_is_fetched_once(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """One request per digest, whatever the files are called."""
    model = resolver.resolve(serve(A, {"a.txt": b"same", "b.txt": b"same", "c.txt": b"other"}))

    assert len(origins.asked) == 2
    assert contents(model) == {"a.txt": b"same", "b.txt": b"same", "c.txt": b"other"}
    assert sorted(model.fetched) == ["a.txt", "b.txt", "c.txt"]


def test_largest_file_is_fetched_first(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """What takes longest does not begin last."""
    resolver.resolve(serve(A, {"a.txt": b"a", "b.txt": b"b" * 3000, "c.txt": b"c" * 200}))

    assert [url[-5:] for url in origins.urls] == ["b.txt", "c.txt", "a.txt"]


def test_custom_template_is_fetched(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """A template that the user chose is fetched as every other file, and stays marked."""
    origins.files["http://a/my.jinja"] = b"{{ messages }}"
    slot = ModelSlot("hf_chat_template", extra("http://a/my.jinja", b"{{ messages }}"), is_custom=True)

    model = resolver.resolve(ModelDeploymentCard("m", chat_template_file=slot))

    assert contents(model) == {"my.jinja": b"{{ messages }}"}
    assert model.card.chat_template_file.is_custom
    assert model.card.chat_template_file.file.path == os.path.join(model.local_dir, "my.jinja")


def test_adapter_has_a_directory_of_its_own(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """A LoRA adapter that shares its base's files costs no request after the base."""
    base = serve(A, files)
    lora = base.derive_lora("my-adapter")
    resolver.resolve(base)
    origins.asked.clear()

    model = resolver.resolve(lora)

    assert origins.asked == []
    assert model.local_dir.split(os.sep)[-2:] == ["my-adapter", lora.mdcsum]
    assert model.card.lora == lora.lora
    assert contents(model) == files


def test_legacy_card_without_sizes(resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]) -> None:
    """A card that tells no sizes is fetched by its hashes, within the cap of such files."""
    assert contents(resolver.resolve(serve(A, files, sized=False))) == files


def test_unsized_file_is_capped(make_resolver: MakeResolver, serve: Serve, cache: BlobCache) -> None:
    """A file of unknown size may not be endless."""
    limits = ResolverLimits(fetch=FetchLimits(max_unsized_bytes=10))

    with pytest.raises(ResolveError) as caught:
        make_resolver(limits=limits).resolve(serve(A, {"config.json": b"x" * 11}, sized=False))

    assert isinstance(caught.value.__cause__, SizeLimitExceeded)
    assert leftovers(cache) == []


def test_overstated_size_is_accepted(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """A declared size is an upper bound, as in Dynamo; the hash decides."""
    origins.files["http://a/f"] = b"short"
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/f", b"short", size=1000),))

    assert contents(resolver.resolve(card)) == {"f": b"short"}


def test_understated_size_is_refused(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """Nobody takes more bytes than the card says."""
    origins.files["http://a/f"] = b"too long"
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/f", b"too long", size=3),))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.attempts[0].error, SizeLimitExceeded)


def test_empty_file_is_a_file(resolver: MetadataResolver, serve: Serve, origins: OriginSimulator) -> None:
    """A file of no bytes is fetched, kept and found like any other."""
    # catalogue 124
    card = serve(A, {"empty.txt": b"", "config.json": b"{}"})

    assert contents(resolver.resolve(card)) == {"empty.txt": b"", "config.json": b"{}"}
    assert len(origins.asked) == 2
    assert resolver.resolve(card).fetched == ()
    assert len(origins.asked) == 2


def test_card_without_files_has_an_empty_directory(
    resolver: MetadataResolver, origins: OriginSimulator
) -> None:
    """A model that needs no files is resolved, too."""
    model = resolver.resolve(ModelDeploymentCard("m"))

    assert contents(model) == {}
    assert origins.asked == []


@pytest.mark.parametrize("path", ["hf://org/m/config.json", "https://cdn/config.json", "/models/config.json"])
def test_every_scheme_with_a_transport_is_a_source(make_resolver: MakeResolver, path: str) -> None:
    """The files of a card may lie anywhere that a transport can reach; in the end they are local."""
    origins = OriginSimulator({path: b"{}"})
    table = {"hf": origins, "https": origins, PATH_SCHEME: origins}
    card = ModelDeploymentCard("m", extra_files=(extra(path, b"{}"),))

    model = make_resolver(transports=table).resolve(card)

    assert model.card.extra_files[0].path == os.path.join(model.local_dir, "config.json")
    assert contents(model) == {"config.json": b"{}"}


# ------------------------------------------------------------------ cards that ask for too much


@pytest.mark.parametrize("value", ["{}", b"{}", {}, None, 7])
def test_only_cards_are_taken(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], value: Any
) -> None:
    """Text has to be read first, and the error says by what."""
    with pytest.raises(TypeError, match=r"ModelDeploymentCard\.from_json"):
        resolver.resolve(value)
    with pytest.raises(TypeError, match=r"ModelDeploymentCard\.from_json"):
        resolver.resolve(serve(A, files), replicas=[value])


@pytest.mark.parametrize(
    "path",
    ["http://a/..%2f..%2fetc%2fcron.d%2fx", "http://a/%00", "http://a/", "http://a/CON", "http://a/a%5Cb"],
)
def test_bad_name_is_refused_before_anything_is_done(
    resolver: MetadataResolver, origins: OriginSimulator, cache: BlobCache, path: str
) -> None:
    """A card with one bad name gets nothing at all."""
    # catalogue 15
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/good", b"good"), extra(path, b"x")))

    with pytest.raises(CardError):
        resolver.resolve(card)

    assert origins.asked == []
    assert not (Path(cache.root) / "by-slug").exists()


def test_one_name_for_two_contents_is_refused(resolver: MetadataResolver, origins: OriginSimulator) -> None:
    """Two slots of one basename would overwrite each other."""
    card = ModelDeploymentCard("m", extra_files=(extra("http://a/x/f", b"1"), extra("http://a/y/f", b"2")))

    with pytest.raises(CardError, match="two files of different content"):
        resolver.resolve(card)

    assert origins.asked == []


@pytest.mark.parametrize("limits", [ResolverLimits(max_files=2), ResolverLimits(max_total_bytes=100)])
def test_too_much_is_refused(
    make_resolver: MakeResolver,
    serve: Serve,
    files: dict[str, bytes],
    origins: OriginSimulator,
    limits: ResolverLimits,
) -> None:
    """Files and bytes of a card are bounded."""
    with pytest.raises(CardError, match="at most"):
        make_resolver(limits=limits).resolve(serve(A, files))

    assert origins.asked == []


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "ftp://a/f", "data:text/plain,f"])
def test_what_no_transport_may_fetch_is_not_fetched(
    resolver: MetadataResolver, origins: OriginSimulator, path: str
) -> None:
    """A card cannot make us read our own disk, or speak anything but HTTP."""
    # catalogue 8
    card = ModelDeploymentCard("m", extra_files=(extra(path, b"x"),))

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert isinstance(caught.value.__cause__, SchemeNotAllowed)
    assert caught.value.retry_after is None
    assert origins.asked == []


# ------------------------------------------------------------------ what stops at once


class FailingCache(BlobCache):
    """A cache whose disk is full, or whose blobs are collected behind our back."""

    is_full = False
    collected = 0

    def write(self, *args: Any, **options: Any) -> Any:
        """Fail, if the disk is full."""
        if self.is_full:
            raise CacheError("no space", path=self.root, errno=errno.ENOSPC)
        return super().write(*args, **options)

    def publish_model(self, *args: Any, **options: Any) -> str:
        """Remove all blobs before, so many times."""
        if self.collected:
            self.collected -= 1
            for blob in (Path(self.root) / "blobs").iterdir():
                blob.unlink()
        return super().publish_model(*args, **options)


def resolver_with(cache: BlobCache, origins: OriginSimulator) -> MetadataResolver:
    """Return a resolver over a certain cache."""
    return MetadataResolver(cache, transports={"http": origins}, limits=ONE_BY_ONE)


def test_cache_error_stops_at_once(tmp_path: Path, serve: Serve, origins: OriginSimulator) -> None:
    """Another source would not help a full disk."""
    cache = FailingCache(tmp_path / "full")
    cache.is_full = True
    card, replica = serve(A, {"f": b"1", "g": b"2"}), serve(B, {"f": b"1", "g": b"2"})

    with pytest.raises(CacheError, match="no space"):
        resolver_with(cache, origins).resolve(card, replicas=[replica])

    assert origins.asked == []


def test_blobs_that_were_collected_meanwhile_are_fetched_again(
    tmp_path: Path, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Garbage collection between the fetch and the directory costs another fetch."""
    cache = FailingCache(tmp_path / "collected")
    cache.collected = 2

    assert contents(resolver_with(cache, origins).resolve(serve(A, files))) == files
    assert len(origins.asked) == 3 * len(files)


def test_blobs_that_never_stay_are_given_up(
    tmp_path: Path, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Who collects everything all the time is to be heard of."""
    cache = FailingCache(tmp_path / "collected")
    cache.collected = 10

    with pytest.raises(BlobMissing):
        resolver_with(cache, origins).resolve(serve(A, files))

    assert len(origins.asked) == 3 * len(files)


def test_defect_of_a_transport_is_not_hidden(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator, cache: BlobCache
) -> None:
    """An error that transports do not raise is a defect, and ends the resolve as it is."""

    def crash(transfer: simulator.Transfer) -> None:
        raise ZeroDivisionError

    card, replica = serve(A, {"f": b"1"}), serve(B, {"f": b"1"})
    origins.script("http://a:9090", crash)

    with pytest.raises(ZeroDivisionError):
        resolver.resolve(card, replicas=[replica])

    assert len(origins.asked) == 1
    assert leftovers(cache) == []


# ------------------------------------------------------------------ progress


def test_progress_ends_with_everything(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]
) -> None:
    """The numbers grow to the declared totals; a warm resolve has nothing to tell."""
    told: list[Progress] = []
    card = serve(A, files)

    resolver.resolve(card, progress=told.append)
    count = len(told)
    resolver.resolve(card, progress=told.append)

    total = sum(map(len, files.values()))
    assert (told[-1].done_bytes, told[-1].total_bytes) == (total, total)
    assert (told[-1].done_files, told[-1].total_files) == (len(files), len(files))
    assert [progress.done_bytes for progress in told] == sorted(progress.done_bytes for progress in told)
    assert len(told) == count


def test_progress_counts_only_what_is_fetched(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """Files that are in the cache are neither done nor to do."""
    told: list[Progress] = []
    resolver.resolve(serve(A, {"old": b"x" * 5000}))

    resolver.resolve(serve(A, {"old": b"x" * 5000, "new": b"y" * 300}), progress=told.append)

    assert {(progress.filename, progress.total_bytes, progress.total_files) for progress in told} == {
        ("new", 300, 1)
    }


def test_progress_goes_back_when_a_transfer_starts_over(
    resolver: MetadataResolver, serve: Serve, origins: OriginSimulator
) -> None:
    """What was thrown away is not done."""
    told: list[Progress] = []
    card, replica = serve(A, {"f": b"x" * 5000}), serve(B, {"f": b"x" * 5000})
    origins.script("http://a:9090", simulator.gives(b"y" * 5000))

    resolver.resolve(card, replicas=[replica], progress=told.append)

    done = [progress.done_bytes for progress in told]
    assert done[:7] == [1000, 2000, 3000, 4000, 5000, 0, 1000]
    assert done[-1] == 5000


class SharedCache(BlobCache):
    """A cache into which another process has put the blob by the time a lock is granted."""

    data = b""

    def lock(self, checksum: Checksum, **options: Any) -> Any:
        """Put the blob there first."""
        with self.write(checksum) as writer:
            writer.write(self.data)
            writer.publish("another process")
        return super().lock(checksum, **options)


@pytest.mark.parametrize("sized", [True, False])
def test_file_that_another_process_brought_is_done(
    tmp_path: Path, serve: Serve, origins: OriginSimulator, sized: bool
) -> None:
    """Whoever waited for the lock looks again before asking, and counts the bytes that are there."""
    told: list[Progress] = []
    cache = SharedCache(tmp_path / "shared")
    cache.data = b"x" * 5000
    resolver = MetadataResolver(cache, transports={"http": origins})

    model = resolver.resolve(serve(A, {"f": b"x" * 5000}, sized=sized), progress=told.append)

    assert origins.asked == []
    assert model.fetched == ()
    assert [(progress.done_bytes, progress.done_files) for progress in told] == [(5000, 1)]


def test_progress_that_fails_stops_nothing(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]
) -> None:
    """A display that breaks costs its display."""

    def display(progress: Progress) -> None:
        raise OSError("no terminal")

    assert contents(resolver.resolve(serve(A, files), progress=display)) == files
