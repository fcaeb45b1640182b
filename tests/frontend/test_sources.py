"""Which places are sources of a digest, and in which order they are asked."""

from __future__ import annotations

from typing import Any, Callable, Optional

import pytest
from helpers import make_card
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import FakeClock

from selfhost.card.checksum import Checksum
from selfhost.errors import FetchError, FetchTimeout, HTTPStatusError, VerificationError
from selfhost.frontend.failures import FailureMemo, Source, SourceError
from selfhost.frontend.limits import ResolverLimits
from selfhost.frontend.sources import Rounds, sources_by_digest

A, B, C = (Source.at(f"http://{name}/config.json") for name in "abc")
A_OTHER = Source.at("http://a/tokenizer.json")


def broken(source: Source) -> FetchError:
    """Return the error of a connection that broke."""
    return FetchError("broken", url=source.url, is_transient=True)


def unavailable(source: Source, retry_after: Optional[float] = None) -> FetchError:
    """Return the error of a 503."""
    return HTTPStatusError("503", url=source.url, status=503, is_transient=True, retry_after=retry_after)


def not_found(source: Source) -> FetchError:
    """Return the error of a 404."""
    return HTTPStatusError("404", url=source.url, status=404)


def silent(source: Source) -> FetchError:
    """Return the error of a time-out."""
    return FetchTimeout("silent", url=source.url, seconds=10, phase="headers")


def wrong(source: Source) -> VerificationError:
    """Return the error of wrong bytes."""
    return VerificationError("wrong", url=source.url, expected="a", actual="b")


class Asker:
    """Goes through rounds as a fetcher does: asks, waits, remembers; every source fails as told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.memo = FailureMemo(clock=self.clock, random=lambda: 1.0)
        self.since = self.memo.mark()

    def rounds(self, *sources: Source, limits: Optional[ResolverLimits] = None) -> Rounds:
        """Return rounds over these sources that began when the asker did."""
        return Rounds(
            sources, self.memo, since=self.since, limits=limits, clock=self.clock, random=lambda: 0.5
        )

    def fail(self, source: Source, error: SourceError, *, is_final: bool = True) -> None:
        """Remember that a source failed, as somebody else's resolve would."""
        self.memo.remember(source, error, is_final=is_final)

    def begin_anew(self) -> None:
        """Begin a new resolve."""
        self.since = self.memo.mark()

    def order(self, rounds: Rounds, fails: Callable[[Source], Optional[SourceError]]) -> list[Source]:
        """Ask until one gives the file or none is left; return who was asked."""
        asked = []
        while (turn := rounds.next()) is not None:
            self.clock.sleep(turn.pause_seconds)
            asked.append(turn.source)
            error = fails(turn.source)
            if error is None:
                break
            self.memo.remember(turn.source, error, is_final=rounds.failed(turn.source, error))
        return asked


@pytest.fixture
def asker() -> Asker:
    """Return an asker at the beginning of a resolve."""
    return Asker()


# ------------------------------------------------------------------ which


def test_own_url_comes_first_then_the_replicas_in_order() -> None:
    """The card's own worker is asked before the replicas, and those as they are given."""
    cards = [make_card({"config.json": b"{}"}, f"http://{host}/m") for host in ("own", "one", "two")]
    checksum = Checksum.of(b"{}")

    (sources,) = sources_by_digest(cards, [checksum]).values()

    assert [source.origin for source in sources] == ["http://own", "http://one", "http://two"]


def test_each_url_is_a_source_once() -> None:
    """Replicas behind one address are one source."""
    cards = [make_card({"config.json": b"{}"}, "http://balancer/m")] * 3

    (sources,) = sources_by_digest(cards, [Checksum.of(b"{}")]).values()

    assert len(sources) == 1


def test_digest_counts_and_not_the_name() -> None:
    """A replica's file of the same name and other content is no source; one of another name may be."""
    own = make_card({"config.json": b"{}"}, "http://own")
    other = make_card({"config.json": b"[]", "copy.txt": b"{}"}, "http://other")

    (sources,) = sources_by_digest([own, other], [Checksum.of(b"{}")]).values()

    assert [source.url for source in sources] == ["http://own/config.json", "http://other/copy.txt"]


