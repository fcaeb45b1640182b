"""The registry: who answers for which key; all or nothing, counted, shared, threaded and forked."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable
from urllib.parse import unquote

import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from selfhost.errors import RegistrationError
from selfhost.worker.content import Content, pin_bytes, pin_file
from selfhost.worker.registry import (
    BASE_SUFFIX,
    MAX_NAME_BYTES,
    MetadataArtifactRegistry,
    Registration,
    why_unservable,
)
from selfhost.worker.shared_journal import render

MakeFile = Callable[[str, bytes], str]
ONE, TWO, THREE = b"one", b"two", b"three"
LARGE = bytes(100_000)  # small files are never held


@pytest.fixture(params=["plain", "shared"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MetadataArtifactRegistry]:
    """Return an empty registry of either kind: the rules are the same."""
    shared = None if request.param == "plain" else tmp_path / "shared"
    with contextlib.closing(MetadataArtifactRegistry(shared=shared)) as registry:
        yield registry


@pytest.fixture
def plain() -> MetadataArtifactRegistry:
    """Return an empty registry of this process alone."""
    return MetadataArtifactRegistry()


def digest(data: bytes) -> str:
    """Return the blake3 hex digest."""
    return blake3(data).hexdigest()


def read(registry: MetadataArtifactRegistry, *key: str) -> bytes | None:
    """Return the bytes that answer for (slug, suffix, filename[, digest]), or None."""
    artifact = registry.get(*key)
    return artifact and artifact.content.read(0, artifact.content.size)


EMPTY = "<MetadataArtifactRegistry models=0 files=0>"


def shown(registry: MetadataArtifactRegistry) -> str:
    """Return the repr, without the folder of a shared one."""
    return repr(registry).replace(f" shared={registry.shared!r}", "")


# ------------------------------------------------------------------ one registration


def test_register_and_get(registry: MetadataArtifactRegistry, make_file: MakeFile) -> None:
    """A registered file answers for its key and for nothing else."""
    registration = registry.register("m", BASE_SUFFIX, "f.json", make_file("elsewhere", ONE))

    assert read(registry, "m", "_base", "f.json") == ONE
    assert read(registry, "m", "_base", "f.json", digest(ONE)) == ONE
    assert read(registry, "m", "_base", "f.json", digest(TWO)) is None
    assert read(registry, "m", "_base", "elsewhere") is None
    assert read(registry, "m", "lora", "f.json") is None
    assert dict(registration.targets) == {"f.json": "/v1/metadata/m/_base/f.json"}


def test_counts(registry: MetadataArtifactRegistry) -> None:
    """Length, emptiness, iteration and bytes follow what is registered."""
    assert (len(registry), registry.is_empty(), list(registry), registry.pinned_bytes) == (0, True, [], 0)
    registry.register_files("m", "_base", {"a": pin_bytes(ONE), "b": pin_bytes(ONE), "c": pin_bytes(THREE)})

    assert (len(registry), registry.is_empty()) == (3, False)
    assert [artifact.filename for artifact in registry] == ["a", "b", "c"]
    assert registry.pinned_bytes == len(ONE) + len(THREE)
    assert shown(registry) == "<MetadataArtifactRegistry models=1 files=3>"


def test_empty_registry_is_true(registry: MetadataArtifactRegistry) -> None:
    """`registry or default` must never replace an empty registry."""
    assert registry


def test_iteration_is_a_snapshot(registry: MetadataArtifactRegistry) -> None:
    """What is registered or removed meanwhile does not disturb an iteration."""
    registry.register_files("m", "_base", {"a": pin_bytes(ONE), "b": pin_bytes(TWO)})
    names = []
    for artifact in registry:
        names.append(artifact.filename)
        registry.unregister("m", "_base")
        registry.register("n", "_base", "c", pin_bytes(THREE))

    assert names == ["a", "b"]


def test_no_files_is_a_registration(registry: MetadataArtifactRegistry) -> None:
    """A model without files of its own leaves no trace."""
    with registry.register_files("m", "_base", {}) as registration:
        assert (len(registry), dict(registration.targets)) == (0, {})
        assert shown(registry) == EMPTY


def test_closing_removes_exactly_its_own(registry: MetadataArtifactRegistry) -> None:
    """A handle takes away what it brought, once, and nobody else's."""
    first = registry.register_files("m", "_base", {"a": pin_bytes(ONE), "b": pin_bytes(TWO)})
    with registry.register_files("m", "_base", {"b": pin_bytes(TWO), "c": pin_bytes(THREE)}):
        first.close()
        first.close()
        assert {artifact.filename for artifact in registry} == {"b", "c"}

    assert registry.is_empty()
    assert repr(first) == "<Registration closed files=2>"


