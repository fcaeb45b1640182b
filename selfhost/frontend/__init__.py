"""Who fetches, verifies and keeps: a card with URLs becomes a card with verified local paths.

Never loads werkzeug. The names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import BlobCache
    from .peer_policy import AllowList, not_link_local, same_host
    from .resolver import MetadataResolver, Progress, ResolvedModel
    from .transport import FetchLimits, Sink, Transport
    from .transports import default_transports

__all__ = [
    "AllowList",
    "BlobCache",
    "FetchLimits",
    "MetadataResolver",
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
    "Progress": "resolver",
    "ResolvedModel": "resolver",
    "Sink": "transport",
    "Transport": "transport",
    "default_transports": "transports",
    "not_link_local": "peer_policy",
    "same_host": "peer_policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
