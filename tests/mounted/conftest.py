"""What the tests of mounted apps share: the samples of the documentation in a folder of their own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Callable

import pytest
from foreign import HERE

from selfhost.demo_model import write_demo_model

DOCS = HERE.parent / "docs"


@pytest.fixture(scope="session")
def samples() -> dict[str, str]:
    """Return the blocks of docs/gunicorn.md that begin with their own name, by name."""
    text = (DOCS / "gunicorn.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(?:python|nginx)\n# ([\w.]+)\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="session")
def make_site(samples: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that makes a folder with the samples and the model that they name."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("site")
        write_demo_model(str(folder / "my-model"))
        shutil.copy(DOCS / "gunicorn.conf.py", folder)
        for name, text in samples.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make
