"""What the tests of copies share: running docs/vendor.py as a reader would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import documents

SCRIPT = Path(__file__).parents[1] / "docs" / "vendor.py"
SECONDS = 60.0  # for what takes one unless it is broken


def vendor(dest: Path, *options: str, script: Path = SCRIPT, code: int = 0) -> str:
    """Run the script to its end; return what it says: on stderr, if it is to fail with `code`."""
    command = [sys.executable, str(script), str(dest), *options]
    environment = documents.environment(dest.parent)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == code, result.stderr
    return result.stderr if code else result.stdout
