"""What only the memory backend has: stores of its own, or shared ones."""

from __future__ import annotations

import gc
import weakref

from selfhost.discovery import Bucket, MemoryDiscovery, MemoryStore, RecordKey

KEY = RecordKey("ns", "comp", "ep", 1)


def test_participants_meet_only_in_one_store() -> None:
    """Without a store to share, each object has one for itself."""
    shared = MemoryStore()
    one, two, alone = MemoryDiscovery(shared), MemoryDiscovery(shared), MemoryDiscovery()

    one.publish(Bucket.MODELS, KEY, "{}")

    assert two.records(Bucket.MODELS) == {KEY: "{}"}
    assert alone.records(Bucket.MODELS) == {}


def test_forgotten_object_is_freed() -> None:
    """The hooks for exits and forks keep nothing alive."""
    discovery = MemoryDiscovery()
    discovery.publish(Bucket.MODELS, KEY, "{}")
    reference = weakref.ref(discovery)

    del discovery
    gc.collect()

    assert reference() is None


def test_repr_tells_the_count() -> None:
    """For a log line."""
    discovery = MemoryDiscovery()
    discovery.publish(Bucket.MODELS, KEY, "{}")

    assert repr(discovery) == "<MemoryDiscovery published=1>"
