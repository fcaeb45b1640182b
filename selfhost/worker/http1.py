"""Strict HTTP/1.1 request heads for GET and HEAD (RFC 9112); bytes in, a value or a fault out, no I/O.

A head is accepted only in the one form that every server and proxy reads the same way. Bare LF, folded
lines, white space before a colon, repeated Content-Length or Host, a body on a GET: each is refused, and
the connection is closed after the refusal, so nothing that follows can be taken for another request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Optional

MAX_FIELDS = 100

# RFC 9110 section 5.6.2 (token) and 5.5 (field-value, without the line folding that 9112 5.2 deprecates).
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# A value starts with no white space: if it could, a head full of blanks would take a second to refuse.
_VALUE = rb"(?:[\x21-\x7e\x80-\xff][\t\x20-\x7e\x80-\xff]*)?"
# No `#`: a fragment is not sent (RFC 9112 section 3.2), and servers differ in what they make of one.
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!\"$-~]+) HTTP/([0-9])\.([0-9])\r\n")
_METHOD = re.compile(_TOKEN)
_FIELD_LINE = re.compile(rb"(" + _TOKEN + rb"):[ \t]*(" + _VALUE + rb")\r\n")
_ABSOLUTE_FORM = re.compile(r"https?://[^/?@]+(?=[/?]|$)", re.IGNORECASE)  # RFC 9112 section 3.2.2
_HOST = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")  # RFC 9110 section 7.2: uri-host [ ":" port ]


class BadRequest(Exception):
    """The client's fault: answer with `status`, say `reason`, close the connection."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Request(NamedTuple):
    """One request head. `target` is the origin-form as sent; field names are lower case."""

    method: str
    target: str
    http_1_0: bool
    keep_alive: bool
    fields: Mapping[str, str]
    is_plain: bool  # an HTTP/1.1 GET that asks for no range and sets no condition


_CONDITIONS = ("range", "if-match", "if-none-match")


def fault_so_far(data: bytes, max_head_bytes: int) -> Optional[BadRequest]:
    """Return what is wrong with the first part of a head, None if its rest may make it a good one.

    What begins as no method does is refused at once: a TLS client would wait for an answer to its greeting.
    """
    if data and not _METHOD.match(data[:1]):
        return BadRequest(400, "malformed request line")
    return too_large(max_head_bytes) if len(data) > max_head_bytes else None


def too_large(max_head_bytes: int) -> BadRequest:
    """Return the refusal of a head that is larger."""
    return BadRequest(431, f"request head larger than {max_head_bytes} bytes")


def parse_head(head: bytes) -> Request:
    """Parse a request head that ends with its empty line, or raise `BadRequest`."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise BadRequest(400, "malformed request line")
    method, target, major, minor = line.groups()
    if major != b"1":
        raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    fields = _parse_fields(head, line.end())
    http_1_0 = minor == b"0"
    _check_host(fields, required=not http_1_0)
    if method not in (b"GET", b"HEAD"):
        raise BadRequest(405, "only GET and HEAD are served here")
    _refuse_body(fields)
    keep_alive = _wants_keep_alive(fields, http_1_0=http_1_0)
    plain = method == b"GET" and not http_1_0 and not any(c in fields for c in _CONDITIONS)
    return Request(method.decode(), _origin_form(target.decode()), http_1_0, keep_alive, fields, plain)


def _parse_fields(head: bytes, position: int) -> dict[str, str]:
    fields: dict[str, str] = {}
    for _ in range(MAX_FIELDS + 1):
        line = _FIELD_LINE.match(head, position)
        if line is None:
            break
        position = line.end()
        name = line.group(1).decode().lower()
        value = line.group(2).decode("latin-1").rstrip(" \t")
        if name in fields:
            if name in ("host", "content-length", "transfer-encoding"):
                raise BadRequest(400, f"repeated {name} field")
            value = f"{fields[name]}, {value}"  # RFC 9110 section 5.3
        fields[name] = value
    else:
        raise BadRequest(431, f"more than {MAX_FIELDS} header fields")
    if head[position:] != b"\r\n":
        raise BadRequest(400, "malformed header field")
    return fields


def _check_host(fields: Mapping[str, str], *, required: bool) -> None:
    host = fields.get("host")
    if host is None:
        if required:
            raise BadRequest(400, "HTTP/1.1 request without a Host field")
    elif not _HOST.fullmatch(host):
        raise BadRequest(400, "malformed Host field")


def _refuse_body(fields: Mapping[str, str]) -> None:
    if "transfer-encoding" in fields or fields.get("content-length", "0") != "0":
        raise BadRequest(400, "a GET or HEAD request with a body")


def _wants_keep_alive(fields: Mapping[str, str], *, http_1_0: bool) -> bool:
    options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
    if "close" in options:
        return False
    return not http_1_0 or "keep-alive" in options


def _origin_form(target: str) -> str:
    if target.startswith("/"):
        return target
    absolute = _ABSOLUTE_FORM.match(target)
    if absolute is None:
        raise BadRequest(400, "malformed request target")
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else "/" + rest
