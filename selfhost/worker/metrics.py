"""What a worker registers and serves, as metrics for Prometheus.

`WorkerCollector` tells, at each scrape, what there is then; nothing runs in between, and nothing is kept but
the sums over the registered files, until those change. The requests of an app in another server nobody knows:
`CountingApp` counts them, in prometheus_client's own counters, which add up over gunicorn's worker processes.

The package prometheus_client is loaded when one of them is made. Sharing: any number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Protocol

from ..errors import SelfHostError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from .registry import MetadataArtifactRegistry
    from .server import SystemStatusServer

logger = logging.getLogger(__name__)

_PREFIX = "selfhost_worker_"
_REQUESTS = "Requests answered, by status."
_SENT_BYTES = "Bytes of answers: of an embedded server with their heads, of a mounted app without."


class Observed(Protocol):
    """What a collector looks at: a DistributedRuntime, or whatever else has these."""

    metadata_artifacts: MetadataArtifactRegistry

    @property
    def status_server(self) -> Optional[SystemStatusServer]:
        """The embedded server, None where there is none."""

    def endpoint_states(self) -> Mapping[str, str]:
        """Return the state of each endpoint, by name."""


class WorkerCollector:
    """A collector of a worker's metrics, for `prometheus_client.REGISTRY.register`.

    A scrape never fails because of it: what cannot be told is left out, and logged. Raises SelfHostError if
    prometheus_client is missing.
    """

    def __init__(self, runtime: Observed) -> None:
        self._client = _prometheus_client()
        self._runtime = runtime
        self._sums: Optional[_Sums] = None

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, as a Prometheus registry asks for them."""
        for part in (self._registered, self._served):
            try:
                yield from list(part())
            except Exception:  # the host's other metrics must not go with ours
                logger.exception("some metrics cannot be told")

    def _registered(self) -> Iterator[Metric]:
        sums = self._sums
        if sums is None or sums.version != self._runtime.metadata_artifacts.version:
            sums = self._sums = _sums_of(self._runtime.metadata_artifacts)
        states = set(self._runtime.endpoint_states().values())
        yield self._gauge("models", "Models that are registered, LoRA adapters among them.", sums.models)
        yield self._gauge("files", "Files that are registered.", sums.files)
        yield self._gauge("pinned_bytes", "Memory that these take; held files take none.", sums.pinned_bytes)
        yield self._gauge("ready", "1 if all endpoints are published, as /health says.", states == {"ready"})

    def _served(self) -> Iterator[Metric]:
        server = self._runtime.status_server
        if server is None:
            return
        counters = server.counters()
        requests = self._client.core.CounterMetricFamily(_PREFIX + "requests", _REQUESTS, labels=["status"])
        for status, count in sorted(counters.requests.copy().items()):
            requests.add_metric([str(status)], count)
        yield requests
        yield self._counter("sent_bytes", _SENT_BYTES, counters.sent_bytes)
        yield self._gauge("open_connections", "Clients that are connected.", counters.open_connections)
        yield self._counter("connections", "Connections that were accepted.", counters.accepted)
        yield self._counter(
            "refused_connections",
            "Of these, turned away because all places were taken.",
            counters.refused_busy,
        )
        yield self._counter("handshake_failures", "TLS handshakes that failed.", counters.handshake_failures)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family: Metric = self._client.core.GaugeMetricFamily(_PREFIX + name, text, value=value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family: Metric = self._client.core.CounterMetricFamily(_PREFIX + name, text, value=value)
        return family


class _Sums(NamedTuple):
    version: int  # of the registry, when its files were gone over
    models: int
    files: int
    pinned_bytes: int


def _sums_of(registry: MetadataArtifactRegistry) -> _Sums:
    version = registry.version  # first: what changes meanwhile is gone over again
    models = {(artifact.slug, artifact.suffix) for artifact in registry}
    return _Sums(version, len(models), len(registry), registry.pinned_bytes)


class CountingApp:
    """A WSGI application that answers as `app` does, and counts the answers by status, and their bytes.

    The counters are registered in `registry` (None: the client's default). The bytes are those that an answer
    announces, a client that leaves early may have taken fewer. Raises SelfHostError if prometheus_client is
    missing.
    """

    def __init__(self, app: WSGIApplication, *, registry: Optional[CollectorRegistry] = None) -> None:
        client = _prometheus_client()
        options = {"registry": client.REGISTRY if registry is None else registry}
        self.app = app
        self._requests = client.Counter(_PREFIX + "requests", _REQUESTS, ["status"], **options)
        self._sent_bytes = client.Counter(_PREFIX + "sent_bytes", _SENT_BYTES, **options)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request (PEP 3333)."""
        has_body = environ["REQUEST_METHOD"] != "HEAD"

        def start(status: str, fields: list[tuple[str, str]], *error: Any) -> Any:
            self._requests.labels(status[:3]).inc()
            if has_body:
                self._sent_bytes.inc(_length_of(fields))
            return start_response(status, fields, *error)

        return self.app(environ, start)

    def __repr__(self) -> str:
        return f"<CountingApp {self.app!r}>"


def _length_of(fields: list[tuple[str, str]]) -> int:
    """Return the Content-Length of an answer, 0 where it has none."""
    return int(next((value for name, value in fields if name.lower() == "content-length"), 0))


def _prometheus_client() -> Any:
    try:
        import prometheus_client.core
    except ImportError as err:
        raise SelfHostError(
            f"metrics need the package `prometheus_client`, which cannot be imported ({err}): "
            "run `pip install 'selfhost[metrics]'`, or `pip install prometheus_client`"
        ) from err
    return prometheus_client
