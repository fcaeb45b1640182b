"""What a card asks for: names, duplicates and bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers import make_card

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.slots import ModelSlot
from selfhost.errors import CardError
from selfhost.frontend.limits import ResolverLimits
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.wanted import wanted_by

LIMITS = ResolverLimits()


def file(path: str, data: bytes = b"{}", **changes: Any) -> CheckedFile:
    """Return a file of a card."""
    return replace(CheckedFile(path, Checksum.of(data), len(data)), **changes)


def card_of(*extra: CheckedFile, **slots: ModelSlot) -> ModelDeploymentCard:
    """Return a card with these files."""
    return ModelDeploymentCard("m", extra_files=extra, **slots)  # type: ignore[arg-type]


def test_every_file_is_wanted_under_the_last_segment_of_its_url() -> None:
    """Slots and extra files, in Dynamo's order, by the name that its frontend gives them."""
    data = {"tokenizer.json": b"[]", "config.json": b"{}", "a name.txt": b"text"}

    wanted = wanted_by(make_card(data, "http://w:9090/v1/metadata/m/_base"), LIMITS)

    assert list(wanted.files) == ["config.json", "tokenizer.json", "a%20name.txt"]
    assert wanted.files["a%20name.txt"] == Checksum.of(b"text")


def test_custom_template_is_a_file_like_every_other() -> None:
    """What the user chose is fetched from where the card says, too."""
    slot = ModelSlot("hf_chat_template", file("http://w/my.jinja"), is_custom=True)

    assert list(wanted_by(card_of(chat_template_file=slot), LIMITS).files) == ["my.jinja"]


def test_card_without_files_wants_nothing() -> None:
    """A model that needs no files has an empty list."""
    wanted = wanted_by(card_of(), LIMITS)

    assert (dict(wanted.files), wanted.blobs) == ({}, ())


@pytest.mark.parametrize(
    "path",
    ["/models/m/config.json", "config.json", "file:///m/config.json", "hf://org/m/config.json",
     "https://cdn/m/config.json?token=1#x"],
)  # fmt: skip
def test_path_of_every_kind_has_a_name(path: str) -> None:
    """Which of them may be fetched is the transports' question."""
    assert list(wanted_by(card_of(file(path)), LIMITS).files) == ["config.json"]


def test_equal_content_is_one_blob() -> None:
    """Files of one digest are fetched once, whatever they are called."""
    card = card_of(file("http://w/a"), file("http://w/b"), file("http://v/a"), file("http://w/c", b"other"))

    wanted = wanted_by(card, LIMITS)

    assert [blob.names for blob in wanted.blobs] == [("c",), ("a", "b")]
    assert list(wanted.files) == ["a", "b", "c"]


def test_largest_comes_first() -> None:
    """What takes longest begins first; a file of unknown size may be the largest."""
    sizes = {"small": 10, "large": 1000, "middle": 100, "unknown": None}
    card = card_of(*(file(f"http://w/{name}", name.encode(), size=size) for name, size in sizes.items()))

    wanted = wanted_by(card, LIMITS)

    assert [blob.names[0] for blob in wanted.blobs] == ["unknown", "large", "middle", "small"]


@pytest.mark.parametrize(
    ("sizes", "size", "max_bytes"),
    [
        ([7], 7, 7),
        ([7, None, 9], 9, 9),
        ([None], None, 64 << 20),
        ([0], 0, 0),
        ([1 << 40], 1 << 40, 1 << 30),
    ],
)
def test_size_bounds_the_bytes(sizes: list[Any], size: object, max_bytes: int) -> None:
    """The largest declared size is the cap, under the cap that every file has."""
    card = card_of(*(file(f"http://w/{index}", size=size) for index, size in enumerate(sizes)))

    (blob,) = wanted_by(card, LIMITS).blobs

    assert (blob.size, blob.max_bytes) == (size, max_bytes)


@pytest.mark.parametrize(
    "path",
    [
        "http://w/", "http://w", "http://w/..%2f..%2fetc%2fpasswd", "http://w/a/%2e%2e%2f", "http://w/a%5Cb",
        "http://w/a%00b", "http://w/a%0Ab", "http://w/CON", "http://w/nul.json", "http://w/com1.txt",
        "http://w/" + "n" * 256, "http://w/%252e%252e%252f", "/models/..", "/models/a\\b", "/models/\ud800",
        "hf://org",
    ],
)  # fmt: skip
def test_name_that_is_no_file_name_is_refused(path: str) -> None:
    """A card cannot choose where its files go."""
    # catalogue 15
    with pytest.raises(CardError) as caught:
        wanted_by(card_of(file(path)), LIMITS)

    assert caught.value.field == "path"


@pytest.mark.parametrize("data", [b"{}", b"[]"])
def test_names_of_all_slots_are_judged(data: bytes) -> None:
    """A slot's file and an extra one may not share a name, unless they share the content."""
    slot = ModelSlot("hf_config_json", file("http://w/config.json", b"{}"))
    card = card_of(file("http://w/v2/config.json", data), model_info=slot)

    if data == b"{}":
        assert list(wanted_by(card, LIMITS).files) == ["config.json"]
    else:
        with pytest.raises(CardError, match=r"two files of different content are called 'config\.json'"):
            wanted_by(card, LIMITS)


def test_every_problem_is_listed() -> None:
    """One error names all files that cannot be kept."""
    card = card_of(file("http://w/CON"), file("http://w/a"), file("http://w/a", b"x"), file("http://w/"))

    with pytest.raises(CardError) as caught:
        wanted_by(card, LIMITS)

    assert len(caught.value.issues) == 3


def test_too_many_files_are_refused() -> None:
    """A thousand files are a lot for a model's metadata."""
    files = [file(f"http://w/{index}") for index in range(11)]
    limits = ResolverLimits(max_files=10)

    assert len(wanted_by(card_of(*files[:10]), limits).files) == 10
    with pytest.raises(CardError, match="11 files, at most 10 "):
        wanted_by(card_of(*files), limits)


def test_too_many_bytes_are_refused() -> None:
    """Declared bytes count once for each digest, and unknown ones as many as they may be."""
    limits = ResolverLimits(max_total_bytes=100, fetch=FetchLimits(max_unsized_bytes=60))
    sized = [file("http://w/a", b"a", size=40), file("http://w/a2", b"a", size=40)]
    unsized = [file("http://w/b", b"b", size=None), file("http://w/c", b"c", size=None)]

    assert wanted_by(card_of(*sized, unsized[0]), limits)
    for files in (unsized, [*sized, file("http://w/d", b"d", size=61)]):
        with pytest.raises(CardError, match="bytes, at most 100 "):
            wanted_by(card_of(*files), limits)
