"""What attaching a model did is undone: by a failure half-way, and by detaching."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from helpers import DEMO_FILES

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.slots import ModelSlot
from selfhost.discovery import Bucket
from selfhost.errors import DiscoveryError, RegistrationError, SettingsError, StatusServerError
from selfhost.settings import Settings
from selfhost.worker.local_model import LocalModel
from selfhost.worker.runtime import DistributedRuntime

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# ------------------------------------------------------------------ failures undo everything


@pytest.mark.parametrize("bucket", list(Bucket))
def test_refused_record_undoes_everything(
    bucket: Bucket, runtime: Any, spy: Any, model_dir: Any, fetch_files: Any
) -> None:
    """When discovery takes no record, routes, instance and card are as before; a second try works."""
    model = LocalModel.load(model_dir(), name="m")
    before = model.card
    spy.fail_on = bucket
    with pytest.raises(DiscoveryError, match="told to fail"):
        model.attach(runtime.endpoint("ns.comp.ep"))

    assert spy.is_empty()
    assert runtime.metadata_artifacts.is_empty()
    assert (model.card, model.is_attached, model.files) == (before, False, ())
    spy.fail_on = None
    model.attach(runtime.endpoint("ns.comp.ep"))
    assert set(fetch_files(spy.card())) == DEMO_FILES


def test_second_base_model_on_an_endpoint_changes_nothing(
    runtime: Any, spy: Any, model_dir: Any, fetch_files: Any
) -> None:
    """An endpoint has one base model; the refused one leaves the first one's routes and card alone."""
    endpoint = runtime.endpoint("ns.comp.ep")
    first = LocalModel.load(model_dir(), name="m").attach(endpoint)
    with pytest.raises(DiscoveryError):
        LocalModel.load(model_dir("other", config__json=b"{}"), name="m").attach(endpoint)

    assert spy.card().mdcsum == first.card.mdcsum
    assert set(fetch_files(spy.card())) == DEMO_FILES
    assert len(runtime.metadata_artifacts) == len(DEMO_FILES)
    first.detach()
    assert spy.is_empty()


