"""A model comes and goes: pinned, registered, rewritten, published, and all of that undone."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers import DEMO_FILES

from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.errors import ModelDirError, RegistrationError
from selfhost.worker.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# ------------------------------------------------------------------ attach


def test_every_file_can_be_fetched(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """What the published card says is what a client gets, extra files included."""
    directory = model_dir(extra__txt=b"extra", we__ird=b"?")
    LocalModel.load(directory, name="org/M").attach(runtime.endpoint("ns.comp.ep"))

    files = fetch_files(spy.card())

    assert set(files) == DEMO_FILES | {"extra.txt", "we.ird"}
    assert all(files[name] == Path(directory, name).read_bytes() for name in files)


def test_card_of_the_model_is_the_published_one(runtime: Any, spy: Any, model_dir: Any) -> None:
    """`card` is what was published, to the checksum, and every path in it a URL of this worker."""
    model = LocalModel.load(model_dir(), name="org/M").attach(runtime.endpoint("ns.comp.ep"))

    assert spy.card().mdcsum == model.card.mdcsum
    assert not model.card.diff(spy.card())
    prefix = f"{runtime.base_url()}/v1/metadata/org_m/_base/"
    assert all(file.path.startswith(prefix) for file, _ in model.card.iter_metadata_files())


def test_files_lists_what_is_served(runtime: Any, model_dir: Any, fetch: Any) -> None:
    """`files` has name, URL, size and digest in the card's order, and is empty again after the end."""
    model = LocalModel.load(model_dir(), name="m")
    assert model.files == ()
    model.attach(runtime.endpoint("ns.comp.ep"))

    assert [file.url for file in model.files] == [f.path for f, _ in model.card.iter_metadata_files()]
    assert all(len(fetch(file.url)[1]) == file.size for file in model.files)
    model.detach()
    assert model.files == ()


