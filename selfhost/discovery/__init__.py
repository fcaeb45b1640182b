"""How a card travels: records of JSON text under keys, in a store that workers and frontends share."""

from __future__ import annotations

from ..errors import DiscoveryError
from .base import (
    Bucket,
    Discovery,
    Event,
    Publication,
    RecordKey,
    instance_record,
    model_record,
    new_instance_id,
)
from .file import FileDiscovery
from .memory import MemoryDiscovery, MemoryStore
from .shared import SharedDiscovery, shared_instance_id

__all__ = [
    "Bucket",
    "Discovery",
    "Event",
    "FileDiscovery",
    "MemoryDiscovery",
    "MemoryStore",
    "Publication",
    "RecordKey",
    "SharedDiscovery",
    "instance_record",
    "model_record",
    "new_instance_id",
    "open_discovery",
    "shared_instance_id",
]


def open_discovery(backend: str, root: str) -> Discovery:
    """Return the backend of that name: "file" (a store in the directory `root`) or "mem" (one of its own).

    Opens nothing yet. Raises DiscoveryError for any other name.
    """
    if backend == "file":
        return FileDiscovery(root)
    if backend == "mem":
        return MemoryDiscovery()
    raise DiscoveryError(f"unknown discovery backend {backend!r}: expected file or mem", backend=backend)
