"""The watcher: every published model has a state, a reason and, in the end, its files."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Callable, Optional

import pytest
from simulator import MakeResolver, OriginSimulator, Serve

from selfhost import ModelDeploymentCard
from selfhost.discovery import Bucket, Event, MemoryDiscovery, RecordKey, model_record
from selfhost.discovery.base import watch_snapshots
from selfhost.errors import CacheError, DiscoveryError, FetchError, ResolveError
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import ResolvedModel
from selfhost.frontend.watcher import ModelState, ModelStatus, ModelWatcher

CARD = ModelDeploymentCard("m", context_length=1)
OTHER = replace(CARD, context_length=2)
OTHER_NAME = replace(CARD, display_name="n")
SECONDS = 10.0  # for what takes milliseconds unless it is broken


class FakeCache:
    """Knows which directories are held, and cannot hold those that are gone."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.gone: set[str] = set()

    @contextlib.contextmanager
    def hold(self, model_dir: str) -> Iterator[None]:
        """Hold a directory."""
        if model_dir in self.gone:
            raise CacheError(f"the model directory {model_dir!r} was collected", path=model_dir)
        self.held.append(model_dir)
        try:
            yield
        finally:
            self.held.remove(model_dir)


class FakeResolver:
    """Resolves at once, unless told to fail or to hang; remembers what it was asked."""

    def __init__(self) -> None:
        self.cache = FakeCache()
        self.stopped: list[str] = []  # display names
        self.fetched: tuple[str, ...] = ()
        self.failing: set[str] = set()  # display names
        self.hanging: dict[str, threading.Event] = {}
        self.asked: list[tuple[str, int]] = []  # display name, number of replicas

    def resolve(self, card: ModelDeploymentCard, *, replicas: Any, stop: threading.Event) -> ResolvedModel:
        """Answer as told for this card's name."""
        name = card.display_name
        self.asked.append((name, len(list(replicas))))
        if name in self.hanging:
            hanging = self.hanging[name]
            assert wait_until(lambda: hanging.is_set() or stop.is_set())
        if stop.is_set():
            self.stopped.append(name)
            raise RuntimeError("ended by its stop event")
        if name in self.failing:
            raise ResolveError("no source has config.json", file="config.json")
        return ResolvedModel(card, f"/cache/{card.mdcsum}", self.fetched)


class Statuses(list[ModelStatus]):
    """What `on_change` was told; lets a test wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Callable[[], object]] = []  # called with each, too
        self._changed = threading.Condition()

    def __call__(self, status: ModelStatus) -> None:
        """Be an `on_change`."""
        for note in self.notes:
            note()
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
    quick = {"poll_seconds": 0.01, "retry_seconds": (0.01, 0.02), "check_seconds": 0.01}
    with ModelWatcher(discovery, resolver, on_change=statuses, **quick) as watching:  # type: ignore[arg-type]
        yield watching
    assert threading.active_count() == before
    assert resolver.cache.held == []


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
    assert resolver.cache.held == []


def test_card_that_differs_is_quarantined(watcher: ModelWatcher, publish: Any, statuses: Statuses) -> None:
    """The incumbent goes on being served; the newcomer says in which field it differs."""
    publish(CARD, 1)
    statuses.wait_for(ModelState.READY)
    publish(OTHER, 2)
    status = statuses.wait_for(ModelState.QUARANTINED)

    assert "context_length: ours 1, theirs 2" in status.reason
    assert [one.state for one in watcher.models()] == [ModelState.READY, ModelState.QUARANTINED]


def test_states_are_counted(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """How many models are in which state can be asked for; those that are gone are in none."""
    nothing = dict.fromkeys(set(ModelState) - {ModelState.GONE}, 0)
    assert watcher.counts() == nothing

    publish(CARD, 1)
    statuses.wait_for(ModelState.READY)
    publish(OTHER, 2)
    statuses.wait_for(ModelState.QUARANTINED)

    assert watcher.counts() == {**nothing, ModelState.READY: 1, ModelState.QUARANTINED: 1}


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
    """What a model that is gone would need is not fetched to its end, and nobody is told of it."""
    resolver.hanging["m"] = threading.Event()
    record = publish(CARD)
    assert wait_until(lambda: resolver.asked)
    record.withdraw()
    statuses.wait_for(ModelState.GONE)
    publish(replace(CARD, display_name="n"), 2)
    statuses.wait_for(ModelState.READY, name="n")

    assert wait_until(lambda: resolver.stopped == ["m"])
    assert [one.state for one in statuses if one.name == "m"] == [ModelState.PENDING, ModelState.GONE]
    assert len(resolver.cache.held) == 1


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


def test_logs_that_raise_change_nothing(
    watcher: ModelWatcher,
    publish: Any,
    statuses: Statuses,
    resolver: FakeResolver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every state is told, and what fails is tried again, with a filter of the host's that raises."""

    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(logging.getLogger("selfhost.frontend.watcher"), "filters", [fail])
    resolver.hanging["m"] = None  # type: ignore[assignment]  # which cannot be waited for
    publish(CARD)
    statuses.wait_for(ModelState.FAILED)
    del resolver.hanging["m"]
    resolver.failing.add("m")
    assert wait_until(lambda: "config.json" in statuses[-1].reason)
    resolver.failing.clear()
    statuses.wait_for(ModelState.READY)
    publish(OTHER, 2)
    statuses.wait_for(ModelState.QUARANTINED)


