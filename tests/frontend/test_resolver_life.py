"""MetadataResolver offline, its transports, its end, and what it keeps."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import simulator
from helpers import TIMEOUT, make_card, poll_until
from simulator import A, MakeResolver, OriginSimulator, Serve, contents, extra, leftovers

import selfhost
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import ResolveError
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# ------------------------------------------------------------------ offline


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to make a socket fail the test."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("somebody made a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_offline_names_everything_that_is_missing(cache: BlobCache, no_sockets: None) -> None:
    """One error for all files, no socket, with the transports that everybody has."""
    card = make_card({"config.json": b"{}", "tokenizer.json": b"[]"}, "http://127.0.0.1:1")

    with MetadataResolver(cache, offline=True) as resolver, pytest.raises(ResolveError) as caught:
        resolver.resolve(card)

    assert sorted(caught.value.missing) == sorted(str(Checksum.of(data)) for data in (b"{}", b"[]"))
    for part in ("config.json", "tokenizer.json", *caught.value.missing):
        assert part in str(caught.value)
    assert caught.value.attempts == ()


def test_offline_message_leaves_nothing_out(make_resolver: MakeResolver, serve: Serve) -> None:
    """However many files are missing, each digest stands in the message."""
    card = serve(A, {f"{number}.json": b"%d" % number for number in range(100)})

    with pytest.raises(ResolveError) as caught:
        make_resolver(offline=True).resolve(card)

    assert len(caught.value.missing) == 100
    assert all(checksum in str(caught.value) for checksum in caught.value.missing)


def test_offline_does_not_ask_the_network(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Transports that say that they use the network are not asked, and nothing is remembered of that."""
    card = serve(A, files)
    with pytest.raises(ResolveError):
        make_resolver(offline=True).resolve(card)

    assert origins.asked == []


