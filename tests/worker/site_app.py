"""The files that test_http_table.py asks for, and the foreign servers that serve them from another process.

Run as `python site_app.py waitress|wsgiref|dispatcher FD DIRECTORY`, or give `site_app:make('DIRECTORY')` to
a WSGI server; FD is a bound, listening socket.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Callable

from selfhost.worker.app import MetadataApp
from selfhost.worker.registry import MetadataArtifactRegistry

PREFIX = "/any/where"  # of the mounted app

DIGITS = b"0123456789"
LARGE = bytes(range(251)) * 1200  # more than leaves the embedded server in one piece
HOSTILE_NAMES = [
    "what?.json",
    "what?a=b&blake3=c.json",
    "sharp#1.json",
    "100%.json",
    "%41.json",
    "%2e%2e%2fetc",
    "two words .json",
    " ",
    "naïve 模型 🦙.json",
    "quo\"te's.json",
    "semi;colon&amp=+.json",
    "<script>.html",
    "...",
    "..hidden",
    "~",
    "[1]{2}|^`.json",
    "x" * 251 + ".txt",
]

# (slug, suffix, filename, content) in the order of registration
FILES: list[tuple[str, str, str, bytes]] = [
    ("m", "_base", "config.json", b'{"max_position_embeddings": 4096}\n'),
    ("m", "_base", "digits.txt", DIGITS),
    ("m", "_base", "empty.txt", b""),
    ("m", "_base", "large.bin", LARGE),
    ("m", "_base", "page.html", b"<script>alert(1)</script>"),
    ("m", "_base", "twice.json", b"first"),
    ("m", "_base", "twice.json", b"second"),
    ("m", "lora-a", "config.json", b"adapter"),
    ("", "_base", "config.json", b"a model whose name has no ASCII letter"),
    *[("hostile", "_base", name, name.encode()) for name in HOSTILE_NAMES],
]

# (slug, suffix, text), in the same order
CARDS: list[tuple[str, str, str]] = [
    ("m", "_base", '{"display_name":"M"}'),
    ("m", "_base", '{"display_name":"m"}'),
    ("m", "lora-a", '{"display_name":"lora/a"}'),
    ("", "_base", '{"display_name":"模型"}'),
]


def fill(directory: str) -> MetadataArtifactRegistry:
    """Write the files below `directory`, each where its number says, and register them."""
    registry = MetadataArtifactRegistry()
    for number, (slug, suffix, filename, content) in enumerate(FILES):
        path = os.path.join(directory, f"{number}")
        with open(path, "wb") as file:
            file.write(content)
        registry.register(slug, suffix, filename, path)
    for card in CARDS:
        registry.register_card(*card)
    with open(os.path.join(directory, "secret.txt"), "wb") as file:  # beside them, and never registered
        file.write(b"secret")
    return registry


def make(directory: str) -> MetadataApp:
    """Return the app for a WSGI server."""
    return MetadataApp(fill(directory))


def mount(app: Callable[..., Any]) -> Callable[..., Any]:
    """Return `app` under `PREFIX` of an application that knows nothing else."""
    from werkzeug.exceptions import NotFound
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    return DispatcherMiddleware(NotFound(), {PREFIX: app})


def serve_wsgiref(app: Callable[..., Any], listener: socket.socket) -> None:
    """Serve with the standard library's reference server, which checks every answer."""
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
    from wsgiref.validate import validator

    server = WSGIServer(("127.0.0.1", 0), WSGIRequestHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()
    server.setup_environ()
    server.set_app(validator(app))
    server.serve_forever()


def serve_waitress(app: Callable[..., Any], listener: socket.socket) -> None:
    """Serve with waitress."""
    import waitress

    waitress.serve(app, sockets=[listener])


if __name__ == "__main__":
    _, kind, fd, directory = sys.argv
    app: Callable[..., Any] = make(directory)
    app = mount(app) if kind == "dispatcher" else app
    serve = serve_waitress if kind == "waitress" else serve_wsgiref
    serve(app, socket.socket(fileno=int(fd)))
