"""The work of a watcher on one configuration of a model: what came of it, and when it is next due."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable
from typing import Optional

from .model_groups import Configuration
from .model_status import ModelState
from .plans import ResolvedModel

NEVER = math.inf


class ModelTask:
    """The work on one configuration. Not for several threads at once."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.state = ModelState.PENDING
        self.reason = ""
        self.model: Optional[ResolvedModel] = None
        self.failures = 0  # in a row
        self.due = NEVER  # seconds on the watcher's clock
        self.stop: Optional[threading.Event] = None  # while a thread is at it: ends that
        self.hold = contextlib.ExitStack()  # keeps the model's directory, when ready

    def end(self) -> None:
        """End what a thread does for it, and what it holds."""
        if self.stop is not None:
            self.stop.set()
        self.hold.close()


def most_urgent(tasks: Iterable[ModelTask], now: float) -> Optional[ModelTask]:
    """Return the task that is due and goes first: one that was not tried yet, or what waits for longest."""
    due = [task for task in tasks if task.due <= now]
    return min(due, key=lambda task: (task.state is not ModelState.PENDING, task.due), default=None)
