"""Checksums: what is one, what files hash to, and which files are refused."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import selfhost
from selfhost.card import checksum as module
from selfhost.card.checksum import Checksum, hash_fd, hash_file, new_hasher
from selfhost.errors import CardError, ChecksumError

HEX = "0123456789abcdef" * 4
PACKAGE_ROOT = Path(module.__file__).parents[2]

# Made with the b3sum program over `sample(size)`.
DIGESTS = [
    (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
    (1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
    (16 << 10, "f875d6646de28985646f34ee13be9a576fd515f76b5b0a26bb324735041ddde4"),
    (127_999, "ed9b5df47c2e989f2024de657d97caf3f1eb0ba83767f440734f6236c5c31332"),
    (128_000, "71c2a5b1681525aecfaf0d104f4e4485c2cec3dc67d431928f5d97a01457b4ca"),
    (128_001, "f4df60a319f33d2bb90e3aa28eabc34b7678169b74f12ff2b88190c11d558ecd"),
    (256 << 10, "d57dc906e20d3fd326ffaa85535500486f46a0979f5a323f028dcabfd381fd4a"),
    ((256 << 10) + 1, "531c319935cf78f34869faebd865e5748266b1799039103bfb851a680d9ed30c"),
    (1 << 20, "74cb441fd087764ca9c3694da742ebe30cbeb3060a17009ca81825c7a8d10343"),
    (4 << 20, "4e94e6f582581a0f3855f3ce504b153e951e65036fe9e2f010b7e25473c54f98"),
    (8 << 20, "1adedad9735f565ac6e22dab203db63b960c27098f2c0f0fda9adf9238d4c0c9"),
]


def sample(size: int) -> bytes:
    """Return the first `size` of the bytes 0, 1, ... 250, 0, 1, ..."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that can import the package."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_text_round_trips() -> None:
    """What `str` writes, `parse` reads."""
    checksum = Checksum.parse(f"blake3:{HEX}")

    assert checksum.hex == HEX
    assert Checksum.parse(str(checksum)) == checksum


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        "blake3:",
        "blake3:../../x",
        f"blake3:{HEX.upper()}",
        f"blake3:{HEX[:63]}",
        f"blake3:{HEX}0",
        f"blake3:{HEX}\n",
        f"blake3:{HEX[:63]}\n",
        f" blake3:{HEX}",
        f"blake3: {HEX[:63]}",
        f"blake3::{HEX[:63]}",
        f"blake3:{HEX}:",
        f"blake3:{HEX[:63]}\0",
        f"blake3:{HEX[:63]}\u0663",
        f"blake3:{HEX[:63]}\uff11",
        f"blake3:{HEX[:63]}g",
        f"BLAKE3:{HEX}",
        f"sha256:{HEX}",
        f"blake3-{HEX}",
        None,
        7,
        [f"blake3:{HEX}"],
        f"blake3:{HEX}".encode(),
    ],
)
def test_anything_else_is_refused_at_parse(text: object) -> None:
    """Only `blake3:` and 64 lower-case ASCII digits pass, so a checksum may name a file (catalogue 14)."""
    with pytest.raises(ChecksumError, match="64 lower-case") as caught:
        Checksum.parse(text)

    assert caught.value.text == text
    assert isinstance(caught.value, CardError)


def test_error_shortens_what_it_shows() -> None:
    """A megabyte in place of a checksum does not become a megabyte of message."""
    with pytest.raises(ChecksumError) as caught:
        Checksum.parse("x" * 1_000_000)

    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("size", "digest"), DIGESTS)
def test_hashes_equal_those_of_b3sum(tmp_path: Path, size: int, digest: str) -> None:
    """Files and bytes hash to what the reference program says, on one thread and on many (catalogue 98)."""
    path = tmp_path / "file"
    path.write_bytes(sample(size))

    assert hash_file(path) == (Checksum(digest), size)
    assert Checksum.of(sample(size)) == Checksum(digest)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_hashed(kind: type) -> None:
    """`of` takes bytes, bytearray and memoryview alike."""
    assert Checksum.of(kind(sample(128_000))) == Checksum(dict(DIGESTS)[128_000])


def test_hasher_takes_pieces() -> None:
    """A hasher fed in pieces gives the checksum of the whole."""
    hasher = new_hasher()
    hasher.update(sample(128_000)[:1000])
    hasher.update(sample(128_000)[1000:])

    assert hasher.hexdigest() == dict(DIGESTS)[128_000]


@pytest.mark.parametrize("spelling", ["str", "bytes", "path", "link"])
def test_path_may_be_spelled_in_any_way(tmp_path: Path, spelling: str) -> None:
    """Text, bytes, a path object and a symbolic link all lead to the file."""
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"\0")
    link.symlink_to(path)
    spelled = {"str": str(path), "bytes": os.fsencode(path), "path": path, "link": link}[spelling]

    assert hash_file(spelled) == (Checksum(dict(DIGESTS)[1]), 1)


