"""What a caller of `register_model` says, made into the fields of a card, or refused by name as CardError.

Python takes anything for an argument, and Dynamo's frontends take no card with a wrong field: so each value
is looked at before it meets code that trusts it. Pure functions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, Optional, TypeVar, Union

from ..card.model_card import ModelDeploymentCard
from ..card.model_type import ModelInput, ModelType, WorkerType
from ..errors import CardError, shown

_Kind = TypeVar("_Kind", ModelInput, WorkerType)
PathLike = Union[str, "os.PathLike[str]"]


def model_type_of(value: object) -> ModelType:
    """Return the flags that a value, or Dynamo's spelling of them, names."""
    return value if isinstance(value, ModelType) else ModelType.parse(value)


def member(kind: type[_Kind], value: object, field: str) -> _Kind:
    """Return the member of an enumeration that a value, or Dynamo's spelling of it, names."""
    try:
        return kind(value)
    except ValueError:
        _refuse(field, value, "one of " + ", ".join(repr(member.value) for member in kind))


def optional_member(kind: type[_Kind], value: object, field: str) -> Optional[_Kind]:
    """Return the member that a value names; None: none."""
    return None if value is None else member(kind, value, field)


def worker_needs(value: object) -> tuple[tuple[WorkerType, ...], ...]:
    """Return alternatives, each a group of worker types; None: none."""
    groups = [_sequence(group, "needs", "worker types") for group in _sequence(value, "needs", "groups")]
    return tuple(tuple(member(WorkerType, worker, "needs") for worker in group) for group in groups)


def alias_names(value: object) -> tuple[str, ...]:
    """Return a sequence of names; None: none. One name alone is refused: its letters are not meant."""
    return tuple(_sequence(value, "model_aliases", "names"))


def json_object(value: object, field: str) -> Optional[dict[str, Any]]:
    """Return a copy of a mapping; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        _refuse(field, value, "a mapping")
    return dict(value)


def optional_name(value: object, field: str) -> Optional[str]:
    """Return a name, or None where none is given."""
    if value is not None and not isinstance(value, str):
        _refuse(field, value, "a string")
    return value


def path_text(value: object, field: str) -> str:
    """Return a path as text."""
    path = value.__fspath__() if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        _refuse(field, value, "a path that is text")
    return path


def checked(card: ModelDeploymentCard) -> ModelDeploymentCard:
    """Return the card as a frontend would read it, so that nothing is published that Dynamo refuses."""
    try:
        text = card.to_json()
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CardError(f"the card of {card.display_name!r} cannot be written as JSON: {error}") from error
    return ModelDeploymentCard.from_json(text)


def _sequence(value: object, field: str, of: str) -> Iterable[Any]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        _refuse(field, value, f"a sequence of {of}")
    return value


def _refuse(field: str, value: object, expected: str) -> NoReturn:
    raise CardError(f"{field}: expected {expected}, found {shown(value)}", field=field, value=value)
