"""ModelWatcher: follows a discovery and keeps the files of every published model here, whatever happens.

Each model has a state that can be asked for and a reason to go with it, so that a frontend without models
knows why. A model that fails is tried again for ever, after 1, 2, 4 ... 30 seconds and as soon as another
worker publishes it. Which card counts where workers disagree is decided in `model_groups`.

Threads: one reads the discovery, a few resolve, so a worker that hangs holds up no other model's. They are
daemon threads that `close`, or the interpreter's exit, tells to end. Every method may be called from any
thread. A forked child has none of the threads and is not to use the object: start a watcher after the fork.
"""

from __future__ import annotations

import atexit
import enum
import logging
import os
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Callable, Optional

from ..card.model_card import ModelDeploymentCard
from ..discovery.base import Bucket, Discovery, Event, RecordKey
from ..errors import CardError, DiscoveryError, SelfHostError
from .model_groups import Configuration, GroupKey, ModelGroups
from .resolver import MetadataResolver, ResolvedModel

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # how often a discovery that must be asked is asked
RETRY_SECONDS = (1.0, 30.0)  # the first and the longest wait, doubled in between; as Dynamo 1.6.1 has them
_MAX_DIFFERENCES = 5  # shown of a card that disagrees


class ModelState(str, enum.Enum):
    """What has become of a published model."""

    PENDING = "pending"  # its files are being fetched
    READY = "ready"  # all of them are here, verified
    FAILED = "failed"  # they could not be had; another try follows
    QUARANTINED = "quarantined"  # its card differs from the one that is served for the same endpoint
    GONE = "gone"  # no worker publishes it any more


@dataclass(frozen=True)
class ModelStatus:
    """The state of one configuration of one model; `workers` are the records that publish it.

    A record that holds no card has its key as its name, and no mdcsum.
    """

    name: str
    mdcsum: str
    state: ModelState
    reason: str = ""  # why it failed or waits in quarantine
    workers: tuple[RecordKey, ...] = ()
    model: Optional[ResolvedModel] = None  # when ready
    failures: int = 0  # in a row
    retry_seconds: Optional[float] = None  # from now to the next try, when failed


