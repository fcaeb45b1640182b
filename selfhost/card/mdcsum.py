"""The checksum of a card, bit for bit that of Dynamo 1.6.1: frontends name a model's directory by it.

It covers what decides how a model behaves, not where its files are. It is not injective: names are joined
without a separator and slots are not tagged, so it tells cards of one model apart, not forgeries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from struct import pack
from typing import TYPE_CHECKING, Any, Optional

from . import json_text
from .checked_file import CheckedFile
from .checksum import Checksum
from .model_type import WorkerType
from .router_config import ROUTER_CONFIG
from .slots import SLOTS

if TYPE_CHECKING:
    from .model_card import ModelDeploymentCard

_WORKER_BYTE = {worker: bytes([index]) for index, worker in enumerate((None, *WorkerType))}
_CONTEXT_NAMES = {"oai_chat": "OaiChat", "llama3_date_time": "Llama3DateTime"}
_IDENTITY_TAG = b"dynamo/model-card/indexer-identity/v1"


def mdcsum(card: ModelDeploymentCard) -> str:
    """Return the checksum of `card` as 64 lower-case hexadecimal digits."""
    return Checksum.of(b"".join(_parts(card))).hex


def _parts(card: ModelDeploymentCard) -> Iterator[bytes]:
    yield card.display_name.encode()
    yield (card.source_path or "").encode()
    for row in SLOTS:
        slot = getattr(card, row.name)
        if slot is not None:
            yield str(slot.file.checksum).encode()
    yield from _extra_files(card.extra_files)
    if card.prompt_context is not None:
        yield f"[{', '.join(_CONTEXT_NAMES[name] for name in card.prompt_context)}]".encode()
    yield pack(">II", card.effective_context_length, card.kv_cache_block_size)
    yield _WORKER_BYTE[card.worker_type]
    yield from _needs(card.needs)
    if card.router_config is not None:
        text = json_text.dumps(ROUTER_CONFIG.known(card.router_config))
        yield bytes.fromhex(Checksum.of(text.encode()).hex)
    if card.indexer_identity is not None:
        yield from _identity(card.indexer_identity)
    if card.aliases:
        yield pack(">I", len(card.aliases))
        for alias in card.aliases:
            yield pack(">I", len(alias.encode())) + alias.encode()


def _extra_files(files: Sequence[CheckedFile]) -> Iterator[bytes]:
    for name, digest in sorted(((file.basename or "").encode(), file.checksum.hex) for file in files):
        yield name + b"\0" + digest.encode()


def _needs(needs: Sequence[Sequence[WorkerType]]) -> Iterator[bytes]:
    yield pack(">I", len(needs))
    for alternative in needs:
        yield pack(">I", len(alternative)) + b"".join(map(_WORKER_BYTE.__getitem__, alternative))


def _identity(identity: Mapping[str, Any]) -> Iterator[bytes]:
    yield _IDENTITY_TAG
    for name in ("semantics", "routing_scope"):
        yield from _identity_map(identity.get(name))


def _identity_map(entries: Optional[Mapping[str, str]]) -> Iterator[bytes]:
    if entries is None:
        yield b"\0"
        return
    yield b"\1" + pack("<I", len(entries))
    for key, value in sorted((key.encode(), value.encode()) for key, value in entries.items()):
        yield pack("<I", len(key)) + key + pack("<I", len(value)) + value
