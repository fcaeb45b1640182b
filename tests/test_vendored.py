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
    archive = shutil.make_archive(str(host.parent / "packed"), "zip", host)
    shutil.rmtree(host)
    Path(archive).rename(host)

    assert run(host, "-m", "host._vendor.selfhost", "demo").stdout.count("  ok ") == 5


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
