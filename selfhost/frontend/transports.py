"""The transports that a resolver has unless it is given others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional, Union

from ..settings import FrontendSettings
from .peer_policy import PeerPolicy, not_link_local
from .transport import NOBODY, PATH_SCHEME, FetchLimits, FetchObserver, Transport

if TYPE_CHECKING:
    import ssl

    from .transport_http import ClientTls, Tokens

_Path = Union[str, "os.PathLike[str]"]

_LIMITS = FetchLimits()


def default_transports(
    *,
    file_roots: Sequence[_Path] = (),
    limits: FetchLimits = _LIMITS,
    peer_policy: PeerPolicy = not_link_local,
    tls: Union[ssl.SSLContext, ClientTls, None] = None,
    tokens: Union[Mapping[str, str], Tokens, None] = None,
    observer: FetchObserver = NOBODY,
    hf_hub_cache: Optional[str] = None,
    ask_hub: Optional[bool] = None,
    offline: bool = False,
) -> dict[str, Transport]:
    """Return a new table of transports by scheme, to which others may be added.

    Plain paths and `file:` URLs are in it only where `file_roots` name the folders that cards may refer to.
    `tls` (a context, or files to make it of) and `tokens` (bearer tokens by origin) are by default what the
    environment says, see FrontendSettings; SettingsError for half a configuration.

    huggingface_hub knows nothing of a peer policy. So with one other than the default `hf:` is its local
    cache alone, unless `ask_hub` is True; with False it always is, and so it is with `offline`. The resolver,
    when it is offline, does not ask http at all.
    """
    from .transport_hf import HfTransport
    from .transport_http import ClientTls, HttpTransport, Tokens

    settings = FrontendSettings.from_env()
    if ask_hub is None:
        ask_hub = peer_policy is not_link_local
    http = HttpTransport(
        limits=limits,
        peer_policy=peer_policy,
        tls=ClientTls(settings.tls_ca, settings.tls_cert, settings.tls_key) if tls is None else tls,
        tokens=Tokens(file=settings.tokens_file) if tokens is None else tokens,
        observer=observer,
    )
    table: dict[str, Transport] = {
        "http": http,
        "https": http,
        "hf": HfTransport(hf_hub_cache, network=ask_hub and not offline, limits=limits),
    }
    if file_roots:
        from .transport_file import FileTransport

        table[PATH_SCHEME] = table["file"] = FileTransport(file_roots, limits=limits)
    return table
