"""Names in the directory store, and reading its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

import pytest

from selfhost.discovery import Bucket, RecordKey, layout

# File names that a real Dynamo 1.6.1 worker gave its records.
DYNAMOS = [
    ("ns%2Fcomp%2Fep%2F728d594d977f6d68", RecordKey("ns", "comp", "ep", 0x728D594D977F6D68)),
    ("n1%2FC2%2Fe%2D%5F3%2F34e82519e8b5a7d7", RecordKey("n1", "C2", "e-_3", 0x34E82519E8B5A7D7)),
    (
        "my%2Dns%2Fmy%5Fcomp%2Fgen%2D1%5Fx%2Fd8e52f01902f4ace%2Fmy%5Flora%5F1",
        RecordKey("my-ns", "my_comp", "gen-1_x", 0xD8E52F01902F4ACE, "my_lora_1"),
    ),
]


@pytest.mark.parametrize(("name", "key"), DYNAMOS)
def test_names_are_dynamos(name: str, key: RecordKey) -> None:
    """Byte for byte, and they read back."""
    assert layout.file_name(key) == name
    assert layout.key_of(name) == key


def test_every_other_byte_is_escaped() -> None:
    """In upper-case hex, byte by byte of UTF-8; dots too."""
    key = RecordKey("a.b", "c d", "é%", 10)

    assert layout.file_name(key) == "a%2Eb%2Fc%20d%2F%C3%A9%25%2Fa"
    assert layout.key_of(layout.file_name(key)) == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("my-ns%2Fc_1%2Fe.x%2F0000000000000ab", RecordKey("my-ns", "c_1", "e.x", 0xAB)),
        ("a%2fb%2fc%2fAB", RecordKey("a", "b", "c", 0xAB)),
        ("a%2Fb%2Fc", None),
        ("a%2Fb%2Fc%2Fzz", None),
        ("%FF%2Fb%2Fc%2F1", None),
        ("\udcff%2Fb%2Fc%2F1", None),
        (".tmp_0123456789abcdef", None),
        ("README", None),
    ],
)
def test_names_are_read_leniently(name: str, key: Optional[RecordKey]) -> None:
    """Zero-padded ids and unescaped characters are fine; what is no key is none."""
    assert layout.key_of(name) == key


def test_temporary_names_are_dynamos() -> None:
    """16 hex digits, new ones each time; no other name is taken for one."""
    name = layout.new_temporary_name()

    assert layout.is_temporary(name)
    assert name != layout.new_temporary_name()
    for other in (".tmp_", ".tmp_0123", name.upper(), name + "0", "x" + name):
        assert not layout.is_temporary(other)


def test_buckets_have_dynamos_directories() -> None:
    """Under the version of the layout."""
    assert layout.bucket_directory("/r", Bucket.MODELS) == "/r/v1/mdc"
    assert layout.bucket_directory("/r", Bucket.INSTANCES) == "/r/v1/instances"


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    """A FIFO does not hang the reader, a link is not followed."""
    path = tmp_path / "record"
    (tmp_path / "elsewhere").write_text("{}")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("elsewhere")
    else:
        path.mkdir()

    with pytest.raises(OSError):
        layout.read_bytes(str(path))


def test_oversized_file_is_not_read(tmp_path: Path) -> None:
    """What is larger than any record would only fill the memory."""
    path = tmp_path / "record"
    path.write_bytes(b"")
    os.truncate(path, layout.MAX_RECORD_BYTES + 1)

    with pytest.raises(OSError, match="larger than"):
        layout.read_bytes(str(path))


@pytest.mark.parametrize(
    ("data", "text"),
    [(b'{"a":1}', '{"a":1}'), (b"", None), (b'{"a"', None), (b"[]", None), (b'{"a":"\xff"}', None)],
)
def test_text_of_a_record(data: bytes, text: Optional[str]) -> None:
    """A JSON object in UTF-8, or none yet."""
    assert layout.text_of(data) == text
