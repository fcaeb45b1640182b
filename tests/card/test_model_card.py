"""Cards: what is read and refused, what is written, and how cards are made from others."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, Optional

import pytest

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import Checksum
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.model_type import ModelInput, ModelType, WorkerType
from selfhost.card.slots import SLOTS, ModelSlot
from selfhost.errors import CardError, shown

DATA = Path(__file__).parents[1] / "data"
CARDS = [json.loads(line) for line in (DATA / "cards.jsonl").read_text("utf-8").splitlines()]
REJECTS = [json.loads(line) for line in (DATA / "rejects.jsonl").read_text("utf-8").splitlines()]

HEX = "ab" * 32
FILE = {"path": "/m/config.json", "checksum": f"blake3:{HEX}", "size": 3}
MINIMAL = {
    "display_name": "a/B",
    "slug": "a_b",
    "kv_cache_block_size": 16,
    "migration_limit": 0,
    "model_type": "Chat",
    "model_input": "Tokens",
}
TENSOR: dict[str, Any] = {"name": "t", "inputs": [], "outputs": []}
BOTH_INDEXERS = {"use_remote_indexer": True, "serve_indexer": True}
ROUTER = {"router_mode": "k_v", "kv_router_config": {}, "load_threshold_config": {}}


def read(**fields: Any) -> ModelDeploymentCard:
    """Read a minimal card with these fields."""
    return ModelDeploymentCard.from_json(json.dumps({**MINIMAL, **fields}))


def written(**fields: Any) -> dict[str, Any]:
    """Return what is written of such a card."""
    document: dict[str, Any] = json.loads(read(**fields).to_json())
    return document


def file(name: str, hex: str = HEX) -> CheckedFile:
    """Return a file on a disk."""
    return CheckedFile(f"/m/{name}", Checksum(hex), 3)


def full_card() -> ModelDeploymentCard:
    """Return a card with all slots filled."""
    return ModelDeploymentCard(
        "org/Model",
        source_path="/m",
        model_info=ModelSlot("hf_config_json", file("config.json")),
        tokenizer=ModelSlot("hf_tokenizer_json", file("tokenizer.json")),
        prompt_formatter=ModelSlot("hf_tokenizer_config_json", file("tokenizer_config.json")),
        chat_template_file=ModelSlot("hf_chat_template", file("mine.jinja"), is_custom=True),
        gen_config=ModelSlot("hf_generation_config_json", file("generation_config.json")),
        extra_files=(file("vocab.json"), file("merges.txt")),
        user_data={"k": [1]},
    )


@pytest.mark.parametrize("vector", CARDS, ids=lambda vector: vector["id"])
def test_cards_are_written_as_the_wheel_writes_them(vector: dict[str, Any]) -> None:
    """Byte for byte, but for unknown fields, which the wheel drops and which stand at the end here."""
    card = ModelDeploymentCard.from_json(vector["card_json"])

    assert replace(card, unknown={}).to_json() == vector["canonical_json"]
    assert ModelDeploymentCard.from_json(card.to_json()) == card


@pytest.mark.parametrize("vector", REJECTS, ids=lambda vector: vector["label"][:40])
def test_what_the_wheel_refuses_is_refused(vector: dict[str, Any]) -> None:
    """The message names the field and shows the value."""
    with pytest.raises(CardError) as caught:
        ModelDeploymentCard.from_json(vector["card_json"])

    assert str(caught.value).startswith(caught.value.field or "card:")
    assert caught.value.value is None or shown(caught.value.value).strip("'") in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({"model_info": {"hf_config_json": {**FILE, "size": True}}}, "model_info.hf_config_json.size", True),
        ({"model_info": {}}, "model_info", {}),
        ({"model_info": {"HfConfigJson": FILE}}, "model_info", "HfConfigJson"),
        ({"tokenizer": {"hf_config_json": FILE}}, "tokenizer", "hf_config_json"),
        (
            {"prompt_formatter": {"hf_chat_template": {"file": FILE}}},
            "prompt_formatter.hf_chat_template.is_custom",
            None,
        ),
        ({"extra_files": [FILE, None]}, "extra_files[1]", None),
        ({"needs": [["decode"], ["x"]]}, "needs[1][0]", "x"),
        ({"aliases": None}, "aliases", None),
        ({"runtime_config": None}, "runtime_config", None),
        ({"runtime_config": {"enable_eagle": 1}}, "runtime_config.enable_eagle", 1),
        ({"runtime_config": {"taints": [1]}}, "runtime_config.taints[0]", 1),
        ({"tensor_model_config": {**TENSOR, "x": 1}}, "tensor_model_config.x", 1),
        ({"media_decoder": {"image": {"x": 1}}}, "media_decoder.image.x", 1),
        ({"router_config": {**ROUTER, "kv_router_config": {"x": 1}}}, "router_config.kv_router_config.x", 1),
        (
            {"router_config": {**ROUTER, "kv_router_config": {"host_cache_hit_weight": 1.5}}},
            "router_config.kv_router_config.host_cache_hit_weight",
            1.5,
        ),
        (
            {"router_config": {**ROUTER, "kv_router_config": BOTH_INDEXERS}},
            "router_config.kv_router_config.serve_indexer",
            True,
        ),
        ({"indexer_identity": {"semantics": {}}}, "indexer_identity.semantics", {}),
        ({"lora": {}}, "lora.name", None),
        ({"kv_cache_block_size": 2**64}, "kv_cache_block_size", 2.0**64),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_problems_are_named_by_dotted_field(fields: dict[str, Any], field: str, value: object) -> None:
    """Wherever it is, the error leads there."""
    with pytest.raises(CardError) as caught:
        read(**fields)

    assert (caught.value.field, caught.value.value) == (field, value)


def test_all_problems_are_told_at_once() -> None:
    """One error lists them, and carries the first one's field and value."""
    with pytest.raises(CardError) as caught:
        read(slug="A", needs=[["x"]], extra_files=[{"path": 1, "checksum": "c"}], kv_cache_block_size="1")

    error = caught.value
    assert [issue.split(":")[0] for issue in error.issues] == [
        "slug",
        "kv_cache_block_size",
        "needs[0][0]",
        "extra_files[0].path",
        "extra_files[0].checksum",
    ]
    assert (error.field, error.value) == ("slug", "A")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('"slug":"a",', "slug"),
        ('"model_info":{"hf_config_json":null,"hf_config_json":null},', "model_info"),
        ('"runtime_config":{"enable_eagle":true,"enable_eagle":true},', "runtime_config.enable_eagle"),
        ('"indexer_identity":{"semantics":{"a":"b","a":"b"}},', "indexer_identity.semantics.a"),
        ('"worker_type":{"decode":null,"decode":null},', "worker_type"),
    ],
)
def test_known_keys_given_twice_are_refused(text: str, field: str) -> None:
    """The wheel does not choose between two values either."""
    with pytest.raises(CardError) as caught:
        ModelDeploymentCard.from_json("{" + text + json.dumps(MINIMAL)[1:])

    assert caught.value.field == field


