"""Read config.json in the dialect that Dynamo 1.6.1 takes: that of the Rust crate json-five 0.3.1.

Close to JSON5 (comments, single quotes, bare names, trailing commas, hex, Infinity), and lazy: a
scalar that is well delimited but stands for nothing (an unknown escape, half a surrogate pair, an
integer beyond 64 bits) stops nobody until it is asked for. So `loads` puts a `NoValue` in its place,
and `fields` and `whole` raise it. Nesting costs no recursion. This is no general JSON5 reader.

Known to differ: bare names that start with a combining mark (the spacing ones are taken here, the
others refused; json-five goes by a table), and those in letters newer than this Python's Unicode.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Union

from ..errors import shown

MAX_DEPTH = 3000  # values within values; json-five's own limit
_STANDARD_DEPTH = 500  # the standard reader recurses in C: this fits the stack of any thread

_NEWLINES = "\n\r\u2028\u2029"
# Unicode's White_Space (Python's \s also holds U+001C to U+001F), and the byte order mark anywhere.
_BLANKS = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
# No text can be matched by one of these in two ways, so none makes the matching backtrack for long.
_TOKEN = re.compile(
    rf"""
    (?P<space>  [{_BLANKS}]+ | //[^{_NEWLINES}]* | /\*[\s\S]*?\*/ )
  | (?P<mark>   [{{}}\[\],:+-] )
  | (?P<string> "[^"\\{_NEWLINES}]*(?:\\(?:\r\n|[\s\S])[^"\\{_NEWLINES}]*)*"
              | '[^'\\{_NEWLINES}]*(?:\\(?:\r\n|[\s\S])[^'\\{_NEWLINES}]*)*' )
  | (?P<number> 0[xX][0-9a-fA-F]+
              | (?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+|\.(?=[eE]))(?:[eE][+-]?[0-9]+)? )
  | (?P<name>   (?:[^\x00-\x23\x25-\x2f\x3a-\x40\x5b-\x5e\x60\x7b-\x7f{_BLANKS}]|\\u[0-9a-fA-F]{{4}})+ )
  | (?P<end>    \Z )
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([\s\S]))")
_ESCAPES = {**dict(zip("anrtbfv0\\'\"/", "\a\n\r\t\b\f\v\0\\'\"/")), **{c: c for c in _NEWLINES}}
_CLOSERS = {"{": "}", "[": "]"}
_CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "null": None}
_UNITS = {"NaN": float("nan"), "Infinity": float("inf")}  # these may have a sign
_JOINERS = "$_\u200c\u200d\u203f\u2040\u2054\ufe33\ufe34\ufe4d\ufe4e\ufe4f\uff3f"
_CIRCLED = re.compile("[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")
# All that json-five and the standard reader understand differently in a text that both accept.
_NOT_PLAIN = re.compile("\\\\u|[\u2028\u2029]")


class NoValue(ValueError):
    """A scalar, or the name of a member, that is well delimited but stands for nothing."""

    def __init__(self, message: str, text: str = "", start: int = 0) -> None:
        super().__init__(message, text, start)

    def __str__(self) -> str:
        message, text, start = self.args  # the line is counted for the one that is raised only
        return f"{message}{_place(text, start)}" if text else message


class Object(tuple[tuple[Union[str, NoValue], Any], ...]):
    """The members of an object as written, repeated names included; arrays are plain lists."""

    def __repr__(self) -> str:
        return repr(dict(self))


def loads(text: str) -> Any:
    """Parse one document; raises ValueError with line and column."""
    if text.count("[") + text.count("{") < _STANDARD_DEPTH and not _NOT_PLAIN.search(text):
        try:
            return _STANDARD.decode(text)
        except (ValueError, RecursionError):
            pass  # no strict JSON: the tolerant reader takes it, or tells where it is wrong
    return _Reader(text).document()


def fields(value: Any, names: Sequence[str], *, at_least: int = 0) -> dict[str, Any]:
    """Take the named members of an object, or of an array of `at_least` items in the order of `names`.

    This is how serde fills a struct: other members are ignored, a repeated one is an error.
    Raises ValueError.
    """
    if isinstance(value, list) and len(value) >= at_least:
        return dict(zip(names, value))
    if not isinstance(value, Object):
        raise ValueError(f"expected an object, found {shown(value)}")
    found: dict[str, Any] = {}
    for name, item in value:
        if isinstance(name, NoValue):
            raise name
        if name in found:
            raise ValueError(f"{name} is given twice")
        if name in names:
            found[name] = item
    return found


def whole(value: Any) -> Any:
    """Return `value` if it has a value everywhere inside; raises the first NoValue otherwise."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, NoValue):
            raise item
        if isinstance(item, (list, tuple)):
            pending.extend(reversed(item))
    return value


class _Container:
    """An array or an object that is being read; the root is an array closed by the end of the text."""

    def __init__(self, closer: str) -> None:
        self.closer = closer
        self.names: list[Union[str, NoValue]] = []
        self.items: list[Any] = []

    def finish(self) -> Any:
        return Object(zip(self.names, self.items)) if self.closer == "}" else self.items


class _Reader:
    """The grammar over a text's tokens, of which the next one is in `kind`, `lexeme` and `start`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kind, self.lexeme, self.start = "", "", 0
        self._take()

    def document(self) -> Any:
        """Read the one value that the text consists of."""
        stack = [_Container("")]
        while True:
            if len(stack) > MAX_DEPTH:
                raise self._expected(f"values nested at most {MAX_DEPTH} deep")
            if self.lexeme in _CLOSERS:
                stack.append(_Container(_CLOSERS[self._take()]))
                closed = self._begin_item(stack[-1])
            else:
                stack[-1].items.append(self._scalar())
                closed = self._end_item(stack[-1])
            while closed:
                value = stack.pop().finish()
                if not stack:
                    return value[0]
                stack[-1].items.append(value)
                closed = self._end_item(stack[-1])

    def _begin_item(self, container: _Container) -> bool:
        """Go to where a value starts, past a member's name; True: the container ended instead."""
        if self.lexeme == container.closer:
            self._take()
            return True
        if container.closer == "}":
            container.names.append(self._member_name())
            if self.lexeme != ":":
                raise self._expected("':'")
            self._take()
        return False

    def _end_item(self, container: _Container) -> bool:
        """Go past what follows a value; True: the container ended there."""
        if self.lexeme == container.closer:
            self._take()
            return True
        if not container.closer:
            raise self._expected("nothing more")
        if self.lexeme != ",":
            raise self._expected(f"',' or '{container.closer}'")
        self._take()
        return self._begin_item(container)

    def _member_name(self) -> Union[str, NoValue]:
        if self.kind == "string":
            return self._unescape(self.start, self._take()[1:-1])
        if self.kind != "name" or self.lexeme in _CONSTANTS or self.lexeme in _UNITS:
            raise self._expected("the name of a member")
        return self._unescape(self.start, self._take())

    def _scalar(self) -> Any:
        sign = self._take() if self.lexeme in ("+", "-") else ""
        if self.kind == "number":
            return self._number(sign, self.start, self._take())
        if self.lexeme in _UNITS:
            return float(sign + self._take())
        if sign:
            raise self._expected("a number")
        if self.kind == "string":
            return self._unescape(self.start, self._take()[1:-1])
        if self.lexeme not in _CONSTANTS:
            raise self._expected("a value")
        return _CONSTANTS[self._take()]

    def _number(self, sign: str, start: int, lexeme: str) -> Any:
        if lexeme.isdigit():
            value = _integer(sign + lexeme)
        elif lexeme[:2] in ("0x", "0X"):
            value = _integer(sign + str(min(int(lexeme, 16), 1 << 64)))
            value = abs(value) if isinstance(value, int) else value  # json-five forgets a minus here
        elif lexeme.startswith((".e", ".E")):
            value = NoValue(f"{lexeme} is no number")
        else:
            return float(sign + lexeme)
        return value if isinstance(value, int) else NoValue(str(value), self.text, start)

    def _unescape(self, start: int, raw: str) -> Union[str, NoValue]:
        if "\\" not in raw:
            return raw
        try:
            return _ESCAPE.sub(_unescaped, raw)
        except ValueError as err:
            return NoValue(str(err), self.text, start)

    def _take(self) -> str:
        """Return the present token's text and go to the next token."""
        taken, end = self.lexeme, self.start + len(self.lexeme)
        match = _TOKEN.match(self.text, end)
        while match and match.lastgroup == "space":
            end = match.end()
            match = _TOKEN.match(self.text, end)
        self.start = end
        if not match or (match.lastgroup == "name" and not _is_name(match.group())):
            self.lexeme = self.text[end : end + 1]
            raise self._expected("complete JSON5")
        self.kind, self.lexeme = match.lastgroup or "", match.group()
        return taken

    def _expected(self, what: str) -> ValueError:
        found = shown(self.lexeme) if self.lexeme else "the end of the text"
        return ValueError(f"expected {what}, found {found}{_place(self.text, self.start)}")


def _integer(text: str) -> Union[int, NoValue]:
    """Return what fits json-five's integers: i64 after a minus, u64 otherwise."""
    digits = text.lstrip("+-")
    largest = (1 << 63) - 1 if text[0] == "-" else (1 << 64) - 1
    if len(digits) > 20 or int(digits) > largest:
        return NoValue(f"{shown(text)} does not fit in 64 bits")
    return int(text)


def _unescaped(match: re.Match[str]) -> str:
    code = match.group(1) or match.group(2)
    if code:
        char = chr(int(code, 16))
        if not "\ud800" <= char <= "\udfff":
            return char
    elif match.group(3) in _ESCAPES:
        return _ESCAPES[match.group(3)]
    raise ValueError(f"{shown(match.group())} is an escape that Dynamo does not take")


def _is_name(lexeme: str) -> bool:
    """Whether a bare name is one; of escaped characters only a first one is checked."""
    first = chr(int(lexeme[2:6], 16)) if lexeme[0] == "\\" else lexeme[0]
    starts = first in "$_" or first.isalpha() or unicodedata.category(first) in ("Nl", "Mc")
    if not starts and not _CIRCLED.match(first):
        return False
    return lexeme.isascii() or all(map(_continues_name, lexeme))


def _continues_name(char: str) -> bool:
    category = unicodedata.category(char)
    if char.isascii() or category[0] in "LN" or category in ("Mn", "Mc") or char in _JOINERS:
        return True
    return _CIRCLED.match(char) is not None


def _place(text: str, index: int) -> str:
    line_start = text.rfind("\n", 0, index) + 1
    return f" (line {text.count(chr(10), 0, index) + 1}, column {index - line_start + 1})"


_STANDARD = json.JSONDecoder(object_pairs_hook=Object, parse_int=_integer)
