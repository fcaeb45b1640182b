"""A model of this process: loaded from its directory, served by this worker, published to frontends.

`attach` pins and registers the files, rewrites the card's local paths to this worker's URLs and publishes
the card last; a failure at any step undoes the earlier ones. `detach` withdraws the card first, then the
routes. Without self-hosting the card keeps its local paths and carries no extra files, as Dynamo's does.

Sharing: any number of threads; attach and detach of one model exclude each other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Optional, TypeVar, Union
from urllib.parse import quote

from ..card.checked_file import CheckedFile
from ..card.checksum import Checksum
from ..card.model_card import ModelDeploymentCard
from ..card.model_dir import load_card
from ..card.model_type import ModelInput, ModelType, WorkerType
from ..discovery.base import Bucket, model_record
from ..errors import CardError, RegistrationError
from .content import Content, pin_file
from .registry import BASE_SUFFIX, MAX_NAME_BYTES, MetadataArtifactRegistry, Registration, why_unservable
from .runtime import DistributedRuntime, Endpoint
from .self_check import can_fetch

logger = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", ModelInput, WorkerType)
PathLike = Union[str, "os.PathLike[str]"]
# These kinds have no files that a frontend needs (as in Dynamo 1.6.1).
_WITHOUT_FILES = ModelType.TensorBased | ModelType.Images | ModelType.Videos | ModelType.Realtime


@dataclass(frozen=True)
class ServedFile:
    """One file that this worker serves; `size` in bytes."""

    filename: str
    url: str
    size: int
    checksum: Checksum


class LocalModel:
    """A card and, where this worker serves its files, their pinned content; a context manager that detaches.

    `card` says what is published: with URLs while attached and self-hosted, with local paths otherwise.
    """

    def __init__(
        self, card: ModelDeploymentCard, *, contents: Optional[Mapping[str, Content]] = None
    ) -> None:
        self.card = card
        self._local_card = card
        self.contents = dict(contents or {})  # local path -> pinned content; others are pinned when attached
        self._lock = threading.RLock()
        self._attached: Optional[ExitStack] = None
        self._files: list[ServedFile] = []

    @classmethod
    def load(
        cls,
        directory: PathLike,
        *,
        name: Optional[str] = None,
        custom_template: Optional[PathLike] = None,
        pin: bool = True,
    ) -> LocalModel:
        """Load a model directory, pinning every file in the one read that hashes it.

        With `pin` False, for a model that is not self-hosted, files are hashed only and extra files left
        out. Raises ModelDirError.
        """
        contents: dict[str, Content] = {}

        def pin_checked(path: str) -> CheckedFile:
            content = contents[path] = pin_file(path)
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
        runtime = endpoint.runtime.start()
        self_host = runtime.settings.self_host_metadata if self_host_metadata is None else self_host_metadata
        with self._lock:
            if self._attached is not None:
                raise RegistrationError(
                    f"{self.card.display_name!r} is attached already", slug=self.card.slug
                )
            with ExitStack() as undo:
                undo.callback(self._back_to_local)
                if self_host:
                    self._serve(runtime, runtime.base_url(advertise_url), undo)
                else:
                    self.card = _without_local_extras(self._local_card)
                runtime.acquire_instance(endpoint)
                undo.callback(runtime.release_instance, endpoint)
                self._publish(endpoint, undo)
                runtime.add_model(self)
                undo.callback(runtime.remove_model, self)
                self._attached = undo.pop_all()
        logger.info("attached %r to %s", self.card.display_name, endpoint)
        return self

    def detach(self) -> None:
        """Withdraw the card, then the routes; harmless when not attached."""
        with self._lock:
            attached, self._attached = self._attached, None
            if attached is not None:
                attached.close()  # in reverse order of attaching: the card first, the routes last
                logger.info("detached %r", self.card.display_name)

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.detach()

    @property
    def is_attached(self) -> bool:
        """Whether the card is published."""
        return self._attached is not None

    @property
    def files(self) -> Sequence[ServedFile]:
        """What this worker serves for the model, in the card's order."""
        return tuple(self._files)

    def _serve(self, runtime: DistributedRuntime, base_url: str, undo: ExitStack) -> None:
        registration = self.move_to_self_host(runtime.metadata_artifacts, base_url)
        undo.callback(registration.close)
        if runtime.status_server is not None and self._files and runtime.can_reach_itself is not False:
            first = self._files[0]
            runtime.can_reach_itself = can_fetch(first.url, first.checksum, first.size)

    def _publish(self, endpoint: Endpoint, undo: ExitStack) -> None:
        key = endpoint.key(self._suffix if self.card.lora else None)
        publication = endpoint.runtime.discovery.publish(
            Bucket.MODELS, key, model_record(key, self.card.to_json())
        )
        undo.callback(publication.withdraw)

    def _back_to_local(self) -> None:
        self.card = self._local_card
        self._files = []

    @property
    def _suffix(self) -> str:
        return self.card.slug if self.card.lora else BASE_SUFFIX

    # -------------------------------------------------------------- files

    def move_to_self_host(self, registry: MetadataArtifactRegistry, base_url: str) -> Registration:
        """Register the card's local files and point the card at `base_url`; URL slots stay as they are.

        Raises RegistrationError, with nothing registered and the card unchanged, for a file that cannot be
        pinned or is no longer what the card says. An extra file whose name no URL can carry is left out with
        a warning.
        """
        if not self._suffix:
            raise RegistrationError(
                f"the LoRA name {self.card.display_name!r} has no slug: it needs an ASCII letter or digit",
                slug=self.card.slug,
            )
        card = _without_unservable(self._local_card)
        names = _choose_names(card)
        contents = {names[file.path]: self._content_of(file) for file in _local_files(card)}
        registration = registry.register_files(self.card.slug, self._suffix, contents)
        targets = registration.targets
        urls = {path: base_url + targets[name] for path, name in names.items()}
        self.card = card.map_files(lambda file: file.move_to_url(urls[file.path]) if file.is_local else file)
        self._files = [
            ServedFile(
                artifact.filename,
                base_url + artifact.target,
                artifact.content.size,
                artifact.content.checksum,
            )
            for artifact in registration.artifacts
        ]
        return registration

    def _content_of(self, file: CheckedFile) -> Content:
        content = self.contents.get(file.path)
        if content is None:
            try:
                content = pin_file(file.path)
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


