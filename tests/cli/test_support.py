"""What the commands share: quantities that are typed, and text that a terminal can bear."""

from __future__ import annotations

import argparse

import pytest

from selfhost.cli import support


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0), ("4096", 4096), ("4096B", 4096), ("2GiB", 2 << 30), ("2gib", 2 << 30), ("2G", 2 << 30),
        ("2 GiB", 2 << 30), ("2GB", 2 * 10**9), ("500MB", 500 * 10**6), ("1.5TiB", 3 << 39), ("10k", 10240),
        ("1kB", 1000), ("0.5K", 512),
    ],
)  # fmt: skip
def test_sizes(value: str, expected: int) -> None:
    """A letter and the binary units are powers of 1024, kB, MB and so on powers of 1000."""
    assert support.byte_count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("30d", 2592000), ("12h", 43200), ("90m", 5400), ("45s", 45), ("2w", 1209600), ("0.5d", 43200)],
)
def test_ages(value: str, expected: float) -> None:
    """An age has a unit."""
    assert support.seconds(value) == expected


@pytest.mark.parametrize(
    "value", ["", "G", "-1", "+1", "1e9", "0x10", "1,5G", "1 000", "2GiBs", "٣", "9" * 16, "1G\n"]
)
def test_what_is_no_size(value: str) -> None:
    """Anything that could be misread is refused."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 2GiB"):
        support.byte_count(value)


@pytest.mark.parametrize("value", ["", "30", "d", "-1d", "30days", "1y", "1M2s"])
def test_what_is_no_age(value: str) -> None:
    """A number alone may be anything, so it is nothing."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected an age such as 30d"):
        support.seconds(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain name.json", "plain name.json"),
        ("naïve 模型 🦙", "naïve 模型 🦙"),
        ("a\nselfhost: all is well", "a\\nselfhost: all is well"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("txt.\u202egnp", "txt.\\u202egnp"),
        ("half \udcff", "half \\udcff"),
    ],
)
def test_printable(value: str, expected: str) -> None:
    """What would move the cursor, forge a line or turn the text around is written as an escape."""
    assert support.printable(value) == expected
