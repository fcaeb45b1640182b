"""JSON as the wheel reads and writes it; the numbers here were seen in the real wheel."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfhost.card import json_text
from selfhost.errors import CardError

QUICK = settings(deadline=None, derandomize=True, max_examples=100)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("-0", "-0.0"),
        ("1e5", "100000.0"),
        ("1E+2", "100.0"),
        ("1e16", "1e+16"),
        ("1e15", "1000000000000000.0"),
        ("1e-5", "0.00001"),
        ("-1.25e-5", "-0.0000125"),
        ("1.5e-7", "1.5e-7"),
        ("1e-310", "1e-310"),
        ("2.5e-324", "5e-324"),
        ("0e999", "0.0"),
        ("1e-99999999999999999999", "0.0"),
        ("1e00000000000000000001", "10.0"),
        ("18446744073709551615", "18446744073709551615"),
        ("18446744073709551616", "1.8446744073709552e+19"),
        ("-9223372036854775808", "-9223372036854775808"),
        ("-9223372036854775809", "-9.223372036854776e+18"),
        ("123456789.12345678901234567", "123456789.1234568"),
        ("100000000000000000000.5", "1e+20"),
        ("8.327869443983166e-10", "8.327869443983165e-10"),  # the wheel does not round exactly
    ],
)
def test_numbers_mean_what_they_mean_to_the_wheel(text: str, written: str) -> None:
    """The value of a number's text, and its text again."""
    assert json_text.dumps(json_text.loads(text)) == written


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("", "", ""),
        ("\ufeff{}", "", "\ufeff{}"),
        ("{}x", "", "x"),
        ("{'a':1}", "", "'a':1}"),
        ("[1 2]", "", "2]"),
        ("[01]", "", "1]"),
        ('"a\nb"', "", '\nb"'),
        (b'"\xff"', "", b'"\xff"'),
        ('"\ud800"', "", '"\ud800"'),
        ('{"a":[0,NaN]}', "a[1]", "NaN"),
        ('{"a":{"b":-Infinity}}', "a.b", "-Infinity"),
        ('{"a":1e999}', "a", "1e999"),
        ("9" * 5000, "", "9" * 5000),
        ('{"a":"x\\uD800"}', "a", "x\ud800"),
        ('{"a":["\\udc00"]}', "a[0]", "\udc00"),
    ],
)
def test_what_serde_json_refuses_is_refused(text: Any, field: str, value: object) -> None:
    """The error tells the field where there is one, and what was found."""
    with pytest.raises(CardError) as caught:
        json_text.loads(text)

    assert caught.value.field == field
    assert caught.value.value in (value, value if not isinstance(value, str) else value[:40])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_ends_at_the_wheels_limit(opening: str, closing: str) -> None:
    """127 levels are read, 128 and very many are a CardError."""
    json_text.loads(opening * 127 + "1" + closing * 127)

    for levels, innermost in ((128, "1"), (128, "[]"), (127, "[]"), (100_000, "1")):
        with pytest.raises(CardError, match="nested deeper than 127"):
            json_text.loads(opening * levels + innermost + closing * levels)


def test_repeated_keys_are_remembered() -> None:
    """The last value counts, in the first one's place, and the object knows which keys came twice."""
    value = json_text.loads('{"a":1,"b":2,"a":3}')

    assert json_text.dumps(value) == '{"a":3,"b":2}'
    assert isinstance(value, json_text.JsonObject)
    assert value.duplicates == {"a"}


@given(JSON)
@QUICK
def test_values_survive_writing_and_reading(value: Any) -> None:
    """Whatever holds no float is the same after a round trip, and is compact UTF-8 text."""
    text = json_text.dumps(value)

    assert json_text.loads(text.encode()) == value
    assert text == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@given(st.floats(allow_nan=False, allow_infinity=False))
@QUICK
def test_every_written_float_is_read_exactly_by_a_correct_reader(value: float) -> None:
    """Rust's text form says the same number."""
    assert float(json_text.dumps([value])[1:-1]) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, "\ud800"])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    """Values made by hand can be impossible."""
    with pytest.raises(CardError, match="cannot be written as JSON"):
        json_text.dumps([value])