def test_all_or_nothing(registry: MetadataArtifactRegistry, make_file: MakeFile) -> None:
    """One bad file among good ones, and none is registered."""  # catalogue 99
    good = make_file("good", ONE)
    registry.register("m", "_base", "b", good)
    with pytest.raises(RegistrationError, match="'/nowhere/at/all': No such file or directory") as caught:
        registry.register_files("m", "_base", {"a": good, "b": good, "c": "/nowhere/at/all"})

    assert caught.value.filename == "c"
    assert [artifact.filename for artifact in registry] == ["b"]
    assert registry.unregister("m", "_base") == 1


# ------------------------------------------------------------------ same key, same or other content


def test_same_content_is_shared_and_counted(registry: MetadataArtifactRegistry) -> None:
    """Registered twice under one key it is one entry, which goes with the last handle."""  # catalogue 102
    first = registry.register("m", "_base", "f", pin_bytes(ONE))
    second = registry.register("m", "_base", "f", pin_bytes(bytes(ONE)))
    assert (len(registry), first.artifacts) == (1, second.artifacts)
    first.close()

    assert read(registry, "m", "_base", "f") == ONE
    second.close()
    assert read(registry, "m", "_base", "f") is None


def test_other_content_stands_beside(registry: MetadataArtifactRegistry) -> None:
    """The first keeps the plain URL, the newcomer's carries its digest, both are reachable."""
    first = registry.register("m", "_base", "f", pin_bytes(ONE))
    second = registry.register("m", "_base", "f", pin_bytes(TWO))

    assert first.targets["f"] == "/v1/metadata/m/_base/f"
    assert second.targets["f"] == f"/v1/metadata/m/_base/f?blake3={digest(TWO)}"
    assert read(registry, "m", "_base", "f") == ONE
    assert read(registry, "m", "_base", "f", digest(ONE)) == ONE
    assert read(registry, "m", "_base", "f", digest(TWO)) == TWO
    assert len(registry) == 2


def test_next_oldest_takes_the_plain_url(registry: MetadataArtifactRegistry) -> None:
    """When the first goes, the second answers both of its URLs, and the third still its own."""
    one, two, three = (registry.register("m", "_base", "f", pin_bytes(data)) for data in (ONE, TWO, THREE))
    one.close()

    assert read(registry, "m", "_base", "f") == TWO
    assert registry.lookup("/v1/metadata/m/_base/f") is two.artifacts[0]
    assert registry.lookup(two.targets["f"]) is two.artifacts[0]
    assert registry.lookup(three.targets["f"]) is three.artifacts[0]
    assert read(registry, "m", "_base", "f", digest(ONE)) is None


def test_former_first_comes_back_as_a_newcomer(registry: MetadataArtifactRegistry) -> None:
    """Content that left its plain URL to another does not take it away again."""
    one = registry.register("m", "_base", "f", pin_bytes(ONE))
    registry.register("m", "_base", "f", pin_bytes(TWO))
    one.close()
    again = registry.register("m", "_base", "f", pin_bytes(ONE))

    assert again.targets["f"].endswith(f"?blake3={digest(ONE)}")
    assert read(registry, "m", "_base", "f") == TWO


def test_younger_ones_leave_the_plain_url_alone(registry: MetadataArtifactRegistry) -> None:
    """Closing a newcomer, in the middle too, changes nothing for the others."""
    one, two, three = (registry.register("m", "_base", "f", pin_bytes(data)) for data in (ONE, TWO, THREE))
    two.close()

    assert registry.lookup("/v1/metadata/m/_base/f") is one.artifacts[0]
    assert registry.lookup(two.targets["f"]) is None
    assert registry.lookup(three.targets["f"]) is three.artifacts[0]
    assert len(registry) == 2


def test_base_and_lora_do_not_meet(registry: MetadataArtifactRegistry) -> None:
    """A base model and its LoRA may have files of one name; either goes without the other."""  # catalogue 48
    base = registry.register("m", BASE_SUFFIX, "config.json", pin_bytes(ONE))
    lora = registry.register("m", "lora", "config.json", pin_bytes(TWO))
    assert lora.targets["config.json"] == "/v1/metadata/m/lora/config.json"
    base.close()

    assert read(registry, "m", "lora", "config.json") == TWO
    assert registry.unregister("m", BASE_SUFFIX) == 0
    assert read(registry, "m", "lora", "config.json") == TWO


