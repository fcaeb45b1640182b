"""A host that is busy in every way a host can be: the server serves it all the same, and leaves it alone."""

from __future__ import annotations

from typing import Any

import pytest

HOST = """
import http.client, signal, sys, threading, time
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

sys.setswitchinterval(0.0002)  # else each step of the client here waits for 32 turns of 5 ms
ticks, done, turns = [], threading.Event(), [0] * 32
signal.signal(signal.SIGALRM, lambda number, frame: ticks.append(number))
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)  # interrupts whatever waits in the main thread
handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

def work(number):
    while not done.is_set():
        try:
            turns[number] += 1
            raise ValueError(number)
        except ValueError:
            pass

registry = MetadataArtifactRegistry()
large = registry.register("m", "_base", "large", pin_bytes(bytes(3_000_000))).targets["large"]
with SystemStatusServer(registry, isolation=sys.argv[1]) as server:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(turns))]
    for thread in threads:
        thread.start()
    before = turns[:]
    sizes = set()
    for number in range(3):
        name = f"{number}.json"
        with registry.register("m", "_base", name, pin_bytes(b"{}")) as registration:
            for target in (registration.targets[name], large):
                connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
                connection.request("GET", target)
                sizes.add(len(connection.getresponse().read()))
                connection.close()
    moved = sum(after > first for after, first in zip(turns, before))
done.set()
for thread in threads:
    thread.join()
signal.setitimer(signal.ITIMER_REAL, 0)
print(sorted(sizes), moved, len(ticks) > 5, threading.active_count())
print(handlers == {number: signal.getsignal(number) for number in signal.valid_signals()})
print(mask == signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_host_with_busy_threads_and_signals(isolation: str, run_script: Any) -> None:
    """32 threads that never wait and a signal every 2 ms: all is served, and the host goes on as it was."""
    done = run_script(HOST, isolation, timeout=60)

    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[2, 3000000] 32 True 1", "True", "True"]
