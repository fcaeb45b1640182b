"""How a field of a card is read, checked and written: small readers, and structures as tables of fields.

A reader takes a JSON value and the dotted name of where it stands, returns what the card keeps and tells
`Problems` what is wrong; it never raises, so that one error can list everything. A structure accepts what
the wheel's derived readers accept: an object, or an array of its fields in order. Keys that it does not
know are kept behind those that it knows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Callable, Optional

from ..errors import CardError, shown
from .json_text import JsonObject

REQUIRED: Any = object()  # the default of a field that has none


class Problems:
    """Collects what is wrong with a card, to be raised as one error."""

    def __init__(self) -> None:
        self._found: list[tuple[str, object, str]] = []

    def __len__(self) -> int:
        return len(self._found)

    def expect(self, field: str, value: object, expected: str) -> None:
        """Note that `field` is `value` and should be `expected`."""
        self._found.append((field, value, f"{field or 'card'}: expected {expected}, found {shown(value)}"))

    def missing(self, field: str) -> None:
        """Note that a field that a card must have is not there."""
        self._found.append((field, None, f"{field}: is missing"))

    def include(self, err: CardError) -> None:
        """Note what another reader raised."""
        self._found.extend((err.field, err.value, issue) for issue in err.issues)

    def raise_any(self) -> None:
        """Raise CardError if anything was noted: field and value of the first, all of them as issues."""
        if self._found:
            issues = [issue for _, _, issue in self._found]
            field, value, _ = self._found[0]
            raise CardError("; ".join(issues), field=field, value=value, issues=issues)


Reader = Callable[[Any, str, Problems], Any]


class Written(dict):  # type: ignore[type-arg]
    """An object that `Struct.read` made: checked, complete and in the wheel's order."""


@dataclass(frozen=True)
class Field:
    """One field: how it is read, what it is when absent, whether and how it is written.

    `table` is the structure that the field holds, where its unknown keys have to be told apart.
    """

    name: str
    read: Reader
    default: Any = REQUIRED
    omit: Callable[[Any], bool] = lambda value: False
    write: Callable[[Any], Any] = lambda value: value
    table: Optional[Struct] = None


class Struct:
    """A table of fields; `min_items` is how few an array may hold, `closed` refuses unknown keys.

    `finish` sees all values once they are read, and may change them or note problems.
    """

    def __init__(
        self,
        *fields: Field,
        min_items: int,
        closed: bool = False,
        finish: Optional[Callable[[dict[str, Any], str, Problems], None]] = None,
    ) -> None:
        self.fields = fields
        self.names = frozenset(field.name for field in fields)
        self.min_items = min_items
        self.closed = closed
        self.finish = finish

    def read(self, value: Any, path: str, problems: Problems) -> Written:
        """Return the object as the wheel writes it, defaults filled in, unknown keys last."""
        values, unknown = self.members(value, path, problems)
        written = Written(
            (field.name, values[field.name])
            for field in self.fields
            if field.name in values and not field.omit(values[field.name])
        )
        written.update(unknown)
        return written

    def members(self, value: Any, path: str, problems: Problems) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values of all fields, and what is unknown; of no meaning once a problem was noted."""
        before = len(problems)
        given = self._given(value, path, problems)
        if given is None:
            return {}, {}
        values = {}
        for field in self.fields:
            below = f"{path}.{field.name}" if path else field.name
            if field.name in given:
                values[field.name] = field.read(given[field.name], below, problems)
            elif field.default is REQUIRED:
                problems.missing(below)
            else:
                values[field.name] = field.default
        if self.finish is not None and len(problems) == before:
            self.finish(values, path, problems)
        return values, {name: item for name, item in given.items() if name not in self.names}

    def known(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `read` returned without its unknown keys: what the wheel itself would write."""
        return {
            field.name: field.table.known(value[field.name]) if field.table else value[field.name]
            for field in self.fields
            if field.name in value
        }

    def _given(self, value: Any, path: str, problems: Problems) -> Optional[Mapping[str, Any]]:
        if isinstance(value, list) and self.min_items <= len(value) <= len(self.fields):
            return {field.name: item for field, item in zip(self.fields, value)}
        if not isinstance(value, dict):
            problems.expect(path, value, "an object")
            return None
        for name in repeated_names(value) & self.names:
            problems.expect(dotted(path, name), value[name], "one value, not several of that name")
        for name in value.keys() - self.names if self.closed else ():
            known = ", ".join(field.name for field in self.fields)
            problems.expect(dotted(path, name), value[name], f"no field but {known}")
        return value


