"""A process ends soon, whatever its frontend is fetching at that time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest
from helpers import RudeOrigin, make_card

import selfhost

StartOrigin = Callable[..., RudeOrigin]

SECONDS = 9.0  # within which a process ends that would otherwise fetch for minutes
FILES = {f"{number}.json": bytes([number]) * 4_000_000 for number in range(8)}  # 20 KB a second: 200 s each

BEGIN = """
import logging, signal, sys, threading, time
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.discovery import Bucket, MemoryDiscovery, RecordKey, model_record
from selfhost.frontend import BlobCache, MetadataResolver, ModelWatcher

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
logging.basicConfig(level=logging.WARNING)
card = sys.stdin.read()
resolver = MetadataResolver(BlobCache(sys.argv[1]))
discovery = MemoryDiscovery()
key = RecordKey("ns", "worker", "generate", 1)
record = discovery.publish(Bucket.MODELS, key, model_record(key, card))
watcher = ModelWatcher(discovery, resolver)
"""
WATCH = "watcher.start()\n"
RESOLVE = """
card = ModelDeploymentCard.from_json(card)
threading.Thread(target=resolver.resolve, args=[card], daemon=True).start()
"""
UNTIL_FETCHING = """
limit = time.monotonic() + 60
while sum(thread.name == "selfhost-fetch" for thread in threading.enumerate()) < 3:
    time.sleep(0.01 if time.monotonic() < limit else sys.exit("nothing is fetched"))
print("fetching", flush=True)
"""


@contextmanager
def running(code: str, cache: Path, origin: RudeOrigin) -> Iterator[subprocess.Popen[str]]:
    """Run code that has the card of the files on `origin`, up to its first line of output."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, str(cache)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])},
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(make_card(FILES, origin.url).to_json())
        process.stdin.close()
        process.stdin = None  # so that communicate leaves it alone
        assert process.stdout.readline() == "fetching\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("behaviour", ["steady_drip", "stalled_before_status"])
@pytest.mark.parametrize(
    "code",
    [
        WATCH + UNTIL_FETCHING,
        WATCH + UNTIL_FETCHING + "signal.raise_signal(signal.SIGTERM)",
        "with watcher:\n    " + UNTIL_FETCHING.strip().replace("\n", "\n    "),
        RESOLVE + UNTIL_FETCHING,
    ],
    ids=["main ends", "SIGTERM", "with", "a thread of its own"],
)
def test_process_ends_while_it_fetches(
    rude_origin: StartOrigin, tmp_path: Path, code: str, behaviour: str
) -> None:
    """Neither the fetching threads nor those of the watcher keep the interpreter from its exit."""
    origin = rude_origin(FILES, behaviour)

    with running(code, tmp_path / "cache", origin) as process:
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - began < SECONDS
