"""What serving costs its host: the latency of the host's own loop while 64 clients download 17 MB each.

    python benchmarks/bench_embed.py --dynamo-python DYNAMO/bin/python

The host does a step of about 2 ms of Python every 10 ms (pace.py), and serves from a thread of its own, from
a small process of its own, or not at all; the real Dynamo worker is the same host with Dynamo's route in it.
Host and load generator share the processors as they come. Because 64 downloads take processor time wherever
they are served, the host that serves nothing is also measured beside nginx, which serves the same load from
outside. All take turns within a round; what counts is the median of the rounds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
import support

from selfhost.demo_model import write_demo_model

HERE = Path(__file__).resolve().parent
NAMES = {"none": "no server", "thread": "ours, a thread", "process": "ours, a process", "dynamo": "Dynamo"}
SIZE = 17_000_000


class Figures(NamedTuple):
    """How long the host's steps took, in milliseconds, and how many downloads there were in a second."""

    p50: float
    p99: float
    most: float
    downloads: float


def main() -> None:
    parser = support.arguments(__doc__, seconds=2.0, rounds=5, clients=64)
    parser.add_argument("--dynamo-python", default=os.environ.get("SELFHOST_DYNAMO_PYTHON"), metavar="PYTHON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-embed-") as scratch, contextlib.ExitStack() as stack:
        results = measure(options, Path(scratch), stack)
    support.write_json(options.json, results)


def measure(options: Any, scratch: Path, stack: contextlib.ExitStack) -> dict[str, list[Figures]]:
    """Measure every host, idle and under load, and print the table."""
    load = servers.Load(servers.compile_c("load", scratch / "load"), None)
    folder = scratch / "model"
    write_demo_model(str(folder))
    support.make_file(folder / "large.json", SIZE)
    hosts = start_hosts(options, folder, scratch, stack)
    nginx = stack.enter_context(servers.nginx(folder, scratch / "nginx", []))
    nginx.wait_ready("large.json", SIZE)
    work: dict[str, Callable[[], Figures]] = {}
    for name, host in hosts.items():
        work[f"{NAMES[name]}, idle"] = functools.partial(steps, options, host, None, None)
        source = nginx if name == "none" else host
        what = "beside nginx" if name == "none" else "serving"
        work[f"{NAMES[name]}, {what} {options.clients} clients"] = functools.partial(
            steps, options, host, source, load
        )
    results: dict[str, list[Figures]] = {}
    support.interleaved(work, options.rounds, results)  # type: ignore[arg-type]
    rows = [[name, *(f"{median(values):.2f}" for values in zip(*rounds))] for name, rounds in results.items()]
    header = ["a host's step, ms", "median", "99 %", "longest", "downloads/s"]
    support.table(f"{options.clients} clients, 17 MB each", header, rows)
    return results


def start_hosts(
    options: Any, folder: Path, scratch: Path, stack: contextlib.ExitStack
) -> dict[str, servers.Server]:
    """Start every host, each stopped until it is measured."""
    hosts = {}
    for kind in ("none", "thread", "process"):
        command = [sys.executable, str(HERE / "host_paced.py"), kind, str(folder)]
        host = hosts[kind] = stack.enter_context(servers.Server(kind, command, scratch / kind))
        host.prefix = "/v1/metadata/bench/_base/"
        host.port = int(host.read_line("ready ")[1])
    if options.dynamo_python:
        python = options.dynamo_python
        hosts["dynamo"] = stack.enter_context(
            servers.dynamo(python, folder, scratch / "dynamo", [], pace=True)
        )
    for kind, host in hosts.items():
        if kind != "none":
            host.wait_ready("large.json", SIZE)
        host.pause()
    return hosts


def steps(
    options: Any, host: servers.Server, source: Optional[servers.Server], load: Optional[servers.Load]
) -> Figures:
    """Let the host run for a while, with or without downloads; return how long its steps took."""
    host.resume()
    ask(host)
    downloads = 0.0
    if source is None or load is None:
        time.sleep(options.seconds)
    else:
        length = str(options.seconds)
        requests, _, seconds = load(source, "large.json", SIZE, options.clients, "keep", length)
        downloads = requests / seconds
    _, _, p50, p99, most = ask(host)
    host.pause()
    return Figures(float(p50), float(p99), float(most), downloads)


def ask(host: servers.Server) -> list[str]:
    """Return what the host says of its steps since the last question."""
    assert host.process.stdin is not None
    host.process.stdin.write("?\n")
    host.process.stdin.flush()
    return host.read_line("steps ")


if __name__ == "__main__":
    main()