def test_card_is_served_as_published(runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """The card's own URL answers with the text that was published, from attaching to detaching."""
    model = LocalModel.load(model_dir(), name="org/M")
    assert model.card_url is None
    model.attach(runtime.endpoint("ns.comp.ep"))
    url = model.card_url

    assert url == f"{runtime.base_url()}/v1/metadata/org_m/_base"
    assert fetch(url) == (200, model.card.to_json().encode())
    assert ModelDeploymentCard.from_json(fetch(url)[1]) == spy.card()
    model.detach()
    assert model.card_url is None
    assert fetch(url)[0] == 404


@pytest.mark.parametrize("name", ["org/M", "模型"])
def test_card_of_an_adapter(runtime: Any, model_dir: Any, fetch: Any, name: str) -> None:
    """Base and adapter have cards under URLs of their own; a slug may be empty."""
    endpoint = runtime.endpoint("ns.comp.ep")
    base = LocalModel.load(model_dir(), name=name).attach(endpoint)
    lora = base.derive_lora("a/b").attach(endpoint)

    found = [ModelDeploymentCard.from_json(fetch(model.card_url)[1]).display_name for model in (base, lora)]
    assert found == [name, "a/b"]
    assert lora.card_url == f"{runtime.base_url()}/v1/metadata/a_b/a_b"


def test_cards_that_share_a_slug(runtime: Any, model_dir: Any, fetch: Any) -> None:
    """The oldest of two cards has the plain URL, until it goes; each `card_url` gives its own card."""
    models = [LocalModel.load(model_dir(), name=name) for name in ("a/b", "a_b")]
    for number, model in enumerate(models):
        model.attach(runtime.endpoint(f"ns.comp.ep{number}"))

    urls = [str(model.card_url) for model in models]
    assert urls[1].startswith(f"{urls[0]}?blake3=")
    assert [fetch(url)[1].decode() for url in urls] == [model.card.to_json() for model in models]
    models[0].detach()
    assert [fetch(url)[1].decode() for url in urls] == [models[1].card.to_json()] * 2


def test_no_card_without_self_hosting(runtime: Any, model_dir: Any, fetch: Any) -> None:
    """A model whose files are not served has no card route either: its card holds local paths."""
    model = LocalModel.load(model_dir(), name="m", pin=False)
    model.attach(runtime.endpoint("ns.comp.ep"), self_host_metadata=False)

    assert model.card_url is None
    assert fetch(f"{runtime.base_url()}/v1/metadata/m/_base")[0] == 404
    assert runtime.metadata_artifacts.is_empty()


def test_model_without_files_has_a_card(runtime: Any, fetch: Any) -> None:
    """A self-hosted model may consist of its card alone."""
    with LocalModel(ModelDeploymentCard("m")).attach(runtime.endpoint("ns.comp.ep")) as model:
        assert fetch(model.card_url) == (200, model.card.to_json().encode())
    assert runtime.metadata_artifacts.is_empty()


@pytest.mark.parametrize("name", ["we?ird#.txt", "100%.txt", "p%41q.txt", "a b.txt", "ünï.txt", "a+b&c=d"])
def test_odd_file_name(name: str, runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """Whatever a file may be called, the URL in the card fetches it."""
    directory = model_dir()
    Path(directory, name).write_bytes(b"odd")
    LocalModel.load(directory, name="m").attach(runtime.endpoint("ns.comp.ep"))

    (file,) = spy.card().extra_files
    assert fetch(file.path) == (200, b"odd")


@pytest.mark.parametrize("name", ["b\\ad\n.txt", "模" * 29 + ".txt"], ids=["controls", "long when encoded"])
def test_unservable_extra_is_left_out(
    name: str, runtime: Any, spy: Any, model_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An extra file whose name no URL can carry is left out with a warning; the others are served."""
    directory = model_dir(fine__txt=b"fine")
    Path(directory, name).write_bytes(b"bad")
    LocalModel.load(directory, name="m").attach(runtime.endpoint("ns.comp.ep"))

    assert [file.basename for file in spy.card().extra_files] == ["fine.txt"]
    assert caplog.text.count("is not served") == 1


@pytest.mark.parametrize("path", ["hf://org/repo/config.json", "https://example.org/a/config.json"])
def test_url_slots_are_left_alone(path: str, runtime: Any, spy: Any, model_dir: Any) -> None:
    """A slot that is a URL already stays as it is, and is not served."""  # catalogue 108
    card = LocalModel.load(model_dir(), name="m", pin=False).card
    assert card.model_info is not None
    remote = card.model_info.with_file(replace(card.model_info.file, path=path))
    LocalModel(replace(card, model_info=remote)).attach(runtime.endpoint("ns.comp.ep"))

    assert spy.card().model_info.file.path == path
    assert {a.filename for a in runtime.metadata_artifacts} == DEMO_FILES - {"config.json"}


@pytest.mark.parametrize("same", [False, True], ids=["other bytes", "same bytes"])
@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "extra.txt", "own.jinja", "模" * 80 + ".jinja", "a\n.b\n"]
)
def test_custom_template_of_any_name(
    name: str, same: bool, runtime: Any, spy: Any, model_dir: Any, tmp_path: Path, fetch: Any
) -> None:
    """A custom template may be called like any other file: both can be fetched, under two names."""
    directory = model_dir(extra__txt=b"extra")
    custom = tmp_path / "custom" / name
    custom.parent.mkdir()
    twin = Path(directory, name)
    custom.write_bytes(twin.read_bytes() if same and twin.exists() else b"{{ custom }}")
    model = LocalModel.load(directory, name="m", custom_template=custom)
    model.attach(runtime.endpoint("ns.comp.ep"))

    card = spy.card()
    assert card.chat_template_file is not None
    assert card.chat_template_file.is_custom
    assert fetch(card.chat_template_file.file.path) == (200, custom.read_bytes())
    for file, _ in card.iter_metadata_files():
        assert Checksum.of(fetch(file.path)[1]) == file.checksum


def test_same_model_on_two_endpoints(
    runtime: Any, spy: Any, model_dir: Any, tmp_path: Path, fetch_files: Any
) -> None:
    """Two templates of one model in one process: both cards can be fetched to the byte."""
    custom = tmp_path / "chat_template.jinja"
    custom.write_text("other")
    directory = model_dir()
    one = LocalModel.load(directory, name="m").attach(runtime.endpoint("ns.comp.prefill"))
    two = LocalModel.load(directory, name="m", custom_template=custom)
    two.attach(runtime.endpoint("ns.comp.decode"))

    assert fetch_files(two.card)["chat_template.jinja"] == b"other"
    assert fetch_files(one.card)["chat_template.jinja"] != b"other"
    changed = [file.url for file in two.files if "?blake3=" in file.url]
    assert [urlsplit(url).path.rpartition("/")[2] for url in changed] == ["chat_template.jinja"]
    one.detach()
    assert fetch_files(two.card)["chat_template.jinja"] == b"other"


def test_names_that_share_a_slug(runtime: Any, model_dir: Any, fetch_files: Any) -> None:
    """`a/b` and `a_b` are two models behind one slug; each card gets its own bytes."""
    config = json.loads(Path(model_dir("plain"), "config.json").read_text())
    models = []
    for number, name in enumerate(("a/b", "a_b", "A b")):
        data = json.dumps({**config, "number": number}).encode()
        model = LocalModel.load(model_dir(f"d{number}", config__json=data), name=name)
        models.append(model.attach(runtime.endpoint(f"ns.comp.ep{number}")))

    found = [json.loads(fetch_files(model.card)["config.json"])["number"] for model in models]
    assert found == [0, 1, 2]
    assert {model.card.slug for model in models} == {"a_b"}


def test_lora(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """An adapter has its own suffix and record, and the very files of its base."""
    endpoint = runtime.endpoint("ns.comp.ep")
    base = LocalModel.load(model_dir(), name="org/M").attach(endpoint)
    lora = base.derive_lora("My/Adapter", max_gpu_lora_count=4).attach(endpoint)

    key = f"{endpoint.key()}/my_adapter"
    assert spy.cards()[key]["lora"] == {"name": "My/Adapter", "max_gpu_lora_count": 4}
    assert all("/v1/metadata/my_adapter/my_adapter/" in file.url for file in lora.files)
    assert fetch_files(lora.card) == fetch_files(base.card)
    base_bytes = sum(file.size for file in base.files)
    assert runtime.metadata_artifacts.pinned_bytes == base_bytes


def test_lora_outlives_its_base(runtime: Any, model_dir: Any, fetch_files: Any) -> None:
    """Detaching the base takes nothing from its adapter, nor the other way round."""  # catalogue 48
    endpoint = runtime.endpoint("ns.comp.ep")
    base = LocalModel.load(model_dir(), name="m").attach(endpoint)
    first, second = (base.derive_lora(name).attach(endpoint) for name in ("one", "two"))

    base.detach()
    second.detach()

    assert set(fetch_files(first.card)) == DEMO_FILES


def test_lora_without_a_slug_is_refused(runtime: Any, spy: Any, model_dir: Any) -> None:
    """An adapter whose name has no ASCII letter would take the base's place."""
    lora = LocalModel.load(model_dir(), name="m").derive_lora("模型")

    with pytest.raises(RegistrationError, match="no slug"):
        lora.attach(runtime.endpoint("ns.comp.ep"))
    assert spy.is_empty()


def test_model_without_a_slug(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """A model called 模型 has an empty slug, and can be fetched all the same."""
    LocalModel.load(model_dir(), name="模型").attach(runtime.endpoint("ns.comp.ep"))

    assert set(fetch_files(spy.card())) == DEMO_FILES


def test_many_models_share_one_server(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """Fifty models of one process are served by its one server."""
    directory = model_dir()
    for number in range(50):
        LocalModel.load(directory, name=f"m{number}").attach(runtime.endpoint(f"ns.comp.ep{number}"))

    cards = [ModelDeploymentCard.from_json(json.dumps(card)) for card in spy.cards().values()]
    netlocs = {urlsplit(file.path).netloc for card in cards for file, _ in card.iter_metadata_files()}
    assert (len(cards), netlocs) == (50, {runtime.status_server.address})
    assert set(fetch_files(cards[49])) == DEMO_FILES


def test_model_of_extra_files_only(runtime: Any, spy: Any, tmp_path: Path, fetch_files: Any) -> None:
    """A Mistral directory has no slots filled; its extra files are served."""
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tekken.json").write_text("{}")
    LocalModel.load(tmp_path, name="m").attach(runtime.endpoint("ns.comp.ep"))

    assert set(fetch_files(spy.card())) == {"params.json", "tekken.json"}


# ------------------------------------------------------------------ without self-hosting


def test_card_keeps_its_paths_when_off(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """Without self-hosting the card has local paths, no extra files, and nothing is served."""
    directory = model_dir(extra__txt=b"extra")
    runtime = start_runtime(self_host_metadata=False)
    model = LocalModel.load(directory, name="m").attach(runtime.endpoint("ns.comp.ep"))

    assert spy.card().model_info.file.path == os.path.join(directory, "config.json")
    assert spy.card().extra_files == ()
    assert spy.card().mdcsum == model.card.mdcsum
    assert runtime.metadata_artifacts.is_empty()


@pytest.mark.parametrize(("setting", "argument", "on"), [(True, False, False), (False, True, True)])
def test_argument_counts_more_than_the_setting(
    setting: bool, argument: bool, on: bool, start_runtime: Any, spy: Any, model_dir: Any
) -> None:
    """The argument overrides the setting both ways."""
    runtime = start_runtime(self_host_metadata=setting)
    model = LocalModel.load(model_dir(), name="m")
    model.attach(runtime.endpoint("ns.comp.ep"), self_host_metadata=argument)

    assert spy.card().model_info.file.is_local is not on


# ------------------------------------------------------------------ files that change


def test_pinned_file_may_change(runtime: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """What was loaded is served, whatever happens to the directory before or after attaching."""
    directory = model_dir()
    model = LocalModel.load(directory, name="m")
    original = Path(directory, "config.json").read_bytes()
    Path(directory, "config.json").write_bytes(b"{}")
    Path(directory, "tokenizer.json").unlink()
    model.attach(runtime.endpoint("ns.comp.ep"))

    assert fetch_files(spy.card())["config.json"] == original


@pytest.mark.parametrize("change", ["edit", "delete", "fifo"])
def test_unpinned_file_that_changed_is_refused(change: str, runtime: Any, spy: Any, model_dir: Any) -> None:
    """A file that was only hashed and is another one now is refused; nothing is left."""
    path = Path(model_dir(), "config.json")
    model = LocalModel.load(path.parent, name="m", pin=False)
    if change == "edit":
        path.write_bytes(b"{}")
    else:
        path.unlink()
    if change == "fifo":
        os.mkfifo(path)

    with pytest.raises(RegistrationError, match=r"config\.json"):
        model.attach(runtime.endpoint("ns.comp.ep"))
    assert runtime.metadata_artifacts.is_empty()
    assert spy.is_empty()


def test_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    """What is no model directory does not load."""
    with pytest.raises(ModelDirError):
        LocalModel.load(tmp_path)
