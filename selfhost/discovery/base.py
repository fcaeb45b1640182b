"""What discovery is: keys, records, events, and the protocol that every backend keeps.

A record is one JSON text under one key in one bucket; backends carry the text and look no further into it
than to see that it is a JSON object. Keys and JSON shapes are Dynamo's (1.6.1), so that a record written
here is found by its frontends and the other way round. This module does no I/O; its values are frozen.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Callable, NoReturn, Optional, Protocol

from ..errors import DiscoveryError

POLL_SECONDS = 0.5  # a frontend sees a new model about as soon as Dynamo's own does (0.2 to 0.3 s)

ALREADY_OURS = "already published by this process; withdraw it first or use another endpoint or name"

_INSTANCE_ID = re.compile(r"[0-9A-Fa-f]+")


class Bucket(str, Enum):
    """The two kinds of record; the value is the directory, or key prefix, they live under."""

    INSTANCES = "instances"
    MODELS = "mdc"


@dataclass(frozen=True)
class RecordKey:
    """Which endpoint of which process a record belongs to; `suffix` is the slug of a LoRA's card."""

    namespace: str
    component: str
    endpoint: str
    instance_id: int  # 0 to 2**64 - 1
    suffix: Optional[str] = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The segments of the key, the instance in lower-case hex without leading zeros."""
        head = (self.namespace, self.component, self.endpoint, f"{self.instance_id:x}")
        return head if self.suffix is None else (*head, self.suffix)

    def __str__(self) -> str:
        return "/".join(self.parts)

    @classmethod
    def parse(cls, text: str) -> RecordKey:
        """Read what `str` writes; the id may also have leading zeros or upper case, as Dynamo takes it.

        Raises DiscoveryError where the text is no key.
        """
        parts = text.split("/")
        instance_id = parts[3] if len(parts) in (4, 5) else ""
        if not all(parts) or not _INSTANCE_ID.fullmatch(instance_id) or int(instance_id, 16) >> 64:
            expected = "namespace/component/endpoint/<instance id in hex>[/<suffix>]"
            raise DiscoveryError(f"{text!r} is no record key: expected {expected}", backend="", key=text)
        return cls(parts[0], parts[1], parts[2], int(instance_id, 16), parts[4] if len(parts) == 5 else None)


def new_instance_id(random: Callable[[int], bytes] = os.urandom) -> int:
    """Return a random instance id, never 0; `random(n)` gives n random bytes.

    Below 2**63, because many JSON readers hold integers in a signed 64-bit number.
    """
    return int.from_bytes(random(8), "big") >> 1 or 1


def instance_record(key: RecordKey, *, transport: Optional[str] = None) -> str:
    """Return the JSON text that tells frontends that this endpoint is there.

    `transport` is the request plane's `host:port/<id>/<ns>/<comp>/<ep>`; None: one that nobody answers at.
    """
    path = "/".join((f"{key.instance_id:x}", key.namespace, key.component, key.endpoint))
    return _dumps(
        {
            "type": "Endpoint",
            "component": key.component,
            "endpoint": key.endpoint,
            "namespace": key.namespace,
            "instance_id": key.instance_id,
            "transport": {"tcp": f"127.0.0.1:0/{path}" if transport is None else transport},
        }
    )


def model_record(key: RecordKey, card_json: str) -> str:
    """Return the JSON text that carries a card; the card's own text stands in it unchanged.

    Raises DiscoveryError where `card_json` is no JSON object.
    """
    check_text("", key, card_json)
    head = {
        "type": "Model",
        "namespace": key.namespace,
        "component": key.component,
        "endpoint": key.endpoint,
        "instance_id": key.instance_id,
    }
    tail = "" if key.suffix is None else f',"model_suffix":{_dumps(key.suffix)}'
    return f'{_dumps(head)[:-1]},"card_json":{card_json}{tail}}}'


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Event:
    """One difference between what was there and what is; `text` of a removed record is its last one."""

    kind: str  # "added", "changed" or "removed"
    bucket: Bucket
    key: RecordKey
    text: str


class Discovery(Protocol):
    """Publish records, see those of everybody. Every method may be called from any thread."""

    name: str

    def publish(self, bucket: Bucket, key: RecordKey, text: str, *, adopt: bool = False) -> Publication:
        """Make the record visible and keep it so until it is withdrawn.

        With `adopt`, whatever is there under the key is taken over, in one step: the caller knows that its
        owner is gone. Raises DiscoveryError, and leaves nothing behind, where the key is taken or the record
        cannot be written.
        """

    def remove(self, bucket: Bucket, key: RecordKey) -> None:
        """Remove what a holder left that is known to be gone; harmless where there is nothing.

        Raises DiscoveryError where it cannot be removed.
        """

    def records(self, bucket: Bucket) -> dict[RecordKey, str]:
        """Return the live records of everybody, sorted by key; DiscoveryError where they cannot be read."""

    def watch(
        self, bucket: Bucket, *, stop: Optional[threading.Event] = None, poll_seconds: float = POLL_SECONDS
    ) -> Iterator[Event]:
        """Yield what is there as added, then every change, until `stop` is set or this object is closed.

        Blocks between events. What comes and goes within `poll_seconds` may never be seen.
        """

    def close(self) -> None:
        """Withdraw what this object published and end its watches; twice is harmless."""

    def __enter__(self) -> Discovery: ...

    def __exit__(self, *_: object) -> None: ...


class Publication:
    """One record that this process published; a context manager that withdraws it.

    In a forked child it is inert: the record stays the parent's.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: RecordKey,
        *,
        withdraw: Callable[[], None],
        replace: Callable[[str], None],
        abandon: Optional[Callable[[], None]] = None,
    ) -> None:
        self.bucket = bucket
        self.key = key
        self._withdraw = withdraw
        self._replace = replace
        self._abandon = withdraw if abandon is None else abandon

    def withdraw(self) -> None:
        """Remove the record; twice is harmless. Never raises: what cannot be removed expires by itself."""
        self._withdraw()

    def replace(self, text: str) -> None:
        """Put another text in the record's place, in one step.

        Raises DiscoveryError, and leaves what is there, where the record is withdrawn already, is somebody
        else's by now, or cannot be written.
        """
        self._replace(text)

    def abandon(self) -> None:
        """Leave the record to whoever adopts it; it expires if nobody does. Never raises.

        A store that others cannot adopt from has it withdrawn.
        """
        self._abandon()

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, *_: object) -> None:
        self.withdraw()

    def __repr__(self) -> str:
        return f"<Publication {self.bucket.value} {str(self.key)!r}>"


