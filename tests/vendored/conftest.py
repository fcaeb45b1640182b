"""Copies of the tested package in a host's folder, made by docs/vendor.py, and bare processes for them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from vendoring import SECONDS, vendor

from selfhost.demo_model import write_demo_model

WHEELS = {"blake3": ("blake3",), "werkzeug": ("werkzeug", "markupsafe")}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a host with whole/sh, worker/sh and frontend/sh in host/_vendor.

    Tests only read it. What a process may import of other packages lies in folders of `wheels`, beside it.
    """
    base = tmp_path_factory.mktemp("vendored")
    for folder, side in (("whole", "both"), ("worker", "worker"), ("frontend", "frontend")):
        vendor(base / "site" / "host" / "_vendor" / folder, "--side", side, "--name", "sh")
    for wheel, packages in WHEELS.items():
        for package in packages:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            assert spec.origin is not None
            (base / "wheels" / wheel).mkdir(parents=True, exist_ok=True)
            (base / "wheels" / wheel / package).symlink_to(Path(spec.origin).parent)
    write_demo_model(str(base / "model"))
    return base


@pytest.fixture
def run(copies: Path, tmp_path: Path) -> Iterator[Run]:
    """Return a function that runs Python, without any installed package, in the empty folder `tmp_path`.

    `wheels` says what it finds besides the host, `site` where that lies; other keywords are variables.
    """

    def run_python(
        *arguments: str,
        code: int = 0,
        site: Path = copies / "site",
        wheels: tuple[str, ...] = tuple(WHEELS),
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        paths = [site, *(copies / "wheels" / wheel for wheel in wheels)]
        environment = {"PYTHONPATH": ":".join(map(str, paths)), "TMPDIR": str(tmp_path), **variables}
        result = subprocess.run(
            [sys.executable, "-S", "-B", "-W", "error", *arguments],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert result.returncode == code, result.stderr
        return result

    before = snapshot(copies)
    yield run_python
    assert snapshot(copies) == before, "a process wrote into the copy"


def snapshot(folder: Path) -> set[tuple[Path, int]]:
    """Return every path below a folder with the time of its last change."""
    return {(path, path.lstat().st_mtime_ns) for path in folder.rglob("*")}
