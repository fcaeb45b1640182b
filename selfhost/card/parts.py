"""The structures inside a card, as Dynamo 1.6.1 reads and writes them: one table each.

All but the router's, which has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fields import (
    Field,
    Problems,
    Struct,
    boolean,
    dotted,
    i64,
    is_empty,
    is_none,
    items,
    mapping,
    names,
    number,
    optional,
    repeated_names,
    single,
    text,
    u8,
    u16,
    u32,
    u64,
)

_U64_MAX = (1 << 64) - 1
_NANOS = 10**9  # in a second

LORA = Struct(
    Field("name", text),
    Field("max_gpu_lora_count", optional(u32), None, is_none),
    min_items=1,
)

# ---- runtime_config ----------------------------------------------------------------------------------

_STRUCTURAL_TAG = Struct(
    Field("scope", names("auto", "always"), "auto"),
    Field("schema", names("auto", "strict"), "auto"),
    Field("allow_tool_calls_with_structured_output", boolean, False),
    Field("exclude_special_tokens", optional(boolean), None, is_none),
    Field("reasoning_boundary", names("auto", "structural_tag", "backend"), "auto"),
    Field("tool_arguments_any_order", boolean, False),
    min_items=0,
)
_ENDPOINT = Struct(Field("namespace", text), Field("component", text), Field("name", text), min_items=3)
_BOOTSTRAP = Struct(
    Field("bootstrap_host", optional(text), None, is_none),
    Field("bootstrap_port", optional(u16), None, is_none),
    min_items=0,
)


def _sorted_set(value: Any, path: str, problems: Problems) -> Any:
    read = items(text)(value, path, problems)
    return sorted({item for item in read if isinstance(item, str)}, key=str.encode)


def _any_object(value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.expect(path, value, "an object")
    return value


def _mirror_structural_tag(values: dict[str, Any], path: str, problems: Problems) -> None:
    """Keep the three older fields in step with `structural_tag`, which counts where both are given."""
    if values["structural_tag"] is None and values["structural_tag_mode"] == "on":
        older = {name: values[f"structural_tag_{name}"] for name in ("scope", "schema")}
        values["structural_tag"] = _STRUCTURAL_TAG.read(older, path, problems)
    newer: Mapping[str, Any] = values["structural_tag"] or {}
    values["structural_tag_mode"] = "off" if values["structural_tag"] is None else "on"
    values["structural_tag_scope"] = newer.get("scope", "auto")
    values["structural_tag_schema"] = newer.get("schema", "auto")


RUNTIME_CONFIG = Struct(
    Field("context_length", optional(u32), None, is_none),
    Field("total_kv_blocks", optional(u64), None),
    Field("max_num_seqs", optional(u64), None),
    Field("max_num_batched_tokens", optional(u64), None),
    Field("tool_call_parser", optional(text), None),
    Field("reasoning_parser", optional(text), None),
    Field("tool_call_arguments_format", names("json_string", "json_object"), "json_string"),
    Field("tokenizer_backend", optional(names("default", "fastokens", "basetenkenizer")), None, is_none),
    Field("tokenizer_fallback_enabled", optional(boolean), None, is_none),
    Field("structural_tag", optional(_STRUCTURAL_TAG.read), None, is_none),
    Field("structural_tag_mode", names("off", "on"), "off"),
    Field("structural_tag_scope", names("auto", "always"), "auto"),
    Field("structural_tag_schema", names("auto", "strict"), "auto"),
    Field("exclude_tools_when_tool_choice_none", boolean, True),
    Field("data_parallel_start_rank", u32, 0),
    Field("data_parallel_size", u32, 1),
    Field("enable_local_indexer", boolean, True),
    Field("kv_event_publishing_enabled", optional(boolean), None, is_none),
    Field("kv_event_source_mode", optional(text), None, is_none),
    Field("kv_state_endpoint", optional(_ENDPOINT.read), None, is_none),
    Field("runtime_data", _any_object, (), is_empty),
    Field("disaggregated_endpoint", optional(_BOOTSTRAP.read), None, is_none),
    Field("enable_eagle", boolean, False),
    Field("taints", _sorted_set, (), is_empty),
    Field("stable_routing_id", optional(text), None, is_none),
    Field("topology_domains", mapping(text), (), is_empty),
    Field("kv_transfer_domain", optional(text), None, is_none),
    Field("kv_transfer_enforcement", optional(names("required", "preferred")), None, is_none),
    Field("kv_transfer_preferred_weight", optional(single), None, is_none),
    Field("max_gpu_lora_count", optional(u32), None, is_none),
    min_items=6,
    finish=_mirror_structural_tag,
)

# ---- tensor_model_config ----------------------------------------------------------------------------

_UNSIGNED = ("Uint8", "Uint16", "Uint32", "Uint64")
_SIGNED = ("Int8", "Int16", "Int32", "Int64")
_FLOATS = ("Float16", "BFloat16", "Float32", "Float64")
_TENSOR_TYPES = ("Bool", *_UNSIGNED, *_SIGNED, *_FLOATS, "Bytes")
_PARAMETERS = {"bool": boolean, "int64": i64, "string": text, "double": number(), "uint64": u64}


def _parameter(value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict) or len(value) != 1 or repeated_names(value):
        problems.expect(path, value, f"an object with one of {', '.join(_PARAMETERS)}")
        return None
    ((kind, item),) = value.items()
    if kind not in _PARAMETERS:
        problems.expect(path, value, f"an object with one of {', '.join(_PARAMETERS)}")
        return None
    return {kind: _PARAMETERS[kind](item, f"{path}.{kind}", problems)}


_TENSOR = Struct(
    Field("name", text),
    Field("data_type", names(*_TENSOR_TYPES)),
    Field("shape", items(i64)),
    Field("parameters", mapping(_parameter), (), is_empty),
    min_items=3,
    closed=True,
)
TENSOR_MODEL_CONFIG = Struct(
    Field("name", text),
    Field("inputs", items(_TENSOR.read)),
    Field("outputs", items(_TENSOR.read)),
    Field("triton_model_config", optional(items(u8)), None, is_none),
    min_items=3,
    closed=True,
)

# ---- media ------------------------------------------------------------------------------------------

_IMAGE_LIMITS = Struct(
    Field("max_image_width", optional(u32), None),
    Field("max_image_height", optional(u32), None),
    Field("max_alloc", optional(u64), None),
    min_items=0,
    closed=True,
)
_DEFAULT_LIMITS = {"max_image_width": None, "max_image_height": None, "max_alloc": 128 << 20}
_IMAGE_DECODER = Struct(
    Field("limits", _IMAGE_LIMITS.read, _DEFAULT_LIMITS),
    min_items=0,
    closed=True,
)
MEDIA_DECODER = Struct(Field("image", optional(_IMAGE_DECODER.read), None, is_none), min_items=0)


def _carry_nanos(values: dict[str, Any], path: str, problems: Problems) -> None:
    values["secs"] += values["nanos"] // _NANOS
    values["nanos"] %= _NANOS
    if values["secs"] > _U64_MAX:
        problems.expect(f"{path}.secs", values["secs"], f"at most {_U64_MAX} with what nanos carries over")


_DURATION = Struct(Field("secs", u64), Field("nanos", u32), min_items=2, closed=True, finish=_carry_nanos)


def _text_set(value: Any, path: str, problems: Problems) -> Any:
    return list(dict.fromkeys(item for item in items(text)(value, path, problems) if isinstance(item, str)))


MEDIA_FETCHER = Struct(
    Field("user_agent", text),
    Field("allow_direct_ip", boolean),
    Field("allow_direct_port", boolean),
    Field("allow_private_ips", boolean),
    Field("allowed_media_domains", optional(_text_set), None),
    Field("timeout", optional(_DURATION.read), None),
    min_items=6,
)

# ---- indexer_identity -------------------------------------------------------------------------------

_MAX_ENTRIES = 32
_MAX_KEY_BYTES = 128
_MAX_VALUE_BYTES = 1024


def _identity_map(value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict) or not 1 <= len(value) <= _MAX_ENTRIES:
        problems.expect(path, value, f"an object of 1 to {_MAX_ENTRIES} texts")
        return None
    for name in repeated_names(value):
        problems.expect(dotted(path, name), value[name], "one value, not several of that name")
    for name, item in value.items():
        if not 1 <= len(name.encode()) <= _MAX_KEY_BYTES:
            problems.expect(dotted(path, name), name, f"a key of 1 to {_MAX_KEY_BYTES} bytes")
        if not isinstance(item, str) or not 1 <= len(item.encode()) <= _MAX_VALUE_BYTES:
            problems.expect(dotted(path, name), item, f"a text of 1 to {_MAX_VALUE_BYTES} bytes")
    return value


def _sort_identity(values: dict[str, Any], path: str, problems: Problems) -> None:
    for name, entries in values.items():
        if entries is not None:
            values[name] = {key: entries[key] for key in sorted(entries, key=str.encode)}


INDEXER_IDENTITY = Struct(
    Field("semantics", optional(_identity_map), None, is_none),
    Field("routing_scope", optional(_identity_map), None, is_none),
    min_items=0,
    finish=_sort_identity,
)