def test_unknown_keys_given_twice_do_not_matter() -> None:
    """The last one is kept."""
    card = ModelDeploymentCard.from_json('{"new":1,"new":2,' + json.dumps(MINIMAL)[1:])

    assert card.unknown == {"new": 2}


def test_hostile_keys_do_not_break_the_message() -> None:
    """A key that could start a line of its own in a log is shown quoted."""
    with pytest.raises(CardError) as caught:
        read(runtime_config={"topology_domains": {"a\nb": 1}})

    assert "\n" not in str(caught.value)


def test_unknown_fields_of_every_level_are_written_back() -> None:
    """Newer versions' fields survive, behind the known ones."""
    wrapper = {"is_custom": False, "file": {**FILE, "u": 1}, "v": 2}
    fields = {
        "prompt_formatter": {"hf_chat_template": wrapper},
        "runtime_config": {"w": 3},
        "lora": {"x": 4, "name": "l"},
        "router_config": {**ROUTER, "y": 5},
        "z": {"6": 7},
    }
    document = written(**fields)

    assert document["prompt_formatter"] == {"hf_chat_template": wrapper}
    assert [document[name].popitem() for name in ("runtime_config", "lora", "router_config")] == [
        ("w", 3),
        ("x", 4),
        ("y", 5),
    ]
    assert list(document)[-1] == "z"


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("worker_type", {"decode": None}, "decode"),
        ("lora", ["l", 2], {"name": "l", "max_gpu_lora_count": 2}),
        ("model_info", {"hf_config_json": list(FILE.values())}, {"hf_config_json": FILE}),
        (
            "chat_template_file",
            {"hf_chat_template_jinja": [True, FILE]},
            {"hf_chat_template": {"is_custom": True, "file": FILE}},
        ),
        ("media_decoder", [], {}),
        (
            "media_decoder",
            {"image": {}},
            {"image": {"limits": {"max_image_width": None, "max_image_height": None, "max_alloc": 2**27}}},
        ),
        ("indexer_identity", {"semantics": {"é": "1", "z": "2"}}, {"semantics": {"z": "2", "é": "1"}}),
        ("gen_config", None, None),
        ("prompt_context", [], []),
    ],
)
def test_odd_forms_are_taken_as_the_wheel_takes_them(field: str, value: Any, stored: Any) -> None:
    """Arrays in the place of objects, variants as objects, aliases: all are written the usual way."""
    assert json.dumps(written(**{field: value}).get(field)) == json.dumps(stored)


