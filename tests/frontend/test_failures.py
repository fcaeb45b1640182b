"""The memo of failures: what counts against whom, for how long, and what is forgotten."""

from __future__ import annotations

import threading

import pytest
from simulator import FakeClock

from selfhost.errors import (
    FetchError,
    FetchTimeout,
    HTTPStatusError,
    PeerNotAllowed,
    SizeLimitExceeded,
    VerificationError,
)
from selfhost.frontend.failures import FailureMemo, Source

CONFIG = Source.at("http://worker:9090/v1/metadata/m/_base/config.json")
TOKENIZER = Source.at("http://worker:9090/v1/metadata/m/_base/tokenizer.json")
ELSEWHERE = Source.at("http://other:9090/v1/metadata/m/_base/config.json")
URL = CONFIG.url

BROKEN = FetchError("broken off", url=URL, is_transient=True)
SILENT = FetchTimeout("silent", url=URL, seconds=10, phase="body")
NOT_FOUND = HTTPStatusError("404", url=URL, status=404)
WRONG = VerificationError("wrong", url=URL, expected="a", actual="b")


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still."""
    return FakeClock()


@pytest.fixture
def memo(clock: FakeClock) -> FailureMemo:
    """Return an empty memo whose back-offs are as long as they can be."""
    return FailureMemo(clock=clock, random=lambda: 1.0)


def test_empty_memo_knows_nothing(memo: FailureMemo) -> None:
    """A source of which nothing is remembered neither rests nor is spent."""
    assert not memo.is_resting(CONFIG)
    assert not memo.is_spent(CONFIG, since=0)
    assert memo.seconds_blocked(CONFIG) == 0.0
    assert memo.reason(CONFIG) == ""


@pytest.mark.parametrize(
    "error", [BROKEN, SILENT, PeerNotAllowed("no", url=URL, host="worker", address="10.0.0.1")], ids=repr
)
def test_failed_connection_counts_against_the_origin(memo: FailureMemo, error: FetchError) -> None:
    """What is true of a connection is true of every file behind it, and of no other origin."""
    memo.remember(CONFIG, error, is_final=True)

    assert memo.is_resting(TOKENIZER)
    assert not memo.is_resting(ELSEWHERE)


@pytest.mark.parametrize(
    "error",
    [
        NOT_FOUND,
        HTTPStatusError("503", url=URL, status=503, is_transient=True),
        WRONG,
        SizeLimitExceeded("long", url=URL, limit=1, received=2),
        FetchError("not in the hub's cache", url=URL),
    ],
    ids=repr,
)
def test_failed_file_counts_against_its_url(memo: FailureMemo, error: FetchError) -> None:
    """What is true of one file says nothing about the others of its origin."""
    memo.remember(CONFIG, error, is_final=True)

    assert memo.is_resting(CONFIG)
    assert not memo.is_resting(TOKENIZER)


def test_back_off_doubles_up_to_its_bound(memo: FailureMemo, clock: FakeClock) -> None:
    """A source rests for 1 s, then twice as long each time, but never longer than 30 s."""
    rested = []
    for _ in range(7):
        memo.remember(CONFIG, NOT_FOUND, is_final=True)
        rested.append(memo.seconds_blocked(CONFIG))
        clock.now += rested[-1]
        assert not memo.is_resting(CONFIG)

    assert rested == [1, 2, 4, 8, 16, 30, 30]


def test_back_off_of_endless_failures_stays_a_number(clock: FakeClock) -> None:
    """After thousands of failures in a row the back-off is what it was after some."""
    memo = FailureMemo(clock=clock, random=lambda: 1.0)
    for _ in range(3000):
        memo.remember(CONFIG, NOT_FOUND, is_final=True)
        clock.now += 30

    memo.remember(CONFIG, NOT_FOUND, is_final=True)

    assert memo.seconds_blocked(CONFIG) == 30


def test_back_off_is_jittered(clock: FakeClock) -> None:
    """The random number decides between the half and the whole of it."""
    rested = []
    for fraction in (0.0, 0.5, 1.0):
        memo = FailureMemo(clock=clock, random=lambda fraction=fraction: fraction)  # type: ignore[misc]
        memo.remember(CONFIG, NOT_FOUND, is_final=True)
        rested.append(memo.seconds_blocked(CONFIG))

    assert rested == [0.5, 0.75, 1.0]


def test_failures_of_one_back_off_count_once(memo: FailureMemo, clock: FakeClock) -> None:
    """Four threads that meet one dead worker do not make it rest four times as long."""
    for _ in range(4):
        memo.remember(CONFIG, SILENT, is_final=True)
        clock.now += 0.1

    assert memo.seconds_blocked(CONFIG) == pytest.approx(0.6)


def test_old_failure_is_over(memo: FailureMemo, clock: FakeClock) -> None:
    """Who failed an hour ago begins with a short back-off again."""
    for _ in range(5):
        memo.remember(CONFIG, NOT_FOUND, is_final=True)
        clock.now += 30
    clock.now += 3600

    memo.remember(CONFIG, NOT_FOUND, is_final=True)

    assert memo.seconds_blocked(CONFIG) == 1


@pytest.mark.parametrize(
    ("asked", "rests"), [(0.2, 1), (7.0, 7), (3600.0, 30), (float("inf"), 30), (-5.0, 1)]
)
def test_retry_after_lengthens_the_back_off_within_bounds(
    memo: FailureMemo, asked: float, rests: float
) -> None:
    """A source may ask to be left alone for longer, not for ever and not for less."""
    error = HTTPStatusError("503", url=URL, status=503, is_transient=True, retry_after=asked)

    memo.remember(CONFIG, error, is_final=True)

    assert memo.seconds_blocked(CONFIG) == rests


def test_transient_failure_rests_but_does_not_block(memo: FailureMemo) -> None:
    """A source that may work in a moment goes last, and may be asked if there is no other."""
    memo.remember(CONFIG, BROKEN, is_final=False)

    assert memo.is_resting(CONFIG)
    assert memo.seconds_blocked(CONFIG) == 0
    assert not memo.is_spent(CONFIG, since=0)


def test_final_failure_within_the_back_off_of_a_transient_one_blocks(memo: FailureMemo) -> None:
    """The third round's failure counts as final although the first one's back-off goes on."""
    memo.remember(CONFIG, BROKEN, is_final=False)
    memo.remember(CONFIG, BROKEN, is_final=True)

    assert memo.seconds_blocked(CONFIG) == 1


def test_mark_tells_old_from_new(memo: FailureMemo, clock: FakeClock) -> None:
    """A source is spent for those who began before it failed for good, also when its back-off is over."""
    before = memo.mark()
    memo.remember(CONFIG, SILENT, is_final=True)
    after = memo.mark()
    clock.now += 3600

    assert memo.is_spent(TOKENIZER, since=before)
    assert not memo.is_spent(TOKENIZER, since=after)


def test_success_clears_url_and_origin(memo: FailureMemo) -> None:
    """A source that works again is as good as any other."""
    memo.remember(CONFIG, SILENT, is_final=True)
    memo.remember(CONFIG, NOT_FOUND, is_final=True)

    memo.forget(CONFIG)

    assert not memo.is_resting(CONFIG)
    assert not memo.is_resting(TOKENIZER)
    assert len(memo) == 0


def test_success_of_one_file_leaves_the_others_failures(memo: FailureMemo) -> None:
    """That an origin has one file does not mean that it has another."""
    memo.remember(CONFIG, NOT_FOUND, is_final=True)

    memo.forget(TOKENIZER)

    assert memo.is_resting(CONFIG)


def test_clear_forgets_everything(memo: FailureMemo) -> None:
    """After clear nothing rests."""
    memo.remember(CONFIG, NOT_FOUND, is_final=True)

    memo.clear()

    assert not memo.is_resting(CONFIG)
    assert not memo.is_spent(CONFIG, since=0)


def test_oldest_is_forgotten_first(clock: FakeClock) -> None:
    """The memo is bounded; what failed again lately is not the oldest."""
    memo = FailureMemo(max_entries=2, clock=clock)
    first, second, third = (Source.at(f"http://a/{name}") for name in "123")
    for source in (first, second, first, third):
        memo.remember(source, NOT_FOUND, is_final=True)

    assert [memo.is_resting(source) for source in (first, second, third)] == [True, False, True]
    assert len(memo) == 2


def test_reason_is_the_latest_and_bounded(memo: FailureMemo) -> None:
    """An error's text of any length is kept as its beginning."""
    memo.remember(CONFIG, BROKEN, is_final=False)
    memo.remember(CONFIG, HTTPStatusError("x" * 100_000, url=URL, status=500), is_final=True)

    assert set(memo.reason(CONFIG)) == {"x"}
    assert len(memo.reason(CONFIG)) <= 200
    assert memo.reason(TOKENIZER) == "broken off"


