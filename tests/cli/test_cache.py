"""`selfhost cache`: what is kept, what goes, and what comes from a directory."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from selfhost import BlobCache, ModelDeploymentCard, cli, load_card

DAY = 86400.0  # seconds


@pytest.fixture
def card(model_dir: Path, tmp_path: Path) -> ModelDeploymentCard:
    """Return the card of my-model, which is also in card.json."""
    card = load_card(model_dir, name="org/M")
    (tmp_path / "card.json").write_text(card.to_json())
    return card


@pytest.fixture
def imported(run: Any, card: ModelDeploymentCard, model_dir: Path, tmp_path: Path) -> Path:
    """Import my-model; return its directory in the cache."""
    result = run("cache", "import", tmp_path / "card.json", model_dir)
    assert (result.returncode, result.stderr) == (0, "")
    return Path(result.stdout.rstrip("\n"))


def make_old(cache: Path, days: float) -> None:
    """Let everything in a cache look as if it was made and used so long ago, as far as mtime goes."""
    then = time.time() - days * DAY
    for path in cache.rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)


def total_bytes(model_dir: Path) -> int:
    """Return how large the files of a directory are."""
    return sum(path.stat().st_size for path in model_dir.iterdir())


# ------------------------------------------------------------------ import


def test_import_is_found_offline(run: Any, imported: Path, card: ModelDeploymentCard, tmp_path: Path) -> None:
    """What was imported is what a fetch without any network gives."""
    assert imported == tmp_path / "cache" / "by-slug" / "org_m" / card.mdcsum
    result = run("fetch", tmp_path / "card.json", "--offline")
    assert (result.returncode, result.stdout) == (0, f"{imported}\n")


def test_import_again_needs_no_files(run: Any, imported: Path, model_dir: Path, tmp_path: Path) -> None:
    """What is there already is not read from the directory."""
    shutil.rmtree(model_dir)
    model_dir.mkdir()

    assert run("cache", "import", tmp_path / "card.json", model_dir).stdout == f"{imported}\n"


@pytest.mark.parametrize("fault", ["other bytes", "missing", "a link to nowhere"])
def test_import_refuses(fault: str, run: Any, card: Any, model_dir: Path, tmp_path: Path) -> None:
    """A directory that is not what the card says gives no model; the file at fault is named."""
    (model_dir / "tokenizer.json").unlink()
    if fault == "other bytes":
        (model_dir / "tokenizer.json").write_bytes(b"{}")
    elif fault == "a link to nowhere":
        (model_dir / "tokenizer.json").symlink_to("nowhere")
    result = run("cache", "import", tmp_path / "card.json", model_dir)

    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "tokenizer.json" in line
    assert not (tmp_path / "cache" / "by-slug").exists()


def test_import_of_the_workers_own_directory(run: Any, model_dir: Path, tmp_path: Path) -> None:
    """A card with URLs has names percent-encoded, the directory plain; the cache keeps those of the card."""
    (model_dir / "my notes.txt").write_text("mine")
    card = load_card(model_dir, name="org/M")
    card = card.map_files(lambda file: file.move_to_url(f"http://h/{quote(str(file.basename))}"))
    (tmp_path / "card.json").write_text(card.to_json())
    result = run("cache", "import", tmp_path / "card.json", model_dir)

    assert (result.returncode, result.stderr) == (0, "")
    assert (Path(result.stdout.rstrip("\n")) / "my%20notes.txt").read_text() == "mine"


# ------------------------------------------------------------------ ls, stats


def test_ls(run: Any, imported: Path, model_dir: Path) -> None:
    """A line for each model; where stdout is no terminal, sizes are exact."""
    heading, row = run("cache", "ls").stdout.splitlines()

    assert heading.split() == ["SLUG", "MDCSUM", "FILES", "BYTES", "LAST", "USED"]
    assert row.split()[:4] == ["org_m", imported.name, "5", str(total_bytes(model_dir))]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", " ".join(row.split()[4:]))


def test_ls_has_the_last_used_first(run: Any, imported: Path, model_dir: Path, tmp_path: Path) -> None:
    """The order is the one that the help promises, whatever the names are."""
    for name, days in (("a", 3), ("z", 9)):
        (tmp_path / "other.json").write_text(load_card(model_dir, name=name).to_json())
        made = run("cache", "import", tmp_path / "other.json", model_dir).stdout.rstrip("\n")
        then = time.time() - days * DAY
        os.utime(made, (then, then))

    assert [line.split()[0] for line in run("cache", "ls").stdout.splitlines()] == ["SLUG", "org_m", "a", "z"]


def test_ls_of_an_empty_slug(run: Any, card: Any, model_dir: Path, tmp_path: Path) -> None:
    """A model without a slug has a mark in its column."""
    (tmp_path / "card.json").write_text(load_card(model_dir, name="模型").to_json())
    run("cache", "import", tmp_path / "card.json", model_dir)

    assert run("cache", "ls").stdout.splitlines()[1].split()[0] == "-"


def test_ls_of_nothing(run: Any) -> None:
    """An empty cache has no models."""
    result = run("cache", "ls")

    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1)


def test_stats(run: Any, imported: Path, model_dir: Path, tmp_path: Path) -> None:
    """Each number has a line."""
    lines = [line.split(maxsplit=1) for line in run("cache", "stats").stdout.splitlines()]

    assert dict(lines[:4]) == {  # type: ignore[arg-type]
        "root": str(tmp_path / "cache"), "models": "1", "blobs": "5", "bytes": str(total_bytes(model_dir)),
    }  # fmt: skip


@pytest.mark.parametrize(("options", "size"), [([], "KiB"), (["--bytes"], "")])
def test_sizes_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], imported: Path, tmp_path: Path,
    options: list[str], size: str,
) -> None:  # fmt: skip
    """People get sizes with a unit, unless they ask for the bytes."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    assert cli.main(["cache", "stats", "--cache", str(tmp_path / "cache"), *options]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bytes ")]
    assert line.endswith(size or line.split()[-1])
    assert ("KiB" in line) == bool(size)


