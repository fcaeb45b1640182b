"""The five typed slots of a card, as one table, and what fills them.

Everything that goes over the files of a card walks this table, in Dynamo's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional

from ..errors import CardError
from .checked_file import CheckedFile
from .fields import Field, Problems, Struct, boolean, repeated_names


@dataclass(frozen=True)
class ModelSlot:
    """A file in a typed slot: what it is (`variant`, the name on the wire) and whether the user chose it.

    `is_custom` and `unknown` (unknown keys beside it, written back) exist for the variants `hf_chat_template`
    and `hf_chat_template_json` only.
    """

    variant: str
    file: CheckedFile
    is_custom: bool = False
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this slot."""
        if self.variant not in _WRAPPED:
            return {self.variant: self.file.to_json()}
        wrapper = {"is_custom": self.is_custom, "file": self.file.to_json(), **self.unknown}
        return {self.variant: wrapper}

    def with_file(self, file: CheckedFile) -> ModelSlot:
        """Return the same slot around another file."""
        return replace(self, file=file)


@dataclass(frozen=True)
class SlotRow:
    """One slot: its field in the card, the variants that it takes, and how an empty one is written.

    `variants` maps each name that is read to the one that is written.
    """

    name: str
    variants: Mapping[str, str]
    null_when_empty: bool = False

    def read(self, value: Any, path: str, problems: Problems) -> Optional[ModelSlot]:
        """Read a slot or null."""
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) != 1 or repeated_names(value):
            problems.expect(path, value, f"null or an object with one of {', '.join(self.variants)}")
            return None
        ((name, content),) = value.items()
        if name not in self.variants:
            problems.expect(path, name, f"one of {', '.join(self.variants)}")
            return None
        variant, below = self.variants[name], f"{path}.{name}"
        if variant not in _WRAPPED:
            file = read_file(content, below, problems)
            return None if file is None else ModelSlot(variant, file)
        values, unknown = _WRAPPER.members(content, below, problems)
        return None if values.get("file") is None else ModelSlot(variant, unknown=unknown, **values)

    def omit(self, slot: Optional[ModelSlot]) -> bool:
        """Whether the slot is left out of the JSON text."""
        return slot is None and not self.null_when_empty

    def write(self, slot: Optional[ModelSlot]) -> Optional[dict[str, Any]]:
        """Return what stands for the slot in the JSON text."""
        return None if slot is None else slot.to_json()

    def field(self) -> Field:
        """Return the slot as a field of the card."""
        return Field(self.name, self.read, None, self.omit, self.write)


def read_file(value: Any, path: str, problems: Problems) -> Optional[CheckedFile]:
    """Read a file, as `CheckedFile.from_json` does."""
    try:
        return CheckedFile.from_json(value, path)
    except CardError as err:
        problems.include(err)
        return None


def map_slot(slot: Optional[ModelSlot], fn: Callable[[CheckedFile], CheckedFile]) -> Optional[ModelSlot]:
    """Return the slot with its file replaced; None stays None."""
    return None if slot is None else slot.with_file(fn(slot.file))


_WRAPPED = frozenset(("hf_chat_template", "hf_chat_template_json"))
_WRAPPER = Struct(Field("is_custom", boolean), Field("file", read_file), min_items=2)
_FORMATTERS = {
    "hf_tokenizer_config_json": "hf_tokenizer_config_json",
    "hf_chat_template": "hf_chat_template",
    "hf_chat_template_jinja": "hf_chat_template",
    "hf_chat_template_json": "hf_chat_template_json",
}

SLOTS: tuple[SlotRow, ...] = (
    SlotRow("model_info", {"hf_config_json": "hf_config_json"}, null_when_empty=True),
    SlotRow(
        "tokenizer",
        {"hf_tokenizer_json": "hf_tokenizer_json", "tik_token_model": "tik_token_model"},
        null_when_empty=True,
    ),
    SlotRow("prompt_formatter", _FORMATTERS),
    SlotRow("chat_template_file", _FORMATTERS),
    SlotRow("gen_config", {"hf_generation_config_json": "hf_generation_config_json"}),
)
