"""Files from this machine's disk, below the folders that the operator named and nowhere else."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any, Optional

import pytest
from helpers import MemorySink

from selfhost.errors import FetchError, FetchTimeout, SettingsError, SizeLimitExceeded
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.transport_file import FileTransport, read_file

DATA = bytes(range(256)) * 4000  # several times the buffer
pytestmark = pytest.mark.usefixtures("leaves_nothing")


def fetch(transport: FileTransport, url: object, *, max_bytes: int = 1 << 30) -> bytes:
    """Fetch into a sink that holds bytes already; return what is in it afterwards."""
    sink = MemorySink()
    sink.write(b"half of something else")
    transport.fetch(str(url), sink, max_bytes=max_bytes)
    return bytes(sink.data)


def refused(transport: FileTransport, url: object, match: Optional[str] = None, **options: Any) -> FetchError:
    """Fail to fetch, with a message that matches; return the error. What the sink held stays in it."""
    sink = MemorySink()
    sink.write(b"of another source")
    with pytest.raises(FetchError, match=match) as caught:
        transport.fetch(str(url), sink, **{"max_bytes": 1 << 30, **options})
    assert (bytes(sink.data), sink.restarts) == (b"of another source", 0)
    assert caught.value.url == str(url)
    return caught.value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a root folder with a file in it; a secret lies beside."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a b%.bin").write_bytes(DATA)
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "root"


@pytest.fixture
def transport(root: Path) -> FileTransport:
    """Return a transport for that root."""
    return FileTransport([root])


@pytest.mark.parametrize("form", ["{}/sub/a b%.bin", "/{}//sub/./a b%.bin"])
def test_path(transport: FileTransport, root: Path, form: str) -> None:
    """A plain path is read as it stands, percent signs and all."""
    assert fetch(transport, form.format(root)) == DATA


@pytest.mark.parametrize("start", ["file://", "file://localhost", "FILE://LOCALHOST", "file:"])
def test_file_url(transport: FileTransport, root: Path, start: str) -> None:
    """A file: URL of this host is decoded, whatever bytes are in the name."""
    odd = os.path.join(os.fsencode(root), b"odd \xff?#")
    with open(odd, "wb") as file:
        file.write(b"odd")

    assert fetch(transport, f"{start}{root}/sub/a%20b%25.bin") == DATA
    assert fetch(transport, f"{start}{root}/odd%20%FF%3f%23") == b"odd"


def test_empty_file(transport: FileTransport, root: Path) -> None:
    """An empty file is a file, also where no byte is allowed."""
    (root / "empty").touch()

    assert fetch(transport, root / "empty", max_bytes=0) == b""


@pytest.mark.parametrize(
    "target", ["../secret", "sub/../../secret", "sub/%2e%2e/%2E%2E/secret", "..%2fsecret"]
)
def test_traversal(transport: FileTransport, root: Path, target: str) -> None:
    """Neither a path nor a URL climbs out of a root, in whatever spelling (catalogue 8)."""
    refused(transport, f"file://{root}/{target}")
    refused(transport, f"{root}/{target}")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("/etc/passwd", "expected a file below an allowed folder"),
        ("file:///etc/passwd", "expected a file below an allowed folder .*leads to '/etc/passwd'"),
        ("etc/passwd", "expected an absolute path, found a relative one"),
        ("", "relative"),
        ("file://server/share/x", "expected a file of this host, found the host 'server'"),
        ("file://127.0.0.1/etc/passwd", "found the host"),
        ("file:///etc/passwd?x", "found a query or a fragment"),
        ("file:///etc/passwd#x", "found a query or a fragment"),
        ("file:///C:/x", "expected a file below"),
        ("http://localhost/etc/passwd", "expected a path or a file: URL, found another URL"),
        ("data:,x", "found another URL"),
        ("/srv/../etc/passwd", "without '..'"),
        ("/etc/passwd\0.json", "NUL"),
        ("file:///etc%00", "NUL"),
        ("/\ud800", "the file system can have"),
    ],
)
def test_refused(transport: FileTransport, url: str, match: str) -> None:
    """What is no file of this host below a root is refused, and the message says why (catalogue 8)."""
    error = refused(transport, url, match)

    assert not error.is_transient


def test_name_without_encoding(transport: FileTransport, root: Path) -> None:
    """A name below a root that the file system cannot have is an error like others."""
    refused(transport, f"{root}/\ud800", "the file system can have")


def test_sibling_with_the_same_beginning(tmp_path: Path, transport: FileTransport) -> None:
    """A root is a folder, not the beginning of a name."""
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "f").write_bytes(b"secret")

    refused(transport, tmp_path / "root-2" / "f", "allowed folder")


def test_no_roots() -> None:
    """Without roots nothing is allowed."""
    refused(FileTransport([]), "/etc/passwd", r"allowed folder \(none\)")


@pytest.mark.parametrize("roots", [[""], ["/srv", ""]])
def test_empty_root(roots: list[str]) -> None:
    """An empty text is no root: it would be the working directory."""
    with pytest.raises(SettingsError, match="expected folders, found an empty text"):
        FileTransport(roots)


def test_one_path_for_roots() -> None:
    """A text in the place of the list is a mistake, not a list of one-letter folders."""
    with pytest.raises(TypeError, match="a list of folders"):
        FileTransport("/srv")


def test_root_of_everything(root: Path) -> None:
    """The root of the file system is a root, if an operator says so."""
    assert fetch(FileTransport(["/"]), root / "sub" / "a b%.bin") == DATA


def test_root_that_is_a_link(tmp_path: Path, root: Path) -> None:
    """A root may be reached over a link, and a card may know either name of it."""
    (tmp_path / "alias").symlink_to(root)
    transport = FileTransport([tmp_path / "alias"])

    assert fetch(transport, tmp_path / "alias" / "sub" / "a b%.bin") == DATA
    assert fetch(transport, root / "sub" / "a b%.bin") == DATA


def test_link_into_a_root(tmp_path: Path, root: Path, transport: FileTransport) -> None:
    """What is elsewhere is not even looked at, so a link from there into a root is of no use."""
    (tmp_path / "alias").symlink_to(root)

    refused(transport, tmp_path / "alias" / "sub" / "a b%.bin", "allowed folder")


def test_root_that_appears_later(tmp_path: Path) -> None:
    """A root need not exist when the transport is made."""
    transport = FileTransport([tmp_path / "late"])
    refused(transport, tmp_path / "late" / "f", "No such file")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "f").write_bytes(b"f")

    assert fetch(transport, tmp_path / "late" / "f") == b"f"


@pytest.mark.parametrize("is_absolute", [False, True])
def test_link_within_the_root(transport: FileTransport, root: Path, is_absolute: bool) -> None:
    """Links to elsewhere below the root work: Hugging Face snapshots consist of them."""
    (root / "blobs").mkdir()
    (root / "blobs" / "0123").write_bytes(b"blob")
    (root / "snapshots" / "c").mkdir(parents=True)
    link = root / "snapshots" / "c" / "config.json"
    link.symlink_to(root / "blobs" / "0123" if is_absolute else "../../blobs/0123")
    (root / "current").symlink_to("snapshots/c")

    assert fetch(transport, link) == b"blob"
    assert fetch(transport, root / "current" / "config.json") == b"blob"


def test_link_to_another_root(tmp_path: Path, root: Path) -> None:
    """A link may lead from one root to another."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f").write_bytes(b"other")
    (root / "link").symlink_to("../other/f")

    assert fetch(FileTransport([root, tmp_path / "other"]), root / "link") == b"other"


