"""DistributedRuntime: what the models of one process share - registry, status server, discovery, instance id.

Nothing is opened before `start` (or `with`, or the first `register_model`). `close` undoes everything, the
published cards first, so that no frontend is sent to a server that is gone.

Sharing: any number of threads. A forked child must make a runtime of its own: what the parent published
stays the parent's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Callable, Optional

from ..discovery.base import Bucket, Discovery, Publication, RecordKey, instance_record, new_instance_id
from ..errors import DiscoveryError, SettingsError
from ..settings import Settings
from .advertise import AdvertisedAddress, advertised_address
from .registry import MetadataArtifactRegistry

if TYPE_CHECKING:
    from .local_model import LocalModel
    from .server import SystemStatusServer

logger = logging.getLogger(__name__)


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

    def key(self, suffix: Optional[str] = None) -> RecordKey:
        """Return the discovery key of this endpoint, or of one LoRA on it."""
        return RecordKey(self.namespace, self.component, self.name, self.runtime.instance_id, suffix)


class DistributedRuntime:
    """One process's share in a deployment; a context manager.

    `settings` None reads the environment now. `registry` and `discovery` may be the host's own; a discovery
    that was passed in is closed by whoever made it.
    """

    def __init__(
        self,
        settings: Optional[Settings] = None,
        *,
        registry: Optional[MetadataArtifactRegistry] = None,
        discovery: Optional[Discovery] = None,
        instance_id: Optional[int] = None,
    ) -> None:
        self.settings = Settings.from_env() if settings is None else settings
        self.metadata_artifacts = MetadataArtifactRegistry() if registry is None else registry
        self.instance_id = new_instance_id() if instance_id is None else instance_id
        self._owns_discovery = discovery is None
        self._discovery = discovery
        self._server: Optional[SystemStatusServer] = None
        self._lock = threading.RLock()
        self._models: dict[LocalModel, None] = {}  # in the order of attaching
        self._instances: dict[RecordKey, tuple[Publication, int]] = {}
        self.can_reach_itself: Optional[bool] = None  # None: not tried yet

    # -------------------------------------------------------------- life

    def start(self) -> DistributedRuntime:
        """Start the status server, if a port is set; harmless when repeated.

        Raises SettingsError for an unusable base URL, StatusServerError if the port cannot be bound.
        """
        with self._lock:
            if self.settings.advertise_url is not None:
                AdvertisedAddress.parse(self.settings.advertise_url, variable="DYN_SYSTEM_ADVERTISE_URL")
            if self._server is None and self.settings.system_port is not None:
                from .server import SystemStatusServer  # an app mounted in another server needs none

                self._server = SystemStatusServer(
                    self.metadata_artifacts,
                    self.settings.system_host,
                    self.settings.system_port,
                    endpoints=self._endpoint_states,
                )
            if self._server is not None:
                self._server.start()
        return self

    def close(self, timeout: float = 5.0) -> None:
        """Detach every model, stop the server within `timeout` seconds, close discovery. May be repeated."""
        with self._lock:
            models, self._models = list(self._models), {}
            server, self._server = self._server, None
            discovery = self._discovery if self._owns_discovery else None
            self._discovery = None if self._owns_discovery else self._discovery
        steps: list[Callable[[], None]] = [model.detach for model in reversed(models)]
        if server is not None:
            steps.append(lambda: server.close(timeout))
        if discovery is not None:
            steps.append(discovery.close)
        for step in steps:
            try:
                step()
            except Exception:  # the other steps still have to be taken
                logger.exception("closing the runtime goes on after an error")

    def __enter__(self) -> DistributedRuntime:
        return self.start()

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    # -------------------------------------------------------------- what models need

    @property
    def status_server(self) -> Optional[SystemStatusServer]:
        """The running server; None where no port is set."""
        return self._server

    @property
    def discovery(self) -> Discovery:
        """Where cards are published; opened at first use."""
        with self._lock:
            if self._discovery is None:
                self._discovery = _open_discovery(self.settings)
            return self._discovery

    def endpoint(self, path: str, *, transport: Optional[str] = None) -> Endpoint:
        """Return the endpoint that `namespace.component.endpoint` names.

        Raises DiscoveryError for any other form.
        """
        parts = path.split(".")
        if len(parts) != 3 or not all(parts):
            message = f"{path!r} is no endpoint: expected namespace.component.endpoint"
            raise DiscoveryError(message, backend="", key=path)
        namespace, component, name = parts
        return Endpoint(self, namespace, component, name, transport)

    def base_url(self, advertise_url: Optional[str] = None) -> str:
        """Return what metadata URLs start with: an outright base URL, else the status server's address.

        Raises SettingsError where there is neither, StatusServerError where the server listens on every
        address and none of them can be reached from elsewhere.
        """
        outright = advertise_url or self.settings.advertise_url
        if outright is not None:
            return AdvertisedAddress.parse(outright, variable="DYN_SYSTEM_ADVERTISE_URL").base_url
        server = self._server
        if server is None or not server.is_running:
            accepted = "DYN_SYSTEM_PORT (0: any free port) or DYN_SYSTEM_ADVERTISE_URL (a base URL)"
            raise SettingsError(
                f"self-hosting needs an address to publish, but no status server runs: set {accepted}",
                variable="DYN_SYSTEM_PORT", value=None, accepted=accepted,
            )  # fmt: skip
        return advertised_address(server.host, server.port).base_url

    def acquire_instance(self, endpoint: Endpoint) -> None:
        """Publish that the endpoint is there, for its first model."""
        key = endpoint.key()
        with self._lock:
            publication, users = self._instances.get(key, (None, 0))
            if publication is None:
                text = instance_record(key, transport=endpoint.transport)
                publication = self.discovery.publish(Bucket.INSTANCES, key, text)
            self._instances[key] = publication, users + 1

    def release_instance(self, endpoint: Endpoint) -> None:
        """Withdraw it with its last model."""
        key = endpoint.key()
        with self._lock:
            publication, users = self._instances.pop(key)
            if users > 1:
                self._instances[key] = publication, users - 1
            else:
                publication.withdraw()

    def add_model(self, model: LocalModel) -> None:
        """Remember an attached model, to detach it at `close`."""
        with self._lock:
            self._models[model] = None

    def remove_model(self, model: LocalModel) -> None:
        """Forget a detached model."""
        with self._lock:
            self._models.pop(model, None)

    def _endpoint_states(self) -> Mapping[str, str]:
        # Without the lock: it is held while a record is published, and the server's thread must not wait.
        return {key.endpoint: "ready" for key in self._instances.copy()}

    def __repr__(self) -> str:
        return f"<DistributedRuntime {self.instance_id:x} models={len(self._models)} server={self._server!r}>"


def _open_discovery(settings: Settings) -> Discovery:
    from ..discovery import open_discovery  # loads the backends: only where none was passed in

    return open_discovery(settings.discovery_backend, settings.file_kv)
