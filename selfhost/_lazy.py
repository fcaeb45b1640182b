"""Names of a package that load their modules when they are first used; for each `__init__.py`."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # what type checkers take for True; `typing` costs more to load than all of this
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Callable


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`; `homes` maps each public name to its module."""

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(f".{homes[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names
