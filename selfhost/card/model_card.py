"""The model deployment card: everything that a frontend has to know about a model, in Dynamo's JSON.

One table describes the fields in Dynamo's order: how each is read, when it is left out, how it is written.
One table describes the typed slots (`slots.SLOTS`). Reading accepts and refuses what Dynamo 1.6.1 does and
fills in its defaults; unknown fields, at every level, are kept and written back behind the known ones.
Cards are frozen and may be shared by threads; the JSON objects that they hold are not to be changed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Union, cast

from ..errors import CardError, shown
from . import json_text
from .card_diff import FieldDifference, differences
from .checked_file import CheckedFile
from .fields import (
    Field,
    Problems,
    Struct,
    Written,
    anything,
    choice,
    is_empty,
    is_none,
    items,
    optional,
    text,
    u32,
)
from .mdcsum import mdcsum
from .model_type import ModelInput, ModelType, WorkerType
from .parts import INDEXER_IDENTITY, LORA, MEDIA_DECODER, MEDIA_FETCHER, RUNTIME_CONFIG, TENSOR_MODEL_CONFIG
from .router_config import ROUTER_CONFIG
from .slots import SLOTS, ModelSlot, map_slot, read_file
from .slug import Slug

FileMap = Callable[[CheckedFile], CheckedFile]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class ModelDeploymentCard:
    """A card. The constructor trusts its values and completes them; `from_json` checks everything.

    `slug` is derived from the name when it is not given. `context_length` is always the effective one.
    `runtime_config`, `router_config`, `indexer_identity` and the like are JSON objects, completed with
    Dynamo's defaults. Raises CardError if one of those objects is none that Dynamo takes.
    """

    display_name: str
    slug: Slug = None  # type: ignore[assignment]  # from the name, in __post_init__
    source_path: Optional[str] = None
    model_info: Optional[ModelSlot] = None
    tokenizer: Optional[ModelSlot] = None
    prompt_formatter: Optional[ModelSlot] = None
    chat_template_file: Optional[ModelSlot] = None
    gen_config: Optional[ModelSlot] = None
    prompt_context: Optional[tuple[str, ...]] = None
    architectural_max_context_length: Optional[int] = None  # tokens
    context_length: Optional[int] = None  # tokens
    kv_cache_block_size: int = 16  # tokens
    migration_limit: int = 0  # requests
    model_type: ModelType = ModelType.Chat | ModelType.Completions
    model_input: ModelInput = ModelInput.Tokens
    worker_type: Optional[WorkerType] = None
    needs: tuple[tuple[WorkerType, ...], ...] = ()
    lora: Optional[Json] = None
    aliases: tuple[str, ...] = ()
    user_data: Any = None
    runtime_config: Json = field(default_factory=dict)
    tensor_model_config: Optional[Json] = None
    media_decoder: Optional[Json] = None
    media_fetcher: Optional[Json] = None
    router_config: Optional[Json] = None
    indexer_identity: Optional[Json] = None
    extra_files: tuple[CheckedFile, ...] = ()
    unknown: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        if cast(Optional[Slug], self.slug) is None:
            self._set("slug", Slug.from_name(self.display_name))
        self._complete_objects()
        self._set("context_length", self.effective_context_length)

    @classmethod
    def from_json(cls, text: Union[str, bytes]) -> ModelDeploymentCard:
        """Read a card; raise CardError that lists all that is wrong with it.

        The error's `field` and `value` are those of the first problem, `issues` has a line for each.
        """
        problems = Problems()
        values, unknown = _CARD.members(json_text.loads(text), "", problems)
        problems.raise_any()
        return cls(unknown=unknown, **values)

    @classmethod
    def from_record(cls, text: Union[str, bytes]) -> ModelDeploymentCard:
        """Read the card that a discovery record holds as `card_json`; raise CardError as `from_json` does."""
        record = json_text.loads(text)
        card = record.get("card_json") if isinstance(record, dict) else None
        if not isinstance(card, dict):
            raise CardError(
                f"card_json: expected an object, found {shown(card)}", field="card_json", value=card
            )
        return cls.from_json(json_text.dumps(card))

    def to_json(self) -> str:
        """Return the card as Dynamo writes it, `context_length` being the effective one."""
        document = self._document(lambda entry, value: entry.omit(value))
        return json_text.dumps(document)

    @property
    def mdcsum(self) -> str:
        """The checksum of the card, 64 hexadecimal digits; computed at each call (some 50 us)."""
        return mdcsum(self)

    @property
    def effective_context_length(self) -> int:
        """The tokens that count: the runtime's, else the model's, else the card's, else 0."""
        lengths = (
            self.runtime_config.get("context_length"),
            self.architectural_max_context_length,
            self.context_length,
        )
        return next((length for length in lengths if length is not None), 0)

    def iter_metadata_files(self) -> Iterator[tuple[CheckedFile, bool]]:
        """Yield each file in Dynamo's order, and whether the user chose it (a custom template)."""
        for row in SLOTS:
            slot: Optional[ModelSlot] = getattr(self, row.name)
            if slot is not None:
                yield slot.file, slot.is_custom
        for file in self.extra_files:
            yield file, False

    def map_files(self, fn: FileMap) -> ModelDeploymentCard:
        """Return a card in which `fn` replaced each file, called in the order of `iter_metadata_files`."""
        changes: dict[str, Any] = {row.name: map_slot(getattr(self, row.name), fn) for row in SLOTS}
        return self._replace(changes, extra_files=tuple(fn(file) for file in self.extra_files))

    def derive_lora(
        self, name: str, *, max_gpu_lora_count: Optional[int] = None, **overrides: Any
    ) -> ModelDeploymentCard:
        """Return the card of a LoRA adapter on this model: a copy but for name, slug, lora and `overrides`.

        Raises TypeError if an override is no field of a card.
        """
        for override in overrides:
            if override not in _NAMES:
                raise TypeError(f"derive_lora() got {override!r}, which is no field of a ModelDeploymentCard")
        lora = {"name": name, "max_gpu_lora_count": max_gpu_lora_count}
        return self._replace({"display_name": name, "slug": Slug.from_name(name), "lora": lora}, **overrides)

    def diff(self, other: ModelDeploymentCard) -> tuple[FieldDifference, ...]:
        """Return each field that differs, with both values; in Dynamo's order."""
        return tuple(differences(self._document(_keep), other._document(_keep)))

    def _document(self, omit: Callable[[Field, Any], bool]) -> dict[str, Any]:
        document = {}
        for entry in _CARD.fields:
            value = getattr(self, entry.name)
            if not omit(entry, value):
                document[entry.name] = entry.write(value)
        document.update(self.unknown)
        return document

    def _replace(self, changes: Mapping[str, Any], **more: Any) -> ModelDeploymentCard:
        """Return a changed card that shares no JSON object with this one."""
        own = {name: copy.deepcopy(getattr(self, name)) for name in _JSON_FIELDS}
        return dataclasses.replace(self, **{**own, **changes, **more})

    def _complete_objects(self) -> None:
        problems = Problems()
        for name, table in _OBJECTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, Written):
                self._set(name, table.read(dict(value), name, problems))
        problems.raise_any()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _keep(entry: Field, value: Any) -> bool:
    return False