def test_unregister_wins_over_handles(registry: MetadataArtifactRegistry) -> None:
    """`unregister` removes every content of a model, and its handles then take nothing of a newcomer's."""
    old = [registry.register("m", "_base", "f", pin_bytes(data)) for data in (ONE, ONE, TWO)]
    assert registry.unregister("m", "_base") == 2
    assert registry.unregister("m", "_base") == 0
    registry.register("m", "_base", "f", pin_bytes(ONE))
    for registration in old:
        registration.close()

    assert read(registry, "m", "_base", "f") == ONE
    assert len(registry) == 1


# ------------------------------------------------------------------ content of the process


def test_equal_content_is_kept_once(plain: MetadataArtifactRegistry, make_file: MakeFile) -> None:
    """Whatever the key or the registry, equal bytes are one object."""
    other = MetadataArtifactRegistry()
    artifacts = [
        *plain.register("m", "_base", "a", make_file("a", ONE)).artifacts,
        *plain.register("m", "_base", "b", make_file("b", ONE)).artifacts,
        *plain.register("n", "lora", "a", pin_bytes(bytes(ONE))).artifacts,
        *other.register("m", "_base", "a", make_file("c", ONE)).artifacts,
    ]

    assert len({id(artifact.content) for artifact in artifacts}) == 1
    assert plain.pinned_bytes == len(ONE)


def is_kept(data: bytes) -> bool:
    """Tell whether the process still keeps `data`: then it prefers that to what is registered now."""
    newcomer = pin_bytes(data)
    with MetadataArtifactRegistry().register("probe", "_base", "f", newcomer) as probe:
        return probe.artifacts[0].content is not newcomer


def test_content_goes_with_its_last_user(plain: MetadataArtifactRegistry) -> None:
    """Content is given back when the last key of it is gone, not before."""
    first = plain.register("m", "_base", "f", pin_bytes(b"to be given back"))
    second = plain.register("n", "_base", "f", pin_bytes(b"to be given back"))
    first.close()
    assert is_kept(b"to be given back")
    second.close()

    assert not is_kept(b"to be given back")


def test_dropped_registry_gives_its_content_back() -> None:
    """Nobody has to close what a registry holds before forgetting the registry."""
    registry = MetadataArtifactRegistry()
    registry.register("m", "_base", "f", pin_bytes(b"forgotten"))
    registry.register("m", "_base", "f", pin_bytes(b"forgotten too"))
    assert is_kept(b"forgotten")
    del registry
    gc.collect()

    assert not is_kept(b"forgotten")
    assert not is_kept(b"forgotten too")


def test_same_registration_renews_a_changed_held_file(
    plain: MetadataArtifactRegistry, make_file: MakeFile
) -> None:
    """A held file that changed is served again once the same bytes are registered anew."""
    path = make_file("f", LARGE)
    old = plain.register("m", "_base", "f", pin_file(path, max_pinned_bytes=0))
    os.truncate(path, 1)
    assert not old.artifacts[0].content.is_intact()
    new = plain.register("m", "_base", "f", pin_file(make_file("g", LARGE), max_pinned_bytes=0))
    old.close()

    assert read(plain, "m", "_base", "f") == LARGE
    new.close()
    assert not is_kept(LARGE)


def test_held_files_take_no_memory(plain: MetadataArtifactRegistry, make_file: MakeFile) -> None:
    """`pinned_bytes` counts memory alone."""
    plain.register("m", "_base", "f", pin_file(make_file("f", LARGE), max_pinned_bytes=0))

    assert (len(plain), plain.pinned_bytes) == (1, 0)


# ------------------------------------------------------------------ cards


def test_card_answers_for_its_model(registry: MetadataArtifactRegistry) -> None:
    """A card stands beside the model's files, under the model's own URL."""
    files = registry.register("m", "_base", "f", pin_bytes(ONE))
    card = registry.register_card("m", "_base", '{"名": 1}')

    assert read(registry, "m", "_base", "") == '{"名": 1}'.encode()
    assert dict(card.targets) == {"": "/v1/metadata/m/_base"}
    assert registry.lookup("/v1/metadata/m/_base") is card.artifacts[0]
    assert read(registry, "m", "lora", "") is None
    card.close()
    assert read(registry, "m", "_base", "") is None
    assert read(registry, "m", "_base", "f") == ONE
    files.close()


def test_card_is_no_file(registry: MetadataArtifactRegistry) -> None:
    """Length, iteration and bytes are those of files; only emptiness and removal see the card."""
    registry.register_card("m", "_base", "{}")
    assert (len(registry), list(registry), registry.pinned_bytes) == (0, [], 0)
    assert not registry.is_empty()
    registry.register("m", "_base", "f", pin_bytes(ONE))

    assert registry.unregister("m", "_base") == 1
    assert registry.is_empty()