def test_no_address_to_publish(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """Self-hosting without server or base URL is an error that names the setting; nothing is published."""
    runtime = start_runtime(self_host_metadata=True, system_port=None)
    model = LocalModel.load(model_dir(), name="m")
    before = model.card
    with pytest.raises(SettingsError, match="DYN_SYSTEM_PORT"):
        model.attach(runtime.endpoint("ns.comp.ep"))

    assert (spy.is_empty(), runtime.metadata_artifacts.is_empty(), model.card) == (True, True, before)


def test_taken_port_publishes_nothing(start_runtime: Any, server: Any, spy: Any, model_dir: Any) -> None:
    """A port clash stops the attachment before anything is published, local paths least of all."""
    settings = Settings(self_host_metadata=True, system_host="127.0.0.1", system_port=server.port)
    runtime = DistributedRuntime(settings, discovery=spy)
    with pytest.raises(StatusServerError):
        LocalModel.load(model_dir(), name="m").attach(runtime.endpoint("ns.comp.ep"))

    assert (spy.is_empty(), runtime.metadata_artifacts.is_empty()) == (True, True)


def test_bad_file_leaves_no_other_registered(runtime: Any, spy: Any, model_dir: Any) -> None:
    """One file that is not what the card says, and none is registered."""
    card = LocalModel.load(model_dir(), name="m", pin=False).card
    bad = CheckedFile(os.path.join(model_dir("b", bad__txt=b"bad"), "bad.txt"), Checksum.of(b"good"), 3)
    model = LocalModel(replace(card, extra_files=(bad,)))

    with pytest.raises(RegistrationError, match="the card says"):
        model.attach(runtime.endpoint("ns.comp.ep"))
    assert runtime.metadata_artifacts.is_empty()


def test_slot_is_not_lost_for_its_name(runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """A slot's file whose name no URL can carry is served under another one."""
    directory = model_dir()
    os.rename(os.path.join(directory, "tokenizer.json"), os.path.join(directory, "to\\k\x01.tiktoken"))
    LocalModel.load(directory, name="m").attach(runtime.endpoint("ns.comp.ep"))

    slot = spy.card().tokenizer
    assert isinstance(slot, ModelSlot)
    assert Checksum.of(fetch(slot.file.path)[1]) == slot.file.checksum


# ------------------------------------------------------------------ content that a shared registry deletes

LARGE = json.dumps({"x": "y" * 100_000}).encode()  # more than is kept in memory once it was served


@pytest.fixture
def shared_runtime(shared: Any, spy: Any) -> Iterator[DistributedRuntime]:
    """Return a runtime whose registry lies in a folder; it ends with the test."""
    settings = Settings(self_host_metadata=True, advertise_url="http://h:1")
    with contextlib.closing(DistributedRuntime(settings, registry=shared(), discovery=spy)) as runtime:
        yield runtime


def is_served(runtime: DistributedRuntime) -> bool:
    """Tell whether all of a model's files are registered, and large ones can be read."""
    found = {one.filename: one.content for one in runtime.metadata_artifacts}
    content = found["tokenizer.json"]
    return set(found) == DEMO_FILES and content.read(0, content.size) == LARGE


def test_second_try_needs_no_file(shared_runtime: Any, spy: Any, model_dir: Any) -> None:
    """What was pinned is kept until an attach has succeeded, whatever became of the directory."""
    directory = model_dir(tokenizer__json=LARGE)
    model = LocalModel.load(directory, name="m")
    shutil.rmtree(directory)
    spy.fail_on = Bucket.MODELS
    with pytest.raises(DiscoveryError, match="told to fail"):
        model.attach(shared_runtime.endpoint("ns.comp.ep"))
    spy.fail_on = None
    model.attach(shared_runtime.endpoint("ns.comp.ep"))

    assert is_served(shared_runtime)


def test_adapter_outlives_its_base_model(shared_runtime: Any, model_dir: Any) -> None:
    """What the base model's end deleted is read anew from its directory."""
    base = LocalModel.load(model_dir(tokenizer__json=LARGE), name="m")
    base.attach(shared_runtime.endpoint("ns.comp.ep"))
    adapter = base.derive_lora("adapter")
    base.detach()
    adapter.attach(shared_runtime.endpoint("ns.comp.ep"))

    assert is_served(shared_runtime)


# ------------------------------------------------------------------ detach


def test_card_goes_before_the_routes(runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """When the card is withdrawn its files can still be fetched, and then no more."""
    model = LocalModel.load(model_dir(), name="m").attach(runtime.endpoint("ns.comp.ep"))
    urls, seen = (model.files[0].url, model.card_url), []
    spy.on_call = lambda action, bucket: seen.append((action, bucket.value, *[fetch(url)[0] for url in urls]))

    model.detach()

    assert seen == [("withdraw", "mdc", 200, 200), ("withdraw", "instances", 200, 200)]
    assert [fetch(url)[0] for url in urls] == [404, 404]


def test_card_comes_after_the_routes(runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """When the card is published its files can be fetched already."""
    model = LocalModel.load(model_dir(), name="m")
    seen: list[tuple[str, int]] = []
    spy.on_call = lambda action, bucket: seen.append(
        (bucket.value, fetch(f"{runtime.base_url()}/v1/metadata/m/_base")[0])
    )
    model.attach(runtime.endpoint("ns.comp.ep"))

    assert seen == [("instances", 200), ("mdc", 200)]
    spy.on_call = lambda *_: None


def test_detach_restores_the_card(runtime: Any, model_dir: Any) -> None:
    """A detached model has its local paths again; detaching twice is harmless."""
    model = LocalModel.load(model_dir(), name="m")
    before = model.card
    model.attach(runtime.endpoint("ns.comp.ep"))
    model.detach()
    model.detach()

    assert (model.card, model.is_attached) == (before, False)


def test_attach_again(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """A model may come and go any number of times, and leaves nothing each time."""
    model = LocalModel.load(model_dir(), name="m")
    for _ in range(3):
        with model.attach(runtime.endpoint("ns.comp.ep")):
            assert set(fetch_files(spy.card())) == DEMO_FILES
        assert spy.is_empty()
        assert runtime.metadata_artifacts.is_empty()


def test_equal_content_is_held_once(runtime: Any, model_dir: Any) -> None:
    """Models of one directory hold the registry's objects while attached, and none afterwards."""
    directory = model_dir()
    models = [LocalModel.load(directory, name=f"m{n}") for n in range(2)]
    for number, model in enumerate(models):
        model.attach(runtime.endpoint(f"ns.comp.ep{number}"))

    assert len({id(content) for model in models for content in model.contents.values()}) == len(DEMO_FILES)
    models[0].detach()
    assert not models[0].contents


def test_attach_again_refuses_a_changed_file(runtime: Any, model_dir: Any) -> None:
    """After a detach the files are read anew, and must be what the card says."""
    model = LocalModel.load(model_dir(), name="m").attach(runtime.endpoint("ns.comp.ep"))
    model.detach()
    model_dir(config__json=b"{}")

    with pytest.raises(RegistrationError, match="the card says"):
        model.attach(runtime.endpoint("ns.comp.ep"))


def test_taken_key_names_its_holder(runtime: Any, spy: Any, model_dir: Any) -> None:
    """Two adapters of one slug: the error names the one that is there, and what to do."""
    endpoint = runtime.endpoint("ns.comp.ep")
    base = LocalModel.load(model_dir(), name="m")
    base.derive_lora("a/b").attach(endpoint)

    with pytest.raises(DiscoveryError, match=r"'a/b' is published there.*another LoRA name"):
        base.derive_lora("a_b").attach(endpoint)
    assert len(spy.cards()) == 1


def test_moving_by_itself_waits_for_an_attach(runtime: Any, model_dir: Any, registry: Any) -> None:
    """`move_to_self_host` takes the model's lock, so it changes nothing half-way through an attach."""
    model = LocalModel.load(model_dir(), name="m")
    thread = threading.Thread(target=lambda: model.move_to_self_host(registry, "http://h").close())
    with model._lock:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()


def test_attach_twice_is_refused(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """One model object is attached once at a time; the attachment stays."""
    model = LocalModel.load(model_dir(), name="m").attach(runtime.endpoint("ns.comp.ep"))

    with pytest.raises(RegistrationError, match="attached already"):
        model.attach(runtime.endpoint("ns.comp.other"))
    assert set(fetch_files(spy.card())) == DEMO_FILES
    assert model.is_attached


def test_representation(runtime: Any, model_dir: Any) -> None:
    """A model tells its name and state."""
    model = LocalModel.load(model_dir(), name="m")

    assert repr(model) == "<LocalModel 'm' detached>"
    assert "attached" in repr(model.attach(runtime.endpoint("ns.comp.ep")))
