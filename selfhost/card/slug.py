"""The URL- and path-safe name of a model, as Dynamo 1.6.1 derives it.

Different names can share a slug (`a/b` and `a_b`), and a name without an ASCII letter or digit can have
an empty one: a slug names, it does not identify.
"""

from __future__ import annotations

import re

from ..errors import CardError, shown

_OTHER = re.compile(r"[^a-z0-9_-]")
_SLUG = re.compile(r"[a-z0-9_-]*")


class Slug(str):
    """A text of `[a-z0-9_-]*`; make one with `from_name` or `parse`."""

    __slots__ = ()

    @classmethod
    def from_name(cls, name: str) -> Slug:
        """Return the slug of a model's name: lower case, the rest as `_`, none of those in front."""
        return cls(_OTHER.sub("_", name.lower()).lstrip("_"))

    @classmethod
    def parse(cls, text: object) -> Slug:
        """Return the slug that `text` is, or raise CardError; the empty slug is one."""
        if not isinstance(text, str) or _SLUG.fullmatch(text) is None:
            raise CardError(
                f"slug: expected only a-z, 0-9, '_' and '-', found {shown(text)}", field="slug", value=text
            )
        return cls(text)
