"""The frontend's commands: `selfhost fetch` and `selfhost verify`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from ..errors import Attempt, CardError, FetchError, ResolveError, SelfHostError
from .cache_options import add_cache_root, add_lower_caches, open_cache, temporary_if_none
from .cards import (
    add_card,
    add_file_roots,
    checksums_of,
    find_name,
    is_card_url,
    open_transports,
    plain_name,
    read_card,
    shown_source,
)
from .progress import show_progress
from .support import add_command, path, print_path, printable

if TYPE_CHECKING:
    from ..card.checksum import Checksum
    from ..card.model_card import ModelDeploymentCard
    from ..frontend.transport import Transport
    from .support import Commands

logger = logging.getLogger(__name__)

MAX_TEXT_CHARS = 400  # of what is told of one source; a card may have any number of faults

FETCH_EXAMPLES = """\
examples:
  selfhost fetch http://127.0.0.1:9090/v1/metadata/my_model/_base
  selfhost fetch card.json --replica http://gpu8:9090/v1/metadata/my_model/_base
  selfhost fetch card.json --to ./my-model    a plain directory, for a host without this cache
  selfhost fetch - --offline                  nothing but what is in the cache already

It prints the directory in which every file is byte for byte what the card promises, so that
`dir=$(selfhost fetch CARD)` works; everything else goes to stderr. Exit code 1 if a file is to be had from no
source: then each attempt is told. A card says what its files must hash to, not who wrote it. If CARD is a URL
that gives none, the first --replica that does takes its place. Names are those of the URLs, percent-encoded.
"""

VERIFY_EXAMPLES = """\
examples:
  selfhost verify card.json ./my-model
  selfhost verify http://127.0.0.1:9090/v1/metadata/my_model/_base ./my-model

Prints a line for each file: ok, differs, missing, or extra for one that the card does not name. Exit code 1
if one differs or is missing; extra files alone are none of the card's business (weights, most of the time).
A percent-encoded name of the card stands for the plain one, too. What a `fetch --to` that was killed has left
(.tmp.<pid>.<random>) is passed over; it can be removed.
"""


# ------------------------------------------------------------------ fetch


def add_fetch(commands: Commands) -> None:
    """Add `selfhost fetch`."""
    does = "fetch and verify the files of a card, and print their directory"
    parser = add_command(commands, "fetch", fetch, does, FETCH_EXAMPLES)
    add_card(parser)
    add = parser.add_argument
    more = "a card of another worker with the same model, another source of its files; may be repeated"
    add("--replica", metavar="CARD", type=path, action="append", default=[], help=more)
    add("--to", metavar="DIR", type=path, help="copy the files into DIR, and print that")
    add("--offline", action="store_true", help="use no network: what the cache lacks is an error")
    add_cache_root(parser)
    add_lower_caches(parser)
    how = "of files in the cache: always hash them, or trust a stamp of an earlier check (default: stamp)"
    add("--verify", choices=("always", "stamp"), default="stamp", help=how)
    add_file_roots(parser)


def fetch(arguments: argparse.Namespace) -> None:
    """Fetch, verify and keep; print where the files are."""
    with contextlib.ExitStack() as stack:
        if arguments.to is not None:  # what is copied out needs no cache that lasts
            stack.enter_context(temporary_if_none(arguments))
        print_path(_fetch(arguments))


def _fetch(arguments: argparse.Namespace) -> str:
    from ..frontend.resolver import MetadataResolver

    with open_transports(arguments) as transports:
        card, *replicas = _read_cards(arguments, transports)
        cache = open_cache(arguments, verify=arguments.verify, lower=arguments.lower)
        resolver = MetadataResolver(cache, transports=transports, offline=arguments.offline)
        with resolver, show_progress() as progress:
            resolved = resolver.resolve(card, replicas=replicas, progress=progress)
    to: Optional[str] = arguments.to
    if to is None:
        return resolved.local_dir
    with cache.hold(resolved.local_dir):
        cache.export_model(checksums_of(card), to)
    return os.path.abspath(to)


def _read_cards(
    arguments: argparse.Namespace, transports: Mapping[str, Transport]
) -> list[ModelDeploymentCard]:
    """Return the card and those of the replicas, without URLs that give none: the first is the one to go by.

    Raises ResolveError if all are such URLs, and whatever is wrong with a file at once: that is no matter of
    who is up.
    """
    sources = [arguments.card, *arguments.replica]
    cards: dict[str, ModelDeploymentCard] = {}
    attempts: list[Attempt] = []
    for source in sources:
        started_at = time.monotonic()
        try:
            cards[source] = read_card(source, transports, offline=arguments.offline)
        except (FetchError, CardError) as error:
            if len(sources) == 1 or not is_card_url(source):
                raise
            attempts.append(Attempt(source, error, time.monotonic() - started_at))
    if not cards:
        raise _no_card(attempts)
    for attempt in attempts:
        url = shown_source(attempt.url)
        if attempt.url == arguments.card:
            first = shown_source(next(iter(cards)))
            logger.warning("%s gives no card, that of %s takes its place: %s", url, first, _text(attempt))
        else:
            logger.warning("the replica %s is left out: %s", url, _text(attempt))
    return list(cards.values())


def _no_card(attempts: Sequence[Attempt]) -> ResolveError:
    lines = [
        f"  {shown_source(attempt.url)}: {_text(attempt)} ({attempt.seconds:.2f} s)" for attempt in attempts
    ]
    return ResolveError(
        "\n".join(["cannot get a card from any of these:", *lines]), file="", attempts=attempts
    )


def _text(attempt: Attempt) -> str:
    return " ".join(str(attempt.error)[:MAX_TEXT_CHARS].split())


# ------------------------------------------------------------------ verify


def add_verify(commands: Commands) -> None:
    """Add `selfhost verify`."""
    does = "hash the files of a directory and compare them with a card"
    parser = add_command(commands, "verify", verify, does, VERIFY_EXAMPLES)
    add_card(parser)
    parser.add_argument("directory", metavar="DIR", help="where the files are")


def verify(arguments: argparse.Namespace) -> None:
    """Print a line for each file; raise SelfHostError if one is not what the card says."""
    with open_transports(arguments) as transports:
        wanted = checksums_of(read_card(arguments.card, transports))
    extra = _extra(arguments.directory, wanted)
    faults = [not _verify_file(arguments.directory, name, checksum) for name, checksum in wanted.items()]
    for name in extra:
        print(f"extra    {printable(name)}")
    if any(faults):
        where = f"{len(faults)} files in {arguments.directory!r}"
        raise SelfHostError(f"{sum(faults)} of {where} are missing or not what the card says")


def _extra(directory: str, wanted: Iterable[str]) -> list[str]:
    from ..frontend.names import is_staged

    named = {found for name in wanted for found in (name, plain_name(name))}
    return sorted(name for name in os.listdir(directory) if name not in named and not is_staged(name))


def _verify_file(directory: str, name: str, expected: Checksum) -> bool:
    """Print what a file is, and tell whether that is what the card says."""
    from ..card.checksum import hash_file

    name = find_name(directory, name)
    try:
        found, size = hash_file(os.path.join(directory, name))
    except FileNotFoundError:
        print(f"missing  {printable(name)}")
        return False
    except OSError as error:
        print(f"differs  {printable(name)}: cannot be read: {error.strerror}")
        return False
    if found != expected:
        print(f"differs  {printable(name)}: expected {expected}, found {found} ({size} bytes)")
        return False
    print(f"ok       {printable(name)}")
    return True
