"""Progress on stderr: a line that is redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import logging
import os
import re
from typing import Any, Optional

import pytest

from selfhost.cli.progress import (
    REDRAW_SECONDS,
    PlainLines,
    TerminalLine,
    progress_line,
    show_progress,
)
from selfhost.frontend.progress import Progress

MIB = 1 << 20


def progress(done: int = 0, total: Optional[int] = 20 * MIB, files: int = 0, name: str = "f") -> Progress:
    """Return a report of a fetch of eight files; sizes in bytes."""
    return Progress(name, done, None, done, total, files, 8)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


# ------------------------------------------------------------------ the line


def test_line_tells_it_all() -> None:
    """Bar, bytes, files, rate and time left."""
    line = progress_line(progress(5 * MIB, files=2), 2.5, 100)

    assert line == "[#####                 ]  5.0 MiB of 20.0 MiB  2/8 files  2.0 MiB/s  0:08 left"


@pytest.mark.parametrize("columns", range(120))
def test_line_fits(columns: int) -> None:
    """However narrow the terminal is, the line is no wider; the bytes are the last to go."""
    line = progress_line(progress(5 * MIB), 2.5, columns)

    assert len(line) <= columns
    assert line.lstrip("[# ]").startswith("5.0 MiB of 20.0 MiB"[:columns])


def test_line_without_a_total() -> None:
    """Where the card does not tell sizes there is neither bar nor time left."""
    assert progress_line(progress(5 * MIB, None), 2.5, 100) == "5.0 MiB  0/8 files  2.0 MiB/s"


@pytest.mark.parametrize(
    ("total", "done", "seconds"), [(0, 0, 0.0), (0, 0, 1.0), (MIB, 0, 0.0), (MIB, 2 * MIB, 1.0)]
)
def test_odd_numbers(total: int, done: int, seconds: float) -> None:
    """No time gone, nothing to do, more than was announced: a line all the same."""
    assert progress_line(progress(done, total), seconds, 100)


@pytest.mark.parametrize(("seconds", "text"), [(1, "0:07 left"), (100, "11:40 left"), (1000, "1:56:40 left")])
def test_time_left(seconds: float, text: str) -> None:
    """Minutes and seconds, hours where there are some."""
    assert progress_line(progress(MIB, 8 * MIB), seconds, 100).endswith(text)


# ------------------------------------------------------------------ a terminal


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def test_terminal_is_redrawn_ten_times_a_second() -> None:
    """A thousand reports in one second are at most some ten drawings, each over the one before."""
    terminal, clock = Terminal(), Clock()
    bar = TerminalLine(terminal, clock=clock, columns=lambda: 80)
    for number in range(1000):
        clock.now = number / 1000
        bar(progress(number))
    drawings = terminal.getvalue().split("\r\x1b[K")[1:]

    assert 9 <= len(drawings) <= 1 / REDRAW_SECONDS + 1
    assert "\n" not in terminal.getvalue()
    assert max(map(len, drawings)) <= 79


def test_terminal_is_left_clean() -> None:
    """At the end the line is gone; nothing is written where nothing was drawn."""
    terminal = Terminal()
    with show_progress(terminal) as show:
        show(progress(1))
    assert terminal.getvalue().endswith("\r\x1b[K")

    untouched = Terminal()
    with show_progress(untouched):
        pass
    assert untouched.getvalue() == ""


def test_log_messages_do_not_run_into_the_line() -> None:
    """A message clears the line first; afterwards the handlers are as they were."""
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with show_progress(terminal) as show:
            show(progress(1))
            logging.getLogger("selfhost.test").warning("careful")
        assert handler.filters == []
    finally:
        root.removeHandler(handler)

    assert re.search(r"\r\x1b\[K.*files\r\x1b\[Kcareful\n", terminal.getvalue())


def test_width_of_a_real_terminal(read_terminal: Any) -> None:
    """The width is asked for at each drawing, so a window may change its size."""
    import fcntl
    import struct
    import termios

    leader, follower = os.openpty()
    with open(follower, "w") as terminal:
        assert terminal.isatty()
        clock = Clock()
        bar = TerminalLine(terminal, clock=clock)
        for columns in (30, 100):
            clock.now += 1.0
            fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            bar(progress(5 * MIB))
    drawings = read_terminal(leader).split("\r\x1b[K")[1:]
    os.close(leader)

    assert [len(drawing) for drawing in drawings] == [29, 78]


# ------------------------------------------------------------------ elsewhere


def test_plain_lines() -> None:
    """Where nobody watches, each file is told once, when it is done."""
    stream = io.StringIO()
    with show_progress(stream) as show:
        assert isinstance(show, PlainLines)
        for report in (
            progress(1),
            progress(2),
            progress(MIB, files=1, name="a\x1b[2J"),
            progress(MIB + 1, files=1),
        ):
            show(report)
        show(progress(2 * MIB, files=2, name="b"))

    assert stream.getvalue().splitlines() == ["fetched 1/8 a\\x1b[2J (1.0 MiB)", "fetched 2/8 b (2.0 MiB)"]


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have been started without one."""
    monkeypatch.setattr("sys.stderr", None)
    with show_progress() as show:
        show(progress(1))
