"""What importing costs: whole processes, in one run, against the bare interpreter and what we build on.

    python benchmarks/bench_import.py

Each row is a process that does nothing but import; all take turns, and what counts is the median of the
rounds' ratios of user and system time; bytecode is written already. Public names load their modules when they
are first used, which is how the goals are met: the rows with all names show what that use costs.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support
from support import AtMost, Goal

STANDARD = "dataclasses, json, pathlib, typing, threading"
NAMES = "from selfhost.frontend import BlobCache, MetadataResolver, ResolvedModel, default_transports"
PROCESSES = {
    "bare interpreter": "",
    "import selfhost": "import selfhost",
    "standard modules": f"import {STANDARD}",
    "import selfhost.card": "import selfhost.card",
    "all names of selfhost.card": "from selfhost.card import CheckedFile, ModelDeploymentCard, load_card",
    "http.client, ssl, standard modules": f"import http.client, ssl, {STANDARD}",
    "import selfhost.frontend": "import selfhost.frontend",
    "all names of selfhost.frontend": NAMES,
    "import werkzeug.wrappers": "import werkzeug.wrappers",
}
GOALS: dict[str, tuple[str, Goal]] = {
    "import selfhost": ("bare interpreter", AtMost(1.3)),
    "import selfhost.card": ("standard modules", AtMost(1.2)),
    "import selfhost.frontend": ("http.client, ssl, standard modules", AtMost(1.2)),
}


def main() -> None:
    options = support.arguments(__doc__, rounds=25).parse_args()
    work = {name: functools.partial(seconds, code) for name, code in PROCESSES.items()}
    support.interleaved(work, 1)  # writes the bytecode
    figures = support.interleaved(work, options.rounds)
    rows = [row(figures, name) for name in PROCESSES]
    header = ["process", "median", "ratio", "x werkzeug.wrappers"]
    support.table("imports, user and system time of whole processes", header, rows)
    support.write_json(options.json, figures)


def row(figures: dict[str, list[float]], name: str) -> list[str]:
    base, goal = GOALS.get(name, ("", None))
    half = AtMost(0.5) if base else None  # names load lazily: the rows with all names show what they cost
    return [
        name,
        f"{median(figures[name]) * 1000:.1f} ms",
        f"{support.against(figures, name, base, goal)} of {base}" if base else "",
        support.against(figures, name, "import werkzeug.wrappers", half),
    ]


def seconds(code: str) -> float:
    """Return the processor time of one process."""
    root = str(Path(__file__).resolve().parents[1])
    environment: dict[str, Any] = {"PATH": os.defpath, "PYTHONPATH": root}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status  # it is reaped
    if status:
        raise SystemExit(f"{code!r} failed")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