class _Task:
    """The work on one configuration: what came of it and when it is next due."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.state = ModelState.PENDING
        self.reason = ""
        self.model: Optional[ResolvedModel] = None
        self.failures = 0
        self.due: Optional[float] = None  # monotonic seconds; None: nothing to do
        self.is_running = False


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
        threads: int = 4,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._discovery = discovery
        self._resolver = resolver
        self._on_change = on_change
        self._poll_seconds = poll_seconds
        self._first_retry, self._last_retry = retry_seconds
        self._clock = clock
        self._jitter = jitter
        self._groups = ModelGroups()
        self._tasks: dict[GroupKey, dict[str, _Task]] = {}  # by mdcsum, as `_groups` has them
        self._unreadable: dict[RecordKey, str] = {}  # record without a card -> why
        self._news: deque[ModelStatus] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._delivering = threading.Lock()
        self._stop = threading.Event()
        self._pid = os.getpid()
        work = [self._watch, *[self._resolve_due] * threads]
        self._threads = [threading.Thread(target=run, name="selfhost-watcher", daemon=True) for run in work]

    # -------------------------------------------------------------- life

    def start(self) -> ModelWatcher:
        """Begin to follow the discovery; return self. To be called once."""
        atexit.register(self.close)  # until closed, this keeps the watcher alive
        for thread in self._threads:
            thread.start()
        return self

    def close(self, timeout: float = 5.0) -> None:
        """End the threads, waiting for them up to `timeout` seconds in all; harmless when repeated.

        A download in progress ends by itself, later: within the limits of its transport.
        """
        if self._pid != os.getpid():
            return
        atexit.unregister(self.close)
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

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
                    why = "; ".join(f"{status.state.value} {status.reason}".strip() for status in found)
                    raise TimeoutError(
                        f"{name!r} is not ready after {seconds:g} s: {why or 'nobody publishes it'}"
                    )
                self._changed.wait(left)

    def _all_tasks(self) -> list[_Task]:
        return [task for tasks in self._tasks.values() for task in tasks.values()]

    def _status(self, task: _Task, state: Optional[ModelState] = None) -> ModelStatus:
        place = task.configuration
        has_failed = task.state is ModelState.FAILED and task.due is not None
        return ModelStatus(
            place.group.name,
            place.mdcsum,
            state or task.state,
            task.reason,
            tuple(place.cards),
            task.model,
            task.failures,
            max(0.0, task.due - self._clock()) if has_failed and task.due is not None else None,
        )

    def _unreadable_status(self, key: RecordKey) -> ModelStatus:
        return ModelStatus(str(key), "", ModelState.FAILED, self._unreadable[key], (key,))

    # -------------------------------------------------------------- the discovery's thread

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self._forget_withdrawn()
                for event in self._discovery.watch(
                    Bucket.MODELS, stop=self._stop, poll_seconds=self._poll_seconds
                ):
                    self._apply(event)
            except DiscoveryError as error:
                logger.warning("cannot follow the discovery, trying again: %s", error)
            self._stop.wait(self._poll_seconds)

    def _forget_withdrawn(self) -> None:
        """After an interruption: a new watch tells what is there, but not what went away meanwhile."""
        with self._changed:
            known = self._groups.records() | set(self._unreadable)
        if known:
            for key in known - set(self._discovery.records(Bucket.MODELS)):
                self._apply(Event("removed", Bucket.MODELS, key, ""))

    def _apply(self, event: Event) -> None:
        record = event.key
        with self._changed:
            self._unreadable.pop(record, None)
            touched = {self._groups.group_of(record)}
            try:
                if event.kind == "removed":
                    self._groups.remove(record)
                else:
                    self._groups.put(record, ModelDeploymentCard.from_record(event.text))
            except CardError as error:
                self._groups.remove(record)
                self._unreadable[record] = str(error)
                logger.warning("the record %s holds no usable card: %s", record, error)
                self._news.append(self._unreadable_status(record))
            touched.add(self._groups.group_of(record))
            for group in touched:
                if group is not None:
                    self._settle(group, record)
            self._changed.notify_all()
        self._deliver()

    def _settle(self, group: GroupKey, changed: RecordKey) -> None:
        """Bring a group's tasks in line with it, after the record `changed` came, changed or went."""
        places = self._groups.configurations(group)
        tasks = self._tasks.setdefault(group, {})
        for gone in [mdcsum for mdcsum in tasks if mdcsum not in places]:
            task = tasks.pop(gone)
            task.model = None
            self._news.append(self._status(task, ModelState.GONE))
        for number, (mdcsum, place) in enumerate(places.items()):
            is_new = mdcsum not in tasks
            task = tasks.setdefault(mdcsum, _Task(place))
            if number and is_new:
                self._quarantine(task, next(iter(places.values())).card)
            elif not number and (is_new or task.state is ModelState.QUARANTINED):
                self._begin(task)
            elif task.state is ModelState.FAILED and changed in place.cards:
                task.due = self._clock()  # another worker may have what was missing
        if not tasks:
            del self._tasks[group]

    def _begin(self, task: _Task) -> None:
        task.state, task.reason, task.due = ModelState.PENDING, "", self._clock()
        self._news.append(self._status(task))

    def _quarantine(self, task: _Task, served: ModelDeploymentCard) -> None:
        place = task.configuration
        differences = [str(one) for one in served.diff(place.card)]
        more = ["..."] * (len(differences) > _MAX_DIFFERENCES)
        task.state = ModelState.QUARANTINED
        task.reason = "its card differs from the one that is served: " + "; ".join(
            differences[:_MAX_DIFFERENCES] + more
        )
        logger.warning("%r of %s is not used: %s", place.group.name, next(iter(place.cards)), task.reason)
        self._news.append(self._status(task))

    # -------------------------------------------------------------- the resolving threads

    def _resolve_due(self) -> None:
        while True:
            task = self._next_task()
            if task is None:
                return
            self._resolve(task)
            self._deliver()

    def _next_task(self) -> Optional[_Task]:
        """Wait for a task that is due and take it; None when the watcher ends."""
        with self._changed:
            while not self._stop.is_set():
                waiting = [task for task in self._all_tasks() if task.due is not None and not task.is_running]
                first = min(waiting, key=lambda task: task.due or 0.0, default=None)
                left = None if first is None or first.due is None else first.due - self._clock()
                if first is not None and left is not None and left <= 0:
                    first.is_running, first.due = True, None
                    return first
                self._changed.wait(left)
            return None

    def _resolve(self, task: _Task) -> None:
        with self._changed:
            place = task.configuration
            if not place.cards:  # withdrawn meanwhile
                return
            card, replicas = place.card, place.replicas
        model, reason = None, ""
        try:
            model = self._resolver.resolve(card, replicas=replicas)
        except SelfHostError as error:
            reason = str(error)
        except Exception as error:  # a defect, or a resolver that was closed: this thread must not die of it
            reason = f"{type(error).__name__}: {error}"
            logger.exception("resolving %r failed unexpectedly", place.group.name)
        with self._changed:
            self._conclude(task, model, reason)
            self._changed.notify_all()

    def _conclude(self, task: _Task, model: Optional[ResolvedModel], reason: str) -> None:
        place = task.configuration
        task.is_running = False
        if self._tasks.get(place.group, {}).get(place.mdcsum) is not task:  # withdrawn meanwhile
            return
        task.model, task.reason = model, reason
        if model is not None:
            task.state, task.failures, task.due = ModelState.READY, 0, None
            logger.info("model %r is ready in %s", place.group.name, model.local_dir)
        else:
            task.failures += 1
            seconds = self._retry_seconds(task.failures)
            task.state = ModelState.FAILED
            task.due = self._clock() + seconds if task.due is None else task.due  # a new worker set one
            logger.warning("model %r failed, next try in %.1f s: %s", place.group.name, seconds, reason)
        self._news.append(self._status(task))

    def _retry_seconds(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row: up to half as long again, by chance."""
        seconds = self._first_retry * 2.0 ** min(failures - 1, 10)
        return min(seconds, self._last_retry) * (1.0 + self._jitter() / 2)

    # -------------------------------------------------------------- news

    def _deliver(self) -> None:
        """Tell `on_change` the news, unless another thread is at it, which will then tell ours too."""
        while self._news and self._delivering.acquire(blocking=False):
            try:
                while self._news:
                    self._tell(self._news.popleft())
            finally:
                self._delivering.release()

    def _tell(self, status: ModelStatus) -> None:
        if self._on_change is not None:
            try:
                self._on_change(status)
            except Exception:
                logger.exception("on_change failed for %r", status.name)