def dotted(path: str, name: str) -> str:
    """Return the dotted name of a member; a name that is no plain text as a subscript."""
    if not name.isprintable() or len(name) > 200:
        return f"{path}[{shown(name)}]"
    return f"{path}.{name}" if path else name


def repeated_names(value: object) -> frozenset[str]:
    """Return the keys that an object had more than once in its JSON text."""
    return value.duplicates if isinstance(value, JsonObject) else frozenset()


def text(value: Any, path: str, problems: Problems) -> Any:
    """Read a text."""
    if not isinstance(value, str):
        problems.expect(path, value, "a text")
    return value


def boolean(value: Any, path: str, problems: Problems) -> Any:
    """Read true or false."""
    if value is not True and value is not False:
        problems.expect(path, value, "true or false")
    return value


def whole(least: int, most: int) -> Reader:
    """Return a reader of integers, written without fraction or exponent, from `least` to `most`."""

    def read(value: Any, path: str, problems: Problems) -> Any:
        if type(value) is not int or not least <= value <= most:
            problems.expect(path, value, f"an integer from {least} to {most}")
        return value

    return read


u8 = whole(0, 2**8 - 1)
u16 = whole(0, 2**16 - 1)
u32 = whole(0, 2**32 - 1)
u64 = whole(0, 2**64 - 1)
i64 = whole(-(2**63), 2**63 - 1)


def number(least: Optional[float] = None, most: Optional[float] = None) -> Reader:
    """Return a reader of numbers; they become floats."""
    bounds = ("" if least is None else f" from {least:g}") + ("" if most is None else f" to {most:g}")
    low, high = -math.inf if least is None else least, math.inf if most is None else most

    def read(value: Any, path: str, problems: Problems) -> Any:
        if type(value) in (int, float) and low <= value <= high:
            return float(value)
        problems.expect(path, value, f"a number{bounds}")
        return value

    return read


def single(value: Any, path: str, problems: Problems) -> Any:
    """Read a number as one of 32 bits, kept as the shortest decimal that means it."""
    read = number()(value, path, problems)
    if type(read) is not float:
        return value
    try:
        narrow = struct.pack("f", read)
    except OverflowError:
        return None  # infinite in 32 bits, which JSON writes as null
    exact = struct.unpack("f", narrow)[0]
    shortest = (float(f"{exact:.{digits}g}") for digits in range(1, 10))
    return next((short for short in shortest if struct.pack("f", short) == narrow), exact)


def optional(read: Reader) -> Reader:
    """Return a reader that takes null as well."""
    return lambda value, path, problems: None if value is None else read(value, path, problems)


def items(read: Reader, build: Callable[[Iterable[Any]], Any] = list) -> Reader:
    """Return a reader of arrays whose items `read` reads."""

    def read_items(value: Any, path: str, problems: Problems) -> Any:
        if isinstance(value, list):
            return build(read(item, f"{path}[{index}]", problems) for index, item in enumerate(value))
        problems.expect(path, value, "an array")
        return build(())

    return read_items


def mapping(read: Reader) -> Reader:
    """Return a reader of objects with free keys whose values `read` reads."""

    def read_mapping(value: Any, path: str, problems: Problems) -> Any:
        if isinstance(value, dict):
            return {name: read(item, dotted(path, name), problems) for name, item in value.items()}
        problems.expect(path, value, "an object")
        return {}

    return read_mapping


def choice(meanings: Mapping[str, Any]) -> Reader:
    """Return a reader of names: the text, or `{"name": null}`; the result is what the name means."""

    def read(value: Any, path: str, problems: Problems) -> Any:
        name = value
        if isinstance(value, dict) and list(value.values()) == [None] and not repeated_names(value):
            (name,) = value
        if not isinstance(name, str) or name not in meanings:
            problems.expect(path, value, f"one of {', '.join(meanings)}")
            return None
        return meanings[name]

    return read


def names(*accepted: str) -> Reader:
    """Return a reader of names that mean themselves."""
    return choice({name: name for name in accepted})


def anything(value: Any, path: str, problems: Problems) -> Any:
    """Read any JSON value."""
    return value


def is_none(value: Any) -> bool:
    """Whether a field that is left out when it is null is to be left out."""
    return value is None


def is_empty(value: Any) -> bool:
    """Whether a field that is left out when it has no items is to be left out."""
    return not value


def always(value: Any) -> bool:
    """Leave a field out whatever it is: it is only read."""
    return True
