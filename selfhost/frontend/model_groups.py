"""Which of the published cards a frontend serves: pure rules over records that come and go.

Workers that publish one model at one kind of endpoint form a group. Within it the configuration that came
first is the incumbent; workers with an equal card (by mdcsum) are its replicas. A card that differs waits in
quarantine: it never takes the incumbent's place while that has a worker, and the oldest one waiting takes
over when the last of them is gone. (Dynamo 1.6.1 decides so, too.) Nothing here knows of time or threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from ..card.model_card import ModelDeploymentCard
from ..discovery.base import RecordKey


class GroupKey(NamedTuple):
    """What the workers of one group have in common."""

    name: str  # the model's display name
    namespace: str
    component: str
    endpoint: str
    model_type: str
    worker_type: Optional[str]

    @classmethod
    def of(cls, record: RecordKey, card: ModelDeploymentCard) -> GroupKey:
        """Return the group that a worker with this card belongs to."""
        worker = None if card.worker_type is None else card.worker_type.value
        place = (record.namespace, record.component, record.endpoint)
        return cls(card.display_name, *place, str(card.model_type), worker)


@dataclass
class Configuration:
    """One card and the workers that publish it, oldest first."""

    group: GroupKey
    mdcsum: str
    cards: dict[RecordKey, ModelDeploymentCard] = field(default_factory=dict)

    @property
    def card(self) -> ModelDeploymentCard:
        """The card of the oldest worker; the others' differ from it in URLs at most."""
        return next(iter(self.cards.values()))

    @property
    def replicas(self) -> list[ModelDeploymentCard]:
        """The cards of the other workers."""
        return list(self.cards.values())[1:]


class ModelGroups:
    """All configurations of all groups. Not for several threads at once."""

    def __init__(self) -> None:
        self._groups: dict[GroupKey, dict[str, Configuration]] = {}  # by mdcsum, the incumbent first
        self._places: dict[RecordKey, Configuration] = {}

    def put(self, record: RecordKey, card: ModelDeploymentCard) -> Configuration:
        """Add a worker or change its card; return the configuration that it now belongs to."""
        group, mdcsum = GroupKey.of(record, card), card.mdcsum
        before = self._places.get(record)
        if before is not None and (before.group, before.mdcsum) != (group, mdcsum):
            self.remove(record)
        configurations = self._groups.setdefault(group, {})
        place = configurations.setdefault(mdcsum, Configuration(group, mdcsum))
        place.cards[record] = card
        self._places[record] = place
        return place

    def remove(self, record: RecordKey) -> None:
        """Take a worker away, and what had no other one; harmless for one that is not known."""
        place = self._places.pop(record, None)
        if place is None:
            return
        del place.cards[record]
        configurations = self._groups[place.group]
        if not place.cards:
            del configurations[place.mdcsum]
        if not configurations:
            del self._groups[place.group]

    def group_of(self, record: RecordKey) -> Optional[GroupKey]:
        """Return the group of a worker, None for one that is not known."""
        place = self._places.get(record)
        return None if place is None else place.group

    def configurations(self, group: GroupKey) -> Mapping[str, Configuration]:
        """Return a group's configurations by mdcsum, the incumbent first."""
        return self._groups.get(group, {})

    def records(self) -> set[RecordKey]:
        """Return the keys of all workers."""
        return set(self._places)
