"""The frontend's commands: `selfhost fetch` and `selfhost verify`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .cli_cards import add_card, open_transports, read_card
from .cli_progress import show_progress
from .cli_support import add_command, path, print_path, printable
from .errors import FetchError, SelfHostError, SettingsError
from .settings import FrontendSettings

if TYPE_CHECKING:
    from .card.checksum import Checksum
    from .card.model_card import ModelDeploymentCard
    from .cli_support import Commands
    from .frontend.cache import BlobCache
    from .frontend.transport import Transport

logger = logging.getLogger(__name__)

FETCH_EXAMPLES = """\
examples:
  selfhost fetch http://127.0.0.1:9090/v1/metadata/my_model/_base
  selfhost fetch card.json --replica http://gpu8:9090/v1/metadata/my_model/_base
  selfhost fetch card.json --to ./my-model    a plain directory, for a host without this cache
  selfhost fetch - --offline                  nothing but what is in the cache already

It prints the directory in which every file is byte for byte what the card promises, so that
`dir=$(selfhost fetch CARD)` works; everything else goes to stderr. Exit code 1 if a file is to be had from no
source: then each attempt is told. A card says what its files must hash to, not who wrote it.
"""

VERIFY_EXAMPLES = """\
examples:
  selfhost verify card.json ./my-model
  selfhost verify http://127.0.0.1:9090/v1/metadata/my_model/_base ./my-model

Prints a line for each file: ok, differs, missing, or extra for one that the card does not name. Exit code 1
if one differs or is missing; extra files alone are none of the card's business (weights, most of the time).
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
    how = "of files in the cache: always hash them, or trust a stamp of an earlier check (default: stamp)"
    add("--verify", choices=("always", "stamp"), default="stamp", help=how)
    below = "allow paths and file: URLs below DIR as sources; may be repeated (default: none)"
    add("--file-root", metavar="DIR", type=path, action="append", default=[], help=below)


def add_cache_root(parser: argparse.ArgumentParser) -> None:
    """Add --cache."""
    where = "the cache's folder (DYN_MDC_CACHE, else ~/.cache/dynamo/mdc, which Dynamo uses, too)"
    parser.add_argument("--cache", metavar="DIR", type=path, help=where)


def open_cache(arguments: argparse.Namespace, **options: Any) -> BlobCache:
    """Return the cache of --cache or of the environment; SettingsError where there is none that lasts."""
    from .frontend.cache import BlobCache

    root = arguments.cache or FrontendSettings.from_env().cache_root
    if root is None:
        accepted = "--cache DIR, DYN_MDC_CACHE or HOME"
        message = f"there is no place to keep files in: set {accepted}"
        raise SettingsError(message, variable="DYN_MDC_CACHE", value=None, accepted=accepted)
    return BlobCache(root, **options)  # given by name: no temporary one takes its place


def fetch(arguments: argparse.Namespace) -> None:
    """Fetch, verify and keep; print where the files are."""
    from .frontend.resolver import MetadataResolver

    with open_transports(arguments) as transports:
        card = read_card(arguments.card, transports, offline=arguments.offline)
        replicas = list(_read_replicas(arguments, transports))
        cache = open_cache(arguments, verify=arguments.verify)
        resolver = MetadataResolver(cache, transports=transports, offline=arguments.offline)
        with resolver, show_progress() as progress:
            resolved = resolver.resolve(card, replicas=replicas, progress=progress)
    if arguments.to is None:
        print_path(resolved.local_dir)
        return
    with cache.hold(resolved.local_dir):
        cache.export_model(checksums_of(card), arguments.to)
    print_path(os.path.abspath(arguments.to))


def _read_replicas(
    arguments: argparse.Namespace, transports: Mapping[str, Transport]
) -> Iterator[ModelDeploymentCard]:
    for source in arguments.replica:
        try:
            yield read_card(source, transports, offline=arguments.offline)
        except FetchError as error:  # a dead replica is what other replicas are for
            logger.warning("the replica %r is left out: %s", source, error)


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
    extra = sorted(set(os.listdir(arguments.directory)) - set(wanted))
    faults = [not _verify_file(arguments.directory, name, checksum) for name, checksum in wanted.items()]
    for name in extra:
        print(f"extra    {printable(name)}")
    if any(faults):
        where = f"{len(faults)} files in {arguments.directory!r}"
        raise SelfHostError(f"{sum(faults)} of {where} are missing or not what the card says")


def checksums_of(card: ModelDeploymentCard) -> Mapping[str, Checksum]:
    """Map the name of each file of the card to its checksum; CardError for names that no file can have."""
    from .frontend.limits import ResolverLimits
    from .frontend.wanted import wanted_by

    return wanted_by(card, ResolverLimits()).files


def _verify_file(directory: str, name: str, expected: Checksum) -> bool:
    """Print what a file is, and tell whether that is what the card says."""
    from .card.checksum import hash_file

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