def _without_unservable(card: ModelDeploymentCard) -> ModelDeploymentCard:
    """Leave out extra files whose names frontends cannot take out of a URL."""
    kept = []
    for file in card.extra_files:
        reason = _why_unusable(os.path.basename(file.path)) if file.is_local else None
        if reason is None:
            kept.append(file)
        else:
            logger.warning("%r is not served, its name cannot be in a URL: %s", file.path, reason)
    return card if len(kept) == len(card.extra_files) else replace(card, extra_files=tuple(kept))


def _why_unusable(name: str) -> Optional[str]:
    """Return why frontends cannot store a file under this name as it stands in a URL, or None if they can.

    Dynamo's keeps the percent-encoded name, whose limit a name in Chinese reaches three times as early.
    """
    reason = why_unservable(name)
    if reason is None and len(quote(name, safe="")) > MAX_NAME_BYTES:
        reason = f"percent-encoded it has more than {MAX_NAME_BYTES} characters"
    return reason


def _local_files(card: ModelDeploymentCard) -> list[CheckedFile]:
    return [file for file, _ in card.iter_metadata_files() if file.is_local]


def _without_local_extras(card: ModelDeploymentCard) -> ModelDeploymentCard:
    """Leave out extra files that no frontend could fetch."""
    kept = tuple(file for file in card.extra_files if not file.is_local)
    return card if len(kept) == len(card.extra_files) else replace(card, extra_files=kept)


def _choose_names(card: ModelDeploymentCard) -> dict[str, str]:
    """Give each local path the name that it is served under: its own, unless other content has that.

    Frontends link each file into one directory by its name in the URL, so a custom template called
    config.json must not go by that name. A slot's file may have any name; an extra file's never collides.
    """
    names: dict[str, str] = {}
    taken: dict[str, Checksum] = {}
    for file in _local_files(card):
        name = os.path.basename(file.path)
        if _why_unusable(name) or taken.get(name, file.checksum) != file.checksum:
            extension = os.path.splitext(name)[1]
            name = file.checksum.hex[:16] + ("" if _why_unusable(extension or ".") else extension)
        taken[name] = file.checksum
        names[file.path] = name
    return names


# ------------------------------------------------------------------ Dynamo's entry point


