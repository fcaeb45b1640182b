"""diagnose: fetch and verify a card and its files as a frontend would, and say why if that fails.

It goes through the transports of a resolver, under its limits and policies, but asks each source of each file
once, whatever failed before; only an origin that let a request time out is left alone from then on. What
comes is hashed and forgotten: no cache is used and nothing is written.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from ..card import url as urls
from ..card.checked_file import CheckedFile
from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
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
    TLSFailed,
    VerificationError,
    shown_url,
    without_userinfo,
)
from .card_source import fetch_text, parse_card
from .findings import Diagnosis, FileVerdict, Step
from .hashing_sink import HashingSink
from .http_tls import BROKEN_OFF
from .limits import ResolverLimits
from .remedies import HUNG_UP, OTHER_ORIGIN, Cause, cause_of_card, cause_of_file
from .transport import BAD_URL, FetchObserver, Transport, origin_of, transport_for
from .transports import default_transports
from .wanted import wanted_by
from .watched_sink import looks_like_html

if TYPE_CHECKING:
    import ssl

    from .http_connection import Answer

__all__ = ["Diagnosis", "FileVerdict", "Step", "diagnose"]

SOON_DAYS = 30  # a certificate that expires within these is worth a notice
SLOW_BYTES_PER_SECOND = 1_000_000
MIN_RATE_BYTES = 256 << 10  # less than this says nothing about a rate

_NAMED_CHECKSUM = re.compile(r"blake3=([0-9a-f]{64})")  # the query of the URLs that workers publish
_PHASES = {"connect": "connect", "tls": "tls", "headers": "answer"}


def diagnose(
    source: Union[str, bytes, ModelDeploymentCard],
    *,
    limits: Optional[ResolverLimits] = None,
    tell: Callable[[Step], None] = lambda step: None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    **options: Any,
) -> Diagnosis:
    """Examine a card (its URL, its text or itself), or one file by the URL that a worker published for it.

    `options` are those of `default_transports`. Each step is told when it is done. Nothing that is found
    raises an error; a setting that cannot be used does (SettingsError).
    """
    limits = limits or ResolverLimits()
    examination = _Examination(limits, tell, clock, wall_clock)
    transports = default_transports(limits=limits.fetch, observer=examination, **options)
    try:
        return examination.run(source, transports)
    finally:
        for transport in transports.values():
            transport.close()


class _Examination(FetchObserver):
    """One diagnosis while it is made."""

    def __init__(
        self,
        limits: ResolverLimits,
        tell: Callable[[Step], None],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._tell = tell
        self._clock = clock
        self._wall_clock = wall_clock
        self._steps: list[Step] = []
        self._files: list[FileVerdict] = []
        self._notices: dict[str, None] = {}
        self._silent: dict[str, Step] = {}  # by origin: at which step it let a request time out
        self._card_url, self._subject, self._url, self._is_answered = "", "", "", False
        self._had_token: set[str] = set()  # the origins that were sent one
        self._began = self._since = 0.0

    def run(
        self, source: Union[str, bytes, ModelDeploymentCard], transports: Mapping[str, Transport]
    ) -> Diagnosis:
        """Examine what `source` stands for."""
        for name, file in self._files_of(source, transports):
            self._examine(name, file, transports)
        self._notice_rates()
        return Diagnosis(tuple(self._steps), tuple(self._files), tuple(self._notices))

    # -------------------------------------------------------------- the card

    def _files_of(
        self, source: Union[str, bytes, ModelDeploymentCard], transports: Mapping[str, Transport]
    ) -> list[tuple[str, CheckedFile]]:
        """Return the files to be examined by name; none, after a failed step, if there is no card."""
        file = _file_at(source) if isinstance(source, str) else None
        if file is not None:
            return [(file.basename or "file", file)]
        self._card_url = source if isinstance(source, str) else ""
        self._begin("card", self._card_url)
        text = source if isinstance(source, bytes) else b""
        card = source if isinstance(source, ModelDeploymentCard) else None
        try:
            if isinstance(source, str):
                text = fetch_text(source, transports)
            card = card or parse_card(text, "this")
            wanted = wanted_by(card, self._limits)
        except (FetchError, CardError) as error:
            is_html, is_read = looks_like_html(text), card is not None
            self._fail(error, cause_of_card(error, self._card_url, is_html=is_html, is_read=is_read))
            return []
        files = list(dict.fromkeys(zip(wanted.names, (file for file, _ in card.iter_metadata_files()))))
        self._done("content", f"{card.display_name!r}, mdcsum {card.mdcsum}, {len(files)} files")
        self._notice_addresses([file for _, file in files])
        return files

    def _notice_addresses(self, files: list[CheckedFile]) -> None:
        """Notice what makes a card work here and not elsewhere, or not tell enough."""
        origins = dict.fromkeys(origin_of(file.path) for file in files if file.url is not None)
        for origin in origins:
            if _is_loopback(origin):
                self._notice(f"{origin} is published: only this host reaches that (DYN_SYSTEM_ADVERTISE_URL)")
            if self._card_url and origin != origin_of(self._card_url):
                self._notice(f"{origin} is published for the files: that is not where the card is from")
        unsized = sum(file.size is None for file in files)
        if unsized:
            most = self._limits.fetch.max_unsized_bytes
            self._notice(f"the card has no size for {unsized} files: up to {most} bytes of each are taken")

    # -------------------------------------------------------------- a file

    def _examine(self, name: str, file: CheckedFile, transports: Mapping[str, Transport]) -> None:
        self._begin(name, file.path)
        sink = HashingSink()
        silent = self._silent.get(origin_of(file.path))
        problem = self._fetch(file, sink, transports) if silent is None else self._pass_over(silent)
        seconds = self._clock() - self._began
        url, size = without_userinfo(file.path), file.size
        self._files.append(FileVerdict(name, url, str(file.checksum), size, sink.received, seconds, problem))

    def _fetch(self, file: CheckedFile, sink: HashingSink, transports: Mapping[str, Transport]) -> str:
        """Fetch and verify; return the problem, "" if there is none."""
        may_drift = False
        try:
            transport = transport_for(transports, file.path)
            may_drift = transport.may_drift
            transport.fetch(file.path, sink, max_bytes=self._limits.fetch.cap(file.size))
            sink.verify(file)
            self._done("content", f"{sink.received} bytes{self._rate(sink.received)}, {file.checksum}")
        except (FetchError, VerificationError) as error:
            received, is_html = sink.received, sink.looks_like_html
            cause = self._fail(
                error, cause_of_file(error, file, received=received, is_html=is_html, may_drift=may_drift)
            )
            if isinstance(error, FetchTimeout) and not self._is_answered:
                self._silent[origin_of(file.path)] = self._steps[-1]
            return cause.problem
        return ""

    def _pass_over(self, silent: Step) -> str:
        """Note that an origin is not asked again: with many files each time-out would be waited for."""
        detail = f"{origin_of(self._url)} timed out for {silent.subject!r} and is not asked again"
        self._add(silent.name, detail, Cause(silent.problem, silent.remedy))
        return silent.problem

    def _rate(self, received: int) -> str:
        seconds = self._clock() - self._since
        return f" at {received / seconds / 1e6:.1f} MB/s" if received >= MIN_RATE_BYTES and seconds else ""

    def _notice_rates(self) -> None:
        by_origin: dict[str, list[FileVerdict]] = {}
        for file in self._files:
            by_origin.setdefault(origin_of(file.url), []).append(file)
        for origin, files in by_origin.items():
            received, seconds = sum(file.received for file in files), sum(file.seconds for file in files)
            if received >= MIN_RATE_BYTES and received < SLOW_BYTES_PER_SECOND * seconds:
                self._notice(f"{origin} is slow: {received / seconds / 1e6:.2f} MB/s")

    # -------------------------------------------------------------- what the transports tell

    def dialing(self) -> None:
        """Begin to measure: what was loaded and read until now says nothing about the origin."""
        self._began = self._since = self._clock()

    def resolved(self, host: str, addresses: Sequence[str]) -> None:
        """Note the addresses, unless the URL has one itself."""
        if list(addresses) != [host]:
            self._done("name", f"{host!r} is {', '.join(dict.fromkeys(addresses))}")

    def connected(self, address: str, port: int) -> None:
        """Note the one that took the connection."""
        self._done("connect", f"{address} port {port}")

    def secured(self, sock: ssl.SSLSocket) -> None:
        """Note the version of TLS, and how long the certificate is valid."""
        import ssl

        expires = (sock.getpeercert() or {}).get("notAfter")
        if not isinstance(expires, str):
            self._done("tls", f"{sock.version()}")
            return
        days = int((ssl.cert_time_to_seconds(expires) - self._wall_clock()) // 86400)
        self._done("tls", f"{sock.version()}, the certificate expires in {days} days")
        if days < SOON_DAYS:
            self._notice(f"the certificate of {origin_of(self._url)} expires in {days} days")

    def answered(self, answer: Answer) -> None:
        """Note what is in the header."""
        self._is_answered = True
        if answer.has_token:
            self._note_token(origin_of(self._url))
        if answer.status != 200:
            return
        if self._subject == "card":
            length, kind = answer.field("Content-Length"), answer.field("Content-Type")
            self._done("answer", f"status 200, {length or 'any number of'} bytes of type {kind!r}")
        elif answer.field("Accept-Ranges") != "bytes":
            self._notice(f"{origin_of(self._url)} offers no ranges: what breaks off is fetched anew")

    def _note_token(self, origin: str) -> None:
        self._had_token.add(origin)
        if origin.startswith("http:"):
            self._notice(f"the token was sent to {origin} in the clear: who can listen on the way has it")

    # -------------------------------------------------------------- notes

    def _begin(self, subject: str, url: str) -> None:
        self._subject, self._is_answered = subject, False
        self._url, self._shown = without_userinfo(url), shown_url(urls.normalize(url) or url)
        self._began = self._since = self._clock()

    def _done(self, name: str, detail: str) -> None:
        self._add(name, detail, Cause("", ""))

    def _fail(self, error: SelfHostError, cause: Cause) -> Cause:
        detail = " ".join(str(error).split())
        if self._subject == "card":  # whose URL is on everybody's mind
            detail = detail.replace(f"cannot fetch {self._shown}: ", "", 1)
        elif self._shown not in detail:
            detail = f"{self._shown}: {detail}"
        step = self._step_of(error)
        if step == "answer" and cause.problem == "connection broke":
            is_tls = self._url.lower().startswith("https:")  # TLS 1.3 refuses clients after the handshake
            cause = Cause.named(f"tls, {BROKEN_OFF}" if is_tls else HUNG_UP)
        if cause.problem == "status 401" and self._is_token_elsewhere():
            cause = Cause.named(OTHER_ORIGIN)
        self._add(step, detail, cause)
        return cause

    def _add(self, name: str, detail: str, cause: Cause) -> None:
        now = self._clock()
        step = Step(self._subject, name, now - self._since, detail, *cause)
        self._since = now
        self._steps.append(step)
        self._tell(step)

    def _is_token_elsewhere(self) -> bool:
        """Tell whether the card's origin was sent a token, and this one none."""
        return origin_of(self._card_url) in self._had_token and origin_of(self._url) not in self._had_token

    def _step_of(self, error: SelfHostError) -> str:
        """Return in which step the error came."""
        if isinstance(error, SchemeNotAllowed) or getattr(error, "problem", "") == BAD_URL:
            return "url"
        if isinstance(error, HostNotFound):
            return "name"
        if isinstance(error, (ConnectFailed, PeerNotAllowed)):
            return "connect"
        if isinstance(error, TLSFailed):
            return "tls"
        if isinstance(error, FetchTimeout) and error.phase in _PHASES:
            return _PHASES[error.phase]
        is_early = isinstance(error, FetchError) and not self._is_answered
        return "answer" if is_early or isinstance(error, HTTPStatusError) else "content"

    def _notice(self, text: str) -> None:
        self._notices[text] = None


def _file_at(url: str) -> Optional[CheckedFile]:
    """Return the file whose checksum a worker put into its URL; None for any other URL."""
    parsed = urls.parse(url)
    named = _NAMED_CHECKSUM.fullmatch(parsed.query or "") if parsed is not None else None
    return CheckedFile(str(parsed), Checksum(named[1])) if named is not None else None


def _is_loopback(origin: str) -> bool:
    parsed = urls.parse(origin)
    host = "" if parsed is None or parsed.host is None else parsed.host.strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
