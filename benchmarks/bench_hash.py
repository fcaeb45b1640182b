"""Hashing and pinning one file: ours against blake3 on a mapped file, as Dynamo hashes, and sha256.

    python benchmarks/bench_hash.py

For 100 KB, 1 MB, 2 MB, 17 MB and 1 GB, warm in the page cache, everything in turn within a round; what
counts is the median of the rounds' ratios to `blake3, one thread`. `hash_file` reads and hashes; `pin_file`
keeps what it read as well (above 64 MiB it holds the file open instead). Needs 1 GB of temporary space.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support
from blake3 import blake3
from support import KILOBYTE, MEGABYTE, AtMost, Goal

from selfhost.card.checksum import hash_file
from selfhost.worker.content import pin_file

SIZES = {
    "100 KB": 100 * KILOBYTE,
    "1 MB": MEGABYTE,
    "2 MB": 2 * MEGABYTE,
    "17 MB": 17 * MEGABYTE,
    "1 GB": 1000 * MEGABYTE,
}
ONE_THREAD = "blake3, one thread (Dynamo's)"
TOLERANCE = 1.05  # "never slower": two runs of the same code differ by this much
GOALS: dict[tuple[str, str], Goal] = {
    ("100 KB", "our hash_file"): AtMost(TOLERANCE),
    ("1 MB", "our hash_file"): AtMost(TOLERANCE),
    ("17 MB", "our pin_file"): AtMost(1.3),
}


def main() -> None:
    parser = support.arguments(__doc__, rounds=15)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-hash-") as scratch:
        for title, size in SIZES.items():
            path = support.make_file(Path(scratch) / "file", size)
            results[title] = measure(title, str(path), size, options.rounds)
    support.write_json(options.json, results)


def measure(title: str, path: str, size: int, rounds: int) -> dict[str, list[float]]:
    """Measure and print one size."""
    repeat = max(1, 5 * MEGABYTE // size)
    rounds = rounds if size < 100 * MEGABYTE else max(3, rounds // 3)
    ways: dict[str, Callable[[str], Any]] = {
        ONE_THREAD: mapped,
        "blake3, AUTO threads": functools.partial(mapped, threads=blake3.AUTO),
        "blake3, read whole": read_whole,
        "sha256": sha256,
        "our hash_file": hash_file,
        "our pin_file": pin_file,
    }
    seconds = support.interleaved(
        {name: functools.partial(timed, way, path, repeat) for name, way in ways.items()}, rounds
    )
    rows = []
    for name, taken in seconds.items():
        speed = support.scaled(size / median(taken), "B/s")
        compared = support.against(seconds, name, ONE_THREAD, GOALS.get((title, name)))
        rows.append([name, support.scaled(median(taken), "s"), speed, compared])
    support.table(title, ["", "median", "", "x one thread"], rows)
    return seconds


def timed(way: Callable[[str], Any], path: str, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        way(path)
    return (time.perf_counter() - start) / repeat


def mapped(path: str, threads: int = 1) -> bytes:
    return blake3(max_threads=threads).update_mmap(path).digest()


def read_whole(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return blake3(file.read(), max_threads=1).digest()


def sha256(path: str) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for block in iter(functools.partial(file.read, 256 * KILOBYTE), b""):
            digest.update(block)
    return digest.digest()


if __name__ == "__main__":
    main()