@pytest.mark.parametrize("target", ["../secret", "{}/secret", "sub/../../secret", "chain"])
def test_link_out_of_the_root(transport: FileTransport, root: Path, target: str) -> None:
    """A link that leaves the roots is refused, and the message says where it leads (catalogue 8)."""
    (root / "chain").symlink_to("../secret")
    (root / "link").symlink_to(target.format(root.parent))
    (root / "folder").symlink_to("..")

    refused(transport, root / "link", "leads to '.*/secret'")
    refused(transport, root / "folder" / "secret", "leads to '.*/secret'")


@pytest.mark.parametrize("name", ["sub/a b%.bin", "sub"])
def test_link_put_in_between(root: Path, name: str) -> None:
    """Whoever swaps a file or a folder for a link after the check gets an error, not another file."""
    moved = root.parent / "moved"
    (root / name).rename(moved)
    (root / name).symlink_to(moved)
    sink = MemorySink()

    with pytest.raises(FetchError, match="reading"):
        read_file(str(root), f"{root}/sub/a b%.bin", sink, url="x", max_bytes=1 << 30, limits=FetchLimits())
    assert not sink.data


def test_loop_of_links(transport: FileTransport, root: Path) -> None:
    """A link to itself is an error."""
    (root / "loop").symlink_to("loop")

    refused(transport, root / "loop", "reading|leads")


