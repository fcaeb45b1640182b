"""Model types, inputs and worker types: what is read, what is written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfhost.card.model_type import ModelInput, ModelType, WorkerType
from selfhost.errors import CardError


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("", ""),
        (" \t", ""),
        ("Chat", "Chat"),
        ("Completions|Chat", "Chat | Completions"),
        ("Chat |Chat\n| Chat", "Chat"),
        ("\x0bChat\u3000", "Chat"),
        ("0x3", "Chat | Completions"),
        ("0x+1", "Chat"),
        ("0x00000001", "Chat"),
        ("0x0", ""),
        ("0x8000 | Rerank", "Rerank | 0x8000"),
        ("Chat | 0xF000 | TensorBased", "Chat | TensorBased | 0xf000"),
    ],
)
def test_flags_are_read_and_written_as_the_wheel_does(text: str, written: str) -> None:
    """Order, spaces and repeats do not matter on reading; unknown bits are kept."""
    assert str(ModelType.parse(text)) == written


@pytest.mark.parametrize(
    "junk",
    [
        *("chat", "Empty", "Chat,Completions", "Chat |", "| Chat", "Chat || Chat", "\x1cChat", "\u200bChat"),
        *("1", "0x", "0X1", "0x 1", "0x_1", "0x10000", "-0x1", "0x\u0661"),
        *(None, 3, ["Chat"], True),
    ],
)
def test_what_is_no_model_type_is_refused(junk: object) -> None:
    """The error names the field and carries the value."""
    with pytest.raises(CardError) as caught:
        ModelType.parse(junk)

    assert (caught.value.field, caught.value.value) == ("model_type", junk)


@given(st.integers(0, 0xFFFF))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_set_of_flags_survives_its_text(bits: int) -> None:
    """Parsing what was written gives the same flags."""
    assert ModelType.parse(str(ModelType(bits))) == bits


def test_flags_join_and_format_as_text() -> None:
    """The values behave as those of Dynamo's binding do."""
    both = ModelType.Completions | ModelType.Chat

    assert f"{both}" == "Chat | Completions"
    assert (both | ModelType.Empty) == both
    assert (ModelInput("Tokens"), WorkerType("prefill")) == (ModelInput.Tokens, WorkerType.Prefill)
