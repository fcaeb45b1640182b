"""selfhost: a worker serves its own model metadata, and frontends fetch exactly those bytes.

Wire compatible with NVIDIA Dynamo 1.6.1. The names below are the public ones; each loads its module, and
Werkzeug for `MetadataApp`, when it is first used. Importing this package does nothing else.
"""

from __future__ import annotations

from ._lazy import lazy_names

__version__ = "0.1.0"

TYPE_CHECKING = False  # what type checkers take for True; `typing` costs more to load than all of this
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
    from .frontend.cache import BlobCache as BlobCache
    from .frontend.card_source import fetch_card as fetch_card
    from .frontend.resolver import MetadataResolver as MetadataResolver
    from .frontend.resolver import ResolvedModel as ResolvedModel
    from .frontend.transport import FetchLimits as FetchLimits
    from .frontend.transports import default_transports as default_transports
    from .frontend.watcher import ModelWatcher as ModelWatcher
    from .settings import Settings as Settings
    from .worker.app import MetadataApp as MetadataApp
    from .worker.entry_point import register_model as register_model
    from .worker.local_model import LocalModel as LocalModel
    from .worker.registry import MetadataArtifactRegistry as MetadataArtifactRegistry
    from .worker.runtime import DistributedRuntime as DistributedRuntime
    from .worker.server import SystemStatusServer as SystemStatusServer

_HOMES = {
    "BlobCache": "frontend.cache",
    "CheckedFile": "card.checked_file",
    "Checksum": "card.checksum",
    "DistributedRuntime": "worker.runtime",
    "FetchLimits": "frontend.transport",
    "LocalModel": "worker.local_model",
    "MetadataApp": "worker.app",
    "MetadataArtifactRegistry": "worker.registry",
    "MetadataResolver": "frontend.resolver",
    "ModelDeploymentCard": "card.model_card",
    "ModelInput": "card.model_type",
    "ModelType": "card.model_type",
    "ModelWatcher": "frontend.watcher",
    "ResolvedModel": "frontend.resolver",
    "SelfHostError": "errors",
    "Settings": "settings",
    "Slug": "card.slug",
    "SystemStatusServer": "worker.server",
    "WorkerType": "card.model_type",
    "default_transports": "frontend.transports",
    "fetch_card": "frontend.card_source",
    "load_card": "card.model_dir",
    "register_model": "worker.entry_point",
}

__all__ = ["__version__", *sorted(_HOMES)]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
