"""What the benchmarks share: test files, medians of interleaved rounds, ratios, tables, processor pinning."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Callable, Optional, Union

KILOBYTE, MEGABYTE = 1_000, 1_000_000
Goal = Optional[Union["AtLeast", "AtMost"]]


class AtLeast(float):
    """A goal for a ratio where more is better."""

    def verdict(self, ratio: float) -> str:
        return f">= {self:g} {'ok' if ratio >= self else 'MISSED'}"


class AtMost(float):
    """A goal for a ratio where less is better."""

    def verdict(self, ratio: float) -> str:
        return f"<= {self:g} {'ok' if ratio <= self else 'MISSED'}"


def arguments(description: Optional[str], **defaults: Union[int, float]) -> argparse.ArgumentParser:
    """Return a parser with --json and one option for each default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"(default {value:g})")
    parser.add_argument("--json", metavar="FILE", help="also write every round's figure to FILE")
    return parser


def interleaved(
    work: Mapping[str, Callable[[], float]], rounds: int, results: Optional[dict[str, list[float]]] = None
) -> dict[str, list[float]]:
    """Call everything once a round, `rounds` times, in turn; return the figures by name."""
    results = {name: [] for name in work} if results is None else results
    for number in range(rounds):
        names = list(work) if number % 2 == 0 else list(reversed(work))  # a drift cancels out
        for name in names:
            results.setdefault(name, []).append(work[name]())
    return results


def ratio(figures: Mapping[str, Sequence[float]], name: str, base: str) -> Optional[float]:
    """Return the median of name / base over the rounds, or None where one of them is missing."""
    if not figures.get(name) or not figures.get(base):
        return None
    pairs = zip(figures[name], figures[base])
    return statistics.median(one / other if other else float("inf") for one, other in pairs)


def against(figures: Mapping[str, Sequence[float]], name: str, base: str, goal: Goal = None) -> str:
    """Return that ratio as a table's cell, with the goal's verdict."""
    value = ratio(figures, name, base)
    if value is None:
        return "-"
    return f"{value:.2f}" if goal is None else f"{value:.2f} ({goal.verdict(value)})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip(), flush=True)


def scaled(value: float, unit: str) -> str:
    """Return a figure with three digits and an SI prefix."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def write_json(path: Optional[str], results: object) -> None:
    """Write all results where --json says."""
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def make_file(path: Path, size: int, seed: int = 0) -> Path:
    """Write `size` bytes that do not repeat within 16 MB; the same for the same seed."""
    block = random.Random(seed).randbytes(min(size, 16 * MEGABYTE))
    with open(path, "wb") as file:
        for start in range(0, size, len(block) or 1):
            file.write(block[: size - start])
    return path


def pin(processor: Optional[int]) -> list[str]:
    """Return the head of a command line that keeps a process on one processor."""
    return [] if processor is None else ["taskset", "--cpu-list", str(processor)]


def two_processors() -> tuple[Optional[int], Optional[int]]:
    """Return a processor for servers and one for whoever loads them; None where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return (available[0], available[1]) if len(available) > 1 else (None, None)
