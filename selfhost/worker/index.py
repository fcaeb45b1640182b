"""Index: what is registered, as JSON for programs and as a page without scripts for people.

    {"models": [{"slug": "m", "suffix": "_base", "name": "my/model", "cards": [...], "files": [...]}],
     "next": null}

`name` is the display name in the model's card, null where it has none. Cards and files are lists of
{"name", "path", "size", "digest"}: `path` is what follows the base URL, as in a model's card, `size` is in
bytes, `digest` is "blake3:<hex>". Models are sorted by slug and suffix, the rest by name; several contents
under one name stand side by side, each with the path that selects it. Fields may be added, none goes.

A hundred models make a page, and `next` is the path of the one that follows, null on the last: so a request
costs a few milliseconds, however much is registered. A page is built when it is asked for, kept until
something registered changes, and pinned like a file: its ETag, conditions and ranges are those of a file.

Sharing: any number of threads; two that ask at once may both build.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple, Optional
from urllib.parse import quote, unquote

from .answer import CARD, INDEX, Answer, Fields, Headers, answer_hit, content_fields
from .content import Content, pin_bytes
from .registry import Artifact, MetadataArtifactRegistry

JSON = "application/json"
HTML = "text/html; charset=utf-8"
PAGE_MODELS = 100
KEPT_PAGES = 16
_Key = tuple[str, str]  # slug and suffix
_FIRST = ("", "")  # no model has this key, which stands before all
_AFTER = "after="  # in the query: the slug and suffix of the last model of the page before


class Entry(NamedTuple):
    """One card or file as the index shows it; `size` in bytes."""

    name: Optional[str]  # of a card: what the model is called, None if it does not say
    path: str
    size: int
    digest: str


class Model(NamedTuple):
    """What is registered under one (slug, suffix)."""

    slug: str
    suffix: str
    name: Optional[str]
    cards: list[Entry]
    files: list[Entry]


class Listing(NamedTuple):
    """Some models out of `total`, the first of them at `start`; `following` is the path of the next page."""

    models: list[Model]
    start: int
    total: int
    following: Optional[str]


class Index:
    """Lists a registry; see the module's docstring for the form."""

    def __init__(self, registry: MetadataArtifactRegistry) -> None:
        self._registry = registry
        self._pages: dict[tuple[str, _Key], _Page] = {}  # by media type and the key before the first model

    def answer(self, method: str, query: str, headers: Headers) -> Answer:
        """Answer GET or HEAD for the index: as HTML to whoever prefers that, else as JSON."""
        accept = headers.get("accept", "")
        page = self._page(HTML if prefers_html(accept) else JSON, _after(query))
        answer = answer_hit(method, page, headers)
        return answer._replace(fields=(*answer.fields, *page.more))

    def _page(self, media_type: str, after: _Key) -> _Page:
        version = self._registry.version  # before reading: what changes meanwhile makes the page old
        page = self._pages.get((media_type, after))
        if page is None or page.version != version:
            page = _build(media_type, list_models(self._registry, after), version)
            if len(self._pages) >= KEPT_PAGES:
                self._pages.clear()
            self._pages[media_type, after] = page
        return page


class _Page(NamedTuple):
    version: int
    content: Content
    fields: Fields
    more: Fields  # in every answer about this page, whatever its status


def _build(media_type: str, listing: Listing, version: int) -> _Page:
    more: Fields = (("Vary", "Accept"),)
    if media_type == JSON:
        content = pin_bytes(render_json(listing))
    else:
        from . import index_page  # for whoever looks at one

        content = pin_bytes(index_page.render(listing))
        more += index_page.security_fields()
    return _Page(version, content, content_fields(media_type, content), more)


def render_json(listing: Listing) -> bytes:
    """Return the JSON text, one model a line."""
    models = b",\n".join(map(_model_json, listing.models))
    return b'{"models": [\n%s\n], "next": %s}\n' % (models, json.dumps(listing.following).encode())


def _model_json(model: Model) -> bytes:
    lists = {"cards": model.cards, "files": model.files}
    entries = {name: [entry._asdict() for entry in entries] for name, entries in lists.items()}
    return json.dumps({**model._asdict(), **entries}).encode()


# ------------------------------------------------------------------ what is there


def list_models(registry: MetadataArtifactRegistry, after: _Key = _FIRST) -> Listing:
    """Return the models that follow the key `after`, as they are now; PAGE_MODELS of them at most."""
    keys = sorted(registry.keys())
    start = bisect_right(keys, after)
    stop = start + PAGE_MODELS
    models = [_model(*key, registry.model(*key)) for key in keys[start:stop]]
    models = [model for model in models if model.cards or model.files]  # else it has gone since
    return Listing(models, start, len(keys), _page_after(*keys[stop - 1]) if stop < len(keys) else None)


def _page_after(slug: str, suffix: str) -> str:
    return f"{INDEX}?{_AFTER}{quote(slug, safe='')}/{quote(suffix, safe='')}"


def _after(query: str) -> _Key:
    """Return the key that the query names, else the first."""
    given = next((p[len(_AFTER) :] for p in query.split("&") if p.startswith(_AFTER)), "")
    slug, _, suffix = given.partition("/")
    return unquote(slug), unquote(suffix)


def _model(slug: str, suffix: str, artifacts: Iterable[Artifact]) -> Model:
    cards, files = [], []
    for artifact in artifacts:
        if artifact.filename == CARD:
            cards.append(_entry(_display_name(artifact.content), artifact))
        else:
            files.append(_entry(artifact.filename, artifact))
    files.sort()
    return Model(slug, suffix, cards[0].name if cards else None, cards, files)


def _entry(name: Optional[str], artifact: Artifact) -> Entry:
    content = artifact.content
    return Entry(name, artifact.target, content.size, f"blake3:{content.hex}")


def _display_name(card: Content) -> Optional[str]:
    """Return what a card calls its model; whoever registered it may have given us any text."""
    try:
        name = json.loads(card.read(0, card.size))["display_name"]
    except (ValueError, TypeError, LookupError, RecursionError, OSError):
        return None
    return name if isinstance(name, str) else None


# ------------------------------------------------------------------ which form

_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # RFC 9110 section 12.4.2


def prefers_html(accept: str) -> bool:
    """Tell whether an Accept field puts HTML above JSON (RFC 9110 section 12.5.1), as browsers' do."""
    weights: dict[str, float] = {}
    for item in accept.split(","):
        media_range, *parameters = (part.strip(" \t").lower() for part in item.split(";"))
        q = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        weights[media_range] = float(q) if _WEIGHT.fullmatch(q) else 0.0
    return _weight("text/html", weights) > _weight(JSON, weights)


def _weight(media_type: str, weights: dict[str, float]) -> float:
    """Return the weight of the most specific range that covers a media type."""
    whole_type = media_type.partition("/")[0] + "/*"
    return next((weights[r] for r in (media_type, whole_type, "*/*") if r in weights), 0.0)
