"""One file of a model: where it is, what it hashes to, how long it is.

On the wire `path` holds both a path on the publisher's disk and a URL: what the WHATWG parser accepts is a
URL (so `C:\\m` is one), anything else is a disk path. URLs are kept as the parser writes them, disk paths
verbatim. Values are frozen and may be shared by threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from ..errors import CardError, ChecksumError, shown
from . import url as urls
from .checksum import Checksum, PathLike, hash_file

_KEYS = ("path", "checksum", "size")
_MAX_SIZE = (1 << 64) - 1


@dataclass(frozen=True)
class CheckedFile:
    """A file and the checksum that its bytes must have.

    `size` is in bytes, None on a card that does not tell it. `unknown` holds keys of the JSON object that
    this version does not know; they are written back.
    """

    path: str
    checksum: Checksum
    size: Optional[int] = None
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_disk(cls, path: PathLike) -> CheckedFile:
        """Hash the regular file at `path` and keep its absolute path; raise OSError as `hash_file` does."""
        absolute = os.path.abspath(os.fsdecode(path))
        checksum, size = hash_file(path)
        return cls(absolute, checksum, size)

    @classmethod
    def from_json(cls, value: object, field: str) -> CheckedFile:
        """Read the JSON object, or the array `[path, checksum, size]`, found at `field` of a card.

        Raises one CardError that lists every problem and carries the first one's field and value.
        """
        members = _members(value, field)
        problems: list[CardError] = _repeated_keys(value, field)
        path = _path(members, field, problems)
        checksum = _checksum(members, field, problems)
        size = _size(members, field, problems)
        if problems or path is None or checksum is None:
            raise _all_of(problems)
        unknown = {key: member for key, member in members.items() if key not in _KEYS}
        return cls(urls.normalize(path) or path, checksum, size, unknown)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this file; no `size` where it is not known."""
        members: dict[str, Any] = {"path": self.path, "checksum": str(self.checksum)}
        if self.size is not None:
            members["size"] = self.size
        members.update(self.unknown)
        return members

    @property
    def is_local(self) -> bool:
        """Whether `path` is a path on a disk (a `file:` URL is a URL)."""
        return not urls.is_url(self.path)

    @property
    def url(self) -> Optional[str]:
        """The URL, None for a file on a disk."""
        return None if self.is_local else self.path

    @property
    def local_path(self) -> Optional[str]:
        """The path on a disk, None for a URL."""
        return self.path if self.is_local else None

    @property
    def basename(self) -> Optional[str]:
        """The last component of path or URL (there still percent-encoded), None if there is none."""
        return urls.basename(self.path)

    def move_to_url(self, url: str) -> CheckedFile:
        """Return the same file, found at `url`; raise CardError if that is no URL."""
        normalized = urls.normalize(url)
        if normalized is None:
            raise _problem("path", url, "a URL")
        return replace(self, path=normalized)

    def move_to_disk(self, path: PathLike) -> CheckedFile:
        """Return the same file, found at `path`; raise CardError if a reader would take that for a URL."""
        text = os.fsdecode(path)
        if urls.is_url(text):
            raise _problem("path", text, "a path on a disk that does not read like a URL (an absolute one)")
        return replace(self, path=text)

    def update_dir(self, directory: PathLike) -> CheckedFile:
        """Return the same file under its name in `directory`; a URL stays as it is.

        Raises CardError if the path has no last component.
        """
        if not self.is_local:
            return self
        name = self.basename
        if name is None:
            raise _problem("path", self.path, "a path that ends in a file name")
        return self.move_to_disk(os.path.join(os.fsdecode(directory), name))

    def matches(self, path: PathLike) -> bool:
        """Whether the file at `path` has this checksum, and this size if one is known.

        Reads the whole file; raises OSError as `hash_file` does.
        """
        checksum, size = hash_file(path)
        return checksum == self.checksum and self.size in (None, size)


def _members(value: object, field: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and len(value) in (2, 3):
        return dict(zip(_KEYS, value))
    raise _problem(field, value, "an object with path, checksum and size, or an array of them")


def _repeated_keys(value: object, field: str) -> list[CardError]:
    """Complain about a known key that the text had twice; the JSON reader leaves word of them."""
    repeated = getattr(value, "duplicates", ())
    return [
        CardError(f"{field}.{key}: found more than once in one object", field=f"{field}.{key}")
        for key in _KEYS
        if key in repeated
    ]


def _path(members: Mapping[str, Any], field: str, problems: list[CardError]) -> Optional[str]:
    path = members.get("path")
    if isinstance(path, str):
        return path
    problems.append(_missing_or_wrong(members, field, "path", "a text"))
    return None


def _checksum(members: Mapping[str, Any], field: str, problems: list[CardError]) -> Optional[Checksum]:
    where = f"{field}.checksum"
    if "checksum" not in members:
        problems.append(_missing_or_wrong(members, field, "checksum", "a text"))
        return None
    text = members["checksum"]
    try:
        return Checksum.parse(text)
    except ChecksumError as err:
        problems.append(ChecksumError(f"{field}.{err}", text=text, field=where))
        return None


def _size(members: Mapping[str, Any], field: str, problems: list[CardError]) -> Optional[int]:
    size = members.get("size")
    if size is None or (type(size) is int and 0 <= size <= _MAX_SIZE):
        return size
    problems.append(_problem(f"{field}.size", size, f"a whole number of bytes from 0 to {_MAX_SIZE}"))
    return None


def _missing_or_wrong(members: Mapping[str, Any], field: str, key: str, expected: str) -> CardError:
    if key in members:
        return _problem(f"{field}.{key}", members[key], expected)
    return CardError(f"{field}.{key}: expected {expected}, the key is missing", field=f"{field}.{key}")


def _problem(field: str, value: object, expected: str) -> CardError:
    return CardError(f"{field}: expected {expected}, found {shown(value)}", field=field, value=value)


def _all_of(problems: list[CardError]) -> CardError:
    """Return one error that lists them all, of the first one's kind, field and value."""
    if len(problems) == 1:
        return problems[0]
    issues = [str(problem) for problem in problems]
    first = problems[0]
    return CardError("; ".join(issues), field=first.field, value=first.value, issues=issues)
