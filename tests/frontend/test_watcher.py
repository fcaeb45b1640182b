"""The watcher: every published model has a state, a reason and, in the end, its files."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Callable, Optional

import pytest

from selfhost import ModelDeploymentCard
from selfhost.discovery import Bucket, Event, MemoryDiscovery, RecordKey, model_record
from selfhost.discovery.base import watch_snapshots
from selfhost.errors import DiscoveryError, FetchError, ResolveError
from selfhost.frontend.resolver import ResolvedModel
from selfhost.frontend.watcher import ModelState, ModelStatus, ModelWatcher

CARD = ModelDeploymentCard("m", context_length=1)
OTHER = replace(CARD, context_length=2)
SECONDS = 10.0  # for what takes milliseconds unless it is broken


class FakeResolver:
    """Resolves at once, unless told to fail or to hang; remembers what it was asked."""

    def __init__(self) -> None:
        self.failing: set[str] = set()  # display names
        self.hanging: dict[str, threading.Event] = {}
        self.asked: list[tuple[str, int]] = []  # display name, number of replicas

    def resolve(
        self, card: ModelDeploymentCard, *, replicas: Any = (), progress: Any = None
    ) -> ResolvedModel:
        """Answer as told for this card's name."""
        self.asked.append((card.display_name, len(list(replicas))))
        if card.display_name in self.hanging:
            assert self.hanging[card.display_name].wait(SECONDS)
        if card.display_name in self.failing:
            raise ResolveError("no source has config.json", file="config.json")
        return ResolvedModel(card, f"/cache/{card.mdcsum}", ())


class Statuses(list[ModelStatus]):
    """What `on_change` was told; lets a test wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def __call__(self, status: ModelStatus) -> None:
        """Be an `on_change`."""
        with self._changed:
            self.append(status)
            self._changed.notify_all()

    def wait_for(self, state: ModelState, name: str = "m", mdcsum: Optional[str] = None) -> ModelStatus:
        """Return the newest status with that state, name and sum, once there is one."""

        def found() -> Optional[ModelStatus]:
            wanted = (state, name)
            matching = (one for one in reversed(self) if (one.state, one.name) == wanted)
            return next((one for one in matching if mdcsum in (None, one.mdcsum)), None)

        with self._changed:
            assert self._changed.wait_for(found, SECONDS), [(one.name, one.state) for one in self]
            status = found()
            assert status is not None
            return status


@pytest.fixture
def discovery() -> Iterator[MemoryDiscovery]:
    """Return a discovery of this test's own."""
    with MemoryDiscovery() as opened:
        yield opened


@pytest.fixture
def resolver() -> FakeResolver:
    """Return a resolver that touches no disk and no network."""
    return FakeResolver()


@pytest.fixture
def statuses() -> Statuses:
    """Return the list of what changed."""
    return Statuses()


@pytest.fixture
def publish(discovery: MemoryDiscovery) -> Callable[..., Any]:
    """Publish a card as the worker of a number."""

    def publish_card(card: ModelDeploymentCard, number: int = 1) -> Any:
        key = RecordKey("ns", "worker", "generate", number)
        return discovery.publish(Bucket.MODELS, key, model_record(key, card.to_json()))

    return publish_card


@pytest.fixture
def watcher(discovery: MemoryDiscovery, resolver: FakeResolver, statuses: Statuses) -> Iterator[ModelWatcher]:
    """Return a running watcher whose failures are retried after 10 ms."""
    before = threading.active_count()
    quick = {"poll_seconds": 0.01, "retry_seconds": (0.01, 0.02)}
    with ModelWatcher(discovery, resolver, on_change=statuses, **quick) as watching:  # type: ignore[arg-type]
        yield watching
    assert threading.active_count() == before


def test_published_model_becomes_ready(watcher: ModelWatcher, publish: Any, statuses: Statuses) -> None:
    """A model is pending, then ready, with the directory of its files."""
    publish(CARD)
    status = statuses.wait_for(ModelState.READY)

    assert [one.state for one in statuses] == [ModelState.PENDING, ModelState.READY]
    assert status.model is not None
    assert status.model.local_dir == f"/cache/{CARD.mdcsum}"
    assert [one.state for one in watcher.models()] == [ModelState.READY]


