"""URLs as the WHATWG standard parses and writes them, so that cards read here as they do in Dynamo.

Dynamo (1.6.1, Rust's `url` crate) takes the `path` of a file for a URL if this parser accepts it, rewrites it
in normalised form, and hashes its last segment into the model's checksum; all three must agree.
The functions are named after the states of https://url.spec.whatwg.org/#url-parsing, without a base URL.
International host names are best effort: mapped by NFKC and lower case instead of the full UTS 46 table.
Pure functions on text; nothing is opened, resolved or cached.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn, Optional

# The special schemes, each with its default port.
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "ftp": 21, "file": None}

_C0_AND_SPACE = "".join(map(chr, range(0x21)))
_TABS_AND_NEWLINES = {ord(char): None for char in "\t\n\r"}

# What workers publish, already in its written form: it stays as it is, at a tenth of the full parser's cost.
_OCTET = "(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_LABEL = "(?!xn--)[a-z][a-z0-9-]*"
_PLAIN = re.compile(
    rf"(https?)://({_OCTET}(?:\.{_OCTET}){{3}}|{_LABEL}(?:\.{_LABEL})*):([1-9][0-9]{{2,4}})"
    r"((?:/(?:(?:[A-Za-z0-9_~-]|%(?!2[eE])[0-9A-F]{2})(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})*)?)+)"
    r"(?:\?([A-Za-z0-9._=&-]*))?"
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

# The percent-encode sets, each on top of C0 controls and everything from U+007F on.
_OPAQUE: frozenset[str] = frozenset()
_FRAGMENT = frozenset(' "<>`')
_QUERY = frozenset(' "#<>')
_SPECIAL_QUERY = _QUERY | {"'"}
_PATH = _QUERY | frozenset("?`{}")
_USERINFO = _PATH | frozenset("/:;=@[\\]^|")

_FORBIDDEN_IN_HOST = frozenset("\0\t\n\r #/:<>?@[\\]^|")
_FORBIDDEN_IN_DOMAIN = _FORBIDDEN_IN_HOST | frozenset(map(chr, range(0x20))) | {"%", "\x7f"}
_DIGITS = "0123456789abcdef"


class Url(NamedTuple):
    """A parsed URL, every part in its written form; `host` None means that there is no `//` part."""

    scheme: str
    userinfo: str  # "", "user", "user:password" or ":password"
    host: Optional[str]
    port: Optional[int]  # None: the scheme's own
    path: str
    query: Optional[str]
    fragment: Optional[str]

    def __str__(self) -> str:
        authority = ""
        if self.host is not None:
            userinfo = f"{self.userinfo}@" if self.userinfo else ""
            port = "" if self.port is None else f":{self.port}"
            authority = f"//{userinfo}{self.host}{port}"
        elif self.path.startswith("//"):
            authority = "/."  # else the path would be read as a host
        query = "" if self.query is None else f"?{self.query}"
        fragment = "" if self.fragment is None else f"#{self.fragment}"
        return f"{self.scheme}:{authority}{self.path}{query}{fragment}"


class _NoUrl(Exception):
    """The text is no URL."""


def normalize(text: str) -> Optional[str]:
    """Return the URL as the standard writes it, None if `text` is no URL."""
    url = parse(text)
    return None if url is None else str(url)


def is_url(text: str) -> bool:
    """Whether `text` is an absolute URL to the WHATWG parser."""
    return parse(text) is not None


def basename(path: str) -> Optional[str]:
    """Return the last component of a disk path, or the last non-empty segment of a URL, or None.

    A URL's is not percent-decoded. `..` and the root have none.
    """
    url = parse(path)
    if url is not None:
        return next((segment for segment in reversed(url.path.split("/")) if segment), None)
    names = [name for name in path.split("/") if name not in ("", ".")]
    return names[-1] if names and names[-1] != ".." else None


def parse(text: str) -> Optional[Url]:
    """Return the parsed absolute URL, None if `text` is none."""
    if text.startswith("/"):  # nearly every disk path
        return None
    plain = _PLAIN.fullmatch(text)
    if plain is not None and plain[3] != "443" and int(plain[3]) <= 65535:
        return Url(plain[1], "", plain[2], int(plain[3]), plain[4], plain[5], None)
    return _parse_any(text)


def _parse_any(text: str) -> Optional[Url]:
    text = text.strip(_C0_AND_SPACE).translate(_TABS_AND_NEWLINES)
    match = _SCHEME.match(text)
    if match is None or not _is_unicode(text):
        return None
    try:
        return _scheme_state(match[1].lower(), text[match.end() :])
    except _NoUrl:
        return None


def _is_unicode(text: str) -> bool:
    """Whether there is no lone surrogate, which JSON cannot carry and Rust cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _scheme_state(scheme: str, rest: str) -> Url:
    special = scheme in _DEFAULT_PORTS
    if rest == "//@" and not special:
        rest = "//"  # the crate refuses an empty host behind "@", but not at the very end
    rest, hash_mark, fragment = rest.partition("#")
    rest, question_mark, query = rest.partition("?")
    userinfo, port = "", None
    host: Optional[str] = None
    if special:
        rest = rest.replace("\\", "/")
    if scheme == "file":
        host, path = _file_state(rest)
    elif special:
        userinfo, host, port, path = _authority_state(scheme, rest.lstrip("/"))
    elif rest.startswith("//"):
        userinfo, host, port, path = _authority_state(scheme, rest[2:])
    elif rest.startswith("/"):
        path = _path_state(scheme, rest)
    else:
        path = _encode(rest, _OPAQUE)
    return Url(
        scheme, userinfo, host, port, path,
        _encode(query, _SPECIAL_QUERY if special else _QUERY) if question_mark else None,
        _encode(fragment, _FRAGMENT) if hash_mark else None,
    )  # fmt: skip


