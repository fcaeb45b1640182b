"""What the tests of the cache share: filling one, looking at what lies in one, other clocks for the file
system, and two scenarios that are run again and again while things go wrong.

    python cache_kit.py ROOT     runs the scenario; exit code 3 for a CacheError
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, Optional

from selfhost.card.checksum import Checksum
from selfhost.errors import CacheError
from selfhost.frontend import stamps
from selfhost.frontend.cache import BlobCache, ModelKey

if TYPE_CHECKING:
    import pytest

HOUR = 3600.0
MODEL = ModelKey("llama", "a" * 64)
OTHER_MODEL = ModelKey("llama", "b" * 64)
DATA = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": bytes(range(256)) * 500}


def environment() -> dict[str, str]:
    """Return an environment in which a child imports what this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def run_python(script: str, *args: object, wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; CalledProcessError unless it ends well."""
    command = [*wrapper, sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


class Clock:
    """A wall clock that the test sets."""

    def __init__(self) -> None:
        self.ahead = 0.0  # seconds

    def __call__(self) -> float:
        """Return the time, in seconds since 1970."""
        return time.time() + self.ahead


def date_each_change(patch: pytest.MonkeyPatch) -> None:
    """Let this process see that each fchmod is dated anew, however coarse the file system's clock is."""
    changes: Counter[int] = Counter()
    fchmod, fstat = os.fchmod, os.fstat

    def change(fd: int, mode: int) -> None:
        fchmod(fd, mode)
        changes[fstat(fd).st_ino] += 1

    patch.setattr(os, "fchmod", change)
    _see(patch, lambda status: {"st_ctime_ns": status.st_ctime_ns + changes[status.st_ino]})


def date_all_changes_alike(patch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Let this process see that nothing changes the date of a file; return a clock that has stopped, too.

    So all that happens seems to happen within one tick.
    """
    now = time.time_ns()
    dates = {"st_ctime_ns": now, "st_mtime_ns": now, "st_ctime": now / 1e9, "st_mtime": now / 1e9}
    _see(patch, lambda status: dates)
    return lambda: now / 1e9


def _see(patch: pytest.MonkeyPatch, difference: Callable[[os.stat_result], Mapping[str, float]]) -> None:
    """Let os.stat and os.fstat tell something else."""
    for name in ("stat", "fstat"):
        function = getattr(os, name)

        def look(*args: Any, function: Any = function, **options: Any) -> SimpleNamespace:
            status = function(*args, **options)
            seen = {key: getattr(status, key) for key in dir(status) if key.startswith("st_")}
            return SimpleNamespace(**{**seen, **difference(status)})

        patch.setattr(os, name, look)


def put(cache: BlobCache, data: bytes) -> Checksum:
    """Publish these bytes; return their checksum."""
    checksum = Checksum.of(data)
    with cache.write(checksum) as writer:
        writer.write(data)
        writer.publish("test")
    return checksum


def put_model(
    cache: BlobCache, model: ModelKey = MODEL, data: Optional[Mapping[str, bytes]] = None
) -> dict[str, Checksum]:
    """Publish a model of these files; return their checksums by name."""
    files = {name: put(cache, content) for name, content in (DATA if data is None else data).items()}
    cache.publish_model(model, files)
    return files


def blob_path(cache: BlobCache, checksum: Checksum) -> Path:
    """Return where the own root has a blob, or would have it."""
    return Path(cache.root, "blobs", checksum.hex)


def names(folder: Path) -> list[str]:
    """Return what lies in a folder, sorted; nothing where there is none."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def tree(root: Path) -> dict[str, object]:
    """Return everything below a folder, with what tells whether it was touched."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(root))] = (
            status.st_mode,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
        )
    return found


def temporaries(root: Path) -> list[str]:
    """Return the temporary files and folders that lie in a cache."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if ".tmp." in path.name)


def torn(root: Path) -> list[str]:
    """Return the blobs whose bytes are not those of their names."""
    paths = [path for path in (root / "blobs").glob("*") if len(path.name) == 64]
    return [path.name for path in paths if Checksum.of(path.read_bytes()).hex != path.name]


def scenario(root: str, clock: Callable[[], float] = time.time) -> dict[str, bytes]:
    """Fetch what is missing of a model, as a resolver does; return the files of its directory."""
    cache = BlobCache(root, clock=clock)
    files = {name: Checksum.of(data) for name, data in DATA.items()}
    for name, checksum in files.items():
        with cache.lock(checksum):
            if cache.find(checksum) is None:
                _fetch(cache, checksum, DATA[name])
    path = cache.find_model(MODEL, files) or cache.publish_model(MODEL, files)
    with cache.hold(path):
        BlobCache(root, clock=lambda: clock() + 2 * HOUR).find_model(MODEL, files)  # a use to be written down
        return {name: Path(path, name).read_bytes() for name in os.listdir(path)}


def resolve(root: str, url: str, clock: Callable[[], float] = time.time) -> dict[str, bytes]:
    """Resolve the card of a model whose files are found below `url`; return those of its directory."""
    import helpers

    from selfhost.frontend.limits import ResolverLimits
    from selfhost.frontend.resolver import MetadataResolver

    limits = ResolverLimits(connections=1)  # so that the calls come in the same order each time
    with MetadataResolver(BlobCache(root, clock=clock), limits=limits) as resolver:
        path = resolver.resolve(helpers.make_card(DATA, url)).local_dir
    return {name: Path(path, name).read_bytes() for name in os.listdir(path)}


def _fetch(cache: BlobCache, checksum: Checksum, data: bytes) -> None:
    with cache.write(checksum) as writer:
        writer.write(b"of another version")
        writer.restart()
        half = len(data) // 2
        writer.write(data[:half])
        writer.write(data[half:])
        writer.publish("test")


if __name__ == "__main__":
    stamps._finely_dated = os.fstat  # so that the calls are the same each time, however slow they are made
    try:
        sys.exit(0 if scenario(sys.argv[1]) == DATA else 1)
    except CacheError as err:
        print(err)
        sys.exit(3)
