"""A copy where something is missing that most systems have: it works, or says what it lacks.

Each test takes one thing away from a process of its own. PRELUDE is what they all begin with: `serve` is a
worker's whole way, `resolve` a frontend's, `told` runs something that must fail and prints the error.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Callable

import pytest

Run = Callable[..., "CompletedProcess[str]"]
Script = Callable[..., "list[str]"]

PRELUDE = """
import http.client, os, sys, threading
import host._vendor.whole.sh as copy
from host._vendor.whole.sh.discovery import Bucket, FileDiscovery, MemoryDiscovery, RecordKey

MODEL = sys.argv[1]

def runtime(**settings):
    return copy.DistributedRuntime(copy.Settings(True, "127.0.0.1", **{"system_port": 0, **settings}))

def mounted(**settings):
    return runtime(system_port=None, advertise_url="http://host", **settings)

def register(runtime):
    return copy.register_model(
        "Tokens", "Chat", runtime.endpoint("a.b.c"), MODEL, "m", worker_type="aggregated"
    )

def serve(**settings):
    with runtime(**settings) as started:
        files = register(started).files
        for file in files:
            connection = http.client.HTTPConnection(file.url.split("/")[2], timeout=30)
            connection.request("GET", "/" + file.url.split("/", 3)[3])
            assert len(connection.getresponse().read()) == file.size
            connection.close()
        print("served", len(files))

def resolve(cache=None, offline=False):
    transports = copy.default_transports(file_roots=[MODEL])
    with copy.MetadataResolver(cache, transports=transports, offline=offline) as resolver:
        found = resolver.resolve(copy.load_card(MODEL))
        print("resolved", len(found.fetched))
        return found

def told(action):
    before = len(os.listdir("/dev/fd")), threading.active_count()
    try:
        print("no error:", action())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    assert (len(os.listdir("/dev/fd")), threading.active_count()) == before
"""


@pytest.fixture
def script(run: Run, copies: Path) -> Script:
    """Return a function that runs PRELUDE and more code; what that prints, on both streams, line by line."""

    def run_script(*codes: str, **options: object) -> list[str]:
        code = "".join(map(textwrap.dedent, (PRELUDE, *codes)))
        result = run("-c", code, str(copies / "model"), **options)
        return (result.stdout + result.stderr).splitlines()

    return run_script


# ------------------------------------------------------------------ the disk

# Modes do not bind root, unless it gives that privilege up.
DROP_CAPABILITIES = """
import ctypes, struct
if os.geteuid() == 0:
    assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0
