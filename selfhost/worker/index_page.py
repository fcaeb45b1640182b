"""The index as HTML: one page, no script, nothing loaded from elsewhere, light and dark, narrow and wide.

Everything that comes from outside is escaped and isolated from the text around it (a name may be written
from right to left). Links are relative to the page's own URL, so they hold under any prefix and behind any
proxy. Digests are cut short by the style sheet alone: what is selected and copied is the whole.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Callable

from .._units import human_bytes
from .answer import INDEX, Fields

if TYPE_CHECKING:
    from .index import Entry, Listing, Model

_PARENT = INDEX.rpartition("/")[0] + "/"  # what a relative link on the page starts from

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --line: #d8dee4; --page: #fff;
  --link: #0a58ca; --band: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9198a1; --line: #30363d;
  --page: #0d1117; --link: #6cb0ff; --band: #151b23 } }
* { box-sizing: border-box }
body { margin: 0; color: var(--text); background: var(--page); font: .9375rem/1.5rem system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { margin: 0; font-size: 1.5rem; line-height: 2rem }
h2 { margin: 2.25rem 0 .5rem; font-size: 1.1rem; overflow-wrap: anywhere }
h2 small { display: block; color: var(--muted); font: .8125rem/1.25rem system-ui, sans-serif }
p { margin: .25rem 0; color: var(--muted) }
a { color: var(--link) }
table { width: 100%; border-collapse: collapse; table-layout: fixed }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--muted); background: var(--band); font-weight: 600; font-size: .8125rem }
.name { overflow-wrap: anywhere }
.size, .bytes { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.size { width: 6.5rem }
.bytes { width: 8.5rem }
td.bytes { color: var(--muted) }
.digest { width: 12.5rem }
code { display: block; overflow: hidden; font: .8125rem/1.5rem ui-monospace, monospace;
  text-overflow: ellipsis; white-space: nowrap; user-select: all }
section { content-visibility: auto; contain-intrinsic-size: auto 20rem }
@media (max-width: 44rem) {
  thead { position: absolute; clip-path: inset(50%) }
  tr { display: grid; grid-template-columns: 5rem 7rem 1fr; padding: .375rem 0;
    border-bottom: 1px solid var(--line) }
  td { padding: 0; border: 0 }
  .name { grid-column: 1 / -1 }
  .size, .bytes, .digest { width: auto; min-width: 0; text-align: left }
}
"""

_HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Model metadata</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Model metadata</h1>
"""
_TABLE = """<table>
<thead><tr><th class="name">File</th><th class="size">Size</th><th class="bytes">Bytes</th>\
<th class="digest">blake3</th></tr></thead>
<tbody>
"""
_END = "</main>\n</body>\n</html>\n"


@functools.cache
def security_fields() -> Fields:
    """Return the fields that let a browser do nothing with the page but show it, in its own style."""
    import base64
    import hashlib

    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))


def render(listing: Listing) -> bytes:
    """Return the page, in UTF-8."""
    from html import escape

    sections = "".join([_section(model, escape) for model in listing.models])
    following = (
        f'<p><a href="{escape(_relative(listing.following))}">Next</a></p>\n' if listing.following else ""
    )
    return f"{_HEAD}<p>{_summary(listing)}</p>\n{sections}{following}{_END}".encode("utf-8", "replace")


def _summary(listing: Listing) -> str:
    shown = len(listing.models)
    if not listing.total:
        return "Nothing is registered."
    if shown == listing.total:
        return "1 model" if shown == 1 else f"{shown} models"
    return f"Models {listing.start + 1:,} to {listing.start + shown:,} of {listing.total:,}"


def _section(model: Model, escape: Callable[[str], str]) -> str:
    path = escape(f"{model.slug}/{model.suffix}")
    heading = f"<h2><bdi>{escape(model.name or model.slug)}</bdi><small><bdi>{path}</bdi></small></h2>\n"
    rows = [_row(card, "model card", escape) for card in model.cards]
    rows += [_row(file, str(file.name), escape) for file in model.files]
    return f"<section>\n{heading}{_TABLE}{''.join(rows)}</tbody>\n</table>\n</section>\n"


def _row(entry: Entry, label: str, escape: Callable[[str], str]) -> str:
    link = f'<a href="{escape(_relative(entry.path))}"><bdi>{escape(label)}</bdi></a>'
    return (
        f'<tr><td class="name">{link}</td><td class="size">{human_bytes(entry.size)}</td>'
        f'<td class="bytes">{entry.size:,}</td>'
        f'<td class="digest"><code title="{entry.digest}">{entry.digest[7:]}</code></td></tr>\n'
    )


def _relative(path: str) -> str:
    return path[len(_PARENT) :]
