"""Registering many adapters, looking files up, and whether size matters.

    python benchmarks/bench_register.py

- 1,000 adapters of 6 small distinct files each, read, hashed, pinned and registered, against the floor:
  opening, reading and closing the same 6,000 files;
- taking one registration out and putting it in again beside 1, 1,000 and 100,000 others;
- look-ups per second by 1, 4 and 16 threads in all.

Everything in turn within a round; what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support
from support import AtMost

from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry

ADAPTERS, FILES_EACH = 1_000, 6
POPULATIONS = [1, 1_000, 100_000]
THREADS = [1, 4, 16]

Adapters = dict[str, dict[str, str]]


def main() -> None:
    options = support.arguments(__doc__, rounds=7, seconds=0.3).parse_args()
    results = {
        "adapters": adapters(options.rounds),
        "one of many": one_of_many(options.rounds),
        "look-ups": look_ups(options.rounds, options.seconds),
    }
    support.write_json(options.json, results)


def adapters(rounds: int) -> dict[str, list[float]]:
    """Measure many small registrations against reading their files."""
    with tempfile.TemporaryDirectory(prefix="bench-register-") as scratch:
        made = make_adapters(Path(scratch))
        work = {
            "open, read, close": functools.partial(read_all, made),
            "hash, pin, register": functools.partial(register_all, made),
        }
        seconds = support.interleaved(work, rounds)
    rows = []
    for name, taken in seconds.items():
        goal = AtMost(2) if name == "hash, pin, register" else None
        compared = support.against(seconds, name, "open, read, close", goal)
        rows.append([name, support.scaled(median(taken), "s"), compared])
    title = f"{ADAPTERS:,} adapters of {FILES_EACH} small files"
    support.table(title, ["", "median", "x the floor"], rows)
    return seconds


def make_adapters(folder: Path) -> Adapters:
    """Write small files, no two alike, of about 2 KB."""
    made: Adapters = {}
    for adapter in range(ADAPTERS):
        home = folder / f"adapter-{adapter}"
        home.mkdir()
        made[home.name] = {
            f"file-{number}.json": str(
                support.make_file(home / f"file-{number}.json", 2_000, adapter * FILES_EACH + number)
            )
            for number in range(FILES_EACH)
        }
    return made


def read_all(made: Adapters) -> float:
    start = time.perf_counter()
    for files in made.values():
        for path in files.values():
            with open(path, "rb", buffering=0) as file:
                file.read()
    return time.perf_counter() - start


def register_all(made: Adapters) -> float:
    registry = MetadataArtifactRegistry()
    start = time.perf_counter()
    for suffix, files in made.items():
        registry.register_files("model", suffix, files)
    taken = time.perf_counter() - start
    assert len(registry) == ADAPTERS * FILES_EACH
    return taken


def populated(count: int) -> Any:
    """Return a registry with `count` registrations of one file, whose content they share."""
    registry = MetadataArtifactRegistry()
    content = pin_bytes(b"{}")
    for number in range(count):
        registry.register_files("model", f"adapter-{number}", {"config.json": content})
    return registry


def one_of_many(rounds: int) -> dict[str, list[float]]:
    """Measure unregistering and registering at several sizes."""
    work = {}
    for count in POPULATIONS:
        registry = populated(count)
        work[f"unregister, {count:,}"] = functools.partial(in_and_out, registry, True)
        work[f"register, {count:,}"] = functools.partial(in_and_out, registry, False)
    seconds = support.interleaved(work, rounds)
    rows = []
    for name, taken in seconds.items():
        what, _, count = name.partition(", ")
        goal = AtMost(2) if count == "100,000" else None
        compared = support.against(seconds, name, f"{what}, 1", goal)
        rows.append([f"{what} one of {count}", support.scaled(median(taken), "s"), compared])
    support.table("One registration among others", ["", "median", "x alone"], sorted(rows))
    return seconds


def in_and_out(registry: Any, timing_out: bool, repeat: int = 1_000) -> float:
    """Return the seconds that one unregistration, or one registration, takes."""
    content = pin_bytes(b"{}")
    taken = 0.0
    for _ in range(repeat):
        start = time.perf_counter()
        registry.unregister("model", "adapter-0")
        between = time.perf_counter()
        registry.register_files("model", "adapter-0", {"config.json": content})
        end = time.perf_counter()
        taken += between - start if timing_out else end - between
    return taken / repeat


def look_ups(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Measure look-ups per second, all threads together."""
    registry = populated(1_000)
    work = {
        f"{threads} threads": functools.partial(get_rate, registry, threads, seconds) for threads in THREADS
    }
    rates = support.interleaved(work, rounds)
    rows = [
        [name, support.scaled(median(rate), "get/s"), support.against(rates, name, "1 threads")]
        for name, rate in rates.items()
    ]
    support.table("Look-ups", ["", "median, all together", "x one thread"], rows)
    return rates


def get_rate(registry: Any, threads: int, seconds: float) -> float:
    counts = [0] * threads
    deadline = time.perf_counter() + seconds

    def look(number: int) -> None:
        get = registry.get
        done = 0
        while time.perf_counter() < deadline:
            for _ in range(100):
                get("model", "adapter-7", "config.json")
            done += 100
        counts[number] = done

    workers = [threading.Thread(target=look, args=(number,)) for number in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
