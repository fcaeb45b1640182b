"""The index of what is registered: its form, its paging, who gets HTML, and that the page is safe to open."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import pytest
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from selfhost.card.checksum import Checksum
from selfhost.worker import index as module
from selfhost.worker.app import MetadataApp
from selfhost.worker.content import pin_bytes
from selfhost.worker.index import Index, list_models, prefers_html
from selfhost.worker.index_page import STYLE
from selfhost.worker.registry import MetadataArtifactRegistry

CHROMIUM = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
    "application/signed-exchange;v=b3;q=0.7"
)
BROWSER = {"accept": CHROMIUM}
HOSTILE = [
    '<script>alert("1").json',
    "\"><img src=x onerror='alert(1)'>",
    "&lt;b&gt;.json",
    "what?a=b#c.json",
    "\u202egnp.exe",
    "naïve 模型 🦙.json",
    "x" * 255,
]


def ask(index: Index, query: str = "", **headers: str) -> Any:
    """GET the index; header names with underscores."""
    return index.answer("GET", query, {name.replace("_", "-"): value for name, value in headers.items()})


def body(answer: Any) -> bytes:
    """Return the bytes that an answer brings."""
    return answer.content.read(answer.start, answer.stop)


def listed(index: Index, query: str = "") -> dict[str, Any]:
    """Return the JSON of one page."""
    return json.loads(body(ask(index, query)))


class Page(HTMLParser):
    """What a browser sees: tags with attributes, links, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        """Note a tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.texts.append(data)

    @property
    def links(self) -> list[str]:
        """Where the page leads."""
        return [attributes["href"] for tag, attributes in self.tags if tag == "a"]


@pytest.fixture
def index(registry: MetadataArtifactRegistry) -> Index:
    """Return the index of the test's registry."""
    return Index(registry)


# ------------------------------------------------------------------ the form


def test_form_of_the_json(registry: MetadataArtifactRegistry, index: Index) -> None:
    """The form that programs rely on, to the letter."""
    card = '{"display_name": "my/Model"}'
    for name, data in (("b.json", b"bb"), ("a.json", b"a"), ("b.json", b"b2")):
        registry.register("my_model", "_base", name, pin_bytes(data))
    registry.register_card("my_model", "_base", card)
    registry.register("my_model", "Lora", "a.json", pin_bytes(b"a"))

    def entry(name: str, path: str, data: bytes, query: str = "") -> dict[str, Any]:
        path = f"/v1/metadata/my_model/{path}{query}"
        return {"name": name, "path": path, "size": len(data), "digest": str(Checksum.of(data))}

    second = f"?blake3={Checksum.of(b'b2').hex}"
    assert listed(index) == {
        "models": [
            {
                "slug": "my_model",
                "suffix": "Lora",
                "name": None,
                "cards": [],
                "files": [entry("a.json", "Lora/a.json", b"a")],
            },
            {
                "slug": "my_model",
                "suffix": "_base",
                "name": "my/Model",
                "cards": [entry("my/Model", "_base", card.encode())],
                "files": [
                    entry("a.json", "_base/a.json", b"a"),
                    entry("b.json", "_base/b.json", b"bb"),
                    entry("b.json", "_base/b.json", b"b2", second),
                ],
            },
        ],
        "next": None,
    }


def test_nothing_is_an_empty_list(index: Index) -> None:
    """An empty registry has an index, too."""
    assert listed(index) == {"models": [], "next": None}
    assert "Nothing is registered." in Page(body(ask(index, **BROWSER)).decode()).texts


@pytest.mark.parametrize(
    "card",
    ["", "{", "[]", "null", '"x"', "{}", '{"display_name": 5}', "[" * 100_000, '{"display_name": null}'],
)
def test_card_that_does_not_say_its_name(registry: MetadataArtifactRegistry, index: Index, card: str) -> None:
    """Whatever was registered as a card is listed, without a name."""
    registry.register_card("m", "_base", card)

    assert listed(index)["models"][0]["name"] is None
    assert ask(index, **BROWSER).status == 200


def test_model_with_a_card_alone_is_listed(registry: MetadataArtifactRegistry, index: Index) -> None:
    """Some kinds of models have no files."""
    registry.register_card("m", "_base", '{"display_name": "m"}')

    assert [(model["name"], model["files"]) for model in listed(index)["models"]] == [("m", [])]