def is_record(text: str) -> bool:
    """Tell whether the text is one whole JSON object, as every record is."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def check_key(backend: str, key: RecordKey, *, action: str = "publish") -> None:
    """Raise DiscoveryError where the key's own text would not be read as that key."""
    try:
        same = RecordKey.parse(str(key).encode().decode()) == key
    except (DiscoveryError, UnicodeEncodeError):
        same = False
    if not same:
        message = f"cannot {action} {str(key)!r}: each name must be there and hold no '/', the id fit 64 bits"
        raise DiscoveryError(message, backend=backend, key=str(key))


def check_text(backend: str, key: RecordKey, text: str) -> None:
    """Raise DiscoveryError where the text is no JSON object, or not UTF-8 when written."""
    try:
        text.encode()
        sound = is_record(text)
    except UnicodeEncodeError:  # a lone surrogate
        sound = False
    if not sound:
        message = f"cannot publish {str(key)!r}: expected the text of a JSON object, found {text[:80]!r}"
        raise DiscoveryError(message, backend=backend, key=str(key))


def sorted_by_key(records: Mapping[RecordKey, str]) -> dict[RecordKey, str]:
    """Return the records in the order of their keys: a base model comes just before its LoRAs."""
    return dict(sorted(records.items(), key=lambda item: item[0].parts))


def watch_snapshots(
    snapshot: Callable[[], Mapping[RecordKey, str]],
    bucket: Bucket,
    *,
    is_over: Callable[[], bool],
    wait: Callable[[float], object],
    poll_seconds: float,
) -> Iterator[Event]:
    """Yield the differences between one snapshot and the next, from nothing on, until `is_over()`.

    Of one snapshot the removals come first, then the rest in the snapshot's order. This is the whole of
    watching for a backend that can only be asked.
    """
    known: Mapping[RecordKey, str] = {}
    while not is_over():
        current = snapshot()
        for event in _differences(bucket, known, current):
            if is_over():
                return
            yield event
        known = current
        wait(poll_seconds)


def _differences(
    bucket: Bucket, before: Mapping[RecordKey, str], after: Mapping[RecordKey, str]
) -> Iterator[Event]:
    for key, text in before.items():
        if key not in after:
            yield Event("removed", bucket, key, text)
    for key, text in after.items():
        if key not in before:
            yield Event("added", bucket, key, text)
        elif before[key] != text:
            yield Event("changed", bucket, key, text)