def test_wait_ready_says_what_is_the_matter(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """Waiting in vain ends with the state and the reason; for a model unheard of it says so."""
    resolver.failing.add("m")
    publish(CARD)
    statuses.wait_for(ModelState.FAILED)

    with pytest.raises(TimeoutError, match=r"failed: no source has config\.json"):
        watcher.wait_ready("m", 0.05)
    with pytest.raises(TimeoutError, match="nobody publishes it"):
        watcher.wait_ready("unheard/of", 0.01)


def test_threads_take_no_signals(
    monkeypatch: pytest.MonkeyPatch, discovery: MemoryDiscovery, publish: Any
) -> None:
    """Neither the one that follows the discovery nor those that resolve: the host may wait for them."""
    blocked: dict[str, set[int]] = {}

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **options: Any) -> Any:
            blocked[threading.current_thread().name] = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            return method(*arguments, **options)

        return note

    resolver = FakeResolver()
    monkeypatch.setattr(resolver, "resolve", noting(resolver.resolve))
    monkeypatch.setattr(discovery, "watch", noting(discovery.watch))
    with ModelWatcher(discovery, resolver) as watcher:  # type: ignore[arg-type]
        publish(CARD)
        watcher.wait_ready("m", SECONDS)

    assert set(blocked) == {"selfhost-watcher", "selfhost-watcher-resolve"}
    assert all({signal.SIGINT, signal.SIGTERM} <= signals for signals in blocked.values())


