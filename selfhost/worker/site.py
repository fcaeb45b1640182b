"""Site: everything that one server answers, as a function from a request to an answer.

/v1/metadata/..., /health and /live. Never raises, never waits. Sharing: any number of threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Callable, Optional

from .answer import FAILED, NOT_FOUND, Answer, Headers, answer_hit, find, json_answer, split_target
from .registry import MetadataArtifactRegistry

logger = logging.getLogger(__name__)

EndpointStates = Callable[[], Mapping[str, str]]  # by name; an endpoint that serves is "ready"


class Site:
    """What is registered, and how the host is.

    `endpoints` is asked at each /health for the state of each endpoint: the answer is 200 if there is one
    and all are "ready", else 503; without it always 200, as /live is.
    """

    def __init__(
        self,
        registry: MetadataArtifactRegistry,
        *,
        endpoints: Optional[EndpointStates] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry
        self._endpoints = endpoints
        self._clock = clock
        self._started_at = clock()

    def answer(self, method: str, target: str, headers: Headers) -> Answer:
        """Answer GET or HEAD for an origin-form target as it was sent."""
        try:
            path, query = split_target(target)
            artifact = find(self.registry, path, query)
            if artifact is not None:
                return answer_hit(method, artifact, headers)
            if path == "/live":
                return json_answer(200, {"status": "live", "uptime": self._uptime()})
            return self._health() if path == "/health" else NOT_FOUND
        except (Exception, SystemExit):  # of the host's `endpoints`, say
            logger.exception("cannot answer %r", target)
            return FAILED

    def _health(self) -> Answer:
        endpoints = {} if self._endpoints is None else dict(self._endpoints())
        ready = self._endpoints is None or set(endpoints.values()) == {"ready"}
        status = "ready" if ready else "notready"
        state = {"status": status, "uptime": self._uptime(), "endpoints": endpoints}
        return json_answer(200 if ready else 503, state)

    def _uptime(self) -> dict[str, int]:
        secs, fraction = divmod(self._clock() - self._started_at, 1)
        return {"secs": int(secs), "nanos": int(fraction * 1e9)}
