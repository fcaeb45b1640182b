"""`router_config` of a card as Dynamo 1.6.1 completes it: it enters the card's checksum as that text.

Fields, defaults and rules change from version to version; the checksum of a card with a sparse
router_config is that of 1.6.1. Two fields name files on the publisher's disk (`router_policy_config`,
`router_tracking_key_file`): Dynamo reads them wherever it reads the card, here they are only texts.
"""

from __future__ import annotations

from typing import Any

from .fields import (
    Field,
    Problems,
    Struct,
    always,
    boolean,
    choice,
    is_none,
    names,
    number,
    optional,
    text,
    u32,
    u64,
    whole,
)

_POSITIVE = number(least=0)
_SHARE = number(least=0, most=1)
_PUBLIC, _KEYED = "public-xxh3-v1", "keyed-xxh3-v1"


def _is(default: Any) -> Any:
    """Return the omission rule of a field that is left out when it is its default."""
    return lambda value: bool(value == default)


def _apply_rules(values: dict[str, Any], path: str, problems: Problems) -> None:
    _apply_overlap_weight(values, path, problems)
    for broken, name, expected in _rules(values):
        if broken:
            problems.expect(f"{path}.{name}", values[name], expected)


def _apply_overlap_weight(values: dict[str, Any], path: str, problems: Problems) -> None:
    """Translate the older field as the wheel does: it becomes the scale, and 0 turns the credit off."""
    weight = values["overlap_score_weight"]
    if weight is None:
        return
    if weight < 0:
        problems.expect(f"{path}.overlap_score_weight", weight, "a number from 0")
    values["prefill_load_scale"] = weight
    if weight == 0:
        values["overlap_score_credit"] = 0.0


def _rules(values: dict[str, Any]) -> Any:
    """Yield (whether it is broken, the field to name, what was expected)."""
    keyed = values["router_tracking_hash"] == _KEYED
    key_file, key_id = values["router_tracking_key_file"], values["router_tracking_key_id"]
    busy = (values["conditional_disagg_prefill_busy_threshold"], values["router_queue_threshold"])
    return (
        (values["durable_kv_events"], "durable_kv_events", "false (this version has no durable events)"),
        (
            values["use_remote_indexer"] and values["serve_indexer"],
            "serve_indexer",
            "false beside use_remote_indexer",
        ),
        (
            values["use_remote_indexer"] and values["enable_session_prefix_index"],
            "enable_session_prefix_index",
            "false beside use_remote_indexer",
        ),
        (
            values["enable_session_prefix_index"] and not values["use_kv_events"],
            "use_kv_events",
            "true beside enable_session_prefix_index",
        ),
        (
            values["router_track_output_blocks"] and not values["router_track_active_blocks"],
            "router_track_active_blocks",
            "true beside router_track_output_blocks",
        ),
        (
            values["router_prefill_load_model"] != "none" and not values["router_track_prefill_tokens"],
            "router_track_prefill_tokens",
            "true beside a router_prefill_load_model",
        ),
        (
            values["router_predicted_ttl_secs"] is not None and not values["use_kv_events"],
            "use_kv_events",
            "true beside router_predicted_ttl_secs",
        ),
        (keyed and key_file is None, "router_tracking_key_file", "a path beside keyed-xxh3-v1"),
        (keyed and not key_id, "router_tracking_key_id", "a text beside keyed-xxh3-v1"),
        (not keyed and key_file is not None, "router_tracking_key_file", "null without keyed-xxh3-v1"),
        (not keyed and key_id is not None, "router_tracking_key_id", "null without keyed-xxh3-v1"),
        (
            values["conditional_disagg_enabled"]
            and values["conditional_disagg_policy"] != "isl_bounding"
            and busy == (None, None),
            "conditional_disagg_prefill_busy_threshold",
            "a number beside that conditional_disagg_policy (or a router_queue_threshold)",
        ),
    )


