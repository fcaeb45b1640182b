"""`register_model`: Dynamo's entry point, its parameters and what they become."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from selfhost.card.model_type import ModelInput, ModelType, WorkerType
from selfhost.errors import CardError, ModelDirError, SettingsError
from selfhost.settings import Settings
from selfhost.worker.entry_point import register_model
from selfhost.worker.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("leaves_nothing")
CHAT = ModelType.Chat | ModelType.Completions


@pytest.fixture
def register(runtime: Any) -> Any:
    """Return `register_model` with the first arguments that most tests do not care for."""

    def call(model_path: Any, model_name: Any = None, **options: Any) -> LocalModel:
        options.setdefault("worker_type", WorkerType.Aggregated)
        endpoint = options.pop("endpoint", None) or runtime.endpoint("ns.comp.ep")
        return register_model(ModelInput.Tokens, CHAT, endpoint, model_path, model_name, **options)

    return call


def test_published_card(register: Any, spy: Any, model_dir: Any, fetch_files: Any) -> None:
    """The card is published as it was asked for, and its files can be fetched."""
    directory = model_dir()
    register(
        directory, "org/M", kv_cache_block_size=32, migration_limit=3, user_data={"b": 1, "a": [2.5]},
        runtime_config={"total_kv_blocks": 7}, needs=[["prefill"]], model_aliases=["one", "two"],
    )  # fmt: skip

    (card,) = spy.cards().values()
    assert (card["display_name"], card["slug"], card["source_path"]) == ("org/M", "org_m", directory)
    assert (card["kv_cache_block_size"], card["migration_limit"]) == (32, 3)
    assert (card["user_data"], card["needs"], card["aliases"]) == (
        {"b": 1, "a": [2.5]}, [["prefill"]], ["one", "two"]
    )  # fmt: skip
    assert card["runtime_config"]["total_kv_blocks"] == 7
    assert fetch_files(spy.card())


def test_defaults(register: Any, spy: Any, model_dir: Any) -> None:
    """What is not said is as in Dynamo: the name is the path, blocks have 16 tokens."""
    directory = model_dir()
    register(directory)

    (card,) = spy.cards().values()
    assert card["display_name"] == directory
    assert (card["kv_cache_block_size"], card["migration_limit"]) == (16, 0)


def test_spellings_of_dynamo(runtime: Any, spy: Any, model_dir: Any) -> None:
    """The enumerations may be given by Dynamo's names."""
    endpoint = runtime.endpoint("ns.comp.ep")
    register_model("Text", "Chat | Embedding", endpoint, model_dir(), "m", worker_type="decode")

    (card,) = spy.cards().values()
    assert (card["model_input"], card["model_type"], card["worker_type"]) == (
        "Text", "Chat | Embedding", "decode"
    )  # fmt: skip


def test_relative_path(
    register: Any, spy: Any, model_dir: Any, monkeypatch: pytest.MonkeyPatch, fetch_files: Any
) -> None:
    """A relative path stays relative in the card; its files are found."""
    monkeypatch.chdir(os.path.dirname(model_dir()))
    register("model", "m")

    assert spy.card().source_path == "model"
    assert fetch_files(spy.card())


def test_path_object(register: Any, spy: Any, model_dir: Any) -> None:
    """A path may be a Path."""
    directory = Path(model_dir())
    register(directory)

    assert spy.card().display_name == str(directory)


def test_lora(register: Any, spy: Any, model_dir: Any, fetch_files: Any, runtime: Any) -> None:
    """An adapter's card names it, has its own record, and carries the base's files."""
    base = model_dir()
    register(base, "org/M")
    lora = register(
        "/no/such/adapter", lora_name="my-lora", base_model_path=base, max_gpu_lora_count=2
    )  # fmt: skip

    key = f"{runtime.endpoint('ns.comp.ep').key()}/my-lora"
    assert spy.cards()[key]["display_name"] == "my-lora"
    assert spy.cards()[key]["source_path"] == base
    assert spy.cards()[key]["lora"] == {"name": "my-lora", "max_gpu_lora_count": 2}
    assert fetch_files(lora.card)


@pytest.mark.parametrize("options", [{"lora_name": "x"}, {"base_model_path": "/x"}])
def test_half_a_lora(options: dict[str, str], register: Any, spy: Any, model_dir: Any) -> None:
    """Name and base of an adapter go together."""
    with pytest.raises(CardError, match="go together"):
        register(model_dir(), **options)
    assert spy.is_empty()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_type", "Decode"),
        ("needs", [["nobody"]]),
        ("kv_cache_block_size", -1),
        ("migration_limit", "x"),
        ("user_data", {"a": {1, 2}}),
        ("runtime_config", {"total_kv_blocks": "many"}),
        ("model_aliases", [1]),
        ("router_config", {"router_mode": 5}),
    ],
)
def test_impossible_value(
    field: str, value: Any, register: Any, runtime: Any, spy: Any, model_dir: Any
) -> None:
    """A value that no card can have is refused by name, and nothing is published or served."""
    with pytest.raises(CardError):
        register(model_dir(), "m", **{field: value})

    assert spy.is_empty()
    assert runtime.metadata_artifacts.is_empty()


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_type": None}, {"model_type": object()}, {"model_input": None}, {"router_config": [1]},
        {"runtime_config": 5}, {"needs": 5}, {"needs": ["prefill"]}, {"media_decoder": "x"},
        {"model_path": b"/m"}, {"model_aliases": "foo"},
        {"model_name": 5}, {"lora_name": 5, "base_model_path": "/m"},
    ],
    ids=str,
)  # fmt: skip
def test_value_of_a_wrong_kind(wrong: dict[str, Any], runtime: Any, spy: Any, model_dir: Any) -> None:
    """What is not even of the right type is refused as CardError by its name, before anything is read."""
    given = {
        "model_input": "Tokens", "model_type": "Chat", "endpoint": runtime.endpoint("ns.comp.ep"),
        "model_path": model_dir(), "worker_type": None, **wrong,
    }  # fmt: skip
    with pytest.raises(CardError) as caught:
        register_model(**given)

    assert caught.value.field == next(iter(wrong))
    assert spy.is_empty()


