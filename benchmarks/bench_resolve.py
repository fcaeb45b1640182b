"""Fetching, verifying and keeping a model: ours against other clients, all from one nginx, in one run.

    python benchmarks/bench_resolve.py

nginx is kept on one processor (unless --no-pin), everything that fetches may use all; all take turns within a
round, and what counts is the median of the rounds' ratios. Measured are

- cold, 20 MB in 8 files: ours with and without fsync, a raw socket that is read into 1 MB, hashed and written
  (the floor), http.client the same, requests (where installed), curl piped into b3sum (which keeps nothing);
- warm, the same model: by stamps in memory, by stamp files as a new process finds them, and hashed again
  (`verify="always"`) against one pass of blake3 with threads;
- 100 models of 8 files, 261 MB: one connection against several, with fsync;
- memory: by how much a process grows at its peak while it fetches 20 MB and 600 MB.

The cache lies in --directory (default: the system's temporary place): fsync costs what its disk takes.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Callable, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
import support
from blake3 import blake3
from support import MEGABYTE, AtLeast, AtMost

from selfhost.card.checked_file import CheckedFile
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.slots import ModelSlot
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver, ResolverLimits

MODEL = {  # 20 MB, as tokenizers have it: one file is most of it
    "tokenizer.json": 11_400_000,
    "vocab.json": 4_100_000,
    "merges.txt": 2_400_000,
    "tokenizer.model": 2_000_000,
    "preprocessor_config.json": 90_000,
    "tokenizer_config.json": 9_000,
    "config.json": 900,
    "generation_config.json": 100,
}
MANY_MODELS, MANY_BYTES = 100, 2_610_000  # of 8 files each, 261 MB together
BIG_FILE = 600 * MEGABYTE
BUFFER = 1 << 20
FLOOR = "raw socket, hash, write"
FSYNCED = "the same, each file fsynced"
OURS_GOALS = {"ours, no fsync": AtMost(1.15), "ours": AtMost(1.6)}  # times the floor
PEERS_GOALS = {"requests": AtLeast(1.5), "curl | b3sum": AtLeast(2.0)}  # times ours


def main() -> None:
    options = parse()
    server_cpu, _ = (None, None) if options.no_pin else support.two_processors()
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        make_scratch = functools.partial(
            tempfile.TemporaryDirectory, prefix="bench-resolve-", dir=options.directory
        )
        scratch = Path(stack.enter_context(make_scratch()))
        site = make_site(scratch / "site")
        nginx = stack.enter_context(servers.nginx(site, scratch / "nginx", support.pin(server_cpu)))
        nginx.wait_ready("model/config.json", MODEL["config.json"])
        bench = Bench(scratch, site, f"http://127.0.0.1:{nginx.port}")
        results["cold"] = bench.cold(options.rounds)
        results["warm"] = bench.warm(options.rounds * 10)
        results["hashed again"] = bench.hashed_again(options.rounds)
        results["many"] = bench.many(max(3, options.rounds // 3))
        results["memory"] = bench.memory()
    support.write_json(options.json, results)


def parse() -> Any:
    parser = support.arguments(__doc__, rounds=15)
    parser.add_argument("--directory", help="where site and caches lie")
    parser.add_argument("--no-pin", action="store_true", help="let the system choose the processors")
    return parser.parse_args()


# ------------------------------------------------------------------ models


def make_site(site: Path) -> Path:
    """Write one model of 20 MB, 100 smaller ones and one with a big file."""
    models = {"model": MODEL, "big": {"tokenizer.json": BIG_FILE}}
    share = MANY_BYTES / sum(MODEL.values())
    for number in range(MANY_MODELS):
        models[f"many{number}"] = {name: max(64, int(size * share)) for name, size in MODEL.items()}
    for seed, (model, files) in enumerate(models.items()):
        (site / model).mkdir(parents=True)
        for offset, (name, size) in enumerate(files.items()):
            support.make_file(site / model / name, size, seed * 100 + offset)
    return site


def card_of(folder: Path, url: str) -> ModelDeploymentCard:
    """Return a card of all files in a folder, at the origin's URLs."""
    files = [
        CheckedFile.from_disk(path).move_to_url(f"{url}/{path.name}") for path in sorted(folder.iterdir())
    ]
    tokenizer = next(file for file in files if file.basename == "tokenizer.json")
    extras = tuple(file for file in files if file is not tokenizer)
    return ModelDeploymentCard(
        folder.name, tokenizer=ModelSlot("hf_tokenizer_json", tokenizer), extra_files=extras
    )


