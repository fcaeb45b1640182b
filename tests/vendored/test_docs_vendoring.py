"""What docs/vendoring.md shows is run."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import documents
from vendoring import SCRIPT, vendor

TEXT = documents.read("docs/vendoring.md")
SAMPLES = documents.samples(TEXT)
(COMMAND,) = re.findall(r"```sh\n(.*)\n```", TEXT)


def test_command_and_sample(tmp_path: Path) -> None:
    """The command makes the copy that the sample imports, which serves a model with it."""
    documents.write_samples(tmp_path, SAMPLES)
    (tmp_path / "docs").symlink_to(SCRIPT.parent)
    (made,) = documents.run(tmp_path, "sh", "-c", COMMAND.replace("python3", sys.executable))
    urls = documents.run(tmp_path, sys.executable, "-X", "dev", "host_worker.py")

    assert made.startswith("host/_vendor/selfhost: selfhost ")
    assert [url.rpartition("/")[2] for url in urls][:2] == ["config.json", "tokenizer.json"]
    assert len(urls) == 5


def test_copy_in_place_can_be_checked(copies: Path, tmp_path: Path) -> None:
    """`--check` finds nothing wrong with a copy, and says what is wrong with a broken one."""
    shutil.copytree(copies / "site" / "host" / "_vendor" / "worker", tmp_path / "worker")
    check = ("--name", "sh", "--side", "worker", "--check")
    vendor(tmp_path / "worker", *check)
    (tmp_path / "worker" / "sh" / "errors.py").write_text("")

    assert "ImportError" in vendor(tmp_path / "worker", *check, code=1)


def test_every_block_is_run() -> None:
    """There is no other block, and the document stays short."""
    assert set(SAMPLES) == {"host_worker.py"}
    assert TEXT.count("```") == 4
    assert len(TEXT.splitlines()) <= 80
