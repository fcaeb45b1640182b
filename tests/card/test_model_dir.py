"""From a model directory to a card; the shared vectors were made by Dynamo 1.6.1."""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from selfhost.card.checked_file import CheckedFile
from selfhost.card.checksum import MAX_FILE_BYTES
from selfhost.card.model_card import ModelDeploymentCard
from selfhost.card.model_dir import MAX_PARSED_BYTES, WEIGHT_EXTENSIONS, load_card
from selfhost.card.model_type import ModelInput, ModelType
from selfhost.errors import ModelDirError

DATA = Path(__file__).parent.parent / "data"
VECTORS = [json.loads(line) for line in (DATA / "model_dirs.jsonl").read_text("utf-8").splitlines()]
NAMES = json.loads((DATA / "harvest_names.json").read_text("utf-8"))
SLOTS = ("model_info", "tokenizer", "prompt_formatter", "chat_template_file", "gen_config")

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a model directory: name -> content, None for a directory, Path for a link's target."""

    def make_directory(files: dict[str, Any], name: str = "model") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file, content in files.items():
            if content is None:
                (directory / file).mkdir()
            elif isinstance(content, Path):
                (directory / file).symlink_to(content)
            else:
                (directory / file).write_bytes(content)
        return directory

    return make_directory


def _slots(card: ModelDeploymentCard) -> dict[str, str]:
    return {
        slot: f"{found.variant}:{found.file.basename}"
        for slot in SLOTS
        for found in [getattr(card, slot)]
        if found is not None
    }


def _extras(card: ModelDeploymentCard) -> list[Optional[str]]:
    return [file.basename for file in card.extra_files]


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["label"] for vector in VECTORS])
def test_directory_vectors(make: Make, vector: dict[str, Any]) -> None:
    """Slots, checksums and context length are those of the wheel, and so is the verdict."""
    files = {n: None if c is None else base64.b64decode(c) for n, c in vector["files"].items()}
    directory = make({**files, **{name: Path(target) for name, target in vector["links"]}})

    if vector.get("error"):
        with pytest.raises(ModelDirError, match=r"\.json: .*(expected|given twice)"):
            load_card(directory)
        return
    card = json.loads(load_card(directory).to_json().replace(f"{directory}/", ""))
    wanted = vector["card"]
    assert {key: card.get(key) for key in (*SLOTS, *wanted)} == {**dict.fromkeys(SLOTS), **wanted}


def test_harvest_names(make: Make) -> None:
    """Each of the 158 names, made as what it was, is taken or left as the real worker did."""
    links = {
        "dangling.json": "nowhere",
        "loop.json": "loop.json",
        "link_dir.json": "subdir",
        "link_rel.json": "merges.txt",
        "link_abs.json": os.path.abspath(__file__),
        "link_readme.json": "README.md",
        "link.safetensors": "config.json",
        "link_to_weights.json": "model.safetensors",
    }
    directory = make({name: Path(target) for name, target in links.items()})
    for name, fact in NAMES.items():
        if fact["kind"] == "file":
            (directory / name).write_bytes(b"{}")
        elif fact["kind"] == "dir":
            (directory / name).mkdir()
        elif fact["kind"] == "fifo":
            os.mkfifo(directory / name)

    harvested = _extras(load_card(directory))

    assert len(NAMES) == 158
    assert harvested == sorted(name for name, fact in NAMES.items() if fact["harvested"])


def test_extras_are_sorted_by_the_bytes_of_their_names(make: Make) -> None:
    """The order does not depend on the file system, nor on how text sorts."""
    names = ["b", "a.txt", "Z", "\U0001f600", "\uffee", "é"]
    directory = make({"config.json": b"{}", **dict.fromkeys(names, b"")})

    assert _extras(load_card(directory)) == sorted(names, key=str.encode)


