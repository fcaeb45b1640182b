"""The checksum of a card: the vectors of the real wheel, and what it covers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from blake3 import blake3

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.model_type import ModelInput, ModelType, WorkerType

VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "cards.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("form", ["card_json", "canonical_json"])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_cards_have_the_wheels_checksum_and_directory(vector: dict[str, Any], form: str) -> None:
    """Slug and checksum name the directory that the wheel uses (an empty slug is no directory of its own)."""
    card = ModelDeploymentCard.from_json(vector[form])
    directory = PurePosixPath("by-slug", card.slug, card.mdcsum)

    assert card.mdcsum == vector["mdcsum"]
    assert directory.parent.name == vector["slug"]


def test_the_bytes_of_a_minimal_card() -> None:
    """Name, context length, block size, no worker type, no needs."""
    card = ModelDeploymentCard("x", context_length=1)

    assert card.mdcsum == blake3(b"x" + b"\0\0\0\1" + b"\0\0\0\x10" + b"\0" + b"\0\0\0\0").hexdigest()


BASE = ModelDeploymentCard("x", extra_files=(CheckedFile("/m/a.json", Checksum("0" * 64), 1),))


@pytest.mark.parametrize(
    "change",
    [
        {"slug": "y"},
        {"migration_limit": 3},
        {"model_type": ModelType.Embedding},
        {"model_input": ModelInput.Text},
        {"lora": {"name": "l"}},
        {"user_data": [1]},
        {"runtime_config": {"total_kv_blocks": 7}},
        {"source_path": ""},
        {"unknown": {"future": 1}},
        {"extra_files": (CheckedFile("http://h/a.json?q=1", Checksum("0" * 64)),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_checksum_does_not_cover(change: dict[str, Any]) -> None:
    """Where files are, and what does not change the model's behaviour."""
    assert replace(BASE, **change).mdcsum == BASE.mdcsum


@pytest.mark.parametrize(
    "change",
    [
        {"display_name": "y"},
        {"source_path": "y"},
        {"prompt_context": ()},
        {"runtime_config": {"context_length": 7}},
        {"kv_cache_block_size": 17},
        {"worker_type": WorkerType.Encode},
        {"needs": ((),)},
        {"aliases": ("",)},
        {"indexer_identity": {}},
        {"router_config": {"router_mode": "k_v", "kv_router_config": {}, "load_threshold_config": {}}},
        {"extra_files": (CheckedFile("/m/b.json", Checksum("0" * 64)),)},
        {"extra_files": BASE.extra_files * 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_checksum_covers(change: dict[str, Any]) -> None:
    """Each of these makes another model of it."""
    assert replace(BASE, **change).mdcsum != BASE.mdcsum


def test_unknown_router_fields_do_not_enter_the_checksum() -> None:
    """The wheel drops them before it hashes."""
    router = {"router_mode": "k_v", "kv_router_config": {}, "load_threshold_config": {}}
    newer = {**router, "load_threshold_config": {"new": 1}, "newer": 2}

    assert replace(BASE, router_config=newer).mdcsum == replace(BASE, router_config=router).mdcsum
