"""`isolation="process"` from a copy: that process loads nothing of the package in which the copy lies."""

from __future__ import annotations

import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Callable

import pytest

SERVE = """
import http.client, os, sys, threading
started = []
sys.addaudithook(lambda event, given: started.append(event) if event == "subprocess.Popen" else None)
from guest._vendor.sh import MetadataArtifactRegistry, SystemStatusServer

registry = MetadataArtifactRegistry()
target = registry.register("m", "_base", "config.json", sys.argv[1]).targets["config.json"]
with SystemStatusServer(registry, isolation="process") as server:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("GET", target)
    answer = connection.getresponse()
    print(answer.status, answer.read() == open(sys.argv[1], "rb").read(), len(started))
    connection.close()
    print(server.counters().requests)
print([thread.name for thread in threading.enumerate()])
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no child")
print(os.getpid())
"""


@pytest.mark.parametrize("is_packed", [False, True])
def test_process_loads_the_copy_alone(
    run: Callable[..., CompletedProcess[str]], copies: Path, tmp_path: Path, is_packed: bool
) -> None:
    """What the host's package does when it is imported is done by the host alone, also from a zip."""
    site = tmp_path / "site"
    shutil.copytree(copies / "site" / "host" / "_vendor" / "worker" / "sh", site / "guest" / "_vendor" / "sh")
    note = tmp_path / "imported"
    code = f"import os\nwith open({str(note)!r}, 'a') as file:\n    print(os.getpid(), file=file)\n"
    for package in (site / "guest", site / "guest" / "_vendor"):
        (package / "__init__.py").write_text(code)
    if is_packed:
        site = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", site))
    config = copies / "model" / "config.json"
    lines = run("-c", SERVE, str(config), site=site, wheels=("blake3",)).stdout.splitlines()

    assert lines[:-1] == ["200 True 1", "{200: 1}", "['MainThread']", "no child"]
    assert note.read_text().split() == [lines[-1], lines[-1]]
