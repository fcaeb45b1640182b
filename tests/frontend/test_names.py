"""Names of files: what a card may bring, and what only the cache may."""

from __future__ import annotations

from typing import Optional

import pytest

from selfhost.errors import CardError
from selfhost.frontend.names import (
    as_file_name,
    is_hex,
    is_staged,
    is_temporary_blob,
    staged_name,
    temporary_blob,
)

HEX = "0123456789abcdef" * 4

GOOD = [
    "config.json",
    "tokenizer_config.json",
    ".gitattributes",
    "a",
    "...",
    "with%20space.json",
    "%E6%A8%A1%E5%9E%8B.json",
    "模型.json",
    "100%25.json",
    "50%.txt",
    "connect.json",
    "com10",
    "console",
    "a" * 255,
    "é" * 127,
    ".tmp.json",
    HEX,
]

# catalogue 15
BAD = [
    None,
    "",
    ".",
    "..",
    "/",
    "a/b",
    "../a",
    "a\\b",
    "..\\a",
    "%2e%2e",
    "%2E",
    "%2e%2e%2fa",
    "a%2fb",
    "a%5cb",
    "%252e%252e%252f",
    "nul%00.json",
    "a\0b",
    "a\nb",
    "a%0ab",
    "a\x7fb",
    "a\x85b",
    "\ud800",
    "a%ff",  # no UTF-8, so what it decodes to is anybody's choice
    "%c0%ae%c0%ae",  # an overlong ..
    "%ed%a0%80",  # half of a surrogate pair
    "a" * 256,
    "é" * 128,
    "CON",
    "con.json",
    "Nul",
    "NUL.tar.gz",
    "aux ",
    "COM1",
    "lpt9.txt",
    "com¹",
    "%43on.json",
    "nul:stream",
    ".tmp.1." + "0" * 32,
]


@pytest.mark.parametrize("text", GOOD)
def test_usable_name_comes_back_as_it_is(text: str) -> None:
    """A name is kept as it stands in the URL, percent-encoded or not."""
    assert as_file_name(text) == text


@pytest.mark.parametrize("text", BAD)
def test_name_that_could_do_harm_is_refused(text: Optional[str]) -> None:
    """Names that mean another folder, a device or nothing at all are refused, however they are spelt."""
    with pytest.raises(CardError, match=r"^model_info: expected a URL") as caught:
        as_file_name(text, field="model_info")

    assert (caught.value.field, caught.value.value) == ("model_info", text)
    str(caught.value).encode()  # the message itself can be logged


def test_the_caches_own_names_are_told_apart() -> None:
    """What is staged, being written, and whole has names of different kinds, which never repeat."""
    assert is_staged(staged_name())
    assert not is_staged(".tmp.json")
    assert is_temporary_blob(temporary_blob(HEX))
    assert is_temporary_blob(f"{HEX}.tmp.17.some-uuid")
    assert not is_temporary_blob(HEX)
    assert not is_temporary_blob("config.json.tmp.1.2")
    assert is_hex(HEX)
    assert not is_hex(HEX.upper())
    assert not is_hex(HEX + "\n")
    assert len({staged_name() for _ in range(100)}) == 100
