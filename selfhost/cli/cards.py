"""Cards given on the command line - a file, `-` for stdin, an http(s) URL - and what may be asked for them.

The options that say whom a command may talk to, and how, are the same wherever a card is given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Optional

from ..errors import CardError, SettingsError, shown_url
from .support import bytes_of, path

if TYPE_CHECKING:
    from ..card.checksum import Checksum
    from ..card.model_card import ModelDeploymentCard
    from ..frontend.transport import Bytes, Transport

MAX_CARD_BYTES = 16 << 20  # a card has some kilobytes; one with a thousand files, a few hundred

CARD_HELP = "the card (or a discovery record): a file, - for stdin, or the URL that `selfhost serve` prints"


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add the argument CARD, and how to get at one by URL."""
    parser.add_argument("card", metavar="CARD", type=path, help=CARD_HELP)
    add = parser.add_argument_group("http and https").add_argument
    whom = "host, address or network to talk to, and to no other; may be repeated"
    add("--allow", metavar="PEER", type=_peer, action="append", default=[], help=whom)
    add("--ca", metavar="FILE", type=path, help="trust these certificate authorities, not the system's")
    add("--cert", metavar="FILE", type=path, help="client certificate; goes with --key")
    add("--key", metavar="FILE", type=path, help="the client certificate's private key")


def _peer(value: str) -> str:
    from ..frontend.peer_policy import AllowList

    try:
        AllowList(value)
    except ValueError as error:  # SettingsError, too
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


@contextlib.contextmanager
def open_transports(arguments: argparse.Namespace) -> Iterator[dict[str, Transport]]:
    """Give the table of transports that the options describe, and close them in the end.

    Raises SettingsError, OSError.
    """
    from ..frontend.peer_policy import AllowList, not_link_local
    from ..frontend.transport_http import tls_context
    from ..frontend.transports import default_transports

    files = {"ca_file": arguments.ca, "cert_file": arguments.cert, "key_file": arguments.key}
    transports = default_transports(
        file_roots=getattr(arguments, "file_root", ()),
        peer_policy=AllowList(*arguments.allow) if arguments.allow else not_link_local,
        tls=tls_context(**files) if any(files.values()) else None,
        offline=getattr(arguments, "offline", False),
    )
    try:
        yield transports
    finally:
        for transport in transports.values():
            transport.close()


# ------------------------------------------------------------------ reading


def read_card(
    source: str, transports: Mapping[str, Transport], *, offline: bool = False
) -> ModelDeploymentCard:
    """Read the card that `source` names.

    Raises CardError for what is no card or larger than `MAX_CARD_BYTES`, OSError, FetchError.
    """
    from ..card.model_card import ModelDeploymentCard

    text = _read(source, transports, offline=offline)
    if len(text) > MAX_CARD_BYTES:
        raise CardError(
            f"{shown_source(source)} is no card: it has more than {MAX_CARD_BYTES} bytes", value=source
        )
    try:
        if _is_record(text):
            return ModelDeploymentCard.from_record(text)
        return ModelDeploymentCard.from_json(text)
    except CardError as error:
        raise CardError(
            f"{shown_source(source)} is no card that can be used: {error}",
            field=error.field, value=error.value, issues=error.issues,
        ) from error  # fmt: skip


def is_card_url(source: str) -> bool:
    """Tell whether a card is to be fetched, not read."""
    return source.lower().startswith(("http://", "https://"))


def shown_source(source: str) -> str:
    """Return where a card comes from as messages show it: without what may be a secret in a URL."""
    return shown_url(source) if is_card_url(source) else repr(source)


def _is_record(text: bytes) -> bool:
    """Tell whether this is a discovery record with a card in it, as the file store keeps them."""
    from ..card import json_text

    value = json_text.loads(text)
    return isinstance(value, dict) and "card_json" in value and "display_name" not in value


def _read(source: str, transports: Mapping[str, Transport], *, offline: bool) -> bytes:
    """Return the text, or a little more of it than a card may have."""
    from ..card import url as urls

    if source == "-":
        return bytes_of(sys.stdin, "stdin").read(MAX_CARD_BYTES + 1)
    if not is_card_url(source):
        with open(source, "rb") as file:
            return file.read(MAX_CARD_BYTES + 1)
    if offline:
        raise SettingsError(
            f"the card {shown_source(source)} cannot be fetched offline: give a file that holds it",
            variable="CARD", value=source, accepted="a file, or - for stdin",
        )  # fmt: skip
    memory = _Memory()
    url = urls.normalize(source) or source
    transports[url.partition(":")[0].lower()].fetch(url, memory, max_bytes=MAX_CARD_BYTES)
    return memory.data


class _Memory:
    """A sink that keeps what comes; see `Sink`."""

    def __init__(self) -> None:
        self.validator: Optional[str] = None
        self._pieces = bytearray()

    @property
    def data(self) -> bytes:
        """All bytes that came."""
        return bytes(self._pieces)

    @property
    def received(self) -> int:
        """How many bytes came."""
        return len(self._pieces)

    def write(self, data: Bytes) -> None:
        """Append bytes."""
        self._pieces += data

    def restart(self) -> None:
        """Forget all bytes."""
        self.validator = None
        self._pieces.clear()


# ------------------------------------------------------------------ the files of a card


def checksums_of(card: ModelDeploymentCard) -> Mapping[str, Checksum]:
    """Map the name of each file of the card to its checksum; CardError for names that no file can have."""
    from ..frontend.limits import ResolverLimits
    from ..frontend.wanted import wanted_by

    return wanted_by(card, ResolverLimits()).files


def plain_name(name: str) -> str:
    """Return what the model's own directory calls a file: in a card with URLs names are percent-encoded.

    It is a component of a path, too: names are judged in both forms.
    """
    from urllib.parse import unquote_to_bytes

    return os.fsdecode(unquote_to_bytes(name))


def find_name(directory: str, name: str) -> str:
    """Return by which name a directory has a file of the card: as the card has it, else the plain one."""
    names = (name, plain_name(name))
    return next((found for found in names if os.path.lexists(os.path.join(directory, found))), name)
