"""The rules of HTTP as tables: look-up, preconditions, ranges, header fields, error bodies."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, Optional

import pytest
from blake3 import blake3

from selfhost.worker import answer as rules
from selfhost.worker.access import INVALID_TOKEN, UNAUTHORIZED
from selfhost.worker.answer import (
    ROUTE,
    UNSATISFIABLE,
    answer_hit,
    answer_registered,
    evaluate_preconditions,
    find,
    has_encoded_slash,
    if_range_holds,
    is_metadata,
    media_type,
    parse_range,
    render_fields,
    split_target,
)
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import Artifact, MetadataArtifactRegistry

DATA = b"0123456789"
HEX = blake3(DATA).hexdigest()
TAG = f'"{HEX}"'
OTHER = '"' + "0" * 64 + '"'


@pytest.fixture
def artifact(registry: MetadataArtifactRegistry) -> Artifact:
    """Return ten bytes that are registered."""
    return registry.register("m", "_base", "digits.txt", pin_bytes(DATA)).artifacts[0]


# ------------------------------------------------------------------ preconditions

PRECONDITIONS = [
    ({}, 200),
    ({"if-match": TAG}, 200),
    ({"if-match": "*"}, 200),  # pitfall 1
    ({"if-match": " * "}, 200),
    ({"if-match": f"{OTHER}, {TAG}"}, 200),
    ({"if-match": f'"a,b",{TAG}'}, 200),
    ({"if-match": OTHER}, 412),  # catalogue 62
    ({"if-match": f"W/{TAG}"}, 412),  # catalogue 64
    ({"if-match": f"W/{TAG}, {TAG}"}, 200),
    ({"if-match": HEX}, 412),
    ({"if-match": ""}, 412),
    ({"if-match": TAG.upper()}, 412),
    ({"if-none-match": TAG}, 304),  # catalogue 66
    ({"if-none-match": "*"}, 304),
    ({"if-none-match": f"W/{TAG}"}, 304),
    ({"if-none-match": f"{OTHER}, W/{OTHER},{TAG}"}, 304),
    ({"if-none-match": f'"a, b", {TAG}'}, 304),
    ({"if-none-match": OTHER}, 200),
    ({"if-none-match": HEX}, 200),
    ({"if-none-match": TAG[:-1]}, 200),
    ({"if-none-match": f'"{HEX}0"'}, 200),
    ({"if-none-match": ""}, 200),
    ({"if-match": TAG, "if-none-match": TAG}, 304),  # RFC 9110 13.2.2: step 1, then step 3
    ({"if-match": OTHER, "if-none-match": TAG}, 412),
    ({"if-match": TAG, "if-none-match": OTHER}, 200),
    ({"if-modified-since": "Sun, 06 Nov 2094 08:49:37 GMT"}, 200),  # no dates here: 13.1.3 and 13.1.4
    ({"if-unmodified-since": "Sun, 06 Nov 1994 08:49:37 GMT"}, 200),
]


@pytest.mark.parametrize(("headers", "status"), PRECONDITIONS)
def test_preconditions(headers: dict[str, str], status: int) -> None:
    """Strong comparison for If-Match, weak for If-None-Match, in the order of RFC 9110 13.2.2."""
    assert evaluate_preconditions(HEX, headers) == status


@pytest.mark.parametrize(
    ("field", "holds"),
    [
        (TAG, True),
        (f" {TAG} ", True),
        (OTHER, False),
        (f"W/{TAG}", False),
        (HEX, False),
        ("*", False),
        (f"{TAG}, {OTHER}", False),
        ("Sun, 06 Nov 2094 08:49:37 GMT", False),
        ("", False),
        (TAG[:-1], False),
    ],
)
def test_if_range(field: str, holds: bool) -> None:
    """Nothing but exactly our strong tag lets a range be served."""  # catalogue 68
    assert if_range_holds(HEX, {"if-range": field}) is holds


def test_no_if_range_lets_the_range_be_served() -> None:
    """A range needs no If-Range."""
    assert if_range_holds(HEX, {})


# ------------------------------------------------------------------ ranges

RANGES = [
    ("bytes=0-0", (0, 1)),  # catalogue 70
    ("bytes=0-", (0, 10)),
    ("bytes=-1", (9, 10)),
    ("bytes=5-99999", (5, 10)),
    ("bytes=9-9", (9, 10)),
    ("bytes=9-", (9, 10)),
    ("bytes=0-9", (0, 10)),
    ("bytes=2-4", (2, 5)),
    ("bytes=-10", (0, 10)),
    ("bytes=-11", (0, 10)),  # catalogue 71
    ("bytes=-0", UNSATISFIABLE),
    ("bytes=10-", UNSATISFIABLE),
    ("bytes=10-10", UNSATISFIABLE),
    ("bytes=007-0008", (7, 9)),
    ("BYTES=0-1", (0, 2)),
    ("items=0-1", None),  # catalogue 73
    ("", None),
    ("bytes", None),
    ("bytes=", None),
    ("bytes=-", None),
    ("bytes=,", None),
    ("bytes 0-1", None),
    ("bytes=5-1", None),  # catalogue 74
    ("bytes=abc", None),
    ("bytes=+0-1", None),
    ("bytes=0x0-1", None),
    ("bytes=٠-١", None),
    ("bytes=０-１", None),
    ("bytes=0--1", None),
    ("bytes=--1", None),
    ("bytes=0-1-2", None),
    ("bytes=0 - 1", None),
    ("bytes=0.0-1", None),
    ("bytes=1_0-", None),
    ("bytes=0-1;x", None),
    ("bytes=0-1\n", None),
    (f"bytes=0-{'9' * 20}", (0, 10)),  # catalogue 75
    (f"bytes=-{'9' * 20}", (0, 10)),
    (f"bytes={'9' * 20}-", UNSATISFIABLE),
    (f"bytes={'9' * 20}-{'9' * 30}", UNSATISFIABLE),
    (f"bytes={'9' * 8000}-", UNSATISFIABLE),
    (f"bytes={'0' * 8000}1-2", (1, 3)),
    ("bytes=0-1,", (0, 2)),  # catalogue 77
    ("bytes= 0-1", (0, 2)),
    ("bytes=,0-1", (0, 2)),
    ("bytes=0-1,2-3", None),
    ("bytes=0-1, 2-3", None),
    ("bytes=0-1, bytes=2-3", None),
    ("bytes=0-1,x", None),
]


@pytest.mark.parametrize(("field", "expected"), RANGES)
def test_ranges(field: str, expected: tuple[int, int] | None) -> None:
    """One well-formed byte range is a slice, what lies outside is refused, anything else means the whole."""
    assert parse_range(field, len(DATA)) == expected


@pytest.mark.parametrize("field", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=1-", "bytes=-0"])
def test_no_range_of_an_empty_file(field: str) -> None:
    """An empty file is always sent whole."""  # catalogue 79
    assert parse_range(field, 0) is None


def test_huge_range_sets_are_cheap() -> None:
    """A set of 300,000 ranges is one pass, not one per pair."""  # catalogue 39
    start = time.thread_time()  # not of who else uses the machine

    assert parse_range("bytes=" + "0-," * 300_000, len(DATA)) is None
    assert time.thread_time() - start < 2.0


def test_slices_agree_with_an_independent_reading() -> None:
    """Every first-last pair around the file's bounds gives what a plain reading of the RFC gives."""
    for first in range(13):
        for last in range(first, 13):
            got = parse_range(f"bytes={first}-{last}", len(DATA))
            whole = DATA[first : last + 1]

            assert (DATA[slice(*got)] if got != UNSATISFIABLE else b"") == whole


