"""Many frontends on one worker, and how soon a published model is there, against the real Dynamo 1.6.1.

    python benchmarks/bench_frontends.py --dynamo-python DYNAMO/bin/python

- 1 to 64 frontends at once: processes with a cache of their own that resolve one model of 20 MB from one
  worker at the same moment; seconds until the last has all of it. The worker is our embedded server, the
  real Dynamo worker, and nginx (as a yardstick);
- publication: a card with 20 MB of files is published in a file store; seconds until its directory is
  complete in the cache of a process of ours that watches the store, and in that of the real Dynamo frontend.
  The two take turns, each alone with the store, so that neither takes the other's processor.

Without --dynamo-python (or SELFHOST_DYNAMO_PYTHON) the comparison with Dynamo is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
import support
from support import AtMost

from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.model_dir import load_card
from selfhost.demo_model import write_demo_model
from selfhost.discovery import Bucket, FileDiscovery, RecordKey, instance_record, model_record
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver
from selfhost.frontend.watcher import ModelWatcher

BIG_FILES = {"vocab.json": 11_400_000, "merges.txt": 6_500_000, "added_tokens.json": 2_000_000}  # 20 MB
CROWDS = (1, 4, 16, 64)
TIMEOUT = 60.0


def main() -> None:
    parser = support.arguments(__doc__, rounds=5)
    parser.add_argument("--dynamo-python", default=os.environ.get("SELFHOST_DYNAMO_PYTHON"), metavar="PYTHON")
    parser.add_argument("--resolve", nargs=2, metavar=("CARD", "CACHE"), help=argparse.SUPPRESS)
    parser.add_argument("--watch", nargs=2, metavar=("STORE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resolve:
        resolve_when_told(*options.resolve)
    elif options.watch:
        watch(*options.watch)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-frontends-") as name:
            measure(options, Path(name))


def measure(options: Any, scratch: Path) -> None:
    """Make the model and measure both."""
    folder = scratch / "model"
    write_demo_model(str(folder))
    for seed, (name, size) in enumerate(BIG_FILES.items()):
        support.make_file(folder / name, size, seed)
    results = {
        "crowds": crowds(options, scratch, folder),
        "publication": publication(options, scratch, folder),
    }
    support.write_json(options.json, results)


# ------------------------------------------------------------------ many frontends


def crowds(options: Any, scratch: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Measure each number of frontends on each worker."""
    with contextlib.ExitStack() as stack:
        origins = {"ours": servers.python_host("embedded", folder, scratch / "ours", [])}
        if shutil.which("nginx"):
            origins["nginx"] = servers.nginx(folder, scratch / "nginx", [])
        if options.dynamo_python:
            origins["dynamo"] = servers.dynamo(options.dynamo_python, folder, scratch / "dynamo", [])
        cards = {}
        for name, server in origins.items():
            stack.enter_context(server)
            server.wait_ready("vocab.json", BIG_FILES["vocab.json"])
            cards[name] = scratch / f"{name}.card.json"
            cards[name].write_text(
                card_at(folder, f"http://127.0.0.1:{server.port}{server.prefix}").to_json()
            )
        results = {}
        for count in CROWDS:
            work = {
                name: functools.partial(crowd, card, count, scratch / "caches")
                for name, card in cards.items()
            }
            results[str(count)] = support.interleaved(work, options.rounds)
    rows = [
        [
            name,
            *(f"{median(results[str(count)][name]):.3f} s" for count in CROWDS),
            support.against(results[str(CROWDS[-1])], name, "dynamo"),
        ]
        for name in cards
    ]
    header = ["frontends at once", *map(str, CROWDS), f"{CROWDS[-1]}: x dynamo"]
    support.table("until the last frontend has 20 MB", header, rows)
    return results


def card_at(folder: Path, prefix: str, name: str = "bench") -> ModelDeploymentCard:
    """Return the card of the model with URLs that begin with `prefix`."""
    return load_card(folder, name=name).map_files(lambda file: file.move_to_url(prefix + str(file.basename)))


