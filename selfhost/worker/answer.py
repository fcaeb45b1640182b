"""A request for metadata -> the answer, as values; the rules of HTTP that the app and the server share.

Pure but for the registry look-up: no I/O, no server. Preconditions and ranges follow RFC 9110 sections 13
and 14 with one strong validator, the blake3 digest, and no dates: content has no time of its own, so the
date conditions are ignored as section 13.1.3 and 13.1.4 ask of a server without modification dates.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple, Optional, Protocol
from urllib.parse import unquote

from .content import Content

if TYPE_CHECKING:
    from .registry import Artifact, MetadataArtifactRegistry

INDEX = "/v1/metadata"  # the list of what is registered, where it is on
ROUTE = INDEX + "/"
_ENCODED_SLASH = re.compile("%2[Ff]")
CARD = ""  # in place of a filename, which is never empty: the model's card

Fields = tuple[tuple[str, str], ...]

# Our own table: the system's differs between replicas, and a template served as text/html is a script to
# a browser that opens it.
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_MEDIA_TYPES = {"json": _JSON, "txt": _TEXT, "md": _TEXT, "jinja": _TEXT}
_OTHER_MEDIA_TYPE = "application/octet-stream"

# no-cache: a URL without digest may be registered anew with other content. no-transform: no proxy's gzip.
_CACHE_CONTROL = ("Cache-Control", "no-cache, no-transform")
_NOSNIFF = ("X-Content-Type-Options", "nosniff")
_ACCEPT_RANGES = ("Accept-Ranges", "bytes")


class Headers(Protocol):
    """Request header fields: a dictionary with lower-case names, or Werkzeug's headers."""

    def __contains__(self, name: str, /) -> bool: ...

    def __getitem__(self, name: str, /) -> str: ...
    def get(self, name: str, default: str, /) -> str:
        """Return a field's value."""


class Found(Protocol):
    """What a path selects: an artifact, or the index page."""

    @property
    def content(self) -> Content:
        """The pinned bytes."""

    @property
    def fields(self) -> Fields:
        """The header fields of the 200."""


class Answer(NamedTuple):
    """Status, fields, and either a short text or the slice [start, stop) of pinned content.

    Content-Length is always among the fields, except with 304. An answer to HEAD has no body to send,
    whatever `body` and `content` hold: they say what a GET would have got.
    """

    status: int
    fields: Fields
    body: bytes = b""
    content: Optional[Content] = None
    start: int = 0
    stop: int = 0


def media_type(filename: str) -> str:
    """Return the Content-Type for a metadata file, by the last part of its name, or for a CARD."""
    if filename == CARD:
        return _JSON
    return _MEDIA_TYPES.get(filename.rpartition(".")[2].lower(), _OTHER_MEDIA_TYPE)


def hit_fields(filename: str, content: Content) -> Fields:
    """Return the fields of the 200 for a registered file or card."""
    return content_fields(media_type(filename), content)


def content_fields(media_type: str, content: Content) -> Fields:
    """Return the fields of the 200 for pinned content."""
    return (
        ("Content-Type", media_type),
        ("Content-Length", str(content.size)),
        ("ETag", f'"{content.hex}"'),
        _ACCEPT_RANGES,
        _CACHE_CONTROL,
        _NOSNIFF,
    )


def text_answer(status: int, text: str, *more: tuple[str, str]) -> Answer:
    """Return a short text as an answer, for what is not a registered file."""
    body = f"{text}\n".encode()
    return Answer(
        status, (("Content-Type", _TEXT), ("Content-Length", str(len(body))), _NOSNIFF, *more), body
    )


def json_answer(status: int, value: object) -> Answer:
    """Return a JSON value as an answer."""
    body = json.dumps(value).encode() + b"\n"
    fields = (
        ("Content-Type", _JSON),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    )
    return Answer(status, (*fields, _NOSNIFF), body)


