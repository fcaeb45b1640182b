"""Processes that publish one and the same record, for the tests of who of them does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Optional

from selfhost.discovery import RecordKey, base

KEY, OTHER = RecordKey("ns", "comp", "ep", 0xABC), RecordKey("ns", "comp", "ep", 0xABC, "lora")
NAME = "ns%2Fcomp%2Fep%2Fabc"  # of the file of KEY's record
PACKAGE = str(Path(base.__file__).parents[2])

PARTICIPANT = """
import os, sys, time, warnings
warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # to fork with threads is what is tested
from selfhost.discovery import Bucket, FileDiscovery, RecordKey, SharedDiscovery, claims, shared
shared.STAND_BY_SECONDS = 0.02
kv, share, ttl_seconds = sys.argv[1:]
discovery = SharedDiscovery(FileDiscovery(kv, ttl_seconds=float(ttl_seconds)), share)
key = RecordKey("ns", "comp", "ep", 0xABC)
publication = None

def publish(text):
    global publication
    publication = discovery.publish(Bucket.MODELS, key, text)

for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except Exception as err:
        print("error:", err, flush=True)
"""


class Participant:
    """A process that evaluates what it is told, with `publish`, `publication` and `discovery` at hand."""

    def __init__(self, folder: Path, ttl_seconds: float) -> None:
        command = [sys.executable, "-W", "error", "-c", PARTICIPANT, str(folder), f"{folder}/share"]
        self.process = subprocess.Popen(
            [*command, str(ttl_seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE},
        )  # fmt: skip

    def tell(self, code: str) -> None:
        """Have it evaluate something."""
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Return the result of what it was told."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def do(self, code: str) -> str:
        """Have it evaluate something; return the result."""
        self.tell(code)
        return self.answer()

    def publish(self, text: str = "{}") -> bool:
        """Have it publish; tell whether it is the one that holds the record."""
        assert self.do(f"publish({text!r})") == "None"
        return self.is_leading()

    def is_leading(self) -> bool:
        """Tell whether it holds a record."""
        return "leading=1" in self.do("discovery")

    def end(self, how: Optional[signal.Signals] = None) -> None:
        """Kill it, or let it exit in order."""
        if how is not None:
            self.process.send_signal(how)
        self.process.communicate(timeout=20)