def test_every_path_is_served(registry: MetadataArtifactRegistry, index: Index) -> None:
    """What the index names can be looked up as it stands."""
    registry.register_files("", "_base", {name: pin_bytes(name.encode()) for name in HOSTILE})
    for text in ('{"display_name": "one"}', '{"display_name": "two"}'):
        registry.register_card("", "_base", text)
    (model,) = listed(index)["models"]

    assert len(model["files"]) == len(HOSTILE)
    assert [card["name"] for card in model["cards"]] == ["one", "two"]
    for entry in model["files"] + model["cards"]:
        artifact = registry.lookup(entry["path"])
        assert (str(artifact.content.checksum), artifact.content.size) == (entry["digest"], entry["size"])


# ------------------------------------------------------------------ pages


def test_pages_bring_every_model_once(registry: MetadataArtifactRegistry, index: Index) -> None:
    """Following `next` to its end lists everything in order, a hundred models at a time."""
    for number in range(200):
        registry.register(f"m{number % 3}/x".replace("/", "&"), f"lo ra-{number:03}", "f", pin_bytes(b"1"))
    seen, query, sizes = [], "", []
    while query is not None:
        page = listed(index, query)
        seen += [(model["slug"], model["suffix"]) for model in page["models"]]
        sizes.append(len(page["models"]))
        query = page["next"] and page["next"].partition("?")[2]

    assert seen == sorted(registry.keys())
    assert sizes == [100, 100]


def test_pages_lead_on_in_html(registry: MetadataArtifactRegistry, index: Index) -> None:
    """The page says which models it shows of how many, and links to the next."""
    for number in range(150):
        registry.register("m", f"{number:03}", "f", pin_bytes(b"1"))
    first = Page(body(ask(index, **BROWSER)).decode())
    assert first.links[-1] == "metadata?after=m/099"
    last = Page(body(ask(index, "after=m/099", **BROWSER)).decode())

    assert "Models 1 to 100 of 150" in first.texts
    assert "Models 101 to 150 of 150" in last.texts
    assert last.links[-1] == "metadata/m/149/f"


@pytest.mark.parametrize("query", ["after=", "after=%ff%00", "after=zzz", "after=/", "a=b", "&&", "after=m"])
def test_any_query_has_a_page(registry: MetadataArtifactRegistry, index: Index, query: str) -> None:
    """A key that is none only says where to begin."""
    registry.register("m", "_base", "f", pin_bytes(b"1"))

    assert len(listed(index, query)["models"]) == ("zzz" not in query and "%ff" not in query)


