"""Names of a package that load their modules when they are first used; for each `__init__.py`."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # what type checkers take for True; `typing` costs more to load than all of this
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Callable

_ROOT = __name__.rpartition(".")[0]  # selfhost, by the name that it has here
_SIDES = {f"{_ROOT}.{side}": side for side in ("worker", "frontend", "discovery")}  # a copy may lack some


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`; `homes` maps each public name to its module."""

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        try:
            module = import_module(f".{homes[name]}", package)
        except ModuleNotFoundError as error:
            # No AttributeError: `from ... import` would put a text of its own in the place of this one.
            message = f"cannot load {name} of {package}: {_lack(str(error.name))}"
            raise ModuleNotFoundError(message, name=error.name) from error
        value: object = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names


def _lack(module: str) -> str:
    """Say what it means that a module is not there."""
    if module in _SIDES:
        return f"this copy of selfhost has no {_SIDES[module]} side"
    return f"it needs {module!r}, which cannot be found"