def crowd(card: Path, count: int, caches: Path) -> float:
    """Let `count` processes resolve the card at once; return the seconds until the last one has it."""
    caches.mkdir()
    command = [sys.executable, __file__, "--resolve", str(card)]
    processes = [
        subprocess.Popen(
            [*command, str(caches / str(number))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        start = time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            assert process.wait(TIMEOUT) == 0
        return time.perf_counter() - start
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        shutil.rmtree(caches)
        os.sync()


def resolve_when_told(card_path: str, cache: str) -> None:
    """One frontend of a crowd: be ready, wait for the end of standard input, resolve."""
    card = ModelDeploymentCard.from_json(Path(card_path).read_text())
    with MetadataResolver(BlobCache(cache, fsync=False)) as resolver:
        print("ready", flush=True)
        sys.stdin.read()
        resolver.resolve(card)


# ------------------------------------------------------------------ publication


def publication(options: Any, scratch: Path, folder: Path) -> dict[str, list[float]]:
    """Measure the time from a card's publication to its complete directory."""
    watchers = {"ours": our_watcher}
    if options.dynamo_python:
        watchers["dynamo"] = functools.partial(dynamo_frontend, options.dynamo_python)
    with servers.python_host("embedded", folder, scratch / "origin", []) as origin:
        prefix = f"http://127.0.0.1:{origin.port}{origin.prefix}"
        work = {
            name: functools.partial(publish_and_wait, start, scratch / f"watch-{name}", folder, prefix)
            for name, start in watchers.items()
        }
        figures = support.interleaved(work, options.rounds)
    rows = [
        [name, f"{median(times) * 1000:.0f} ms", support.against(figures, name, "dynamo", goal)]
        for (name, times), goal in zip(figures.items(), (AtMost(1.0), None))
    ]
    support.table("from publication to a complete directory, 20 MB", ["frontend", "median", "x dynamo"], rows)
    return figures


def publish_and_wait(start: Any, scratch: Path, folder: Path, prefix: str) -> float:
    """Start a frontend with nothing in its cache, publish a card, wait for its directory."""
    shutil.rmtree(scratch, ignore_errors=True)
    store = scratch / "kv"
    (store / "v1" / "mdc").mkdir(parents=True)
    card = card_at(folder, prefix)
    home = scratch / "home"
    directory = home / ".cache" / "dynamo" / "mdc" / "by-slug" / card.slug / card.mdcsum
    names = {str(file.basename): file.size for file, _ in card.iter_metadata_files()}
    with start(store, home), FileDiscovery(str(store)) as discovery:
        key = RecordKey("dynamo", "backend", "generate", 77)
        discovery.publish(Bucket.INSTANCES, key, instance_record(key, transport="127.0.0.1:9/x"))
        begin = time.perf_counter()
        discovery.publish(Bucket.MODELS, key, model_record(key, card.to_json()))
        while not is_complete(directory, names):
            if time.perf_counter() - begin > TIMEOUT:
                raise SystemExit(f"{directory} is not complete after {TIMEOUT} s")
            time.sleep(0.001)
        return time.perf_counter() - begin


def is_complete(directory: Path, names: dict[str, Optional[int]]) -> bool:
    """Tell whether every file is there in its whole length (both give a file its name when it is whole)."""
    try:
        return all(os.stat(directory / name).st_size == size for name, size in names.items())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def our_watcher(store: Path, home: Path) -> Iterator[None]:
    """Run `watch` below in a process of its own."""
    cache = home / ".cache" / "dynamo" / "mdc"
    command = [sys.executable, __file__, "--watch", str(store), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def watch(store: str, cache: str) -> None:
    """Keep every model that is published resolved, as a gateway does, until killed."""
    resolver = MetadataResolver(BlobCache(cache))
    with FileDiscovery(store) as discovery, resolver, ModelWatcher(discovery, resolver):
        print("ready", flush=True)
        threading.Event().wait()


@contextlib.contextmanager
def dynamo_frontend(python: str, store: Path, home: Path) -> Iterator[None]:
    """Run the real frontend on the store."""
    port = servers.unused_port()
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    command = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), *planes]
    loopback = {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1"}
    environment = {"DYN_FILE_KV": str(store), "DYN_LOG": "off", **loopback}
    with servers.Server("dynamo frontend", command, home, **environment) as frontend:  # `home` is its HOME
        wait_answers(frontend, port)
        yield


def wait_answers(frontend: servers.Server, port: int) -> None:
    """Wait until the frontend lists its models: none yet."""
    deadline = time.monotonic() + servers.START_SECONDS
    while time.monotonic() < deadline and frontend.process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise SystemExit(f"the frontend does not answer:\n{frontend.log()}")


if __name__ == "__main__":
    main()
