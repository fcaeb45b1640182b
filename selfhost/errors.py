"""Every exception that selfhost raises on purpose, as one tree.

Catch `SelfHostError` to catch them all. Each class carries, as attributes, what a caller acts on;
the message says what was attempted, on which thing, what was expected and what was found.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Optional


class SelfHostError(Exception):
    """The root of the tree."""


class CardError(SelfHostError, ValueError):
    """A model deployment card is not what Dynamo accepts.

    `field` is the dotted path of the first offending field ("" for the text as a whole), `value`
    what was found there; `issues` holds one line for every problem found.
    """

    def __init__(
        self, message: str, *, field: str = "", value: object = None, issues: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.issues = tuple(issues) or (message,)


class ChecksumError(CardError):
    """A text is no `blake3:<64 lower-case hex digits>`; `text` is what was found."""

    def __init__(self, message: str, *, text: object, field: str = "checksum") -> None:
        super().__init__(message, field=field, value=text)
        self.text = text


class ModelDirError(SelfHostError):
    """A model directory cannot become a card; `path` is the directory, `issues` one line a problem."""

    def __init__(self, message: str, *, path: str, issues: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.path = path
        self.issues = tuple(issues) or (message,)


class SettingsError(SelfHostError, ValueError):
    """A setting has a value that cannot be used, or one that is needed is missing."""

    def __init__(self, message: str, *, variable: str, value: Optional[str], accepted: str) -> None:
        super().__init__(message)
        self.variable = variable
        self.value = value
        self.accepted = accepted


class RegistrationError(SelfHostError):
    """A file or a model cannot be registered; nothing of it has been."""

    def __init__(
        self, message: str, *, slug: str = "", suffix: str = "", filename: str = "", reason: str = ""
    ) -> None:
        super().__init__(message)
        self.slug = slug
        self.suffix = suffix
        self.filename = filename
        self.reason = reason or message


class StatusServerError(SelfHostError):
    """The status server cannot listen, or cannot tell an address that others can reach."""

    def __init__(self, message: str, *, address: str) -> None:
        super().__init__(message)
        self.address = address


class DiscoveryError(SelfHostError):
    """A record cannot be published, read or withdrawn; `key` is the record's key ("" for the store)."""

    def __init__(self, message: str, *, backend: str, key: str = "") -> None:
        super().__init__(message)
        self.backend = backend
        self.key = key


class VerificationError(SelfHostError):
    """Bytes that were fetched are not the bytes that the card promises."""

    def __init__(
        self, message: str, *, url: str, expected: str, actual: str, size: Optional[int] = None
    ) -> None:
        super().__init__(message)
        self.url = url
        self.expected = expected
        self.actual = actual
        self.size = size


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100


def shown(value: object) -> str:
    """Return `repr(value)` for an error message, shortened in the middle if it is long."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"<a very long {type(value).__name__}>"