# ------------------------------------------------------------------ answers to a hit


def test_hit_has_every_field(artifact: Artifact) -> None:
    """A plain hit carries the content's length, digest and handling."""  # catalogue 57
    answer = answer_hit("GET", artifact, {})

    assert (answer.status, answer.content, answer.start, answer.stop) == (200, artifact.content, 0, 10)
    assert dict(answer.fields) == {
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": "10",
        "ETag": TAG,
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-cache, no-transform",
        "X-Content-Type-Options": "nosniff",
    }


ANSWERS = [
    ({"range": "bytes=2-4"}, 206, (2, 5)),
    ({"range": "bytes=10-"}, 416, None),
    ({"range": "bytes=0-1,4-5"}, 200, (0, 10)),
    ({"range": "bytes=2-4", "if-range": TAG}, 206, (2, 5)),
    ({"range": "bytes=2-4", "if-range": OTHER}, 200, (0, 10)),
    ({"range": "bytes=10-", "if-range": OTHER}, 200, (0, 10)),
    ({"range": "bytes=2-4", "if-none-match": TAG}, 304, None),  # catalogue 60
    ({"range": "bytes=2-4", "if-none-match": "*"}, 304, None),
    ({"range": "bytes=2-4", "if-match": OTHER}, 412, None),  # catalogue 62
    ({"range": "bytes=2-4", "if-match": "*"}, 206, (2, 5)),
    ({"range": "bytes=10-", "if-match": OTHER}, 412, None),
    ({"if-range": OTHER}, 200, (0, 10)),
]