def test_names_that_are_no_utf8_are_no_extras(make: Make) -> None:
    """A card cannot hold such a name."""
    directory = make({"config.json": b"{}", "x": b""})
    with open(os.fsencode(directory) + b"/\xff.json", "wb"):
        pass

    assert _extras(load_card(directory)) == ["x"]


def test_no_weight_file_is_opened(make: Make) -> None:
    """Files with a weight's extension are not read, whatever is in them."""
    read: list[str] = []
    directory = make({"config.json": b"{}", **{f"model.{ending}": b"" for ending in WEIGHT_EXTENSIONS}})

    load_card(directory, read_file=lambda path: read.append(path) or CheckedFile.from_disk(path))  # type: ignore[func-returns-value]

    assert read == [str(directory / "config.json")]


def test_card_of_a_usual_directory(make: Make) -> None:
    """All slots are filled, the rest are extras, and the defaults are those of a chat model."""
    directory = make(
        {
            "config.json": b'{"max_position_embeddings": 4096}',
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b"",
            "generation_config.json": b"",
            "chat_template.jinja": b"x",
            "chat_template.json": b"{}",
            "vocab.json": b"",
        }
    )

    card = load_card(str(directory), name="my/model")

    assert _slots(card) == {
        "model_info": "hf_config_json:config.json",
        "tokenizer": "hf_tokenizer_json:tokenizer.json",
        "prompt_formatter": "hf_tokenizer_config_json:tokenizer_config.json",
        "chat_template_file": "hf_chat_template:chat_template.jinja",
        "gen_config": "hf_generation_config_json:generation_config.json",
    }
    assert _extras(card) == ["chat_template.json", "vocab.json"]
    assert (card.display_name, card.slug, card.source_path) == ("my/model", "my_model", str(directory))
    assert (card.architectural_max_context_length, card.kv_cache_block_size, card.migration_limit) == (
        4096,
        16,
        0,
    )
    assert (card.model_type, card.model_input) == (ModelType.Chat | ModelType.Completions, ModelInput.Tokens)


