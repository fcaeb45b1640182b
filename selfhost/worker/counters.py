"""What the embedded server has done since it started, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ServerCounters:
    """Counts of one event loop; its thread alone writes them, any thread may read one at any time."""

    requests: dict[int, int] = field(default_factory=dict)  # answered, by status
    sent_bytes: int = 0  # of answers and their headers, before encryption
    accepted: int = 0  # connections
    refused_busy: int = 0  # of these: turned away because all places were taken
    handshake_failures: int = 0  # of TLS; clients that gave up in the middle are among them
    open_connections: int = 0  # now

    def count(self, status: int) -> None:
        """Add one answer."""
        self.requests[status] = self.requests.get(status, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """Return a copy that JSON can hold."""
        answered = self.requests.copy()  # at once: the loop may meet a new status meanwhile
        return {**vars(self), "requests": {str(status): number for status, number in answered.items()}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ServerCounters:
        """Return the counters that `as_dict` made into a dictionary."""
        return cls(
            **{**value, "requests": {int(status): number for status, number in value["requests"].items()}}
        )
