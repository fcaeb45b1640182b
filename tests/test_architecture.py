"""The rules of the architecture, read from the syntax tree of the package that is tested."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import selfhost

PACKAGE = Path(selfhost.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
TREES = {module: ast.parse((PACKAGE / module).read_bytes()) for module in MODULES}

# Who may import whom: folders, and the modules that stand beside them.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "_atomic": set(),
    "demo_model": set(),
    "settings": {"errors"},
    "card": {"errors"},
    "discovery": {"errors", "_atomic"},
    "worker": {"card", "discovery", "settings", "errors"},
    "demo": {"card", "worker", "settings", "errors", "demo_model"},
    "cli": {"card", "worker", "discovery", "settings", "errors", "demo", "__init__"},
    "__init__": {"card", "worker", "discovery", "settings", "errors"},
    "__main__": {"cli"},
}
# Everything from outside the standard library, and the one module that may name it.
FOREIGN = {"blake3": "card/checksum.py", "werkzeug": "worker/app.py", "_typeshed": "worker/app.py"}
ABOUT_INSTALLATIONS = {"importlib.metadata", "importlib.resources", "pkg_resources", "pkgutil"}


def unit(module: str) -> str:
    """Return the folder of a module, or its own name if it stands beside the folders."""
    return PurePosixPath(module).with_suffix("").parts[0]


def relative_imports(module: str) -> Iterator[str]:
    """Yield the unit of each module of the package that a module imports, lazily or not."""
    folder = PurePosixPath(module).parent.parts
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - (node.level - 1)]
            parts = (*base, *(node.module.split(".") if node.module else ()))
            yield from {parts[0]} if parts else {_beside(alias.name) for alias in node.names}
    yield from lazy_imports(module)


def _beside(name: str) -> str:
    """Return what `from . import name` at the top means: a unit, or a name of __init__.py."""
    return name if name in ARROWS else "__init__"


def lazy_imports(module: str) -> Iterator[str]:
    """Yield the unit of each home that an `__init__.py` names in its table."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["_HOMES"]:
            for home in ast.literal_eval(node.value).values():
                yield (*PurePosixPath(module).parent.parts, *home.split("."))[0]


def absolute_imports(module: str) -> Iterator[str]:
    """Yield the dotted name of each absolute import."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str) -> None:
    """A module imports only from its own folder and from those that the architecture lets it."""
    assert set(relative_imports(module)) - {unit(module)} <= ARROWS[unit(module)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_from_outside(module: str) -> None:
    """Everything else is the standard library, but for each wheel in its one module."""
    outside = {name for name in absolute_imports(module) if not is_standard(name.partition(".")[0])}

    assert {name.partition(".")[0] for name in outside} <= {
        name for name, home in FOREIGN.items() if home == module
    }


def is_standard(name: str) -> bool:
    """Whether a top-level module comes with Python itself."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin in ("built-in", "frozen"):
        return spec is not None
    folders = Path(str(spec.origin)).parents
    return Path(ast.__file__).parent in folders and not {"site-packages"} & {path.name for path in folders}


@pytest.mark.parametrize("module", MODULES)
def test_asks_for_no_installation(module: str) -> None:
    """A copied folder has no metadata, no entry points and no resources to ask for."""
    assert not {name for name in absolute_imports(module) if name in ABOUT_INSTALLATIONS}


@pytest.mark.parametrize("module", MODULES)
def test_environment_is_read_in_settings_only(module: str) -> None:
    """Only settings.py names os.environ, os.getenv or their like."""
    names = {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    names |= {name.rpartition(".")[2] for name in absolute_imports(module)}
    reads = names & {"environ", "environb", "getenv", "getenvb"}

    assert reads == ({"environ"} if module == "settings.py" else set())


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_for(module: str) -> None:
    """Every module has a docstring and, if it has code, delays its annotations."""
    assert ast.get_docstring(TREES[module])
    assert len(TREES[module].body) == 1 or "__future__.annotations" in set(absolute_imports(module))


def test_the_rules_have_something_to_look_at() -> None:
    """The syntax trees show the arrows that are there for sure, so the tests above can fail."""
    assert set(relative_imports("worker/local_model.py")) >= {"card", "discovery", "errors", "worker"}
    assert set(relative_imports("__main__.py")) == {"cli"}
    assert set(relative_imports("__init__.py")) >= {"card", "worker", "errors", "settings"}
    assert "blake3" in set(absolute_imports("card/checksum.py"))
    assert "werkzeug.wrappers" in set(absolute_imports("worker/app.py"))