def test_two_cards_of_one_model(registry: MetadataArtifactRegistry) -> None:
    """The oldest has the plain URL, the other one its digest's; closing removes exactly its own."""
    one, two = (registry.register_card("m", "_base", text) for text in ("1", "2"))
    assert two.targets[""] == f"/v1/metadata/m/_base?blake3={digest(b'2')}"
    assert read(registry, "m", "_base", "") == b"1"
    one.close()

    assert read(registry, "m", "_base", "") == b"2"
    assert registry.lookup(two.targets[""]) is registry.lookup("/v1/metadata/m/_base")
    two.close()
    assert registry.is_empty()


def test_equal_cards_are_counted(registry: MetadataArtifactRegistry) -> None:
    """Two models with one card share it until both are gone."""
    one, two = (registry.register_card("", "_base", "same") for _ in range(2))
    assert one.artifacts == two.artifacts
    one.close()
    one.close()

    assert registry.lookup("/v1/metadata//_base") is not None
    two.close()
    assert not is_kept(b"same")


@pytest.mark.parametrize(("slug", "suffix"), [("a/b", "_base"), ("m", ""), ("m", "..")])
def test_card_of_an_impossible_key(registry: MetadataArtifactRegistry, slug: str, suffix: str) -> None:
    """What cannot be part of a URL path is refused for a card as for a file."""
    with pytest.raises(RegistrationError):
        registry.register_card(slug, suffix, "{}")
    assert registry.is_empty()


# ------------------------------------------------------------------ names

REFUSED_NAMES = [
    ".",
    "..",
    "a/b",
    "/",
    "../x",
    "a\\b",
    "a\0",
    "\n",
    "a\r\nX-Inj: 1",  # catalogue 40
    "\t",
    "\x1f",
    "\x7f",
    "\x80",
    "\x9f",
    "\ud800",
    "a\udfff",
    "x" * 256,
    "é" * 128,
    "模" * 86,
]


@pytest.mark.parametrize("name", ["", *REFUSED_NAMES], ids=ascii)
def test_refused_names(registry: MetadataArtifactRegistry, name: str) -> None:
    """What is no single, printable segment of a path is refused, wherever it stands."""  # catalogue 15
    for what in ("slug", "suffix", "filename"):
        key = {"slug": "m", "suffix": "_base", "filename": "f", what: name}
        if key["slug"] == "":
            continue
        with pytest.raises(RegistrationError, match=f"^cannot register the {what} ") as caught:
            registry.register(key["slug"], key["suffix"], key["filename"], pin_bytes(ONE))
        assert getattr(caught.value, what) == name
        assert "\n" not in str(caught.value)
    assert registry.is_empty()


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "...",
        ".hidden",
        "..x",
        " ",
        "a b.json",
        "?",
        "#",
        "%41",
        "%2e%2e%2f",
        "100%",
        "'\"<>&;=+,:@!$*()[]{}|^`~",
        "CON",
        "naïve 模型 🦙",
        "\u2028",
        "\u202e",
        "\ue000",
        "x" * MAX_NAME_BYTES,
        "模" * 85,
    ],
    ids=ascii,
)
def test_servable_names(registry: MetadataArtifactRegistry, name: str) -> None:
    """Any other name is served: its URL is plain ASCII, has no other meaning, and decodes to the name."""
    target = registry.register(name, name, name, pin_bytes(ONE)).targets[name]

    assert why_unservable(name) is None
    assert target.isascii()
    assert not set(target) & set("?#\\ \"'<>`{}|^;&+")
    assert [unquote(segment) for segment in target.split("/")] == ["", "v1", "metadata", name, name, name]


def test_empty_slug_is_one(registry: MetadataArtifactRegistry) -> None:
    """A model whose name has no ASCII letter or digit has an empty slug."""
    registration = registry.register("", "_base", "f", pin_bytes(ONE))

    assert registration.targets["f"] == "/v1/metadata//_base/f"
    assert read(registry, "", "_base", "f") == ONE


# ------------------------------------------------------------------ followers


