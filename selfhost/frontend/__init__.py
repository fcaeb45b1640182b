"""Who fetches, verifies and keeps: a card with URLs becomes a card with verified local paths.

Never loads werkzeug. The names below load on first use.
"""

from __future__ import annotations

from .._lazy import lazy_names

TYPE_CHECKING = False  # what type checkers take for True; `typing` costs more to load than all of this
if TYPE_CHECKING:
    from .cache import BlobCache
    from .peer_policy import AllowList, not_link_local, same_host
    from .resolver import MetadataResolver, Progress, ResolvedModel
    from .transport import FetchLimits, Sink, Transport
    from .transports import default_transports
    from .watcher import ModelState, ModelStatus, ModelWatcher

__all__ = [
    "AllowList",
    "BlobCache",
    "FetchLimits",
    "MetadataResolver",
    "ModelState",
    "ModelStatus",
    "ModelWatcher",
    "Progress",
    "ResolvedModel",
    "Sink",
    "Transport",
    "default_transports",
    "not_link_local",
    "same_host",
]

_HOMES = {
    "AllowList": "peer_policy",
    "BlobCache": "cache",
    "FetchLimits": "transport",
    "MetadataResolver": "resolver",
    "ModelState": "watcher",
    "ModelStatus": "watcher",
    "ModelWatcher": "watcher",
    "Progress": "resolver",
    "ResolvedModel": "resolver",
    "Sink": "transport",
    "Transport": "transport",
    "default_transports": "transports",
    "not_link_local": "peer_policy",
    "same_host": "peer_policy",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