def register_model(
    model_input: Union[ModelInput, str],
    model_type: Union[ModelType, str],
    endpoint: Endpoint,
    model_path: PathLike,
    model_name: Optional[str] = None,
    *,
    worker_type: Optional[Union[WorkerType, str]],
    kv_cache_block_size: Optional[int] = None,
    router_config: Optional[Mapping[str, Any]] = None,
    runtime_config: Optional[Mapping[str, Any]] = None,
    tensor_model_config: Optional[Mapping[str, Any]] = None,
    user_data: Optional[Mapping[str, Any]] = None,
    custom_template_path: Optional[PathLike] = None,
    media_decoder: Optional[Mapping[str, Any]] = None,
    media_fetcher: Optional[Mapping[str, Any]] = None,
    lora_name: Optional[str] = None,
    base_model_path: Optional[PathLike] = None,
    needs: Optional[Sequence[Sequence[Union[WorkerType, str]]]] = None,
    self_host_metadata: Optional[bool] = None,
    max_gpu_lora_count: Optional[int] = None,
    model_aliases: Optional[Sequence[str]] = None,
    skip_model_assets: bool = False,
    migration_limit: int = 0,
    advertise_url: Optional[str] = None,
) -> LocalModel:
    """Load the model at `model_path`, attach it to `endpoint` and return it; call `detach` to withdraw it.

    The parameters are those of Dynamo's Python binding (1.6.1), without `ignore_weights`: nothing is
    downloaded here. `lora_name` and `base_model_path` go together: the card then describes the adapter, with
    the base model's files. `self_host_metadata` overrides DYN_SELF_HOST_METADATA both ways; `advertise_url`
    overrides DYN_SYSTEM_ADVERTISE_URL. Blocks for disk; raises what `LocalModel.load` and `attach` raise, and
    CardError for a value that no card can have.
    """
    if (lora_name is None) != (base_model_path is None):
        raise CardError(
            f"lora_name and base_model_path go together, found {lora_name!r} and {base_model_path!r}",
            field="lora", value=lora_name,
        )  # fmt: skip
    fields: dict[str, Any] = {
        "model_input": _member(ModelInput, model_input, "model_input"),
        "model_type": ModelType.parse(model_type) if isinstance(model_type, str) else model_type,
        "worker_type": None if worker_type is None else _member(WorkerType, worker_type, "worker_type"),
        "needs": tuple(tuple(_member(WorkerType, w, "needs") for w in group) for group in needs or ()),
        "aliases": tuple(model_aliases or ()),
        "kv_cache_block_size": 16 if kv_cache_block_size is None else kv_cache_block_size,
        "migration_limit": migration_limit,
        "runtime_config": dict(runtime_config or {}),
        "router_config": router_config,
        "tensor_model_config": tensor_model_config,
        "media_decoder": media_decoder,
        "media_fetcher": media_fetcher,
        "user_data": user_data,
    }
    settings = endpoint.runtime.settings
    self_host = settings.self_host_metadata if self_host_metadata is None else self_host_metadata
    directory = model_path if base_model_path is None else base_model_path
    if skip_model_assets or fields["model_type"] & _WITHOUT_FILES:
        model = LocalModel(
            ModelDeploymentCard(model_name or os.fspath(directory), source_path=os.fspath(directory))
        )
    else:
        model = LocalModel.load(
            directory, name=model_name, custom_template=custom_template_path, pin=self_host
        )
    model = LocalModel(_checked(replace(model.card, **fields)), contents=model.contents)
    if lora_name is not None:
        model = model.derive_lora(lora_name, max_gpu_lora_count=max_gpu_lora_count)
    return model.attach(endpoint, self_host_metadata=self_host, advertise_url=advertise_url)


def _member(kind: type[_Kind], value: Union[_Kind, str], field: str) -> _Kind:
    """Return the member of an enumeration that a value, or Dynamo's spelling of it, names."""
    try:
        return kind(value)
    except ValueError:
        accepted = ", ".join(repr(member.value) for member in kind)
        raise CardError(
            f"{field}: expected one of {accepted}, found {value!r}", field=field, value=value
        ) from None


def _checked(card: ModelDeploymentCard) -> ModelDeploymentCard:
    """Return the card as a frontend would read it, so that nothing is published that Dynamo refuses."""
    try:
        text = card.to_json()
    except (TypeError, AttributeError) as error:
        raise CardError(f"the card of {card.display_name!r} cannot be written as JSON: {error}") from error
    return ModelDeploymentCard.from_json(text)