class Mirror:
    """A follower that does in a registry of its own what it is told of."""

    def __init__(self) -> None:
        self.copy = MetadataArtifactRegistry()
        self.held: dict[str, Any] = {}
        self.told: list[str] = []

    def added(self, registration: Registration) -> None:
        """Put it in."""
        self.told.append(f"+{registration.slug}")
        self.held[registration.id] = self.copy.restore(
            registration.slug, registration.suffix, registration.rows
        )

    def removed(self, registration: Registration) -> None:
        """Take it out."""
        self.told.append(f"-{registration.slug}")
        self.held.pop(registration.id).close()

    def settle(self) -> None:
        """Note that somebody waits."""
        self.told.append("settle")


def test_follower_is_told_of_every_change_in_order(registry: MetadataArtifactRegistry) -> None:
    """What is there comes first; each change is told once, then waited for; unfollowing ends it."""
    old = registry.register("old", "_base", "f", pin_bytes(ONE))
    mirror = Mirror()
    unfollow = registry.follow(mirror)
    with registry.register_card("card", "_base", "{}"):
        old.close()
        old.close()
    registry.register_files("m", "_base", {})
    registry.unregister("m", "_base")
    registry.unregister("m", "_base")
    unfollow()
    unfollow()
    registry.register("n", "_base", "f", pin_bytes(ONE))

    assert mirror.told[:9] == ["+old", "+card", "settle", "-old", "settle", "-card", "settle", "+m", "settle"]
    assert [told for told in mirror.told[9:] if told != "settle"] == ["-m"]
    assert mirror.held == {}


def test_unregister_is_the_removal_of_every_registration(registry: MetadataArtifactRegistry) -> None:
    """A follower sees each of them go, and no other model's."""
    mirror = Mirror()
    registry.follow(mirror)
    for data in (ONE, ONE, TWO):
        registry.register("m", "_base", "f", pin_bytes(data))
    registry.register("n", "_base", "f", pin_bytes(ONE))
    registry.unregister("m", "_base")

    assert [told for told in mirror.told if told != "settle"] == ["+m", "+m", "+m", "+n", "-m", "-m", "-m"]
    assert [artifact.slug for artifact in mirror.copy] == ["n"]


def test_late_follower_is_told_in_order(registry: MetadataArtifactRegistry) -> None:
    """What is there is told as it was registered, model by model only if it was."""
    for number, slug in enumerate("mnmn"):
        registry.register(slug, "_base", str(number), pin_bytes(ONE))
    mirror = Mirror()
    registry.follow(mirror)

    assert mirror.told == ["+m", "+n", "+m", "+n"]


def test_late_follower_learns_who_is_older(registry: MetadataArtifactRegistry) -> None:
    """A content that outlives its first registration keeps its URL, for who comes later too."""
    first = registry.register("m", "_base", "f", pin_bytes(ONE))
    registry.register_files("m", "_base", {"f": pin_bytes(TWO), "g": pin_bytes(TWO)})
    registry.register_files("m", "_base", {"f": pin_bytes(ONE), "g": pin_bytes(ONE)})
    first.close()
    mirror = Mirror()
    registry.follow(mirror)

    assert (read(mirror.copy, "m", "_base", "f"), read(mirror.copy, "m", "_base", "g")) == (ONE, TWO)
    assert targets(mirror.copy) == targets(registry)


def targets(registry: MetadataArtifactRegistry) -> dict[str, str]:
    """Return the digest that answers each URL."""
    return {target: artifact.content.hex for target, artifact in registry._current().targets.items()}


