"""A registry shared by the processes of a host: a journal beside dictionaries, against what else could do it.

    python benchmarks/bench_shared.py

- one look-up: the plain registry, ours, SQLite (WAL) asked each time, SQLite's data_version before a
  dictionary, and a generation in a mapped file before a dictionary;
- one registration of 6 small files: ours, with and without content that is new, and 6 rows in SQLite;
- a process that starts: 60,000 files of 10,000 registrations, read by ours and selected from SQLite;
- 256 MB of content in 4 processes: the private memory of each, plain and shared.

The SQLite prototypes hold rows and nothing else: no order of contents, no dead owners, no forks. Everything
in turn within a round; what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support
from support import AtMost

from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry

FILES_EACH, REGISTRATIONS = 6, 10_000
CONTENTS, CONTENT_BYTES, PROCESSES = 16, 16 * support.MEGABYTE, 4
TARGET = "/v1/metadata/model/adapter-7/file-3.json"

SCHEMA = """
CREATE TABLE files (target TEXT PRIMARY KEY, registration INT, hex TEXT, size INT) WITHOUT ROWID;
CREATE INDEX by_registration ON files (registration);
"""


class SqliteTable:
    """Rows in WAL mode, without waiting for a disk."""

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=OFF")
        if is_new:
            self.connection.executescript(SCHEMA)
        self._seen: Optional[int] = None
        self._known: dict[str, tuple[str, int]] = {}

    def add(self, registration: int, files: dict[str, tuple[str, int]]) -> None:
        rows = [(target, registration, *file) for target, file in files.items()]
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        self.connection.execute("COMMIT")

    def remove(self, registration: int) -> None:
        self.connection.execute("DELETE FROM files WHERE registration = ?", (registration,))

    def select(self, target: str) -> Optional[tuple[str, int]]:
        query = "SELECT hex, size FROM files WHERE target = ?"
        found: Optional[tuple[str, int]] = self.connection.execute(query, (target,)).fetchone()
        return found

    def lookup(self, target: str) -> Optional[tuple[str, int]]:
        version = self.connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._seen:
            self._seen, self._known = version, self.load()
        return self._known.get(target)

    def load(self) -> dict[str, tuple[str, int]]:
        rows = self.connection.execute("SELECT target, hex, size FROM files")
        return {target: (hex, size) for target, hex, size in rows}


class MappedGeneration:
    """A number that a writer would count up, before a dictionary; who dies before counting is not seen."""

    def __init__(self, path: Path, known: dict[str, tuple[str, int]]) -> None:
        path.write_bytes(bytes(8))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)
        self._read = functools.partial(struct.Struct("Q").unpack_from, self._map)
        self._seen = (0,)
        self._known = known

    def lookup(self, target: str) -> Optional[tuple[str, int]]:
        if self._read() != self._seen:
            raise RuntimeError("nobody counts up here")
        return self._known.get(target)


def main() -> None:
    options = support.arguments(__doc__, rounds=7).parse_args()
    results = {}
    for name, measure in (("look-up", look_ups), ("write", writes), ("start", starts)):
        with tempfile.TemporaryDirectory(prefix="bench-shared-", dir=in_memory()) as scratch:
            results[name] = measure(Path(scratch), options.rounds)
    results["memory"] = memory()
    support.write_json(options.json, results)


def in_memory() -> Optional[str]:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def files_of(number: int) -> dict[str, bytes]:
    return {f"file-{index}.json": b"%d %d" % (number, index) for index in range(FILES_EACH)}


def rows_of(number: int) -> dict[str, tuple[str, int]]:
    return {
        f"/v1/metadata/model/adapter-{number}/{name}": (pin_bytes(data).hex, len(data))
        for name, data in files_of(number).items()
    }


def per_call(call: Callable[[], object], repeat: int = 20_000) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def report(
    title: str, seconds: dict[str, list[float]], base: str, goals: Optional[dict[str, AtMost]] = None
) -> None:
    rows = [
        [
            name,
            f"{median(taken) * 1e6:,.2f} us",
            support.against(seconds, name, base, (goals or {}).get(name)),
        ]
        for name, taken in seconds.items()
    ]
    support.table(title, ["", "median", f"x {base}"], rows)


# ------------------------------------------------------------------ look-ups


def look_ups(scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Measure one look-up among 600 files where nothing is new."""
    plain, shared = MetadataArtifactRegistry(), MetadataArtifactRegistry(shared=scratch / "shared")
    table = SqliteTable(scratch / "table")
    for number in range(100):
        files = {name: pin_bytes(data) for name, data in files_of(number).items()}
        plain.register_files("model", f"adapter-{number}", files)
        shared.register_files("model", f"adapter-{number}", files)
        table.add(number, rows_of(number))
    mapped = MappedGeneration(scratch / "generation", table.load())
    journal = os.open(scratch / "shared" / "journal", os.O_RDONLY)
    work = {
        "plain registry": lambda: plain.lookup(TARGET),
        "fstat alone": lambda: os.fstat(journal),
        "shared registry": lambda: shared.lookup(TARGET),
        "SQLite, select": lambda: table.select(TARGET),
        "SQLite, data_version": lambda: table.lookup(TARGET),
        "mapped generation": lambda: mapped.lookup(TARGET),
    }
    assert all(call() for call in work.values())
    timed = {name: functools.partial(per_call, call) for name, call in work.items()}
    seconds = support.interleaved(timed, rounds)
    report("One look-up", seconds, "fstat alone", {"shared registry": AtMost(2)})
    shared.close()
    os.close(journal)
    return seconds