def render_fields(fields: Fields) -> bytes:
    """Return header fields as they stand on the wire, without the empty line."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields]).encode("latin-1")


NOT_FOUND = text_answer(404, "Not found")
METHOD_NOT_ALLOWED = text_answer(405, "Only GET and HEAD are served here", ("Allow", "GET, HEAD"))
UNREADABLE = text_answer(500, "Failed to read file")
FAILED = text_answer(500, "Internal error")


# ------------------------------------------------------------------ look-up


def find(registry: MetadataArtifactRegistry, path: str, query: str) -> Optional[Artifact]:
    """Return what is registered under a percent-decoded path and a raw query string, or None.

    Two segments after the route mean a card, three a file, so no path is ever joined; the query's `blake3`
    selects one of several contents of one key. Other parameters are ignored.
    """
    if not path.startswith(ROUTE) or path.endswith("/"):
        return None
    segments = path[len(ROUTE) :].split("/")
    if len(segments) == 2:
        segments.append(CARD)
    if len(segments) != 3:
        return None
    slug, suffix, filename = segments
    return registry.get(slug, suffix, filename, _digest_parameter(query))


def _digest_parameter(query: str) -> Optional[str]:
    for parameter in query.split("&"):
        if parameter.startswith("blake3="):
            return parameter[len("blake3=") :]
    return None


def split_target(target: str) -> tuple[str, str]:
    """Split an origin-form request target into percent-decoded path and raw query.

    What is not UTF-8 becomes U+FFFD, as in Werkzeug's `get_path_info`: app and server read a path alike. An
    encoded slash belongs to its segment (RFC 3986 section 2.2); it becomes NUL, which no key has either.
    """
    path, _, query = target.partition("?")
    return unquote(_ENCODED_SLASH.sub("%00", path)), query


def has_encoded_slash(target: str) -> bool:
    """Tell whether there is one in the path of a raw request target, from the route on.

    A server has decoded it in an application's PATH_INFO, where it looks like one that separates segments.
    """
    return _ENCODED_SLASH.search(target.partition("?")[0].rpartition(INDEX)[2]) is not None


def is_metadata(path: str) -> bool:
    """Tell whether a percent-decoded path is the route or below it, however its slashes were encoded."""
    path = path.replace("\0", "/")
    return path == INDEX or path.startswith(ROUTE)


# ------------------------------------------------------------------ conditions and ranges


def answer_registered(
    registry: MetadataArtifactRegistry, method: str, path: str, query: str, headers: Headers
) -> Optional[Answer]:
    """Answer GET or HEAD for what is registered under a path, None where nothing is.

    Content that cannot be read may have been withdrawn by another process since the look-up: then that
    decides which now finds nothing, or something else.
    """
    artifact = find(registry, path, query)
    while artifact is not None:
        answer = answer_hit(method, artifact, headers)
        if answer is not UNREADABLE:
            return answer
        before, artifact = artifact, find(registry, path, query)
        if artifact is before:
            return UNREADABLE
    return None


def answer_hit(method: str, artifact: Found, headers: Headers) -> Answer:
    """Answer GET or HEAD for what was found."""
    content = artifact.content
    if not content.is_intact():
        return UNREADABLE
    etag = artifact.content.hex
    status = evaluate_preconditions(etag, headers)
    if status == 304:
        return Answer(304, (("ETag", f'"{etag}"'), _CACHE_CONTROL, _NOSNIFF))
    if status == 412:
        return text_answer(
            412, "The file has another digest than the request's If-Match", ("ETag", f'"{etag}"')
        )
    part = None
    if method == "GET" and "range" in headers and if_range_holds(etag, headers):
        part = parse_range(headers["range"], content.size)
    if part is None:
        return Answer(200, artifact.fields, content=content, stop=content.size)
    if part == UNSATISFIABLE:
        return text_answer(416, "No such range in the file", ("Content-Range", f"bytes */{content.size}"))
    return _partial(artifact, *part)


def _partial(artifact: Found, start: int, stop: int) -> Answer:
    fields: dict[str, str] = dict(artifact.fields)
    fields["Content-Length"] = str(stop - start)
    fields["Content-Range"] = f"bytes {start}-{stop - 1}/{artifact.content.size}"
    return Answer(206, tuple(fields.items()), content=artifact.content, start=start, stop=stop)


def evaluate_preconditions(etag: str, headers: Headers) -> int:
    """Return 200, 304 or 412 for a GET or HEAD (RFC 9110 section 13.2.2); `etag` without quotes."""
    if "if-match" in headers and not _matches(headers["if-match"], etag, weak=False):
        return 412
    if "if-none-match" in headers and _matches(headers["if-none-match"], etag, weak=True):
        return 304
    return 200


_ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')  # RFC 9110 section 8.8.3


def _matches(field: str, etag: str, *, weak: bool) -> bool:
    if field.strip() == "*":
        return True
    return any(tag == etag and (weak or not w) for w, tag in _ENTITY_TAG.findall(field))


def if_range_holds(etag: str, headers: Headers) -> bool:
    """Tell whether a range may be served: no If-Range, or exactly our tag (RFC 9110 section 13.1.5)."""
    return "if-range" not in headers or headers["if-range"].strip() == f'"{etag}"'


UNSATISFIABLE = (-1, -1)
_BYTES_UNIT = re.compile(r"\s*bytes\s*=(.*)", re.IGNORECASE | re.ASCII | re.DOTALL)
_RANGE_SPEC = re.compile(r"([0-9]*)-([0-9]*)")
_MAX_DIGITS = 19  # more than any file's size has: clamped, never converted


def parse_range(field: str, size: int) -> Optional[tuple[int, int]]:
    """Return [start, stop) for one range, `UNSATISFIABLE`, or None: send the whole (RFC 9110 section 14.2).

    Another unit, a malformed set, more than one range, and any range of an empty file give the whole.
    """
    unit = _BYTES_UNIT.fullmatch(field)
    if unit is None or size == 0:
        return None
    specs = [spec.strip(" \t") for spec in unit.group(1).split(",")]
    specs = [spec for spec in specs if spec]
    spec = _RANGE_SPEC.fullmatch(specs[0]) if len(specs) == 1 else None
    if spec is None or spec.group() == "-":
        return None
    first, last = (_position(digits) for digits in spec.groups())
    if first is None:  # the last so many bytes
        return (max(size - last, 0), size) if last else UNSATISFIABLE
    if last is not None and last < first:
        return None
    if first >= size:
        return UNSATISFIABLE
    return first, size if last is None else min(last + 1, size)


def _position(digits: str) -> Optional[int]:
    if not digits:
        return None
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= _MAX_DIGITS else int("9" * _MAX_DIGITS)
