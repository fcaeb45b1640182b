"""What a model can do, what it is fed with and which part of a deployment it is.

The names and their spelling are Dynamo's (1.6.1), so that values read like those of its Python binding.
"""

from __future__ import annotations

import enum
import re
from typing import Any, Optional

from ..errors import CardError, shown

_HEX_DIGITS = re.compile(r"\+?[0-9a-fA-F]+")
_MAX_BITS = 0xFFFF
# Unicode's White_Space, which Rust trims. Python's own strip() also takes U+001C to U+001F.
_SPACES = "".join(map(chr, range(0x2000, 0x200B)))
_BLANKS = f"\t\n\v\f\r \x85\xa0\u1680{_SPACES}\u2028\u2029\u202f\u205f\u3000"


class ModelInput(str, enum.Enum):
    """What a worker takes: raw text, token ids, or tensors."""

    Text = "Text"
    Tokens = "Tokens"
    Tensor = "Tensor"


class WorkerType(str, enum.Enum):
    """Which part of a disaggregated deployment a worker is; `Aggregated` is all of it."""

    Prefill = "prefill"
    Decode = "decode"
    Encode = "encode"
    Aggregated = "aggregated"


class ModelType(enum.IntFlag):
    """The endpoints that a model serves: flags to be joined with `|`.

    Bits beyond the named ones come from newer versions and are kept.
    """

    Empty = 0
    Chat = 1 << 0
    Completions = 1 << 1
    Embedding = 1 << 2
    TensorBased = 1 << 3
    Prefill = 1 << 4
    Images = 1 << 5
    Audios = 1 << 6
    Videos = 1 << 7
    Realtime = 1 << 8
    Classify = 1 << 9
    Pooling = 1 << 10
    Rerank = 1 << 11

    @classmethod
    def parse(cls, text: object) -> ModelType:
        """Return the flags that `Chat | Completions`, `0x3` or any mix of them says, or raise CardError."""
        if not isinstance(text, str):
            raise _no_model_type(text)
        value = cls.Empty
        for name in text.split("|") if text.strip(_BLANKS) else ():
            flag = _flag(name.strip(_BLANKS))
            if flag is None:
                raise _no_model_type(text)
            value |= flag
        return value

    def __str__(self) -> str:
        """Return the text that `parse` reads: the names in order, other bits as one hex number."""
        names = [name for name, flag in _FLAGS.items() if self & flag]
        rest = int(self) & ~_NAMED_BITS
        if rest:
            names.append(f"{rest:#x}")
        return " | ".join(names)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


_FLAGS = {name: flag for name, flag in ModelType.__members__.items() if flag}
_NAMED_BITS = sum(_FLAGS.values())


def _flag(name: str) -> Optional[ModelType]:
    if not name.startswith("0x"):
        return _FLAGS.get(name)
    digits = name[2:]
    if _HEX_DIGITS.fullmatch(digits) is None:
        return None
    bits = int(digits, 16)
    return ModelType(bits) if bits <= _MAX_BITS else None


def _no_model_type(value: Any) -> CardError:
    return CardError(
        f"model_type: expected names joined by '|' out of {', '.join(_FLAGS)}, found {shown(value)}",
        field="model_type",
        value=value,
    )
