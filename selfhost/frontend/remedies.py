"""From an error of a fetch to its cause in few words, and to what an operator can do about it."""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

from ..card import url as urls
from ..card.checked_file import CheckedFile
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
from .transport import LOCAL_PATH

# Causes that no error has a class or a word for: whoever sees the bytes, the card and its URL knows them.
HTML, WRONG_SIZE, NO_SIZE, DRIFTED = "HTML page", "wrong size", "too large without a size", "moved on"
CARD_REFUSED, HUNG_UP = "card refused", "hung up"
NOT_OF_A_CARD, OF_A_FILE = "status 404, not a card's URL", "a file's URL"
OTHER_ORIGIN = "status 401, another origin"

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
unusable URL: write http(s)://host[:port]/path, without user name and password (tokens go by --token-file)
no HTTP: something else listens on this port: see that it is the worker's DYN_SYSTEM_PORT
encoded answer: something before the worker compresses its answers: turn that off for /v1/metadata
hub: see that this host reaches the Hugging Face hub, that the repository is public and has the file, or put
    that into the local hub cache (HF_HUB_CACHE)
hub not asked: put the file into the local hub cache (HF_HUB_CACHE), or allow the hub as well (--allow-hub,
    ask_hub=True)
no huggingface_hub: install it (pip install 'selfhost[hf]'), or put the file into the local hub cache
    (HF_HUB_CACHE)
no card: give the URL that `selfhost serve` prints, .../v1/metadata/<slug>/_base
a file's URL: add ?blake3=<hex digits of its checksum>, or give the URL of the card, .../<slug>/_base
card refused: frontends refuse such a model: have it published with fewer files, smaller ones, or other names
HTML page: a proxy or a login answers in the place of the worker: ask the worker itself
wrong size: the worker serves another file than its card says: have it publish its model again
too large without a size: have the model published by a worker whose cards say how large files are
wrong hash: the worker serves other bytes than its card says, or something changes them on the way: have it
    publish its model again, and see what is in between
moved on: the repository has changed since the card was made: have the model published again
status 401: give the token of this origin (--token-file, DYN_MDC_TOKENS_FILE), or renew it
status 401, another origin: the token goes to the origin of the card's URL alone, and the files are at
    another: give the card's URL there, or a line `ORIGIN TOKEN` for theirs (DYN_MDC_TOKENS_FILE)
status 403: see whether this origin wants a token (--token-file) or a client certificate (--cert)
status 404: nothing is registered there: the model was withdrawn, the worker was restarted (get a new card),
    or the URL is another (where the index is on, .../v1/metadata lists what is served)
status 404, not a card's URL: give the URL that `selfhost serve` prints, .../v1/metadata/<slug>/_base (where
    the index is on, .../v1/metadata lists what is served)
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


_ROUTE = re.compile(r".*/v1/metadata/[^/]+/[^/]+(/[^/]+)?")  # of a worker; with a file's name, or without


class Cause(NamedTuple):
    """Why something failed, in few words, and what can be done about it."""

    problem: str
    remedy: str

    @classmethod
    def named(cls, problem: str) -> Cause:
        """Return the cause with its remedy."""
        kind = re.sub("^(status [1-5])[0-9]{2}$", r"\1xx", problem)
        return cls(problem, REMEDIES.get(problem) or REMEDIES.get(kind) or OTHERWISE)


def cause_of(error: SelfHostError) -> Cause:
    """Return the cause of a failed fetch or verification, or of a card that is none."""
    return Cause.named(_problem_of(error))


def cause_of_card(error: SelfHostError, url: str, *, is_html: bool, is_read: bool) -> Cause:
    """Return why a card is not to be had; `url` "" for one that was given, `is_read` if it is one at all."""
    parsed = urls.parse(url)
    route = _ROUTE.fullmatch(parsed.path) if parsed is not None else None
    is_of_a_file = route is not None and route[1] is not None
    if isinstance(error, CardError) and (is_html or is_read or is_of_a_file):
        return Cause.named(HTML if is_html else CARD_REFUSED if is_read else OF_A_FILE)
    cause = cause_of(error)
    is_other = parsed is not None and (route is None or is_of_a_file)
    return Cause.named(NOT_OF_A_CARD) if is_other and cause.problem == "status 404" else cause


def cause_of_file(
    error: SelfHostError, file: CheckedFile, *, received: int, is_html: bool, may_drift: bool
) -> Cause:
    """Return why a file is not to be had, of which so many bytes came."""
    is_wrong, is_large = isinstance(error, VerificationError), isinstance(error, SizeLimitExceeded)
    if may_drift and (is_wrong or is_large):
        return Cause.named(DRIFTED)
    if is_wrong and is_html:
        return Cause.named(HTML)
    if is_large and file.size is None:
        return Cause.named(NO_SIZE)
    if is_wrong and file.size not in (None, received):
        return Cause.named(WRONG_SIZE)
    return cause_of(error)


def _problem_of(error: SelfHostError) -> str:
    if isinstance(error, FetchTimeout):
        return f"time-out, {error.phase}"
    if isinstance(error, TLSFailed):
        return f"tls, {error.problem}"
    if isinstance(error, FetchError) and error.problem:
        return error.problem
    if isinstance(error, HTTPStatusError):
        return f"status {error.status}"
    if isinstance(error, SchemeNotAllowed):
        return LOCAL_PATH if error.scheme in ("", "file") else "scheme not allowed"
    if isinstance(error, ConnectFailed):
        return "connection refused" if error.errno == errno.ECONNREFUSED else "cannot connect"
    for kind, problem in _BY_CLASS.items():
        if isinstance(error, kind):
            return problem
    is_cut = isinstance(error, FetchError) and error.is_transient
    return "connection broke" if is_cut else "unusable answer"
