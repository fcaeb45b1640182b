"""A sink that keeps nothing of a file but its hash and its length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from ..card.checked_file import CheckedFile
from ..card.checksum import Checksum, new_hasher
from ..errors import VerificationError
from .transport import Bytes
from .watched_sink import looks_like_html

if TYPE_CHECKING:
    from blake3 import blake3 as Hasher


class HashingSink:
    """Hashes what comes, and counts it; see `Sink`."""

    def __init__(self) -> None:
        self.validator: Optional[str] = None
        self.received = 0
        self.looks_like_html = False
        self._hasher: Hasher = new_hasher()

    def write(self, data: Bytes) -> None:
        """Count and hash."""
        if not self.received:
            self.looks_like_html = looks_like_html(data)
        self._hasher.update(data)
        self.received += len(data)

    def restart(self) -> None:
        """Forget all bytes."""
        self.__init__()  # type: ignore[misc]

    def verify(self, file: CheckedFile) -> None:
        """Raise VerificationError unless this is the file."""
        actual = Checksum(self._hasher.hexdigest())
        if actual != file.checksum:
            size = "" if file.size is None else f" ({file.size} bytes)"
            raise VerificationError(
                f"expected {file.checksum}{size}, found {actual} ({self.received} bytes)",
                url=file.path, expected=str(file.checksum), actual=str(actual), size=self.received,
            )  # fmt: skip
