"""Slugs: the vectors of the real wheel and what may be one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfhost.card.slug import Slug
from selfhost.errors import CardError

VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "slugs.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: ascii(vector["name"])[:40])
def test_names_become_the_wheels_slugs(vector: dict[str, str]) -> None:
    """Every name of the vectors has the slug that the real wheel gave it."""
    assert Slug.from_name(vector["name"]) == vector["slug"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Qwen/Qwen3-0.6B", "qwen_qwen3-0_6b"),
        ("/abs/path/model", "abs_path_model"),
        ("-lead", "-lead"),
        ("trail/", "trail_"),
        ("İstanbul", "i_stanbul"),
        ("\u212aelvin K", "kelvin_k"),
        ("e\u0301", "e_"),
        ("模型/千问", ""),
        ("a b  c", "a_b__c"),
        ("a\tb\0c\nd", "a_b_c_d"),
        ("\u0663", ""),
        ("\uff21\uff22", ""),
        ("_base", "base"),
        ("..", ""),
        ("", ""),
        ("\ud800x", "x"),
    ],
)
def test_odd_names(name: str, slug: str) -> None:
    """Case folding, separators, leading underscores and foreign letters, one by one."""
    assert Slug.from_name(name) == slug


def test_slug_is_a_text_that_parses_and_derives_from_itself() -> None:
    """A slug is a str, passes `parse`, and is its own slug."""
    slug = Slug.from_name("a/B")

    assert isinstance(slug, str)
    assert Slug.parse(slug) == Slug.from_name(slug) == "a_b"


@pytest.mark.parametrize("text", ["", "a-b_c0", "_base", "-"])
def test_whole_alphabet_is_accepted(text: str) -> None:
    """A card's slug is taken as it is, empty and with a leading underscore too."""
    assert Slug.parse(text) == text


@pytest.mark.parametrize("text", ["A", "a/b", "a.b", "..", "a\n", "é", " a", "\u0663", None, 5, b"a"])
def test_anything_else_is_refused(text: object) -> None:
    """A slug becomes part of paths and URLs, so nothing beyond its alphabet passes."""
    with pytest.raises(CardError, match="slug") as caught:
        Slug.parse(text)

    assert (caught.value.field, caught.value.value) == ("slug", text)
