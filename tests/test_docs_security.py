"""What docs/security.md shows is run, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import trustme
from documents import run

from selfhost.settings import FrontendSettings, Settings

GUIDE = documents.read("docs/security.md")
SAMPLES = {name: text for name, text in documents.samples(GUIDE).items() if name.endswith(".py")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the sample, a model directory, certificates and a token."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name, host in (("worker.pem", "127.0.0.1"), ("frontend.pem", "frontend.test")):
        authority.issue_cert(host).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / name))
    (tmp_path / "token").write_text("0123456789abcdef" * 4 + "\n")
    return documents.write_samples(tmp_path, SAMPLES)


def test_every_python_block_is_a_sample() -> None:
    """No block of Python goes untested."""
    assert set(SAMPLES) == {"open_port.py"}
    assert GUIDE.count("```python") == 1


def test_sample_fetches_by_tls_and_token(folder: Path) -> None:
    """The files come over TLS, by both sides' certificates and the token, and are those of the model."""
    paths = run(folder, sys.executable, "-X", "dev", "open_port.py")

    assert len(paths) == 5
    for path in map(Path, paths):
        assert (folder / path).read_bytes() == (folder / "my-model" / path.name).read_bytes()


@pytest.mark.parametrize(("good", "bad"), [(', "frontend.pem"', ""), (".strip()", ".strip()[1:]")])
def test_sample_needs_both(folder: Path, good: str, bad: str) -> None:
    """Without the client's certificate, or without the right token, the same program gets nothing."""
    text = SAMPLES["open_port.py"].replace(good, bad)
    done = subprocess.run(
        (sys.executable, "-c", text),
        cwd=folder,
        env=documents.environment(folder),
        capture_output=True,
        text=True,
        timeout=documents.SECONDS,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert "ResolveError" in done.stderr


def test_every_variable_exists() -> None:
    """The variables that the guide names are read."""
    read: set[str] = set()

    class Spy(dict):  # type: ignore[type-arg]
        def get(self, name: str, default: object = None) -> object:
            read.add(name)
            return super().get(name, default)

    Settings.from_env(Spy())
    FrontendSettings.from_env(Spy())

    assert set(re.findall(r"DYN_[A-Z_]+[A-Z]", GUIDE)) <= read