def test_path_on_a_disk_is_its_own_origin(memo: FailureMemo) -> None:
    """Local files fail one by one."""
    memo.remember(Source.at("/models/a.json"), BROKEN, is_final=True)

    assert not memo.is_resting(Source.at("/models/b.json"))


def test_threads_share_a_memo() -> None:
    """Eight threads that remember and forget at once end with a consistent, bounded memo."""
    memo = FailureMemo(max_entries=50)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(500):
                source = Source.at(f"http://h{(number + step) % 200}/f")
                memo.remember(source, SILENT if step % 2 else NOT_FOUND, is_final=True)
                memo.is_resting(source), memo.reason(source), memo.seconds_blocked(source)
                if step % 10 == 0:
                    memo.forget(source)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert len(memo) <= 50


def test_rest_can_be_longer_than_the_back_off(memo: FailureMemo) -> None:
    """Who is known to stay as it is rests as long as told, within the longest back-off."""
    memo.remember(CONFIG, BROKEN, is_final=False, rest_seconds=20.0)
    memo.remember(ELSEWHERE, NOT_FOUND, is_final=True, rest_seconds=3600.0)

    assert memo.is_resting(CONFIG)
    assert memo.seconds_blocked(CONFIG) == 0
    assert memo.seconds_blocked(ELSEWHERE) == 30


def test_long_urls_take_little_memory(memo: FailureMemo) -> None:
    """A URL of a megabyte is told from another one, and not kept."""
    one, two = (Source.at(f"http://a/{'x' * (1 << 20)}/\udcff/{name}") for name in "12")
    memo.remember(one, NOT_FOUND, is_final=True)

    assert memo.is_resting(one)
    assert not memo.is_resting(two)
    assert all(len(key) <= 512 for key in memo._failures)
