"""What differs between two cards, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import url as urls

_ABSENT = object()


@dataclass(frozen=True)
class FieldDifference:
    """One field that differs: its dotted name and both values, None where a card has none."""

    field: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.field}: ours {self.ours!r}, theirs {self.theirs!r}"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[FieldDifference]:
    """Yield the leaves in which two card documents differ, in the order of `ours`.

    Extra files are told apart by name, not by position: `extra_files[vocab.json].checksum`.
    """
    for name in _all_keys(ours, theirs):
        own, other = ours.get(name, _ABSENT), theirs.get(name, _ABSENT)
        if name == "extra_files":
            yield from _entries(_by_name(own), _by_name(other), name)
        else:
            yield from _compare(own, other, name)


def _compare(ours: Any, theirs: Any, field: str) -> Iterator[FieldDifference]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in _all_keys(ours, theirs):
            yield from _compare(ours.get(name, _ABSENT), theirs.get(name, _ABSENT), f"{field}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        yield from _entries(dict(enumerate(ours)), dict(enumerate(theirs)), field)
    elif type(ours) is not type(theirs) or ours != theirs:
        yield FieldDifference(field, *(None if value is _ABSENT else value for value in (ours, theirs)))


def _entries(ours: Mapping[Any, Any], theirs: Mapping[Any, Any], field: str) -> Iterator[FieldDifference]:
    for key in _all_keys(ours, theirs):
        yield from _compare(ours.get(key, _ABSENT), theirs.get(key, _ABSENT), f"{field}[{key}]")


def _all_keys(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> list[Any]:
    return [*ours, *(key for key in theirs if key not in ours)]


def _by_name(files: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the files by name; the second of one name is `name#2`."""
    named: dict[str, Mapping[str, Any]] = {}
    for file in files:
        name = label = urls.basename(file["path"]) or ""
        count = 1
        while label in named:
            count += 1
            label = f"{name}#{count}"
        named[label] = file
    return named
