"""What docs/frontend.md shows is run, and its tables are compared with the code."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import documents
import pytest

from selfhost import DistributedRuntime, LocalModel, Settings, default_transports, frontend
from selfhost.frontend import FetchLimits, ModelState

TEXT = documents.read("docs/frontend.md")
SAMPLES = documents.samples(TEXT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the samples and the model directory that they name."""
    return documents.write_samples(tmp_path, SAMPLES)


@pytest.fixture
def model(folder: Path) -> Iterator[LocalModel]:
    """Return a model that a worker serves and publishes."""
    settings = Settings(True, "127.0.0.1", 0, file_kv=str(folder / "kv"))
    with DistributedRuntime(settings) as runtime:
        model = LocalModel.load(folder / "my-model", name="my/model")
        model.attach(runtime.endpoint("ns.comp.ep"))
        yield model


def test_every_block_is_a_sample() -> None:
    """No block goes untested."""
    assert set(SAMPLES) == {"gateway.py", "here.sh", "there.sh"}
    assert TEXT.count("```") == 2 * len(SAMPLES)


def test_gateway_sample(folder: Path, model: LocalModel) -> None:
    """The watcher finds a published model by itself, and says that it is ready."""
    directory, status = documents.run(folder, sys.executable, "-X", "dev", "gateway.py")

    assert Path(directory).parent.name == "my_model"
    assert names(directory) == names(folder / "my-model")
    assert status.split() == ["my/model", "ready"]


def test_carried_samples(folder: Path, model: LocalModel) -> None:
    """What one host has fetched another imports, and then has in its own cache."""
    (folder / "card.json").write_text(model.card.to_json())
    shell(folder, "here.sh", cache="here")
    model.detach()
    imported, found = shell(folder, "there.sh", cache="there")

    assert found == imported
    assert names(found) == names(folder / "my-model")
    assert found.startswith(str(folder / "there"))


def shell(folder: Path, name: str, *, cache: str) -> list[str]:
    """Run a sample whose lines are commands of ours."""
    text = re.sub("^selfhost ", f"'{sys.executable}' -m selfhost ", SAMPLES[name], flags=re.MULTILINE)
    return documents.run(folder, "sh", "-ec", f"exec 2>said\n{text}", DYN_MDC_CACHE=str(folder / cache))


def names(folder: object) -> set[str]:
    """Return the names of what is in a folder."""
    return {path.name for path in Path(str(folder)).iterdir()}


def test_tables_are_of_the_code() -> None:
    """The arguments, the types that they take and the states are those that there are."""
    arguments = re.findall(r"^\| `(\w+)=(?:\{.*\}|\[.*\]|True|(\w+)\(.*\))` \|", TEXT, re.MULTILINE)
    states = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    seconds = ("connect_seconds", "read_seconds", "total_seconds")

    assert len(arguments) == 6
    assert {name for name, _ in arguments} <= set(inspect.signature(default_transports).parameters)
    assert {kind for _, kind in arguments if kind} <= set(frontend.__all__)
    assert states == [state.value for state in ModelState if state is not ModelState.GONE]
    assert [int(number) for number in re.findall(r"\((\d+)\)", TEXT)] == [
        getattr(FetchLimits(), name) for name in seconds
    ]
