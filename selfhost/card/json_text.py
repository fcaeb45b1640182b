"""JSON as the reader and the writer of the wheel (Rust's serde_json) take and write it.

`loads` is strict where Python's own reader is lenient: no NaN or Infinity, no half surrogate pairs, no byte
order mark, no deep nesting. Numbers mean what they mean there: -0 and integers beyond 64 bits are floats,
and a long decimal fraction can end up one unit in the last place off (the digests of cards depend on it).
An object that has a key twice becomes a `JsonObject`, so that a reader of known keys can refuse it.

Stricter than the wheel in one point: what it skips without a look, the values of unknown fields, has to obey
the same rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from json.encoder import encode_basestring as _quoted
from typing import Any, NamedTuple, Union

from ..errors import CardError, shown

MAX_DEPTH = 127  # objects and arrays within each other that the wheel still reads

_U64_MAX = (1 << 64) - 1
_I64_MIN = -(1 << 63)
_NUMBER = re.compile(r"(-?)([0-9]+)(?:\.([0-9]+))?(?:[eE]([-+]?[0-9]+))?")
_SAFE_DIGITS = 18  # that many digits and a sign always fit 64 bits
_TENS = [float(f"1e{power}") for power in range(309)]
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonObject(dict):  # type: ignore[type-arg]
    """An object whose text had a key more than once; the last value counts. `duplicates` are those keys."""

    duplicates: frozenset[str] = frozenset()


class _Oddity(NamedTuple):
    """What stands in the place of a number that is none."""

    text: str


def loads(text: Union[str, bytes, bytearray]) -> Any:
    """Return the value that `text` holds; raise CardError (its `field` is the dotted path, if known)."""
    text = _decoded(text)
    parse = _Parse()
    try:
        value = parse.decoder.decode(text)
    except json.JSONDecodeError as err:
        where = f"{err.msg} at line {err.lineno} column {err.colno}"
        raise _no_json(where, text[err.pos : err.pos + 40]) from err
    except RecursionError as err:
        raise _no_json(f"nested deeper than {MAX_DEPTH}", text[:40]) from err
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(value)
    if parse.oddities or _ESCAPED_SURROGATE.search(text):
        _check_leaves(value)
    return value


def dumps(value: Any) -> str:
    """Return `value` as compact JSON text with Rust's floats; raise CardError where there is none."""
    try:
        text = _ENCODER.encode(value)
        text.encode()
    except (TypeError, ValueError, RecursionError) as err:
        raise CardError(f"card: cannot be written as JSON: {err}", value=value) from err
    # Python and Rust write floats alike, but for those below 0.0001.
    return text if "e-" not in text else "".join(_pieces(json.loads(text)))


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class _Parse:
    """One run of the decoder, with the wheel's idea of objects and numbers."""

    def __init__(self) -> None:
        self.oddities = False
        self.decoder = json.JSONDecoder(
            object_pairs_hook=_object,
            parse_int=self._integer,
            parse_float=self._float,
            parse_constant=self._odd,
        )

    def _integer(self, text: str) -> Any:
        if len(text) <= _SAFE_DIGITS:
            return int(text) if text != "-0" else -0.0
        if len(text) <= 20:
            value = int(text)
            if _I64_MIN <= value <= _U64_MAX:
                return value
        return self._float(text)

    def _float(self, text: str) -> Any:
        value = _rust_float(text)
        return value if math.isfinite(value) else self._odd(text)

    def _odd(self, text: str) -> _Oddity:
        self.oddities = True
        return _Oddity(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    names = [name for name, _ in pairs]
    repeated = JsonObject(members)
    repeated.duplicates = frozenset(name for name in members if names.count(name) > 1)
    return repeated


def _decoded(text: Union[str, bytes, bytearray]) -> str:
    try:
        if isinstance(text, str):
            text.encode()
            return text
        return bytes(text).decode()
    except UnicodeError as err:
        raise _no_json("it is not valid UTF-8", text[:40]) from err


def _rust_float(text: str) -> float:
    """Return what serde_json makes of a number's text: quick, and in the last place not always the nearest.

    The first digits that fit 64 bits are kept, then multiplied with or divided by a power of ten.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:  # the decoder hands over numbers only
        raise _no_json("no number", text)
    sign, whole, fraction, power = match[1], match[2], match[3] or "", match[4] or "0"
    significand, exponent = _significand(whole, fraction)
    exponent += _power_of_ten(power)
    value = _scaled(float(significand), exponent)
    return -value if sign else value


def _power_of_ten(text: str) -> int:
    """Return the exponent that `text` says; beyond nine digits any number does, Python reads only so many."""
    digits = text.lstrip("+-0")
    power = int(digits or "0") if len(digits) < 10 else 10**9
    return -power if text[0] == "-" else power


def _significand(whole: str, fraction: str) -> tuple[int, int]:
    """Return the kept digits as an integer, and the power of ten that it lacks."""
    if len(whole) + len(fraction) <= _SAFE_DIGITS:
        return int(whole + fraction), -len(fraction)
    significand = exponent = 0
    for position, digit in enumerate(whole):
        longer = significand * 10 + int(digit)
        if longer > _U64_MAX:
            exponent = len(whole) - position
            break
        significand = longer
    for digit in fraction:
        longer = significand * 10 + int(digit)
        if longer > _U64_MAX:
            break
        significand, exponent = longer, exponent - 1
    return significand, exponent


def _scaled(value: float, exponent: int) -> float:
    if value == 0.0:
        return 0.0
    if exponent > 308:
        return math.inf
    if exponent >= 0:
        return value * _TENS[exponent]
    while exponent < -308 and value:
        value /= 1e308
        exponent += 308
    return value / _TENS[-exponent] if value else 0.0


def _check_depth(value: Any) -> None:
    level = [value]  # objects and arrays at one depth
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return
    raise _no_json(f"nested deeper than {MAX_DEPTH}", value)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _check_leaves(value: Any) -> None:
    """Refuse numbers and texts that JSON cannot mean, naming where they stand."""
    issues = []
    found = []
    for field, leaf in _leaves(value, ""):
        if isinstance(leaf, _Oddity):
            found.append((field, leaf.text))
            issues.append(f"{field or 'card'}: expected a finite number, found {leaf.text[:80]}")
        elif isinstance(leaf, str) and _HALF_PAIR.search(leaf):
            found.append((field, leaf))
            issues.append(f"{field or 'card'}: expected whole surrogate pairs, found {shown(leaf)}")
    if issues:
        raise CardError("; ".join(issues), field=found[0][0], value=found[0][1], issues=issues)


def _leaves(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, member in value.items():
            below = f"{field}.{name}" if field else name
            yield below, name
            yield from _leaves(member, below)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{field}[{index}]")
    else:
        yield field, value


def _no_json(reason: str, excerpt: object) -> CardError:
    return CardError(f"card: no JSON that Dynamo reads: {reason}, found {shown(excerpt)}", value=excerpt)


def _pieces(value: Any) -> Iterator[str]:
    """Write what the C encoder of the standard library would, with Rust's floats."""
    if isinstance(value, float):
        yield _float_text(value)
    elif isinstance(value, dict):
        yield "{"
        for index, (name, member) in enumerate(value.items()):
            yield f"{',' if index else ''}{_quoted(name)}:"
            yield from _pieces(member)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            yield "," if index else ""
            yield from _pieces(item)
        yield "]"
    else:
        yield _ENCODER.encode(value)


def _float_text(value: float) -> str:
    text = repr(value)
    if "e-" not in text:
        return text
    digits, _, power = text.partition("e-")
    if power != "05":
        return f"{digits}e-{power.lstrip('0')}"
    sign = "-" if digits[0] == "-" else ""
    return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
