"""A host with a loop of its own: steps of a fixed amount of Python, one every so often, as an engine's are.

For every line on standard input the host prints `steps N P50 P99 MAX`: how many steps there were since the
line before, and how long they took, from when they were due to their end, in milliseconds.
"""

from __future__ import annotations

import sys
import threading
import time

PERIOD_SECONDS = 0.010
TURNS = 60_000  # of a step's loop: about 2 ms of Python


def start() -> None:
    """Start the loop and the thread that answers; both end with the process."""
    late: list[float] = []

    def steps() -> None:
        due = time.perf_counter()
        while True:
            for _ in range(TURNS):
                pass
            now = time.perf_counter()
            late.append(now - due)
            due = max(due + PERIOD_SECONDS, now)
            time.sleep(max(due - time.perf_counter(), 0))

    def tell() -> None:
        for _ in sys.stdin:
            taken = sorted(late[:])
            late.clear()
            figures = (
                [1000 * taken[int(part * (len(taken) - 1))] for part in (0.5, 0.99, 1.0)] if taken else []
            )
            print("steps", len(taken), *(f"{figure:.3f}" for figure in figures), flush=True)

    for work in (steps, tell):
        threading.Thread(target=work, daemon=True).start()
