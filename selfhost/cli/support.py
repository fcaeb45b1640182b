"""What the commands share: how one is added to the parser, argument types, and text that a terminal can bear.

Whatever comes from a card, a server or a disk goes through `printable` on its way to a terminal: a name may
hold control characters, which would move the cursor or forge a line.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, BinaryIO, Callable, Optional, TextIO

from ..errors import SelfHostError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Does the command; returns the exit code (None: 0), or raises what `main` turns into one.
Run = Callable[[argparse.Namespace], Optional[int]]


def add_command(commands: Commands, name: str, run: Run, does: str, epilog: str) -> argparse.ArgumentParser:
    """Add a command that `run` does; `epilog` holds examples of it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done to stderr")
    parser.set_defaults(run=run)
    return parser


def refuse_token(parser: argparse.ArgumentParser) -> None:
    """Have `--token SECRET` refused without showing it, neither taken for --token-file nor for unknown."""
    parser.allow_abbrev = False
    parser.add_argument("--token", type=_no_token, help=argparse.SUPPRESS)


def _no_token(value: str) -> str:
    raise argparse.ArgumentTypeError(
        "everybody on this machine can read a command line: put it into a file, and give --token-file"
    )


# ------------------------------------------------------------------ argument types


def text(value: str) -> str:
    """Take a name that JSON can carry: not empty, and no bytes that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid UTF-8") from None
    if not value:
        raise argparse.ArgumentTypeError("it must not be empty")
    return value


def path(value: str) -> str:
    """Take a path; the empty one is nearly always a variable that was not set."""
    if not value:
        raise argparse.ArgumentTypeError("it must not be empty")
    return value


_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _BYTES |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]{0,3})")


def byte_count(value: str) -> int:
    """Take a size: 2GiB (or 2G), 500MB, 1.5TiB, 4096."""
    return int(_quantity(value, _BYTES, "a size such as 2GiB, 500MB or 4096"))


def seconds(value: str) -> float:
    """Take an age: 30d, 12h, 90m, 45s, 2w; a number without a unit has none that everybody would guess."""
    return _quantity(value, _SECONDS, "an age such as 30d, 12h, 90m or 45s")


def _quantity(value: str, units: dict[str, int], expected: str) -> float:
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"{value!r}: expected {expected}")
    return float(match[1]) * units[match[2].lower()]


# ------------------------------------------------------------------ output


def printable(value: str) -> str:
    """Return the text with everything that is no visible character or space written as an escape."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def print_path(value: str) -> None:
    """Print a path on stdout as the file system has it, whatever the terminal's encoding is."""
    print_bytes(os.fsencode(value))


def print_bytes(line: bytes) -> None:
    """Print a line on stdout as it is; raise SelfHostError if there is no stdout."""
    flush()
    bytes_of(sys.stdout, "stdout").write(line + b"\n")


def bytes_of(stream: Optional[TextIO], name: str) -> BinaryIO:
    """Return what carries the bytes of stdin or stdout, or raise SelfHostError.

    The interpreter has None in place of a stream that was closed when the process started, and whoever calls
    `main` may have put one there that takes text only.
    """
    buffer: Optional[BinaryIO] = getattr(stream, "buffer", None)
    if buffer is None:
        raise SelfHostError(f"{name} is {'closed' if stream is None else 'no stream of bytes'}")
    return buffer


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Tell whether people read this stream; nobody reads one that is closed."""
    return stream is not None and stream.isatty()


def flush() -> None:
    """Write out what is on its way to stdout."""
    if sys.stdout is not None:  # None: the process was started without one
        sys.stdout.flush()
