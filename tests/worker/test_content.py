"""Pinned content: what is served is what was hashed, whatever becomes of the file, and nothing leaks."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
from blake3 import blake3
from helpers import wait_for_tick
from werkzeug.test import Client

from selfhost.card.checksum import MAX_FILE_BYTES
from selfhost.errors import RegistrationError
from selfhost.worker import content as module
from selfhost.worker.app import MetadataApp
from selfhost.worker.content import HeldFile, MemoryContent, pin_bytes, pin_file
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

MakeFile = Callable[[str, bytes], str]
DATA = bytes(range(251)) * 2000  # half a megabyte: neither small nor sent in one piece
PATH = "/v1/metadata/m/_base/f"


def overwrite(path: str) -> None:
    """Change a byte in place."""
    with open(path, "r+b") as file:
        file.seek(len(DATA) // 2)
        file.write(b"!")


def truncate(path: str) -> None:
    """Cut the file to half."""
    os.truncate(path, len(DATA) // 2)


def append(path: str) -> None:
    """Let the file grow."""
    with open(path, "ab") as file:
        file.write(b"more")


def replace(path: str) -> None:
    """Put another file of the same size under the name."""
    Path(path + ".new").write_bytes(b"x" * len(DATA))
    os.replace(path + ".new", path)


def become_fifo(path: str) -> None:
    """Put a FIFO there, which nobody writes to."""
    os.unlink(path)
    os.mkfifo(path)


def become_directory(path: str) -> None:
    """Put a directory there."""
    os.unlink(path)
    os.mkdir(path)


MUTATIONS = [overwrite, truncate, append, replace, os.unlink, become_fifo, become_directory]
IN_PLACE = [overwrite, truncate, append]

mutations = pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
mutations_in_place = pytest.mark.parametrize("mutate", IN_PLACE, ids=lambda f: f.__name__)


# ------------------------------------------------------------------ pinned in memory


@pytest.mark.parametrize("size", [0, 1, 16 << 10, 64 << 10, (64 << 10) + 1, 127_999, 128_001, 5 << 20])
def test_checksum_is_of_what_is_kept(make_file: MakeFile, size: int) -> None:
    """Bytes, size and digest belong together, whichever way they were read."""  # catalogue 98
    data = (DATA * 11)[:size]
    content = pin_file(make_file("f", data))

    assert isinstance(content, MemoryContent)
    assert (content.size, content.checksum.hex) == (size, blake3(data).hexdigest())
    assert content.read(0, size) == data
    assert content.read(size // 3, size // 2) == data[size // 3 : size // 2]


@mutations
def test_app_serves_what_was_hashed(
    make_file: MakeFile, registry: MetadataArtifactRegistry, mutate: Callable[[str], None]
) -> None:
    """Whatever becomes of the file, the app's answer stays."""  # catalogue 34, 35
    path = make_file("f", DATA)
    registry.register("m", "_base", "f", path)
    mutate(path)
    response = Client(MetadataApp(registry)).get(PATH)

    assert (response.status_code, response.data) == (200, DATA)


@mutations
def test_server_serves_what_was_hashed(
    make_file: MakeFile, server: SystemStatusServer, connect: Any, mutate: Callable[[str], None]
) -> None:
    """Whatever becomes of the file, the embedded server's answers stay, small or large."""
    small = make_file("small", b"small")
    large = make_file("f", DATA)
    server.registry.register_files("m", "_base", {"small": small, "f": large})
    mutate(small)
    mutate(large)
    client = connect(server)

    assert client.get("/v1/metadata/m/_base/small").answer().body == b"small"
    assert client.get(PATH).answer().body == DATA


def test_change_while_it_is_sent(make_file: MakeFile, server: SystemStatusServer, connect: Any) -> None:
    """An overwrite in the middle of an answer changes nothing of it."""  # catalogue 35
    data = DATA * 30
    path = make_file("f", data)
    server.registry.register("m", "_base", "f", path)
    client = connect(server, receive_buffer=4096).get(PATH, "Connection: close")
    start = client.read_some(1000)
    Path(path).write_bytes(b"!" * len(data))

    assert (start + client.rest()).endswith(b"\r\n\r\n" + data)


