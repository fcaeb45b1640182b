"""What a registry holds, as values: artifacts, the registrations that hold them, and who is told of both."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Optional, Protocol

from .answer import ROUTE, Fields, hit_fields, render_fields
from .content import Content
from .names import segment

if TYPE_CHECKING:
    from .registry import MetadataArtifactRegistry


class Artifact:
    """One registered file or card: its key, its pinned content and its URL below the server's root.

    `target` is the percent-encoded path that selects it, with a query only where another content held the
    plain URL when it came; `fields` are the header fields of its 200. Of two contents of one key the one with
    the smaller `serial` is older.
    """

    __slots__ = (
        "_fields", "_head", "content", "filename", "holders", "serial", "slug", "suffix", "target", "younger",
    )  # fmt: skip

    def __init__(
        self, slug: str, suffix: str, filename: str, content: Content, target: str, serial: int = 1
    ) -> None:
        self.slug = slug
        self.suffix = suffix
        self.filename = filename
        self.content = content
        self.target = target
        self.serial = serial
        self.holders = 0  # registrations that are not closed
        self.younger: tuple[Artifact, ...] = ()  # other contents of this key, if this one is the oldest
        self._fields: Optional[Fields] = None
        self._head: Optional[bytes] = None

    @property
    def is_plain(self) -> bool:
        """Whether its own URL has no query: nothing else had this key when it came."""
        return "?" not in self.target

    @property
    def fields(self) -> Fields:
        """The header fields of the 200, prepared once."""
        if self._fields is None:
            self._fields = hit_fields(self.filename, self.content)
        return self._fields

    @property
    def head(self) -> bytes:
        """The same fields as they stand on the wire, with the empty line that ends them."""
        if self._head is None:
            self._head = render_fields(self.fields) + b"\r\n"
        return self._head

    def __repr__(self) -> str:
        return f"<Artifact {self.target} {self.content.checksum} holders={self.holders}>"


class Row(NamedTuple):
    """One file of a registration, and where it stands: all that another registry needs to put it in alike."""

    filename: str
    content: Content
    serial: int = 0  # 0: registered now, so with what is there, or as the youngest
    is_plain: bool = False


class Registration:
    """What was registered together. Closing removes it, unless another registration shares it.

    `targets` maps each filename to its URL path (with query where needed), "" to a card's. A context manager;
    `close` may be called any number of times from any thread.
    """

    def __init__(
        self,
        id: str,
        slug: str,
        suffix: str,
        artifacts: tuple[Artifact, ...],
        registry: Optional[MetadataArtifactRegistry] = None,
    ) -> None:
        self.id = id  # no other registration of the registry has it, ever
        self.slug = slug
        self.suffix = suffix
        self._artifacts = artifacts
        self._registry = registry  # None in what a registry itself keeps: it must not keep itself alive

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What was registered, in the order given."""
        return self._artifacts

    @property
    def targets(self) -> Mapping[str, str]:
        """Map each filename to its URL path."""
        return MappingProxyType({artifact.filename: artifact.target for artifact in self._artifacts})

    @property
    def rows(self) -> list[Row]:
        """What `restore` of another registry needs."""
        return [Row(one.filename, one.content, one.serial, one.is_plain) for one in self._artifacts]

    def close(self) -> None:
        """Withdraw it all; harmless when repeated."""
        if self._registry is not None:
            self._registry.release(self)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self._registry is not None and self._registry.holds(self) else "closed"
        return f"<Registration {state} files={len(self._artifacts)}>"


class Follower(Protocol):
    """Told of every change, in order and under the registry's lock: only note it down, never block."""

    def added(self, registration: Registration) -> None:
        """Something was registered; its artifacts are those that now answer."""

    def removed(self, registration: Registration) -> None:
        """A registration was closed, withdrawn with its process, or had its model unregistered."""

    def settle(self) -> None:
        """Wait until what was noted is in force; called without the lock, before the change returns.

        Not for what other processes change in a shared registry: nobody here waits for that.
        """


def model_target(slug: str, suffix: str) -> str:
    """Return the URL path of a model; raise RegistrationError for a name that cannot be part of one."""
    return f"{ROUTE}{segment(slug, 'slug')}/{segment(suffix, 'suffix')}"
