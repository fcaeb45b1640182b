"""Staged files: whole under their final name, or not there."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from selfhost._atomic import place_absent, place_over, staged


def stage(folder: Path, data: bytes = b"new") -> AbstractContextManager[str]:
    """Return the context manager that stages `data` in `folder`."""
    return staged(str(folder / "temporary"), data, mode=0o644, mtime_ns=1_000_000_000)


def names(folder: Path) -> list[str]:
    """Return what lies in the folder."""
    return sorted(path.name for path in folder.iterdir())


def test_placed_file_is_whole_and_alone(tmp_path: Path) -> None:
    """Content, mode (whatever the umask) and time are as asked, and nothing else is left."""
    before = os.umask(0o077)
    try:
        with stage(tmp_path) as path:
            place_absent(path, str(tmp_path / "target"))
    finally:
        os.umask(before)

    found = (tmp_path / "target").stat()
    assert (tmp_path / "target").read_bytes() == b"new"
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o644, 1_000_000_000)
    assert names(tmp_path) == ["target"]


def test_taken_name_is_not_overwritten(tmp_path: Path) -> None:
    """What is there stays, and the staged file goes."""
    (tmp_path / "target").write_bytes(b"old")

    with pytest.raises(FileExistsError), stage(tmp_path) as path:
        place_absent(path, str(tmp_path / "target"))

    assert (tmp_path / "target").read_bytes() == b"old"
    assert names(tmp_path) == ["target"]


def test_link_whose_reply_was_lost_counts(tmp_path: Path) -> None:
    """A network file system may say that the name is taken, by the very file that it was just given to."""
    with stage(tmp_path) as path:
        os.link(path, tmp_path / "target")
        place_absent(path, str(tmp_path / "target"))

    assert names(tmp_path) == ["target"]


def test_place_over_replaces_in_one_step(tmp_path: Path) -> None:
    """The name goes from one file to the other."""
    (tmp_path / "target").write_bytes(b"old")

    with stage(tmp_path) as path:
        place_over(path, str(tmp_path / "target"))

    assert (tmp_path / "target").read_bytes() == b"new"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_links_the_name_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Where link() is not to be had, a free name is taken and a taken one refused. # catalogue 130."""
    refuse_links(monkeypatch, code)

    with stage(tmp_path) as path:
        place_absent(path, str(tmp_path / "target"))
    with pytest.raises(FileExistsError), stage(tmp_path, b"other") as path:
        place_absent(path, str(tmp_path / "target"))

    assert (tmp_path / "target").read_bytes() == b"new"
    assert names(tmp_path) == ["target"]


def test_claim_is_given_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file must not stay under the name."""
    refuse_links(monkeypatch, errno.EPERM)
    monkeypatch.setattr(os, "replace", failing(errno.EIO))

    with pytest.raises(OSError, match="injected"), stage(tmp_path) as path:
        place_absent(path, str(tmp_path / "target"))

    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_other_link_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Only a lack of links is worked around; nothing is left of the attempt."""
    refuse_links(monkeypatch, code)

    with pytest.raises(OSError, match="injected"), stage(tmp_path) as path:
        place_absent(path, str(tmp_path / "target"))

    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fchmod", "utime"])
def test_failure_while_staging_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The temporary file goes, whichever step failed."""
    monkeypatch.setattr(os, call, failing(errno.EIO))

    with pytest.raises(OSError, match="injected"), stage(tmp_path):
        pytest.fail("it was not staged")

    assert names(tmp_path) == []


def test_planted_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    """A link under the temporary name is an error, and its target stays as it was. # catalogue 27."""
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "temporary").symlink_to("victim")

    with pytest.raises(FileExistsError), stage(tmp_path):
        pytest.fail("it was not staged")

    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert names(tmp_path) == ["temporary", "victim"]


def refuse_links(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Make every link() fail with this error number."""
    monkeypatch.setattr(os, "link", failing(code))


def failing(code: int) -> object:
    """Return a function that always raises this OSError."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, "injected")

    return fail
