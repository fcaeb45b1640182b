"""Copying a file and hashing what is copied, in one pass."""

from __future__ import annotations

import os

from ..card.checksum import Checksum, new_hasher

_BUFFER_BYTES = 1 << 20


def copy_and_hash(source: int, target: int) -> Checksum:
    """Copy from one descriptor to the other up to the end; return the checksum of what was written."""
    hasher = new_hasher()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    while count := os.readv(source, [buffer]):
        hasher.update(buffer[:count])
        rest = buffer[:count]
        while rest:
            rest = rest[os.write(target, rest) :]
    return Checksum(hasher.hexdigest())
