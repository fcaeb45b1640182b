"""Checked files: from disk, from JSON, moved, compared."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from selfhost.card import CheckedFile, Checksum
from selfhost.errors import CardError, ChecksumError

HEX = "ab" * 32
TEXT = f"blake3:{HEX}"
LOCAL = CheckedFile("/models/m/config.json", Checksum(HEX), 7)
REMOTE = CheckedFile("http://h/v1/a%20b.json", Checksum(HEX), 7)


class Repeating(dict):  # type: ignore[type-arg]
    """What the JSON reader makes of an object with a key twice."""

    duplicates = frozenset({"path", "other"})


def test_from_disk_knows_path_size_and_checksum(tmp_path: Path) -> None:
    """A file on disk is hashed, measured and found by its absolute path."""
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")

    assert CheckedFile.from_disk(path) == CheckedFile(str(path), Checksum.of(b"{}"), 2)


def test_from_disk_makes_the_path_absolute_but_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path and bytes are completed; a link keeps its own name."""
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "config.json").symlink_to("blob")
    monkeypatch.chdir(tmp_path)

    assert CheckedFile.from_disk("./config.json").path == os.path.join(os.getcwd(), "config.json")
    assert CheckedFile.from_disk(b"config.json").path == os.path.join(os.getcwd(), "config.json")


def test_from_disk_refuses_what_cannot_be_hashed(tmp_path: Path) -> None:
    """A directory is an OSError that names it."""
    with pytest.raises(OSError, match="not a regular file") as caught:
        CheckedFile.from_disk(tmp_path)

    assert caught.value.errno == errno.EISDIR


@pytest.mark.parametrize(
    ("value", "file"),
    [
        ({"path": "/m/a", "checksum": TEXT, "size": 7}, CheckedFile("/m/a", Checksum(HEX), 7)),
        ({"path": "/m/a", "checksum": TEXT}, CheckedFile("/m/a", Checksum(HEX))),
        ({"path": "/m/a", "checksum": TEXT, "size": None}, CheckedFile("/m/a", Checksum(HEX))),
        ({"path": "", "checksum": TEXT, "size": 0}, CheckedFile("", Checksum(HEX), 0)),
        ({"path": "a\0b", "checksum": TEXT}, CheckedFile("a\0b", Checksum(HEX))),
        ({"path": "/m/../a b", "checksum": TEXT}, CheckedFile("/m/../a b", Checksum(HEX))),
        ({"path": "HTTP://H:80/x/../a b", "checksum": TEXT}, CheckedFile("http://h/a%20b", Checksum(HEX))),
        ({"path": "C:\\m", "checksum": TEXT}, CheckedFile("c:\\m", Checksum(HEX))),
        ({"path": "a", "checksum": TEXT, "size": 2**64 - 1}, CheckedFile("a", Checksum(HEX), 2**64 - 1)),
        (["/m/a", TEXT, 7], CheckedFile("/m/a", Checksum(HEX), 7)),
        (["/m/a", TEXT, None], CheckedFile("/m/a", Checksum(HEX))),
        (["/m/a", TEXT], CheckedFile("/m/a", Checksum(HEX))),
    ],
)
def test_json_is_read(value: object, file: CheckedFile) -> None:
    """Objects and arrays are read as the real wheel reads them; URLs are kept normalised."""
    assert CheckedFile.from_json(value, "tokenizer") == file


@pytest.mark.parametrize("size", [7, None])
def test_json_is_written_as_it_was_read(size: object) -> None:
    """Known keys come first, unknown ones are written back, an unknown size is left out."""
    value: dict[str, Any] = {"path": "/m/a", "checksum": TEXT, "size": size, "z": [1], "a": {"b": None}}
    written = CheckedFile.from_json(value, "x").to_json()

    expected = {key: member for key, member in value.items() if member is not None}
    assert json.dumps(written) == json.dumps(expected)


@pytest.mark.parametrize(
    ("value", "field", "offending"),
    [
        (None, "f", None),
        ("a", "f", "a"),
        ([], "f", []),
        (["a"], "f", ["a"]),
        (["a", TEXT, 1, 2], "f", ["a", TEXT, 1, 2]),
        ({}, "f.path", None),
        ({"checksum": TEXT}, "f.path", None),
        ({"path": None, "checksum": TEXT}, "f.path", None),
        ({"path": 5, "checksum": TEXT}, "f.path", 5),
        ({"path": "a"}, "f.checksum", None),
        ({"path": "a", "checksum": None}, "f.checksum", None),
        ({"path": "a", "checksum": HEX}, "f.checksum", HEX),
        ({"path": "a", "checksum": TEXT.upper()}, "f.checksum", TEXT.upper()),
        ({"path": "a", "checksum": TEXT, "size": -1}, "f.size", -1),
        ({"path": "a", "checksum": TEXT, "size": 2**64}, "f.size", 2**64),
        ({"path": "a", "checksum": TEXT, "size": 1.0}, "f.size", 1.0),
        ({"path": "a", "checksum": TEXT, "size": "1"}, "f.size", "1"),
        ({"path": "a", "checksum": TEXT, "size": True}, "f.size", True),
        (["a", TEXT, "1"], "f.size", "1"),
        ([7, TEXT], "f.path", 7),
    ],
)
def test_wrong_json_is_refused_with_field_and_value(value: object, field: str, offending: object) -> None:
    """What the wheel refuses raises a CardError that names and carries field and value."""
    with pytest.raises(CardError) as caught:
        CheckedFile.from_json(value, "f")

    assert (caught.value.field, caught.value.value) == (field, offending)
    assert str(caught.value).startswith(f"{field}: ")


