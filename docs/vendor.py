"""Copy selfhost, or one of its sides, into another package; check the copy before it takes its place.

    python docs/vendor.py host/_vendor --side worker

makes host/_vendor/selfhost, for `from host._vendor.selfhost import ...`. What is copied is the checkout in
which this script lies, else the installed package. The copy takes the place of an older one, of nothing else,
and only if it works. Standard library only; the check needs the wheel blake3.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

COMMAND_LINE = ("cli", "demo.py", "demo_model.py", "__main__.py")  # knows both sides
LEFT_OUT = {"worker": ("frontend", *COMMAND_LINE), "frontend": ("worker", *COMMAND_LINE), "both": ()}
NEEDS = {
    "worker": "blake3; werkzeug (MetadataApp only), prometheus_client (metrics only)",
    "frontend": "blake3; huggingface_hub (hf:// files only), prometheus_client (metrics only)",
    "both": "blake3; werkzeug (MetadataApp), huggingface_hub (hf:// files), prometheus_client (metrics)",
}
MARK = "VENDORED.txt"  # a folder that has it is a copy, and may be replaced
TAKEN = getattr(sys, "stdlib_module_names", sys.builtin_module_names)  # Python's own modules
DATA = b'{"model_type": "check"}'  # what the round trips carry


def main() -> None:
    """Copy, check, put in place; SystemExit with the reason if there is one not to."""
    parser = argparse.ArgumentParser(description="Copy selfhost into another package, and check the copy.")
    parser.add_argument("dest", type=Path, help="the folder to copy into; made if it is missing")
    parser.add_argument("--side", choices=LEFT_OUT, default="both")
    parser.add_argument("--name", default="selfhost", help="the copy's own name (%(default)s)")
    parser.add_argument("--check", action="store_true", help="only check the copy that is there")
    arguments = parser.parse_args()
    dest, side, name = arguments.dest, arguments.side, arguments.name
    if not name.isidentifier() or keyword.iskeyword(name) or name in TAKEN:
        raise SystemExit(f"{name!r} is no name for a package of one's own")
    if arguments.check:
        return check(dest, side, name)
    refuse_stranger(dest / name)
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".vendoring-") as staging:
        made = Path(staging, "new", name)
        copy(find_source(), made, side)
        check_elsewhere(made, side)
        put_in_place(made, dest / name, Path(staging, "old"))
    print(f"{dest / name}: selfhost {version_of(dest / name)}, {side}; needs {NEEDS[side]}")
    return None


# ------------------------------------------------------------------ copying


def find_source() -> Path:
    """Return the folder of the package: the one of this script's checkout, else the installed one."""
    checkout = Path(__file__).resolve().parents[1] / "selfhost"
    spec = importlib.util.find_spec("selfhost")
    if not checkout.is_dir() and (spec is None or spec.origin is None):
        raise SystemExit("there is no selfhost here to copy: install it, or run this script in a checkout")
    return checkout if checkout.is_dir() or spec is None else Path(str(spec.origin)).parent


def copy(source: Path, made: Path, side: str) -> None:
    """Copy what the side needs, its licence and a note on what this is."""
    others = {str(source): LEFT_OUT[side]}
    shutil.copytree(source, made, ignore=lambda folder, _: ("__pycache__", *others.get(folder, ())))
    installed = source.parent.glob("selfhost-*.dist-info/**/LICENSE")
    licence = next((path for path in (*installed, source.parent / "LICENSE") if path.is_file()), None)
    if licence is None:
        raise SystemExit(f"{source} has no LICENSE beside it, which every copy must carry")
    shutil.copy(licence, made / "LICENSE")  # with its mode: others are to read it, whatever the umask
    (made / MARK).write_text(
        f"selfhost {version_of(made)}, made by its docs/vendor.py; do not edit, the next copy replaces it\n"
        f"side: {side}\nleft out: {', '.join(LEFT_OUT[side]) or 'nothing'}\nneeds: {NEEDS[side]}\n"
        "licence: Apache-2.0, see LICENSE\n"
    )


