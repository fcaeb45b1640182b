"""What a model is: checksums, checked files, slugs, the deployment card and how a directory becomes one.

Values only: nothing here opens a socket or starts a thread of its own. The names below load on first use.
"""

from __future__ import annotations

from .._lazy import lazy_names

TYPE_CHECKING = False  # what type checkers take for True; `typing` costs more to load than all of this
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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