# ------------------------------------------------------------------ gc, verify


def test_gc_takes_what_is_old(run: Any, imported: Path, tmp_path: Path) -> None:
    """An old model goes; a dry run says the same and changes nothing."""
    make_old(tmp_path / "cache", days=40)
    dry = run("cache", "gc", "--max-age", "30d", "--dry-run")
    assert imported.is_dir()
    wet = run("cache", "gc", "--max-age", "30d")

    assert dry.stdout.splitlines()[0] == f"would remove  org_m  {imported.name}"
    assert wet.stdout.splitlines()[0] == f"removed  org_m  {imported.name}"
    assert wet.stdout.splitlines()[1].startswith("removed in all: models 1, blobs ")
    assert not imported.exists()


def test_gc_keeps_what_is_young(run: Any, imported: Path) -> None:
    """Neither age nor size takes what was just used; without options nothing that a model refers to goes."""
    for options in ((), ("--max-bytes", "0"), ("--max-age", "0s")):
        result = run("cache", "gc", *options)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("removed in all: models 0, blobs 0, ")
    assert imported.is_dir()


def test_gc_by_size(run: Any, imported: Path, model_dir: Path, tmp_path: Path) -> None:
    """Over the budget, models that are not young go; within it they stay."""
    make_old(tmp_path / "cache", days=1)
    within = run("cache", "gc", "--max-bytes", total_bytes(model_dir))
    assert within.stdout.startswith("removed in all: models 0, ")
    over = run("cache", "gc", "--max-bytes", total_bytes(model_dir) - 1)

    assert f"removed  org_m  {imported.name}" in over.stdout.splitlines()


def test_verify_of_a_sound_cache(run: Any, imported: Path) -> None:
    """Nothing wrong, nothing said."""
    result = run("cache", "verify")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_verify_sets_aside_what_is_wrong(
    run: Any, imported: Path, card: ModelDeploymentCard, model_dir: Path, tmp_path: Path
) -> None:
    """A rotten blob is named, is no hit any more, and can be imported again."""
    assert card.tokenizer is not None
    checksum = card.tokenizer.file.checksum  # type: ignore[union-attr]
    blob = tmp_path / "cache" / "blobs" / checksum.hex
    os.chmod(blob, 0o644)
    blob.write_bytes(b"rotten")
    result = run("cache", "verify")

    assert (result.returncode, result.stdout) == (1, f"wrong  {checksum}\n")
    assert result.stderr.endswith(f"wrong blobs in {str(tmp_path / 'cache')!r}, now set aside: 1\n")
    assert BlobCache(tmp_path / "cache").find(checksum) is None
    assert run("cache", "verify").returncode == 0
    assert run("cache", "import", tmp_path / "card.json", model_dir).returncode == 0
    assert run("fetch", tmp_path / "card.json", "--offline").returncode == 0


def test_verify_of_what_can_only_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], imported: Path, tmp_path: Path
) -> None:
    """Where a wrong blob cannot be moved, nobody is told that it was."""
    blob = (imported / "config.json").resolve()
    os.chmod(blob, 0o644)
    blob.write_bytes(b"rotten")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)

    assert cli.main(["cache", "verify", "--cache", str(tmp_path / "cache")]) == 1
    output = capsys.readouterr()
    assert output.out == f"wrong  blake3:{blob.name}\n"
    assert output.err.endswith(", still in place, as they cannot be moved: 1\n")
    assert blob.exists()
