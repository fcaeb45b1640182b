"""The folder, copied into another package: no installation, no metadata, another name.

The package that is tested is the one that is copied. The copies run in processes whose only other packages
are links to the wheels blake3 and Werkzeug.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import selfhost
from selfhost import load_card
from selfhost.demo_model import write_demo_model

PACKAGE = Path(selfhost.__file__).parent
WHEELS = ("blake3", "werkzeug", "markupsafe")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Make a folder with host/_vendor/selfhost and, beside it, the wheels that selfhost needs."""
    vendor = tmp_path / "site" / "host" / "_vendor"
    shutil.copytree(PACKAGE, vendor / "selfhost", ignore=shutil.ignore_patterns("__pycache__"))
    (vendor / "__init__.py").touch()
    (vendor.parent / "__init__.py").touch()
    (tmp_path / "wheels").mkdir()
    for wheel in WHEELS:
        spec = importlib.util.find_spec(wheel)
        assert spec is not None
        assert spec.origin is not None
        (tmp_path / "wheels" / wheel).symlink_to(Path(spec.origin).parent)
    return tmp_path / "site"


def run(host: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python without any installed package in a folder that is not the host's."""
    wheels = host.parent / "wheels"
    result = subprocess.run(
        [sys.executable, "-S", "-B", "-W", "error", *arguments],
        env={"PYTHONPATH": f"{host}{os.pathsep}{wheels}", "TMPDIR": str(host.parent)},
        cwd=wheels,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == code, result.stderr
    return result


def test_selfhost_itself_is_out_of_reach(host: Path) -> None:
    """The processes of these tests can neither import selfhost nor find its metadata."""
    assert "No module named 'selfhost'" in run(host, "-c", "import selfhost", code=1).stderr
    metadata = "import importlib.metadata; importlib.metadata.version('selfhost')"
    assert "PackageNotFoundError" in run(host, "-c", metadata, code=1).stderr


@pytest.mark.parametrize("options", [(), ("-O",), ("-OO",)])
def test_copy_runs_as_a_module(host: Path, options: tuple[str, ...]) -> None:
    """`python -m host._vendor.selfhost demo` works, also without assertions and docstrings."""
    result = run(host, *options, "-m", "host._vendor.selfhost", "demo")

    assert result.stdout.count("  ok ") == 5
    assert result.stderr == ""


def test_copy_runs_in_isolated_mode(host: Path) -> None:
    """With -I, which ignores the environment, the copy works once its path is given."""
    paths = [str(host), str(host.parent / "wheels")]
    code = f"import sys; sys.path += {paths}\nfrom host._vendor.selfhost import cli\ncli.main(['demo'])"

    assert run(host, "-I", "-c", code).stdout.count("  ok ") == 5


def test_copy_runs_from_a_zip(host: Path) -> None:
    """The host, packed into a zip, works from there."""
    pack(host)

    assert run(host, "-m", "host._vendor.selfhost", "demo").stdout.count("  ok ") == 5


FRONTEND = """
import sys
from host._vendor.selfhost.card.model_card import ModelDeploymentCard
from host._vendor.selfhost.frontend import BlobCache, MetadataResolver, default_transports

with open(sys.argv[1]) as file:
    card = ModelDeploymentCard.from_json(file.read())
transports = default_transports(file_roots=sys.argv[3:])
with MetadataResolver(BlobCache(sys.argv[2]), transports=transports) as resolver:
    resolved = resolver.resolve(card)
    assert resolver.resolve(card).fetched == ()
print(len(resolved.fetched), resolved.local_dir)
print({name for name in sys.modules if "selfhost.worker" in name or "selfhost.discovery" in name})
print({"werkzeug", "selfhost"} & set(sys.modules))
"""
OTHER_SIDE = ("worker", "discovery", "cli", "demo.py", "demo_model.py", "__main__.py")


@pytest.mark.parametrize("is_zipped", [False, True])
def test_frontend_alone(host: Path, is_zipped: bool) -> None:
    """A gateway may copy its side alone, frontend, card and what both use, and needs no wheel but blake3."""
    model = host.parent / "model"
    write_demo_model(str(model))
    (host.parent / "card.json").write_text(load_card(model).to_json())
    for name in OTHER_SIDE:
        path = host / "host" / "_vendor" / "selfhost" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (host.parent / "wheels" / "werkzeug").unlink()
    if is_zipped:
        pack(host)
    root = host.parent / "cache"
    lines = run(
        host, "-c", FRONTEND, str(host.parent / "card.json"), str(root), str(model)
    ).stdout.splitlines()

    assert lines[0].startswith(f"5 {root}/by-slug/")
    assert lines[1:] == ["set()", "set()"]


def pack(host: Path) -> None:
    """Put a zip of the host in the host's place."""
    archive = shutil.make_archive(str(host.parent / "packed"), "zip", host)
    shutil.rmtree(host)
    Path(archive).rename(host)


def test_copy_has_every_public_name(host: Path) -> None:
    """Each public name loads from the copy, and from nowhere else."""
    code = """
import sys
import host._vendor.selfhost as copy
print({getattr(copy, name).__module__.rpartition(".selfhost.")[0] for name in copy.__all__ if name[0] != "_"})
print("selfhost" in sys.modules)
"""
    assert run(host, "-c", code).stdout.split() == ["{'host._vendor'}", "False"]


def test_missing_wheel_is_told_at_the_first_hash(host: Path) -> None:
    """Without blake3 everything imports; the first hash fails in one line that names the wheel."""
    (host.parent / "wheels" / "blake3").unlink()
    result = run(host, "-m", "host._vendor.selfhost", "demo", code=1)

    (line,) = result.stderr.splitlines()
    assert line.startswith("selfhost: error: ")
    assert "pip install blake3" in line