def test_a_card_may_be_an_array() -> None:
    """Fields in order, the last ones left out."""
    start: list[Any] = ["n", "s", None, None, None, None, None, None, None, None, None]
    card = ModelDeploymentCard.from_json(json.dumps([*start, 16, 0, "Chat", "Text"]))

    assert (card.display_name, card.slug, card.model_input) == ("n", "s", ModelInput.Text)


@pytest.mark.parametrize(
    ("runtime", "architectural", "own", "effective"),
    [(0, 5, 7, 0), (None, 0, 7, 0), (None, None, 7, 7), (None, None, None, 0), (3, None, None, 3)],
)
def test_the_effective_context_length_is_written(
    runtime: Optional[int], architectural: Optional[int], own: Optional[int], effective: int
) -> None:
    """The runtime's counts, then the model's, then the card's; 0 is a length."""
    card = read(
        runtime_config={"context_length": runtime},
        architectural_max_context_length=architectural,
        context_length=own,
    )

    assert card.effective_context_length == card.context_length == effective
    assert json.loads(card.to_json())["context_length"] == effective


def test_older_structural_tag_fields_follow_the_newer_one() -> None:
    """Either form turns it on, and the newer one counts."""
    older = written(runtime_config={"structural_tag_mode": "on", "structural_tag_scope": "always"})
    both = written(runtime_config={"structural_tag": {"schema": "strict"}, "structural_tag_scope": "always"})

    assert older["runtime_config"]["structural_tag"]["scope"] == "always"
    assert both["runtime_config"]["structural_tag_mode"] == "on"
    assert both["runtime_config"]["structural_tag_scope"] == "auto"


def test_a_card_made_by_hand_has_the_usual_defaults() -> None:
    """Only the name has to be given, and the card survives its text."""
    card = ModelDeploymentCard("org/My Model")

    assert (card.slug, card.kv_cache_block_size, card.migration_limit) == ("org_my_model", 16, 0)
    assert (card.model_type, card.model_input) == (ModelType.Chat | ModelType.Completions, ModelInput.Tokens)
    assert ModelDeploymentCard.from_json(card.to_json()) == card


def test_objects_given_by_hand_are_checked_and_completed() -> None:
    """A wrong one is refused where it was made, a sparse one gets the defaults."""
    card = ModelDeploymentCard("x", router_config=ROUTER, worker_type=WorkerType.Decode)

    assert card.router_config is not None
    assert card.router_config["kv_router_config"]["router_ttl_secs"] == 120.0
    with pytest.raises(CardError, match=r"runtime_config\.enable_eagle"):
        ModelDeploymentCard("x", runtime_config={"enable_eagle": None})


