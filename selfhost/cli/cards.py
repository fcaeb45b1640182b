"""Cards given on the command line - a file, `-` for stdin, an http(s) URL - and what may be asked for them.

The options that say whom a command may talk to, and how, are the same wherever a card is given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from ..errors import SettingsError, shown_url, without_userinfo
from ..settings import FrontendSettings
from .support import bytes_of, path, refuse_token

if TYPE_CHECKING:
    from ..card.checksum import Checksum
    from ..card.model_card import ModelDeploymentCard
    from ..frontend.http_tls import ClientTls
    from ..frontend.tokens import Tokens
    from ..frontend.transport import Transport

CARD_HELP = "the card (or a discovery record): a file, - for stdin, or the URL that `selfhost serve` prints"


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add the argument CARD, and how to get at one by URL."""
    parser.add_argument("card", metavar="CARD", type=path, help=CARD_HELP)
    add = parser.add_argument_group("http and https").add_argument
    whom = "host, address or network to talk to, and to no other; may be repeated"
    add("--allow", metavar="PEER", type=_peer, action="append", default=[], help=whom)
    hub = "with --allow: ask the Hugging Face hub, too, and whomever it leads to, for hf: files"
    add("--allow-hub", action="store_true", help=hub)
    whose = "certificate authorities to trust in place of the system's (DYN_MDC_TLS_CA)"
    add("--ca", metavar="FILE", type=path, help=whose)
    add("--cert", metavar="FILE", type=path, help="client certificate to show (DYN_MDC_TLS_CERT)")
    key = "its private key, where the file of --cert does not have it (DYN_MDC_TLS_KEY)"
    add("--key", metavar="FILE", type=path, help=key)
    token = "file with the bearer token for the origin of CARD, and for no other (DYN_MDC_TOKENS_FILE)"  # noqa: S105
    add("--token-file", metavar="FILE", type=path, help=token)
    refuse_token(parser)


def add_file_roots(parser: argparse.ArgumentParser) -> None:
    """Add --file-root."""
    below = "allow paths and file: URLs below DIR as sources; may be repeated (default: none)"
    parser.add_argument("--file-root", metavar="DIR", type=path, action="append", default=[], help=below)


def _peer(value: str) -> str:
    from ..frontend.peer_policy import AllowList

    try:
        AllowList(value)
    except ValueError as error:  # SettingsError, too
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def transport_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `default_transports` that the arguments mean; raise SettingsError."""
    from ..frontend.peer_policy import AllowList, not_link_local

    return {
        "file_roots": getattr(arguments, "file_root", ()),
        "peer_policy": AllowList(*arguments.allow) if arguments.allow else not_link_local,
        "tls": _tls(arguments),
        "tokens": _tokens(arguments),
        "ask_hub": arguments.allow_hub or None,
        "offline": getattr(arguments, "offline", False),
    }


def _tls(arguments: argparse.Namespace) -> Optional[ClientTls]:
    """Return what the options say, None to leave all to the environment; certificate and key go together."""
    if not (arguments.ca or arguments.cert or arguments.key):
        return None
    from ..frontend.http_tls import ClientTls

    settings = FrontendSettings.from_env()
    is_given = arguments.cert or arguments.key
    pair = (arguments.cert, arguments.key) if is_given else (settings.tls_cert, settings.tls_key)
    tls = ClientTls(arguments.ca or settings.tls_ca, *pair)
    tls.context()  # what is named on the command line is to be there
    return tls


def _tokens(arguments: argparse.Namespace) -> Optional[Tokens]:
    """Return the tokens of the environment and the one of --token-file, None where that is not given."""
    if not arguments.token_file:
        return None
    if not is_card_url(arguments.card):
        raise SettingsError(
            f"--token-file is for the origin of a URL, and {arguments.card!r} is none: "
            "name the origin in a file, see DYN_MDC_TOKENS_FILE",
            variable="--token-file", value=arguments.token_file, accepted="a CARD that is a URL",
        )  # fmt: skip
    from ..frontend.tokens import Tokens, origin_text, read_token

    origin = origin_text(arguments.card)
    return Tokens({origin: read_token(arguments.token_file)}, file=FrontendSettings.from_env().tokens_file)


@contextlib.contextmanager
def open_transports(arguments: argparse.Namespace) -> Iterator[dict[str, Transport]]:
    """Give the table of transports that the options describe, and close them in the end.

    Raises SettingsError, OSError.
    """
    from ..frontend.transports import default_transports

    transports = default_transports(**transport_options(arguments))
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

    Raises CardError for what is no card or too large to be one, OSError, FetchError, SettingsError.
    """
    from ..frontend.card_source import fetch_card, parse_card

    if not is_card_url(source):
        return parse_card(read_text(source), repr(source))
    if offline:
        raise SettingsError(
            f"the card {shown_source(source)} cannot be fetched offline: give a file that holds it",
            variable="CARD", value=source, accepted="a file, or - for stdin",
        )  # fmt: skip
    return fetch_card(source, transports)


def read_text(source: str) -> bytes:
    """Return the text of a file or of stdin, or a little more of it than a card may have.

    Raises OSError, SettingsError for what was most likely meant as a URL.
    """
    from ..frontend.card_source import MAX_CARD_BYTES

    if source == "-":
        return bytes_of(sys.stdin, "stdin").read(MAX_CARD_BYTES + 1)
    try:
        with open(source, "rb") as file:
            return file.read(MAX_CARD_BYTES + 1)
    except FileNotFoundError:
        if ":" not in source and "/v1/metadata" not in source:
            raise
        accepted = "a file, or a URL that begins with http:// or https://"
        raise SettingsError(
            f"{shown_url(source)} is no file: expected {accepted}",
            variable="CARD", value=without_userinfo(source), accepted=accepted,
        ) from None  # fmt: skip


def is_card_url(source: str) -> bool:
    """Tell whether a card is to be fetched, not read."""
    return source.lower().startswith(("http://", "https://"))


def shown_source(source: str) -> str:
    """Return where a card comes from as messages show it: without what may be a secret in a URL."""
    return shown_url(source) if is_card_url(source) else repr(source)


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