def test_paths_are_absolute_and_names_as_given(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A relative path through a link stays as it was passed in the names, files have their real place."""
    directory = make({"config.json": b"{}", "x.txt": b""})
    (tmp_path / "link").symlink_to(directory)
    monkeypatch.chdir(tmp_path)

    card = load_card("link")

    assert (card.display_name, card.source_path) == ("link", "link")
    assert [file.path for file, _ in card.iter_metadata_files()] == [
        str(directory / "config.json"),
        str(directory / "x.txt"),
    ]


def test_each_file_is_read_once_through_the_callable(make: Make) -> None:
    """`read_file` gets each file that enters the card, slots first; harvesting can be off."""
    directory = make(
        {"config.json": b"{}", "tokenizer_config.json": b"{}", "b.txt": b"", ".a": b"", "m.bin": b""}
    )
    read: list[str] = []

    def read_file(path: str) -> CheckedFile:
        read.append(os.path.relpath(path, directory))
        return CheckedFile.from_disk(path)

    load_card(directory, read_file=read_file)
    assert read == ["config.json", "tokenizer_config.json", "b.txt"]

    assert load_card(directory, read_file=read_file, harvest=False).extra_files == ()
    assert read[3:] == ["config.json", "tokenizer_config.json"]


# ---- which file fills a slot -------------------------------------------------------------------------

C = b"{}"
NOWHERE = Path("nowhere")
LOOP = Path("a.tiktoken")
TOKENIZERS: dict[str, Any] = {
    "tokenizer.json first": ({"tokenizer.json": C, "tiktoken.model": C, "a.tiktoken": C}, "tokenizer.json"),
    "tiktoken.model second": ({"tiktoken.model": C, "a.tiktoken": C, "b.tiktoken": C}, "tiktoken.model"),
    "one .tiktoken": ({"a.tiktoken": C, "b.TIKTOKEN": C, ".tiktoken": C, "c.tiktoken.bak": C}, "a.tiktoken"),
    "hidden .tiktoken": ({"..tiktoken": C}, "..tiktoken"),
    "dangling tokenizer.json": ({"tokenizer.json": NOWHERE, "a.tiktoken": C}, "a.tiktoken"),
    "dangling tiktoken.model": ({"tiktoken.model": NOWHERE}, None),
    "none": ({"tokenizer.model": C, "vocab.json": C, "merges.txt": C}, None),
    "directory tokenizer.json": ({"tokenizer.json": None, "a.tiktoken": C}, "tokenizer.json: .*a directory"),
    "directory tiktoken.model": ({"tiktoken.model": None}, "tiktoken.model: .*a directory"),
    "directory .tiktoken": ({"a.tiktoken": None}, "a.tiktoken: .*a directory"),
    "dangling .tiktoken": ({"a.tiktoken": NOWHERE}, "a.tiktoken: .*leads nowhere"),
    "looping .tiktoken": ({"a.tiktoken": LOOP}, "a.tiktoken: .*leads nowhere"),
    "two .tiktoken": ({"b.tiktoken": C, ".a.tiktoken": C}, r"found '\.a\.tiktoken', 'b\.tiktoken'"),
    "two .tiktoken, one a directory": ({"b.tiktoken": C, "a.tiktoken": None}, "expected one tokenizer"),
}


@pytest.mark.parametrize(("files", "wanted"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_tokenizer(make: Make, files: dict[str, Any], wanted: Optional[str]) -> None:
    """The tokenizer is found, missing, or an error, as in Dynamo."""
    directory = make({"config.json": b"{}", **files})

    if wanted is not None and wanted not in files:
        with pytest.raises(ModelDirError, match=wanted):
            load_card(directory)
    else:
        found = load_card(directory).tokenizer
        assert (found and found.file.basename) == wanted


TEMPLATES: dict[str, Any] = {
    "jinja first": ({"chat_template.jinja": b"", "chat_template.json": None}, "hf_chat_template"),
    "json": ({"chat_template.json": b""}, "hf_chat_template_json"),
    "dangling jinja": ({"chat_template.jinja": NOWHERE, "chat_template.json": C}, "hf_chat_template_json"),
    "both dangling": ({"chat_template.jinja": NOWHERE, "chat_template.json": NOWHERE}, None),
    "directory": (
        {"chat_template.jinja": None, "chat_template.json": b""},
        "chat_template.jinja: .*a directory",
    ),
    "json directory": ({"chat_template.json": None}, "chat_template.json: .*a directory"),
}


@pytest.mark.parametrize(("files", "wanted"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_chat_template(make: Make, files: dict[str, Any], wanted: Optional[str]) -> None:
    """The .jinja file comes before the .json one; a directory of that name is an error."""
    directory = make({"config.json": b"{}", **files})

    if wanted and ":" in wanted:
        with pytest.raises(ModelDirError, match=wanted):
            load_card(directory)
    else:
        found = load_card(directory).chat_template_file
        assert (found and found.variant) == wanted
        assert found is None or not found.is_custom


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_optional_slots_skip_what_is_no_file(make: Make, name: str) -> None:
    """A directory, a FIFO or a dangling link of such a name is as good as nothing."""
    for index, kind in enumerate((None, NOWHERE, "fifo")):
        directory = make({"config.json": b"{}", **({} if kind == "fifo" else {name: kind})}, name=f"m{index}")
        if kind == "fifo":
            os.mkfifo(directory / name)

        card = load_card(directory)

        assert _slots(card) == {"model_info": "hf_config_json:config.json"}
        assert card.extra_files == ()


# ---- Mistral's layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"config.json": NOWHERE}], ids=["no config.json", "dangling"])
def test_mistral_layout_has_extras_only(make: Make, config: dict[str, Any], tmp_path: Path) -> None:
    """With params.json in place of config.json all files are extras, and a custom template is ignored."""
    directory = make(
        {
            **config,
            "params.json": b"{}",
            "tokenizer.json": b"{}",
            "a.tiktoken": b"",
            "b.tiktoken": b"",
            "chat_template.jinja": b"",
            "generation_config.json": b"{}",
            "x.safetensors": b"",
            "README.md": b"",
        }
    )

    card = load_card(directory, custom_template=tmp_path / "missing.jinja")

    assert _slots(card) == {}
    assert _extras(card) == [
        "a.tiktoken",
        "b.tiktoken",
        "chat_template.jinja",
        "generation_config.json",
        "params.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("harvest", [True, False])
def test_mistral_layout_takes_the_context_length_from_the_tokenizer(make: Make, harvest: bool) -> None:
    """tokenizer_config.json tells the length although it fills no slot."""
    directory = make({"params.json": b"{}", "tokenizer_config.json": b'{"model_max_length": 7}'})

    card = load_card(directory, harvest=harvest)

    assert (card.architectural_max_context_length, card.prompt_formatter) == (7, None)


def test_params_may_be_a_directory_but_must_exist(make: Make) -> None:
    """What params.json is does not matter; a link to nothing is none."""
    assert _slots(load_card(make({"params.json": None}, name="a"))) == {}
    with pytest.raises(ModelDirError, match=r"config.json: expected"):
        load_card(make({"params.json": NOWHERE}, name="b"))


def test_config_that_is_there_rules_out_mistral(make: Make) -> None:
    """A config.json that is a directory or a link in circles is an error beside params.json too."""
    for index, kind in enumerate((None, Path("config.json"))):
        with pytest.raises(ModelDirError, match=r"config.json: expected a regular file"):
            load_card(make({"params.json": b"{}", "config.json": kind}, name=f"m{index}"))


# ---- custom template ---------------------------------------------------------------------------------


def test_custom_template_outside_makes_the_own_one_an_extra(make: Make, tmp_path: Path) -> None:
    """The template that is passed fills the slot, marked as custom; the directory's own becomes an extra."""
    directory = make({"config.json": b"{}", "chat_template.jinja": b"own", "mine.jinja": b"other"})
    (tmp_path / "mine.jinja").write_bytes(b"custom")

    card = load_card(directory, custom_template=tmp_path / "mine.jinja")

    found = card.chat_template_file
    assert found is not None
    assert (found.variant, found.is_custom, found.file.path) == (
        "hf_chat_template",
        True,
        str(tmp_path / "mine.jinja"),
    )
    assert _extras(card) == ["chat_template.jinja"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "mine.txt"])
