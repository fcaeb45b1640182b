"""The folder, copied into another package under another name: no installation, no metadata.

The package that is tested is the one that is copied. The copies run in processes whose only other packages
are links to the wheels blake3 and Werkzeug.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Callable

import pytest

from selfhost import load_card

Run = Callable[..., "CompletedProcess[str]"]
WHOLE = "host._vendor.whole.sh"


def test_selfhost_itself_is_out_of_reach(run: Run) -> None:
    """The processes of these tests can neither import selfhost nor find its metadata."""
    assert "No module named 'selfhost'" in run("-c", "import selfhost", code=1).stderr
    metadata = "import importlib.metadata; importlib.metadata.version('selfhost')"
    assert "PackageNotFoundError" in run("-c", metadata, code=1).stderr


@pytest.mark.parametrize("options", [(), ("-O",), ("-OO",)])
def test_copy_runs_as_a_module(run: Run, options: tuple[str, ...]) -> None:
    """`python -m` of the copy works, also without assertions and docstrings."""
    result = run(*options, "-m", WHOLE, "demo")

    assert (result.stdout.count("  ok "), result.stderr) == (5, "")


def test_copy_runs_in_isolated_mode(run: Run, copies: Path) -> None:
    """With -I, which ignores the environment, the copy works once its path is given."""
    paths = [str(copies / "site"), str(copies / "wheels" / "blake3")]
    code = f"import sys; sys.path += {paths}\nfrom {WHOLE} import cli\ncli.main(['demo'])"

    assert run("-I", "-c", code).stdout.count("  ok ") == 5


@pytest.fixture(scope="module")
def packed(copies: Path) -> Path:
    """Return a zip of the host."""
    return Path(shutil.make_archive(str(copies / "packed"), "zip", copies / "site"))


def test_copy_runs_from_a_zip(run: Run, packed: Path) -> None:
    """The host, packed into a zip, works from there."""
    assert run("-m", WHOLE, "demo", site=packed).stdout.count("  ok ") == 5


def test_copy_has_every_public_name(run: Run) -> None:
    """Each public name loads from the copy, and from nowhere else."""
    code = f"""
import sys
import {WHOLE} as copy
print({{getattr(copy, name).__module__.rpartition(".sh.")[0] for name in copy.__all__ if name[0] != "_"}})
print("selfhost" in sys.modules)
"""
    assert run("-c", code).stdout.split() == ["{'host._vendor.whole'}", "False"]


# ------------------------------------------------------------------ one side alone

FRONTEND = """
import sys
from host._vendor.frontend.sh.card.model_card import ModelDeploymentCard
from host._vendor.frontend.sh.frontend import BlobCache, MetadataResolver, default_transports

with open("card.json") as file:
    card = ModelDeploymentCard.from_json(file.read())
transports = default_transports(file_roots=[sys.argv[1]])
with MetadataResolver(BlobCache("cache"), transports=transports) as resolver:
    resolved = resolver.resolve(card)
    assert resolver.resolve(card).fetched == ()
print(len(resolved.fetched), resolved.local_dir)
print({name for name in sys.modules if ".worker" in name or ".discovery" in name or "werkzeug" in name})
"""


@pytest.mark.parametrize("is_packed", [False, True])
def test_frontend_alone(run: Run, copies: Path, packed: Path, tmp_path: Path, is_packed: bool) -> None:
    """A gateway may copy its side alone, which needs no wheel but blake3 and loads no discovery unasked."""
    (tmp_path / "card.json").write_text(load_card(copies / "model").to_json())
    site = packed if is_packed else copies / "site"
    lines = run("-c", FRONTEND, str(copies / "model"), site=site, wheels=("blake3",)).stdout.splitlines()

    assert lines[0].startswith(f"5 {tmp_path}/cache/by-slug/")
    assert lines[1:] == ["set()"]


WORKER = """
import http.client, sys
from host._vendor.worker.sh import DistributedRuntime, Settings, register_model

settings = Settings(self_host_metadata=True, system_host="127.0.0.1", system_port=0, file_kv="kv")
with DistributedRuntime(settings) as runtime:
    endpoint = runtime.endpoint("a.b.c")
    model = register_model("Tokens", "Chat", endpoint, sys.argv[1], "m", worker_type="aggregated")
    for file in model.files:
        connection = http.client.HTTPConnection(file.url.split("/")[2], timeout=10)
        connection.request("GET", "/" + file.url.split("/", 3)[3])
        assert len(connection.getresponse().read()) == file.size
        connection.close()
    print(len(model.files), {name for name in sys.modules if ".frontend" in name or "werkzeug" in name})
"""


def test_worker_alone(run: Run, copies: Path) -> None:
    """A worker may copy its side alone; embedded, it needs no wheel but blake3."""
    assert run("-c", WORKER, str(copies / "model"), wheels=("blake3",)).stdout == "5 set()\n"


@pytest.mark.parametrize(
    ("side", "other", "name"),
    [
        ("worker", "frontend", "MetadataResolver"),
        ("worker", "frontend", "BlobCache"),
        ("frontend", "worker", "MetadataApp"),
        ("frontend", "worker", "register_model"),
    ],
)
def test_other_side_is_told_to_be_missing(run: Run, side: str, other: str, name: str) -> None:
    """A name of the other side is an ImportError that says what is missing, however it is asked for."""
    package = f"host._vendor.{side}.sh"
    code = f"""
import {package} as copy
for ask in ("copy.{name}", "__import__({package!r}, fromlist=[{name!r}])"):
    try:
        eval(ask)
    except ImportError as error:
        print(error)
"""
    said = f"cannot load {name} of {package}: this copy of selfhost has no {other} side"

    assert run("-c", code).stdout.splitlines() == [said, said]


@pytest.mark.parametrize("side", ["worker", "frontend"])
def test_one_side_has_all_that_it_imports(copies: Path, side: str) -> None:
    """Every relative import of a one-sided copy, also one in a function, leads to a module that it has."""
    root = copies / "site" / "host" / "_vendor" / side / "sh"
    modules = set(root.rglob("*.py")) - {root / "__init__.py"}  # which names both sides, for type checkers
    missing = {
        (path.relative_to(root), node.module)
        for path in modules
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ImportFrom) and node.level and not leads_somewhere(path, node)
    }

    assert len(modules) > 20
    assert missing == set()


def leads_somewhere(path: Path, node: ast.ImportFrom) -> bool:
    """Tell whether a relative import names a module that is there."""
    found = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return found.is_dir() or found.with_suffix(".py").is_file()
