"""docs/vendor.py: what it makes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Callable

import pytest
from vendoring import SCRIPT, vendor

import selfhost

SIDES = {"worker", "frontend"}


@pytest.mark.parametrize("side", ["worker", "frontend", "both"])
def test_copy_has_what_its_side_needs(copies: Path, side: str) -> None:
    """A copy has its side's folders, the licence and a note, and nothing that Python compiled."""
    folder = {"both": "whole"}.get(side, side)
    copy = copies / "site" / "host" / "_vendor" / folder / "sh"
    names = {path.name for path in copy.iterdir()}
    note = (copy / "VENDORED.txt").read_text()

    assert names & SIDES == (SIDES if side == "both" else {side})
    assert names >= {"LICENSE", "card", "discovery", "errors.py", "settings.py", "py.typed"}
    assert ("cli" in names, "__main__.py" in names) == (side == "both", side == "both")
    assert not list(copy.rglob("__pycache__"))
    assert "Apache License" in (copy / "LICENSE").read_text()
    assert note.startswith(f"selfhost {selfhost.__version__}")
    assert f"side: {side}\n" in note
    assert "needs: blake3" in note


def test_older_copy_is_replaced(tmp_path: Path) -> None:
    """An older copy makes room for one that, whatever the umask, others may read; what it needs is told."""
    (tmp_path / "selfhost").mkdir()
    (tmp_path / "selfhost" / "VENDORED.txt").touch()
    (tmp_path / "selfhost" / "stale.py").touch()
    before = os.umask(0o077)
    try:
        said = vendor(tmp_path, "--side", "frontend")
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "selfhost").rglob("*") if path.name != "VENDORED.txt"]

    assert {path.name for path in tmp_path.iterdir()} == {"selfhost"}
    assert {path.name for path in made} & {*SIDES, "stale.py"} == {"frontend"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in made)
    assert "needs blake3; huggingface_hub (hf:// files only)" in said


def make_folder(target: Path) -> None:
    """Put a folder there."""
    target.mkdir()
    (target / "mine.py").touch()


def make_link(target: Path) -> None:
    """Put a link to a folder there, to one that looks like a copy."""
    make_folder(target.with_name("elsewhere"))
    (target.with_name("elsewhere") / "VENDORED.txt").touch()
    target.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [make_folder, make_link, Path.touch])
def test_stranger_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """What is no copy stays as it is: a folder, a link to anything, a file."""
    make(tmp_path / "selfhost")
    before = sorted(tmp_path.rglob("*"))

    assert "is no copy that this script made" in vendor(tmp_path, code=1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a-b", "a.b", "../up", "class", "sys", ""])
def test_name_must_be_one_to_import(tmp_path: Path, name: str) -> None:
    """A name that no import statement can have, or that stands for a module of Python's, is refused."""
    assert "is no name for a package" in vendor(tmp_path / "dest", "--name", name, code=1)
    assert not (tmp_path / "dest").exists()


def test_copy_that_does_not_work_is_not_put_in_place(copies: Path, tmp_path: Path) -> None:
    """If the check fails the older copy stays, and nothing else does; the reason is told."""
    (tmp_path / "dest" / "selfhost").mkdir(parents=True)
    (tmp_path / "dest" / "selfhost" / "VENDORED.txt").touch()
    checkout = tmp_path / "checkout"
    shutil.copytree(copies / "site" / "host" / "_vendor" / "worker" / "sh", checkout / "selfhost")
    shutil.copy(checkout / "selfhost" / "LICENSE", checkout)
    (checkout / "docs").mkdir()
    script = Path(shutil.copy(SCRIPT, checkout / "docs"))
    (checkout / "selfhost" / "worker" / "site.py").write_text("from .nowhere import nothing\n")
    before = sorted((tmp_path / "dest").rglob("*"))

    said = vendor(tmp_path / "dest", "--side", "worker", script=script, code=1)

    assert "the copy does not work, and is not put in place" in said
    assert "No module named" in said
    assert sorted((tmp_path / "dest").rglob("*")) == before


def test_copy_without_a_licence_is_not_made(tmp_path: Path) -> None:
    """A source without its licence is not copied."""
    (tmp_path / "checkout" / "docs").mkdir(parents=True)
    (tmp_path / "checkout" / "selfhost").mkdir()
    (tmp_path / "checkout" / "selfhost" / "__init__.py").write_text('__version__ = "0"\n')
    script = Path(shutil.copy(SCRIPT, tmp_path / "checkout" / "docs"))

    assert "no LICENSE" in vendor(tmp_path / "dest", script=script, code=1)
    assert list((tmp_path / "dest").iterdir()) == []
