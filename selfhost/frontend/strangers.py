"""Waiting for those who take no locks: a Dynamo frontend that is writing the very blob that we want.

Its temporary file shows it: `<hex>.tmp.<pid>.<uuid>`, growing, without the lock that our own writers put on
theirs. Waiting saves a download and is never needed: whoever stops growing has died or hangs, and is waited
for no longer. Dynamo itself waits for nobody, so a file that we began first it may fetch as well.
"""

from __future__ import annotations

import os
import stat
from typing import Callable

from .folders import READ
from .locks import is_held

# A download that brings nothing for so long is as good as dead; a new one starts in a few milliseconds.
QUIET_SECONDS = 0.5
_PAUSE = 0.01


def wait_for_strangers(
    folder: int,
    hex: str,
    *,
    seconds: float,
    give_up: Callable[[], bool],
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> bool:
    """Wait while strangers write a blob in this folder; whether there were any comes back: then look again.

    Returns after at most `seconds`, soon after `give_up()` is true. Raises OSError.
    """
    sizes = _sizes(folder, hex)
    if not sizes:
        return False
    start = changed = clock()
    while sizes and not give_up():
        now = clock()
        if now - changed > QUIET_SECONDS or now - start > seconds:
            break
        sleep(_PAUSE)
        before, sizes = sizes, _sizes(folder, hex)
        if sizes != before:
            changed = clock()
    return True


def _sizes(folder: int, hex: str) -> dict[str, int]:
    """Return the size of each temporary file of the blob that is none of ours."""
    prefix = f"{hex}.tmp."
    sizes = {name: _size(folder, name) for name in os.listdir(folder) if name.startswith(prefix)}
    return {name: size for name, size in sizes.items() if size >= 0}


def _size(folder: int, name: str) -> int:
    """Return the size of a file that a stranger may be writing, -1 for anything else."""
    try:
        descriptor = os.open(name, READ, dir_fd=folder)
    except OSError:  # gone, or a link
        return -1
    try:
        status = os.fstat(descriptor)
        # Ours have a lock; where there are no locks, nobody can be told apart.
        is_strangers = stat.S_ISREG(status.st_mode) and is_held(descriptor) is False
        return status.st_size if is_strangers else -1
    finally:
        os.close(descriptor)