def test_custom_template_inside_is_no_extra(make: Make, name: str) -> None:
    """A file of the directory itself can be the custom template."""
    directory = make({"config.json": b"{}", name: b"x"})

    card = load_card(directory, custom_template=str(directory / name))

    assert [(file.basename, custom) for file, custom in card.iter_metadata_files()] == [
        ("config.json", False),
        (name, True),
    ]


def test_custom_template_replaces_a_broken_one(make: Make, tmp_path: Path) -> None:
    """A directory named chat_template.jinja does no harm if another template is passed."""
    (tmp_path / "t").write_bytes(b"")

    card = load_card(
        make({"config.json": b"{}", "chat_template.jinja": None}), custom_template=tmp_path / "t"
    )

    assert card.chat_template_file is not None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("missing", "found nothing"),
        (None, "a directory"),
        (b"a\xff", "expected UTF-8, found the byte 0xff at offset 1"),
    ],
)
def test_unusable_custom_template(make: Make, tmp_path: Path, content: Any, problem: str) -> None:
    """A template that is missing, no file or no UTF-8 is an error that names it."""
    directory = make({"config.json": b"{}"})
    if content != "missing":
        make({"t.jinja": content}, name="other")

    with pytest.raises(ModelDirError, match=rf"other/t\.jinja: .*{problem}"):
        load_card(directory, custom_template=tmp_path / "other" / "t.jinja")


# ---- context length ----------------------------------------------------------------------------------