def test_only_what_is_wanted_is_mapped() -> None:
    """Files that are here already need no source; a digest that nobody has gets none."""
    card = make_card({"config.json": b"{}", "tokenizer.json": b"[]"}, "http://own")
    nowhere = Checksum.of(b"nowhere")

    assert set(sources_by_digest([card], [Checksum.of(b"[]")])) == {Checksum.of(b"[]")}
    assert sources_by_digest([card], [nowhere]) == {nowhere: ()}


# ------------------------------------------------------------------ in which order


def test_no_sources_no_turn(asker: Asker) -> None:
    """Without a source the rounds are over before they begin, and nothing blocks."""
    rounds = asker.rounds()

    assert rounds.next() is None
    assert rounds.seconds_blocked is None


def test_first_source_that_works_is_the_last_that_is_asked(asker: Asker) -> None:
    """Nobody else is asked when the first one has the file."""
    assert asker.order(asker.rounds(A, B), lambda source: None) == [A]


@pytest.mark.parametrize("error", [not_found, silent, wrong])
def test_final_failure_is_asked_once(asker: Asker, error: Callable[[Source], SourceError]) -> None:
    """A 404, a time-out and wrong bytes are not tried again."""
    assert asker.order(asker.rounds(A, B), error) == [A, B]
    assert asker.clock.slept == [0, 0]


def test_transient_failures_are_asked_in_three_rounds(asker: Asker) -> None:
    """Every source is asked before the first one is asked again."""
    assert asker.order(asker.rounds(A, B), unavailable) == [A, B, A, B, A, B]


def test_only_transient_failures_get_another_round(asker: Asker) -> None:
    """Of a 503 and a 404 the 503 is worth another try."""
    rounds = asker.rounds(A, B)

    assert asker.order(rounds, lambda source: not_found(A) if source == A else unavailable(B)) == [A, B, B, B]


def test_pauses_double_and_are_jittered(asker: Asker) -> None:
    """Between rounds somewhat passes, more each time; the first round is without pauses."""
    asker.order(asker.rounds(A), unavailable)

    assert asker.clock.slept == pytest.approx([0, 0.1, 0.2])


def test_pause_is_over_when_others_took_that_long(asker: Asker) -> None:
    """A source is not waited for longer than its own pause."""

    def slow_elsewhere(source: Source) -> SourceError:
        asker.clock.now += 0 if source == A else 5
        return unavailable(source)

    asker.order(asker.rounds(A, B, limits=ResolverLimits(rounds=2)), slow_elsewhere)

    assert asker.clock.slept == pytest.approx([0, 0, 0, 0.1])  # A, B, then A at once, then B


@pytest.mark.parametrize(("asked_for", "waited"), [(0.001, 0.1), (2.0, 2.0), (3600.0, 5.0)])
def test_retry_after_is_kept_up_to_a_cap(asker: Asker, asked_for: float, waited: float) -> None:
    """The source decides how long it is left alone, within bounds."""
    # catalogue 120
    asker.order(asker.rounds(A, limits=ResolverLimits(rounds=2)), lambda source: unavailable(A, asked_for))

    assert asker.clock.slept == pytest.approx([0, waited])


def test_whoever_is_ready_first_is_asked_first(asker: Asker) -> None:
    """One source's long Retry-After does not hold up another's short one."""
    rounds = asker.rounds(A, B, limits=ResolverLimits(rounds=2))

    asked = asker.order(rounds, lambda source: unavailable(source, 4.0 if source == A else None))

    assert asked == [A, B, B, A]


def test_source_that_failed_lately_goes_last(asker: Asker) -> None:
    """What another resolve found dead is asked after everybody else."""
    asker.fail(A_OTHER, silent(A_OTHER))
    asker.begin_anew()

    assert asker.order(asker.rounds(A, B, C), not_found) == [B, C, A]


def test_source_whose_back_off_is_over_is_in_its_place(asker: Asker) -> None:
    """A failure is forgotten after a while."""
    asker.fail(A, silent(A))
    asker.begin_anew()
    asker.clock.now += 1

    assert asker.order(asker.rounds(A, B), lambda source: None) == [A]


def test_failure_of_the_same_resolve_counts_at_once(asker: Asker) -> None:
    """An origin that another file's thread found broken goes last for a file that is under way."""
    rounds = asker.rounds(B, A, C)

    first = rounds.next()
    asker.fail(A_OTHER, broken(A_OTHER), is_final=False)
    second = rounds.next()

    assert first is not None
    assert second is not None
    assert [first.source, second.source] == [B, C]


