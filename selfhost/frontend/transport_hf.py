"""HfTransport: `hf://repo[@revision]/file`, from the Hugging Face hub or its local cache.

`repo` is `name` or `org/name`: of three and more segments the first two are the repo, unless a revision ends
it before. A revision with slashes is percent-encoded (`refs%2Fpr%2F1`); without one it is `main`.

The local cache is read by its layout, without any package: `models--org--name/refs/<revision>` holds a
commit, `snapshots/<commit>/<file>` is the file or a link to it, which must stay in that repo's folder.
The network is asked by the optional package huggingface_hub, which puts what it brings into the same cache.
It follows its own rules about endpoints, proxies and retries, and `total_seconds` does not bind it.

Any number of threads may share a transport.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import re
from typing import Any, Callable, NamedTuple, Optional, Union
from urllib.parse import unquote

from ..card import url as urls
from ..errors import FetchError, HTTPStatusError, SizeLimitExceeded, shown, shown_url
from ..settings import FrontendSettings
from .transport import BAD_URL, HUB, HUB_NOT_ASKED, NO_HUB_PACKAGE, FetchLimits, Sink
from .transport_file import PathLike, is_below, open_below, read_file

logger = logging.getLogger(__name__)

_FORM = "hf://repo[@revision]/file"
_MAX_NAME_BYTES = 255  # NAME_MAX
_TRANSIENT = frozenset((408, 429, 500, 502, 503, 504))

# As the hub has it: 1 to 96 of these, "-" and "." neither first nor last, never "--" or "..". So no two repos
# have one folder, and none has a parent's.
_REPO_PART = re.compile(r"(?!.*(?:--|\.\.))(?=.{1,96}\Z)[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_COMMIT = re.compile("[0-9a-f]{40}")
_FORBIDDEN = re.compile("[\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_QUERY = re.compile(r"\?\S*")  # of URLs in the package's messages: it may hold a signature

_LIMITS = FetchLimits()


class HubFile(NamedTuple):
    """What an hf: URL means; every part is checked, so that it may become part of a path."""

    repo: str  # "name" or "org/name"
    revision: str
    name: str  # "/" between folders

    @classmethod
    def parse(cls, url: str) -> HubFile:
        """Read an hf: URL, in the way in which cards hold it or not; raise FetchError."""
        scheme, _, rest = (urls.normalize(url) or url).partition("://")
        if scheme != "hf" or "?" in rest or "#" in rest:
            raise _malformed(url)
        first, *segments = rest.split("/")
        if len(segments) > 1 and "@" not in first:
            first = f"{first}/{segments.pop(0)}"
        repo, at_sign, revision = first.partition("@")
        file = cls(repo, _decoded(url, revision if at_sign else "main"), _decoded(url, "/".join(segments)))
        names = (*file.revision.split("/"), *file.name.split("/"))
        if not all(map(_REPO_PART.fullmatch, repo.split("/"))) or not all(map(_is_component, names)):
            raise _malformed(url)
        return file

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which always stands for the same bytes."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def folder(self) -> str:
        """The name of the repo's folder in the cache."""
        return "--".join(("models", *self.repo.split("/")))


class _Place(NamedTuple):
    """A file on this disk: its resolved path, and the folder that the path must not leave."""

    folder: str
    path: str


