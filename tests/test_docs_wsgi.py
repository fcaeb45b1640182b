"""Every WSGI application that a document shows asks for the token that is set."""

from __future__ import annotations

import sys
from pathlib import Path

import documents
import pytest

APPS = [
    (document, name)
    for document in documents.DOCUMENTS
    for name, text in documents.samples(documents.read(document)).items()
    if "MetadataApp" in text
]
ASK = """
import importlib, sys
from werkzeug.test import Client

app = importlib.import_module(sys.argv[1]).app
for token in (), (("Authorization", "Bearer " + sys.argv[2]),):
    print(Client(app).get("/v1/metadata/my_model/_base/unknown", headers=token).status_code)
"""


def test_apps_are_found() -> None:
    """Each document that makes an application has one here."""
    assert {document for document, _ in APPS} == {"README.md", "docs/gunicorn.md", "docs/metrics.md"}


@pytest.mark.parametrize(("document", "name"), APPS)
def test_app_asks_for_the_token(document: str, name: str, tmp_path: Path) -> None:
    """Without the token that the environment names there is no answer but 401; with it there are others."""
    documents.write_samples(tmp_path, documents.samples(documents.read(document)))
    (tmp_path / "counts").mkdir()
    token = "0123456789abcdef" * 2
    (tmp_path / "token").write_text(token)
    answers = documents.run(
        tmp_path, sys.executable, "-c", ASK, Path(name).stem, token,
        DYN_SYSTEM_TOKEN_FILE="token", DYN_SELF_HOST_METADATA="1", DYN_FILE_KV="kv",
        DYN_SYSTEM_ADVERTISE_URL="http://127.0.0.1:8000", PROMETHEUS_MULTIPROC_DIR="counts",
    )  # fmt: skip

    assert answers == ["401", "404"]
