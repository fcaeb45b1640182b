"""Content that processes share: kept once, checked before it is served, never wrong, bounded per process."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import TIMEOUT, open_descriptors, poll_until, wait_for_tick
from werkzeug.test import Client

from selfhost.errors import RegistrationError
from selfhost.worker import shared_content
from selfhost.worker.app import MetadataApp
from selfhost.worker.content import pin_bytes, pin_file
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer
from selfhost.worker.shared_content import SharedContent

MakeFile = Callable[[str, bytes], str]
PATH = "/v1/metadata/m/_base/f"
SMALL, LARGE = b"small", os.urandom(200_000)


@pytest.fixture
def registry(shared: Callable[[], MetadataArtifactRegistry]) -> MetadataArtifactRegistry:
    """Return a registry on the folder, which the fixtures of servers use."""
    return shared()


def content_of(registry: MetadataArtifactRegistry, target: str = PATH) -> SharedContent:
    """Return what answers a URL."""
    artifact = registry.lookup(target)
    assert artifact is not None
    assert isinstance(artifact.content, SharedContent)
    return artifact.content


def path_of(folder: str, data: bytes) -> str:
    """Return the path of a content in the folder."""
    return f"{folder}/content/{pin_bytes(data).hex}"


def overwrite(path: str, data: bytes = b"!") -> None:
    """Change the first bytes of a file in its place, with a new mtime, as its owner can."""
    wait_for_tick()
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.write(data)


def truncate(path: str) -> None:
    """Shorten a file."""
    os.chmod(path, 0o600)
    os.truncate(path, 2)


def replace(path: str) -> None:
    """Put another file of the same size in the place."""
    size = os.stat(path).st_size
    Path(f"{path}2").write_bytes(b"?" * size)
    os.replace(f"{path}2", path)


HARMS = pytest.mark.parametrize("harm", [overwrite, truncate, replace, os.unlink])


# ------------------------------------------------------------------ kept once


@pytest.mark.parametrize("data", [SMALL, LARGE, b"", bytes(64 * 1024), bytes(64 * 1024 + 1)], ids=len)
def test_content_is_kept_once_per_host(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, make_file: MakeFile, data: bytes
) -> None:
    """However many register it, under whatever key, there is one file, and every process reads it."""
    one, other = shared(), shared()
    if data:
        one.register("m", "_base", "f", make_file("f", data))
    one.register("m", "_base", "f", pin_bytes(data))
    other.register("n", "_base", "g", pin_bytes(bytes(data)))

    assert os.listdir(f"{folder}/content") == [pin_bytes(data).hex]
    assert Path(path_of(folder, data)).read_bytes() == data
    for registry in (one, other):
        content = content_of(registry)
        assert (content.size, content.checksum) == (len(data), pin_bytes(data).checksum)
        assert content.read(0, len(data)) == data
        assert content.read(1, 3) == data[1:3] or not data
        assert content.is_intact()


def test_large_content_takes_no_memory_of_a_process(
    shared: Callable[[], MetadataArtifactRegistry], make_file: MakeFile
) -> None:
    """Neither who registered it nor who serves it has the bytes; small content is in memory when served."""
    one, other = shared(), shared()
    registration = one.register_files("m", "_base", {"f": make_file("f", LARGE), "g": make_file("g", SMALL)})

    assert [one.content.data for one in registration.artifacts] == [None, SMALL]
    assert content_of(other).data is None
    assert content_of(other).sealed() is None
    assert content_of(other, "/v1/metadata/m/_base/g").data == SMALL
    assert other.pinned_bytes == len(LARGE) + len(SMALL)


def test_content_goes_with_its_last_registration(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """Whoever closes last removes the file; a newcomer of the same content puts it there again."""
    one, other = shared(), shared()
    first = one.register("m", "_base", "f", pin_bytes(LARGE))
    second = other.register("n", "_base", "f", pin_bytes(LARGE))
    first.close()
    assert content_of(other, "/v1/metadata/n/_base/f").read(0, len(LARGE)) == LARGE
    second.close()
    assert os.listdir(f"{folder}/content") == []
    other.register("m", "_base", "f", pin_bytes(LARGE))

    assert content_of(one).read(0, len(LARGE)) == LARGE


def test_reader_in_flight_goes_on(shared: Callable[[], MetadataArtifactRegistry], folder: str) -> None:
    """An answer that has begun ends, although nothing is registered any more."""
    one, other = shared(), shared()
    registration = one.register("m", "_base", "f", pin_bytes(LARGE))
    content = content_of(other)
    assert content.is_intact()  # as every answer asks first
    registration.close()

    assert os.listdir(f"{folder}/content") == []
    assert other.is_empty()
    assert content.read(0, len(LARGE)) == LARGE


@pytest.mark.parametrize(("kept_bytes", "open_files"), [(16 * 1024 * 1024, 64), (0, 0)])
def test_file_that_others_remove_while_it_is_registered_is_written_again(
    shared: Callable[[], MetadataArtifactRegistry],
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    kept_bytes: int,
    open_files: int,
) -> None:
    """Between putting a file there and registering it, its last registration may go, and the file with it."""
    monkeypatch.setattr(shared_content, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(shared_content, "OPEN_FILES", open_files)
    one, other = shared(), shared()
    others = [other.register("m", "_base", "f", pin_bytes(data)) for data in (SMALL, LARGE)]
    real = one._shared._add

    def add(*args: Any) -> Any:
        for registration in others:
            registration.close()
        assert os.listdir(f"{folder}/content") == []
        return real(*args)

    monkeypatch.setattr(one._shared, "_add", add)
    one.register_files("m", "_base", {"f": pin_bytes(SMALL), "g": pin_bytes(LARGE)})

    assert content_of(other).read(0, len(SMALL)) == SMALL
    assert content_of(other, "/v1/metadata/m/_base/g").read(0, len(LARGE)) == LARGE


def test_threads_that_share_content_do_not_lose_it(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """While some register what others take out, each has its file, with the right bytes."""
    registries = shared(), shared()

    def work(number: int) -> None:
        registry = registries[number % 2]
        for _ in range(30):
            with registry.register("m", "_base", f"f{number}", pin_bytes(LARGE)) as registration:
                (artifact,) = registration.artifacts
                assert artifact.content.read(0, len(LARGE)) == LARGE

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))

    assert os.listdir(f"{folder}/content") == []


def test_one_object_per_content(
    shared: Callable[[], MetadataArtifactRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that ask at once, one that registers it and one that reads of it, have the same."""
    store = shared()._shared._replica.store
    threads: list[threading.Thread] = []
    found = []

    class Interrupted(SharedContent):
        __slots__ = ()

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if not threads:
                threads.append(threading.Thread(target=lambda: found.append(store.get("0" * 64, 7))))
                threads[0].start()
                assert poll_until(lambda: bool(found) or store.lock._is_owned(), TIMEOUT)

    monkeypatch.setattr(shared_content, "SharedContent", Interrupted)
    content = store.get("0" * 64, 7)
    threads[0].join()

    assert found == [content]


