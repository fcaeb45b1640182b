"""Which local files of a card are served, and under which names: the last segment of each URL.

Frontends link every file of a model into one directory under that segment, so the names must differ and fit
a file system. Pure functions on cards, but for a warning where a file is left out.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Optional
from urllib.parse import quote

from ..card.checked_file import CheckedFile
from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from .registry import MAX_NAME_BYTES, why_unservable

logger = logging.getLogger(__name__)


def without_unservable(card: ModelDeploymentCard) -> ModelDeploymentCard:
    """Leave out extra files whose names frontends cannot take out of a URL."""
    kept = []
    for file in card.extra_files:
        reason = _why_unusable(os.path.basename(file.path)) if file.is_local else None
        if reason is None:
            kept.append(file)
        else:
            logger.warning("%r is not served, its name cannot be in a URL: %s", file.path, reason)
    return card if len(kept) == len(card.extra_files) else replace(card, extra_files=tuple(kept))


def _why_unusable(name: str) -> Optional[str]:
    """Return why frontends cannot store a file under this name as it stands in a URL, or None if they can.

    Dynamo's keeps the percent-encoded name, whose limit a name in Chinese reaches three times as early.
    """
    reason = why_unservable(name)
    if reason is None and len(quote(name, safe="")) > MAX_NAME_BYTES:
        reason = f"percent-encoded it has more than {MAX_NAME_BYTES} characters"
    return reason


def local_files(card: ModelDeploymentCard) -> list[CheckedFile]:
    """Return the files of the card that lie on this machine's disk, in Dynamo's order."""
    return [file for file, _ in card.iter_metadata_files() if file.is_local]


def without_local_extras(card: ModelDeploymentCard) -> ModelDeploymentCard:
    """Leave out extra files that no frontend could fetch."""
    kept = tuple(file for file in card.extra_files if not file.is_local)
    return card if len(kept) == len(card.extra_files) else replace(card, extra_files=kept)


def choose_names(card: ModelDeploymentCard) -> dict[str, str]:
    """Give each local path the name that it is served under: its own, unless other content has that.

    Frontends link each file into one directory by its name in the URL, so a custom template called
    config.json must not go by that name. A slot's file may have any name; an extra file's never collides.
    """
    names: dict[str, str] = {}
    taken: dict[str, Checksum] = {}
    for file in local_files(card):
        name = os.path.basename(file.path)
        if _why_unusable(name) or taken.get(name, file.checksum) != file.checksum:
            extension = os.path.splitext(name)[1]
            name = file.checksum.hex[:16] + ("" if _why_unusable(extension or ".") else extension)
        taken[name] = file.checksum
        names[file.path] = name
    return names