def test_cards_are_frozen() -> None:
    """A card is a value."""
    with pytest.raises(FrozenInstanceError):
        ModelDeploymentCard("x").display_name = "y"  # type: ignore[misc]


def test_files_come_in_dynamos_order() -> None:
    """Slots first, then extra files as they stand; only the template is the user's."""
    files = [(file.basename, custom) for file, custom in full_card().iter_metadata_files()]

    assert [name for name, _ in files][:3] == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert files[3:] == [
        ("mine.jinja", True),
        ("generation_config.json", False),
        ("vocab.json", False),
        ("merges.txt", False),
    ]


def test_map_files_walks_the_same_files_and_changes_nothing_else() -> None:
    """Each file goes through the function once, in order; the old card stays as it was."""
    card = full_card()
    seen: list[CheckedFile] = []

    def move(file: CheckedFile) -> CheckedFile:
        seen.append(file)
        return file.move_to_url(f"http://h/{file.basename}")

    moved = card.map_files(move)

    assert seen == [file for file, _ in card.iter_metadata_files()]
    assert all(not file.is_local for file, _ in moved.iter_metadata_files())
    assert {difference.field.rsplit(".", 1)[1] for difference in moved.diff(card)} == {"path"}
    assert moved.mdcsum == card.mdcsum


def test_derived_loras_differ_in_what_is_named_only() -> None:
    """Name, slug and lora are the adapter's, overrides are taken, the rest is a copy."""
    card = full_card()
    lora = card.derive_lora("My/Adapter", max_gpu_lora_count=4, migration_limit=2)

    assert lora.lora == {"name": "My/Adapter", "max_gpu_lora_count": 4}
    assert [difference.field for difference in card.diff(lora)] == [
        "display_name",
        "slug",
        "migration_limit",
        "lora",
    ]
    assert lora.slug == "my_adapter"
    assert lora.user_data is not card.user_data
    with pytest.raises(TypeError, match="'migration_limits'"):
        card.derive_lora("x", migration_limits=2)


def test_diff_names_each_leaf_with_both_values() -> None:
    """Slots by variant, extra files by name, objects by key."""
    card = full_card()
    other = replace(
        card,
        tokenizer=ModelSlot("hf_tokenizer_json", file("tokenizer.json", "cd" * 32)),
        gen_config=None,
        aliases=("a",),
        runtime_config={"total_kv_blocks": 7},
        extra_files=(file("merges.txt", "cd" * 32), file("vocab.json"), file("vocab.json")),
        unknown={"new": 1},
    )
    found = {difference.field: difference for difference in card.diff(other)}

    assert set(found) == {
        "tokenizer.hf_tokenizer_json.checksum",
        "gen_config",
        "aliases[0]",
        "runtime_config.total_kv_blocks",
        "extra_files[merges.txt].checksum",
        "extra_files[vocab.json#2]",
        "new",
    }
    assert (found["aliases[0]"].ours, found["aliases[0]"].theirs) == (None, "a")
    assert str(found["new"]) == "new: ours None, theirs 1"
    assert card.diff(card) == ()


def test_the_slot_table_names_fields_of_the_card() -> None:
    """What walks the table finds a slot, and every slot round trips through it."""
    document = json.loads(full_card().to_json())

    assert [name for name in document if name in {row.name for row in SLOTS}] == [row.name for row in SLOTS]


def test_card_in_a_discovery_record() -> None:
    """The card is read out of the record that carries it, exactly as from its own text."""
    card = ModelDeploymentCard("m", user_data={"x": 1e-7})
    record = f'{{"type": "Model", "instance_id": 1, "card_json": {card.to_json()}}}'

    assert ModelDeploymentCard.from_record(record) == card


@pytest.mark.parametrize("record", ['{"type": "Model"}', '{"card_json": null}', '{"card_json": "{}"}', "[]"])
def test_record_without_a_card_is_refused(record: str) -> None:
    """A record that holds no card says what is missing."""
    with pytest.raises(CardError, match="card_json: expected an object"):
        ModelDeploymentCard.from_record(record)
