"""ModelWatcher: follows a discovery and keeps the files of every published model here, whatever happens.

Each model has a state that can be asked for and a reason to go with it, so that a frontend without models
knows why. A model that fails is tried again for ever, after 1, 2, 4 ... 30 seconds and as soon as another
worker publishes it. Which card counts where workers disagree is decided in `model_groups`.

A ready model stays: its directory is held against garbage collection, of any process, until the model is
withdrawn or the watcher closed, which costs one descriptor for each. A directory that goes or changes all the
same is noticed within a minute, and fetched again.

Threads: one reads the discovery, and as many as are needed resolve, 16 at most. A model that was not tried
yet goes before those that failed; it waits only while 16 others are being resolved at the same time. They are
daemon threads that `close`, or the interpreter's exit, ends: what they fetch is given up at its next piece.
The host's signals do not reach them, but they do reach a process that `on_change` launches.
Every method may be called from any thread. A forked child has none of the threads and is not to use the
object: start a watcher after the fork.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from typing import Callable, Optional, Union

from .._threads import log_safely
from ..card.model_card import ModelDeploymentCard
from ..discovery.base import Discovery, Event, RecordKey
from ..errors import CardError, DiscoveryError, SelfHostError
from .following import Follower
from .leader_threads import LeaderThreads
from .model_groups import GroupKey, ModelGroups
from .model_status import ModelState, ModelStatus, News
from .model_tasks import NEVER, ModelTask, most_urgent
from .resolver import MetadataResolver, ResolvedModel
from .waits import SHORT_SECONDS

__all__ = ["ModelState", "ModelStatus", "ModelWatcher"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # how often a discovery that must be asked is asked: a store at rest costs it one stat
RETRY_SECONDS = (1.0, 30.0)  # the first and the longest wait, doubled in between; as Dynamo 1.6.1 has them
CHECK_SECONDS = 60.0  # from one look at a ready model to the next: 0.1 ms each, and it counts as a use
EXIT_SECONDS = 1.0  # for which the interpreter's exit waits for the threads
_MAX_DIFFERENCES = 5  # shown of a card that disagrees


class ModelWatcher:
    """Keeps every model of a discovery resolved; a context manager, see the module's docstring.

    `on_change` is called with each new status, one call at a time, in the order of the changes, from the
    watcher's threads; what it raises is logged. The discovery and the resolver stay the caller's.
    """

    def __init__(
        self,
        discovery: Discovery,
        resolver: MetadataResolver,
        *,
        on_change: Optional[Callable[[ModelStatus], None]] = None,
        poll_seconds: float = POLL_SECONDS,
        retry_seconds: tuple[float, float] = RETRY_SECONDS,
        check_seconds: float = CHECK_SECONDS,
        threads: int = 16,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._discovery = discovery
        self._resolver = resolver
        self._first_retry, self._last_retry = retry_seconds
        self._check_seconds = check_seconds
        self._clock = clock
        self._jitter = jitter
        self._groups = ModelGroups()
        self._tasks: dict[GroupKey, dict[str, ModelTask]] = {}  # by mdcsum, as `_groups` has them
        self._unreadable: dict[RecordKey, str] = {}  # record without a card -> why
        self._news = News(on_change)
        self._changed = threading.Condition(threading.RLock())
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._following = Follower(
            discovery,
            apply=self._apply,
            known=self._known_records,
            stop=self._stop,
            poll_seconds=poll_seconds,
            retry_seconds=self._retry_seconds,
        )
        self._resolving = LeaderThreads(
            self._next_task, self._resolve, most=threads, name="selfhost-watcher-resolve"
        )

    # -------------------------------------------------------------- life

    def start(self) -> ModelWatcher:
        """Begin to follow the discovery; return self. To be called once.

        Raises DiscoveryError where the system has no threads to give; nothing runs then.
        """
        atexit.register(self._close_at_exit)  # until closed, this keeps the watcher alive
        try:
            self._resolving.start()
            self._following.start()
        except RuntimeError as error:
            self.close()
            message = f"cannot watch for models: {error}; the process is at its limit (ulimit -u)"
            raise DiscoveryError(message, backend=self._discovery.name) from error
        return self

    def close(self, timeout: float = 5.0) -> None:
        """End the threads and what they fetch, waiting up to `timeout` seconds in all.

        Harmless when repeated. Models are no longer held. A thread that waits for a silent origin ends later,
        within the limits of its transport.
        """
        if self._pid != os.getpid():
            return
        atexit.unregister(self._close_at_exit)
        self._stop.set()
        with self._changed:
            for task in self._all_tasks():
                task.end()
            self._changed.notify_all()
        deadline = time.monotonic() + timeout
        self._following.join(timeout)
        self._resolving.join(deadline - time.monotonic())

    def _close_at_exit(self) -> None:
        self.close(EXIT_SECONDS)

    def __enter__(self) -> ModelWatcher:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------- what there is

    def models(self) -> tuple[ModelStatus, ...]:
        """Return the status of everything that is published, each group's served configuration first."""
        with self._changed:
            unreadable = [self._unreadable_status(key) for key in self._unreadable]
            return (*(self._status(task) for task in self._all_tasks()), *unreadable)

    def counts(self) -> dict[ModelState, int]:
        """Return how many models are in each state; there is none that is gone."""
        found = Counter(status.state for status in self.models())
        return {state: found[state] for state in ModelState if state is not ModelState.GONE}

    def wait_ready(self, name: str, seconds: float) -> ResolvedModel:
        """Return the model of that name once it is ready; TimeoutError, saying what is the matter."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                found = [status for status in self.models() if status.name == name]
                ready = next((status.model for status in found if status.model is not None), None)
                if ready is not None:
                    return ready
                left = deadline - time.monotonic()
                if left <= 0 or self._stop.is_set():
                    why = "; ".join(": ".join(filter(None, (one.state.value, one.reason))) for one in found)
                    raise TimeoutError(
                        f"{name!r} is not ready after {seconds:g} s: {why or 'nobody publishes it'}"
                    )
                self._changed.wait(min(left, SHORT_SECONDS))

    def _all_tasks(self) -> list[ModelTask]:
        return [task for tasks in self._tasks.values() for task in tasks.values()]

    def _status(self, task: ModelTask, state: Optional[ModelState] = None) -> ModelStatus:
        place = task.configuration
        waits = task.state is ModelState.FAILED and task.due != NEVER
        return ModelStatus(
            place.group.name,
            place.mdcsum,
            state or task.state,
            task.reason,
            tuple(place.cards),
            task.model,
            task.failures,
            max(0.0, task.due - self._clock()) if waits else None,
        )

    def _unreadable_status(self, key: RecordKey) -> ModelStatus:
        return ModelStatus(str(key), "", ModelState.FAILED, self._unreadable[key], (key,))

    # -------------------------------------------------------------- the discovery's thread

    def _known_records(self) -> set[RecordKey]:
        with self._changed:
            return self._groups.records() | set(self._unreadable)

    def _apply(self, event: Event) -> None:
        record = event.key
        with self._changed:
            self._unreadable.pop(record, None)
            touched = {self._groups.group_of(record)}
            if event.kind == "removed":
                self._groups.remove(record)
            else:
                self._put(record, event.text)
            touched.add(self._groups.group_of(record))
            for group in touched:
                if group is not None:
                    self._settle(group, record)
            self._changed.notify_all()
        self._news.deliver()

    def _put(self, record: RecordKey, text: str) -> None:
        """Take a record's card in, or note why it is none."""
        try:
            self._groups.put(record, ModelDeploymentCard.from_record(text))
        except Exception as error:  # noqa: BLE001 - told as the record's failure
            if isinstance(error, CardError):
                log_safely(logger, logging.WARNING, "the record %s holds no usable card: %s", record, error)
            else:  # a defect: the next record may be as good as ever
                what = "reading the record %s failed unexpectedly"
                log_safely(logger, logging.ERROR, what, record, exc_info=True)
            self._groups.remove(record)
            self._unreadable[record] = _reason(error)
            self._news.add(self._unreadable_status(record))

    def _settle(self, group: GroupKey, changed: RecordKey) -> None:
        """Bring a group's tasks in line with it, after the record `changed` came, changed or went."""
        places = self._groups.configurations(group)
        tasks = self._tasks.setdefault(group, {})
        for gone in [mdcsum for mdcsum in tasks if mdcsum not in places]:
            task = tasks.pop(gone)
            task.end()
            task.model = None
            self._news.add(self._status(task, ModelState.GONE))
        for number, (mdcsum, place) in enumerate(places.items()):
            is_new = mdcsum not in tasks
            task = tasks.setdefault(mdcsum, ModelTask(place))
            if number and is_new:
                self._quarantine(task, next(iter(places.values())).card)
            elif not number and (is_new or task.state is ModelState.QUARANTINED):
                self._begin(task)
            elif task.state is ModelState.FAILED and changed in place.cards:
                task.due = self._clock()  # another worker may have what was missing
        if not tasks:
            del self._tasks[group]

    def _begin(self, task: ModelTask) -> None:
        task.state, task.reason, task.due = ModelState.PENDING, "", self._clock()
        self._news.add(self._status(task))

    def _quarantine(self, task: ModelTask, served: ModelDeploymentCard) -> None:
        place = task.configuration
        differences = [str(one) for one in served.diff(place.card)]
        more = ["..."] * (len(differences) > _MAX_DIFFERENCES)
        task.state = ModelState.QUARANTINED
        task.reason = "its card differs from the one that is served: " + "; ".join(
            differences[:_MAX_DIFFERENCES] + more
        )
        who = next(iter(place.cards))
        log_safely(logger, logging.WARNING, "%r of %s is not used: %s", place.group.name, who, task.reason)
        self._news.add(self._status(task))

    # -------------------------------------------------------------- the resolving threads

    def _next_task(self) -> Optional[ModelTask]:
        """Wait for a task that is due and take it; None when the watcher ends."""
        with self._changed:
            while not self._stop.is_set():
                idle = [task for task in self._all_tasks() if task.stop is None]
                now = self._clock()
                task = most_urgent(idle, now)
                if task is not None:
                    task.due, task.stop = NEVER, threading.Event()
                    return task
                next_due = min((task.due for task in idle), default=NEVER)
                self._changed.wait(None if next_due == NEVER else next_due - now)
            return None

    def _resolve(self, task: ModelTask) -> None:
        place, stop = task.configuration, task.stop
        with self._changed:
            if not place.cards or stop is None:  # withdrawn meanwhile
                return
            card, replicas = place.card, place.replicas
        hold = contextlib.ExitStack()
        outcome: Union[ResolvedModel, BaseException]
        try:
            outcome = self._resolver.resolve(card, replicas=replicas, stop=stop)
            hold.enter_context(self._resolver.cache.hold(outcome.local_dir))
        except BaseException as error:  # noqa: BLE001 - told as the model's failure
            outcome = error
        with self._changed:
            self._conclude(task, outcome, hold)
            self._changed.notify_all()
        self._news.deliver()

    def _conclude(
        self,
        task: ModelTask,
        outcome: Union[ResolvedModel, BaseException],
        hold: contextlib.ExitStack,
    ) -> None:
        place = task.configuration
        task.stop = None
        is_withdrawn = self._tasks.get(place.group, {}).get(place.mdcsum) is not task
        if is_withdrawn or self._stop.is_set():
            hold.close()
            return
        task.hold.close()
        task.hold = hold
        if isinstance(outcome, ResolvedModel):
            self._succeed(task, outcome)
        else:
            self._fail(task, outcome)

    def _succeed(self, task: ModelTask, model: ResolvedModel) -> None:
        name = task.configuration.group.name
        task.due = self._clock() + self._check_seconds
        if task.state is ModelState.READY and task.model is not None:
            if not model.fetched and model.local_dir == task.model.local_dir:
                return  # as it was
            what = "files of the model %r were gone or changed, fetched again: %s"
            log_safely(logger, logging.WARNING, what, name, model.fetched)
        task.state, task.model, task.reason, task.failures = ModelState.READY, model, "", 0
        log_safely(logger, logging.INFO, "model %r is ready in %s", name, model.local_dir)
        self._news.add(self._status(task))

    def _fail(self, task: ModelTask, error: BaseException) -> None:
        name = task.configuration.group.name
        if not isinstance(error, SelfHostError):  # a defect, or the resolver was closed
            log_safely(logger, logging.ERROR, "resolving %r failed unexpectedly", name, exc_info=error)
        task.failures += 1
        task.state, task.model, task.reason = ModelState.FAILED, None, _reason(error)
        seconds = self._retry_seconds(task.failures)
        task.due = min(task.due, self._clock() + seconds)  # a new worker may have set one
        what = "model %r failed, next try in %.1f s: %s"
        log_safely(logger, logging.WARNING, what, name, seconds, task.reason)
        self._news.add(self._status(task))

    def _retry_seconds(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row: up to half as long again, by chance."""
        seconds = self._first_retry * 2.0 ** min(failures - 1, 10)
        return min(seconds, self._last_retry) * (1.0 + self._jitter() / 2)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, SelfHostError) else f"{type(error).__name__}: {error}"