def test_template_without_assets(register: Any, tmp_path: Path) -> None:
    """A custom template that would be left out is refused."""
    with pytest.raises(CardError, match="custom_template_path"):
        register("/m", "m", skip_model_assets=True, custom_template_path=tmp_path)


def test_no_model_directory(register: Any, spy: Any, tmp_path: Path) -> None:
    """A directory that is none is refused."""
    with pytest.raises(ModelDirError):
        register(tmp_path / "missing")
    assert spy.is_empty()


def test_custom_template(register: Any, spy: Any, model_dir: Any, tmp_path: Path, fetch: Any) -> None:
    """A custom template takes the slot of the model's own, which stays as an extra file."""
    custom = tmp_path / "mine.jinja"
    custom.write_text("{{ mine }}")
    register(model_dir(), "m", custom_template_path=custom)

    card = spy.card()
    assert fetch(card.chat_template_file.file.path) == (200, b"{{ mine }}")
    assert [file.basename for file in card.extra_files] == ["chat_template.jinja"]


@pytest.mark.parametrize("model_type", ["TensorBased", "Images", "Videos", "Realtime"])
def test_kind_without_files(model_type: str, runtime: Any, spy: Any) -> None:
    """Kinds of model whose frontends need no files need no directory either."""
    endpoint = runtime.endpoint("ns.comp.ep")
    register_model("Tensor", model_type, endpoint, "/no/such/model", "m", worker_type=None)

    assert spy.card().display_name == "m"
    assert not list(spy.card().iter_metadata_files())


def test_assets_skipped(register: Any, spy: Any) -> None:
    """`skip_model_assets` publishes a card without files."""
    register("/no/such/model", "m", skip_model_assets=True)

    assert not list(spy.card().iter_metadata_files())


# ------------------------------------------------------------------ on or off


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("true", True), ("1", True), ("yes", True), ("on", True), (" TRUE ", True), ("On", True),
        ("0", False), ("false", False), ("No", False), ("OFF", False), (" off ", False), ("", False),
        ("junk", False), ("2", False), (None, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("argument", [None, True, False])
def test_switch(argument: Any, text: Any, on: bool, start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """The variable switches self-hosting on by four words only; the argument overrides it both ways."""
    environment = {} if text is None else {"DYN_SELF_HOST_METADATA": text}  # catalogue 111
    settings = Settings.from_env(environment)
    runtime = start_runtime(self_host_metadata=settings.self_host_metadata)
    endpoint = runtime.endpoint("ns.comp.ep")
    register_model(
        "Tokens", "Chat", endpoint, model_dir(), worker_type=None, self_host_metadata=argument
    )  # fmt: skip

    expected = on if argument is None else argument
    assert spy.card().model_info.file.is_local is not expected
    assert runtime.metadata_artifacts.is_empty() is not expected


def test_off_carries_no_extra_files(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """Without self-hosting the extra files are neither hashed nor told of, nor may they be unreadable."""
    directory = model_dir()
    os.symlink("/proc/self/mem", os.path.join(directory, "unreadable.txt"))
    runtime = start_runtime(self_host_metadata=False)
    register_model("Tokens", "Chat", runtime.endpoint("a.b.c"), directory, worker_type=None)

    assert spy.card().extra_files == ()
    assert spy.card().model_info.file.path == os.path.join(directory, "config.json")


def test_base_url_as_argument(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """Behind somebody else's server a base URL is enough; no server of ours runs."""
    runtime = start_runtime(system_port=None)
    register_model(
        "Tokens", "Chat", runtime.endpoint("a.b.c"), model_dir(), "m", worker_type=None,
        self_host_metadata=True, advertise_url="https://proxy/models/",
    )  # fmt: skip

    assert spy.card().model_info.file.path == "https://proxy/models/v1/metadata/m/_base/config.json"
    assert runtime.status_server is None
    assert not runtime.metadata_artifacts.is_empty()


def test_on_without_an_address(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """Self-hosting without a server or a base URL is an error, never a card with local paths."""
    runtime = start_runtime(system_port=None)

    with pytest.raises(SettingsError, match="DYN_SYSTEM_PORT"):
        register_model(
            "Tokens", "Chat", runtime.endpoint("a.b.c"), model_dir(), worker_type=None,
            self_host_metadata=True,
        )  # fmt: skip
    assert spy.is_empty()
    assert runtime.metadata_artifacts.is_empty()


def test_published_text_is_what_dynamo_reads(register: Any, spy: Any, model_dir: Any) -> None:
    """The checksum of the model's card equals that of the card read back from discovery."""
    model = register(model_dir(extra__txt=b"x"), "org/M", runtime_config={"context_length": 9})

    (text,) = spy.cards().values()
    assert spy.card().mdcsum == model.card.mdcsum
    assert json.loads(model.card.to_json()) == text
    assert text["context_length"] == 9
