"""What is kept of a card while it lives."""

from __future__ import annotations

import gc
import os

import pytest
from helpers import make_card

from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import CardError
from selfhost.frontend.limits import ResolverLimits
from selfhost.frontend.plans import Plans


@pytest.fixture
def card(files: dict[str, bytes]) -> ModelDeploymentCard:
    """Return a card of three files."""
    return make_card(files, "http://worker:9090/m")


def test_plan_is_made_once_per_card(card: ModelDeploymentCard, files: dict[str, bytes]) -> None:
    """The same object has the same plan, an equal one has its own."""
    plans = Plans(ResolverLimits())
    equal = make_card(files, "http://worker:9090/m")

    assert plans.of(card) is plans.of(card)
    assert plans.of(equal) is not plans.of(card)
    assert plans.of(equal).key == plans.of(card).key == (card.slug, card.mdcsum)


def test_plan_goes_with_its_card(files: dict[str, bytes]) -> None:
    """Cards that nobody has any more take no memory here."""
    plans = Plans(ResolverLimits())
    for number in range(10):
        plans.of(make_card(files, "http://worker:9090/m", name=str(number)))
    gc.collect()

    assert len(plans) == 0


def test_answer_is_made_once_per_directory(card: ModelDeploymentCard, files: dict[str, bytes]) -> None:
    """The localized card is kept, too, as long as the directory is the same."""
    plan = Plans(ResolverLimits()).of(card)

    answer = plan.answer(card, "/cache/one")

    assert plan.answer(card, "/cache/one") is answer
    for local_dir in ("/cache/one", "/cache/two"):
        paths = [file.path for file, _ in plan.answer(card, local_dir).card.iter_metadata_files()]
        assert paths == [os.path.join(local_dir, name) for name in files]


def test_answer_tells_what_was_fetched(card: ModelDeploymentCard, files: dict[str, bytes]) -> None:
    """Names come in the card's order; the next answer is without them."""
    plan = Plans(ResolverLimits()).of(card)
    checksums = {plan.files["notes.txt"], plan.files["config.json"]}

    assert plan.answer(card, "/cache", checksums).fetched == ("config.json", "notes.txt")
    assert plan.answer(card, "/cache").fetched == ()


def test_bad_card_has_no_plan(files: dict[str, bytes]) -> None:
    """A card that asks for what no card may is refused each time."""
    plans = Plans(ResolverLimits(max_files=2))
    card = make_card(files, "http://worker:9090/m")

    for _ in range(2):
        with pytest.raises(CardError):
            plans.of(card)
    assert len(plans) == 0
