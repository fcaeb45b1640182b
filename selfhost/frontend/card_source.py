"""Cards as they come: from the URL at which a worker answers with its card, or as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Optional

from ..card import json_text
from ..card import url as urls
from ..card.model_card import ModelDeploymentCard
from ..errors import CardError, SizeLimitExceeded, shown_url, without_userinfo
from .transport import Bytes, Transport, transport_for

_WEB = re.compile("https?:", re.IGNORECASE)
MAX_CARD_BYTES = 16 << 20  # a card has some kilobytes; one with a thousand files, a few hundred


def fetch_card(url: str, transports: Optional[Mapping[str, Transport]] = None) -> ModelDeploymentCard:
    """Fetch the card that a URL answers with; without `transports` by those of `default_transports()`.

    Raises FetchError, CardError for what is no card or has more than MAX_CARD_BYTES, SettingsError.
    """
    if transports is not None:
        return parse_card(fetch_text(url, transports), shown_url(url))
    from .transports import default_transports

    made = default_transports()
    try:
        return fetch_card(url, made)
    finally:
        for transport in made.values():
            transport.close()


def fetch_text(url: str, transports: Mapping[str, Transport]) -> bytes:
    """Fetch what may be a card; FetchError, CardError if it is too large to be one or the URL is none."""
    memory = _Memory()
    normalized = urls.normalize(url)
    if normalized is None and _WEB.match(url):  # it would seem to be a path on a disk
        message = f"{shown_url(url)} is no URL of a card: expected http(s)://host[:port]/path"
        raise CardError(message, value=without_userinfo(url))
    url = normalized or url
    try:
        transport_for(transports, url).fetch(url, memory, max_bytes=MAX_CARD_BYTES)
    except SizeLimitExceeded as error:
        raise _too_large(shown_url(url)) from error
    return memory.data


def parse_card(text: bytes, source: str) -> ModelDeploymentCard:
    """Read the text of a card, or of a discovery record with one; CardError, which names `source`."""
    if len(text) > MAX_CARD_BYTES:
        raise _too_large(source)
    try:
        if _is_record(text):
            return ModelDeploymentCard.from_record(text)
        return ModelDeploymentCard.from_json(text)
    except CardError as error:
        raise CardError(
            f"{source} is no card that can be used: {error}",
            field=error.field, value=error.value, issues=error.issues,
        ) from error  # fmt: skip


def _is_record(text: bytes) -> bool:
    """Tell whether this is a discovery record with a card in it, as the file store keeps them."""
    value = json_text.loads(text)
    return isinstance(value, dict) and "card_json" in value and "display_name" not in value


def _too_large(source: str) -> CardError:
    return CardError(f"{source} is no card: it has more than {MAX_CARD_BYTES} bytes", value=source)


class _Memory:
    """A sink that keeps what comes; see `Sink`."""

    def __init__(self) -> None:
        self.validator: Optional[str] = None
        self._pieces = bytearray()

    @property
    def data(self) -> bytes:
        """All bytes that came."""
        return bytes(self._pieces)

    @property
    def received(self) -> int:
        """How many bytes came."""
        return len(self._pieces)

    def write(self, data: Bytes) -> None:
        """Append bytes."""
        self._pieces += data

    def restart(self) -> None:
        """Forget all bytes."""
        self.validator = None
        self._pieces.clear()
