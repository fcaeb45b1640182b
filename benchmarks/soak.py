"""Ten minutes of mixed load while registrations come and go: do threads, descriptors and memory stay flat?

    python benchmarks/soak.py --minutes 10 --isolation process

One host process attaches and detaches LoRA adapters all the time, beside a base model that stays. Clients of
another process fetch small and large files, ask for ranges and for what is not there, send garbage, hang up
in the middle, and stay silent; one resolves the model as a frontend does, into a cache that is thrown away.
Each line is the host: threads, descriptors, memory (resident, of all its processes, with files in memory),
connections, registered files. Exit code 1 if there was a wrong byte or an unexpected answer, or if the last
quarter needs more than the second did (2 % and 1 MB of memory are allowed: an allocator breathes).
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
import support

from selfhost import BlobCache, MetadataResolver, ModelDeploymentCard
from selfhost.card.checksum import Checksum
from selfhost.demo_model import write_demo_model

HERE = Path(__file__).resolve().parent
MEMORY_SLACK = 1.02, 1_000_000


class Sample(NamedTuple):
    """The host at one moment."""

    seconds: float
    threads: int
    descriptors: int
    memory: int
    connections: int
    files: int


def main() -> None:
    parser = support.arguments(__doc__, minutes=10.0, clients=8)
    parser.add_argument("--isolation", choices=("thread", "process"), default="thread")
    parser.add_argument("--host", metavar="FOLDER", help="be the host, for the other process")
    options = parser.parse_args()
    if options.host:
        return host(options.host, options.isolation)
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        sys.exit(soak(options, Path(scratch)))


# ------------------------------------------------------------------ the host


def host(folder: str, isolation: str) -> None:
    """Attach a base model, then attach and detach adapters until standard input ends; tell samples."""
    from selfhost import DistributedRuntime, LocalModel, Settings

    settings = Settings(
        self_host_metadata=True, system_host="127.0.0.1", system_port=0, isolation=isolation,
        discovery_backend="mem",
    )  # fmt: skip
    done = threading.Event()
    with DistributedRuntime(settings) as runtime:
        model = LocalModel.load(folder, name="soak/base").attach(runtime.endpoint("soak.backend.generate"))
        print(json.dumps({"card_url": model.card_url, "card": model.card.to_json()}), flush=True)

        def adapters(worker: int) -> None:
            endpoint = runtime.endpoint(f"soak.backend.lora{worker}")
            for number in itertools.count():
                if done.is_set():
                    return
                base = LocalModel.load(folder, name="soak/base")
                with base.derive_lora(f"adapter-{worker}-{number % 50}").attach(endpoint):
                    done.wait(0.02)

        threads = [threading.Thread(target=adapters, args=(worker,)) for worker in range(2)]
        for thread in threads:
            thread.start()
        for _ in sys.stdin:
            server = runtime.status_server
            assert server is not None
            own = threading.active_count(), len(os.listdir("/proc/self/fd"))
            print(json.dumps([*own, server.open_connections, len(runtime.metadata_artifacts)]), flush=True)
        done.set()
        for thread in threads:
            thread.join()


# ------------------------------------------------------------------ the clients


class Clients:
    """Everybody who asks; `faults` says what was not as it should be."""

    def __init__(self, card_url: str, card: ModelDeploymentCard, scratch: Path) -> None:
        self.faults: list[str] = []
        self.answers = 0
        self.resolves = 0
        self._card_url = card_url
        self._card = card
        self._scratch = scratch
        self._files = [file for file, _ in card.iter_metadata_files()]
        origin = card_url.split("/")[2]
        self._address = (origin.rpartition(":")[0], int(origin.rpartition(":")[2]))
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._until_done, args=(self._resolve, 0))]

    def start(self, count: int) -> None:
        """Start `count` clients beside the one that resolves."""
        kinds = (self._fetch, self._fetch, self._range, self._missing, self._garbage, self._hang_up)
        for number, kind in zip(range(count), itertools.cycle(kinds)):
            self._threads.append(threading.Thread(target=self._until_done, args=(kind, number)))
        self._threads.append(threading.Thread(target=self._until_done, args=(self._silence, 0)))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End them all."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _until_done(self, ask: Callable[[random.Random], None], seed: int) -> None:
        chance = random.Random(seed)
        while not self._done.is_set():
            try:
                ask(chance)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.faults.append(f"{ask.__name__}: {error!r}")
                self._done.wait(0.1)

    def _get(self, target: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self._address, timeout=30)
        try:
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
            self.answers += 1
            return answer.status, data
        finally:
            connection.close()

    def _target(self, url: str) -> str:
        return "/" + url.split("/", 3)[3]

    def _fetch(self, chance: random.Random) -> None:
        file = chance.choice(self._files)
        status, data = self._get(self._target(str(file.path)))
        assert (status, Checksum.of(data)) == (200, file.checksum), file.path

    def _range(self, chance: random.Random) -> None:
        file = max(self._files, key=lambda file: file.size or 0)
        start = chance.randrange(int(file.size or 1))
        status, data = self._get(self._target(str(file.path)), Range=f"bytes={start}-{start + 99_999}")
        assert (status, len(data)) == (206, min(100_000, int(file.size or 0) - start))

    def _missing(self, chance: random.Random) -> None:
        status, _ = self._get(f"/v1/metadata/soak_base/_base/{chance.random()}")
        assert status == 404
        self._done.wait(0.01)

    def _garbage(self, chance: random.Random) -> None:
        with socket.create_connection(self._address, timeout=30) as sock:
            sock.sendall(chance.randbytes(200) + b"\r\n\r\n")
            assert sock.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 505", b"HTTP/1.1 405")
        self._done.wait(0.01)

    def _hang_up(self, chance: random.Random) -> None:
        target = self._target(str(max(self._files, key=lambda file: file.size or 0).path))
        with socket.create_connection(self._address, timeout=30) as sock:
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            sock.recv(chance.randrange(1, 100_000))
        self._done.wait(0.01)

    def _silence(self, chance: random.Random) -> None:
        socks = [socket.create_connection(self._address, timeout=30) for _ in range(20)]
        self._done.wait(2.0)
        for sock in socks:
            sock.close()

    def _resolve(self, chance: random.Random) -> None:
        root = tempfile.TemporaryDirectory(dir=self._scratch)
        with root, MetadataResolver(BlobCache(root.name, fsync=False)) as resolver:
            resolver.resolve(self._card)
        self.resolves += 1


# ------------------------------------------------------------------ the run


def soak(options: Any, scratch: Path) -> int:
    """Run it; print a line every so often, and the verdict; return the exit code."""
    folder = scratch / "model"
    write_demo_model(str(folder))
    support.make_file(folder / "large.json", 5_000_000)
    command = [sys.executable, __file__, "--host", str(folder), "--isolation", options.isolation]
    with servers.Server("soak", command, scratch / "host") as server:
        assert server.process.stdout is not None
        first = json.loads(server.process.stdout.readline())
        clients = Clients(first["card_url"], ModelDeploymentCard.from_json(first["card"]), scratch)
        clients.start(options.clients)
        try:
            samples = watch(server, clients, options.minutes * 60)
        finally:
            clients.stop()
        print(server.log(), end="")
    print(f"{clients.answers} answers, {clients.resolves} resolves, {len(clients.faults)} faults")
    for fault in clients.faults[:10]:
        print("fault:", fault)
    support.write_json(options.json, samples)
    return 1 if clients.faults or not is_flat(samples) else 0


def watch(server: servers.Server, clients: Clients, seconds: float) -> list[Sample]:
    """Sample the host all the time, forty times in all."""
    assert server.process.stdin is not None
    assert server.process.stdout is not None
    began = time.monotonic()
    samples = []
    for number in range(1, 41):
        time.sleep(max(began + number * seconds / 40 - time.monotonic(), 0))
        server.process.stdin.write("?\n")
        server.process.stdin.flush()
        threads, descriptors, connections, files = json.loads(server.process.stdout.readline())
        memory = server.memory_bytes()
        samples.append(Sample(time.monotonic() - began, threads, descriptors, memory, connections, files))
        now = samples[-1]
        print(
            f"{now.seconds:6.0f} s  {threads} threads  {descriptors} descriptors  {memory / 1e6:.1f} MB  "
            f"{connections} connections  {files} files  {clients.answers} answers", flush=True,
        )  # fmt: skip
    return samples


def is_flat(samples: list[Sample]) -> bool:
    """Compare the last quarter with the second one; print both."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    flat = True
    for field in ("threads", "descriptors", "memory"):
        before, after = (median(getattr(sample, field) for sample in part) for part in (second, last))
        factor, slack = MEMORY_SLACK if field == "memory" else (1, 4)  # descriptors of the moment
        grew = after > before * factor + slack
        flat = flat and not grew
        verdict = "GREW" if grew else "flat"
        print(f"{field}: {before:.0f} in the second quarter, {after:.0f} in the last: {verdict}")
    return flat


if __name__ == "__main__":
    main()