@pytest.mark.parametrize(("headers", "status", "part"), ANSWERS)
def test_conditions_come_before_ranges(
    artifact: Artifact, headers: dict[str, str], status: int, part: tuple[int, int] | None
) -> None:
    """412 and 304 win over a range, and only 200 and 206 carry content."""
    answer = answer_hit("GET", artifact, headers)

    assert answer.status == status
    assert ((answer.start, answer.stop) if answer.content else None) == part


@pytest.mark.parametrize(("headers", "status"), [(h, s) for h, s, _ in ANSWERS if "range" not in h])
def test_head_meets_the_same_conditions(artifact: Artifact, headers: dict[str, str], status: int) -> None:
    """HEAD is GET without a body."""  # catalogue 58
    assert answer_hit("HEAD", artifact, headers) == answer_hit("GET", artifact, headers)
    assert answer_hit("HEAD", artifact, headers).status == status


def test_head_ignores_range(artifact: Artifact) -> None:
    """Ranges are defined for GET only (RFC 9110 14.2)."""
    assert answer_hit("HEAD", artifact, {"range": "bytes=0-1"}).status == 200


def test_partial_answer_has_every_field(artifact: Artifact) -> None:
    """A 206 says which part it is and keeps the fields of the whole."""  # catalogue 81
    fields = dict(answer_hit("GET", artifact, {"range": "bytes=2-4"}).fields)

    assert fields["Content-Range"] == "bytes 2-4/10"
    assert fields["Content-Length"] == "3"
    assert fields["ETag"] == TAG
    assert fields["Cache-Control"] == "no-cache, no-transform"


def test_not_modified_has_no_length(artifact: Artifact) -> None:
    """A 304 keeps ETag and Cache-Control and says nothing of a body."""  # catalogue 80
    answer = answer_hit("GET", artifact, {"if-none-match": TAG})

    assert {name for name, _ in answer.fields} == {"ETag", "Cache-Control", "X-Content-Type-Options"}
    assert (answer.body, answer.content) == (b"", None)


def test_unsatisfiable_says_the_size(artifact: Artifact) -> None:
    """A 416 tells how long the file is, which is how a finished download is recognised."""  # catalogue 82
    answer = answer_hit("GET", artifact, {"range": "bytes=10-"})

    assert dict(answer.fields)["Content-Range"] == "bytes */10"
    assert answer.content is None


# ------------------------------------------------------------------ media types and texts


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("config.json", "application/json"),
        ("CONFIG.JSON", "application/json"),
        ("model.safetensors.index.json", "application/json"),
        ("merges.txt", "text/plain; charset=utf-8"),
        ("readme.md", "text/plain; charset=utf-8"),
        ("chat_template.jinja", "text/plain; charset=utf-8"),
        ("template.html", "application/octet-stream"),
        ("logo.svg", "application/octet-stream"),
        ("page.xhtml", "application/octet-stream"),
        ("code.js", "application/octet-stream"),
        ("x.json.gz", "application/octet-stream"),
        ("tokenizer.model", "application/octet-stream"),
        ("LICENSE", "application/octet-stream"),
        (".json.", "application/octet-stream"),
        (rules.CARD, "application/json"),
    ],
)
def test_media_types(filename: str, expected: str) -> None:
    """The table is ours, and nothing in it is run by a browser."""  # catalogue 94
    assert media_type(filename) == expected


