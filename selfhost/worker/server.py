"""SystemStatusServer: /v1/metadata, /health and /live from one event-loop thread inside a worker's process.

No general server: GET and HEAD on known routes; anything else is refused and the connection closed. One
thread, however many clients: each waits in the loop, not in a thread of its own, so a silent, slow or
hostile one delays nobody. A small answer is prepared once per file and leaves in a single send, a large one
by sendfile from a sealed file in memory (read and send where the system has neither). The same loop can run
in a small process of its own instead, for a host that hogs the interpreter: see process.py.

The thread is a daemon that an atexit hook closes and joins: the interpreter joins other threads before any
atexit hook runs, so nothing could tell a non-daemon thread to end. No exception in it reaches the host.

Sharing: `start` and `close` from any thread. A forked child has no running server: its copies of the
sockets are closed in the child, which may start a server of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import socket
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Optional, Union

from ..errors import SettingsError, StatusServerError
from ..settings import ServerLimits
from .access import Access
from .counters import ServerCounters
from .event_loop import EventLoop
from .registry import MetadataArtifactRegistry
from .site import EndpointStates, Site
from .tls import TlsFiles

if TYPE_CHECKING:
    from .process import ServerProcess

    Serving = Union[EventLoop, ServerProcess]

logger = logging.getLogger(__name__)

BACKLOG = 512  # connections that the kernel keeps for us while we are busy
# What the kernel holds of an answer that it cannot send yet. Its own limit is 4 MB and more for each slow
# client, who then takes bytes for long before the socket becomes writable, and would look stalled.
UNSENT_BYTES = 128 * 1024


class SystemStatusServer:
    """The embedded HTTP server of one process; any number of models share it through their registry.

    `endpoints` is asked at each /health for the state of each endpoint, by name: the answer is 200 if there
    is one and all are "ready", else 503; without it always 200, as /live is. It is called on the server's
    thread and must not wait, for a lock of an engine at work say: all clients wait with it, /live included.
    Nothing is opened before `start`, which raises StatusServerError if the address cannot be bound.

    `isolation` is "thread", or "process" for a host that hogs the interpreter: a small process of its own
    (see process.py), told of the endpoints' states once a second and at `states_changed`: there `endpoints`
    may take its time. `access` None lets everybody see metadata; `index` lists it at /v1/metadata. Raises
    SettingsError for another isolation.
    """

    def __init__(
        self,
        registry: MetadataArtifactRegistry,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        limits: Optional[ServerLimits] = None,
        endpoints: Optional[EndpointStates] = None,
        isolation: str = "thread",
        tls: Optional[TlsFiles] = None,
        access: Optional[Access] = None,
        index: bool = False,
    ) -> None:
        self.registry = registry
        self.limits = limits or ServerLimits()
        if isolation not in ("thread", "process"):
            accepted = "thread or process"
            message = f"isolation is {isolation!r}, expected {accepted}"
            raise SettingsError(message, variable="DYN_SYSTEM_ISOLATION", value=isolation, accepted=accepted)
        self.isolation = isolation
        self._requested = (host, port)
        self._endpoints = endpoints
        self._tls = tls
        self._access = access
        self._index = index
        self._state_lock = threading.RLock()  # start and close, not the loop
        self._loop: Optional[Serving] = None

    # -------------------------------------------------------------- life

    def start(self) -> SystemStatusServer:
        """Bind, listen and serve; return self. Harmless when already running.

        Raises StatusServerError, in the caller's thread, if the address is taken or is none of this host,
        if the process has no thread or descriptor left, or if a process of its own cannot be launched;
        SettingsError for certificates that cannot be used.
        """
        with self._state_lock:
            if self._loop is None:
                self._loop = self._start_loop(_listen(*self._requested))
                logger.info("status server listens on %s", self.address)
        return self

    def close(self, timeout: float = 5.0) -> None:
        """Stop listening, let answers on their way finish for up to `timeout` seconds, then cut them off.

        Harmless when repeated or never started; `start` may follow.
        """
        with self._state_lock:
            loop, self._loop = self._loop, None
            if loop is not None:
                try:
                    loop.stop(timeout)
                finally:
                    _serving.pop(loop, None)
                    if isinstance(loop, EventLoop):
                        loop.free_port()

    def __enter__(self) -> SystemStatusServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------- what it is

    @property
    def is_running(self) -> bool:
        """Whether the server listens in this process."""
        return self._loop is not None

    @property
    def host(self) -> str:
        """The bound IP address (the requested host while not running)."""
        loop = self._loop
        return loop.bound[0] if loop else self._requested[0]

    @property
    def port(self) -> int:
        """The bound port: the real one where 0 was requested."""
        loop = self._loop
        return loop.bound[1] if loop else self._requested[1]

    @property
    def address(self) -> str:
        """Host and port as in a URL."""
        return _url_host(self.host, self.port)

    @property
    def scheme(self) -> str:
        """What its URLs begin with: http, or https where it has a certificate."""
        return "http" if self._tls is None else "https"

    def states_changed(self) -> None:
        """Say that the state of an endpoint has changed: /health tells the new one from now on."""
        loop = self._loop
        if loop is not None and not isinstance(loop, EventLoop):
            loop.states_changed()

    def counters(self) -> ServerCounters:
        """Return what the server has done since it started; of a process, since that was launched."""
        loop = self._loop
        return loop.counters if loop else ServerCounters()

    @property
    def open_connections(self) -> int:
        """How many clients are connected."""
        return self.counters().open_connections

    def __repr__(self) -> str:
        return f"<SystemStatusServer {self.address} {'running' if self.is_running else 'stopped'}>"

    def _start_loop(self, listener: socket.socket) -> Serving:
        loop: Optional[Serving] = None
        try:
            loop = self._make_loop(listener)
            _install_hooks()
            _serving[loop] = self
            loop.start()
            return loop
        except BaseException as error:
            listener.close()
            if loop is not None:
                _serving.pop(loop, None)
                loop.close_descriptors()
            if not isinstance(error, (OSError, RuntimeError, StatusServerError)):
                raise
            limits = "; the process is at its limit of threads, descriptors or memory (ulimit -a)"
            why = f"{error}{'' if isinstance(error, StatusServerError) else limits}"
            address = _url_host(*self._requested)
            message = f"the status server cannot run on {address}: {why}"
            raise StatusServerError(message, address=address) from error

    def _make_loop(self, listener: socket.socket) -> Serving:
        if self.isolation == "process":
            from .process import ServerProcess

            if self._tls is not None:
                self._tls.check()
            return ServerProcess(self.registry, listener, self._options, self._endpoints)
        site = Site(self.registry, endpoints=self._endpoints, access=self._access, index=self._index)
        return EventLoop(site, listener, self.limits, self._tls)

    def _options(self) -> dict[str, Any]:
        """Return what the process of its own is to know, as plain values."""
        return {
            "limits": asdict(self.limits),
            "tls": None if self._tls is None else asdict(self._tls),
            "token": None if self._access is None else self._access.token,
            "token_file": None if self._access is None else self._access.token_file,
            "index": self._index,
        }

    def _abandon(self) -> None:
        """In a forked child: forget what the parent runs."""
        self._state_lock = threading.RLock()
        self._loop = None


def _url_host(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    address = _url_host(host, port)
    failure: OSError = OSError(errno.EADDRNOTAVAIL, "no address found")
    try:
        if not 0 <= port <= 65535:  # the C library would take it modulo 65536
            raise OverflowError("the port is not one of 0 to 65535")
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, sockaddr in found:
            try:
                return _bind(socket.socket(family, kind, protocol), sockaddr)
            except OSError as error:  # a name may have addresses of a family that this kernel lacks
                failure = error
    except (OSError, OverflowError, UnicodeError) as error:
        failure = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
    raise StatusServerError(
        f"the status server cannot listen on {address}: {failure.strerror or failure}; "
        "choose another with --host or DYN_SYSTEM_HOST, --port or DYN_SYSTEM_PORT (0 takes any free port)",
        address=address,
    ) from failure


def _bind(listener: socket.socket, sockaddr: object) -> socket.socket:
    try:
        if os.name == "posix":  # elsewhere the option lets two processes share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] serves IPv4 clients too
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit both
        with contextlib.suppress(AttributeError, OSError):  # not every system and sandbox has it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        listener.bind(sockaddr)  # type: ignore[arg-type]
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


# ------------------------------------------------------------------ exits and forks

_serving: dict[Serving, SystemStatusServer] = {}  # also what starts or ends just now: it has descriptors


@functools.cache
def _install_hooks() -> None:
    atexit.register(_close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_abandon_all)


def _close_all() -> None:
    for server in list(_serving.values()):
        server.close(timeout=1.0)


def _abandon_all() -> None:
    while _serving:
        loop, server = _serving.popitem()
        loop.close_descriptors()
        server._abandon()