def test_bad_checksum_alone_is_a_checksum_error() -> None:
    """The more precise class is raised where a bad checksum is the only problem."""
    with pytest.raises(ChecksumError) as caught:
        CheckedFile.from_json({"path": "a", "checksum": "md5:00"}, "f")

    assert caught.value.text == "md5:00"


def test_all_problems_are_told_at_once() -> None:
    """One error lists every problem of the object and carries the first one."""
    with pytest.raises(CardError) as caught:
        CheckedFile.from_json({"path": 5, "checksum": "x", "size": -1}, "gen_config")

    assert [issue.split(":")[0] for issue in caught.value.issues] == [
        "gen_config.path",
        "gen_config.checksum",
        "gen_config.size",
    ]
    assert (caught.value.field, caught.value.value) == ("gen_config.path", 5)
    assert all(issue in str(caught.value) for issue in caught.value.issues)


def test_known_key_found_twice_is_refused() -> None:
    """Of the keys that a text repeats only known ones matter, as in the real wheel."""
    with pytest.raises(CardError, match="more than once") as caught:
        CheckedFile.from_json(Repeating(path="a", checksum=TEXT, other=1), "f")

    assert caught.value.issues == ("f.path: found more than once in one object",)


@pytest.mark.parametrize(
    ("file", "is_local", "url", "local_path", "basename"),
    [
        (LOCAL, True, None, "/models/m/config.json", "config.json"),
        (REMOTE, False, "http://h/v1/a%20b.json", None, "a%20b.json"),
        (CheckedFile("file:///m/a", Checksum(HEX)), False, "file:///m/a", None, "a"),
        (CheckedFile("/", Checksum(HEX)), True, None, "/", None),
    ],
)
def test_place_of_a_file(
    file: CheckedFile, is_local: bool, url: object, local_path: object, basename: object
) -> None:
    """A file is either on a disk or behind a URL, and has a name in most cases."""
    assert (file.is_local, file.url, file.local_path) == (is_local, url, local_path)
    assert file.basename == basename


def test_moves_change_the_path_only() -> None:
    """Moving gives a new value with everything but the path kept; the old one stays as it was."""
    file = CheckedFile("/m/a", Checksum(HEX), 7, {"z": 1})

    there = file.move_to_url("HTTP://H/a b")
    assert there == CheckedFile("http://h/a%20b", Checksum(HEX), 7, {"z": 1})
    assert there.move_to_disk(Path("/m/a")) == file
    assert file.path == "/m/a"


@pytest.mark.parametrize("url", ["", "/m/a", "m/a", "http://", "http://h:99999/"])
def test_move_to_what_is_no_url_is_refused(url: str) -> None:
    """A card whose URL every reader takes for a disk path would be wrong."""
    with pytest.raises(CardError, match="expected a URL") as caught:
        LOCAL.move_to_url(url)

    assert caught.value.value == url


def test_move_to_a_path_that_reads_like_a_url_is_refused() -> None:
    """A relative path with a colon would come back as a URL."""
    with pytest.raises(CardError, match="absolute"):
        LOCAL.move_to_disk("c:a")


def test_update_dir_keeps_the_name() -> None:
    """A local file moves to another directory; a URL stays where it is."""
    assert LOCAL.update_dir("/new").path == "/new/config.json"
    assert LOCAL.update_dir(Path("/new/")).path == "/new/config.json"
    assert REMOTE.update_dir("/new") is REMOTE


def test_update_dir_without_a_name_is_refused() -> None:
    """A path that ends in no file name has nothing to keep."""
    with pytest.raises(CardError, match="file name"):
        CheckedFile("/m/..", Checksum(HEX)).update_dir("/new")


@pytest.mark.parametrize(
    ("content", "size", "matches"),
    [(b"abc", 3, True), (b"abc", None, True), (b"abd", 3, False), (b"abc", 4, False), (b"", None, False)],
)
def test_matches_compares_checksum_and_known_size(
    tmp_path: Path, content: bytes, size: object, matches: bool
) -> None:
    """A file matches by its bytes, and by its size where the card tells one."""
    path = tmp_path / "file"
    path.write_bytes(content)

    assert CheckedFile("/other", Checksum.of(b"abc"), size).matches(path) is matches  # type: ignore[arg-type]


def test_files_can_be_members_of_a_set() -> None:
    """Equal files are one, unknown keys or not."""
    file = CheckedFile("/m/a", Checksum(HEX), 7, {"z": [1]})

    assert len({file, CheckedFile("/m/a", Checksum(HEX), 7, {"z": [1]}), LOCAL}) == 2
