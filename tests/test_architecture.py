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
    "_lazy": set(),
    "_atomic": set(),
    "_units": set(),
    "_threads": set(),
    "demo_model": set(),
    "settings": {"errors"},
    "card": {"errors", "_lazy"},
    "discovery": {"errors", "_atomic", "_threads"},
    "worker": {"card", "discovery", "settings", "errors", "_threads", "_units"},
    "frontend": {"card", "settings", "errors", "_atomic", "_lazy", "_threads", "__version__"},
    "demo": {"card", "worker", "frontend", "settings", "errors", "demo_model"},
    "cli": {"card", "worker", "frontend", "demo", "settings", "errors", "_units", "__version__"},
    "__init__": {"card", "worker", "frontend", "discovery", "settings", "errors", "_lazy"},
    "__main__": {"cli"},
}
# What reads the discovery on behalf of a frontend may know it; nothing else there does.
READERS = {
    "frontend/following.py",
    "frontend/model_groups.py",
    "frontend/model_status.py",
    "frontend/watcher.py",
}
# Everything from outside the standard library, and the one module of a side that may import it.
FOREIGN = {
    "blake3": {"card/checksum.py"},
    "werkzeug": {"worker/app.py"},
    "prometheus_client": {"worker/metrics.py", "frontend/metrics.py"},
}
FOR_TYPES = {"blake3", "_typeshed"}  # what others may name where only the type checker looks
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
    """Return what `from . import name` at the top means: a unit, the version, or a name of __init__.py."""
    return name if name in ARROWS or name == "__version__" else "__init__"


def lazy_imports(module: str) -> Iterator[str]:
    """Yield the unit of each home that an `__init__.py` names in its table."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["_HOMES"]:
            for home in ast.literal_eval(node.value).values():
                yield (*PurePosixPath(module).parent.parts, *home.split("."))[0]


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield each node that is there at run time, too."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from nodes(node)


def absolute_imports(module: str, *, for_types: bool = True) -> Iterator[str]:
    """Yield the dotted name of each absolute import, of those for the type checker alone if wanted."""
    for node in ast.walk(TREES[module]) if for_types else nodes(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str) -> None:
    """A module imports only from its own folder and from those that the architecture lets it."""
    allowed = ARROWS[unit(module)] | ({"discovery"} if module in READERS else set())

    assert set(relative_imports(module)) - {unit(module)} <= allowed


@pytest.mark.parametrize("module", [module for module in MODULES if unit(module) == "cli"])
def test_command_is_of_one_side(module: str) -> None:
    """No module of the command line knows the worker and the frontend both."""
    assert not {"worker", "frontend"} <= set(relative_imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_imports_from_outside(module: str) -> None:
    """Everything else is the standard library, but for each wheel in its one module."""  # catalogue 150
    outside = wheels(absolute_imports(module, for_types=False))

    assert outside <= {name for name, homes in FOREIGN.items() if module in homes}
    assert wheels(absolute_imports(module)) - outside <= FOR_TYPES


def wheels(names: Iterator[str]) -> set[str]:
    """Return the top-level modules among the names that do not come with Python."""
    return {top for top in {name.partition(".")[0] for name in names} if not is_standard(top)}


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
    assert set(relative_imports("frontend/watcher.py")) >= {"card", "discovery", "errors", "frontend"}
    assert set(relative_imports("__main__.py")) == {"cli"}
    assert set(relative_imports("cli/__init__.py")) >= {"cli", "demo", "errors", "__version__"}
    assert "worker" in set(relative_imports("cli/serve.py"))
    assert "frontend" in set(relative_imports("cli/fetch.py"))
    assert set(relative_imports("__init__.py")) >= {"card", "worker", "frontend", "errors", "settings"}
    assert "blake3" in set(absolute_imports("card/checksum.py"))
    assert "werkzeug.wrappers" in set(absolute_imports("worker/app.py"))
