"""Which configuration of a model is served while workers come, go and disagree."""

from __future__ import annotations

from dataclasses import replace

from selfhost import ModelDeploymentCard, WorkerType
from selfhost.discovery import RecordKey
from selfhost.frontend.model_groups import GroupKey, ModelGroups

CARD = ModelDeploymentCard("m", context_length=1)
OTHER = replace(CARD, context_length=2)


def record(number: int, endpoint: str = "generate") -> RecordKey:
    """Return the key of a worker's record."""
    return RecordKey("ns", "worker", endpoint, number)


def group_of(card: ModelDeploymentCard, endpoint: str = "generate") -> GroupKey:
    """Return the group of the workers with this card."""
    return GroupKey.of(record(0, endpoint), card)


def served(groups: ModelGroups, card: ModelDeploymentCard) -> list[str]:
    """Return the mdcsums of a card's group, the served one first."""
    return list(groups.configurations(group_of(card)))


def test_equal_cards_are_replicas() -> None:
    """Workers with one card are one configuration, the oldest first."""
    groups = ModelGroups()
    groups.put(record(2), CARD)
    place = groups.put(record(1), CARD)

    assert list(place.cards) == [record(2), record(1)]
    assert (place.card, place.replicas) == (CARD, [CARD])


def test_first_card_is_served() -> None:
    """A card that differs waits behind the one that came first."""
    groups = ModelGroups()
    groups.put(record(1), CARD)
    groups.put(record(2), OTHER)

    assert served(groups, CARD) == [CARD.mdcsum, OTHER.mdcsum]


def test_oldest_waiting_card_takes_over() -> None:
    """When the last worker of the served card leaves, the card that waited longest is served."""
    groups = ModelGroups()
    third = replace(CARD, context_length=3)
    for number, card in enumerate((CARD, CARD, OTHER, third)):
        groups.put(record(number), card)
    groups.remove(record(0))
    still_served = served(groups, CARD)[0]
    groups.remove(record(1))

    assert still_served == CARD.mdcsum
    assert served(groups, CARD) == [OTHER.mdcsum, third.mdcsum]


def test_worker_that_changes_its_card_moves() -> None:
    """A worker is in one configuration only: that of its last card."""
    groups = ModelGroups()
    groups.put(record(1), CARD)
    groups.put(record(1), OTHER)

    assert served(groups, CARD) == [OTHER.mdcsum]


def test_worker_that_repeats_its_card_keeps_its_place() -> None:
    """The same card again changes nothing, so a second look at a store does no harm."""
    groups = ModelGroups()
    for number in (1, 2, 1):
        groups.put(record(number), CARD)

    assert list(groups.configurations(group_of(CARD))[CARD.mdcsum].cards) == [record(1), record(2)]


def test_endpoints_and_kinds_are_groups_of_their_own() -> None:
    """Different cards at different endpoints, or of different worker types, do not disagree."""
    groups = ModelGroups()
    prefill = replace(CARD, worker_type=WorkerType.Prefill)
    groups.put(record(1), CARD)
    groups.put(record(2, "other"), OTHER)
    groups.put(record(3), prefill)

    assert served(groups, CARD) == [CARD.mdcsum]
    assert list(groups.configurations(group_of(OTHER, "other"))) == [OTHER.mdcsum]
    assert served(groups, prefill) == [prefill.mdcsum]


def test_nothing_is_left_of_what_went() -> None:
    """Removing every worker leaves no group, no record; removing a stranger is harmless."""
    groups = ModelGroups()
    groups.put(record(1), CARD)
    groups.remove(record(1))
    groups.remove(record(9))

    assert groups.records() == set()
    assert served(groups, CARD) == []
    assert groups.group_of(record(1)) is None
