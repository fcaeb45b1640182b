"""What docs/embedding.md shows is run."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit

import documents
import pytest

SAMPLES = documents.samples(documents.read("docs/embedding.md"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the samples and the model directory that they name."""
    return documents.write_samples(tmp_path, SAMPLES)


def test_every_block_is_a_sample() -> None:
    """No block goes untested."""
    assert set(SAMPLES) == {"engine.py", "threaded.py", "forks.py"}
    assert documents.read("docs/embedding.md").count("```") == 2 * len(SAMPLES)


def test_engine_sample(folder: Path) -> None:
    """A server in a process of its own is one argument; nothing is left in the store."""
    (url,) = documents.run(folder, sys.executable, "-X", "dev", "engine.py")

    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1/metadata/my_model/_base")
    assert documents.records(folder / "kv") == []


def test_threaded_sample(folder: Path) -> None:
    """Three models of three threads share one server."""
    lines = documents.run(folder, sys.executable, "-X", "dev", "threaded.py")
    urls = [urlsplit(line) for line in lines]

    assert [url.path.split("/")[3] for url in urls] == ["one", "two", "three"]
    assert len({url.netloc for url in urls}) == 1
    assert documents.records(folder / "kv") == []


def test_forks_sample(folder: Path) -> None:
    """Each way to start a child serves a model of the child's own."""  # catalogue 148
    assert documents.run(folder, sys.executable, "forks.py") == ["fork 5", "spawn 5", "forkserver 5"]