def test_offline_finds_what_is_in_the_cache(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """A model that was resolved once is there without a network."""
    card = serve(A, files)
    make_resolver().resolve(card)
    origins.asked.clear()

    assert contents(make_resolver(offline=True).resolve(card)) == files
    assert origins.asked == []


def test_offline_uses_local_sources(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """A transport that needs no network is asked; what it lacks is listed, and not remembered."""
    disk = OriginSimulator({"file:///m/a": b"a"}, needs_network=False)
    card = ModelDeploymentCard("m", extra_files=tuple(extra(f"file:///m/{n}", n.encode()) for n in "abc"))
    resolver = make_resolver(offline=True, transports={"http": origins, "file": disk})

    with pytest.raises(ResolveError) as caught:
        resolver.resolve(card)
    disk.files.update({"file:///m/b": b"b", "file:///m/c": b"c"})

    assert sorted(caught.value.missing) == sorted(str(Checksum.of(data)) for data in (b"b", b"c"))
    assert sorted(attempt.url for attempt in caught.value.attempts) == ["file:///m/b", "file:///m/c"]
    assert contents(resolver.resolve(card)) == {"a": b"a", "b": b"b", "c": b"c"}


def test_offline_view_of_a_transport_is_asked(make_resolver: MakeResolver) -> None:
    """Of a transport that needs the network for some files only, what needs none is used, nothing else."""
    local = OriginSimulator({"hf://org/m/a": b"a"}, needs_network=False)

    class Hub(OriginSimulator):
        def offline(self) -> Optional[OriginSimulator]:
            return local

    hub = Hub({"hf://org/m/a": b"a", "hf://org/m/b": b"b"})
    card = ModelDeploymentCard("m", extra_files=tuple(extra(f"hf://org/m/{n}", n.encode()) for n in "ab"))

    with pytest.raises(ResolveError) as caught:
        make_resolver(offline=True, transports={"hf": hub}).resolve(card)

    assert hub.asked == []
    assert sorted(local.urls) == ["hf://org/m/a", "hf://org/m/b"]
    assert caught.value.missing == (str(Checksum.of(b"b")),)


# ------------------------------------------------------------------ ended from outside


def endless(transfer: simulator.Transfer) -> None:
    """Send the first piece again and again, until the sink does not take it."""
    while True:
        if transfer.sink.received:
            transfer.sink.restart()
        transfer.sink.write(b"x")
        time.sleep(0.001)


@pytest.fixture
def endless_card(origins: OriginSimulator) -> ModelDeploymentCard:
    """Return the card of eight files that never end."""
    origins.script("http://a:9090", endless, times=None)
    return make_card({f"{number}.json": b"%d" % number for number in range(8)}, A)


def resolving(work: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    """Do something that is to fail in another thread; return that and what is raised in it."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("close", "this resolver is closed"),
        ("stop", "the resolve of 'org/model' was ended by its stop event"),
    ],
)
def test_running_resolve_can_be_ended(
    make_resolver: MakeResolver,
    endless_card: ModelDeploymentCard,
    origins: OriginSimulator,
    cache: BlobCache,
    how: str,
    message: str,
) -> None:
    """Closing the resolver, or setting the call's event, ends all of its threads at their next piece."""
    resolver, stop = make_resolver(), threading.Event()
    thread, raised = resolving(lambda: resolver.resolve(endless_card, stop=stop))
    assert poll_until(lambda: len(origins.asked) == 4)

    resolver.close() if how == "close" else stop.set()
    thread.join(TIMEOUT)

    assert [type(error) for error in raised] == [RuntimeError]
    assert message in str(raised[0])
    assert len(origins.asked) == 4
    assert leftovers(cache) == []


def test_ended_resolve_leaves_the_resolver_as_it_was(
    make_resolver: MakeResolver, origins: OriginSimulator, serve: Serve, files: dict[str, bytes]
) -> None:
    """An event ends one call: nothing is remembered of it, and the next one is right."""
    resolver, stop = make_resolver(), threading.Event()
    card = serve(A, files)
    stop.set()

    with pytest.raises(RuntimeError, match="stop event"):
        resolver.resolve(card, stop=stop)

    assert origins.asked == []
    assert contents(resolver.resolve(card)) == files
    assert resolver.resolve(card, stop=stop).fetched == ()  # what is there needs no time


def test_close_beside_the_first_fetch_leaves_no_transport_open(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch, serve: Serve, files: dict[str, bytes]
) -> None:
    """Transports that are being made while the resolver is closed are closed, and not used."""
    from selfhost.frontend import transports

    made = OriginSimulator()

    def table(**options: Any) -> dict[str, OriginSimulator]:
        resolver.close()
        return {"http": made}

    monkeypatch.setattr(transports, "default_transports", table)
    resolver = MetadataResolver(cache)

    with pytest.raises(RuntimeError, match="closed"):
        resolver.resolve(serve(A, files))

    assert made.closed == 1
    assert made.asked == []


def test_close_in_a_signal_handler_cannot_block(
    make_resolver: MakeResolver, monkeypatch: pytest.MonkeyPatch, serve: Serve, files: dict[str, bytes]
) -> None:
    """Whatever the interrupted thread was at, and had locked, it can close the resolver."""
    resolver = make_resolver()
    with resolver._lock:
        resolver.close()

    with pytest.raises(RuntimeError, match="closed"):
        resolver.resolve(serve(A, files))


# ------------------------------------------------------------------ its life


def test_transports_that_were_passed_in_stay_open(
    make_resolver: MakeResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """Who opens closes."""
    with make_resolver() as resolver:
        resolver.resolve(serve(A, files))

    assert origins.closed == 0


def test_own_transports_are_closed_once(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch, serve: Serve, files: dict[str, bytes]
) -> None:
    """The resolver makes its transports when something is to be fetched, and closes each once."""
    from selfhost.frontend import transports

    made: list[OriginSimulator] = []
    asked_for: list[dict[str, Any]] = []

    def table(**options: Any) -> dict[str, OriginSimulator]:
        asked_for.append(options)
        made.append(OriginSimulator({f"{A}/{name}": data for name, data in files.items()}))
        return {"http": made[-1], "https": made[-1]}

    monkeypatch.setattr(transports, "default_transports", table)
    resolver = MetadataResolver(cache)
    assert made == []

    resolver.resolve(serve(A, files))
    resolver.resolve(serve(A, {f"{name}": data for name, data in files.items()}, name="other"))
    resolver.close()
    resolver.close()

    assert [origins.closed for origins in made] == [1]
    assert asked_for == [{"limits": resolver.limits.fetch, "offline": False}]


def test_closed_resolver_says_so(
    resolver: MetadataResolver, serve: Serve, files: dict[str, bytes], origins: OriginSimulator
) -> None:
    """After close nothing is fetched, and the error does not look like a missing file."""
    card = serve(A, files)
    resolver.close()

    with pytest.raises(RuntimeError, match="this resolver is closed"):
        resolver.resolve(card)

    assert origins.asked == []


def test_repr_tells_state_and_place(make_resolver: MakeResolver, cache: BlobCache) -> None:
    """A log line with a resolver in it is of use."""
    resolver = make_resolver(offline=True)

    assert repr(resolver) == f"<MetadataResolver offline cache={cache.root!r}>"
    resolver.close()
    assert repr(resolver).startswith("<MetadataResolver closed")


def test_plans_go_with_their_cards(resolver: MetadataResolver, serve: Serve, files: dict[str, bytes]) -> None:
    """What is kept of a card does not outlive it, nor is it mistaken for another's."""
    names = ["one", "two", "three"]

    for name in names:
        card: Optional[ModelDeploymentCard] = serve(A, files, name=name)
        assert resolver.resolve(card).card.display_name == name
        del card
        gc.collect()

    assert len(resolver._plans) == 0


def test_looking_up_loads_no_network_modules(
    cache: BlobCache, serve: Serve, files: dict[str, bytes], resolver: MetadataResolver
) -> None:
    """A process that finds everything in the cache never pays for http.client and ssl."""
    card = serve(A, files)
    resolver.resolve(card)
    code = """
        import sys
        from selfhost.card.model_card import ModelDeploymentCard
        from selfhost.frontend import BlobCache, MetadataResolver
        card = ModelDeploymentCard.from_json(sys.stdin.read())
        with MetadataResolver(BlobCache(sys.argv[1])) as resolver:
            assert resolver.resolve(card).fetched == ()
        print(*sorted({"http.client", "ssl", "werkzeug"} & set(sys.modules)))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), cache.root],
        input=card.to_json(), capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])},
    )  # fmt: skip

    assert ran.stderr == ""
    assert ran.stdout == "\n"
