"""From an error of a fetch to its cause in few words, and to what an operator can do about it."""

from __future__ import annotations

import errno
from typing import NamedTuple

from ..errors import (
    CardError,
    ConnectFailed,
    FetchError,
    FetchTimeout,
    HostNotFound,
    HTTPStatusError,
    PeerNotAllowed,
    SchemeNotAllowed,
    SelfHostError,
    SizeLimitExceeded,
    TLSFailed,
    VerificationError,
)

# Causes that no error has a class for: whoever sees the bytes and the card knows them.
HTML, WRONG_SIZE, NO_SIZE, DRIFTED = "HTML page", "wrong size", "too large without a size", "moved on"
CARD_REFUSED, HUNG_UP = "card refused", "hung up"

_TABLE = """
host not found: see that this host can resolve the name, and that it is the one that the worker should
    publish (DYN_SYSTEM_ADVERTISE_URL)
connection refused: see that the worker runs, that the port is its DYN_SYSTEM_PORT, and that it listens on
    more than loopback (DYN_SYSTEM_HOST)
cannot connect: see that there is a route from this host to the address that the worker publishes
    (DYN_SYSTEM_ADVERTISE_URL)
time-out, connect: something drops the packets: see firewalls and network policies, and that this host can
    reach the address that the worker publishes (DYN_SYSTEM_ADVERTISE_URL)
time-out, tls: the port takes connections and does not speak TLS: see whether the URL should begin with
    http://, and whether the worker is stuck
time-out, headers: the port takes connections and does not answer: see whether the worker is stuck or
    starved (DYN_SYSTEM_ISOLATION=process helps), and whether something else listens there
time-out, body: the answer began and stalled: see the load of the worker, and the network between
time-out, total: it takes longer than a frontend waits: see the network between
hung up: the other side took the request and closed: it may speak TLS (use https://), be overloaded or about
    to end: see its log
connection broke: the worker, or something before it, cut the answer off: see their logs, restarts and
    limits
peer policy: allow the address if it is one to be talked to (--allow, peer_policy=)
scheme not allowed: have the model published with http(s) URLs
local path: the worker published paths of its own disk: have it serve its metadata (DYN_SELF_HOST_METADATA=1
    and DYN_SYSTEM_PORT), or allow the folder if this host has it, too (--file-root)
no card: give the URL that `selfhost serve` prints, .../v1/metadata/<slug>/_base
card refused: frontends refuse such a model: have it published with fewer files, smaller ones, or other names
HTML page: a proxy or a login answers in the place of the worker: ask the worker itself
wrong size: the worker serves another file than its card says: have it publish its model again
too large without a size: have the model published by a worker whose cards say how large files are
wrong hash: the worker serves other bytes than its card says, or something changes them on the way: have it
    publish its model again, and see what is in between
moved on: the repository has changed since the card was made: have the model published again
status 401: give the token of this origin (--token-file, DYN_MDC_TOKENS_FILE), or renew it
status 403: see whether this origin wants a token (--token-file) or a client certificate (--cert)
status 404: nothing is registered there: the model was withdrawn, or the worker was restarted; get a new
    card
status 3xx: redirects are not followed: use the URL that this one leads to
status 4xx: see what answers there: it is no worker that knows this URL
status 5xx: the worker, or a proxy before it, is overloaded or about to end: see its log; a frontend asks
    again
tls, expired: have the worker's certificate renewed, and see that the clock of this host is right
tls, not yet valid: see that the clocks of both hosts are right
tls, wrong host: have a certificate made for the host or address in the URL, or use a URL that the
    certificate is for
tls, unknown authority: trust the authority that issued the certificate (--ca, DYN_MDC_TLS_CA), and see that
    the worker sends the whole chain
tls, bad certificate: have the worker's certificate issued anew
tls, client certificate wanted: show one (--cert and --key, DYN_MDC_TLS_CERT and DYN_MDC_TLS_KEY)
tls, client certificate refused: show one that is valid, of an authority that the worker trusts
    (DYN_SYSTEM_TLS_CLIENT_CA there)
tls, no TLS: the other side speaks plain HTTP: use http://, or give the worker a certificate
    (DYN_SYSTEM_TLS_CERT)
tls, TLS wanted: the other side speaks TLS: use https://
tls, no common TLS version: the other side has neither TLS 1.2 nor 1.3: update it
tls, handshake refused: the other side wants a client certificate (--cert), or has no cipher in common with
    us
tls, broken off: the other side hung up: it may speak plain HTTP, or want a client certificate (--cert)
"""
REMEDIES = dict(line.split(": ", 1) for line in _TABLE.strip().replace("\n    ", " ").splitlines())
OTHERWISE = "see that what listens there is a worker, and that nothing changes its answers on the way"

_BY_CLASS = {
    HostNotFound: "host not found",
    PeerNotAllowed: "peer policy",
    SizeLimitExceeded: WRONG_SIZE,
    VerificationError: "wrong hash",
    CardError: "no card",
}


class Cause(NamedTuple):
    """Why something failed, in few words, and what can be done about it."""

    problem: str
    remedy: str

    @classmethod
    def named(cls, problem: str) -> Cause:
        """Return the cause with its remedy."""
        return cls(problem, REMEDIES.get(problem, OTHERWISE))


def cause_of(error: SelfHostError) -> Cause:
    """Return the cause of a failed fetch or verification, or of a card that is none."""
    return Cause.named(_problem_of(error))


def _problem_of(error: SelfHostError) -> str:
    if isinstance(error, FetchTimeout):
        return f"time-out, {error.phase}"
    if isinstance(error, TLSFailed):
        return f"tls, {error.problem}"
    if isinstance(error, HTTPStatusError):
        exact = f"status {error.status}"
        return exact if exact in REMEDIES else f"status {error.status // 100}xx"
    if isinstance(error, SchemeNotAllowed):
        return "scheme not allowed" if error.scheme else "local path"
    if isinstance(error, ConnectFailed):
        return "connection refused" if error.errno == errno.ECONNREFUSED else "cannot connect"
    for kind, problem in _BY_CLASS.items():
        if isinstance(error, kind):
            return problem
    is_cut = isinstance(error, FetchError) and error.is_transient
    return "connection broke" if is_cut else "unusable answer"
