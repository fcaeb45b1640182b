"""How a process publishes: by itself, or as one of those that share a registry and thus are one worker.

The processes of a worker have one instance id, and one of them keeps its records (discovery/shared.py).
"""

from __future__ import annotations

import os

from ..discovery.base import Discovery, new_instance_id
from ..settings import Settings


def choose_instance_id(settings: Settings) -> int:
    """Return an id of our own, or that of all processes that share our registry: one worker has one."""
    if settings.shared_dir is None:
        return new_instance_id()
    from ..discovery.shared import shared_instance_id

    return shared_instance_id(_publishers(settings.shared_dir))


def open_discovery(settings: Settings) -> Discovery:
    """Open the backend that the settings name, for one of many processes if they share a registry."""
    from ..discovery import (
        open_discovery as open_backend,
    )  # loads the backends: only where none was passed in

    discovery = open_backend(settings.discovery_backend, settings.file_kv)
    if settings.shared_dir is None or settings.discovery_backend == "mem":  # each process has its own memory
        return discovery
    from ..discovery.shared import SharedDiscovery

    return SharedDiscovery(discovery, _publishers(settings.shared_dir))


def _publishers(shared_dir: str) -> str:
    """Return the folder by which the processes of a worker agree who of them publishes."""
    from .shared_folder import PUBLISH  # it needs fcntl, which not every system has

    return os.path.join(shared_dir, PUBLISH)
