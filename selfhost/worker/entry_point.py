"""`register_model`, the one call of Dynamo's workers: load a model and attach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional, Union

from ..card.model_card import ModelDeploymentCard
from ..card.model_type import ModelInput, ModelType, WorkerType
from ..errors import CardError
from . import card_fields
from .card_fields import PathLike
from .endpoint import Endpoint
from .local_model import LocalModel

# These kinds have no files that a frontend needs (as in Dynamo 1.6.1).
_WITHOUT_FILES = ModelType.TensorBased | ModelType.Images | ModelType.Videos | ModelType.Realtime


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
    if skip_model_assets and custom_template_path is not None:
        message = "custom_template_path cannot go with skip_model_assets: no file at all is published"
        raise CardError(message, field="custom_template_path", value=custom_template_path)
    fields: dict[str, Any] = {
        "model_input": card_fields.member(ModelInput, model_input, "model_input"),
        "model_type": card_fields.model_type_of(model_type),
        "worker_type": card_fields.optional_member(WorkerType, worker_type, "worker_type"),
        "needs": card_fields.worker_needs(needs),
        "aliases": card_fields.alias_names(model_aliases),
        "kv_cache_block_size": 16 if kv_cache_block_size is None else kv_cache_block_size,
        "migration_limit": migration_limit,
        "runtime_config": card_fields.json_object(runtime_config, "runtime_config") or {},
        "router_config": card_fields.json_object(router_config, "router_config"),
        "tensor_model_config": card_fields.json_object(tensor_model_config, "tensor_model_config"),
        "media_decoder": card_fields.json_object(media_decoder, "media_decoder"),
        "media_fetcher": card_fields.json_object(media_fetcher, "media_fetcher"),
        "user_data": user_data,
    }
    path = card_fields.path_text(model_path, "model_path")
    directory = path if base_model_path is None else card_fields.path_text(base_model_path, "base_model_path")
    name = card_fields.optional_name(model_name, "model_name")
    lora = card_fields.optional_name(lora_name, "lora_name")
    settings = endpoint.runtime.settings
    self_host = settings.self_host_metadata if self_host_metadata is None else self_host_metadata
    if skip_model_assets or fields["model_type"] & _WITHOUT_FILES:
        model = LocalModel(ModelDeploymentCard(name or directory, source_path=directory))
    else:
        template = custom_template_path
        if template is not None:
            template = card_fields.path_text(template, "custom_template_path")
        limit = endpoint.runtime.metadata_artifacts.max_pinned_bytes
        model = LocalModel.load(
            directory, name=name, custom_template=template, pin=self_host, max_pinned_bytes=limit
        )
    model = LocalModel(card_fields.checked(replace(model.card, **fields)), contents=model.contents)
    if lora is not None:
        model = model.derive_lora(lora, max_gpu_lora_count=max_gpu_lora_count)
    return model.attach(endpoint, self_host_metadata=self_host, advertise_url=advertise_url)
