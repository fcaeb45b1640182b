"""Sizes as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Return a size to be read by people: 999 B, 1.2 KiB, 17.0 MiB."""
    if count < 1000:
        return f"{count:.0f} B"
    units = ["TiB", "GiB", "MiB", "KiB"]
    count /= 1024
    while count >= 1000 and len(units) > 1:
        count /= 1024
        units.pop()
    return f"{count:.1f} {units[-1]}"