"""


@pytest.fixture
def read_only(script: Script, tmp_path: Path) -> Iterator[Path]:
    """Return the folder of the test, which has a filled cache and which nobody can write to."""
    script('resolve(copy.BlobCache("filled"))')
    for path in (*tmp_path.rglob("*"), tmp_path):
        if not path.is_symlink():
            path.chmod(0o500 if path.is_dir() else 0o400)
    yield tmp_path
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_read_only_disk(script: Script, read_only: Path) -> None:
    """A worker serves, and only what must write fails: a store, a cache; one that was filled is used."""
    before = sorted(read_only.rglob("*"))
    thread, process, store, cache, filled = script(
        DROP_CAPABILITIES,
        """
        serve(discovery_backend="mem")
        serve(discovery_backend="mem", isolation="process")
        with runtime(file_kv="kv") as started:
            told(lambda: register(started))
            assert started.metadata_artifacts.is_empty()
        told(lambda: copy.BlobCache("cache"))
        resolve(copy.BlobCache("filled"))
        """,
        HOME=str(read_only),
    )

    assert (thread, process, filled) == ("served 5", "served 5", "resolved 0")
    assert store.startswith("DiscoveryError: cannot publish 'a/b/c/")
    assert "Permission denied" in store
    assert "DYN_FILE_KV sets another" in store
    assert cache.startswith(f"CacheError: cannot use the cache root '{read_only}/cache': Permission denied")
    assert sorted(read_only.rglob("*")) == before


def test_no_home(script: Script, tmp_path: Path) -> None:
    """A worker needs none; a frontend takes a private temporary cache, warns once, and removes it at exit."""
    served, resolved, place, warning = script(
        """
        serve(discovery_backend="mem")
        found = resolve()
        print(found.local_dir, oct(os.stat(copy.BlobCache().root).st_mode))
        """
    )

    assert (served, resolved) == ("served 5", "resolved 5")
    root, _, mode = place.partition("/by-slug/")
    assert os.path.dirname(root) == str(tmp_path)
    assert mode.endswith(" 0o40700")
    assert "DYN_MDC_CACHE is not set, nor is HOME" in warning
    assert list(tmp_path.iterdir()) == []


# A folder that is missing is not enough: Python would take /var/tmp, or the working directory.
NO_TMP = 'import tempfile; tempfile._candidate_tempdir_list = lambda: [os.environ["TMPDIR"]]\n'


def test_no_tmp(script: Script, tmp_path: Path) -> None:
    """A worker serves with a store elsewhere, a frontend with a cache elsewhere; without one, it says so."""
    served, resolved, cache, store = script(
        NO_TMP,
        """
        serve(file_kv="kv")
        resolve(copy.BlobCache("cache"))
        told(lambda: copy.MetadataResolver())
        told(lambda: register(copy.DistributedRuntime(copy.Settings.from_env(advertise_url="http://host"))))
        """,
        TMPDIR="/proc/missing",
    )

    assert (served, resolved) == ("served 5", "resolved 5")
    assert cache.startswith(
        "CacheError: the usual cache cannot be used: DYN_MDC_CACHE is not set, nor is HOME"
    )
    assert "No usable temporary directory found" in cache
    assert "set DYN_MDC_CACHE to a folder that can be written" in cache
    assert store.startswith("DiscoveryError: cannot publish")
    assert "/proc/missing" in store
    assert "DYN_FILE_KV sets another" in store
    assert {path.name for path in tmp_path.iterdir()} == {"kv", "cache"}


def test_umask_that_opens_everything(script: Script) -> None:
    """With umask 0 the cache and what processes share are private all the same, and only we may write."""
    lines = script(
        """
        os.umask(0)
        resolve(copy.BlobCache("cache"))
        registry = copy.MetadataArtifactRegistry(shared="shared")
        registry.register("m", "_base", "config.json", os.path.join(MODEL, "config.json"))
        for top in ("cache", "shared"):
            print(top, oct(os.stat(top).st_mode))
            for folder, folders, names in os.walk(top):
                paths = [os.path.join(folder, name) for name in folders + names]
                print(*(path for path in paths if not os.path.islink(path) and os.stat(path).st_mode & 0o22))
        registry.close()
        """
    )

    assert [line for line in lines if line] == ["resolved 5", "cache 0o40700", "shared 0o40700"]


def test_umask_that_closes_everything(script: Script, tmp_path: Path) -> None:
    """With umask 077 both sides work, and a record has the mode that frontends of other users need."""
    lines = script(
        """
        os.umask(0o077)
        resolve(copy.BlobCache("cache"))
        with FileDiscovery("kv") as discovery:
            discovery.publish(Bucket.MODELS, RecordKey("a", "b", "c", 1), "{}")
            for folder, _, names in os.walk("kv"):
                for name in names:
                    print(oct(os.stat(os.path.join(folder, name)).st_mode))
        serve(file_kv="kv")
        """
    )

    assert lines == ["resolved 5", "0o100644", "served 5"]
    assert not [path for path in (tmp_path / "kv").rglob("*") if path.is_file()]


# ------------------------------------------------------------------ the network, threads

NO_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise PermissionError(1, "Operation not permitted")
socket.socket.__init__ = socket.getaddrinfo = refuse
"""