def _read_slug(value: Any, path: str, problems: Problems) -> Any:
    return _parsed(Slug.parse, value, problems)


def _read_model_type(value: Any, path: str, problems: Problems) -> Any:
    return _parsed(ModelType.parse, value, problems)


def _parsed(parse: Callable[[object], Any], value: Any, problems: Problems) -> Any:
    try:
        return parse(value)
    except CardError as err:
        problems.include(err)
        return None


def _enum_value(member: Any) -> Any:
    return None if member is None else member.value


def _write_needs(needs: tuple[tuple[WorkerType, ...], ...]) -> list[list[str]]:
    return [[worker.value for worker in alternative] for alternative in needs]


def _write_files(files: tuple[CheckedFile, ...]) -> list[dict[str, Any]]:
    return [file.to_json() for file in files]


def _object(name: str, table: Struct, omit: Callable[[Any], bool] = is_none) -> Field:
    return Field(name, optional(table.read), None, omit)


def _written_null(value: Any) -> bool:
    return False


_WORKER = choice({worker.value: worker for worker in WorkerType})
_CONTEXT = choice({name: name for name in ("oai_chat", "llama3_date_time")})

_OBJECTS = {
    "lora": LORA,
    "runtime_config": RUNTIME_CONFIG,
    "tensor_model_config": TENSOR_MODEL_CONFIG,
    "media_decoder": MEDIA_DECODER,
    "media_fetcher": MEDIA_FETCHER,
    "router_config": ROUTER_CONFIG,
    "indexer_identity": INDEXER_IDENTITY,
}

_CARD = Struct(
    Field("display_name", text),
    Field("slug", _read_slug),
    Field("source_path", optional(text), None, is_none),
    *(row.field() for row in SLOTS),
    Field("prompt_context", optional(items(_CONTEXT, tuple)), None, is_none),
    Field("architectural_max_context_length", optional(u32), None, is_none),
    Field("context_length", optional(u32), None),
    Field("kv_cache_block_size", u32),
    Field("migration_limit", u32),
    Field("model_type", _read_model_type, write=str),
    Field("model_input", choice({kind.value: kind for kind in ModelInput}), write=_enum_value),
    Field("worker_type", optional(_WORKER), None, write=_enum_value),
    Field("needs", items(items(_WORKER, tuple), tuple), (), write=_write_needs),
    _object("lora", LORA),
    Field("aliases", items(text, tuple), (), is_empty, list),
    Field("user_data", anything, None, is_none),
    Field("runtime_config", RUNTIME_CONFIG.read, {}),
    _object("tensor_model_config", TENSOR_MODEL_CONFIG),
    _object("media_decoder", MEDIA_DECODER, _written_null),
    _object("media_fetcher", MEDIA_FETCHER, _written_null),
    _object("router_config", ROUTER_CONFIG),
    _object("indexer_identity", INDEXER_IDENTITY),
    Field("extra_files", items(read_file, tuple), (), is_empty, _write_files),
    min_items=15,
)
_NAMES = _CARD.names | {"unknown"}
_JSON_FIELDS = (*_OBJECTS, "user_data", "unknown")