def test_page_is_built_once_for_a_state(
    registry: MetadataArtifactRegistry, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes go out until something changes; a change shows at the next request."""
    built: list[str] = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda kind, *more: built.append(kind) or build(kind, *more))
    registration = registry.register("m", "_base", "f", pin_bytes(b"1"))
    answers = [ask(index, **headers) for headers in ({}, BROWSER, {}, BROWSER)]
    assert len(built) == 2
    assert answers[0].content is answers[2].content
    registration.close()

    assert listed(index)["models"] == []
    assert len(built) == 3


def test_kept_pages_are_few(registry: MetadataArtifactRegistry, index: Index) -> None:
    """Clients that ask for ever other pages take no memory."""
    for number in range(200):
        ask(index, f"after={number}")

    assert len(index._pages) <= module.KEPT_PAGES


def test_index_keeps_no_content(registry: MetadataArtifactRegistry, index: Index) -> None:
    """What is unregistered after a page was built is freed at once."""
    content = pin_bytes(b"1")
    registry.register("m", "_base", "f", content)
    listed(index)
    registry.unregister("m", "_base")

    assert content.users == 0


def test_a_page_is_small_however_much_is_registered(registry: MetadataArtifactRegistry, index: Index) -> None:
    """A thousand adapters of six files cost what a hundred cost."""
    files = {f"{number}.json": pin_bytes(b"1") for number in range(6)}
    for number in range(1000):
        registry.register_files("m", f"{number:04}", files)

    assert len(list_models(registry).models) == module.PAGE_MODELS
    assert len(body(ask(index, **BROWSER))) < 400_000


# ------------------------------------------------------------------ which form, and the rules of HTTP


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (CHROMIUM, True),
        ("text/html", True),
        ("TEXT/HTML", True),
        ("text/*", True),
        ("text/html;q=0.9, application/json;q=0.8", True),
        ("text/html ; q=1.000 , */*;q=0.999", True),
        ("application/json;q=0, */*", True),
        ("", False),
        ("*/*", False),  # curl
        ("application/json", False),
        ("application/json, text/html", False),
        ("text/html, application/json", False),
        ("text/html;q=0.8, application/json", False),
        ("text/html;q=0", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=2", False),
        ("text/html;q=1.0000", False),
        ("text/html;q=", False),
        ("text/html;q=nan", False),
        ("text/plain", False),
        (",;,=;q", False),
        ("text/html" * 1000, False),
    ],
)
def test_html_is_for_who_prefers_it(accept: str, html: bool) -> None:
    """Weights, ranges and junk as RFC 9110 reads them; JSON wins a tie."""
    assert prefers_html(accept) is html


@pytest.mark.parametrize("headers", [{}, BROWSER])
def test_fields_of_the_index(
    registry: MetadataArtifactRegistry, index: Index, headers: dict[str, str]
) -> None:
    """A strong tag of the bytes, both forms told apart, nothing kept unasked; also with a 304."""
    registry.register("m", "_base", "f", pin_bytes(b"1"))
    answer = ask(index, **headers)
    fields = dict(answer.fields)
    again = ask(index, **headers, if_none_match=fields["ETag"])

    assert fields["ETag"] == f'"{Checksum.of(body(answer)).hex}"'
    assert fields["Content-Length"] == str(len(body(answer)))
    assert fields["Content-Type"] == ("text/html; charset=utf-8" if headers else "application/json")
    assert (fields["Vary"], fields["X-Content-Type-Options"]) == ("Accept", "nosniff")
    assert fields["Cache-Control"].startswith("no-cache")
    assert (again.status, dict(again.fields)["Vary"], again.content) == (304, "Accept", None)


# ------------------------------------------------------------------ the page


def test_page_may_do_nothing(registry: MetadataArtifactRegistry, index: Index) -> None:
    """No script, no style but the one that the policy names, nothing loaded, no form, no frame."""
    registry.register("m", "_base", "f", pin_bytes(b"1"))
    answer = ask(index, **BROWSER)
    policy = dict(answer.fields)["Content-Security-Policy"]
    page = body(answer).decode()
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()

    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert not {"script", "link", "img", "iframe", "form", "base", "object"} & {
        tag for tag, _ in Page(page).tags
    }
    assert not [
        a for _, attributes in Page(page).tags for a in attributes if a.startswith("on") or a == "style"
    ]
    assert "url(" not in STYLE
    assert "@import" not in STYLE


def test_page_shows_names_as_text(registry: MetadataArtifactRegistry, index: Index) -> None:
    """Names of files and models, whatever is in them, are text and isolated from what stands beside."""
    registry.register_files("m", "_base", {name: pin_bytes(name.encode()) for name in HOSTILE})
    for name in HOSTILE:
        registry.register_card("m", "_base", json.dumps({"display_name": f"</bdi>{name}\ud800"}))
    page = Page(body(ask(index, **BROWSER)).decode())
    plain = Page(body(ask(Index(MetadataArtifactRegistry()), **BROWSER)).decode())

    assert {tag for tag, _ in page.tags} - {tag for tag, _ in plain.tags} == {
        "section", "h2", "small", "bdi", "table", "thead", "tbody", "tr", "th", "td", "a", "code",
    }  # fmt: skip
    assert set(HOSTILE) <= set(page.texts)
    assert f"</bdi>{HOSTILE[0]}?" in page.texts


def test_page_has_the_whole_digest(registry: MetadataArtifactRegistry, index: Index) -> None:
    """What is cut short on the screen is there to be copied, and shown when pointed at."""
    registry.register("m", "_base", "f", pin_bytes(b"x" * 17_209_920))
    page = Page(body(ask(index, **BROWSER)).decode())
    digest = Checksum.of(b"x" * 17_209_920)

    assert digest.hex in page.texts
    assert ("code", {"title": str(digest)}) in page.tags
    assert {"16.4 MiB", "17,209,920"} <= set(page.texts)


@pytest.mark.parametrize("prefix", ["", "/any/where", "/v1/metadata/m/_base"])
def test_links_hold_under_any_prefix(registry: MetadataArtifactRegistry, prefix: str) -> None:
    """Mounted anywhere, each link of the page leads to what it names."""  # catalogue 88
    registry.register_files("m", "_base", {name: pin_bytes(name.encode()) for name in HOSTILE})
    registry.register_card("m", "_base", '{"display_name": "模型"}')
    app = MetadataApp(registry, index=True)
    client = Client(DispatcherMiddleware(NotFound(), {prefix: app}) if prefix else app)
    page = client.get(f"{prefix}/v1/metadata", headers={"Accept": CHROMIUM})
    links = [urljoin(f"{prefix}/v1/metadata", link) for link in Page(page.text).links]

    assert [client.get(link).text for link in links] == ['{"display_name": "模型"}', *sorted(HOSTILE)]


def test_link_of_a_model_without_slug(registry: MetadataArtifactRegistry, index: Index) -> None:
    """A browser keeps the empty segment of a relative link."""
    registry.register("", "_base", "f", pin_bytes(b"1"))

    assert Page(body(ask(index, **BROWSER)).decode()).links == ["metadata//_base/f"]