def test_origin_that_timed_out_in_this_resolve_is_not_asked_again(asker: Asker) -> None:
    """A hanging origin costs one time-out in a resolve, also when its back-off is over."""
    rounds = asker.rounds(A, B)
    asker.fail(A_OTHER, silent(A_OTHER))
    asker.clock.now += 3600

    assert asker.order(rounds, unavailable) == [B, B, B]


def test_origin_that_timed_out_meanwhile_gets_no_further_round(asker: Asker) -> None:
    """A source that waits for its second round is dropped when its origin is found to hang."""
    rounds = asker.rounds(A)
    assert rounds.next() is not None
    assert not rounds.failed(A, unavailable(A))
    asker.fail(A_OTHER, silent(A_OTHER))

    assert rounds.next() is None


def test_all_failed_for_good_lately(asker: Asker) -> None:
    """If every source rests, that is known before any is asked, and until when."""
    asker.fail(A, not_found(A))
    asker.clock.now += 0.25
    asker.fail(B, silent(B))
    asker.begin_anew()

    assert asker.rounds(A, B).seconds_blocked == pytest.approx(0.75)
    assert asker.rounds(A, B, C).seconds_blocked is None


def test_transient_failures_do_not_block(asker: Asker) -> None:
    """A worker whose connection broke a moment ago, in a resolve that goes on, may be asked by another."""
    asker.fail(A, broken(A), is_final=False)
    asker.begin_anew()

    assert asker.rounds(A).seconds_blocked is None
    assert asker.order(asker.rounds(A), lambda source: None) == [A]


ERRORS = st.sampled_from([None, broken, unavailable, not_found, silent, wrong])
SOURCES = st.lists(
    st.builds(
        lambda host, name: Source.at(f"http://{host}/{name}"), st.sampled_from("abc"), st.sampled_from("xyz")
    ),
    unique=True,
)


@settings(max_examples=300, deadline=None)
@given(
    sources=SOURCES,
    before=st.lists(st.tuples(st.integers(0, 8), ERRORS, st.booleans())),
    answers=st.lists(ERRORS, max_size=40),
)
def test_rounds_keep_their_promises(sources: list[Source], before: list[Any], answers: list[Any]) -> None:
    """Whatever fails in whichever way: no source more than thrice, none again after a final failure."""
    asker = Asker()
    for index, error, is_final in before:
        if error is not None and index < len(sources):
            asker.fail(sources[index], error(sources[index]), is_final=is_final)
    asker.begin_anew()
    script = iter(answers)
    final: list[Source] = []
    given_up: list[Source] = []

    def fails(source: Source) -> Optional[SourceError]:
        given_up.extend(
            known for known in final if source == known or source.origin == known.origin in silent_origins
        )
        error = next(script, not_found)
        if error in (not_found, silent, wrong):
            final.append(source)
        if error is silent:
            silent_origins.add(source.origin)
        return None if error is None else error(source)

    silent_origins: set[str] = set()
    asked = asker.order(asker.rounds(*sources), fails)

    assert not given_up
    assert all(asked.count(source) <= 3 for source in sources)
    assert not sources or asked
    assert max(asker.clock.slept, default=0) <= ResolverLimits().max_pause_seconds


# ------------------------------------------------------------------ who may be slow


def test_source_may_not_be_slow_while_another_waits(asker: Asker) -> None:
    """The last one of the first round may take its time, and so may all in the later rounds."""
    rounds = asker.rounds(A, B)
    may_be_slow = []
    while (turn := rounds.next()) is not None:
        may_be_slow.append(turn.may_be_slow)
        rounds.failed(turn.source, broken(turn.source))

    assert may_be_slow == [False, True, True, True, True, True]


def test_source_that_is_alone_may_be_slow(asker: Asker) -> None:
    """Slow bytes are better than none: without another turn, or another source, nobody is given up."""
    once = ResolverLimits(rounds=1)

    assert [asker.rounds(A).next(), asker.rounds(A, B, limits=once).next()] == [(A, 0.0, True)] * 2


def test_source_may_be_slow_if_the_others_failed_lately(asker: Asker) -> None:
    """What works is not given up for what did not work a moment ago."""
    asker.fail(B, broken(B), is_final=False)

    turn = asker.rounds(A, B).next()

    assert turn is not None
    assert (turn.source, turn.may_be_slow) == (A, True)