ERRORS = [
    rules.NOT_FOUND, rules.METHOD_NOT_ALLOWED, rules.UNREADABLE, rules.FAILED, UNAUTHORIZED, INVALID_TOKEN,
]  # fmt: skip


@pytest.mark.parametrize("answer", ERRORS, ids=lambda answer: str(answer.status))
def test_error_bodies_say_little(answer: rules.Answer) -> None:
    """An error is one short line of plain text: no path, version or traceback."""  # catalogue 95
    fields = dict(answer.fields)

    assert re.fullmatch(rb"[A-Za-z ]+\n", answer.body)
    assert fields["Content-Length"] == str(len(answer.body))
    assert fields["X-Content-Type-Options"] == "nosniff"


def test_method_not_allowed_names_the_methods() -> None:
    """A 405 says what is allowed."""  # catalogue 59
    assert ("Allow", "GET, HEAD") in rules.METHOD_NOT_ALLOWED.fields


def test_json_answer_is_json() -> None:
    """The health answer's length is its body's."""
    answer = rules.json_answer(503, {"status": "notready"})

    assert json.loads(answer.body) == {"status": "notready"}
    assert dict(answer.fields)["Content-Length"] == str(len(answer.body))


def test_fields_on_the_wire() -> None:
    """Fields are written in latin-1, each with its own CRLF."""
    assert render_fields((("A", "1"), ("B", "é"))) == b"A: 1\r\nB: \xe9\r\n"


# ------------------------------------------------------------------ look-up


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/a/b", ("/a/b", "")),
        ("/a%3Db?c=%41&d", ("/a=b", "c=%41&d")),
        ("/a%2Fb/%2f?%2F", ("/a\0b/\0", "%2F")),  # no separator, and in no name
        ("/%252F", ("/%2F", "")),
        ("/a?b?c", ("/a", "b?c")),
        ("/a%3Fb", ("/a?b", "")),
        ("/%E6%A8%A1", ("/模", "")),
        ("/%2541", ("/%41", "")),  # decoded once
        ("/%zz%4", ("/%zz%4", "")),
        ("/%FF", ("/\ufffd", "")),
        ("/a+b", ("/a+b", "")),
        ("/%00", ("/\0", "")),
    ],
)
def test_targets_are_decoded_once(target: str, expected: tuple[str, str]) -> None:
    """The path is decoded exactly once, the query not at all."""
    assert split_target(target) == expected


@pytest.mark.parametrize(
    ("target", "has_one"),
    [
        ("/v1/metadata/m%2F_base", True),
        ("/v1/metadata/m/_base%2fdigits.txt?a", True),
        ("/v1/metadata%2Fm/_base", True),
        ("/v1%2Fmetadata/m/_base", True),
        ("/v1/metadata/m/_base", False),
        ("/v1/metadata/m/_base/%252F", False),
        ("/v1%2Fmetadata", True),
        ("/v1/metadata", False),
        ("/a%2Fb/v1/metadata?after=m%2F_base", False),
        ("/v1/metadata/m/_base?a=/v1/metadata/%2F", False),
        ("http://h/a%2Fb/v1/metadata/m/_base", False),  # where the app is mounted is none of its business
    ],
)
def test_encoded_slash_is_seen_in_the_raw_target(target: str, has_one: bool) -> None:
    """What an application was not told by its PATH_INFO: whether a slash was an encoded one."""
    assert has_encoded_slash(target) is has_one