def test_callback_is_called_with_the_hosts_signals(
    watcher: ModelWatcher, publish: Any, statuses: Statuses
) -> None:
    """What it launches can be ended, whichever thread of ours calls it."""
    seen: dict[str, set[int]] = {}
    statuses.notes.append(
        lambda: seen.setdefault(threading.current_thread().name, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    )
    for number in range(4):
        publish(replace(CARD, display_name=f"m{number}"), number)
        statuses.wait_for(ModelState.READY, f"m{number}")

    assert seen
    assert not any({signal.SIGINT, signal.SIGTERM} & blocked for blocked in seen.values())


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


# ------------------------------------------------------------------ what is ready stays


def test_ready_model_is_held_until_it_is_withdrawn(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """Nobody collects the files of a model that is ready; those of one that is gone, anybody may."""
    record = publish(CARD, 1)
    publish(OTHER_NAME, 2)
    statuses.wait_for(ModelState.READY)
    statuses.wait_for(ModelState.READY, name="n")
    ours, others = (f"/cache/{card.mdcsum}" for card in (CARD, OTHER_NAME))
    assert {ours, others} <= set(resolver.cache.held)
    record.withdraw()
    statuses.wait_for(ModelState.GONE)

    assert wait_until(lambda: set(resolver.cache.held) == {others})


def test_directory_that_cannot_be_held_is_resolved_again(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """A model that is collected between its fetch and its hold is not told as ready."""
    resolver.cache.gone.add(f"/cache/{CARD.mdcsum}")
    publish(CARD)
    failed = statuses.wait_for(ModelState.FAILED)
    resolver.cache.gone.clear()
    statuses.wait_for(ModelState.READY)

    assert "was collected" in failed.reason
    assert ModelState.READY not in [one.state for one in statuses[: statuses.index(failed)]]


def test_ready_model_is_looked_at_again(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """A look that finds all as it was is told to nobody; one that had to fetch is told."""
    publish(CARD)
    statuses.wait_for(ModelState.READY)
    assert wait_until(lambda: len(resolver.asked) > 3)
    assert [one.state for one in statuses] == [ModelState.PENDING, ModelState.READY]
    resolver.fetched = ("config.json",)

    assert wait_until(lambda: len(statuses) > 2)
    assert {one.state for one in statuses[2:]} == {ModelState.READY}
    assert statuses[2].model is not None
    assert statuses[2].model.fetched == ("config.json",)


def test_ready_model_whose_files_are_lost_fails(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """If what is gone is to be had nowhere, the model is not ready any more, and is tried again."""
    publish(CARD)
    statuses.wait_for(ModelState.READY)
    resolver.failing.add("m")
    failed = statuses.wait_for(ModelState.FAILED)
    resolver.failing.clear()

    assert failed.model is None
    assert wait_until(lambda: statuses[-1].state is ModelState.READY)


def test_real_files_are_kept_and_come_back(
    discovery: MemoryDiscovery,
    publish: Any,
    origins: OriginSimulator,
    make_resolver: MakeResolver,
    serve: Serve,
) -> None:
    """Garbage collection leaves a ready model alone; one that somebody removed is there again soon."""
    resolver = make_resolver()
    publish(serve("http://a", {"config.json": b"{}"}, name="m"))
    years_later = BlobCache(resolver.cache.root, clock=lambda: time.time() + 1e8)
    with ModelWatcher(discovery, resolver, poll_seconds=0.01, check_seconds=0.5) as watcher:
        model = watcher.wait_ready("m", SECONDS)
        years_later.collect(max_bytes=0)
        assert os.listdir(model.local_dir) == ["config.json"]
        shutil.rmtree(resolver.cache.root)
        assert wait_until(lambda: os.path.exists(os.path.join(model.local_dir, "config.json")))

    assert len(origins.asked) == 2
    years_later.collect(max_bytes=0)
    assert not os.path.exists(model.local_dir)


# ------------------------------------------------------------------ what hangs, and what breaks


def test_many_hanging_models_hold_up_no_other(
    watcher: ModelWatcher, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """Threads come as they are needed, and go."""
    names = [f"hangs-{number}" for number in range(12)]
    for number, name in enumerate(names):
        resolver.hanging[name] = threading.Event()
        publish(replace(CARD, display_name=name), number)
    assert wait_until(lambda: len(resolver.asked) == len(names))
    publish(CARD, 99)
    statuses.wait_for(ModelState.READY)

    for event in resolver.hanging.values():
        event.set()
    assert wait_until(lambda: sum(one.state is ModelState.READY for one in watcher.models()) == 13)
    assert wait_until(lambda: sum(t.name == "selfhost-watcher-resolve" for t in threading.enumerate()) <= 2)


def test_new_model_goes_before_those_that_failed(
    discovery: MemoryDiscovery, publish: Any, statuses: Statuses, resolver: FakeResolver
) -> None:
    """When threads are short, who was never tried is first."""
    quick = {"poll_seconds": 0.01, "retry_seconds": (0.01, 0.01), "threads": 1}
    resolver.failing.update("abc")
    with ModelWatcher(discovery, resolver, on_change=statuses, **quick):  # type: ignore[arg-type]
        for number, name in enumerate("abc"):
            publish(replace(CARD, display_name=name), number)
            statuses.wait_for(ModelState.FAILED, name=name)
        resolver.hanging["hangs"] = threading.Event()
        publish(replace(CARD, display_name="hangs"), 3)
        assert wait_until(lambda: ("hangs", 0) in resolver.asked)
        asked = len(resolver.asked)
        publish(CARD, 4)
        statuses.wait_for(ModelState.PENDING)
        resolver.hanging["hangs"].set()
        statuses.wait_for(ModelState.READY)

    assert resolver.asked[asked][0] == "m"


def test_close_ends_what_is_being_resolved(
    discovery: MemoryDiscovery, publish: Any, statuses: Statuses, resolver: FakeResolver, caplog: Any
) -> None:
    """A watcher that is closed in the middle of a fetch ends it, and logs no failure for it."""
    resolver.hanging["m"] = threading.Event()
    with ModelWatcher(discovery, resolver, on_change=statuses) as watcher:  # type: ignore[arg-type]
        publish(CARD)
        assert wait_until(lambda: resolver.asked)

    assert resolver.stopped == ["m"]
    assert [one.state for one in watcher.models()] == [ModelState.PENDING]
    assert caplog.records == []


def test_discovery_with_a_defect_is_followed_on(
    discovery: MemoryDiscovery, publish: Any, statuses: Statuses, resolver: FakeResolver, caplog: Any
) -> None:
    """Whatever a discovery raises is logged with its traceback, and the watch begins again."""
    watch_well, defects = discovery.watch, [ValueError("a defect"), OSError("another one")]

    def watch(*args: Any, **options: Any) -> Iterator[Event]:
        if defects:
            raise defects.pop(0)
        return watch_well(*args, **options)

    discovery.watch = watch  # type: ignore[method-assign]
    quick = {"poll_seconds": 0.01, "retry_seconds": (0.01, 0.02)}
    with ModelWatcher(discovery, resolver, on_change=statuses, **quick):  # type: ignore[arg-type]
        publish(CARD)
        statuses.wait_for(ModelState.READY)

    assert caplog.text.count("Traceback") == 2
    assert "ValueError: a defect" in caplog.text


@pytest.mark.parametrize("method", ["from_record", "diff"])
def test_record_with_a_defect_keeps_nobody_else(
    watcher: ModelWatcher,
    publish: Any,
    statuses: Statuses,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """One record that breaks us is logged; the others are followed."""
    publish(CARD, 1)
    statuses.wait_for(ModelState.READY)
    with monkeypatch.context() as patch:
        patch.setattr(ModelDeploymentCard, method, lambda *_: 1 / 0)
        publish(OTHER, 2)
        assert wait_until(lambda: "ZeroDivisionError" in caplog.text)
    publish(OTHER_NAME, 3)

    statuses.wait_for(ModelState.READY, name="n")
    assert "following the discovery failed" not in caplog.text