class HfTransport:
    """Fetches files of Hugging Face repos.

    `hub_cache` is the cache's `hub` folder (None: what the environment says now); `network` allows to ask the
    hub; `token` is huggingface_hub's: a text, True for the one that is saved on this machine, False for none.

    A commit never changes: it is looked up in the cache, and the hub is asked for what is not there. A branch
    or tag moves on, and a cached one may be old: the hub is asked which commit it is now, and a file of that
    commit is downloaded unless it is cached. Where the hub does not give the file, for whatever reason, it is
    brought as it was cached; a hub that is silent costs `read_seconds` before that. `network=False` and
    `offline()` bring what is cached, at once. Either may be what the card was made from, or have drifted from
    it: the card's checksum tells. A card that names a commit has no such doubt.
    """

    may_drift = True

    def __init__(
        self,
        hub_cache: Optional[PathLike] = None,
        *,
        network: bool = True,
        token: Union[bool, str] = False,
        limits: FetchLimits = _LIMITS,
    ) -> None:
        place = FrontendSettings.from_env().hf_hub_cache if hub_cache is None else os.fspath(hub_cache)
        self._hub = os.path.abspath(place) if place else None
        self._network = network
        self._token = token
        self._limits = limits

    def fetch(self, url: str, sink: Sink, *, max_bytes: int) -> None:
        """Bring the file; see Transport.fetch. No partial sink is continued."""
        file = HubFile.parse(url)
        folder, path = self._locate(url, file, min(max_bytes, self._limits.max_bytes))
        read_file(folder, path, sink, url=url, max_bytes=max_bytes, limits=self._limits)

    def offline(self) -> HfTransport:
        """Return a transport that has the same local cache alone."""
        if not self._network:
            return self
        local = copy.copy(self)
        local._network = False
        return local

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def __repr__(self) -> str:
        return f"<HfTransport hub_cache={self._hub!r} network={self._network}>"

    # -------------------------------------------------------------- cache and hub

    def _locate(self, url: str, file: HubFile, limit: int) -> _Place:
        """Return where the file is on this disk by now; raise FetchError."""
        cached = self._cached(url, file, file.revision)
        if cached is not None and (file.is_commit or not self._network):
            return cached
        if not self._network:
            where = f"it is not in the local cache {self._hub!r}" if self._hub else "there is no local cache"
            why = "offline, or under a peer policy without ask_hub=True or --allow-hub"
            raise _failure(url, f"{where}, and the hub must not be asked ({why})", HUB_NOT_ASKED)
        try:
            return self._from_hub(url, file, limit)
        except FetchError as err:
            if cached is None:
                raise
            logger.info("taking %r as it is cached, which may be old: %s", file.revision, err)
            return cached

    def _cached(self, url: str, file: HubFile, revision: str) -> Optional[_Place]:
        """Return where the file is in the cache, None where it is not; raise FetchError for a stray link."""
        if self._hub is None:
            return None
        folder = os.path.realpath(os.path.join(self._hub, file.folder))
        path = _find(folder, revision, file.name)
        if path is None:
            return None
        if not is_below(path, folder):
            raise _failure(url, f"expected a file in {shown(folder)}, found a link to {shown(path)}")
        return _Place(folder, path)

    def _from_hub(self, url: str, file: HubFile, limit: int) -> _Place:
        """Ask the hub what the file is now, and have the package bring it unless it is cached."""
        hub = self._package(url)
        address = _ask(url, hub.hf_hub_url, file.repo, file.name, revision=file.revision)
        who: dict[str, Any] = {"token": self._token, "library_name": "selfhost"}
        seconds = self._limits.read_seconds
        answer = _ask(url, hub.get_hf_file_metadata, address, timeout=seconds, **who)
        commit = str(getattr(answer, "commit_hash", None))
        cached = self._cached(url, file, commit) if _COMMIT.fullmatch(commit) else None
        if cached is not None:
            return cached
        if answer.size is not None and answer.size > limit:  # else it fills the disk: the package has no cap
            message = f"expected at most {limit} bytes, the hub announces {answer.size}"
            raise SizeLimitExceeded(
                f"cannot fetch {shown_url(url)}: {message}", url=url, limit=limit, received=answer.size
            )
        path = _ask(
            url,
            hub.hf_hub_download,
            file.repo,
            file.name,
            revision=file.revision,
            cache_dir=self._hub,
            etag_timeout=seconds,
            **who,
        )
        path = os.path.realpath(path)
        return _Place(os.path.dirname(path), path)

    def _package(self, url: str) -> Any:
        """Return the module huggingface_hub, which nothing else here loads."""
        try:
            return importlib.import_module("huggingface_hub")
        except ImportError as err:
            where = repr(self._hub) if self._hub else "(there is none)"
            raise _failure(
                url,
                f"what is not in the local cache {where} takes the optional package huggingface_hub, "
                f"which cannot be imported ({err}): pip install 'selfhost[hf]'",
                NO_HUB_PACKAGE,
            ) from err


# ------------------------------------------------------------------ the local cache


def _find(folder: str, revision: str, name: str) -> Optional[str]:
    """Return the resolved path of a file in its repo's folder, None where it is not; any doubt is a miss."""
    commit = revision if _COMMIT.fullmatch(revision) else _commit_of(folder, revision)
    if commit is None:
        return None
    path = os.path.realpath(os.path.join(folder, "snapshots", commit, name))
    return path if os.path.exists(path) else None


def _commit_of(folder: str, revision: str) -> Optional[str]:
    """Return the commit that a branch or tag stood for when it was cached."""
    try:
        fd = open_below(folder, os.path.join(folder, "refs", revision))
    except OSError:
        return None
    try:
        text = os.read(fd, 64).decode("ascii", "replace").strip()
    finally:
        os.close(fd)
    return text if _COMMIT.fullmatch(text) else None


# ------------------------------------------------------------------ names


def _decoded(url: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _malformed(url) from None


def _is_component(name: str) -> bool:
    """Whether this is one component of a path, and stays one."""
    if name in ("", ".", "..") or _FORBIDDEN.search(name):
        return False
    return len(name.encode()) <= _MAX_NAME_BYTES


def _malformed(url: str) -> FetchError:
    return _failure(url, f"expected {_FORM} with names that the hub allows", BAD_URL)


def _failure(url: str, reason: str, problem: str = HUB) -> FetchError:
    return FetchError(f"cannot fetch {shown_url(url)}: {reason}", url=url, problem=problem)


# ------------------------------------------------------------------ the package


def _ask(url: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the package; make a FetchError of whatever it raises."""
    try:
        return function(*arguments, **options)
    except Exception as err:  # its errors and those of its HTTP client have no common root
        lines = _QUERY.sub("?...", str(err)).strip().splitlines()
        reason = f"{type(err).__name__} {shown(lines[0]) if lines else ''}".strip()
        message = f"cannot fetch {shown_url(url)}: huggingface_hub says {reason}"
        status = getattr(getattr(err, "response", None), "status_code", None)
        if isinstance(status, int):
            transient = status in _TRANSIENT
            raise HTTPStatusError(
                message, url=url, status=status, is_transient=transient, problem=HUB
            ) from err
        raise FetchError(message, url=url, problem=HUB) from err
