"""A Python process that serves a folder's files, to be measured; prints `ready PORT` when it does.

    python host_python.py embedded|process|none|waitress|stdlib FOLDER [spin]

`embedded` is our SystemStatusServer, `process` the same in a process of its own, `none` a host without any
server. `app` is our WSGI application for the folder in the environment variable FOLDER, for gunicorn
(`host_python:app()`).
"""

from __future__ import annotations

import functools
import http.server
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spin


def registry_of(folder: str) -> Any:
    """Return a registry that holds every file of `folder`, as an attached model's."""
    from selfhost.worker.registry import BASE_SUFFIX, MetadataArtifactRegistry

    registry = MetadataArtifactRegistry()
    registry.register_files("bench", BASE_SUFFIX, {path.name: str(path) for path in Path(folder).iterdir()})
    return registry


def app() -> Any:
    """Return our WSGI application."""
    from selfhost.worker.app import MetadataApp

    return MetadataApp(registry_of(os.environ["FOLDER"]))


def embedded(folder: str, isolation: str = "thread") -> None:
    """Serve with our embedded server."""
    from selfhost.worker.server import SystemStatusServer

    with SystemStatusServer(registry_of(folder), isolation=isolation) as server:
        print("ready", server.port, flush=True)
        threading.Event().wait()


def process(folder: str) -> None:
    """Serve with our server in a process of its own."""
    embedded(folder, "process")


def none(folder: str) -> None:
    """Serve nothing."""
    print("ready", 0, flush=True)
    threading.Event().wait()


def waitress(folder: str) -> None:
    """Serve our WSGI application with waitress."""
    from waitress.server import create_server

    os.environ["FOLDER"] = folder
    server = create_server(app(), host="127.0.0.1", port=0, threads=16, connection_limit=1000)
    print("ready", server.effective_port, flush=True)
    server.run()


def stdlib(folder: str) -> None:
    """Serve with the standard library's file server, kept connections allowed."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print("ready", server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    if "spin" in sys.argv[3:]:
        spin.start()
    kinds = {"embedded": embedded, "process": process, "none": none, "waitress": waitress, "stdlib": stdlib}
    kinds[sys.argv[1]](sys.argv[2])
