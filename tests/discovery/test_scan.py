"""Reading what others wrote: names of any spelling, torn files, junk, and only what changed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from selfhost.discovery import Bucket, FileDiscovery, RecordKey, layout
from selfhost.discovery.expiry import Expiry
from selfhost.discovery.scan import SCAN_SECONDS, Scanner

NAME = "ns%2Fcomp%2Fep%2Fab"
KEY = RecordKey("ns", "comp", "ep", 0xAB)


@pytest.fixture
def scanner(tmp_path: Path) -> Scanner:
    """Give a scanner of an empty directory that holds nothing for stale."""
    return Scanner(str(tmp_path), Expiry(3600.0, time.time, time.monotonic), lambda path: False)


def test_dynamos_records_are_read_however_they_are_spelt(scanner: Scanner, tmp_path: Path) -> None:
    """Escaped names, unescaped ones, padded ids."""
    (tmp_path / "my%2Dns%2Fc%2Fe%2F1%2Fmy%5Flora").write_text('{"n":1}')
    (tmp_path / "my-ns%2Fc%2Fe%2F0002").write_text('{"n":2}')

    assert scanner.scan() == {
        RecordKey("my-ns", "c", "e", 1, "my_lora"): '{"n":1}',
        RecordKey("my-ns", "c", "e", 2): '{"n":2}',
    }


@pytest.mark.parametrize("padded", ["ns%2Fcomp%2Fep%2F00ab", "ns%2fcomp%2fep%2fab"])
def test_of_two_spellings_of_one_key_dynamos_counts(scanner: Scanner, tmp_path: Path, padded: str) -> None:
    """And when it goes, the other one is still there."""
    (tmp_path / padded).write_text('{"n":"other"}')
    (tmp_path / NAME).write_text('{"n":"usual"}')

    assert scanner.scan() == {KEY: '{"n":"usual"}'}
    (tmp_path / NAME).unlink()
    assert scanner.scan() == {KEY: '{"n":"other"}'}


def test_junk_is_no_record(scanner: Scanner, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is not named like one is passed over without a word; so are links and directories."""
    (tmp_path / "README").write_text("{}")
    (tmp_path / ".tmp_0123456789abcdef").write_text("{}")
    (tmp_path / NAME).symlink_to("README")
    (tmp_path / "ns%2Fcomp%2Fep%2F1").mkdir()
    os.mkfifo(tmp_path / "ns%2Fcomp%2Fep%2F2")

    assert scanner.scan() == {}
    assert caplog.text == ""


def test_record_written_in_pieces_is_read_when_it_is_whole(
    scanner: Scanner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then there is one warning, not one for every look. Dynamo never reads such a record again."""
    (tmp_path / NAME).write_text("")
    assert scanner.scan() == {}
    (tmp_path / NAME).write_text('{"a":')
    assert scanner.scan() == {}
    assert scanner.scan() == {}
    assert caplog.text.count("skipped the discovery record") == 1

    (tmp_path / NAME).write_text('{"a":1}')

    assert scanner.scan() == {KEY: '{"a":1}'}


def test_torn_rewrite_leaves_the_last_good_text(
    scanner: Scanner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model does not vanish because a writer is halfway through its record; each new tear warns once."""
    for number in (1, 2):
        (tmp_path / NAME).write_text(f'{{"a":{number}}}')
        assert scanner.scan() == {KEY: f'{{"a":{number}}}'}
        (tmp_path / NAME).write_text('{"a')
        assert scanner.scan() == {KEY: f'{{"a":{number}}}'}
        assert caplog.text.count("skipped the discovery record") == number


def test_unreadable_record_is_skipped(
    scanner: Scanner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning says why; the others are there."""
    (tmp_path / NAME).write_text("{}")
    os.truncate(tmp_path / NAME, layout.MAX_RECORD_BYTES + 1)
    (tmp_path / "ns%2Fcomp%2Fep%2F1").write_text("{}")

    assert list(scanner.scan()) == [RecordKey("ns", "comp", "ep", 1)]
    assert "larger than" in caplog.text


def test_only_what_changed_is_opened(
    scanner: Scanner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a thousand unchanged records opens none."""
    opened: list[str] = []
    read = layout.read_bytes

    def count(path: str) -> bytes:
        opened.append(os.path.basename(path))
        return read(path)

    monkeypatch.setattr(layout, "read_bytes", count)
    for number in range(5):
        (tmp_path / f"ns%2Fcomp%2Fep%2F{number}").write_text("{}")
    scanner.scan()
    opened.clear()

    scanner.scan()
    assert opened == []
    (tmp_path / "ns%2Fcomp%2Fep%2F3").write_text('{"a":1}')
    scanner.scan()
    assert opened == ["ns%2Fcomp%2Fep%2F3"]


def test_missing_directory_has_no_records(tmp_path: Path) -> None:
    """A frontend may start before the first worker ever did."""
    with FileDiscovery(tmp_path / "missing") as store:
        assert store.records(Bucket.MODELS) == {}

    assert not (tmp_path / "missing").exists()


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scanner, list[str], list[float]]:
    """Give a scanner, the list of directories that were listed, and its clock."""
    listed: list[str] = []
    now = [0.0]
    scandir = os.scandir

    def list_directory(path: str) -> Any:
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", list_directory)
    expiry = Expiry(3600.0, time.time, time.monotonic)
    return Scanner(str(tmp_path), expiry, lambda path: False, monotonic=lambda: now[0]), listed, now


def set_back(folder: Path, seconds: float) -> None:
    """Let a directory look as if it had changed last so long ago."""
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_directory_at_rest_is_not_listed(counted: Any, tmp_path: Path) -> None:
    """As long as no name comes or goes, one look at the directory is enough."""
    scanner, listed, _ = counted
    (tmp_path / NAME).write_text('{"n":1}')
    set_back(tmp_path, 60)

    assert [scanner.refresh() for _ in range(3)] == [{KEY: '{"n":1}'}] * 3
    assert len(listed) == 1


def test_new_name_is_seen_at_once(counted: Any, tmp_path: Path) -> None:
    """A record that comes or goes changes its directory."""
    scanner, _, _ = counted
    set_back(tmp_path, 60)
    assert scanner.refresh() == {}
    (tmp_path / NAME).write_text('{"n":1}')

    assert scanner.refresh() == {KEY: '{"n":1}'}
    (tmp_path / NAME).unlink()
    assert scanner.refresh() == {}


def test_file_written_in_place_is_seen_a_second_later(counted: Any, tmp_path: Path) -> None:
    """What the directory does not show is found by the next scan of every file."""
    scanner, _, now = counted
    (tmp_path / NAME).write_text('{"n":1}')
    set_back(tmp_path, 60)
    scanner.refresh()
    (tmp_path / NAME).write_text('{"n":22}')

    assert scanner.refresh() == {KEY: '{"n":1}'}
    now[0] = SCAN_SECONDS
    assert scanner.refresh() == {KEY: '{"n":22}'}


@pytest.mark.parametrize("seconds_ago", [0.0, -3600.0])
def test_directory_that_just_changed_is_listed_again(
    counted: Any, tmp_path: Path, seconds_ago: float
) -> None:
    """A second change within one tick of its clock would not show; nor is a time in the future trusted."""
    scanner, listed, _ = counted
    for _ in range(3):
        set_back(tmp_path, seconds_ago)
        scanner.refresh()

    assert len(listed) == 3
