"""An endpoint of this process, and the record by which frontends see it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Optional

from ..discovery.base import Bucket, Publication, RecordKey, instance_record

if TYPE_CHECKING:
    from .runtime import DistributedRuntime


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of this process, as frontends know it: namespace, component, name.

    `transport` is the request plane's address, `host:port/<instance>/<ns>/<comp>/<ep>`; None publishes one
    that nobody answers at, which is enough for frontends to load and list the model.
    """

    runtime: DistributedRuntime = field(repr=False)
    namespace: str
    component: str
    name: str
    transport: Optional[str] = None

    @property
    def path(self) -> str:
        """Its three names as `DistributedRuntime.endpoint` takes them."""
        return f"{self.namespace}.{self.component}.{self.name}"

    def key(self, suffix: Optional[str] = None) -> RecordKey:
        """Return the discovery key of this endpoint, or of one LoRA on it."""
        return RecordKey(self.namespace, self.component, self.name, self.runtime.instance_id, suffix)


class InstanceRecord:
    """The record of one endpoint: there as long as it has users, whom the runtime counts under its lock."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.users = 0
        self._publication: Optional[Publication] = None
        self.lock = threading.RLock()  # held while the record is written or removed

    @property
    def is_published(self) -> bool:
        """Whether frontends can see the endpoint; takes no lock."""
        return self._publication is not None

    def publish(self) -> None:
        """Write the record, unless it is there."""
        with self.lock:
            if self._publication is None:
                key = self.endpoint.key()
                text = instance_record(key, transport=self.endpoint.transport)
                self._publication = self.endpoint.runtime.discovery.publish(Bucket.INSTANCES, key, text)

    def withdraw(self) -> None:
        """Remove the record, if it is there."""
        with self.lock:
            publication, self._publication = self._publication, None
            if publication is not None:
                publication.withdraw()