@pytest.mark.parametrize("name", ["fifo", "socket", "sub", "missing", "sub/a b%.bin/x"])
def test_no_regular_file(transport: FileTransport, root: Path, name: str) -> None:
    """What is no regular file is refused at once; a FIFO without a writer does not block."""
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        short = os.open(root, os.O_RDONLY)  # a socket's address is short
        listener.bind(f"/proc/self/fd/{short}/socket")
        os.close(short)

        refused(transport, root / name, "regular|No such|Not a directory")


def test_device() -> None:
    """A device is refused also where its folder is a root: /dev/zero would never end."""
    refused(FileTransport(["/dev"]), "/dev/zero", "not a regular file")


def test_unreadable_file(transport: FileTransport, root: Path) -> None:
    """A file that may not be read is an error that says so."""
    (root / "closed").write_bytes(b"x")
    (root / "closed").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        refused(transport, root / "closed", "Permission denied")
    finally:
        os.seteuid(user)


def test_error_while_reading() -> None:
    """A disk that fails under an open file is an error of the source, and the sink keeps what it has."""
    refused(FileTransport(["/proc"]), "/proc/self/mem", "reading '/proc/[0-9]+/mem': Input/output error")


def test_too_long(transport: FileTransport, root: Path) -> None:
    """A file above the cap is refused before its first byte is read."""
    error = refused(transport, root / "sub" / "a b%.bin", "at most 999 bytes", max_bytes=999)

    assert isinstance(error, SizeLimitExceeded)
    assert (error.limit, error.received) == (999, len(DATA))
    assert fetch(transport, root / "sub" / "a b%.bin", max_bytes=len(DATA)) == DATA


def test_too_long_for_the_frontend(root: Path) -> None:
    """The frontend's own cap holds whatever the card says."""
    transport = FileTransport([root], limits=FetchLimits(max_bytes=10))

    assert isinstance(refused(transport, root / "sub" / "a b%.bin"), SizeLimitExceeded)


@pytest.mark.parametrize("path", ["/proc/self/status", "/proc/self/mountinfo"])
def test_length_that_stat_does_not_tell(path: str) -> None:
    """A file that claims to be empty and is not is read to its end, up to the cap."""
    transport = FileTransport(["/proc"])

    assert len(fetch(transport, path, max_bytes=1 << 20)) > 100
    with pytest.raises(SizeLimitExceeded):
        fetch(transport, path, max_bytes=100)


class GrowingSink(MemorySink):
    """A sink during whose writes the file that is read grows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def write(self, data: Any) -> None:
        """Append here as much as there."""
        super().write(data)
        with open(self.path, "ab") as file:
            file.write(data)


def test_growing_file(transport: FileTransport, root: Path) -> None:
    """A file that grows while it is read is given up at the cap."""
    sink = GrowingSink(root / "sub" / "a b%.bin")

    with pytest.raises(SizeLimitExceeded) as caught:
        transport.fetch(f"{root}/sub/a b%.bin", sink, max_bytes=len(DATA) + 1000)
    assert caught.value.received == len(DATA) + 1001
    assert len(sink.data) <= len(DATA) + 1000


def test_slow_disk(root: Path) -> None:
    """A disk that needs longer than a fetch may take is given up."""
    now = iter(range(100))
    sink = MemorySink()

    with pytest.raises(FetchTimeout, match="within the 2 s") as caught:
        read_file(
            str(root),
            f"{root}/sub/a b%.bin",
            sink,
            url="x",
            max_bytes=1 << 30,
            limits=FetchLimits(total_seconds=2),
            clock=lambda: next(now),
        )
    assert (caught.value.phase, caught.value.seconds) == ("total", 2)


def test_errors_of_the_sink_pass(transport: FileTransport, root: Path) -> None:
    """What the sink raises is not taken for an error of the source."""

    class Full(MemorySink):
        def write(self, data: Any) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        transport.fetch(f"{root}/sub/a b%.bin", Full(), max_bytes=1 << 30)


def test_threads_share_a_transport(transport: FileTransport, root: Path) -> None:
    """Any number of threads may use one transport."""
    results = []
    url = f"{root}/sub/a b%.bin"
    threads = [threading.Thread(target=lambda: results.append(fetch(transport, url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [DATA] * 8


def test_facts(transport: FileTransport, root: Path) -> None:
    """It is the same without a network, its bytes do not drift, closing is harmless; its roots are shown."""
    transport.close()

    assert transport.offline() is transport
    assert transport.may_drift is False
    assert repr(transport) == f"<FileTransport roots=[{str(root)!r}]>"
    assert fetch(transport, root / "sub" / "a b%.bin") == DATA
