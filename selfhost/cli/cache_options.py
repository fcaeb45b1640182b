"""Which cache a command works on: `--cache`, the environment, and `--lower` for caches that are only read."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..settings import FrontendSettings
from .support import path

if TYPE_CHECKING:
    from ..frontend.cache import BlobCache


def add_cache_root(parser: argparse.ArgumentParser) -> None:
    """Add --cache."""
    where = "the cache's folder (DYN_MDC_CACHE, else ~/.cache/dynamo/mdc, which Dynamo uses, too)"
    parser.add_argument("--cache", metavar="DIR", type=path, help=where)


def add_lower_caches(parser: argparse.ArgumentParser) -> None:
    """Add --lower."""
    below = "a cache to look into, too, and never to write to; may be repeated"
    parser.add_argument("--lower", metavar="DIR", type=path, action="append", default=[], help=below)


def open_cache(arguments: argparse.Namespace, **options: Any) -> BlobCache:
    """Return the cache of --cache or of the environment; SettingsError where there is none that lasts."""
    from ..frontend.cache import BlobCache

    root = arguments.cache or FrontendSettings.from_env().cache_root
    if root is None:
        accepted = "--cache DIR, DYN_MDC_CACHE or HOME"
        message = f"there is no place to keep files in: set {accepted}"
        raise SettingsError(message, variable="DYN_MDC_CACHE", value=None, accepted=accepted)
    return BlobCache(root, **options)  # given by name: no temporary one takes its place


@contextlib.contextmanager
def temporary_if_none(arguments: argparse.Namespace) -> Iterator[None]:
    """Let `arguments` name a cache for the time of a `with`, if neither they nor the environment do."""
    if arguments.cache or FrontendSettings.from_env().cache_root is not None:
        yield
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="selfhost-cache-") as arguments.cache:
        yield