@pytest.mark.parametrize(
    ("target", "is_one"),
    [
        ("/v1/metadata", True),
        ("/v1/metadata/", True),
        ("/v1/metadata/a/b/c/d", True),
        ("/v1/metadata?a", True),
        ("/v1%2Fmetadata%2fm", True),
        ("/v1/met%61data/..", True),
        ("/v1/metadata%00m", True),
        ("/v1/metadatam", False),
        ("/v1/Metadata", False),
        ("/v1//metadata", False),
        ("/x/v1/metadata", False),
        ("/v1/metadata%252Fm", False),
        ("/health?/v1/metadata", False),
    ],
)
def test_metadata_is_known_by_its_path(target: str, is_one: bool) -> None:
    """What a token guards, however its slashes are spelt: a server may have decoded them."""
    assert is_metadata(split_target(target)[0]) is is_one


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/v1",
        "/v1/metadata",
        "/v1/metadata/",
        "/v1/metadata/m",
        "/v1/metadata/m/_base",
        "/v1/metadata/m/_base/",
        "/v1/metadata/m/_base/other.txt",
        "/v1/metadata/m/_base/digits.txt/",
        "/v1/metadata/m/_base/x/../digits.txt",
        "/v1/metadata/m/_base/./digits.txt",
        "/v1/metadata/m//_base/digits.txt",
        "/v1/metadata//m/_base/digits.txt",
        "//v1/metadata/m/_base/digits.txt",
        "/v1//metadata/m/_base/digits.txt",
        "/V1/metadata/m/_base/digits.txt",
        "/v1/metadata/M/_base/digits.txt",
        "/v1/metadata/m/_base/DIGITS.txt",
        "/v1/metadata/m/_base/digits.txt\0",
        "/v1/metadata/m/_base/digits.txt ",
        "/v1/metadata/m/_base/digits",
        "/v1/metadata/m/_base/../../../../etc/passwd",
    ],
)
def test_only_the_exact_path_is_found(
    artifact: Artifact, registry: MetadataArtifactRegistry, path: str
) -> None:
    """A path is compared as it is: nothing is joined, folded or completed."""  # catalogue 32, 86
    assert find(registry, "/v1/metadata/m/_base/digits.txt", "") is artifact
    assert find(registry, path, "") is None


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/metadata/m/_base", True),
        ("/v1/metadata//_base", False),
        ("/v1/metadata/m", False),
        ("/v1/metadata/m/", False),
        ("/v1/metadata/m/_base/", False),
        ("/v1/metadata/m/_base//", False),
        ("/v1/metadata//m/_base", False),
        ("/v1/metadata/m//_base", False),
        ("/v1/metadata/m/_Base", False),
    ],
)
def test_card_has_the_path_of_its_model(registry: MetadataArtifactRegistry, path: str, found: bool) -> None:
    """Two segments after the route are a card's, without a slash behind them; it is JSON."""
    card = registry.register_card("m", "_base", "{}").artifacts[0]

    assert (find(registry, path, "") is card) is found
    assert find(registry, "/v1/metadata/m/_base", "blake3=" + "0" * 64) is None
    assert dict(card.fields)["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", True),
        (f"blake3={HEX}", True),
        (f"a=1&blake3={HEX}&b", True),
        ("a=1", True),
        ("xblake3=0", True),
        ("blake3", True),
        ("blake3=", False),
        ("blake3=" + "0" * 64, False),
        (f"blake3={HEX.upper()}", False),
        (f"blake3={HEX}0", False),
        (f"blake3={'0' * 64}&blake3={HEX}", False),
    ],
)
def test_digest_selects(
    artifact: Artifact, registry: MetadataArtifactRegistry, query: str, found: bool
) -> None:
    """`blake3` in the query must be the content's digest, to the letter; other parameters are ignored."""
    assert (find(registry, "/v1/metadata/m/_base/digits.txt", query) is artifact) is found


class Withdrawn:
    """A registry whose first look-up finds what is gone by the second."""

    def __init__(self, *found: Optional[Artifact]) -> None:
        self.found = list(found)

    def get(self, *key: object) -> Optional[Artifact]:
        """Return what is next."""
        return self.found.pop(0)


def test_content_that_another_process_withdrew(tmp_path: Path) -> None:
    """What is gone since the look-up is not found, what took its place is answered, the rest is an error."""
    path = tmp_path / "f.json"
    registry = MetadataArtifactRegistry(max_pinned_bytes=0)
    path.write_bytes(b"x" * 100_000)
    (held,) = registry.register("m", "_base", "f.json", path).artifacts
    (other,) = registry.register("m", "_base", "other", pin_bytes(b"{}")).artifacts
    path.write_bytes(b"changed")

    def status(*found: Optional[Artifact]) -> Optional[int]:
        registry: Any = Withdrawn(*found)
        answer = answer_registered(registry, "GET", f"{ROUTE}m/_base/f.json", "", {})
        return None if answer is None else answer.status

    assert (status(held, None), status(held, other), status(held, held)) == (None, 200, 500)