N = "max_position_embeddings"
LENGTHS = [
    ("{}", None),
    (f"{{{N}: 0x10}}", 16),
    (f"{{{N}: +5}}", 5),
    (f"{{{N}: -0x5}}", 5),
    (f"{{{N}: 4294967295}}", 2**32 - 1),
    (f"{{{N}: 0, text_config: {{{N}: 9}}}}", None),
    (f"{{text_config: {{{N}: 9}}}}", 9),
    ("{text_config: null}", None),
    ("{text_config: []}", None),
    ("{text_config: [9]}", 9),
    ("[7, null]", 7),
    ("[7, {}, 1]", 7),
    ("{llm_config: {}}", None),
    (f"{{{N}: 5, text_config: {{{N}: 'x'}}}}", 5),
    ("{'max\\x5fposition_embeddings': 5}", 5),
    ("{a: 1, a: 2}", None),
]
NO_LENGTHS = [
    f"{{{N}: {value}}}"
    for value in (
        "null",
        "'5'",
        "5.0",
        "5.",
        "-1",
        "1e3",
        "true",
        "Infinity",
        "4294967296",
        "[5]",
        "{}",
        "9999999999999999999999",
    )
] + [
    f"{{{N}: 1, {N}: 1}}",
    f"{{text_config: {{{N}: 1, {N}: 1}}}}",
    "{text_config: {}, text_config: {}}",
    "{text_config: 5}",
    "{text_config: 'x'}",
    f"{{text_config: {{{N}: null}}}}",
    "[]",
    "[7]",
    "5",
    "null",
    "",
    f"{{{N}: 5, text_config: {{{N}: '\\q'}}}}",
    "{'\\q': 1}",
]


@pytest.mark.parametrize(("config", "length"), LENGTHS)
def test_context_length(make: Make, config: str, length: Optional[int]) -> None:
    """The length comes from config.json, of which 0 counts as none and ends the search."""
    assert load_card(make({"config.json": config.encode()})).architectural_max_context_length == length


@pytest.mark.parametrize("config", NO_LENGTHS)
def test_context_length_that_is_none(make: Make, config: str) -> None:
    """What is no length of 32 bits is an error that names the file and what was expected."""
    with pytest.raises(ModelDirError, match=r"config\.json: .*(expected|twice|does not take|fit)"):
        load_card(make({"config.json": config.encode()}))


FALLBACKS = [
    (b'{"model_max_length":7}', 7),
    (b'{"model_max_length":7,"model_max_length":8}', 8),
    (b"[7]", None),
    (b'{"model_max_length":0}', None),
    (b'{"model_max_length":7.0}', None),
    (b'{"model_max_length":"7"}', None),
    (b'{"model_max_length":true}', None),
    (b'{"model_max_length":4294967296}', None),
    (b"nope", None),
    (b"\xff", None),
    (b'{"model_max_length":7,}', None),
    (b'{"model_max_length":7,"a":NaN}', None),
    (b'{"a":1e999,"model_max_length":7}', None),
    (b'\xef\xbb\xbf{"model_max_length":7}', None),
    (b'{"a":"\\ud800","model_max_length":7}', None),
    (b"[" * 100_000, None),
]


@pytest.mark.parametrize(("text", "length"), FALLBACKS)
def test_context_length_of_the_tokenizer(make: Make, text: bytes, length: Optional[int]) -> None:
    """Where config.json tells nothing tokenizer_config.json may; it is strict JSON, any doubt means none."""
    card = load_card(make({"config.json": b"{}", "tokenizer_config.json": text}))

    assert card.architectural_max_context_length == length


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_hostile_nesting_is_no_recursion_error(make: Make, depth: int) -> None:
    """Deeply nested brackets are read up to the limit, and refused beyond, by ModelDirError."""
    directory = make({"config.json": b'{"a":' + b"[" * depth + b"]" * depth + b"}"})

    if depth < 3_000:
        assert load_card(directory).context_length == 0
    else:
        with pytest.raises(ModelDirError, match=r"3000 deep"):
            load_card(directory)


