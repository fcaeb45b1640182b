"""URLs: the vectors of the real wheel, and every rule of the parser in a table made with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfhost.card import url as urls
from selfhost.card.url import basename, is_url, normalize

VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "paths.jsonl").read_text("utf-8").splitlines()
]

# What the real wheel writes for each text; None where it takes the text for a path on a disk.
WRITTEN: list[tuple[str, Optional[str]]] = [
    ("http:h", "http://h/"),
    ("http:\\\\h\\a", "http://h/a"),
    ("HTTP://EX.com:80/", "http://ex.com/"),
    ("https://h:443", "https://h/"),
    ("https://h:80", "https://h:80/"),
    ("ftp://h:21/", "ftp://h/"),
    ("ws://h:80", "ws://h/"),
    ("wss://h:00443", "wss://h/"),
    ("http://h:", "http://h/"),
    ("http://h:0", "http://h:0/"),
    ("http://h:65535", "http://h:65535/"),
    ("http://h:65536", None),
    ("http://h:8a", None),
    ("http://h:-1", None),
    ("http://", None),
    ("http:", None),
    ("http://:80", None),
    ("http://@h", "http://h/"),
    ("http://u@h", "http://u@h/"),
    ("http://u:@h", "http://u@h/"),
    ("http://:p@h", "http://:p@h/"),
    ("http://u:p@h", "http://u:p@h/"),
    ("http://a@b@h", "http://a%40b@h/"),
    ("http://u;=/@h", "http://u;=/@h"),
    ("http://u;=@h", "http://u%3B%3D@h/"),
    ("http://u:p:q@h", "http://u:p%3Aq@h/"),
    ("http://@", None),
    ("http://u@/x", None),
    ("http://h", "http://h/"),
    ("http://h?q", "http://h/?q"),
    ("http://h#f", "http://h/#f"),
    ("http://h/a?b#c?d", "http://h/a?b#c?d"),
    ("http://h/#a#b", "http://h/#a#b"),
    ("http://%41b/", "http://ab/"),
    ("http://h%20x", None),
    ("http://h%2fx", None),
    ("http://a b/", None),
    ("http://a<b", None),
    ("http://a^b", None),
    ("http://a|b", None),
    ('http://a"b{}`', 'http://a"b{}`/'),
    ("http://h_-~!$&'()*+,;=.x/", "http://h_-~!$&'()*+,;=.x/"),
    ("http://1", "http://0.0.0.1/"),
    ("http://1.", "http://0.0.0.1/"),
    ("http://1.2.3", "http://1.2.0.3/"),
    ("http://0x7f.1", "http://127.0.0.1/"),
    ("http://0X7F.0.0.1", "http://127.0.0.1/"),
    ("http://0177.1", "http://127.0.0.1/"),
    ("http://256.1", None),
    ("http://1.256", "http://1.0.1.0/"),
    ("http://1.65536", "http://1.1.0.0/"),
    ("http://1.2.3.256", None),
    ("http://1.2.3.4.5", None),
    ("http://1.2.3.4.0", None),
    ("http://4294967295", "http://255.255.255.255/"),
    ("http://4294967296", None),
    ("http://08", None),
    ("http://0x", "http://0.0.0.0/"),
    ("http://0xg", "http://0xg/"),
    ("http://1..2", None),
    ("http://a.1", None),
    ("http://1.a", "http://1.a/"),
    ("http://1.2.3.4a", "http://1.2.3.4a/"),
    ("http://0x1.0x", "http://1.0.0.0/"),
    ("http://%31.%32", "http://1.0.0.2/"),
    ("http://[::]", "http://[::]/"),
    ("http://[::1]", "http://[::1]/"),
    ("http://[1::]", "http://[1::]/"),
    ("http://[1:0:0:2:0:0:0:3]", "http://[1:0:0:2::3]/"),
    ("http://[1:0:2:0:3:0:4:0]", "http://[1:0:2:0:3:0:4:0]/"),
    ("http://[0:0:1:1:0:0:1:1]", "http://[::1:1:0:0:1:1]/"),
    ("http://[10:0:5:0:0:1:1:1]", "http://[10:0:5::1:1:1]/"),
    ("http://[::ffff:1.2.3.4]", "http://[::ffff:102:304]/"),
    ("http://[1:2:3:4:5:6:1.2.3.4]", "http://[1:2:3:4:5:6:102:304]/"),
    ("http://[1:2:3:4:5:6:7:1.2.3.4]", None),
    ("http://[::1.2.3]", None),
    ("http://[::01.2.3.4]", None),
    ("http://[::256.0.0.0]", None),
    ("http://[1.2.3.4::]", None),
    ("http://[1:2:3:4:5:6:7::]", "http://[1:2:3:4:5:6:7:0]/"),
    ("http://[1:2:3:4:5:6:7:8::]", None),
    ("http://[1::2::3]", None),
    ("http://[:::]", None),
    ("http://[:1]", None),
    ("http://[1:]", None),
    ("http://[12345::]", None),
    ("http://[00A::B]", "http://[a::b]/"),
    ("http://[g::]", None),
    ("http://[::1", None),
    ("http://[::1]x", None),
    ("http://[fe80::1%25e]", None),
    ("http://[]", None),
    ("http://[::1]:81/", "http://[::1]:81/"),
    ("x://[::1]", "x://[::1]"),
    ("x://H", "x://H"),
    ("x://a b", None),
    ("x://a%b", "x://a%b"),
    ('x://a"b', 'x://a"b'),
    ("x://a^b", None),
    ("x://1.2", "x://1.2"),
    ("x://", "x://"),
    ("x:///", "x:///"),
    ("x://:80", None),
    ("x://u@", None),
    ("x://@", "x://"),
    ("x://:@/", "x:///"),
    ("x://u@h:80\\a", "x://u@h:80/\\a"),
    ("x:", "x:"),
    ("x:/", "x:/"),
    ("x://h", "x://h"),
    ("x://h/..", "x://h/"),
    ("x:/..//a", "x:/.//a"),
    ("x://h/a/C|/..", "x://h/a/C|/"),
    ("x://h/a/C:\\b/..", "x://h/a/C:\\b/"),
    ("x:a b", "x:a b"),
    ("x:a/../b", "x:a/../b"),
    ("x:a?q'#f", "x:a?q'#f"),
    ("data:,a  #f", "data:,a  #f"),
    ("mailto:a@b", "mailto:a@b"),
    ("urn:x:y", "urn:x:y"),
    ("a+b-.9:x", "a+b-.9:x"),
    ("1x:y", None),
    ("-x:y", None),
    (":x", None),
    ("x", None),
    ("C:", "c:"),
    ("c:/x", "c:/x"),
    ("C:\\x y", "c:\\x y"),
    ("http://h/%7e%7E~", "http://h/%7e%7E~"),
    ("http://h/a%2e", "http://h/a%2e"),
    ("http://h/%2e%2E/a", "http://h/a"),
    ("http://h/.%2e/a", "http://h/a"),
    ("http://h/a/%2e/b", "http://h/a/b"),
    ("http://h/a/..", "http://h/"),
    ("http://h/a/.", "http://h/a/"),
    ("http://h//a//", "http://h//a//"),
    ("http://h/a/../../b", "http://h/b"),
    ('http://h/^\\`{}|<>"', "http://h/^/%60%7B%7D|%3C%3E%22"),
    ("http://h/?^`{}<>\"'", "http://h/?^`{}%3C%3E%22%27"),
    ("x://h/?'", "x://h/?'"),
    ("http://h/#^`{}<>\"'", "http://h/#^%60{}%3C%3E%22'"),
    ("http://h/%zz%", "http://h/%zz%"),
    ("http://h/\u007f", "http://h/%7F"),
    ("file:", "file:///"),
    ("file:a", "file:///a"),
    ("file:/a", "file:///a"),
    ("file:///", "file:///"),
    ("file:////a", "file:///a"),
    ("file://h/a", "file://h/a"),
    ("file://LOCALHOST/a", "file:///a"),
    ("file://h:80/a", None),
    ("file://u@h/", None),
    ("file:c|/x", "file:///c:/x"),
    ("file:///C|/x", "file:///C|/x"),
    ("file:/C|/../..", "file:///C:/"),
    ("file://C:/x", "file:///C:/x"),
    ("file://h/C:/x", "file:///C:/x"),
    ("file:///a/C:/..", "file:///a/C:/"),
    ("file:\\\\h\\a", "file://h/a"),
    ("file:///?q#f", "file:///?q#f"),
    ("  http://h/a\t\n\r b  ", "http://h/a%20b"),
    ("ht\ttp://h", "http://h/"),
    ("\u0000http://h\u001f", "http://h/"),
    ("http\n://h", "http://h/"),
    ("http://\u00e9/", "http://xn--9ca/"),
    ("http://\u00c9COLE.fr/", "http://xn--cole-9oa.fr/"),
    ("http://a\u3002b/", "http://a.b/"),
    ("http://xn--/", None),
    ("http://xn--a/", None),
    ("http://xn--bcher-kva/", "http://xn--bcher-kva/"),
    ("http://\u00ad/", None),
    ("http://a\u00adb/", "http://ab/"),
    ("http://%ff/", None),
    ("http://%c3%a9/", "http://xn--9ca/"),
    ("x://\u00e9/", "x://%C3%A9/"),
]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: ascii(vector["path"])[:40])
def test_wheels_vectors(vector: dict[str, Any]) -> None:
    """What is a URL, how it is written and what its basename is agree with the real wheel."""
    path = vector["path"]

    assert is_url(path) == vector["is_url"]
    assert (normalize(path) or path) == vector["wire"]
    assert basename(path) == vector["basename"]


@pytest.mark.parametrize(("text", "written"), WRITTEN, ids=lambda value: ascii(value)[:40])
def test_texts_are_written_as_the_wheel_writes_them(text: str, written: Optional[str]) -> None:
    """Hosts, ports, dot segments, encode sets, files and the crate's own ways, one by one."""
    assert normalize(text) == written


