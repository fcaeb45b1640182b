"""What importing loads and does, watched in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import selfhost

PACKAGE = Path(selfhost.__file__).parent
EVERY_MODULE = sorted(
    ".".join(("selfhost", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py" and path.name != "app.py"
)

# Audit hooks see what is done in C, too. Reading code is what an import is for.
WATCH = """
import _thread, os, sys
done = []

def hook(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
        done.append((event, arguments[0]))
    elif event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.putenv")):
        done.append((event, arguments))

for name in {"start_new_thread", "start_joinable_thread"} & set(dir(_thread)):  # no event of their own
    def start(*arguments, _real=getattr(_thread, name), **named):
        done.append(("thread", arguments))
        return _real(*arguments, **named)
    setattr(_thread, name, start)

class Environment(dict):
    def _seen(self, *arguments):
        done.append(("environment", arguments))
        return None
    get = __getitem__ = __contains__ = __iter__ = items = keys = values = copy = _seen

before = set(sys.modules)
os.environ = os.environb = Environment()
sys.addaudithook(hook)
"""


def run(code: str, *arguments: str) -> str:
    """Run a script in a bare process that finds this very package; return what it prints."""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": os.environ.get("PATH", os.defpath)}
    command = [sys.executable, "-B", "-W", "error", "-c", code, *arguments]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout.strip()


def test_import_does_nothing() -> None:
    """`import selfhost` opens nothing, starts nothing, reads no environment and loads nothing heavy."""
    # catalogue 150
    heavy = "{'werkzeug', 'blake3', 'socket', 'threading', 'asyncio', 'http', 'logging'}"
    code = f"{WATCH}\nimport selfhost\nprint(done, {heavy} & set(sys.modules) - before)"

    assert run(code) == "[] set()"


@pytest.mark.parametrize("module", EVERY_MODULE)
def test_importing_a_module_does_nothing(module: str) -> None:
    """No module of the package opens, starts or reads anything when it is imported, or loads a wheel."""
    # catalogue 150
    code = (
        f"{WATCH}\nimport importlib\nimportlib.import_module(sys.argv[1])\n"
        "print(done, {'werkzeug', 'blake3'} & set(sys.modules))"
    )

    assert run(code, module) == "[] set()"


@pytest.mark.parametrize(
    "act",
    [
        "open('/dev/null').close()",
        "os.environ.get('HOME')",
        "import socket; socket.socket()",
        "import threading; thread = threading.Thread(target=int); thread.start(); thread.join()",
    ],
)
def test_the_watch_sees(act: str) -> None:
    """What the tests above forbid is noticed when it is done."""
    assert run(f"{WATCH}\n{act}\nprint(done)") != "[]"


def test_public_names_load() -> None:
    """Each public name can be had, is listed, and an unknown one is an AttributeError."""
    for name in selfhost.__all__:
        assert getattr(selfhost, name) is not None
    assert set(selfhost.__all__) <= set(dir(selfhost))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        selfhost.nothing  # noqa: B018


def test_embedded_server_loads_no_werkzeug() -> None:
    """A worker that serves a model and hashes its files never loads Werkzeug."""
    code = """
import contextlib, io, sys
from selfhost import demo
with contextlib.redirect_stdout(io.StringIO()):
    demo.run(keep=False)
print({"werkzeug", "markupsafe"} & set(sys.modules), "selfhost.worker.server" in sys.modules)
"""
    assert run(code) == "set() True"


def test_mounted_app_loads_no_server() -> None:
    """The WSGI app with its registry never loads the embedded server."""
    code = """
import sys
from selfhost import MetadataApp, MetadataArtifactRegistry
app = MetadataApp(MetadataArtifactRegistry())
request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/v1/metadata/a/_base/b"}
app(request, lambda status, fields: print(status[:3]))
print("werkzeug" in sys.modules, "selfhost.worker.server" in sys.modules)
"""
    assert run(code) == "404\nTrue False"


def loaded_by(folder: str) -> set[str]:
    """Return every module that is loaded by importing all modules of a folder, the app aside."""
    modules = [name for name in EVERY_MODULE if name.startswith(f"selfhost.{folder}.")]
    assert modules
    code = (
        "import importlib, sys\n[importlib.import_module(name) for name in sys.argv[1:]]\nprint(*sys.modules)"
    )
    return set(run(code, *modules).split())


def test_frontend_loads_no_worker() -> None:
    """A gateway loads neither Werkzeug nor anything of the worker, nor a package that is optional."""
    # catalogue 150
    loaded = loaded_by("frontend")

    assert loaded & {"werkzeug", "markupsafe", "blake3", "huggingface_hub"} == set()
    assert {name for name in loaded if name.startswith("selfhost.worker")} == set()


def test_worker_loads_no_frontend() -> None:
    """A worker loads nothing of the frontend, and Werkzeug in its app alone."""
    loaded = loaded_by("worker")

    assert {name for name in loaded if name.startswith("selfhost.frontend")} == set()
    assert "werkzeug" not in loaded


def test_tests_run_on_the_installed_package() -> None:
    """Where the caller says that the package is installed, the checkout does not stand in for it."""
    if os.environ.get("SELFHOST_EXPECT_INSTALLED"):
        assert "site-packages" in PACKAGE.parts
    else:
        assert (PACKAGE / "py.typed").is_file()
