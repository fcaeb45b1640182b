"""What a card asks for: the files to bring, under which names, and how many bytes they may be.

A card comes from outside, and these are the rules that it has to keep before anything is asked for or
written: each file has a name that is one component of a path and stands for one digest only; files and bytes
are bounded. Files of equal content are one blob, to be brought once. Pure functions on values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Optional

from ..card.checked_file import CheckedFile
from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from ..errors import CardError, shown
from .limits import ResolverLimits
from .names import as_file_name
from .transport import FetchLimits


@dataclass(frozen=True)
class WantedBlob:
    """Content that a card asks for, and the names of the files that have it."""

    checksum: Checksum
    names: tuple[str, ...]
    size: Optional[int]  # bytes, None: the card does not tell; the hash decides, a true file may be shorter
    max_bytes: int

    def __str__(self) -> str:
        return f"{self.names[0]!r} ({self.checksum})"


@dataclass(frozen=True)
class Wanted:
    """All that a card asks for: each file by its name, each blob once, the largest first."""

    names: tuple[str, ...]  # of all files, in the card's order
    files: Mapping[str, Checksum]
    blobs: tuple[WantedBlob, ...]


def wanted_by(card: ModelDeploymentCard, limits: ResolverLimits) -> Wanted:
    """Return what the card asks for.

    Raises one CardError that lists every file whose name cannot be used or stands for two contents; or says
    that these are too many files or bytes.
    """
    files = [file for file, _ in card.iter_metadata_files()]
    if len(files) > limits.max_files:
        raise _too_much("files", len(files), limits.max_files)
    names = _names(files)
    blobs = _blobs(zip(names, files), limits.fetch)
    total = sum(blob.max_bytes for blob in blobs)
    if total > limits.max_total_bytes:
        raise _too_much("bytes", total, limits.max_total_bytes)
    return Wanted(names, {name: file.checksum for name, file in zip(names, files)}, blobs)


def _names(files: list[CheckedFile]) -> tuple[str, ...]:
    """Return the name of each file; raise one CardError for all that cannot be kept."""
    taken: dict[str, Checksum] = {}
    names: list[str] = []
    problems: list[CardError] = []
    for file in files:
        try:
            names.append(_name(file, taken))
        except CardError as error:
            problems.append(error)
    if problems:
        first, issues = problems[0], [str(problem) for problem in problems]
        raise CardError("; ".join(issues), field=first.field, value=first.value, issues=issues)
    return tuple(names)


def _name(file: CheckedFile, taken: dict[str, Checksum]) -> str:
    name = as_file_name(file.basename)
    if taken.setdefault(name, file.checksum) != file.checksum:
        raise CardError(
            f"path: two files of different content are called {name!r}, the second is {shown(file.path)}",
            field="path",
            value=file.path,
        )
    return name


def _blobs(files: Iterable[tuple[str, CheckedFile]], limits: FetchLimits) -> tuple[WantedBlob, ...]:
    by_digest: dict[Checksum, list[tuple[str, CheckedFile]]] = {}
    for name, file in files:
        by_digest.setdefault(file.checksum, []).append((name, file))
    blobs = [_blob(checksum, same, limits) for checksum, same in by_digest.items()]
    return tuple(sorted(blobs, key=lambda blob: -blob.max_bytes))


def _blob(checksum: Checksum, same: list[tuple[str, CheckedFile]], limits: FetchLimits) -> WantedBlob:
    size = max((file.size for _, file in same if file.size is not None), default=None)
    names = tuple(dict.fromkeys(name for name, _ in same))
    return WantedBlob(checksum, names, size, limits.cap(size))


def _too_much(what: str, found: int, limit: int) -> CardError:
    return CardError(f"the card asks for {found} {what}, at most {limit} are accepted", value=found)
