"""selfhost._units: sizes as people read them."""

from __future__ import annotations

import pytest

from selfhost._units import human_bytes


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1024, "1.0 KiB"), (1_500_000, "1.4 MiB"),
        (20 << 20, "20.0 MiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB"),
    ],
)  # fmt: skip
def test_human_bytes(count: int, expected: str) -> None:
    """Three or four digits, and a unit."""
    assert human_bytes(count) == expected