def test_file_that_grows_while_it_is_read_is_consistent(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file that grows between two calls is read again, and the digest is of what is kept."""
    path = make_file("f", b"short")
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        monkeypatch.undo()
        append(path)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    content = pin_file(path)

    assert content.read(0, content.size) == b"shortmore"
    assert content.checksum.hex == blake3(b"shortmore").hexdigest()


@pytest.mark.parametrize("max_pinned_bytes", [1 << 20, 0], ids=["memory", "held"])
@mutations_in_place
def test_change_while_it_is_read_is_refused(
    make_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
    leaves_nothing: None,
    mutate: Callable[[str], None],
    max_pinned_bytes: int,
) -> None:
    """A file that changes between its stat and the last of its bytes is not registered."""
    path = make_file("f", DATA)
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        found = real(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != len(DATA):
            return found
        monkeypatch.undo()
        wait_for_tick()
        mutate(path)
        return found

    monkeypatch.setattr(module.os, "fstat", fstat)
    with pytest.raises(OSError) as caught:
        pin_file(path, max_pinned_bytes=max_pinned_bytes)

    assert caught.value.errno == errno.EBUSY


# ------------------------------------------------------------------ sealed files


def test_sealed_file_cannot_change() -> None:
    """Nobody can write to, shrink, grow, map for writing or unseal what sendfile sends."""
    sealed = pin_bytes(DATA).sealed()
    assert sealed is not None
    fd = sealed.fd

    for attempt in (
        lambda: os.pwrite(fd, b"!", 0),
        lambda: os.ftruncate(fd, 10),
        lambda: os.ftruncate(fd, len(DATA) + 1),
        lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE | mmap.PROT_READ),
        lambda: write_again(fd),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
    ):
        with pytest.raises(PermissionError):
            attempt()
    assert os.pread(fd, len(DATA) + 1, 0) == DATA


def write_again(fd: int) -> None:
    """Open the sealed file anew, as another process of this user could, and write."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        os.write(again, b"!")
    finally:
        os.close(again)


def test_bytes_are_held_once() -> None:
    """When the sealed file has the bytes, the process no longer has, and reads go on."""
    content = pin_bytes(DATA)
    sealed = content.sealed()

    assert content.sealed() is sealed
    assert content.data is None
    assert content.read(0, len(DATA)) == DATA
    assert content.read(7, 9) == DATA[7:9]


def test_threads_that_seal_at_once_all_get_a_file(leaves_nothing: None) -> None:
    """Each gets a file that stays open while it holds it, and a reader never sees a gap."""
    start = threading.Barrier(8)

    def ask(content: MemoryContent) -> tuple[Any, bool]:
        start.wait()
        return content.sealed(), content.read(0, len(DATA)) == DATA

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, [pin_bytes(DATA)] * 8))
    assert [os.pread(sealed.fd, len(DATA), 0) for sealed, _ in results] == [DATA] * 8
    assert all(whole for _, whole in results)


def fail(*_: object) -> int:
    """Stand for a system call that a sandbox forbids."""
    raise OSError(errno.ENOSYS, "not here")