KV_ROUTER_CONFIG = Struct(
    Field("overlap_score_credit", _POSITIVE, 1.0),
    Field("overlap_score_credit_decay", _POSITIVE, 0.0),
    Field("prefill_load_scale", _POSITIVE, 1.0),
    Field("decode_active_request_weight", _POSITIVE, 0.0, _is(0.0)),
    Field("overlap_score_weight", optional(number()), None, always),
    Field("host_cache_hit_weight", _SHARE, 0.75),
    Field("disk_cache_hit_weight", _SHARE, 0.25),
    Field("router_temperature", _POSITIVE, 0.0),
    Field("use_kv_events", boolean, True),
    Field("durable_kv_events", boolean, False, always),
    Field("router_replica_sync", boolean, False),
    Field("router_track_active_blocks", boolean, True),
    Field("router_track_output_blocks", boolean, False),
    Field("router_assume_kv_reuse", boolean, True),
    Field("router_track_prefill_tokens", boolean, True),
    Field("router_tracking_hash", names(_PUBLIC, _KEYED), _PUBLIC, _is(_PUBLIC)),
    Field("router_tracking_key_file", optional(text), None, is_none),
    Field("router_tracking_key_id", optional(text), None, is_none),
    Field("router_prefill_load_model", choice({"none": "none", "aic": "aic", "ais": "aic"}), "none"),
    Field("router_snapshot_threshold", optional(u32), None, always),
    Field("router_reset_states", boolean, False, always),
    Field("router_ttl_secs", _POSITIVE, 120.0),
    Field("router_queue_threshold", optional(_POSITIVE), None),
    Field("router_policy_config", optional(text), None),
    Field("router_event_threads", whole(1, 2**32 - 1), 4),
    Field("skip_initial_worker_wait", boolean, False),
    Field("router_queue_policy", names("fcfs", "lcfs", "wspt"), "fcfs"),
    Field("use_remote_indexer", boolean, False),
    Field("serve_indexer", boolean, False),
    Field("enable_session_prefix_index", boolean, False, _is(False)),
    Field("shared_cache_multiplier", optional(_SHARE), None, is_none),
    Field("shared_cache_type", names("none", "hicache"), "none"),
    Field("router_predicted_ttl_secs", optional(_POSITIVE), None),
    Field("conditional_disagg_enabled", boolean, False, _is(False)),
    Field(
        "conditional_disagg_policy",
        names("isl_bounding", "prefill_load", "isl_or_load"),
        "isl_bounding",
        _is("isl_bounding"),
    ),
    Field("conditional_disagg_eff_isl_threshold", u64, 2048, _is(2048)),
    Field("conditional_disagg_eff_isl_ratio_threshold", _SHARE, 0.7, _is(0.7)),
    Field("conditional_disagg_prefill_busy_threshold", optional(_POSITIVE), None, is_none),
    Field("conditional_disagg_decode_busy_threshold", optional(_POSITIVE), None, is_none),
    min_items=0,
    closed=True,
    finish=_apply_rules,
)

LOAD_THRESHOLD_CONFIG = Struct(
    Field("active_decode_blocks_threshold", optional(number()), None, is_none),
    Field("active_prefill_tokens_threshold", optional(u64), None, is_none),
    Field("active_prefill_tokens_threshold_frac", optional(number()), None, is_none),
    min_items=3,
)

ROUTER_CONFIG = Struct(
    Field(
        "router_mode",
        names(
            "round_robin",
            "random",
            "power_of_two_choices",
            "k_v",
            "direct",
            "least_loaded",
            "device_aware_weighted",
        ),
    ),
    Field("kv_router_config", KV_ROUTER_CONFIG.read, table=KV_ROUTER_CONFIG),
    Field("load_threshold_config", LOAD_THRESHOLD_CONFIG.read, table=LOAD_THRESHOLD_CONFIG),
    Field("enforce_disagg", boolean, False),
    Field("session_affinity_ttl_secs", optional(u64), None),
    Field("session_affinity_mode", names("hard", "soft"), "hard"),
    min_items=3,
)
