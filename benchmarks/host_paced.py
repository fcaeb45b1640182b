"""A host with a loop of its own that serves a folder's files from inside its process, or not at all.

python host_paced.py none|thread|process FOLDER      prints `ready PORT`
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pace
from host_python import registry_of


def main(kind: str, folder: str) -> None:
    """Serve, and step."""
    if kind != "none":
        from selfhost.worker.server import SystemStatusServer

        server = SystemStatusServer(registry_of(folder), "127.0.0.1", 0, isolation=kind).start()
    print("ready", 0 if kind == "none" else server.port, flush=True)
    pace.start()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