@pytest.mark.parametrize(
    "hinder",
    [
        lambda patch: patch.delattr(os, "memfd_create"),
        lambda patch: patch.delattr(os, "sendfile"),
        lambda patch: patch.setattr(os, "memfd_create", fail),
        lambda patch: patch.setattr(os, "write", fail),
        lambda patch: patch.setattr(module, "_add_seals", fail),
        lambda patch: patch.setattr(module, "MAX_SEALED_FILES", 0),
    ],
    ids=["no memfd", "no sendfile", "memfd fails", "no memory", "no seals", "enough of them"],
)
def test_memory_serves_where_nothing_can_be_sealed(
    monkeypatch: pytest.MonkeyPatch, leaves_nothing: None, hinder: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Without a sealed file there is no descriptor to send from, and the bytes stay readable."""
    content = pin_bytes(DATA)
    hinder(monkeypatch)
    sealed = content.sealed()
    monkeypatch.undo()

    assert sealed is None
    assert content.read(0, len(DATA)) == DATA


# ------------------------------------------------------------------ held files


def test_limit_decides_what_is_held(make_file: MakeFile) -> None:
    """Up to the limit bytes are kept, above it a descriptor."""
    path = make_file("f", DATA)

    assert isinstance(pin_file(path, max_pinned_bytes=len(DATA)), MemoryContent)
    assert isinstance(pin_file(path, max_pinned_bytes=len(DATA) - 1), HeldFile)


def test_held_file_reads_what_was_hashed(make_file: MakeFile) -> None:
    """As long as the file stays, a held file is as good as memory."""
    content = pin_file(make_file("f", DATA), max_pinned_bytes=0)

    assert content.is_intact()
    assert (content.size, content.checksum.hex) == (len(DATA), blake3(DATA).hexdigest())
    assert content.read(0, len(DATA)) == DATA
    assert content.read(100, 200) == DATA[100:200]
    assert (content.sealed(), content.data) == (None, None)


@pytest.mark.parametrize(
    "touch",
    [
        replace,
        os.unlink,
        become_fifo,
        become_directory,
        lambda p: os.chmod(p, 0),
        lambda p: os.link(p, p + "2"),
    ],
    ids=["replace", "unlink", "fifo", "directory", "chmod", "link"],
)
def test_held_file_outlives_its_name(make_file: MakeFile, touch: Callable[[str], None]) -> None:
    """What becomes of the name, the mode or the links changes no byte of the open file."""
    path = make_file("f", DATA)
    content = pin_file(path, max_pinned_bytes=0)
    wait_for_tick()
    touch(path)

    assert content.is_intact()
    assert content.read(0, len(DATA)) == DATA


def test_changed_held_file_is_reported_once(make_file: MakeFile, caplog: pytest.LogCaptureFixture) -> None:
    """The operator is told which file it was and what to do, not at every request."""
    path = make_file("f", DATA)
    content = pin_file(path, max_pinned_bytes=0)
    wait_for_tick()
    overwrite(path)

    assert [content.is_intact(), content.is_intact()] == [False, False]
    assert caplog.text.count("is no longer served") == 1
    assert path in caplog.text


@mutations_in_place
def test_held_file_notices_a_change(make_file: MakeFile, mutate: Callable[[str], None]) -> None:
    """No byte comes out of a file that is not what was hashed."""
    path = make_file("f", DATA)
    content = pin_file(path, max_pinned_bytes=0)
    wait_for_tick()
    mutate(path)

    assert not content.is_intact()
    with pytest.raises(OSError) as caught:
        content.read(0, len(DATA))
    assert caught.value.errno in (errno.ESTALE, errno.EIO)


@mutations_in_place
def test_changed_held_file_is_an_error(
    make_file: MakeFile, server: SystemStatusServer, connect: Any, mutate: Callable[[str], None]
) -> None:
    """App and server answer 500 for a held file that has changed, and say nothing of it."""
    path = make_file("f", DATA)
    server.registry.register("m", "_base", "f", pin_file(path, max_pinned_bytes=0))
    assert connect(server).get(PATH).answer().body == DATA
    wait_for_tick()
    mutate(path)
    response = Client(MetadataApp(server.registry)).get(PATH)
    answer = connect(server).get(PATH).answer()

    assert (response.status_code, response.data) == (500, b"Failed to read file\n")  # catalogue 95
    assert (answer.status, answer.body) == (500, b"Failed to read file\n")


def test_app_aborts_when_a_held_file_changes(make_file: MakeFile, registry: MetadataArtifactRegistry) -> None:
    """The iterator raises in place of the first piece that is not what was hashed."""
    path = make_file("f", DATA)
    registry.register("m", "_base", "f", pin_file(path, max_pinned_bytes=0))
    response = Client(MetadataApp(registry)).get(PATH, buffered=False)
    pieces = response.iter_encoded()
    first = next(pieces)
    wait_for_tick()
    overwrite(path)

    assert DATA.startswith(first)
    with pytest.raises(OSError):
        list(pieces)
    response.close()


@mutations_in_place
def test_server_aborts_when_a_held_file_changes(
    make_file: MakeFile,
    server: SystemStatusServer,
    connect: Any,
    caplog: pytest.LogCaptureFixture,
    mutate: Callable[[str], None],
) -> None:
    """The connection ends short of the promised length, with nothing but what was hashed."""
    caplog.set_level(logging.CRITICAL, "selfhost.worker")  # a record kept by pytest keeps the descriptor
    data = DATA * 50
    path = make_file("f", data)
    server.registry.register("m", "_base", "f", pin_file(path, max_pinned_bytes=0))
    client = connect(server, receive_buffer=4096).get(PATH)
    start = client.read_some(1000)
    wait_for_tick()
    mutate(path)
    body = (start + client.rest()).partition(b"\r\n\r\n")[2]

    assert len(body) < len(data)
    assert data.startswith(body)


# ------------------------------------------------------------------ what cannot be pinned


def socket_file(path: Path) -> str:
    """Make a socket and return its path."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return str(path)


def fifo(path: Path) -> str:
    """Make a FIFO and return its path."""
    os.mkfifo(path)
    return str(path)


def link_to(target: str) -> Callable[[Path], str]:
    """Return what makes a symbolic link."""

    def make(path: Path) -> str:
        path.symlink_to(target)
        return str(path)

    return make


UNSERVABLE: list[tuple[str, Callable[[Path], str]]] = [
    ("missing", lambda path: str(path)),
    ("directory", lambda path: str(path.parent)),
    ("fifo", fifo),
    ("socket", socket_file),
    ("endless device", lambda path: "/dev/zero"),
    ("empty device", lambda path: "/dev/null"),
    ("terminal", lambda path: "/dev/ptmx"),
    ("broken link", link_to("nowhere")),
    ("loop", link_to("f")),
    ("link to a device", link_to("/dev/zero")),
    ("link to a directory", link_to(".")),
    ("below a file", lambda path: f"{__file__}/f"),
    ("empty path", lambda path: ""),
    ("NUL", lambda path: f"{path}\0"),
    ("surrogate", lambda path: f"{path}\ud800"),
    ("long", lambda path: f"{path}{'x' * 300}"),
    ("lying size", lambda path: "/proc/self/status"),
]


@pytest.mark.parametrize("make", [make for _, make in UNSERVABLE], ids=[name for name, _ in UNSERVABLE])
def test_what_is_no_regular_file_is_refused(
    make_file: MakeFile, registry: MetadataArtifactRegistry, tmp_path: Path, leaves_nothing: None, make: Any
) -> None:
    """A typed error at once, and nothing of the model is registered."""  # catalogue 99
    good, bad = make_file("good", b"unlike any other content"), make(tmp_path / "f")
    with pytest.raises(RegistrationError) as caught:
        registry.register_files("m", "_base", {"good": good, "bad": bad, "last": good})

    assert (caught.value.slug, caught.value.suffix, caught.value.filename) == ("m", "_base", "bad")
    assert repr(bad) in str(caught.value)
    assert (registry.is_empty(), len(registry), registry.pinned_bytes) == (True, 0, 0)


def test_file_that_may_not_be_read_is_refused(run_script: Any) -> None:
    """Permission denied is one more typed error."""  # catalogue 99
    done = run_script("""
        import os, tempfile
        from selfhost.worker.registry import MetadataArtifactRegistry, RegistrationError
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o755)
            path = os.path.join(directory, "f")
            os.close(os.open(path, os.O_CREAT, 0))
            uid = os.geteuid()
            if uid == 0:
                os.seteuid(65534)
            registry = MetadataArtifactRegistry()
            try:
                registry.register("m", "_base", "f", path)
            except RegistrationError as error:
                print(error.reason.partition(": ")[2], registry.is_empty())
            os.seteuid(uid)
    """)

    assert (done.stdout, done.stderr) == ("Permission denied True\n", "")


def test_file_that_no_frontend_takes_is_refused(tmp_path: Path, leaves_nothing: None) -> None:
    """Above 1 GiB nothing is read at all."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match="no frontend takes more") as caught:
        pin_file(str(path))

    assert caught.value.errno == errno.EFBIG


# ------------------------------------------------------------------ nothing stays behind


@pytest.mark.parametrize("max_pinned_bytes", [1 << 20, 0], ids=["memory", "held"])
def test_descriptors_go_with_the_last_reference(
    make_file: MakeFile, leaves_nothing: None, max_pinned_bytes: int
) -> None:
    """Pinning, sealing and letting go a hundred times leaves nothing open."""  # catalogue 93
    path = make_file("f", DATA)
    for _ in range(100):
        content = pin_file(path, max_pinned_bytes=max_pinned_bytes)
        content.sealed()
    del content


def test_unregistered_content_gives_its_descriptor_back(
    make_file: MakeFile, server: SystemStatusServer, connect: Any, wait_until: Any
) -> None:
    """A sealed file is closed when the model that needed it is gone."""
    registration = server.registry.register("m", "_base", "f", make_file("f", DATA))
    client = connect(server)
    assert client.get(PATH).answer().body == DATA
    (fd,) = (artifact.content.sealed().fd for artifact in registration.artifacts)
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:selfhost")
    registration.close()
    del registration

    assert client.get(PATH).answer().status == 404
    assert wait_until(lambda: not os.path.exists(f"/proc/self/fd/{fd}"))