def test_registering_within_a_registration(
    registry: MetadataArtifactRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler of the host's comes at any moment, and must not wait for what it has interrupted."""
    make = SharedContent.__init__

    def make_and_interrupt(*args: Any) -> None:
        monkeypatch.undo()
        make(*args)
        registry.register("n", "_base", "f", pin_bytes(b"inner"))

    monkeypatch.setattr(SharedContent, "__init__", make_and_interrupt)
    thread = threading.Thread(
        target=registry.register, args=("m", "_base", "f", pin_bytes(b"outer")), daemon=True
    )
    thread.start()
    thread.join(TIMEOUT)

    assert not thread.is_alive()
    assert [content_of(registry, f"/v1/metadata/{slug}/_base/f").read(0, 5) for slug in "mn"] == [
        b"outer",
        b"inner",
    ]


def test_file_that_is_registered_is_not_removed(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted follows from what is registered, whatever else this process knows of the content."""
    one, other = shared(), shared()
    mine = one.register("m", "_base", "f", pin_bytes(LARGE))
    other.register("m", "_base", "f", pin_bytes(LARGE))
    content_of(one).users = 0
    one._shared._replica.store._known.clear()
    mine.close()
    shared()  # removes what nobody has registered

    assert content_of(other).read(0, len(LARGE)) == LARGE
    assert os.listdir(f"{folder}/content") == [pin_bytes(LARGE).hex]


def test_file_above_the_limit_of_pinning_is_copied(folder: str, make_file: MakeFile) -> None:
    """What a plain registry would hold open lies in the folder: no edit of the source reaches it."""
    path = make_file("f", LARGE)
    with contextlib.closing(MetadataArtifactRegistry(shared=folder, max_pinned_bytes=0)) as registry:
        registry.register("m", "_base", "f", path)
        overwrite(path)
        os.unlink(path)

        assert content_of(registry).read(0, len(LARGE)) == LARGE


def test_held_file_that_changed_is_refused(
    registry: MetadataArtifactRegistry, folder: str, make_file: MakeFile
) -> None:
    """What is no longer what was hashed is not copied."""
    path = make_file("f", LARGE)
    content = pin_file(path, max_pinned_bytes=0)
    overwrite(path)
    with pytest.raises(RegistrationError):
        registry.register("m", "_base", "f", content)

    assert (os.listdir(f"{folder}/content"), registry.is_empty()) == ([], True)


def test_content_moves_between_registries(
    shared: Callable[[], MetadataArtifactRegistry], tmp_path: Path
) -> None:
    """Shared content can be registered anywhere; elsewhere it does not depend on the folder."""
    one, other = shared(), shared()
    plain = MetadataArtifactRegistry()
    with one.register_files("m", "_base", {"f": pin_bytes(SMALL), "g": pin_bytes(LARGE)}) as registration:
        contents = {artifact.filename: artifact.content for artifact in registration.artifacts}
        again = other.register_files("n", "_base", contents)
        elsewhere = plain.register_files("n", "_base", contents)

    for registered in (again, elsewhere):
        found = [artifact.content for artifact in registered.artifacts]
        assert [content.read(0, content.size) for content in found] == [SMALL, LARGE]


def test_content_that_is_gone_cannot_be_registered(shared: Callable[[], MetadataArtifactRegistry]) -> None:
    """Whoever kept the content and not the registration is told to read the file again."""
    one, other = shared(), shared()
    registration = one.register("m", "_base", "f", pin_bytes(LARGE))
    content = content_of(other)
    registration.close()
    for registry in (other, MetadataArtifactRegistry()):
        with pytest.raises(RegistrationError, match="No such file or directory"):
            registry.register("m", "_base", "f", content)


# ------------------------------------------------------------------ checked


@HARMS
@pytest.mark.parametrize("is_known", [True, False], ids=["read before", "not yet read"])
def test_harmed_content_is_never_served(
    shared: Callable[[], MetadataArtifactRegistry],
    folder: str,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[str], None],
    is_known: bool,
) -> None:
    """Nothing but the right bytes comes out of a file that somebody changed; the log says so once."""
    one, other = shared(), shared()
    one.register("m", "_base", "f", pin_bytes(LARGE))
    content = content_of(other)
    assert not is_known or content.read(0, 10) == LARGE[:10]
    harm(path_of(folder, LARGE))

    if is_known and harm in (replace, os.unlink):  # the open file is the right one
        assert content.is_intact()
        assert content.read(0, len(LARGE)) == LARGE
        return
    assert [content.is_intact(), content.is_intact(), content.data] == [False, False, None]
    with pytest.raises(OSError) as caught:
        content.read(0, len(LARGE))
    assert caught.value.errno in (errno.ESTALE, errno.ENOENT)
    assert caplog.text.count("is no longer served") == 1


@HARMS
def test_harmed_small_content(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, harm: Callable[[str], None]
) -> None:
    """Who has the bytes in memory serves them, who has not serves nothing."""
    one, other, third = shared(), shared(), shared()
    one.register("m", "_base", "f", pin_bytes(SMALL))
    assert content_of(other).data == SMALL
    harm(path_of(folder, SMALL))

    assert (content_of(other).is_intact(), content_of(other).data) == (True, SMALL)
    assert (content_of(third).is_intact(), content_of(third).data) == (False, None)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@HARMS
def test_registering_again_heals(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, data: bytes, harm: Callable[[str], None]
) -> None:
    """Whoever registers the content anew puts a right file there, and all serve it again."""
    one, other, third = shared(), shared(), shared()
    one.register("m", "_base", "f", pin_bytes(data))
    harm(path_of(folder, data))
    assert not content_of(third).is_intact()
    other.register("m", "_base", "f", pin_bytes(data))

    for registry in (one, other, third):
        assert content_of(registry).is_intact()
        assert content_of(registry).read(0, len(data)) == data
    assert Path(path_of(folder, data)).read_bytes() == data


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_harmed_content_is_an_error(
    shared: Callable[[], MetadataArtifactRegistry],
    server: SystemStatusServer,
    connect: Any,
    folder: str,
    data: bytes,
) -> None:
    """App and server answer 500 and say nothing of it; what is right they serve."""
    shared().register_files("m", "_base", {"f": pin_bytes(data), "g": pin_bytes(LARGE + SMALL)})
    overwrite(path_of(folder, data))
    for path, status, body in (
        (PATH, 500, b"Failed to read file\n"),
        ("/v1/metadata/m/_base/g", 200, LARGE + SMALL),
    ):
        response = Client(MetadataApp(server.registry)).get(path)
        answer = connect(server).get(path).answer()
        assert (response.status_code, response.data) == (status, body)
        assert (answer.status, answer.body) == (status, body)


def test_change_while_it_is_sent(
    shared: Callable[[], MetadataArtifactRegistry], server: SystemStatusServer, connect: Any, folder: str
) -> None:
    """The connection ends short of the promised length, with nothing but what was registered."""
    data = LARGE * 40
    shared().register("m", "_base", "f", pin_bytes(data))
    client = connect(server, receive_buffer=4096).get(PATH)
    start = client.read_some(1000)
    overwrite(path_of(folder, data), b"!" * len(data))
    body = (start + client.rest()).partition(b"\r\n\r\n")[2]

    assert len(body) < len(data)
    assert data.startswith(body)


def test_content_is_hashed_once_per_process(
    shared: Callable[[], MetadataArtifactRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, closing and opening again compares stamps; who wrote the file need not hash it at all."""
    hashed = []
    real = shared_content.hash_fd
    monkeypatch.setattr(shared_content, "hash_fd", lambda *args: hashed.append(args) or real(*args))
    one, other = shared(), shared()
    one.register("m", "_base", "f", pin_bytes(LARGE))
    for _ in range(3):
        for registry in (one, other):
            assert content_of(registry).read(0, len(LARGE)) == LARGE
            content_of(registry).forget_file()

    assert len(hashed) == 1


# ------------------------------------------------------------------ bounded


def test_few_files_are_open(shared: Callable[[], MetadataArtifactRegistry]) -> None:
    """Who serves hundreds of large contents has few descriptors, and serves them all."""
    one, other = shared(), shared()
    contents = {f"f{number}": pin_bytes(b"%d" % number + LARGE) for number in range(200)}
    before = open_descriptors()
    one.register_files("m", "_base", contents)
    for _ in range(2):
        for name, content in contents.items():
            found = content_of(other, f"/v1/metadata/m/_base/{name}")
            assert found.read(0, 5) == content.read(0, 5)

    assert open_descriptors() <= before + 2 * shared_content.OPEN_FILES + 1


def test_memory_for_small_contents_is_bounded(
    shared: Callable[[], MetadataArtifactRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound they are read from the folder; what goes makes room for others."""
    monkeypatch.setattr(shared_content, "KEPT_BYTES", 10_000)
    one, other = shared(), shared()
    contents = [b"%03d" % number * 1_000 for number in range(10)]
    registrations = [
        one.register("m", "_base", f"f{number}", pin_bytes(data)) for number, data in enumerate(contents)
    ]
    for registry in (one, other):
        found = [content_of(registry, f"/v1/metadata/m/_base/f{number}") for number in range(10)]
        assert [content.read(0, content.size) for content in found] == contents
        assert sum(content.data is not None for content in found) == 3
        assert all(content.is_intact() for content in found)
    del found
    for registration in registrations[:-1]:
        registration.close()
    del registrations[:-1], registration

    assert content_of(other, "/v1/metadata/m/_base/f9").data == contents[9]
