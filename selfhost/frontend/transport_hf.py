"""HfTransport: `hf://repo[@revision]/file`, out of the local Hugging Face cache or from its hub.

`repo` is `name` or `org/name`: of three and more segments the first two are the repo, unless a revision ends
it before. A revision with slashes is percent-encoded (`refs%2Fpr%2F1`); without one it is `main`.

The local cache is read by its layout, without any package: `models--org--name/refs/<revision>` holds a
commit, `snapshots/<commit>/<file>` is the file or a link to it, which must stay in that repo's folder.
What is not there comes from the network by the optional package huggingface_hub, which puts it into the same
cache. It follows its own rules about endpoints, proxies and retries, and `total_seconds` does not bind it.

A branch moves on, in the hub and in the cache at different times: other bytes than the card's have drifted,
and a cached `main` hides a newer one. A card that names a commit has neither problem.
Any number of threads may share a transport.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Any, Callable, NamedTuple, Optional, Union
from urllib.parse import unquote

from ..card import url as urls
from ..errors import FetchError, HTTPStatusError, SizeLimitExceeded, shown
from ..settings import FrontendSettings
from .transport import FetchLimits, Sink
from .transport_file import PathLike, is_below, open_below, read_file

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
    def folder(self) -> str:
        """The name of the repo's folder in the cache."""
        return "--".join(("models", *self.repo.split("/")))


class HfTransport:
    """Fetches files of Hugging Face repos, from the local cache first.

    `hub_cache` is the cache's `hub` folder (None: what the environment says now); `network` allows to ask the
    hub; `token` is huggingface_hub's: a text, True for the one that is saved on this machine, False for none.
    """

    uses_network = False  # the cache needs none, and `network` decides over the rest
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
        folder = os.path.realpath(os.path.join(self._hub, file.folder)) if self._hub else None
        path = _find(folder, file) if folder else None
        if folder is None or path is None:
            path = os.path.realpath(self._download(url, file, min(max_bytes, self._limits.max_bytes)))
            folder = os.path.dirname(path)
        elif not is_below(path, folder):
            found = f"found a link to {shown(path)}"
            raise FetchError(
                f"cannot fetch {shown(url)}: expected a file in {shown(folder)}, {found}", url=url
            )
        read_file(folder, path, sink, url=url, max_bytes=max_bytes, limits=self._limits)

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def __repr__(self) -> str:
        return f"<HfTransport hub_cache={self._hub!r} network={self._network}>"

    # -------------------------------------------------------------- from the network

    def _download(self, url: str, file: HubFile, limit: int) -> str:
        """Have the package bring the file into the cache; return where it is."""
        hub = self._package(url)
        address = _ask(url, hub.hf_hub_url, file.repo, file.name, revision=file.revision)
        seconds = self._limits.read_seconds
        who: dict[str, Any] = {"token": self._token, "library_name": "selfhost"}
        found = _ask(url, hub.get_hf_file_metadata, address, timeout=seconds, **who)
        if found.size is not None and found.size > limit:  # before it fills the disk: the package has no cap
            raise SizeLimitExceeded(
                f"cannot fetch {shown(url)}: expected at most {limit} bytes, the hub announces {found.size}",
                url=url,
                limit=limit,
                received=found.size,
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
        return str(path)

    def _package(self, url: str) -> Any:
        """Return the module huggingface_hub, which nothing else here loads."""
        if not self._network:
            raise self._missing(url, "the network must not be asked")
        try:
            return importlib.import_module("huggingface_hub")
        except ImportError as err:
            hint = (
                f"the optional package huggingface_hub cannot be imported ({err}): pip install 'selfhost[hf]'"
            )
            raise self._missing(url, hint) from err

    def _missing(self, url: str, reason: str) -> FetchError:
        where = f"it is not in the local cache {self._hub!r}" if self._hub else "there is no local cache"
        return FetchError(f"cannot fetch {shown(url)}: {where}, and {reason}", url=url)


# ------------------------------------------------------------------ the local cache


def _find(folder: str, file: HubFile) -> Optional[str]:
    """Return the resolved path of a file in its repo's folder, None where it is not; any doubt is a miss."""
    commit = file.revision if _COMMIT.fullmatch(file.revision) else _commit_of(folder, file.revision)
    if commit is None:
        return None
    path = os.path.realpath(os.path.join(folder, "snapshots", commit, file.name))
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
    return FetchError(f"cannot fetch {shown(url)}: expected {_FORM} with names that the hub allows", url=url)


# ------------------------------------------------------------------ the package


def _ask(url: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the package; make a FetchError of whatever it raises."""
    try:
        return function(*arguments, **options)
    except Exception as err:  # its errors and those of its HTTP client have no common root
        lines = _QUERY.sub("?...", str(err)).strip().splitlines()
        reason = f"{type(err).__name__} {shown(lines[0]) if lines else ''}".strip()
        message = f"cannot fetch {shown(url)}: huggingface_hub says {reason}"
        status = getattr(getattr(err, "response", None), "status_code", None)
        if isinstance(status, int):
            transient = status in _TRANSIENT
            raise HTTPStatusError(message, url=url, status=status, is_transient=transient) from err
        raise FetchError(message, url=url) from err
