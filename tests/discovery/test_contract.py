"""What every discovery backend promises: one class of tests, run for each of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from selfhost.discovery import (
    Bucket,
    Discovery,
    FileDiscovery,
    MemoryDiscovery,
    MemoryStore,
    RecordKey,
    SharedDiscovery,
    open_discovery,
)
from selfhost.errors import DiscoveryError

KEY = RecordKey("ns", "comp", "ep", 0xABC)
LORA = RecordKey("ns", "comp", "ep", 0xABC, "my_lora")
OTHER = RecordKey("my-ns", "c_1", "e.x", 2**64 - 1)

Watch = Callable[..., Any]


@pytest.fixture(params=["file", "mem", "shared file", "shared mem"])
def join(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Discovery]]:
    """Give another participant of one and the same store at each call."""
    store = MemoryStore()
    joined: list[Discovery] = []

    def make() -> Discovery:
        inner = FileDiscovery(tmp_path / "kv") if "file" in request.param else MemoryDiscovery(store)
        joined.append(SharedDiscovery(inner, tmp_path / "share") if "shared" in request.param else inner)
        return joined[-1]

    yield make
    for each in joined:
        each.close()


class TestDiscovery:
    def test_published_record_is_seen_by_everybody(self, join: Callable[[], Discovery]) -> None:
        """In its own bucket, under its key, with its text."""
        worker, frontend = join(), join()

        worker.publish(Bucket.MODELS, KEY, '{"a":"é"}')

        assert frontend.records(Bucket.MODELS) == worker.records(Bucket.MODELS) == {KEY: '{"a":"é"}'}
        assert frontend.records(Bucket.INSTANCES) == {}

    def test_records_are_sorted_by_key(self, join: Callable[[], Discovery]) -> None:
        """Whatever the order of publishing; a base model comes before its LoRAs."""
        worker = join()

        for key in (LORA, OTHER, KEY):
            worker.publish(Bucket.MODELS, key, "{}")

        assert list(worker.records(Bucket.MODELS)) == [OTHER, KEY, LORA]

    def test_same_key_lives_in_both_buckets(self, join: Callable[[], Discovery]) -> None:
        """An instance and its model have one key, and go one by one."""
        worker = join()
        instance = worker.publish(Bucket.INSTANCES, KEY, '{"i":1}')
        worker.publish(Bucket.MODELS, KEY, '{"m":1}')

        instance.withdraw()

        assert worker.records(Bucket.INSTANCES) == {}
        assert worker.records(Bucket.MODELS) == {KEY: '{"m":1}'}

    def test_taken_key_is_refused(self, join: Callable[[], Discovery]) -> None:
        """Whoever has it, even with the same text; the record that is there stays."""
        worker, rival = join(), join()
        worker.publish(Bucket.MODELS, KEY, '{"a":1}')

        for participant in (worker, rival):
            with pytest.raises(DiscoveryError, match="ns/comp/ep/abc") as caught:
                participant.publish(Bucket.MODELS, KEY, '{"a":2}')
            assert (caught.value.backend, caught.value.key) == (worker.name, "ns/comp/ep/abc")

        rival.close()
        assert worker.records(Bucket.MODELS) == {KEY: '{"a":1}'}

    def test_of_many_rivals_one_wins(self, join: Callable[[], Discovery]) -> None:
        """Sixteen threads of four participants want one key."""
        participants = [join() for _ in range(4)]
        barrier = threading.Barrier(16)
        won: list[int] = []

        def publish(number: int) -> None:
            barrier.wait()
            try:
                participants[number % 4].publish(Bucket.MODELS, KEY, f'{{"n":{number}}}')
                won.append(number)
            except DiscoveryError:
                pass

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(won) == 1
        assert participants[0].records(Bucket.MODELS) == {KEY: f'{{"n":{won[0]}}}'}

    @pytest.mark.parametrize("text", ["", "[]", "junk", '{"a":', '{"a":"\ud800"}'])
    def test_text_that_is_no_record_is_refused(self, join: Callable[[], Discovery], text: str) -> None:
        """Neither published nor put in place of another."""
        worker = join()
        publication = worker.publish(Bucket.MODELS, KEY, "{}")

        with pytest.raises(DiscoveryError, match="JSON object"):
            worker.publish(Bucket.MODELS, OTHER, text)
        with pytest.raises(DiscoveryError, match="JSON object"):
            publication.replace(text)

        assert worker.records(Bucket.MODELS) == {KEY: "{}"}

    @pytest.mark.parametrize("key", [RecordKey("a/b", "c", "d", 1), RecordKey("a", "b", "c", 1, "")])
    def test_key_that_is_none_is_refused(self, join: Callable[[], Discovery], key: RecordKey) -> None:
        """Before anything is written."""
        worker = join()

        with pytest.raises(DiscoveryError, match="cannot publish"):
            worker.publish(Bucket.MODELS, key, "{}")

        assert worker.records(Bucket.MODELS) == {}

    def test_withdrawing_twice_is_harmless(self, join: Callable[[], Discovery]) -> None:
        """The second time must not remove what somebody else has published since."""
        worker, successor = join(), join()
        publication = worker.publish(Bucket.MODELS, KEY, '{"a":1}')

        publication.withdraw()
        successor.publish(Bucket.MODELS, KEY, '{"a":2}')
        publication.withdraw()

        assert worker.records(Bucket.MODELS) == {KEY: '{"a":2}'}

    def test_withdrawn_key_can_be_published_again(self, join: Callable[[], Discovery]) -> None:
        """By the same object too, as when a model is attached again."""
        worker = join()

        with worker.publish(Bucket.MODELS, KEY, '{"a":1}'):
            pass
        worker.publish(Bucket.MODELS, KEY, '{"a":2}')

        assert worker.records(Bucket.MODELS) == {KEY: '{"a":2}'}

    def test_replaced_text_is_seen(self, join: Callable[[], Discovery]) -> None:
        """A refreshed card takes the old one's place, and is withdrawn like it."""
        worker, frontend = join(), join()
        publication = worker.publish(Bucket.MODELS, KEY, '{"a":1}')

        publication.replace('{"a":2}')

        assert frontend.records(Bucket.MODELS) == {KEY: '{"a":2}'}
        publication.withdraw()
        assert frontend.records(Bucket.MODELS) == {}

    def test_withdrawn_record_cannot_be_replaced(self, join: Callable[[], Discovery]) -> None:
        """It would come back to life."""
        worker = join()
        publication = worker.publish(Bucket.MODELS, KEY, "{}")
        publication.withdraw()

        with pytest.raises(DiscoveryError, match="withdrawn"):
            publication.replace('{"a":1}')

        assert worker.records(Bucket.MODELS) == {}

    def test_closing_withdraws_its_own_records_only(self, join: Callable[[], Discovery]) -> None:
        """Twice is harmless, as is a publication that outlives the object."""
        worker, other = join(), join()
        publication = worker.publish(Bucket.MODELS, KEY, "{}")
        worker.publish(Bucket.INSTANCES, KEY, "{}")
        other.publish(Bucket.MODELS, OTHER, "{}")

        worker.close()
        worker.close()
        publication.withdraw()

        assert other.records(Bucket.MODELS) == {OTHER: "{}"}
        assert other.records(Bucket.INSTANCES) == {}

    def test_closed_object_publishes_nothing(self, join: Callable[[], Discovery]) -> None:
        """Nobody would withdraw it any more."""
        with join() as worker:
            pass

        with pytest.raises(DiscoveryError, match="closed"):
            worker.publish(Bucket.MODELS, KEY, "{}")

        assert join().records(Bucket.MODELS) == {}

    def test_watch_begins_with_what_is_there(self, join: Callable[[], Discovery], watching: Watch) -> None:
        """Then nothing comes until something changes."""
        worker = join()
        worker.publish(Bucket.MODELS, KEY, '{"a":1}')
        worker.publish(Bucket.INSTANCES, OTHER, "{}")

        watch = watching(join())

        assert watch.next() == ("added", str(KEY), '{"a":1}')
        assert watch.is_quiet()

    def test_watch_tells_what_changes(self, join: Callable[[], Discovery], watching: Watch) -> None:
        """Added, changed, removed; a removed record comes with its last text."""
        worker = join()
        watch = watching(join())

        publication = worker.publish(Bucket.MODELS, KEY, '{"a":1}')
        assert watch.next() == ("added", str(KEY), '{"a":1}')
        publication.replace('{"a":2}')
        assert watch.next() == ("changed", str(KEY), '{"a":2}')
        publication.withdraw()
        assert watch.next() == ("removed", str(KEY), '{"a":2}')

    def test_watches_do_not_take_from_each_other(
        self, join: Callable[[], Discovery], watching: Watch
    ) -> None:
        """Two watches of one object both see all."""
        worker = join()
        watches = [watching(worker), watching(worker)]

        worker.publish(Bucket.MODELS, KEY, "{}")

        assert [watch.next() for watch in watches] == [("added", str(KEY), "{}")] * 2

    def test_stop_ends_a_watch_at_once(self, join: Callable[[], Discovery]) -> None:
        """However long it would have waited for the next look."""
        stop = threading.Event()
        watch = join().watch(Bucket.MODELS, stop=stop, poll_seconds=60.0)
        timer = threading.Timer(0.05, stop.set)
        timer.start()
        began = time.monotonic()

        assert list(watch) == []
        assert time.monotonic() - began < 10
        timer.join()

    def test_closing_ends_a_watch(self, join: Callable[[], Discovery], watching: Watch) -> None:
        """One with a stop of its own at its next look, one without at once."""
        frontend = join()
        watch = watching(frontend)
        timer = threading.Timer(0.05, frontend.close)
        timer.start()

        assert list(frontend.watch(Bucket.MODELS, poll_seconds=60.0)) == []
        assert watch.ends()
        timer.join()

    def test_threads_may_publish_and_withdraw_at_once(self, join: Callable[[], Discovery]) -> None:
        """Eight threads, a hundred rounds: no error, and nothing left."""
        worker = join()
        errors: list[Exception] = []

        def work(number: int) -> None:
            try:
                for turn in range(100):
                    with worker.publish(Bucket.MODELS, RecordKey("n", "c", "e", number), "{}") as publication:
                        publication.replace(f'{{"turn":{turn}}}')
            except Exception as err:
                errors.append(err)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert errors == []
        assert worker.records(Bucket.MODELS) == {}


@pytest.mark.parametrize(("name", "kind"), [("file", FileDiscovery), ("mem", MemoryDiscovery)])
def test_backend_is_opened_by_name(tmp_path: Path, name: str, kind: type) -> None:
    """Opening makes nothing yet, not even the directory."""
    with open_discovery(name, str(tmp_path / "store")) as discovery:
        assert type(discovery) is kind
        assert discovery.name == name

    assert not (tmp_path / "store").exists()


def test_unknown_backend_is_refused() -> None:
    """With those that there are."""
    with pytest.raises(DiscoveryError, match="expected file or mem"):
        open_discovery("etcd", "/nowhere")
