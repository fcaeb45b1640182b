"""The documented application under gunicorn, clients that keep asking, and who publishes."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foreign import Running, environment, gunicorn, running
from gunicorn import version_info as gunicorn_version
from helpers import poll_until

from selfhost import ModelDeploymentCard
from selfhost.discovery import Bucket, FileDiscovery, claims

PATIENCE_SECONDS = 20.0  # for several interpreters to start, on a machine that is busy
# Told to end, gthread of gunicorn 23 drops what it has accepted and not answered; that of 27 does not.
GTHREAD_DROPS = gunicorn_version < (27,)
LEADER, MEMBERS = 1, 2  # bytes of a record in the file of claims


class Site:
    """gunicorn with workers that have the documented application, and the store in which they publish."""

    def __init__(self, server: Running, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.store = FileDiscovery(folder / "kv")

    def cards(self) -> list[ModelDeploymentCard]:
        """Return the published cards, the base model's first."""
        records = [json.loads(text) for text in self.store.records(Bucket.MODELS).values()]
        return [ModelDeploymentCard.from_json(json.dumps(record["card_json"])) for record in records]

    def targets(self, card: ModelDeploymentCard) -> dict[str, str]:
        """Return the target of each file of a card, by its name."""
        start = len(self.server.url)
        return {str(file.basename): file.path[start:] for file, _ in card.iter_metadata_files()}

    def holders(self, byte: int) -> set[int]:
        """Return the processes that have locked a byte of the base model's record."""
        inode = (self.folder / "share" / "publish" / "claims").stat().st_ino
        keys = [key for key in self.store.records(Bucket.MODELS) if key.suffix is None]
        places = {
            str(claims._place_of(f"mdc/{key}") + byte) for key in keys
        }  # there may be no record just now
        rows = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        return {int(row[4]) for row in rows if row[5].endswith(f":{inode}") and places & set(row[6:])}

    def wait_for_workers(self, count: int, *, without: frozenset[int] = frozenset()) -> frozenset[int]:
        """Wait until there are so many workers that have all registered, and none of some old ones."""

        def are_there() -> bool:
            workers = set(self.server.workers)
            return len(workers) == count and not workers & without and workers <= self.holders(MEMBERS)

        assert poll_until(are_there, PATIENCE_SECONDS), self.server.log.read_text()
        return frozenset(self.server.workers)


@contextmanager
def running_site(folder: Path, *options: str, workers: int = 4) -> Iterator[Site]:
    """Run gunicorn as docs/gunicorn.md says in a folder with its samples, from when all workers are there."""
    env = environment(
        folder,
        DYN_SELF_HOST_METADATA="1",
        DYN_SYSTEM_ADVERTISE_URL="URL/internal",
        DYN_SYSTEM_SHARED_DIR=str(folder / "share"),
        DYN_FILE_KV=str(folder / "kv"),
    )
    command = gunicorn("-c", "gunicorn.conf.py", "--workers", workers, *options, "host:app")
    with running(command, folder, env) as server:
        site = Site(server, folder)
        site.wait_for_workers(workers)
        yield site


class Load:
    """Clients that ask for the base model's files in turn, each time over a new connection.

    For the time of a `with`; what comes is compared with what is on the disk.
    """

    def __init__(self, site: Site, clients: int = 4) -> None:
        self.right = 0
        self.wrong: list[object] = []
        self.broken: list[str] = []  # connections, without a whole answer
        self._server = site.server
        model = site.folder / "my-model"
        self._files = {
            path: (model / name).read_bytes() for name, path in site.targets(site.cards()[0]).items()
        }
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        for target, content in itertools.cycle(self._files.items()):
            if self._done.is_set():
                return
            try:
                got = self._server.get(target)
            except (OSError, http.client.HTTPException) as err:
                self.broken.append(repr(err))
                continue
            if (got.status, got.body) == (200, content):
                self.right += 1
            else:
                self.wrong.append((target, got.status, got.body[:99]))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


class Records:
    """The names of the model records as they change, looked at all the time for the time of a `with`."""

    def __init__(self, site: Site) -> None:
        self.seen: list[list[str]] = []
        self._folder = site.folder / "kv" / "v1" / "mdc"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.001):
            names = sorted(name for name in os.listdir(self._folder) if not name.startswith(".tmp_"))
            if self.seen[-1:] != [names]:
                self.seen.append(names)

    def __enter__(self) -> Records:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
