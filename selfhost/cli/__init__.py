"""The command line: `selfhost serve`, `card`, `fetch`, `verify`, `doctor`, `cache`, `demo`.

Exit codes: 0 done; 1 an error, told on stderr, or files that are not what their card says; 2 wrong usage.
Results go to stdout, everything else to stderr; when the reader of stdout leaves, the command ends quietly
with 1.

Each command has its arguments in a module of its own and loads what does the work when it runs: a frontend's
commands never load the worker's modules, nor the reverse.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from .. import __version__
from ..errors import ResolveError, SelfHostError
from .cache import add_cache
from .doctor import add_doctor
from .fetch import add_fetch, add_verify
from .serve import add_card, add_serve
from .support import add_command, flush, printable

if TYPE_CHECKING:
    from .support import Commands

MAX_ERROR_CHARS = 4000  # of a card in which everything is wrong nobody reads more

DEMO_EXAMPLES = """\
examples:
  selfhost demo           a tiny model on a free loopback port; exit code 1 if any byte is wrong
  selfhost demo --keep    the same, and leave its directory for a `selfhost serve` of your own
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code; wrong usage and --help raise SystemExit, as argparse does."""
    arguments = make_parser().parse_args(argv)
    _log_to_stderr(logging.DEBUG if arguments.verbose else logging.WARNING)
    try:
        code: Optional[int] = arguments.run(arguments)
        flush()
    except BrokenPipeError:  # whoever read our output has left; nobody is there to be told
        _discard_stdout()
        return 1
    except (SelfHostError, OSError, UnicodeError) as error:  # the last: a name that stdout cannot show
        return _fail(_text_of(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return code or 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; `run` of its result is the command's function."""
    parser = argparse.ArgumentParser(
        prog="selfhost",
        description="A worker serves its own model metadata, and frontends fetch exactly those bytes.",
        epilog="Start with `selfhost demo`; where something does not work, with `selfhost doctor URL`. "
        "`selfhost COMMAND --help` has examples of each command.",
    )
    parser.add_argument("--version", action="version", version=f"selfhost {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, add_serve, add_card, add_fetch, add_verify, add_doctor, add_cache):
        add(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    does = "serve a tiny model to ourselves, fetch every file back and verify it"
    parser = add_command(commands, "demo", _demo, does, DEMO_EXAMPLES)
    parser.add_argument("--keep", action="store_true", help="keep the model directory that is made")


def _demo(arguments: argparse.Namespace) -> None:
    from .. import demo

    demo.run(keep=arguments.keep)


# ------------------------------------------------------------------ what goes to stderr


class _Formatter(logging.Formatter):
    """Writes a message as one line, whatever the names in it hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("selfhost: %(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _fail(message: str) -> int:
    if sys.stderr is None:  # closed: print would take stdout in its place
        return 1
    with contextlib.suppress(OSError):
        print(f"selfhost: error: {message}", file=sys.stderr, flush=True)
    return 1


def _text_of(error: BaseException) -> str:
    """Return what is said of an error: one line, but for a ResolveError, which has one for each attempt."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}"
    if isinstance(error, ResolveError):
        return "\n".join(map(printable, str(error).split("\n")))
    return printable(" ".join(str(error)[:MAX_ERROR_CHARS].split()))


def _discard_stdout() -> None:
    """Let the interpreter's last flush go nowhere, where it cannot fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the last: there is none
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
