"""Site: everything that one server answers, as a function from a request to an answer.

/v1/metadata/..., its index if that is on, /health and /live. Never raises; waits for nothing but the host's
`endpoints`. Sharing: any number of threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Callable, Optional

from .._threads import host_signals, log_safely
from .access import Access
from .answer import FAILED, INDEX, NOT_FOUND, Answer, Headers, answer_registered, json_answer, split_target
from .index import Index
from .registry import MetadataArtifactRegistry

logger = logging.getLogger(__name__)

EndpointStates = Callable[[], Mapping[str, str]]  # by name; an endpoint that serves is "ready"


class Site:
    """What is registered, and how the host is.

    `endpoints` is asked at each /health for the state of each endpoint: the answer is 200 if there is one
    and all are "ready", else 503 with the reason; without it always 200, as /live is. It must not wait:
    whoever else the calling thread serves waits with it. `access` None lets everybody see metadata; `index`
    lists it at /v1/metadata.
    """

    def __init__(
        self,
        registry: MetadataArtifactRegistry,
        *,
        endpoints: Optional[EndpointStates] = None,
        access: Optional[Access] = None,
        index: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry
        self.access = access
        self._index = Index(registry) if index else None
        self._endpoints = endpoints
        self._clock = clock
        self._started_at = clock()

    def answer(self, method: str, target: str, headers: Headers) -> Answer:
        """Answer GET or HEAD for an origin-form target as it was sent."""
        try:
            path, query = split_target(target)
            if self.access is not None:
                refusal = self.access.refusal(path, headers.get("authorization", ""))
                if refusal is not None:
                    return refusal
            answer = answer_registered(self.registry, method, path, query, headers)
            if answer is not None:
                return answer
            if path == INDEX and self._index is not None:
                return self._index.answer(method, query, headers)
            if path == "/live":
                return json_answer(200, {"status": "live", "uptime": self._uptime()})
            return self._health() if path == "/health" else NOT_FOUND
        except Exception:  # noqa: BLE001 - of whatever kind
            log_safely(logger, logging.ERROR, "cannot answer %r", target, exc_info=True)
            return FAILED

    def _health(self) -> Answer:
        endpoints, reason = self._states()
        state: dict[str, object] = {"status": "notready" if reason else "ready"}
        if reason:
            state["reason"] = reason
        state.update(uptime=self._uptime(), endpoints=endpoints)
        return json_answer(503 if reason else 200, state)

    def _states(self) -> tuple[dict[str, str], str]:
        """Return the state of each endpoint, and why the worker is not ready: "" if it is."""
        if self._endpoints is None:
            return {}, ""
        try:
            with host_signals():
                endpoints = {str(name): str(state) for name, state in dict(self._endpoints()).items()}
        except BaseException:  # noqa: BLE001 - it is the host's; CancelledError, SystemExit are no Exception
            log_safely(
                logger, logging.ERROR, "cannot tell the state of the worker's endpoints", exc_info=True
            )
            return {}, "the worker's state is not known"
        if not endpoints:
            return {}, "no endpoint has a model yet"
        waiting = [f"endpoint {name!r} is {state}" for name, state in endpoints.items() if state != "ready"]
        return endpoints, ", ".join(waiting)

    def _uptime(self) -> dict[str, int]:
        secs, fraction = divmod(self._clock() - self._started_at, 1)
        return {"secs": int(secs), "nanos": int(fraction * 1e9)}