def test_withdrawn_model_is_gone(watcher: ModelWatcher, publish: Any, statuses: Statuses) -> None:
    """When the last worker withdraws its record, the model is told as gone and no longer listed."""
    record = publish(CARD)
    statuses.wait_for(ModelState.READY)
    record.withdraw()
    status = statuses.wait_for(ModelState.GONE)

    assert status.model is None
    assert watcher.models() == ()


def test_failure_is_seen_and_tried_again(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """A model that fails says why, is tried again until it works, and then forgets its failures."""
    resolver.failing.add("m")
    publish(CARD)
    failed = statuses.wait_for(ModelState.FAILED)
    resolver.failing.clear()
    ready = statuses.wait_for(ModelState.READY)

    assert failed.failures >= 1
    assert failed.retry_seconds is not None
    assert failed.reason == "no source has config.json"
    assert (ready.failures, ready.reason, ready.retry_seconds) == (0, "", None)


def test_new_replica_is_tried_at_once(
    discovery: MemoryDiscovery, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """Another worker with the same card does not wait for the failed one's next turn."""
    resolver.failing.add("m")
    slow = {"poll_seconds": 0.01, "retry_seconds": (3600.0, 3600.0)}
    with ModelWatcher(discovery, resolver, on_change=statuses, **slow):  # type: ignore[arg-type]
        publish(CARD, 1)
        statuses.wait_for(ModelState.FAILED)
        resolver.failing.clear()
        publish(CARD, 2)
        ready = statuses.wait_for(ModelState.READY)

    assert resolver.asked == [("m", 0), ("m", 1)]
    assert len(ready.workers) == 2


def test_card_that_differs_is_quarantined(watcher: ModelWatcher, publish: Any, statuses: Statuses) -> None:
    """The incumbent goes on being served; the newcomer says in which field it differs."""
    publish(CARD, 1)
    statuses.wait_for(ModelState.READY)
    publish(OTHER, 2)
    status = statuses.wait_for(ModelState.QUARANTINED)

    assert "context_length: ours 1, theirs 2" in status.reason
    assert [one.state for one in watcher.models()] == [ModelState.READY, ModelState.QUARANTINED]


def test_quarantined_card_takes_over(watcher: ModelWatcher, publish: Any, statuses: Statuses) -> None:
    """When the incumbent's last worker is gone, the card that waited is resolved and served."""
    first = publish(CARD, 1)
    statuses.wait_for(ModelState.READY)
    publish(OTHER, 2)
    statuses.wait_for(ModelState.QUARANTINED)
    first.withdraw()

    assert statuses.wait_for(ModelState.READY, mdcsum=OTHER.mdcsum).reason == ""
    assert [one.mdcsum for one in watcher.models()] == [OTHER.mdcsum]


def test_record_without_card_is_told(
    watcher: ModelWatcher, discovery: MemoryDiscovery, publish: Any, statuses: Statuses
) -> None:
    """A record that holds no card is a failure with its key as name; other models are not touched by it."""
    key = RecordKey("ns", "worker", "generate", 7)
    record = discovery.publish(Bucket.MODELS, key, '{"card_json": {"display_name": 5}}')
    status = statuses.wait_for(ModelState.FAILED, name=str(key))
    publish(CARD)
    statuses.wait_for(ModelState.READY)
    record.withdraw()

    assert "display_name" in status.reason
    assert wait_until(lambda: len(watcher.models()) == 1)


def test_hanging_model_holds_up_no_other(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """While one model's worker hangs, another model becomes ready."""
    resolver.hanging["m"] = threading.Event()
    publish(CARD, 1)
    publish(replace(CARD, display_name="n"), 2)
    statuses.wait_for(ModelState.READY, name="n")

    assert [one.state for one in statuses if one.name == "m"] == [ModelState.PENDING]
    resolver.hanging["m"].set()
    statuses.wait_for(ModelState.READY)


def test_model_withdrawn_while_it_is_resolved(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """What comes of a model that is gone meanwhile is told to nobody."""
    resolver.hanging["m"] = threading.Event()
    record = publish(CARD)
    assert wait_until(lambda: resolver.asked)
    record.withdraw()
    statuses.wait_for(ModelState.GONE)
    resolver.hanging["m"].set()
    publish(replace(CARD, display_name="n"), 2)
    statuses.wait_for(ModelState.READY, name="n")

    assert ModelState.READY not in [one.state for one in statuses if one.name == "m"]


def test_unexpected_exception_is_a_failure(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver, caplog: Any
) -> None:
    """A defect below is told as the model's failure, and logged; the threads go on."""
    resolver.hanging["m"] = None  # type: ignore[assignment]  # which cannot be waited for
    publish(CARD)
    status = statuses.wait_for(ModelState.FAILED)
    del resolver.hanging["m"]
    statuses.wait_for(ModelState.READY)

    assert status.reason.startswith("AttributeError")
    assert "failed unexpectedly" in caplog.text


def test_callback_that_raises_is_logged(
    discovery: MemoryDiscovery, resolver: FakeResolver, publish: Any, caplog: Any
) -> None:
    """What `on_change` raises harms nobody."""

    def broken(status: ModelStatus) -> None:
        raise ValueError("on purpose")

    with ModelWatcher(discovery, resolver, on_change=broken, poll_seconds=0.01) as watcher:  # type: ignore[arg-type]
        publish(CARD)
        watcher.wait_ready("m", SECONDS)

    assert "on_change failed" in caplog.text


def test_wait_ready_says_what_is_the_matter(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """Waiting in vain ends with the state and the reason; for a model unheard of it says so."""
    resolver.failing.add("m")
    publish(CARD)
    statuses.wait_for(ModelState.FAILED)

    with pytest.raises(TimeoutError, match=r"failed no source has config\.json"):
        watcher.wait_ready("m", 0.05)
    with pytest.raises(TimeoutError, match="nobody publishes it"):
        watcher.wait_ready("unheard/of", 0.01)


def test_discovery_that_fails_for_a_while(
    discovery: MemoryDiscovery, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """After an interruption the watch goes on, and what was withdrawn meanwhile is gone."""
    failing = FailingDiscovery(discovery)
    with ModelWatcher(failing, resolver, on_change=statuses, poll_seconds=0.01):  # type: ignore[arg-type]
        record = publish(CARD, 1)
        statuses.wait_for(ModelState.READY)
        failing.fails.set()
        assert wait_until(lambda: failing.failures > 1)
        record.withdraw()
        publish(replace(CARD, display_name="n"), 2)
        failing.fails.clear()

        statuses.wait_for(ModelState.READY, name="n")
        statuses.wait_for(ModelState.GONE)


class FailingDiscovery:
    """A discovery whose watch raises while `fails` is set; otherwise one that is asked again and again."""

    def __init__(self, inner: MemoryDiscovery) -> None:
        self._inner = inner
        self.fails = threading.Event()
        self.failures = 0

    def records(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return what is there."""
        return self._inner.records(bucket)

    def watch(self, bucket: Bucket, *, stop: threading.Event, poll_seconds: float) -> Iterator[Event]:
        """Yield what the real one does, until told to fail."""

        def over() -> bool:
            return stop.is_set() or self.fails.is_set()

        snapshot = functools.partial(self._inner.records, bucket)
        yield from watch_snapshots(snapshot, bucket, is_over=over, wait=stop.wait, poll_seconds=poll_seconds)
        if self.fails.is_set():
            self.failures += 1
            raise DiscoveryError("unreachable", backend="test")


def wait_until(condition: Callable[[], Any]) -> bool:
    """Wait until the condition holds; tell whether it came to that."""
    waiting = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if condition():
            return True
        waiting.wait(0.01)
    return False


def test_close_is_idempotent_and_prompt(discovery: MemoryDiscovery, resolver: FakeResolver) -> None:
    """Closing twice, or without having started, is harmless."""
    watcher = ModelWatcher(discovery, resolver)  # type: ignore[arg-type]
    watcher.close()
    with ModelWatcher(discovery, resolver) as started:  # type: ignore[arg-type]
        started.close()
    started.close()


def test_fetch_errors_reach_the_reason(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """Whatever error of ours a resolver raises is the reason, not a crash."""

    def refuse(card: ModelDeploymentCard, **_: Any) -> ResolvedModel:
        raise FetchError("http://h/x: refused", url="http://h/x")

    resolver.resolve = refuse  # type: ignore[method-assign, assignment]
    publish(CARD)

    assert statuses.wait_for(ModelState.FAILED).reason == "http://h/x: refused"