def version_of(folder: Path) -> str:
    """Return the version of a copy, which is not imported for that."""
    text = (folder / "__init__.py").read_text()
    return str(re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0])


def refuse_stranger(target: Path) -> None:
    """Raise SystemExit if something is in the way that is no such copy."""
    if os.path.lexists(target) and (target.is_symlink() or not (target / MARK).is_file()):
        raise SystemExit(f"{target} is no copy that this script made (it has no {MARK}): it is left alone")


def put_in_place(made: Path, target: Path, attic: Path) -> None:
    """Give the new copy its name; the old one has it until then, and keeps it if that fails."""
    if target.exists():
        target.rename(attic)
    try:
        made.rename(target)
    except OSError:
        if attic.exists():
            attic.rename(target)
        raise


# ------------------------------------------------------------------ checking


def check_elsewhere(made: Path, side: str) -> None:
    """Check the copy in a Python that finds nothing else of ours, with neither environment nor user site."""
    command = [sys.executable, "-I", "-B", __file__, str(made.parent), "--side", side, "--name", made.name]
    result = subprocess.run([*command, "--check"], stderr=subprocess.PIPE, text=True, timeout=300)  # noqa: S603
    if result.returncode:
        raise SystemExit(f"the copy does not work, and is not put in place:\n{result.stderr}")


def check(folder: Path, side: str, name: str) -> None:
    """Import every module of the copy, then serve, or fetch, one file."""
    sys.path.insert(0, str(folder.resolve().parent))
    package = f"{folder.resolve().name}.{name}"  # one level down, so that no name hides a module of Python's
    import_all(folder / name, package)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_bytes(DATA)
        if side != "frontend":
            serve_a_file(package, Path(scratch, "config.json"))
        if side != "worker":
            fetch_a_file(package, Path(scratch))
    if any(module.partition(".")[0] == "selfhost" for module in sys.modules):
        raise SystemExit("the copy imports selfhost itself")


def import_all(folder: Path, package: str) -> None:
    """Import every module but the one that runs the command line."""
    for path in sorted(folder.rglob("*.py")):
        parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
        try:
            if parts != ["__main__"]:
                import_module(".".join((package, *parts)))
        except ModuleNotFoundError as error:
            if error.name != "werkzeug":
                raise
            print(f"not checked: {'.'.join(parts)}, for werkzeug is missing here")


def serve_a_file(package: str, file: Path) -> None:
    """Register a file, serve it, and fetch it with a client that knows nothing of us."""
    registry = import_module(f"{package}.worker.registry").MetadataArtifactRegistry()
    target = registry.register("model", "_base", file.name, str(file)).targets[file.name]
    with import_module(f"{package}.worker.server").SystemStatusServer(registry) as server:
        connection = HTTPConnection(server.host, server.port, timeout=30)
        connection.request("GET", target)
        found = connection.getresponse().read()
        connection.close()
    if found != DATA:
        raise SystemExit(f"the worker served {found!r} in the place of {DATA!r}")


def fetch_a_file(package: str, scratch: Path) -> None:
    """Resolve the card of a model with one file, which a server that knows nothing of us has."""
    card, frontend = import_module(f"{package}.card"), import_module(f"{package}.frontend")
    with origin(scratch) as url:
        file = card.CheckedFile(f"{url}/config.json", card.Checksum.of(DATA), len(DATA))
        model = card.ModelDeploymentCard("check", extra_files=(file,))
        with frontend.MetadataResolver(frontend.BlobCache(scratch / "cache")) as resolver:
            found = Path(resolver.resolve(model).local_dir, "config.json").read_bytes()
    if found != DATA:
        raise SystemExit(f"the frontend fetched {found!r} in the place of {DATA!r}")


@contextlib.contextmanager
def origin(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback for the time of a `with`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    main()
