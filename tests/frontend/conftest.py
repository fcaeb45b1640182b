"""What the frontend's tests share: origins that end with their test, cards, and a leak check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable

import helpers
import pytest
from simulator import ONE_BY_ONE, FakeClock, MakeResolver, OriginSimulator, Serve

from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.frontend.cache import BlobCache
from selfhost.frontend.resolver import MetadataResolver

# Two files in typed slots and one more; the sizes are far from what one packet or one buffer holds.
FILES = {
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer.json": bytes(range(256)) * 800,
    "notes.txt": b"an extra file\n",
}

StartOrigin = Callable[..., helpers.RudeOrigin]


@pytest.fixture
def files() -> dict[str, bytes]:
    """Return the files of a small model."""
    return dict(FILES)


@pytest.fixture
def make_card() -> Callable[..., ModelDeploymentCard]:
    """Return the function (files, base_url) -> card."""
    return helpers.make_card


@pytest.fixture
def rude_origin(leaves_nothing: None) -> Iterator[StartOrigin]:
    """Start origins (files, behaviour); they end with the test."""
    with ExitStack() as stack:

        def start(
            files: Mapping[str, bytes], behaviour: str = "well", **options: object
        ) -> helpers.RudeOrigin:
            return stack.enter_context(helpers.RudeOrigin(files, behaviour, **options))

        yield start


@pytest.fixture
def counting_origin(rude_origin: StartOrigin, files: dict[str, bytes]) -> helpers.RudeOrigin:
    """Return an origin that serves `files` well, and counts what it is asked."""
    return rude_origin(files)


# ------------------------------------------------------------------ resolvers over origins out of memory


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still unless somebody sleeps."""
    return FakeClock()


@pytest.fixture
def origins() -> OriginSimulator:
    """Return origins that have nothing yet."""
    return OriginSimulator()


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    """Return an empty cache."""
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def make_resolver(cache: BlobCache, origins: OriginSimulator, clock: FakeClock) -> Iterator[MakeResolver]:
    """Make resolvers over the cache and the origins; they end with the test."""
    made = []

    def make(**options: Any) -> MetadataResolver:
        given = {"transports": {"http": origins}, "clock": clock, "sleep": clock.sleep, "random": lambda: 0.5}
        made.append(MetadataResolver(cache, **{**given, **options}))
        return made[-1]

    yield make
    for resolver in made:
        resolver.close()


@pytest.fixture
def resolver(make_resolver: MakeResolver) -> MetadataResolver:
    """Return a resolver that fetches one file after the other."""
    return make_resolver(limits=ONE_BY_ONE)


@pytest.fixture
def serve(origins: OriginSimulator) -> Serve:
    """Serve files at an address; return the card of the model."""

    def serve_at(base: str, files: dict[str, bytes], **options: Any) -> ModelDeploymentCard:
        card = helpers.make_card(files, base, **options)
        by_digest = {Checksum.of(data): data for data in files.values()}
        origins.files.update({file.path: by_digest[file.checksum] for file, _ in card.iter_metadata_files()})
        return card

    return serve_at
