"""selfhost: a worker serves its own model metadata, and frontends fetch exactly those bytes.

Wire compatible with NVIDIA Dynamo 1.6.1. The names below are the public ones; each loads its module, and
Werkzeug for `MetadataApp`, when it is first used. Importing this package does nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .card.checked_file import CheckedFile as CheckedFile
    from .card.checksum import Checksum as Checksum
    from .card.model_card import ModelDeploymentCard as ModelDeploymentCard
    from .card.model_dir import load_card as load_card
    from .card.model_type import ModelInput as ModelInput
    from .card.model_type import ModelType as ModelType
    from .card.model_type import WorkerType as WorkerType
    from .card.slug import Slug as Slug
    from .errors import SelfHostError as SelfHostError
    from .settings import Settings as Settings
    from .worker.app import MetadataApp as MetadataApp
    from .worker.local_model import LocalModel as LocalModel
    from .worker.local_model import register_model as register_model
    from .worker.registry import MetadataArtifactRegistry as MetadataArtifactRegistry
    from .worker.runtime import DistributedRuntime as DistributedRuntime
    from .worker.server import SystemStatusServer as SystemStatusServer

_HOMES = {
    "CheckedFile": "card.checked_file",
    "Checksum": "card.checksum",
    "DistributedRuntime": "worker.runtime",
    "LocalModel": "worker.local_model",
    "MetadataApp": "worker.app",
    "MetadataArtifactRegistry": "worker.registry",
    "ModelDeploymentCard": "card.model_card",
    "ModelInput": "card.model_type",
    "ModelType": "card.model_type",
    "SelfHostError": "errors",
    "Settings": "settings",
    "Slug": "card.slug",
    "SystemStatusServer": "worker.server",
    "WorkerType": "card.model_type",
    "load_card": "card.model_dir",
    "register_model": "worker.local_model",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