def _authority_state(scheme: str, rest: str) -> tuple[str, str, Optional[int], str]:
    """Return userinfo, host, port and path of what follows `//`."""
    special = scheme in _DEFAULT_PORTS
    authority, slash, path = rest.partition("/")
    credentials, at_sign, address = authority.rpartition("@")
    host_text, port_text = _split_port(address)
    no_host_is_wrong = special or port_text is not None or (at_sign and credentials != ":")  # ":": the crate
    if not host_text and no_host_is_wrong:
        raise _NoUrl
    host = _host(host_text, special=special) if host_text else ""
    digits, backslash, in_path = (port_text or "").partition("\\")  # the crate ends a port there
    path = f"/{backslash}{in_path}{slash}{path}" if backslash else slash + path
    return _userinfo(credentials), host, _port_state(scheme, digits), _path_state(scheme, path)


def _userinfo(credentials: str) -> str:
    user, _, password = credentials.partition(":")
    text = _encode(user, _USERINFO)
    return f"{text}:{_encode(password, _USERINFO)}" if password else text


def _split_port(address: str) -> tuple[str, Optional[str]]:
    """Split at the first colon outside of brackets; None where there is no colon."""
    start = address.find("]") if address.startswith("[") else 0
    colon = address.find(":", max(start, 0))
    return (address, None) if colon < 0 else (address[:colon], address[colon + 1 :])


def _port_state(scheme: str, text: str) -> Optional[int]:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or len(text.lstrip("0")) > 5:
        raise _NoUrl
    port = int(text)
    if port > 0xFFFF:
        raise _NoUrl
    return None if port == _DEFAULT_PORTS.get(scheme) else port


def _file_state(rest: str) -> tuple[str, str]:
    """Return host and path of what follows `file:`."""
    host = ""
    if rest.startswith("//"):
        text, slash, path = rest[2:].partition("/")
        if _is_drive_letter(text):
            rest = rest[1:]
        else:
            host = _host(text, special=True) if text else ""
            host = "" if host == "localhost" else host
            rest = slash + path if host else f"/{slash}{path}"
    path = _path_state("file", rest)
    if _is_drive_letter(path[1:].partition("/")[0]):
        host = ""
    return host, "/" + path.lstrip("/")  # the crate drops empty segments in front, also that of `file:///`


def _path_state(scheme: str, rest: str) -> str:
    if not rest:
        return "/" if scheme in _DEFAULT_PORTS else ""
    written: list[str] = []
    for segment in (rest[1:] if rest.startswith("/") else rest).split("/"):
        dots = segment.lower().replace("%2e", ".")
        if dots == ".." and written and not _is_drive_letter(written[-1].partition("\\")[0]):
            written.pop()  # the crate spares drive letters under any scheme
        if dots in (".", ".."):
            continue
        if scheme == "file" and not written and _is_drive_letter(segment):
            segment = segment[0] + ":"
        written.append(_encode(segment, _PATH))
    if dots in (".", ".."):
        written.append("")
    return "/" + "/".join(written)


def _is_drive_letter(text: str) -> bool:
    return len(text) == 2 and text[1] in ":|" and text[0].isascii() and text[0].isalpha()


def _host(text: str, *, special: bool) -> str:
    if text.startswith("["):
        return f"[{_ipv6(text[1:-1])}]" if text.endswith("]") else _fail()
    if not special:
        return _encode(text, _OPAQUE) if _FORBIDDEN_IN_HOST.isdisjoint(text) else _fail()
    domain = _domain_to_ascii(_percent_decode(text))
    if not domain or not _FORBIDDEN_IN_DOMAIN.isdisjoint(domain):
        raise _NoUrl
    labels = domain.split(".")
    if len(labels) > 1 and not labels[-1]:
        labels.pop()
    last = labels[-1]
    is_number = last[:1].isdigit() and re.fullmatch("[0-9]+|0x[0-9a-f]*", last)
    return _ipv4(labels) if is_number else domain


