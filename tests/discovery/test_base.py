"""Keys and record texts, as they go over the wire; and watching by snapshots."""

from __future__ import annotations

import json

import pytest

from selfhost.discovery.base import (
    Bucket,
    Event,
    Publication,
    RecordKey,
    check_key,
    check_text,
    instance_record,
    model_record,
    new_instance_id,
    sorted_by_key,
    watch_snapshots,
)
from selfhost.errors import DiscoveryError

KEY = RecordKey("ns", "comp", "ep", 0xD8E52F01902F4ACE)
LORA = RecordKey("ns", "comp", "ep", 0xD8E52F01902F4ACE, "my_lora")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (KEY, "ns/comp/ep/d8e52f01902f4ace"),
        (LORA, "ns/comp/ep/d8e52f01902f4ace/my_lora"),
        (RecordKey("a", "b", "c", 0), "a/b/c/0"),
        (RecordKey("é", "b-_.", "c", 2**64 - 1), "é/b-_./c/ffffffffffffffff"),
    ],
)
def test_key_and_its_text_are_one(key: RecordKey, text: str) -> None:
    """The id is lower-case hex without padding, and the text reads back as the key."""
    assert str(key) == text
    assert RecordKey.parse(text) == key


@pytest.mark.parametrize("text", ["a/b/c/00ff", "a/b/c/FF", "a/b/c/" + "0" * 40 + "fF"])
def test_key_is_read_as_leniently_as_dynamo_reads_it(text: str) -> None:
    """Zero-padded and upper-case ids are the same key."""
    assert RecordKey.parse(text) == RecordKey("a", "b", "c", 255)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a/b/c", "a/b/c/", "a/b/c/xyz", "a/b/c/-1", "a/b/c/+1", "a/b/c/0x1", "a/b/c/1/", "a/b/c/1/s/t",
     "/b/c/1", "a//c/1", "a/b//1", "a/b/c/10000000000000000", "a/b/c/1 ", "a/b/c/٣", "a/b/c/1_0"],
)  # fmt: skip
def test_what_is_no_key_is_refused(text: str) -> None:
    """The error carries the text."""
    with pytest.raises(DiscoveryError, match="no record key") as caught:
        RecordKey.parse(text)

    assert caught.value.key == text


@pytest.mark.parametrize(
    "key",
    [
        RecordKey("", "b", "c", 1),
        RecordKey("a/x", "b", "c", 1),
        RecordKey("a", "b", "c/d", 1),
        RecordKey("a", "b", "c", 1, ""),
        RecordKey("a", "b", "c", 1, "s/t"),
        RecordKey("a", "b", "c", -1),
        RecordKey("a", "b", "c", 2**64),
        RecordKey("a", "b", "\ud800", 1),
    ],
)
def test_key_that_would_read_as_another_is_not_published(key: RecordKey) -> None:
    """Names that hold a slash, empty ones and ids beyond 64 bits would lead to somebody else's record."""
    with pytest.raises(DiscoveryError, match="cannot publish") as caught:
        check_key("file", key)

    assert caught.value.backend == "file"


def test_instance_record_is_dynamos() -> None:
    """Byte for byte what a real worker writes, up to the two members that it may leave out."""
    transport = "127.0.0.1:39601/d8e52f01902f4ace/ns/comp/ep"

    assert instance_record(KEY, transport=transport) == (
        '{"type":"Endpoint","component":"comp","endpoint":"ep","namespace":"ns",'
        '"instance_id":15628949765619665614,"transport":{"tcp":"' + transport + '"}}'
    )


def test_instance_record_without_a_transport_names_one_that_nobody_answers_at() -> None:
    """Frontends want an address; port 0 of loopback can be nobody's."""
    record = json.loads(instance_record(KEY))

    assert record["transport"] == {"tcp": "127.0.0.1:0/d8e52f01902f4ace/ns/comp/ep"}


@pytest.mark.parametrize(("key", "tail"), [(KEY, ""), (LORA, ',"model_suffix":"my_lora"')])
def test_model_record_holds_the_card_as_it_is(key: RecordKey, tail: str) -> None:
    """The card's text is not parsed and written again: floats, order and escapes stay."""
    card = '{"b":1e-7,"a":0.10000000000000000001, "é":"\\u00e9"}'

    assert model_record(key, card) == (
        '{"type":"Model","namespace":"ns","component":"comp","endpoint":"ep",'
        '"instance_id":15628949765619665614,"card_json":' + card + tail + "}"
    )


@pytest.mark.parametrize(
    "card",
    ["", "null", "[]", "{", '{"a":1}}', '{"a":1},"type":"x"', '{"a":NaN}', '{"a":"\ud800"}', "[" * 10**5],
)
def test_card_that_is_no_json_object_is_refused(card: str) -> None:
    """A text that is not exactly one object would break out of its place in the record."""
    with pytest.raises(DiscoveryError, match="JSON object"):
        model_record(KEY, card)


def test_long_text_is_cut_in_the_error() -> None:
    """A card may be large; the message is for a log line."""
    with pytest.raises(DiscoveryError) as caught:
        check_text("file", KEY, "x" * 10**6)

    assert len(str(caught.value)) < 300


def test_new_instance_ids_are_random_and_fit_signed_readers() -> None:
    """All 63 bits are used, none beyond, and 0 is never given."""
    assert new_instance_id(lambda size: b"\xff" * size) == 2**63 - 1
    assert new_instance_id(lambda size: b"\0" * size) == 1
    assert len({new_instance_id() for _ in range(100)}) == 100


def test_publication_withdraws_at_the_end_of_its_with() -> None:
    """Also when the block raises."""
    calls: list[str] = []
    publication = Publication(
        Bucket.MODELS, KEY, withdraw=lambda: calls.append("withdraw"), replace=lambda text: None
    )

    with pytest.raises(KeyError), publication:
        raise KeyError

    assert calls == ["withdraw"]


def test_records_are_sorted_base_before_lora() -> None:
    """A frontend that goes through them meets a base model before the adapters on it."""
    assert list(sorted_by_key({LORA: "2", KEY: "1"})) == [KEY, LORA]


def test_watching_snapshots_tells_the_differences() -> None:
    """Removals first, then what is new or changed; nothing for what stays."""
    other = RecordKey("a", "b", "c", 1)
    snapshots = iter([{KEY: "1"}, {KEY: "1"}, {KEY: "2", LORA: "3"}, {other: "4"}])
    waits: list[float] = []
    events = watch_snapshots(
        lambda: next(snapshots),
        Bucket.MODELS,
        is_over=lambda: len(waits) == 4,
        wait=waits.append,
        poll_seconds=7.0,
    )

    assert [(event.kind, event.key, event.text) for event in events] == [
        ("added", KEY, "1"),
        ("changed", KEY, "2"),
        ("added", LORA, "3"),
        ("removed", KEY, "2"),
        ("removed", LORA, "3"),
        ("added", other, "4"),
    ]
    assert waits == [7.0] * 4


def test_watching_ends_between_two_events() -> None:
    """A stop is heard before the next event, not after all that are due."""
    seen: list[Event] = []
    events = watch_snapshots(
        lambda: {KEY: "1", LORA: "2"},
        Bucket.MODELS,
        is_over=lambda: bool(seen),
        wait=lambda seconds: None,
        poll_seconds=1.0,
    )

    for event in events:
        seen.append(event)

    assert [event.key for event in seen] == [KEY]
