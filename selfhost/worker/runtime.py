"""DistributedRuntime: what the models of one process share - registry, status server, discovery, instance id.

Nothing is opened before `start` (or `with`, or the first `register_model`), but the folder of `shared_dir`.
`close` undoes everything, the published cards first, so that no frontend is sent to a server that is gone; so
does the interpreter's exit. A closed runtime stays closed until somebody calls `start`: an attach that comes
too late is refused.

Sharing: any number of threads. A forked child must make a runtime of its own: what the parent published
stays the parent's, and an inherited runtime refuses to start and ignores `close`.

Locks, in the order in which they may be taken: `_life` orders `start` and `close`; then a model's own; then
an endpoint's, held while its record is written or removed; then `_lock`, for dictionary work only.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Callable, Optional

from ..discovery.base import Discovery, RecordKey
from ..errors import DiscoveryError, RegistrationError, SettingsError
from ..settings import Settings
from .access import Access
from .advertise import AdvertisedAddress, advertised_address
from .endpoint import Endpoint, InstanceRecord
from .publishing import choose_instance_id, open_discovery
from .registry import MetadataArtifactRegistry
from .tls import TlsFiles

if TYPE_CHECKING:
    from .local_model import LocalModel
    from .server import SystemStatusServer

logger = logging.getLogger(__name__)


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
        self._owns_registry = registry is None
        if registry is None:
            registry = MetadataArtifactRegistry(shared=self.settings.shared_dir)
        self.metadata_artifacts = registry
        self.instance_id = choose_instance_id(self.settings) if instance_id is None else instance_id
        self._owns_discovery = discovery is None
        self._discovery = discovery
        self._server: Optional[SystemStatusServer] = None
        self._access: Optional[Access] = None  # of that server
        self.tls: Optional[TlsFiles] = None  # of that server; None: plain HTTP
        self._pid = os.getpid()
        self._is_closed = False
        self._life = threading.RLock()
        self._lock = threading.RLock()
        self._opening = threading.RLock()  # held while a backend is loaded; nothing else is locked meanwhile
        self._models: dict[RecordKey, LocalModel] = {}  # in the order of attaching
        self._instances: dict[RecordKey, InstanceRecord] = {}
        self._unreachable: set[str] = set()  # base URLs that did not lead back here

    # -------------------------------------------------------------- life

    def start(self) -> DistributedRuntime:
        """Start the status server, if a port is set; harmless when repeated. Opens a closed runtime again.

        Raises SettingsError for an unusable base URL, StatusServerError if the port cannot be bound,
        RegistrationError in a forked child.
        """
        self._refuse_in_child()
        with self._life:
            if self.settings.advertise_url is not None:
                AdvertisedAddress.parse(self.settings.advertise_url, variable="DYN_SYSTEM_ADVERTISE_URL")
            if self._server is None and self.settings.system_port is not None:
                self._server = self._make_server(self.settings.system_port)
            if self._server is not None:
                self._server.start()
            if self._is_closed or self not in _started:  # not each time: atexit never shrinks its table
                _close_at_exit(self)
            self._is_closed = False
        return self

    def ensure_started(self) -> None:
        """Start the runtime for an attach, unless somebody has closed it: RegistrationError then."""
        self._refuse_in_child()
        self._refuse_closed()  # without waiting for the end of a `close` that runs
        with self._life:
            self._refuse_closed()
            self.start()

    def close(self, timeout: float = 5.0) -> None:
        """Detach every model, stop the server within `timeout` seconds, close discovery. May be repeated.

        Waits for an attach that runs in another thread, and undoes it. Does nothing in a forked child.
        """
        if self._pid != os.getpid():
            return
        with self._life:
            for step in self._closing_steps(timeout):
                try:
                    step()
                except Exception:  # the other steps still have to be taken
                    logger.exception("closing the runtime goes on after an error")

    def _closing_steps(self, timeout: float) -> list[Callable[[], None]]:
        with self._lock:
            self._is_closed = True  # from now on no model comes
            models = list(self._models.values())
            self._unreachable.clear()
        server, self._server = self._server, None
        steps: list[Callable[[], None]] = [model.detach for model in reversed(models)]
        if server is not None:
            steps.append(lambda: server.close(timeout))
        if self._owns_discovery:
            steps.append(self._close_discovery)
        if self._owns_registry:
            steps.append(self.metadata_artifacts.close)
        return steps

    def _close_discovery(self) -> None:
        with self._opening:
            discovery, self._discovery = self._discovery, None
        if discovery is not None:
            discovery.close()

    def _make_server(self, port: int) -> SystemStatusServer:
        from .server import SystemStatusServer  # an app mounted in another server needs none

        settings = self.settings
        self._access = Access.of(settings.token, settings.token_file)
        self.tls = TlsFiles.of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        if self.tls is not None and settings.advertise_url and self.base_url().startswith("http:"):
            what = "the status server speaks TLS, and cards will say %s: right only behind a proxy (%s)"
            logger.warning(what, self.base_url(), "DYN_SYSTEM_ADVERTISE_URL, --advertise")
        return SystemStatusServer(
            self.metadata_artifacts,
            settings.system_host,
            port,
            limits=settings.limits,
            endpoints=self.endpoint_states,
            isolation=settings.isolation,
            tls=self.tls,
            access=self._access,
            index=settings.metadata_index,
        )

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise RegistrationError("the runtime is closed: call its start() before attaching models to it")

    def _refuse_in_child(self) -> None:
        if self._pid != os.getpid():
            raise RegistrationError(
                f"this runtime belongs to process {self._pid}, from which this one was forked: "
                "make a DistributedRuntime after the fork"
            )

    def __enter__(self) -> DistributedRuntime:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------- what models need

    @property
    def status_server(self) -> Optional[SystemStatusServer]:
        """The running server; None where no port is set."""
        return self._server

    @property
    def token(self) -> Optional[str]:
        """The bearer token that the status server asks for now; None: none."""
        return None if self._access is None else self._access.token

    @property
    def discovery(self) -> Discovery:
        """Where cards are published; opened at first use, RegistrationError once the runtime is closed."""
        discovery = self._discovery
        if discovery is not None:
            return discovery
        self._refuse_in_child()
        with self._opening:
            if self._discovery is None:
                self._refuse_closed()
                self._discovery = open_discovery(self.settings)
                _close_at_exit(self)  # after the discovery's own hook
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
        if advertise_url:
            return AdvertisedAddress.parse(advertise_url, variable="advertise_url").base_url
        if self.settings.advertise_url is not None:
            variable = "DYN_SYSTEM_ADVERTISE_URL"
            return AdvertisedAddress.parse(self.settings.advertise_url, variable=variable).base_url
        server = self._server
        if server is None or not server.is_running:
            accepted = "DYN_SYSTEM_PORT (0: any free port) or DYN_SYSTEM_ADVERTISE_URL (a base URL)"
            raise SettingsError(
                f"self-hosting needs an address to publish, but no status server runs: set {accepted}",
                variable="DYN_SYSTEM_PORT", value=None, accepted=accepted,
            )  # fmt: skip
        return advertised_address(server.host, server.port, scheme=server.scheme).base_url

    def reachable(self, base_url: str, check: Callable[[], bool]) -> bool:
        """Tell whether `base_url` leads back here, as `check` finds; one that did not is not tried again."""
        if base_url in self._unreachable:
            return False
        if check():
            return True
        with self._lock:
            self._unreachable.add(base_url)
        return False

    def acquire_instance(self, endpoint: Endpoint) -> None:
        """Publish that the endpoint is there, for its first model.

        Raises RegistrationError if it is published with another transport already.
        """
        with self._lock:
            record = self._instances.setdefault(endpoint.key(), InstanceRecord(endpoint))
            if record.endpoint.transport != endpoint.transport:
                raise RegistrationError(
                    f"the endpoint {endpoint.path!r} is published with the transport "
                    f"{record.endpoint.transport!r}, so it cannot have {endpoint.transport!r}: "
                    "an endpoint has one transport in a process"
                )
            record.users += 1
        try:
            record.publish()
        except BaseException:
            self.release_instance(endpoint)
            raise
        self._tell_states()

    def release_instance(self, endpoint: Endpoint) -> None:
        """Withdraw it with its last model."""
        key = endpoint.key()
        with self._lock:
            record = self._instances[key]
            record.users -= 1
        with record.lock:  # whoever wants the same endpoint meanwhile waits here, and publishes it anew
            if record.users:
                return
            try:
                record.withdraw()
            finally:
                with self._lock:
                    if not record.users and self._instances.get(key) is record:
                        del self._instances[key]
                self._tell_states()

    def add_model(self, key: RecordKey, model: LocalModel) -> None:
        """Remember a model that is about to be published under `key`, to detach it at `close`.

        Raises RegistrationError if the runtime is closed, DiscoveryError if another model has that key.
        """
        with self._lock:
            self._refuse_closed()
            holder = self._models.setdefault(key, model)
        if holder is not model:
            raise DiscoveryError(
                f"cannot publish {model.card.display_name!r} as {str(key)!r}: "
                f"{holder.card.display_name!r} is published there by this process. An endpoint has one base "
                "model, and one LoRA of each slug (a/b and a_b have the same): use another endpoint or "
                "another LoRA name, or detach that model first",
                backend=self.discovery.name,
                key=str(key),
            )

    def remove_model(self, key: RecordKey) -> None:
        """Forget a detached model."""
        with self._lock:
            self._models.pop(key, None)

    def endpoint_states(self) -> Mapping[str, str]:
        """Return the endpoints that are published, by name, each with the state "ready"."""
        # Without any lock: the server's thread must wait neither for a disk nor for whoever waits for one.
        records = self._instances.copy().values()
        return {record.endpoint.name: "ready" for record in records if record.is_published}

    def _tell_states(self) -> None:
        server = self._server
        if server is not None:
            server.states_changed()

    def __repr__(self) -> str:
        return f"<DistributedRuntime {self.instance_id:x} models={len(self._models)} server={self._server!r}>"


# ------------------------------------------------------------------ the interpreter's exit

_started: weakref.WeakSet[DistributedRuntime] = weakref.WeakSet()


def _close_at_exit(runtime: DistributedRuntime) -> None:
    """See to it that the runtime is closed at exit, before its server or its discovery ends by itself.

    Hooks run in reverse order: this one is registered anew so that it is the last, after those of the others.
    """
    _started.add(runtime)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    for runtime in list(_started):
        runtime.close(timeout=1.0)