class Bench:
    """One site, one origin, and a new place for every cold cache."""

    def __init__(self, scratch: Path, site: Path, origin: str) -> None:
        self._scratch = scratch
        self._site = site
        self._origin = origin
        self._host, _, port = origin.rpartition("/")[2].partition(":")
        self._port = int(port)
        self.card = self._card("model")

    def _card(self, model: str) -> ModelDeploymentCard:
        return card_of(self._site / model, f"{self._origin}/{model}")

    @contextlib.contextmanager
    def _place(self) -> Iterator[Path]:
        """Give a directory that does not exist, remove what it became, and let the disk settle."""
        place = self._scratch / "place"
        yield place
        shutil.rmtree(place, ignore_errors=True)
        os.sync()

    def _timed(self, work: Callable[[Path], object]) -> float:
        with self._place() as place:
            start = time.perf_counter()
            work(place)
            return time.perf_counter() - start

    # -------------------------------------------------------------- cold

    def cold(self, rounds: int) -> dict[str, list[float]]:
        """Measure one cold model by every way there is."""
        ways: dict[str, Callable[[Path], object]] = {
            FLOOR: self._raw,
            FSYNCED: self._raw_fsynced,
            "http.client": self._http_client,
            "ours, no fsync": functools.partial(self._ours, fsync=False),
            "ours": functools.partial(self._ours, fsync=True),
            "curl | b3sum": self._curl,
        }
        with contextlib.suppress(ImportError):
            import requests

            ways["requests"] = functools.partial(self._requests, requests)
        work = {name: functools.partial(self._timed, way) for name, way in ways.items()}
        figures = support.interleaved(work, rounds)
        rows = [
            [
                name,
                f"{median(times) * 1000:.1f} ms",
                support.against(figures, name, FLOOR, OURS_GOALS.get(name)),
                support.against(figures, name, FSYNCED),
                support.against(figures, name, "ours, no fsync", PEERS_GOALS.get(name)),
            ]
            for name, times in figures.items()
        ]
        support.table(
            "cold, 20 MB in 8 files", ["way", "median", "x floor", "x fsynced", "x ours, no fsync"], rows
        )
        return figures

    def _ours(self, place: Path, *, fsync: bool, card: Optional[ModelDeploymentCard] = None) -> None:
        with MetadataResolver(BlobCache(place, fsync=fsync)) as resolver:
            resolver.resolve(card or self.card)

    def _raw(self, place: Path) -> None:
        """Ask for one file after the other on one socket; as little as can be done."""
        place.mkdir()
        view = memoryview(bytearray(BUFFER))
        with socket.create_connection((self._host, self._port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for name, size in MODEL.items():
                sock.sendall(f"GET /model/{name} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
                head = sock.recv(2048)
                body = head[head.index(b"\r\n\r\n") + 4 :]
                hasher = blake3(body)
                with open(place / name, "wb", buffering=0) as file:
                    file.write(body)
                    left = size - len(body)
                    while left:
                        count = sock.recv_into(view, min(left, BUFFER), socket.MSG_WAITALL)
                        hasher.update(view[:count])
                        file.write(view[:count])
                        left -= count
                hasher.hexdigest()

    def _raw_fsynced(self, place: Path) -> None:
        """Do the same and bring each file to the disk, all of them at the end."""
        self._raw(place)
        for path in (*place.iterdir(), place):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def _http_client(self, place: Path) -> None:
        place.mkdir()
        view = memoryview(bytearray(BUFFER))
        connection = http.client.HTTPConnection(self._host, self._port)
        for name in MODEL:
            connection.request("GET", f"/model/{name}")
            response = connection.getresponse()
            hasher = blake3()
            with open(place / name, "wb", buffering=0) as file:
                while count := response.readinto(view):
                    hasher.update(view[:count])
                    file.write(view[:count])
            hasher.hexdigest()
        connection.close()

    def _requests(self, requests: Any, place: Path) -> None:
        place.mkdir()
        with requests.Session() as session:
            for name in MODEL:
                hasher = blake3()
                url = f"{self._origin}/model/{name}"
                with session.get(url, stream=True) as response, open(place / name, "wb", buffering=0) as file:
                    for piece in response.iter_content(BUFFER):
                        hasher.update(piece)
                        file.write(piece)
                hasher.hexdigest()

    def _curl(self, place: Path) -> None:
        pipes = "; ".join(f"curl -s {self._origin}/model/{name} | b3sum" for name in MODEL)
        subprocess.run(["sh", "-c", pipes], check=True, stdout=subprocess.DEVNULL)

    # -------------------------------------------------------------- warm

    def warm(self, rounds: int) -> dict[str, list[float]]:
        """Measure a model that is there."""
        with self._place() as place:
            self._ours(place, fsync=True)
            with MetadataResolver(BlobCache(place), offline=True) as resolver:
                resolver.resolve(self.card)

                def in_memory() -> float:
                    return timed(lambda: resolver.resolve(self.card))

                def by_stamp_files() -> float:
                    with MetadataResolver(BlobCache(place), offline=True) as fresh:
                        return timed(lambda: fresh.resolve(self.card))

                work = {"stamps in memory": in_memory, "stamp files": by_stamp_files}
                figures = support.interleaved(work, rounds)
        rows = [
            [name, f"{median(times) * 1000:.3f} ms", verdict_ms(times, 0.2)]
            for name, times in figures.items()
        ]
        support.table("warm, the same model", ["way", "median", "goal"], rows)
        return figures

    def hashed_again(self, rounds: int) -> dict[str, list[float]]:
        """Measure hits that are hashed, against one pass of blake3 with threads over the same files."""
        paths = [self._site / "model" / name for name in MODEL]
        with self._place() as place:
            self._ours(place, fsync=True)
            with MetadataResolver(BlobCache(place, verify="always"), offline=True) as resolver:
                work = {
                    "blake3, threads": lambda: timed(lambda: [hash_threaded(path) for path in paths]),
                    "ours, verify always": lambda: timed(lambda: resolver.resolve(self.card)),
                }
                figures = support.interleaved(work, rounds)
        rows = [
            [name, f"{median(times) * 1000:.2f} ms", support.against(figures, name, "blake3, threads", goal)]
            for (name, times), goal in zip(figures.items(), (None, AtMost(1.1)))
        ]
        support.table("warm, hashed again", ["way", "median", "ratio"], rows)
        return figures

    # -------------------------------------------------------------- many, memory

    def many(self, rounds: int) -> dict[str, list[float]]:
        """Measure 100 models: one connection, and several resolves at once over several connections."""
        cards = [self._card(f"many{number}") for number in range(MANY_MODELS)]

        def resolve_all(place: Path, *, threads: int) -> None:
            limits = ResolverLimits(connections=threads)
            with (
                MetadataResolver(BlobCache(place), limits=limits) as resolver,
                ThreadPoolExecutor(threads) as pool,
            ):
                for _ in pool.map(resolver.resolve, cards):
                    pass

        work = {
            f"{threads} at once": functools.partial(
                self._timed, functools.partial(resolve_all, threads=threads)
            )
            for threads in (1, 2, 4, 8)
        }
        figures = support.interleaved(work, rounds)
        rows = [
            [
                name,
                f"{median(times):.2f} s",
                faster(figures, name, AtLeast(1.3) if name == "4 at once" else None),
            ]
            for name, times in figures.items()
        ]
        support.table("cold, 100 models of 8 files, 261 MB", ["way", "median", "times as fast"], rows)
        return figures

    def memory(self) -> dict[str, int]:
        """Measure by how much a process's resident memory grows at its peak."""
        grown = {}
        for model in ("model", "big"):
            cards = []
            for name in ("many0", model):
                cards.append(self._scratch / f"{name}.json")
                cards[-1].write_text(self._card(name).to_json())
            with self._place() as place:
                command = [sys.executable, "-c", GROWTH, *map(str, cards), str(place)]
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
                )
                grown[model] = int(done.stdout)
        rows = [
            [name, f"{value / MEGABYTE:.1f} MB", AtMost(16).verdict(value / MEGABYTE)]
            for name, value in grown.items()
        ]
        support.table(
            "memory while fetching (peak, above what the imports took)", ["model", "growth", "goal"], rows
        )
        return grown


GROWTH = """
import sys
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

small, model, cache = sys.argv[1:]
with MetadataResolver(BlobCache(cache)) as resolver:
    resolver.resolve(ModelDeploymentCard.from_json(open(small).read()))  # loads all that is loaded late
    card = ModelDeploymentCard.from_json(open(model).read())
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = memory("VmRSS:")
    resolver.resolve(card)
print(memory("VmHWM:") - before)
"""


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hash_threaded(path: Path) -> str:
    """Hash a file in one pass, with threads where blake3's authors advise them."""
    hasher = blake3(max_threads=blake3.AUTO if path.stat().st_size > 4 * MEGABYTE else 1)
    return str(hasher.update_mmap(path).hexdigest())


def verdict_ms(times: list[float], most: float) -> str:
    return AtMost(most).verdict(median(times) * 1000) + " (ms)"


def faster(figures: dict[str, list[float]], name: str, goal: Optional[AtLeast]) -> str:
    value = support.ratio(figures, "1 at once", name)
    assert value is not None
    return f"{value:.2f}" + (f" ({goal.verdict(value)})" if goal else "")


if __name__ == "__main__":
    main()