def test_follower_that_fails_harms_nobody(
    registry: MetadataArtifactRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """The change is made, the other followers are told, and the log says what happened."""
    broken, mirror = Mirror(), Mirror()
    broken.held = None  # type: ignore[assignment]
    registry.follow(broken)
    registry.follow(mirror)
    registry.register("m", "_base", "f", pin_bytes(ONE)).close()

    assert mirror.told == ["+m", "settle", "-m", "settle"]
    assert caplog.text.count("a follower of the registry failed") == 2


def test_version_changes_with_every_change(registry: MetadataArtifactRegistry) -> None:
    """Whoever keeps something made of the registry can tell when it is out of date."""
    seen = [registry.version]
    registration = registry.register("m", "_base", "f", pin_bytes(ONE))
    seen.append(registry.version)
    registry.register_card("m", "_base", "{}")
    seen.append(registry.version)
    registration.close()
    seen.append(registry.version)
    registry.unregister("m", "_base")
    seen.append(registry.version)
    registration.close()

    assert len(set(seen)) == 5
    assert registry.version == seen[-1]


def test_close_while_files_are_read(registry: MetadataArtifactRegistry, make_file: MakeFile) -> None:
    """A registration whose files another thread's `close` overtakes is refused."""
    path = make_file("f", ONE)

    class Closing:
        def __fspath__(self) -> str:
            registry.close()
            return path

    with pytest.raises(RegistrationError, match="the registry is closed"):
        registry.register("m", "_base", "f", Closing())

    assert registry.is_empty()


def test_closed_registry_is_empty_and_stays_so(registry: MetadataArtifactRegistry) -> None:
    """Closing withdraws everything, and what is registered later is refused."""
    mirror = Mirror()
    registry.follow(mirror)
    registration = registry.register("m", "_base", "f", pin_bytes(b"to be closed"))
    registry.close()
    registry.close()
    registration.close()

    assert registry.is_empty()
    assert mirror.held == {}
    assert not is_kept(b"to be closed")
    with pytest.raises(RegistrationError, match="the registry is closed"):
        registry.register("m", "_base", "f", pin_bytes(ONE))


def test_models_of_a_registry(registry: MetadataArtifactRegistry) -> None:
    """Each model's key, and what it has: cards, and younger contents behind the oldest."""
    registry.register_card("m", "_base", "{}")
    registry.register("m", "_base", "f", pin_bytes(ONE))
    registry.register("m", "_base", "f", pin_bytes(TWO))
    registry.register("n", "lora", "f", pin_bytes(TWO))

    assert registry.keys() == [("m", "_base"), ("n", "lora")]
    assert [one.content.hex for one in registry.model("m", "_base")] == [
        digest(b"{}"),
        digest(ONE),
        digest(TWO),
    ]
    assert registry.model("m", "lora") == []


# ------------------------------------------------------------------ against a model


class Entry:
    """What the model knows of one content under one key."""

    def __init__(self, data: bytes, target: str) -> None:
        self.data = data
        self.target = target
        self.holders = 0


MODELS = st.sampled_from([("m", "_base"), ("m", "lora"), ("n", "_base")])
CONTENTS = st.sampled_from([ONE, TWO, THREE])
WHICH = st.integers(0, 10**6)


class RegistryMachine(RuleBasedStateMachine):
    """A registry and a plain list of entries per key, which must always agree."""

    def __init__(self) -> None:
        super().__init__()
        self.registries = self.start()
        self.mirror = Mirror()
        self.registries[0].follow(self.mirror)
        self.entries: dict[tuple[str, str, str], list[Entry]] = {}
        self.handles: list[tuple[Any, list[Entry]]] = []
        self.open: set[int] = set()

    def start(self) -> list[MetadataArtifactRegistry]:
        """Return the registries that shall be equal."""
        return [MetadataArtifactRegistry()]

    def choose(self, which: int) -> MetadataArtifactRegistry:
        """Return any registry."""
        return self.registries[which % len(self.registries)]

    @rule(model=MODELS, files=st.dictionaries(st.sampled_from("ab"), CONTENTS), which=WHICH)
    def register(self, model: tuple[str, str], files: dict[str, bytes], which: int) -> None:
        """Register a model, whatever is there already."""
        plain = "/v1/metadata/" + "/".join(model)
        held = [self.hold((*model, name), data, f"{plain}/{name}") for name, data in files.items()]
        pinned = {name: pin_bytes(bytes(data)) for name, data in files.items()}
        handle = self.choose(which).register_files(*model, pinned)
        assert list(handle.targets.values()) == [entry.target for entry in held]
        self.open.add(len(self.handles))
        self.handles.append((handle, held))

    @rule(model=MODELS, data=CONTENTS, which=WHICH)
    def register_card(self, model: tuple[str, str], data: bytes, which: int) -> None:
        """Register a card, whatever is there already."""
        plain = "/v1/metadata/" + "/".join(model)
        held = [self.hold((*model, ""), data, plain)]
        handle = self.choose(which).register_card(*model, data.decode())
        assert dict(handle.targets) == {"": held[0].target}
        self.open.add(len(self.handles))
        self.handles.append((handle, held))

    def hold(self, key: tuple[str, str, str], data: bytes, plain: str) -> Entry:
        """Note that one more handle has this content under this key."""
        same_name = self.entries.setdefault(key, [])
        entry = next((e for e in same_name if e.data == data), None)
        if entry is None:
            entry = Entry(data, f"{plain}?blake3={digest(data)}" if same_name else plain)
            same_name.append(entry)
        entry.holders += 1
        return entry

    @precondition(lambda self: self.handles)
    @rule(choice=WHICH)
    def close(self, choice: int) -> None:
        """Close any handle, whether it is open or not."""
        number = choice % len(self.handles)
        self.handles[number][0].close()
        self.let_go([number])

    def let_go(self, numbers: list[int]) -> None:
        """Note that handles are closed now."""
        for number in self.open.intersection(numbers):
            for entry in self.handles[number][1]:
                entry.holders = max(entry.holders - 1, 0)
        self.open.difference_update(numbers)
        self.forget_unheld()

    @rule(model=st.sampled_from([("m", "_base"), ("m", "lora"), ("n", "_base"), ("n", "lora")]), which=WHICH)
    def unregister(self, model: tuple[str, str], which: int) -> None:
        """Remove a model under its handles."""
        gone = [(key, e) for key, entries in self.entries.items() if key[:2] == model for e in entries]
        for _, entry in gone:
            entry.holders = 0
        self.forget_unheld()
        assert self.choose(which).unregister(*model) == len([key for key, _ in gone if key[2]])

    def forget_unheld(self) -> None:
        """Drop the entries that nobody holds any more."""
        self.entries = {k: left for k, es in self.entries.items() if (left := [e for e in es if e.holders])}

    @invariant()
    def every_url_answers(self) -> None:
        """Plain and digest URLs select what the model says, and no other URL is left."""
        urls: dict[str, bytes] = {}
        for (slug, suffix, name), entries in self.entries.items():
            urls[f"/v1/metadata/{slug}/{suffix}/{name}".rstrip("/")] = entries[0].data
            urls.update((entry.target, entry.data) for entry in entries)
        for registry in self.registries:
            for (slug, suffix, name), entries in self.entries.items():
                assert read(registry, slug, suffix, name) == entries[0].data
                for entry in entries:
                    assert read(registry, slug, suffix, name, digest(entry.data)) == entry.data
            assert targets(registry) == {target: digest(data) for target, data in urls.items()}

    @invariant()
    def counts_agree(self) -> None:
        """Length, iteration and bytes are the model's, cards left out; nothing is left behind."""
        entries = [entry for key, same_name in self.entries.items() if key[2] for entry in same_name]
        for registry in self.registries:
            assert registry.is_empty() == (not self.entries)
            assert len(registry) == len(entries)
            assert {a.target for a in registry} == {entry.target for entry in entries}
            assert registry.pinned_bytes == sum(map(len, {entry.data for entry in entries}))

    @invariant()
    def followers_agree(self) -> None:
        """Who was told of everything, and who comes only now, has the same URLs and the same oldest."""
        late = Mirror()
        self.registries[0].follow(late)()
        for mirror in (self.mirror, late):
            assert targets(mirror.copy) == targets(self.registries[0])
            assert sorted(mirror.copy.keys()) == sorted(self.registries[0].keys())

    def teardown(self) -> None:
        """Close every handle: nothing stays, in the registry or in the process."""
        for handle, _ in self.handles:
            handle.close()
        for registry in self.registries:
            assert registry.is_empty()
            assert shown(registry) == EMPTY
        self.mirror = Mirror()
        assert not any(is_kept(data) for data in (ONE, TWO, THREE))


class SharedRegistryMachine(RegistryMachine):
    """Three registries on one folder, one of them as old as the others or new, against the same model.

    A fourth one, `rare`, looks only now and then: it misses what came and went in between.
    """

    def start(self) -> list[MetadataArtifactRegistry]:
        """Share a folder."""
        self.folder = tempfile.TemporaryDirectory()
        *registries, self.rare = [
            MetadataArtifactRegistry(shared=f"{self.folder.name}/shared") for _ in range(4)
        ]
        return registries

    @rule()
    def look(self) -> None:
        """Let the fourth one see what the others have, and in which order it came."""
        first = self.registries[0]
        assert targets(self.rare) == targets(first)
        keys = first.keys()
        for key in keys:
            expected = [(one.target, one.serial) for one in first.model(*key)]
            assert sorted((one.target, one.serial) for one in self.rare.model(*key)) == sorted(expected)

    @rule()
    def restart(self) -> None:
        """End the last registry, as if its process exited, and start another one."""
        last = self.registries.pop()
        self.let_go([n for n, (handle, _) in enumerate(self.handles) if handle._registry is last])
        last.close()
        self.registries.append(MetadataArtifactRegistry(shared=f"{self.folder.name}/shared"))

    @rule(which=WHICH)
    def compact(self, which: int) -> None:
        """Replace the journal, which the others notice."""
        shared = self.choose(which)._shared
        with shared._writing():
            shared._rewrite(list(map(render, shared._replica.snapshot())))

    def teardown(self) -> None:
        """Nothing stays in the folder either."""
        super().teardown()
        self.look()
        assert os.listdir(f"{self.folder.name}/shared/content") == []
        for registry in (*self.registries, self.rare):
            registry.close()
        assert os.listdir(f"{self.folder.name}/shared/owners") == []
        self.folder.cleanup()


SETTINGS = settings(max_examples=100, stateful_step_count=30, derandomize=True, database=None, deadline=None)
TestAgainstModel = RegistryMachine.TestCase  # catalogue 96
TestAgainstModel.settings = SETTINGS
TestSharedAgainstModel = SharedRegistryMachine.TestCase
TestSharedAgainstModel.settings = settings(SETTINGS, max_examples=50)


# ------------------------------------------------------------------ threads


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Let threads take turns at every opportunity."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_sixteen_threads(registry: MetadataArtifactRegistry, fast_switches: None) -> None:
    """A hundred thousand operations at once: own models are exact, shared ones never wrong."""
    contents = [pin_bytes(data) for data in (ONE, TWO, THREE)]  # catalogue 96
    turns = 6_000 if registry.shared is None else 100  # each of these is a lock, a line and a file
    start = threading.Barrier(16)

    def work(number: int) -> list[Any]:
        start.wait()
        return list(hammer(registry, f"own{number}", contents, random.Random(number), turns))

    with ThreadPoolExecutor(16) as pool:
        wrong = [found for founds in pool.map(work, range(16)) for found in founds]
    assert wrong == []
    assert (registry.is_empty(), shown(registry)) == (True, EMPTY)
    assert not any(is_kept(data) for data in (ONE, TWO, THREE))


def hammer(
    registry: MetadataArtifactRegistry, own: str, contents: list[Content], rng: random.Random, turns: int
) -> Iterator[Any]:
    """Register, read and close in one thread; yield what was not as it must be."""
    for turn in range(turns):
        content = rng.choice(contents)
        with registry.register(f"rare{turn % 2}", "_base", "f", content) as rare:  # comes and goes
            if registry.get(f"rare{turn % 2}", "_base", "f", content.checksum.hex) not in rare.artifacts:
                yield "rare", turn
        if turn % 10:
            continue
        common = registry.register("common", "_base", "f", content)
        mine = registry.register_files(own, "_base", {"f": content, "g": contents[0]})
        found = registry.get("common", "_base", "f", content.checksum.hex)
        if found is None or found.content.checksum != content.checksum:
            yield "common", found
        plain = registry.lookup("/v1/metadata/common/_base/f") or registry.get("common", "_base", "f")
        if plain is None:  # this thread holds one, so there is an oldest
            yield "plain", plain
        artifact = registry.get(own, "_base", "f")
        if artifact is None or artifact.content.checksum != content.checksum:
            yield own, artifact
        mine.close()
        common.close()
        if registry.get(own, "_base", "f") is not None:
            yield own, "still there"


# ------------------------------------------------------------------ forks


def test_children_of_a_busy_parent_do_not_hang(run_script: Any) -> None:
    """Forked at any moment of other threads' registrations, a child registers and looks up at once."""
    done = run_script(  # catalogue 43
        """
        import os, signal, sys, threading, warnings
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the very subject
        sys.setswitchinterval(1e-4)
        registry, stop = MetadataArtifactRegistry(), threading.Event()
        contents = [pin_bytes(b"%d" % i) for i in range(50)]
        files = {str(i): content for i, content in enumerate(contents)}
        registry.register("m", "_base", "f", pin_bytes(b"before the fork"))

        def work(number):
            while not stop.is_set():
                registry.register_files(f"t{number}", "_base", files).close()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(150):
            child = os.fork()
            if not child:
                signal.alarm(30)  # a child that waits for a lock would wait for ever
                found = registry.get("m", "_base", "f")
                with registry.register("c", "_base", "f", pin_bytes(b"in the child")):
                    ok = found.content.read(0, 6) == b"before" and registry.get("c", "_base", "f")
                os._exit(0 if ok and list(registry) else 1)
            failed = os.waitpid(child, 0)[1]
            if failed:
                break
        stop.set()
        for thread in threads:
            thread.join()
        print(failed, len(registry))
        """,
        timeout=200,
    )

    assert (done.stdout, done.stderr) == ("0 1\n", "")


def test_limit_of_pinned_files_can_be_set(make_file: MakeFile) -> None:
    """A registry holds open what is larger than it may keep in memory."""
    registry = MetadataArtifactRegistry(max_pinned_bytes=len(LARGE) - 1)

    (artifact,) = registry.register("m", "_base", "f", make_file("f", LARGE)).artifacts

    assert (artifact.content.data, registry.pinned_bytes) == (None, 0)
