"""What a card means to a resolver, worked out once while the card lives.

To find a model in the cache takes the name of its directory (the card's checksum) and those of its files, to
answer a copy of the card with local paths. For eight files that costs 60 and 40 us, twice the look into the
cache. Cards do not change, so both are kept as long as the card is. Any number of threads may share plans.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Optional

from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from .cache import ModelKey
from .limits import ResolverLimits
from .wanted import wanted_by


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this disk: the card with local paths, and the directory that holds all of its files."""

    card: ModelDeploymentCard
    local_dir: str
    fetched: tuple[str, ...] = ()  # names of the files that came from a source, not from the cache


class Plan:
    """One card: its place in the cache, what it asks for, and the answer to it once that is there."""

    def __init__(self, card: ModelDeploymentCard, limits: ResolverLimits) -> None:
        wanted = wanted_by(card, limits)
        self.key = ModelKey(card.slug, card.mdcsum)
        self.name = card.display_name
        self.files = wanted.files
        self._names = wanted.names
        self.blobs = wanted.blobs
        self._answer: Optional[ResolvedModel] = None

    def answer(
        self, card: ModelDeploymentCard, local_dir: str, fetched: Collection[Checksum] = ()
    ) -> ResolvedModel:
        """Return the card with its files in `local_dir`, and the names of those that were fetched for it."""
        answer = self._answer
        if answer is None or answer.local_dir != local_dir:
            self._answer = answer = ResolvedModel(self._localized(card, local_dir), local_dir)
        if not fetched:
            return answer
        return replace(answer, fetched=self._names_of(fetched))

    def _localized(self, card: ModelDeploymentCard, local_dir: str) -> ModelDeploymentCard:
        names = iter(self._names)  # which come in the order in which the files are mapped
        return card.map_files(lambda file: file.move_to_disk(os.path.join(local_dir, next(names))))

    def _names_of(self, checksums: Collection[Checksum]) -> tuple[str, ...]:
        return tuple(name for name, checksum in self.files.items() if checksum in checksums)


class Plans:
    """The plans of all cards that are alive and were asked for."""

    def __init__(self, limits: ResolverLimits) -> None:
        self._limits = limits
        self._plans: dict[int, tuple[weakref.ref[ModelDeploymentCard], Plan]] = {}  # by the card's identity

    def of(self, card: ModelDeploymentCard) -> Plan:
        """Return the plan of a card; raise CardError as `wanted_by` does."""
        key, plans = id(card), self._plans
        reference, plan = plans.get(key, (None, None))
        if plan is None or reference is None or reference() is not card:
            plan = Plan(card, self._limits)
            plans[key] = weakref.ref(card, lambda _: plans.pop(key, None)), plan
        return plan

    def __len__(self) -> int:
        return len(self._plans)
