"""Progress of a fetch on stderr: one line that is redrawn on a terminal, a line for each file elsewhere.

The resolver calls from one thread at a time; log messages come from any. Both go through one lock, and a log
message first clears the line that it would be written into.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable, Optional, TextIO

from .._units import human_bytes
from .support import printable

if TYPE_CHECKING:
    from ..frontend.progress import Progress

REDRAW_SECONDS = 0.1  # between two drawings: more often is for nobody, and costs on slow terminals
RATE_AFTER_SECONDS = 0.5  # earlier it says nothing
BAR_COLUMNS = 24
MIN_BAR_COLUMNS = 8
DEFAULT_COLUMNS = 80  # where the terminal does not say

_CLEAR = "\r\x1b[K"  # back to the first column, and erase to the end of the line


@contextlib.contextmanager
def show_progress(stream: Optional[TextIO] = None) -> Iterator[Callable[[Progress], None]]:
    """Give the callback that shows progress on `stream` (None: stderr); clear up at the end."""
    stream = sys.stderr if stream is None else stream
    if stream is None:  # the process was started without one
        yield lambda progress: None
    elif not stream.isatty():
        yield PlainLines(stream)
    else:
        bar = TerminalLine(stream)
        handlers = logging.getLogger().handlers
        for handler in handlers:
            handler.addFilter(bar.make_way)
        try:
            yield bar
        finally:
            for handler in handlers:
                handler.removeFilter(bar.make_way)
            bar.clear()


class PlainLines:
    """One line for each file that is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._done_files = 0

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        if progress.done_files > self._done_files:
            self._done_files = progress.done_files
            count = f"{progress.done_files}/{progress.total_files}"
            line = f"fetched {count} {printable(progress.filename)} ({human_bytes(progress.file_bytes)})"
            print(line, file=self._stream, flush=True)


class TerminalLine:
    """One line with a bar, redrawn in place; `columns` says how wide the terminal is at the moment."""

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        columns: Optional[Callable[[], int]] = None,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._columns = columns or (lambda: _columns_of(stream))
        self._lock = threading.RLock()
        self._started_at = clock()
        self._drawn_at = float("-inf")
        self._is_drawn = False

    def __call__(self, progress: Progress) -> None:
        """Show it, unless the last drawing is too fresh."""
        with self._lock:
            now = self._clock()
            if now - self._drawn_at >= REDRAW_SECONDS:
                self._drawn_at = now
                self._is_drawn = True
                # One column stays free: terminals differ in what they do behind the last one.
                line = progress_line(progress, now - self._started_at, self._columns() - 1)
                self._write(_CLEAR + line)

    def clear(self) -> None:
        """Erase the line, if there is one."""
        with self._lock:
            if self._is_drawn:
                self._is_drawn = False
                self._write(_CLEAR)

    def make_way(self, record: logging.LogRecord) -> bool:
        """Erase the line before a log message is written; a filter that lets all pass."""
        self.clear()
        return True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _columns_of(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


# ------------------------------------------------------------------ the line


def progress_line(progress: Progress, seconds: float, columns: int) -> str:
    """Return what is said of a fetch that has run for so long, in so many columns: the most telling first."""
    parts = [_amount(progress), f"{progress.done_files}/{progress.total_files} files"]
    rate = progress.done_bytes / seconds if seconds >= RATE_AFTER_SECONDS else 0.0  # bytes per second
    if rate:
        parts.append(f"{human_bytes(rate)}/s")
    if rate and progress.total_bytes is not None:
        parts.append(f"{_duration((progress.total_bytes - progress.done_bytes) / rate)} left")
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) <= columns:
            line += f"  {part}"
    room = min(columns - len(line) - 2, BAR_COLUMNS)
    if room >= MIN_BAR_COLUMNS and progress.total_bytes:
        line = f"{_bar(progress.done_bytes / progress.total_bytes, room)}  {line}"
    return line[: max(columns, 0)]


def _amount(progress: Progress) -> str:
    done = human_bytes(progress.done_bytes)
    return done if progress.total_bytes is None else f"{done} of {human_bytes(progress.total_bytes)}"


def _bar(fraction: float, columns: int) -> str:
    inside = columns - 2
    return f"[{'#' * int(inside * min(max(fraction, 0.0), 1.0)):<{inside}}]"


def _duration(seconds: float) -> str:
    """Return a time as a clock shows it: 0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(int(max(seconds, 0.0) + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
