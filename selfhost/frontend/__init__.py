"""Who fetches, verifies and keeps: a card with URLs becomes a card with verified local paths.

Never loads werkzeug. The names below load on first use.
"""

from __future__ import annotations

from .._lazy import lazy_names

TYPE_CHECKING = False  # what type checkers take for True; `typing` costs more to load than all of this
if TYPE_CHECKING:
    from .cache import BlobCache
    from .card_source import fetch_card
    from .counters import ResolverCounters
    from .diagnosis import Diagnosis, diagnose
    from .http_tls import ClientTls
    from .peer_policy import AllowList, not_link_local, same_host
    from .resolver import MetadataResolver, Progress, ResolvedModel
    from .tokens import Tokens
    from .transport import FetchLimits, Sink, Transport
    from .transports import default_transports
    from .watcher import ModelState, ModelStatus, ModelWatcher

__all__ = [
    "AllowList",
    "BlobCache",
    "ClientTls",
    "Diagnosis",
    "FetchLimits",
    "MetadataResolver",
    "ModelState",
    "ModelStatus",
    "ModelWatcher",
    "Progress",
    "ResolvedModel",
    "ResolverCounters",
    "Sink",
    "Tokens",
    "Transport",
    "default_transports",
    "diagnose",
    "fetch_card",
    "not_link_local",
    "same_host",
]

_HOMES = {
    "AllowList": "peer_policy",
    "BlobCache": "cache",
    "ClientTls": "http_tls",
    "Diagnosis": "diagnosis",
    "FetchLimits": "transport",
    "MetadataResolver": "resolver",
    "ModelState": "watcher",
    "ModelStatus": "watcher",
    "ModelWatcher": "watcher",
    "Progress": "resolver",
    "ResolvedModel": "resolver",
    "ResolverCounters": "counters",
    "Sink": "transport",
    "Tokens": "tokens",
    "Transport": "transport",
    "default_transports": "transports",
    "diagnose": "diagnosis",
    "fetch_card": "card_source",
    "not_link_local": "peer_policy",
    "same_host": "peer_policy",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
