"""A host that hogs the interpreter: a thread that does nothing but turn a loop written in Python.

For every line on standard input the host prints `turns N SECONDS`: its turns so far and its clock, read
together, so that whoever asks can tell how fast the loop was between two questions.
"""

from __future__ import annotations

import sys
import threading
import time


def start() -> None:
    """Start the spinning thread and the one that answers; both end with the process."""
    turns = [0]

    def spin() -> None:
        while True:
            turns[0] += 1

    def tell() -> None:
        for _ in sys.stdin:
            print("turns", turns[0], time.perf_counter(), flush=True)

    for work in (spin, tell):
        threading.Thread(target=work, daemon=True).start()
