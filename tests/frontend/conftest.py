"""What the frontend's tests share: origins that end with their test, cards, and a leak check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Callable

import helpers
import pytest

from selfhost.card.model_card import ModelDeploymentCard

# Two files in typed slots and one more; the sizes are far from what one packet or one buffer holds.
FILES = {
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer.json": bytes(range(256)) * 800,
    "notes.txt": b"an extra file\n",
}

StartOrigin = Callable[..., helpers.RudeOrigin]


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Check that no thread and no descriptor of the test outlives it."""
    with helpers.nothing_left():
        yield


@pytest.fixture
def files() -> dict[str, bytes]:
    """Return the files of a small model."""
    return dict(FILES)


@pytest.fixture
def make_card() -> Callable[..., ModelDeploymentCard]:
    """Return the function (files, base_url) -> card."""
    return helpers.make_card


@pytest.fixture
def rude_origin(leaves_nothing: None) -> Iterator[StartOrigin]:
    """Start origins (files, behaviour); they end with the test."""
    with ExitStack() as stack:

        def start(
            files: Mapping[str, bytes], behaviour: str = "well", **options: object
        ) -> helpers.RudeOrigin:
            return stack.enter_context(helpers.RudeOrigin(files, behaviour, **options))

        yield start


@pytest.fixture
def counting_origin(rude_origin: StartOrigin, files: dict[str, bytes]) -> helpers.RudeOrigin:
    """Return an origin that serves `files` well, and counts what it is asked."""
    return rude_origin(files)
