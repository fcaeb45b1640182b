"""What a model is: checksums, checked files, slugs, the deployment card and how a directory becomes one.

Values only: nothing here opens a socket or starts a thread of its own. The names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checked_file import CheckedFile
    from .checksum import Checksum
    from .model_card import ModelDeploymentCard
    from .model_dir import load_card
    from .slug import Slug

__all__ = ["CheckedFile", "Checksum", "ModelDeploymentCard", "Slug", "load_card"]

_HOMES = {
    "CheckedFile": "checked_file",
    "Checksum": "checksum",
    "ModelDeploymentCard": "model_card",
    "Slug": "slug",
    "load_card": "model_dir",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
