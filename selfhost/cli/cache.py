"""`selfhost cache`: look at what a frontend keeps, collect garbage, hash it all, import from a directory."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from .._units import human_bytes
from ..errors import SelfHostError
from .cache_options import add_cache_root, open_cache
from .cards import add_card, checksums_of, find_name, open_transports, read_card
from .support import add_command, byte_count, is_terminal, print_path, printable, seconds

if TYPE_CHECKING:
    from ..frontend.cache import BlobCache
    from .support import Commands

LS_EXAMPLES = """\
examples:
  selfhost cache ls
  selfhost cache ls --bytes | sort -n -k 4    the largest model last

Columns: slug (- if it is empty), mdcsum, files, bytes, last used (to the hour, local time). The models' sizes
may add up to more than the cache has: files of equal content are kept once.
"""

STATS_EXAMPLES = """\
examples:
  selfhost cache stats
  selfhost cache stats --cache /srv/mdc --bytes
"""

GC_EXAMPLES = """\
examples:
  selfhost cache gc --max-age 30d --dry-run
  selfhost cache gc --max-bytes 20GiB --max-age 30d

Removes whole models: those not used for longer than --max-age, then those not used for longest until
--max-bytes is kept to; with them, and without any option, what no model refers to and what dead processes
left. What was made or used within two hours stays, and so does what a process holds.
"""

VERIFY_EXAMPLES = """\
examples:
  selfhost cache verify
  selfhost cache verify --cache /srv/mdc && echo clean

Reads and hashes every file. A wrong one is set aside, so that it is fetched again (or told to be still in
place, where the cache can only be read), and the exit code is 1.
"""

IMPORT_EXAMPLES = """\
examples:
  selfhost cache import card.json ./my-model    on a host without a network; then `fetch --offline` finds it

The directory is one that `selfhost fetch CARD --to DIR` made elsewhere, or any with the card's files, such as
the worker's own: a percent-encoded name stands for the plain one, too. Prints the model's directory in the
cache.
"""


def add_cache(commands: Commands) -> None:
    """Add `selfhost cache` with its own commands."""
    does = "look at what is kept, collect garbage, hash it all, import a directory"
    parser = commands.add_parser("cache", help=does, description=does[0].upper() + does[1:] + ".")
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_bytes(_add(below, "ls", ls, "list the models, most recently used first", LS_EXAMPLES))
    _add_bytes(_add(below, "stats", stats, "count what there is", STATS_EXAMPLES))
    collecting = _add(below, "gc", gc, "remove models that are old or too many", GC_EXAMPLES)
    _add_bytes(collecting)
    most = "keep at most so much: 20GiB, 500MB"
    collecting.add_argument("--max-bytes", metavar="SIZE", type=byte_count, help=most)
    oldest = "keep what was used within this time: 30d, 12h, 90m"
    collecting.add_argument("--max-age", metavar="AGE", type=seconds, help=oldest)
    collecting.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    _add(below, "verify", verify, "hash every file", VERIFY_EXAMPLES)
    importing = _add(below, "import", import_model, "take a card's files from a directory", IMPORT_EXAMPLES)
    add_card(importing)
    importing.add_argument("directory", metavar="DIR", help="where the files are")


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], does: str, epilog: str
) -> argparse.ArgumentParser:
    parser = add_command(commands, name, run, does, epilog)
    add_cache_root(parser)
    return parser


def _add_bytes(parser: argparse.ArgumentParser) -> None:
    help = "print exact sizes, as it does anyway where stdout is no terminal"
    parser.add_argument("--bytes", action="store_true", help=help)


def _open_cache(arguments: argparse.Namespace) -> BlobCache:
    """Return the cache; OSError if it was named and is not there: to look at it must not make it."""
    if arguments.cache is not None:
        os.stat(arguments.cache)
    return open_cache(arguments)


def _sizes(arguments: argparse.Namespace) -> Callable[[int], str]:
    """Return what writes a size: for people on a terminal, exactly elsewhere."""
    return human_bytes if is_terminal(sys.stdout) and not arguments.bytes else str


# ------------------------------------------------------------------ the commands


def ls(arguments: argparse.Namespace) -> None:
    """Print a line for each model."""
    size = _sizes(arguments)
    rows = [("SLUG", "MDCSUM", "FILES", "BYTES", "LAST USED")]
    for model in reversed(_open_cache(arguments).models()):
        last_use = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.last_use))
        rows.append((model.slug or "-", model.mdcsum, str(model.files), size(model.bytes), last_use))
    _print_table(rows)


def _print_table(rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    slugs, mdcsums, files, sizes, _ = ([max(map(len, column))] for column in zip(*rows))
    for slug, mdcsum, count, size, used in rows:
        left = f"{slug:<{slugs[0]}}  {mdcsum:<{mdcsums[0]}}"
        print(f"{left}  {count:>{files[0]}}  {size:>{sizes[0]}}  {used}")


def stats(arguments: argparse.Namespace) -> None:
    """Print what there is, a line for each number."""
    size = _sizes(arguments)
    cache = _open_cache(arguments)
    found = cache.stats()
    print(f"root             {printable(cache.root)}")
    print(f"models           {found.models}")
    print(f"blobs            {found.blobs}")
    print(f"bytes            {size(found.bytes)}")
    print(f"temporary files  {found.temporary_files}")
    print(f"wrong blobs      {found.set_aside}")


def gc(arguments: argparse.Namespace) -> None:
    """Collect garbage, and print what was removed."""
    size = _sizes(arguments)
    collected = _open_cache(arguments).collect(
        max_bytes=arguments.max_bytes, max_age_seconds=arguments.max_age, dry_run=arguments.dry_run
    )
    did = "would remove" if arguments.dry_run else "removed"
    for model in collected.models:
        print(f"{did}  {model.slug or '-'}  {model.mdcsum}")
    leftovers = f"wrong blobs {collected.set_aside}, temporary files {collected.temporary_files}"
    what = f"models {len(collected.models)}, blobs {collected.blobs}, {leftovers}"
    print(f"{did} in all: {what}; bytes {size(collected.bytes)}, kept {size(collected.kept_bytes)}")


def verify(arguments: argparse.Namespace) -> None:
    """Hash everything; raise SelfHostError if a file was wrong."""
    cache = _open_cache(arguments)
    wrong = cache.verify()
    for checksum in wrong:
        print(f"wrong  {checksum}")
    if wrong:
        left = sum(os.path.lexists(os.path.join(cache.root, "blobs", checksum.hex)) for checksum in wrong)
        counts = {"now set aside": len(wrong) - left, "still in place, as they cannot be moved": left}
        told = "; ".join(f"{what}: {count}" for what, count in counts.items() if count)
        raise SelfHostError(f"wrong blobs in {cache.root!r}, {told}")


def import_model(arguments: argparse.Namespace) -> None:
    """Copy a card's files into the cache, verified; print the model's directory there."""
    from ..frontend.cache import ModelKey

    with open_transports(arguments) as transports:
        card = read_card(arguments.card, transports)
    files = checksums_of(card)
    cache = open_cache(arguments)
    for name, checksum in files.items():
        if cache.find(checksum) is None:
            path = os.path.join(arguments.directory, find_name(arguments.directory, name))
            cache.import_blob(path, checksum)
    print_path(cache.publish_model(ModelKey(card.slug, card.mdcsum), files))