# ---- errors ------------------------------------------------------------------------------------------


def test_all_problems_are_listed(make: Make) -> None:
    """One error names every file that is wrong, slots and extras alike."""
    directory = make(
        {
            "config.json": b"nope",
            "tokenizer.json": None,
            "chat_template.jinja": None,
            "a.txt": b"",
            "b.txt": b"",
        }
    )

    def read_file(path: str) -> CheckedFile:
        if path.endswith(".txt"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return CheckedFile.from_disk(path)

    with pytest.raises(ModelDirError) as caught:
        load_card(directory, read_file=read_file)

    assert caught.value.path == str(directory)
    assert [issue.split(":")[0] for issue in caught.value.issues] == [
        "tokenizer.json",
        "chat_template.jinja",
        "a.txt",
        "b.txt",
        "config.json",
    ]
    assert "b.txt: expected a readable file, found: Permission denied" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing/a/b", "expected a model directory, found nothing there$"),
        ("Qwen/Qwen3-0.6B", "'Qwen/Qwen3-0.6B': .* Hugging Face repo id, .* selfhost does not download"),
        ("", "found nothing there"),
        (__file__, "found a file"),
        ("a\0b", "null"),
        ("a\udcff", "can be listed"),
    ],
)
def test_what_is_no_directory(path: str, problem: str) -> None:
    """The error says what was passed, and what to do with a repo id or a file."""
    with pytest.raises(ModelDirError, match=problem):
        load_card(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_file_that_changes_between_hash_and_parse(make: Make, name: str) -> None:
    """A card never mixes the checksum of one content with the context length of another."""
    directory = make({"config.json": b"{}", "tokenizer_config.json": b"{}"})

    def read_then_change(path: str) -> CheckedFile:
        file = CheckedFile.from_disk(path)
        if path.endswith(f"/{name}"):
            Path(path).write_bytes(b'{"max_position_embeddings": 5}')
        return file

    with pytest.raises(ModelDirError, match=rf"{name}: changed while the model directory was read"):
        load_card(directory, read_file=read_then_change)


def test_config_that_becomes_a_fifo_does_not_block(make: Make) -> None:
    """What replaces a file after it was hashed is opened without waiting for a writer."""
    directory = make({"config.json": b"{}"})

    def read_then_replace(path: str) -> CheckedFile:
        file = CheckedFile.from_disk(path)
        os.unlink(path)
        os.mkfifo(path)
        return file

    with pytest.raises(ModelDirError, match=r"config.json: changed"):
        load_card(directory, read_file=read_then_replace)


def test_fifo_and_socket_as_config(make: Make) -> None:
    """A config.json that is a FIFO is refused at once."""
    directory = make({})
    os.mkfifo(directory / "config.json")

    with pytest.raises(ModelDirError, match=r"config.json: expected a regular file, found a FIFO"):
        load_card(directory)


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def test_extra_above_the_limit_is_left_out(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A file that no frontend takes is not read, and the log says so with name and size."""
    directory = make({"config.json": b"{}", "a.txt": b""})
    _sparse(directory / "huge.ckpt", MAX_FILE_BYTES + 1)

    with caplog.at_level(logging.WARNING, logger="selfhost"):
        card = load_card(directory)

    assert _extras(card) == ["a.txt"]
    assert "huge.ckpt" in caplog.text
    assert f"{MAX_FILE_BYTES + 1} bytes" in caplog.text


@pytest.mark.parametrize(
    ("name", "size"), [("tokenizer.json", MAX_FILE_BYTES + 1), ("config.json", MAX_PARSED_BYTES + 1)]
)
def test_slot_above_the_limit_is_an_error(make: Make, name: str, size: int) -> None:
    """A slot's file is never left out silently; the error has limit and size."""
    directory = make({"config.json": b"{}"})
    _sparse(directory / name, size)

    with pytest.raises(ModelDirError, match=rf"{name}: expected at most {size - 1} bytes, found"):
        load_card(directory)