@pytest.mark.parametrize(("expected", "count"), [(99, 100), (100, 100), (500, 100), (0, 1)])
@pytest.mark.parametrize("scale", [1, 10_000])
def test_count_tells_longer_and_shorter_files(tmp_path: Path, expected: int, count: int, scale: int) -> None:
    """A descriptor is read to its end, but never more than a byte past what was expected."""
    path = tmp_path / "file"
    path.write_bytes(sample(100 * scale))
    fd = os.open(path, os.O_RDONLY)
    try:
        checksum, size = hash_fd(fd, expected * scale)
    finally:
        os.close(fd)

    assert size == min(100 * scale, expected * scale + 1)
    assert (size > expected * scale) == (expected < count)
    assert checksum == Checksum.of(sample(size))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (_fifo, errno.EINVAL),
        (_socket, errno.EINVAL),
        (_link_to_device, errno.EINVAL),
        (Path.mkdir, errno.EISDIR),
        (_dangling_link, errno.ENOENT),
        (_loop, errno.ELOOP),
        (lambda path: None, errno.ENOENT),
    ],
)
def test_what_is_no_regular_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object, code: int
) -> None:
    """Each other kind of file gives an OSError at once, names the file and leaks nothing (catalogue 99)."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("it"))  # type: ignore[operator]
    open_before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match="it") as caught:
        hash_file("it")

    assert caught.value.errno == code
    assert caught.value.filename == "it"
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A file without read permission is a PermissionError (catalogue 99)."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    path.chmod(0)
    script = (
        "import os, sys; from selfhost.card.checksum import hash_file, new_hasher; new_hasher()\n"
        "os.chdir(sys.argv[1]); os.geteuid() or os.seteuid(65534)\n"  # root reads everything
        "try: hash_file('file')\n"
        "except PermissionError: print('refused')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])}

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True, check=False
    )

    assert (done.stdout, done.stderr) == ("refused\n", "")


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
def test_text_that_is_no_path_is_an_os_error(path: str) -> None:
    """A name that no file can have is refused like a file that is not there."""
    with pytest.raises(OSError, match="no path") as caught:
        hash_file(path)

    assert caught.value.errno == errno.EINVAL


def _overwrite(fd: int, turn: int) -> None:
    os.pwrite(fd, b"%d" % turn, 100)


def _append(fd: int, turn: int) -> None:
    os.pwrite(fd, b"x", (64 << 20) + turn)


def _truncate(fd: int, turn: int) -> None:
    os.ftruncate(fd, (64 << 20) - 1 - turn % 5 * (12 << 20))


@pytest.mark.parametrize("change", [_overwrite, _append, _truncate])
def test_file_that_changes_meanwhile_is_refused(tmp_path: Path, change: object) -> None:
    """Bytes written, added or cut off while the file is read are noticed, and kill nobody."""
    path = tmp_path / "file"
    with path.open("wb+") as file:
        file.truncate(64 << 20)
        started, stop = threading.Event(), threading.Event()

        def keep_changing() -> None:
            turn = 0
            while not stop.is_set():
                change(file.fileno(), turn)  # type: ignore[operator]
                turn += 1
                started.set()

        writer = threading.Thread(target=keep_changing)
        writer.start()
        started.wait(10)
        try:
            with pytest.raises(OSError, match="changed while it was hashed") as caught:
                hash_file(path)
        finally:
            stop.set()
            writer.join(10)

    assert caught.value.errno == errno.EBUSY


def test_file_longer_than_it_says_is_refused() -> None:
    """A file of /proc says that it is empty; half a content is never taken for the whole."""
    with pytest.raises(OSError, match="changed while it was hashed"):
        hash_file("/proc/self/status")


def test_forked_child_hashes_after_its_parent(tmp_path: Path) -> None:
    """Threads that the parent hashed with do not hang the child, which has none of them."""
    done = run_python(
        "import os, signal\n"
        "from selfhost.card.checksum import Checksum\n"
        "data = bytes(16 << 20)\n"
        "expected = Checksum.of(data)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(20)\n"
        "    os._exit(0 if Checksum.of(data) == expected else 1)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )

    assert done.returncode == 0, done.stderr


def test_blake3_loads_at_the_first_hash() -> None:
    """Importing the module and parsing a checksum load neither the wheel nor a thread."""
    done = run_python(
        "import sys, threading\n"
        "from selfhost.card.checksum import Checksum\n"
        f"Checksum.parse('blake3:{HEX}')\n"
        "before = 'blake3' in sys.modules\n"
        "Checksum.of(b'')\n"
        "print(before, 'blake3' in sys.modules, threading.active_count())\n"
    )

    assert done.stdout.split() == ["False", "True", "1"], done.stderr


def test_package_loads_nothing_before_a_name_is_asked_for() -> None:
    """Importing the package is cheap; its names load on first use, and a wrong one is an AttributeError."""
    done = run_python(
        "import sys, selfhost.card as card\n"
        "print(any(name.startswith('selfhost.card.') for name in sys.modules), hasattr(card, 'Chequesum'))\n"
        "print(card.Slug.from_name('A'), 'Slug' in dir(card), 'selfhost.card.checksum' in sys.modules)\n"
    )

    assert done.stdout.split() == ["False", "False", "a", "True", "False"], done.stderr


def test_missing_wheel_is_named() -> None:
    """Without blake3 the first hash says which wheel to install."""
    done = run_python(
        "import sys\n"
        "sys.modules['blake3'] = None\n"
        "from selfhost.card.checksum import Checksum\n"
        "from selfhost.errors import SelfHostError\n"
        "try:\n"
        "    Checksum.of(b'')\n"
        "except SelfHostError as err:\n"
        "    print(err)\n"
    )

    assert "pip install blake3" in done.stdout, done.stderr