@pytest.mark.parametrize("written", [written for _, written in WRITTEN if written is not None])
def test_written_form_is_stable(written: str) -> None:
    """What was written once is read and written unchanged."""
    assert normalize(written) == written


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/..", None),
        ("/x/../", None),
        ("/x//y//", "y"),
        ("a/./.", "a"),
        (".", None),
        ("./..a", "..a"),
        ("", None),
        ("http://h/a%2Fb?c/d#e/f", "a%2Fb"),
        ("http://h/a/.", "a"),
        ("http://h/a/..", None),
        ("http://h//", None),
        ("x:", None),
        ("x:a/b/", "b"),
        ("x:..", ".."),
        ("C:\\m", "\\m"),
    ],
)
def test_basename_of_paths_and_urls(path: str, name: Optional[str]) -> None:
    """The last component of a path, the last non-empty segment of a URL, undecoded."""
    assert basename(path) == name


@pytest.mark.parametrize("text", ["http://h/\ud800", "x:\udc80", "\ud800"])
def test_half_a_surrogate_pair_is_no_url(text: str) -> None:
    """Text that JSON cannot carry stays a path on this disk."""
    assert normalize(text) is None


PIECES = ["http", "file", "x", *":/\\?#@[]%| \t1", "//", "..", "%2e", "C:", "0x", "xn--"]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join))
def test_any_text_is_answered(text: str) -> None:
    """No text makes the parser raise, and a special URL that it wrote reads back as itself."""
    written = normalize(text)

    assert is_url(text) == (written is not None)
    if written is not None and written.startswith(("http:", "file:")):
        assert normalize(written) == written
    assert basename(text) is None or basename(text)


def test_plain_urls_are_parsed_as_the_full_parser_would() -> None:
    """The short cut for what workers publish gives what the full parser gives, wherever it is taken."""
    draw = random.Random(5)
    hosts = ("h", "a.b", "127.0.0.1", "1.2.3", "256.1.1.1", "x-1.y", "xn--a.b")
    pieces = (
        "a",
        "B.json",
        ".",
        "..",
        "%2e",
        "%41",
        "%zz",
        "/",
        "//",
        "~",
        "?blake3=ab",
        "#",
        " ",
        "é",
        "\\",
        "@",
    )
    taken = 0
    for _ in range(5000):
        tail = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 6)))
        scheme, port = draw.choice(("http", "https")), draw.choice((80, 123, 443, 8080, 90000))
        text = f"{scheme}://{draw.choice(hosts)}:{port}/{tail}"
        taken += urls._PLAIN.fullmatch(text) is not None
        assert urls.parse(text) == urls._parse_any(text), text

    assert taken > 100