def _domain_to_ascii(text: str) -> str:
    """Return the domain in lower-case ASCII; see the module's docstring for what this does not do."""
    domain = text.lower() if text.isascii() else _mapped(text)
    if domain.isascii() and "xn--" not in domain:
        return domain
    return ".".join(map(_label_to_ascii, domain.split(".")))


def _mapped(text: str) -> str:
    from unicodedata import normalize as unicode_form

    visible = re.sub("[\u00ad\u200b\u2060\ufe00-\ufe0f\ufeff]", "", text)
    dotted = re.sub("[\u3002\uff0e\uff61]", ".", visible)
    return unicode_form("NFKC", unicode_form("NFKC", dotted).lower())


def _label_to_ascii(label: str) -> str:
    """Return the label in ASCII; an encoded one must decode to something that encodes to it."""
    try:
        if not label.isascii():
            _require_letters(label)
            return "xn--" + label.encode("punycode").decode()
        if label.startswith("xn--"):
            decoded = label[4:].encode().decode("punycode")
            _require_letters(decoded)
            if decoded.isascii() or _label_to_ascii(_mapped(decoded)) != label:
                raise _NoUrl
    except UnicodeError:
        raise _NoUrl from None
    return label


def _require_letters(label: str) -> None:
    from unicodedata import category

    kinds = {category(char)[0] for char in label if not char.isascii()}
    odd = not kinds or not kinds.isdisjoint("CZ") or category(label[0])[0] == "M" or "\ufffd" in label
    if odd or label.startswith("xn--"):
        raise _NoUrl


def _ipv4(labels: list[str]) -> str:
    if len(labels) > 4:
        raise _NoUrl
    *front, last = [_ipv4_number(label) for label in labels]
    if any(number > 255 for number in front) or last >= 256 ** (5 - len(labels)):
        raise _NoUrl
    address = last + sum(number << (24 - 8 * index) for index, number in enumerate(front))
    return ".".join(str(byte) for byte in address.to_bytes(4, "big"))


def _ipv4_number(label: str) -> int:
    digits, base = label, 10
    if label.startswith("0x"):
        digits, base = label[2:] or "0", 16
    elif len(label) > 1 and label.startswith("0"):
        digits, base = label[1:], 8
    if not digits or len(digits.lstrip("0")) > 11 or not set(digits) <= set(_DIGITS[:base]):
        raise _NoUrl
    return int(digits, base)


def _ipv6(text: str) -> str:
    head, gap, tail = text.partition("::")
    front = _ipv6_pieces(head, last=not gap) if head or not gap else []
    back = _ipv6_pieces(tail, last=True) if tail else []
    missing = 8 - len(front) - len(back)
    if missing < 1 if gap else missing:
        raise _NoUrl
    return _write_ipv6([*front, *[0] * missing, *back])


def _ipv6_pieces(text: str, *, last: bool) -> list[int]:
    *groups, end = text.split(":")
    pieces = []
    if last and "." in end:
        octets = end.split(".")
        if len(octets) != 4 or not all(re.fullmatch("0|[1-9][0-9]{0,2}", octet) for octet in octets):
            raise _NoUrl
        a, b, c, d = map(int, octets)
        if max(a, b, c, d) > 255:
            raise _NoUrl
        pieces = [a << 8 | b, c << 8 | d]
    else:
        groups.append(end)
    if not all(re.fullmatch("[0-9A-Fa-f]{1,4}", group) for group in groups):
        raise _NoUrl
    return [int(group, 16) for group in groups] + pieces


def _write_ipv6(pieces: list[int]) -> str:
    """Write the pieces with the first of the longest runs of two and more zeros as `::`."""
    text = ":".join(f"{piece:x}" for piece in pieces)
    runs = [match.span() for match in re.finditer(r"\b0(?::0)+\b", text)]
    if not runs:
        return text
    start, end = max(runs, key=lambda span: span[1] - span[0])
    return f"{text[:start].rstrip(':')}::{text[end:].lstrip(':')}"


def _percent_decode(text: str) -> str:
    if "%" not in text:
        return text
    raw = re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    return raw.decode(errors="replace")


def _encode(text: str, unsafe: frozenset[str]) -> str:
    if text.isascii() and text.isprintable() and unsafe.isdisjoint(text):
        return text
    return "".join(
        char if char.isascii() and char.isprintable() and char not in unsafe else _percent(char)
        for char in text
    )


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode())


def _fail() -> NoReturn:
    raise _NoUrl
