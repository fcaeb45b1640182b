"""A model of this process: loaded from its directory, served by this worker, published to frontends.

`attach` pins and registers the files, rewrites the card's local paths to this worker's URLs, serves the card,
and publishes it last; a failure at any step undoes the earlier ones. `detach` withdraws the card first, then
the routes. Without self-hosting the card keeps its local paths and has no extra files, as Dynamo's does.

Sharing: any number of threads; attach and detach of one model exclude each other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Optional

from ..card.checked_file import CheckedFile
from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from ..card.model_dir import load_card
from ..discovery.base import Bucket, Publication, RecordKey, model_record
from ..errors import RegistrationError
from .answer import CARD
from .card_fields import PathLike
from .content import MAX_PINNED_BYTES, Content, pin_file
from .endpoint import Endpoint
from .registry import BASE_SUFFIX, Artifact, MetadataArtifactRegistry, Registration
from .runtime import DistributedRuntime
from .self_check import can_fetch
from .served_names import choose_names, local_files, without_local_extras, without_unservable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedFile:
    """One file that this worker serves; `size` in bytes."""

    filename: str
    url: str
    size: int
    checksum: Checksum


def _served(artifact: Artifact, base_url: str) -> ServedFile:
    content = artifact.content
    return ServedFile(artifact.filename, base_url + artifact.target, content.size, content.checksum)


class LocalModel:
    """A card and, where this worker serves its files, their pinned content; a context manager that detaches.

    `card` says what is published: with URLs while attached and self-hosted, with local paths otherwise.
    `contents` holds what was pinned by local path: while attached, the very objects that the registry shares
    among all models of the process. `detach` lets them go; attaching again then reads the files anew, as it
    does for content that a shared registry has deleted, and is refused if they are no longer what the card
    says. A forked child may attach what its parent loaded.
    """

    def __init__(
        self, card: ModelDeploymentCard, *, contents: Optional[Mapping[str, Content]] = None
    ) -> None:
        self.card = card
        self._local_card = card
        self.contents = dict(contents or {})  # local path -> pinned content; others are pinned when attached
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._attached: Optional[ExitStack] = None
        self._files: list[ServedFile] = []
        self._card_url: Optional[str] = None

    @classmethod
    def load(
        cls,
        directory: PathLike,
        *,
        name: Optional[str] = None,
        custom_template: Optional[PathLike] = None,
        pin: bool = True,
        max_pinned_bytes: int = MAX_PINNED_BYTES,
    ) -> LocalModel:
        """Load a model directory, pinning every file in the one read that hashes it.

        Files larger than `max_pinned_bytes` are held open instead. With `pin` False, for a model that is not
        self-hosted, files are hashed only and extra files left out. Raises ModelDirError.
        """
        contents: dict[str, Content] = {}

        def pin_checked(path: str) -> CheckedFile:
            content = contents[path] = pin_file(path, max_pinned_bytes=max_pinned_bytes)
            return CheckedFile(path, content.checksum, content.size)

        read = pin_checked if pin else CheckedFile.from_disk
        card = load_card(directory, custom_template=custom_template, name=name, harvest=pin, read_file=read)
        return cls(card, contents=contents)

    def derive_lora(
        self, name: str, *, max_gpu_lora_count: Optional[int] = None, **overrides: Any
    ) -> LocalModel:
        """Return a model for a LoRA adapter on this one: the same pinned files, the card's `derive_lora`."""
        card = self._local_card.derive_lora(name, max_gpu_lora_count=max_gpu_lora_count, **overrides)
        return LocalModel(card, contents=self.contents)

    # -------------------------------------------------------------- attach and detach

    def attach(
        self,
        endpoint: Endpoint,
        *,
        self_host_metadata: Optional[bool] = None,
        advertise_url: Optional[str] = None,
    ) -> LocalModel:
        """Serve the files (if self-hosting is on) and publish the card; return self.

        `self_host_metadata` None follows the setting. Raises SettingsError if self-hosting is on and there
        is no address to publish, RegistrationError, StatusServerError or DiscoveryError; nothing is left
        behind then. Blocks for disk and one request to itself.
        """
        runtime = endpoint.runtime
        self._forget_parent()
        runtime.ensure_started()
        self_host = runtime.settings.self_host_metadata if self_host_metadata is None else self_host_metadata
        with self._lock:
            if self._attached is not None:
                raise RegistrationError(
                    f"{self.card.display_name!r} is attached already", slug=self.card.slug
                )
            pinned = self.contents
            try:
                self._attached = self._attach(endpoint, self_host=self_host, advertise_url=advertise_url)
            except BaseException:
                self.contents = pinned  # a shared registry deletes its own when what was done is undone
                raise
        logger.info("attached %r to %s", self.card.display_name, endpoint)
        return self

    def detach(self) -> None:
        """Withdraw the card, then the routes, and let the content go; harmless when not attached.

        Does nothing in a forked child: what the parent attached stays the parent's.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            attached, self._attached = self._attached, None
            if attached is not None:
                self.contents.clear()
                attached.close()  # in reverse order of attaching: the card first, the routes last
                logger.info("detached %r", self.card.display_name)

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def is_attached(self) -> bool:
        """Whether the card is published."""
        return self._attached is not None and self._pid == os.getpid()

    @property
    def files(self) -> Sequence[ServedFile]:
        """What this worker serves for the model, in the card's order."""
        return tuple(self._files)

    @property
    def card_url(self) -> Optional[str]:
        """Where this worker serves the card itself, as it is published; None if it does not self-host it."""
        return self._card_url

    def _attach(self, endpoint: Endpoint, *, self_host: bool, advertise_url: Optional[str]) -> ExitStack:
        """Do all that `attach` does, and return what undoes it."""
        runtime = endpoint.runtime
        key = endpoint.key(self._suffix if self._local_card.lora else None)
        with ExitStack() as undo:
            undo.callback(self._back_to_local)
            runtime.add_model(key, self)  # before publishing: a `close` from now on waits for our lock
            undo.callback(runtime.remove_model, key)
            if self_host:
                self._serve(runtime, runtime.base_url(advertise_url), undo)
            else:
                self.card = without_local_extras(self._local_card)
            runtime.acquire_instance(endpoint)
            undo.callback(runtime.release_instance, endpoint)
            undo.callback(self._publish(runtime, key).withdraw)
            return undo.pop_all()

    def _serve(self, runtime: DistributedRuntime, base_url: str, undo: ExitStack) -> None:
        registration = self.move_to_self_host(runtime.metadata_artifacts, base_url)
        undo.callback(registration.close)
        registration = runtime.metadata_artifacts.register_card(
            self.card.slug, self._suffix, self.card.to_json()
        )
        undo.callback(registration.close)
        self._card_url = base_url + registration.targets[CARD]
        tls = runtime.tls
        if runtime.status_server is not None and self._files and (tls is None or tls.client_ca is None):
            runtime.reachable(base_url, lambda: self._can_fetch(runtime))

    def _can_fetch(self, runtime: DistributedRuntime) -> bool:
        least = min(self._files, key=lambda file: file.size)
        own_cert = None if runtime.tls is None else runtime.tls.cert
        return can_fetch(least.url, least.checksum, least.size, own_cert=own_cert, token=runtime.token)

    def _publish(self, runtime: DistributedRuntime, key: RecordKey) -> Publication:
        return runtime.discovery.publish(Bucket.MODELS, key, model_record(key, self.card.to_json()))

    def _forget_parent(self) -> None:
        """In a forked child: be detached, whatever the parent's threads were doing with this model."""
        if self._pid != os.getpid():
            self._lock = threading.RLock()
            self._attached = None
            self._back_to_local()
            self._pid = os.getpid()

    def _back_to_local(self) -> None:
        self.card = self._local_card
        self._files = []
        self._card_url = None

    @property
    def _suffix(self) -> str:
        return self.card.slug if self.card.lora else BASE_SUFFIX

    # -------------------------------------------------------------- files

    def move_to_self_host(self, registry: MetadataArtifactRegistry, base_url: str) -> Registration:
        """Register the card's local files and point the card at `base_url`; URL slots stay as they are.

        `attach` does this and serves the card, `detach` undoes both. Called by itself, for a host that
        publishes the card in its own way, it leaves the URLs in the card and the content with the model when
        the registration is closed. Raises RegistrationError, with nothing registered and the card unchanged,
        for a file that cannot be pinned or is no longer what the card says. An extra file whose name no URL
        can carry is left out with a warning.
        """
        with self._lock:
            return self._move_to_self_host(registry, base_url)

    def _move_to_self_host(self, registry: MetadataArtifactRegistry, base_url: str) -> Registration:
        if not self._suffix:
            raise RegistrationError(
                f"the LoRA name {self.card.display_name!r} has no slug: it needs an ASCII letter or digit",
                slug=self.card.slug,
            )
        card = without_unservable(self._local_card)
        names = choose_names(card)
        contents = {names[file.path]: self._content_of(file, registry) for file in local_files(card)}
        registration = registry.register_files(self.card.slug, self._suffix, contents)
        artifacts = {artifact.filename: artifact for artifact in registration.artifacts}
        urls = {path: base_url + artifacts[name].target for path, name in names.items()}
        # What the registry shares, not what we pinned: a process holds equal content once.
        shared = {path: artifacts[name].content for path, name in names.items()}
        self.contents = {**self.contents, **shared}
        self.card = card.map_files(lambda file: file.move_to_url(urls[file.path]) if file.is_local else file)
        self._files = [_served(artifact, base_url) for artifact in registration.artifacts]
        return registration

    def _content_of(self, file: CheckedFile, registry: MetadataArtifactRegistry) -> Content:
        content = self.contents.get(file.path)
        if content is None or not _is_readable(content):
            try:
                content = registry.pin(file.path)
            except OSError as error:
                raise self._refusal(file, error.strerror or str(error)) from error
        if content.checksum != file.checksum:
            raise self._refusal(file, f"the card says {file.checksum}, the file has {content.checksum}")
        return content

    def _refusal(self, file: CheckedFile, reason: str) -> RegistrationError:
        return RegistrationError(
            f"cannot serve {file.path!r} of {self.card.display_name!r}: {reason}",
            slug=self.card.slug, suffix=self._suffix, filename=file.path, reason=reason,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<LocalModel {self.card.display_name!r} {'attached' if self.is_attached else 'detached'}>"


def _is_readable(content: Content) -> bool:
    """Tell whether the content is still there: in a shared registry it goes with its last registration."""
    try:
        content.read(0, min(content.size, 1))
    except OSError:
        return False
    return True
