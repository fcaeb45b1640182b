"""Serving metadata files: ours against the real Dynamo worker's route, nginx and WSGI servers, in one run.

A server in C that does nothing but answer (limit.c) runs along: what it reaches is what the machine allows.

    python benchmarks/bench_serve.py --dynamo-python DYNAMO/bin/python

Every server runs in a process of its own on one processor, the load generator (load.c, compiled by cc at
the start) on another, unless --no-pin is given. All of them take turns within a round, and what counts is
the median of the rounds' ratios. Measured are

- requests or bytes per second: 1 KB on 1 kept connection, on 16, and on a new connection each; 500 KB on 4;
  17 MB on 4;
- 256 downloads of 17 MB at once: seconds, and by how much the server's memory grows at its peak
  (resident memory of all its processes, and files in memory);
- the same loads where a thread spins in Python inside the host: ours in a thread of that host and in a
  process of its own, and Dynamo's;
- by how much that spinning loop itself gets slower beside an idle server and beside one under load.

Without --dynamo-python (or SELFHOST_DYNAMO_PYTHON) the comparison with Dynamo is left out; nginx is left
out where it is not installed. `--servers embedded,nginx` picks some; waitress and stdlib only run when
picked. Needs Linux, cc and taskset.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Callable, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
import support
from support import AtLeast, AtMost, Goal

from selfhost.demo_model import write_demo_model

FILES = {"small.json": 1_000, "medium.json": 500_000, "large.json": 17_000_000}
DEFAULT_SERVERS = "embedded,process,gunicorn,dynamo,nginx,limit"
EMBEDDED = ("embedded", "process")
NAMES = {
    "embedded": "ours, embedded",
    "process": "ours, a process of its own",
    "gunicorn": "ours, gunicorn gthread",
    "waitress": "ours, waitress",
    "limit": "limit (C)",
}


class Shape(NamedTuple):
    """One load, with the goals for the embedded server (against Dynamo and nginx) and under gunicorn."""

    title: str
    file: str
    connections: int
    mode: str
    embedded: Goal = None
    embedded_nginx: Goal = None
    gunicorn: Goal = None


SHAPES = [
    Shape("1 KB, 1 kept connection", "small.json", 1, "keep", AtLeast(1.2), None, AtLeast(0.45)),
    Shape("1 KB, 16 kept connections", "small.json", 16, "keep", AtLeast(3.0)),
    Shape("1 KB, a new connection each", "small.json", 1, "new", AtLeast(1.5)),
    Shape("500 KB, 4 kept connections", "medium.json", 4, "keep", AtLeast(2.0)),
    Shape("17 MB, 4 kept connections", "large.json", 4, "keep", AtLeast(2.2), AtLeast(1.3), AtLeast(1.7)),
]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch_name, contextlib.ExitStack() as stack:
        bench = Bench(options, Path(scratch_name), stack)
        results: dict[str, Any] = {}
        running = bench.start(options.servers.split(","))
        results["rates"] = bench.rates(running, "")
        results["burst"] = bench.burst(running)
        stack.close()
        hogs = bench.start_hogs()
        results["hogged rates"] = bench.rates(hogs, ", in a host that hogs the interpreter")
        results["host loops"] = bench.host_loops(hogs)
        support.write_json(options.json, results)


def parse() -> Any:
    parser = support.arguments(__doc__, seconds=0.5, rounds=5)
    parser.add_argument("--servers", default=DEFAULT_SERVERS, help=f"(default {DEFAULT_SERVERS})")
    parser.add_argument("--burst", type=int, default=256, help="downloads at once (default 256; 0: none)")
    parser.add_argument("--burst-rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--no-pin", action="store_true", help="let the system choose the processors")
    parser.add_argument("--no-hog", action="store_true", help="leave out the host that hogs the interpreter")
    parser.add_argument("--dynamo-python", default=os.environ.get("SELFHOST_DYNAMO_PYTHON"), metavar="PYTHON")
    return parser.parse_args()


class Bench:
    """One run: its files, its servers, its load generator."""

    def __init__(self, options: Any, scratch: Path, stack: contextlib.ExitStack) -> None:
        self._options = options
        self._scratch = scratch
        self._stack = stack
        self._processor, generator = (None, None) if options.no_pin else support.two_processors()
        self._load = servers.Load(servers.compile_c("load", scratch / "load"), generator)
        self._folder = scratch / "model"
        write_demo_model(str(self._folder))
        for name, size in FILES.items():
            support.make_file(self._folder / name, size)

    def start(self, names: list[str], *, spin: bool = False) -> dict[str, servers.Server]:
        """Start the servers that can run here; leave out the others, and say so."""
        running = {}
        for name in names:
            missing = self._missing(name)
            if missing:
                print(f"without {name}: {missing}")
                continue
            server = self._stack.enter_context(self._start(name, spin))
            if name != "none":
                for file, size in FILES.items():  # also lets each prepare what it prepares at a first request
                    server.wait_ready(file, size)
            running[name] = server
        return running

    def _missing(self, name: str) -> Optional[str]:
        if name == "dynamo" and not self._options.dynamo_python:
            return "no --dynamo-python"
        if name == "nginx" and not (shutil.which("nginx") or os.path.exists("/usr/sbin/nginx")):
            return "not installed"
        return None

    def _start(self, name: str, spin: bool) -> servers.Server:
        scratch = self._scratch / f"{name}{'-hog' * spin}"
        head = support.pin(self._processor)
        if name == "dynamo":
            return servers.dynamo(self._options.dynamo_python, self._folder, scratch, head, spin=spin)
        if name == "limit":
            return servers.limit(self._folder, list(FILES), scratch, head)
        if name in ("nginx", "gunicorn"):
            starters = {"nginx": servers.nginx, "gunicorn": servers.gunicorn}
            return starters[name](self._folder, scratch, head)
        return servers.python_host(name, self._folder, scratch, head, spin=spin)

    def start_hogs(self) -> dict[str, servers.Server]:
        """Start the hosts that hog the interpreter, each stopped until it is measured."""
        if self._options.no_hog:
            return {}
        chosen = [name for name in (*EMBEDDED, "dynamo") if name in self._options.servers.split(",")]
        running = self.start(["none", *chosen], spin=True)
        for server in running.values():
            server.pause()
        return running

    def rates(self, running: dict[str, servers.Server], where: str) -> dict[str, Any]:
        """Measure every shape on every server and print a table for each."""
        results = {}
        measured = {name: server for name, server in running.items() if name != "none"}
        for shape in SHAPES if measured else ():
            work = {
                name: functools.partial(self._rate, server, shape, bool(where))
                for name, server in measured.items()
            }
            figures = support.interleaved(work, self._options.rounds)
            results[shape.title] = figures
            self._print_rates(shape, figures, where)
        return results

    def _rate(self, server: servers.Server, shape: Shape, hogged: bool) -> float:
        size = FILES[shape.file]
        with alone(server, hogged):
            _, received, seconds = self._load(
                server, shape.file, size, shape.connections, shape.mode, str(self._options.seconds)
            )
        return received / size / seconds

    def _print_rates(self, shape: Shape, figures: dict[str, list[float]], where: str) -> None:
        rows = []
        for name in figures:
            goal: Goal = None
            goal_nginx: Goal = None
            if where:  # a thread of a host that hogs the interpreter has no chance, and no goal
                goal = AtLeast(1.0) if name == "process" else None
            elif name == "embedded":
                goal, goal_nginx = shape.embedded, shape.embedded_nginx
            elif name == "gunicorn":
                goal = shape.gunicorn
            ratios = [support.against(figures, name, "dynamo", goal)]
            if not where:
                ratios.append(support.against(figures, name, "nginx", goal_nginx))
            rows.append([NAMES.get(name, name), support.scaled(median(figures[name]), "requests/s"), *ratios])
        header = ["", "median", "x Dynamo", *([] if where else ["x nginx"])]
        support.table(shape.title + where, header, rows)

    def burst(self, running: dict[str, servers.Server]) -> dict[str, Any]:
        """Measure many downloads of the large file at once: time, and memory at its peak."""
        count = self._options.burst
        if not count:
            return {}
        growth: dict[str, list[float]] = {name: [] for name in running}
        work = {
            name: functools.partial(self._burst, server, growth[name]) for name, server in running.items()
        }
        seconds = support.interleaved(work, self._options.burst_rounds)
        rows = []
        for name in running:
            ours = name in EMBEDDED
            most = max(growth[name])
            rows.append(
                [
                    NAMES.get(name, name),
                    f"{median(seconds[name]):.2f} s",
                    support.against(seconds, name, "dynamo", AtMost(0.4) if ours else None),
                    support.against(seconds, name, "nginx"),
                    f"{most:+.1f}" + (f" ({AtMost(4).verdict(most)})" if ours else ""),
                ]
            )
        header = ["", "median", "x Dynamo's time", "x nginx's", "memory, MB (most)"]
        support.table(f"{count} downloads of 17 MB at once", header, rows)
        return {"seconds": seconds, "memory growth, MB": growth}

    def _burst(self, server: servers.Server, growth: list[float]) -> float:
        count = self._options.burst
        server.forget_peak()
        before = server.memory_bytes()
        _, _, seconds = self._load(server, "large.json", FILES["large.json"], count, "keep", f"{count}x")
        growth.append((server.memory_bytes(peak=True) - before) / 1e6)
        return seconds

    def host_loops(self, hogs: dict[str, servers.Server]) -> dict[str, Any]:
        """Measure the hogging loops: without a server, beside an idle one, beside one under load."""
        if not hogs:
            return {}
        work: dict[str, Callable[[], float]] = {}
        for name, server in hogs.items():
            work[f"{name}, idle"] = functools.partial(self._turn_rate, server, None)
            for shape in SHAPES if name != "none" else ():
                work[f"{name}, {shape.title}"] = functools.partial(self._turn_rate, server, shape)
        figures = support.interleaved(work, self._options.rounds)
        alone_name = "none, idle"
        rows = []
        for name in figures:
            host, _, what = name.partition(", ")
            goal: Goal = None
            if host in EMBEDDED:
                same = support.ratio(figures, f"dynamo, {what}", alone_name)
                goal = AtLeast(0.97) if what == "idle" else AtLeast(min(1, round(same, 2))) if same else None
            slowed = support.against(figures, name, alone_name, goal)
            label = "no server" if host == "none" else f"{NAMES.get(host, host)}: {what}"
            rows.append([label, support.scaled(median(figures[name]), "turns/s"), slowed])
        support.table("The hogging host's own loop", ["", "median", "x without a server"], rows)
        return figures

    def _turn_rate(self, server: servers.Server, shape: Optional[Shape]) -> float:
        with alone(server, True):
            turns, clock = server.turns()
            if shape is None:
                time.sleep(self._options.seconds)
            else:
                size, seconds = FILES[shape.file], str(self._options.seconds)
                self._load(server, shape.file, size, shape.connections, shape.mode, seconds)
            later_turns, later_clock = server.turns()
        return (later_turns - turns) / (later_clock - clock)


@contextlib.contextmanager
def alone(server: servers.Server, paused: bool) -> Iterator[None]:
    """Let a paused server run for a while."""
    if paused:
        server.resume()
    yield
    if paused:
        server.pause()


if __name__ == "__main__":
    main()