def test_no_network(script: Script) -> None:
    """Without sockets a mounted app works, and a frontend has what is on the disk; the rest says why not."""
    server, status, resolved, again, *failed = script(
        NO_NETWORK,
        """
        told(runtime().start)
        with mounted(discovery_backend="mem") as started:
            register(started)
            environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/v1/metadata/m/_base/config.json"}
            copy.MetadataApp(started.metadata_artifacts)(environ, lambda status, fields: print(status))
        resolve(copy.BlobCache("cache"))
        resolve(copy.BlobCache("cache"), offline=True)
        file = copy.CheckedFile("http://127.0.0.1:1/a.json", copy.Checksum.of(b""), 0)
        card = copy.ModelDeploymentCard("n", extra_files=[file])
        told(lambda: copy.MetadataResolver(copy.BlobCache("cache")).resolve(card))
        """,
    )

    assert server.startswith(
        "StatusServerError: the status server cannot listen on 127.0.0.1:0: Operation not"
    )
    assert (status, resolved, again) == ("200 OK", "resolved 5", "resolved 0")
    assert failed[0].startswith("ResolveError: ")
    assert "Operation not permitted" in "".join(failed)


# No system has memory for a stack of this size, so that no thread starts: as at the limit of their number.
NO_THREADS = "threading.stack_size(1 << 47)\n"


def test_no_threads(script: Script, tmp_path: Path) -> None:
    """Where no thread starts, what needs one fails with its own error and leaves nothing; the rest works."""
    thread, process, store, registered, resolved, watcher, warning = script(
        NO_THREADS,
        """
        told(runtime().start)
        told(runtime(isolation="process").start)
        with mounted(file_kv="kv") as started:
            told(lambda: register(started))
            assert started.metadata_artifacts.is_empty()
        with mounted(discovery_backend="mem") as started:
            print("registered", len(register(started).files))
        resolve(copy.BlobCache("cache"))
        watcher = copy.ModelWatcher(MemoryDiscovery(), copy.MetadataResolver(copy.BlobCache("cache")))
        told(watcher.start)
        """,
    )

    for server in (thread, process):
        assert server.startswith(
            "StatusServerError: the status server cannot run on 127.0.0.1:0: can't start new"
        )
        assert "the process is at its limit of threads" in server
    assert store.startswith("DiscoveryError: cannot publish 'a/b/c/")
    assert "can't start new thread" in store
    assert (registered, resolved) == ("registered 5", "resolved 5")
    assert watcher.startswith("DiscoveryError: cannot watch for models: can't start new thread")
    assert "fetching with 1 threads only" in warning
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# ------------------------------------------------------------------ the wheels


def test_missing_blake3_is_told_at_the_first_hash(run: Run, script: Script) -> None:
    """Without blake3 everything loads; the first hash, on either side, is an error that names the wheel."""
    lines = script(
        """
        for name in copy.__all__:
            getattr(copy, name)
        told(lambda: serve(discovery_backend="mem"))
        told(lambda: resolve(copy.BlobCache("cache")))
        """,
        wheels=("werkzeug",),
    )
    demo = run("-m", "host._vendor.whole.sh", "demo", wheels=(), code=1).stderr

    assert len(lines) == 2
    for line in lines:
        assert line.startswith("SelfHostError: hashing needs the wheel `blake3`")
        assert "pip install blake3" in line
    assert demo.startswith("selfhost: error: hashing needs the wheel `blake3`")
    assert len(demo.splitlines()) == 1


def test_missing_werkzeug_is_told_by_the_app_alone(script: Script) -> None:
    """Without Werkzeug an embedded server serves; only MetadataApp says what it needs."""
    served, app = script('serve(discovery_backend="mem")\ntold(lambda: copy.MetadataApp)', wheels=("blake3",))

    assert served == "served 5"
    assert app == (
        "ModuleNotFoundError: cannot load MetadataApp of host._vendor.whole.sh: "
        "it needs 'werkzeug', which cannot be found"
    )
