"""The tolerant reader for config.json; the verdicts were taken from Dynamo 1.6.1."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfhost.card import json5

ACCEPTED = {
    "strict": '{"a": [1, -2.5e3, true, false, null, "x"]}',
    "comments": "/* a **/ {// b\n'a': /**/ 1} //",
    "comment ended by U+2028": "{//c\u2028a:1}",
    "bare names": "{$a_1: 1, nulls: 2, ñandú: 3, 模型: 4, Ⅷ: 5, ⓐ: 6, a٣: 7, a\u0301: 8, a\u200cb: 9}",
    "escaped names": "{\\u0061b: 1, a\\u0031: 2, \\u006eull: 3}",
    "name with half a pair": "{b: {a\\ud800: 1}}",
    "trailing commas": "{a: [1, 2,], b: {c: 1,},}",
    "numbers": "[+5, .5, 5., 5.e3, 0x1F, -0X0, - 5, +Infinity, -NaN, 1e400, .e5, 1E+2]",
    "huge integers": "[123456789012345678901234567890, 0x123456789012345678901234567890]",
    "escapes nobody knows": '["\\q", "\\u12", "\\xg1", "\\1", "\\ud800"]',
    "control characters": '["\x01\x1f\t\x7f"]',
    "line continuations": '["a\\\nb", "a\\\r\nb", "a\\\rb", "a\\\u2028b"]',
    "white space": "\ufeff \v\f\x85\xa0\u1680\u2000\u2029\u202f\u205f\u3000{}\ufeff",
    "repeated names": '{"a": 1, "a": 2}',
    "a scalar alone": "5",
}
REFUSED = {
    "nothing": "",
    "only a comment": "// x",
    "garbage": "hello",
    "trailing garbage": "{} x",
    "two values": "1 2",
    "hash comment": "{} # x",
    "open comment": "{} /* x",
    "comment that only looks closed": "{} /*/",
    "unclosed": '{"a": [1',
    "wrong closer": "[1}",
    "lone comma": "[,]",
    "two commas": "[1,,]",
    "no comma": "[1 2]",
    "no colon": "{a 1}",
    "name only": "{a}",
    "number as name": "{1: 2}",
    "constant as name": "{null: 1}",
    "Infinity as name": "{Infinity: 1}",
    "name that starts with a digit's escape": "{\\u0031a: 1}",
    "name that starts with half a pair": "{\\ud800: 1}",
    "name with a hyphen": "{a-b: 1}",
    "name with an emoji": "{a😀: 1}",
    "name with another escape": "{a\\x41: 1}",
    "Python constant": '{"x": True}',
    "undefined": "{x: undefined}",
    "leading zero": "[010]",
    "two leading zeros": "[00]",
    "empty hex": "[0x]",
    "lone point": "[.]",
    "empty exponent": "[1e]",
    "fraction in exponent": "[1e5.]",
    "two points": "[1.2.3]",
    "two signs": "[--5]",
    "signed text": "[-'5']",
    "signed true": "[+true]",
    "digit separator": "[1_000]",
    "binary": "[0b1]",
    "line feed in a text": '["a\nb"]',
    "carriage return in a text": '["a\rb"]',
    "U+2028 in a text": '["a\u2028b"]',
    "open text": '["abc',
    "text closed by an escaped quote": "['a\\']",
    "separator that is no white space": "{\x1c}",
    "zero width space": "{\u200b}",
    "semicolon": "1;",
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts_what_dynamo_does(text: str) -> None:
    """Texts that Dynamo parses are parsed."""
    json5.loads(text)


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_dynamo_does(text: str) -> None:
    """Texts that Dynamo refuses raise ValueError with line and column."""
    with pytest.raises(ValueError, match=r"\(line 1, column \d+\)"):
        json5.loads(text)


VALUES = [
    ("0x1F", 31),
    ("-5", -5),
    ("- 5", -5),
    ("+5", 5),
    ("-0x5", 5),
    ("5.", 5.0),
    (".5", 0.5),
    ("-Infinity", -math.inf),
    ("18446744073709551615", 2**64 - 1),
    ("-9223372036854775807", -(2**63) + 1),
    ("+0xffffffffffffffff", 2**64 - 1),
    (r"'\a\b\f\n\r\t\v\0\'\"\\\/\x41\u00e9'", "\a\b\f\n\r\t\v\0'\"\\/A\u00e9"),
    ("'a\\\nb'", "a\nb"),
    ("[1,[2],]", [1, [2]]),
    ("{a:{b:1}}", (("a", (("b", 1),)),)),
    ("{a:1,'a':2}", (("a", 1), ("a", 2))),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values(text: str, value: Any) -> None:
    """Each notation means what it means to Dynamo, a hexadecimal number without its minus included."""
    assert json5.whole(json5.loads(text)) == value


NO_VALUES = [
    r'"\q"',
    r'"\u12"',
    r'"\ud83d\ude00"',
    "18446744073709551616",
    "-9223372036854775808",
    "9" * 5000,
    ".e5",
    "0x10000000000000000",
    "-0x8000000000000000",
    r"{a: [{b: '\q'}]}",
    r"{'\q': 1}",
    r"{a: '\q', a: 1}",
]


@pytest.mark.parametrize("text", NO_VALUES)
def test_scalars_without_value_count_only_when_asked_for(text: str) -> None:
    """What cannot be decoded passes `loads` anywhere, and is raised by `whole`."""
    value = json5.loads(f"[1, {text}]")

    with pytest.raises(json5.NoValue):
        json5.whole(value)


def test_fields_ignores_other_members_and_what_is_in_them() -> None:
    """Members that are not asked for may be repeated and undecodable."""
    value = json5.loads(r"{x: '\q', x: 99999999999999999999999, b: 1}")

    assert json5.fields(value, ("a", "b")) == {"b": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (r'{"a": 1, "\u0061": 2}', "a is given twice"),
        (r'{"a": 1, "\q": 2}', r"line 1, column 10"),
        ("[1]", "expected an object, found"),
        ("5", "expected an object, found 5"),
    ],
)
def test_fields_refuses_what_dynamo_does(text: str, problem: str) -> None:
    """A repeated wanted member, an undecodable name, a short array and a scalar are errors that say so."""
    with pytest.raises(ValueError, match=problem):
        json5.fields(json5.loads(text), ("a", "b"), at_least=2)


def test_fields_takes_an_array_in_order() -> None:
    """An array holds the members in the order of their names, as serde reads a struct."""
    assert json5.fields([1, 2, 3], ("a", "b"), at_least=2) == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["[{}]", '{{"a": {}}}'])
def test_nesting_has_dynamos_limit_and_no_recursion(text: str) -> None:
    """3000 values within each other are read, 3001 refused, 100,000 without a RecursionError."""
    start, end = text.replace("{{", "{").replace("}}", "}").split("{}")

    json5.whole(json5.loads(start * 2999 + "1" + end * 2999))
    for depth in (3000, 100_000):
        with pytest.raises(ValueError, match="3000 deep"):
            json5.loads(start * depth + "1" + end * depth)


def test_error_tells_line_and_column() -> None:
    """The place is counted in characters, from 1."""
    with pytest.raises(ValueError, match=r"expected ',' or '}', found 'b' \(line 2, column 10\)"):
        json5.loads('{\n  "ü": 1 b: 2}')


@pytest.mark.parametrize(
    "text", ['"' + "a\\" * 200_001, "/" + "*" * 400_000, "// " * 200_000, " " * 400_000 + "@"]
)
def test_hostile_text_is_refused_in_linear_time(text: str) -> None:
    """Unclosed texts and comments do not make the tokenizer backtrack."""
    started = time.thread_time()  # not of who else uses the machine
    with pytest.raises(ValueError, match="expected"):
        json5.loads(text)

    assert time.thread_time() - started < 5  # seconds; a fraction of one is usual


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON, st.booleans())
@settings(max_examples=150, deadline=None)
def test_both_readers_agree(value: Any, ascii_only: bool) -> None:
    """The quick way through the standard library gives what the tolerant reader gives."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        tolerant = json5._Reader(text).document()
    except ValueError:
        with pytest.raises(ValueError, match="line"):
            json5.loads(text)
    else:
        assert _comparable(json5.loads(text)) == _comparable(tolerant)


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_comparable(item) for item in value]
    return "none" if isinstance(value, json5.NoValue) else (type(value).__name__, repr(value))