# ------------------------------------------------------------------ registrations


def writes(scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Measure one registration of 6 files, which is taken out again each time."""
    shared = MetadataArtifactRegistry(shared=scratch / "shared")
    table = SqliteTable(scratch / "table")
    known = {name: pin_bytes(data) for name, data in files_of(0).items()}
    shared.register_files("model", "known", known)
    rows = rows_of(0)
    numbers = iter(range(1, 1_000_000))

    def new() -> float:
        files = {name: pin_bytes(data) for name, data in files_of(next(numbers)).items()}
        return timed_registration(lambda: shared.register_files("model", "adapter", files))

    work = {
        "SQLite, 6 rows": lambda: timed_rows(table, rows),
        "shared, content known": lambda: timed_registration(
            lambda: shared.register_files("model", "adapter", known)
        ),
        "shared, content new": new,
    }
    many = {name: functools.partial(mean, call, 300) for name, call in work.items()}
    seconds = support.interleaved(many, rounds)
    report("A registration of 6 small files", seconds, "SQLite, 6 rows")
    shared.close()
    return seconds


def mean(call: Callable[[], float], repeat: int) -> float:
    return sum(call() for _ in range(repeat)) / repeat


def timed_registration(register: Callable[[], Any]) -> float:
    start = time.perf_counter()
    registration = register()
    taken = time.perf_counter() - start
    registration.close()
    return taken


def timed_rows(table: SqliteTable, rows: dict[str, tuple[str, int]]) -> float:
    start = time.perf_counter()
    table.add(0, rows)
    taken = time.perf_counter() - start
    table.remove(0)
    return taken


# ------------------------------------------------------------------ a process that starts


def starts(scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Measure what a new process has to read."""
    shared = MetadataArtifactRegistry(shared=scratch / "shared")
    table = SqliteTable(scratch / "table")
    content = {name: pin_bytes(data) for name, data in files_of(0).items()}
    rows = rows_of(0)
    for number in range(REGISTRATIONS):
        shared.register_files("model", f"adapter-{number}", content)
        prefix = f"/v1/metadata/model/adapter-{number}/"
        table.add(number, {prefix + target.rpartition("/")[2]: file for target, file in rows.items()})

    def open_shared() -> float:
        start = time.perf_counter()
        with contextlib.closing(MetadataArtifactRegistry(shared=scratch / "shared")) as registry:
            taken = time.perf_counter() - start
            assert len(registry) == REGISTRATIONS * FILES_EACH
        return taken

    def open_table() -> float:
        start = time.perf_counter()
        known = SqliteTable(scratch / "table").load()
        taken = time.perf_counter() - start
        assert len(known) == REGISTRATIONS * FILES_EACH
        return taken

    work = {"SQLite, rows alone": open_table, "shared registry, complete": open_shared}
    seconds = support.interleaved(work, rounds)
    report(f"A process that starts: {REGISTRATIONS * FILES_EACH:,} files", seconds, "SQLite, rows alone")
    shared.close()
    return seconds


# ------------------------------------------------------------------ memory

WORKER = """
import sys
from selfhost.worker.registry import MetadataArtifactRegistry

shared = sys.argv[1] or None
registry = MetadataArtifactRegistry(shared=shared)
for path in sys.argv[2:]:
    registry.register("model", "_base", path.rpartition("/")[2], path)
for artifact in registry:
    for start in range(0, artifact.content.size, 1 << 20):
        artifact.content.read(start, min(start + (1 << 20), artifact.content.size))
print(flush=True)
sys.stdin.read()
"""


def memory() -> dict[str, list[float]]:
    """Measure what each process has to itself once it has served everything."""
    with tempfile.TemporaryDirectory(prefix="bench-shared-") as disk:
        paths = [
            str(support.make_file(Path(disk) / f"content-{number}", CONTENT_BYTES, number))
            for number in range(CONTENTS)
        ]
        bare = private_bytes("", [])
        found = {"plain": private_bytes("", paths)}
        with tempfile.TemporaryDirectory(prefix="bench-shared-", dir=in_memory()) as scratch:
            found["shared"] = private_bytes(f"{scratch}/shared", paths)
    grown = {name: [each - median(bare) for each in sizes] for name, sizes in found.items()}
    rows = [
        [name, support.scaled(median(sizes), "B"), support.scaled(sum(sizes), "B")]
        for name, sizes in grown.items()
    ]
    title = f"{CONTENTS} x {support.scaled(CONTENT_BYTES, 'B')} in {PROCESSES} processes, beyond a bare one"
    support.table(title, ["", "private, each", "together"], rows)
    print(f"(shared: and {support.scaled(CONTENTS * CONTENT_BYTES, 'B')} in the folder, once)")
    return grown


def private_bytes(shared: str, paths: list[str]) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, shared, *paths],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(PROCESSES)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    sizes = [private_of(worker.pid) for worker in workers]
    for worker in workers:
        worker.communicate()
    return sizes


def private_of(pid: int) -> float:
    """Return what a process has to itself."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return float(sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_")))


if __name__ == "__main__":
    main()
