"""What docs/gunicorn.md and docs/gunicorn.conf.py show is run as it stands there, but for addresses."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest
from foreign import HERE, NGINX, Command, Got, Running, environment, get, gunicorn, nginx, running

DOCS = HERE.parent / "docs"
TEXT = (DOCS / "gunicorn.md").read_text(encoding="utf-8")
TARGET = "/v1/metadata/my_model/_base/config.json"
LORA_TARGET = "/v1/metadata/my-lora/my-lora/config.json"
CONF = ("-c", "gunicorn.conf.py", "--workers", "1")


@contextmanager
def served(folder: Path, command: Command, **more: str) -> Iterator[Running]:
    """Run a sample in its folder, with the variables of the documentation."""
    variables = dict(re.findall(r"^export (\w+)=(\S+)", TEXT, re.MULTILINE))
    variables |= {"DYN_SYSTEM_SHARED_DIR": str(folder / "share"), "DYN_FILE_KV": str(folder / "kv"), **more}
    with running(command, folder, environment(folder, **variables)) as server:
        yield server


def is_config(got: Got, folder: Path) -> bool:
    """Tell whether the answer is a file of the model."""
    return (got.status, got.body) == (200, (folder / "my-model" / "config.json").read_bytes())


def test_every_block_is_a_sample(samples: dict[str, str]) -> None:
    """None goes untested, and the conf that the text names is there; it all stays short."""
    assert set(samples) == {
        "wsgi.py", "host.py", "flask_app.py", "django_wsgi.py", "serve_waitress.py", "nginx.conf",
    }  # fmt: skip
    assert TEXT.count("```python") + TEXT.count("```nginx") == len(samples)
    assert (DOCS / "gunicorn.conf.py").exists()
    assert len(TEXT.splitlines()) <= 140


def test_app_alone(make_site: Callable[[], Path]) -> None:
    """At the root, with the conf; the longest URL that there may be is not too long for it."""
    folder = make_site()
    longest = "/v1/metadata/" + "/".join(["%F0" * 255] * 3) + "?blake3=" + "0" * 64
    with served(folder, gunicorn(*CONF, "wsgi:app")) as server:
        assert is_config(server.get(TARGET), folder)
        assert (server.get(longest).status, server.get(longest).body) == (404, b"Not found\n")
        assert 2300 < len(longest) < 2400


def test_conf_opens_nothing_in_the_home_directory(make_site: Callable[[], Path]) -> None:
    """gunicorn 25 and later have a control socket there otherwise; older ones pass over the line."""
    folder = make_site()

    def command(fd: int) -> list[str]:
        return [sys.executable, "-m", "gunicorn", "-b", f"fd://{fd}", *CONF, "wsgi:app"]

    with served(folder, command) as server:
        assert is_config(server.get(TARGET), folder)
        assert not (folder / ".gunicorn").exists()  # HOME is the folder


def test_app_beside_another(make_site: Callable[[], Path]) -> None:
    """Each has its part of the paths; a LoRA that a request loads is served."""
    folder = make_site()
    with served(folder, gunicorn(*CONF, "host:app")) as server:
        assert server.get("/?lora=my-lora").status == 204
        assert is_config(server.get("/internal" + TARGET), folder)
        assert is_config(server.get("/internal" + LORA_TARGET), folder)
        assert server.get(TARGET).status == 204


@pytest.mark.parametrize("name", ["flask", "django"])
def test_app_in_a_framework(make_site: Callable[[], Path], name: str) -> None:
    """Two lines mount it; the host's own 404 stays the host's."""  # catalogue 88
    pytest.importorskip(name)
    folder = make_site()
    (folder / "settings.py").write_text("SECRET_KEY = 'x'\nALLOWED_HOSTS = ['*']\nROOT_URLCONF = ()\n")
    app = {"flask": "flask_app:app", "django": "django_wsgi:application"}[name]
    with served(folder, gunicorn(*CONF, app), DJANGO_SETTINGS_MODULE="settings") as server:
        assert is_config(server.get("/internal" + TARGET), folder)
        assert server.get("/internal/v1/metadata/").body == b"Not found\n"
        assert b"<h1>Not Found</h1>" in server.get(TARGET).body


def test_app_under_waitress(make_site: Callable[[], Path]) -> None:
    """One process, which registers and publishes by itself."""
    folder = make_site()
    sample = folder / "serve_waitress.py"
    listen, inherited = 'listen="127.0.0.1:8000"', "sockets=[__import__('socket').socket(fileno=FD)]"
    assert listen in sample.read_text()

    def command(fd: int) -> list[str]:
        sample.write_text(sample.read_text().replace(listen, inherited.replace("FD", str(fd))))
        return [sys.executable, sample.name]

    with served(folder, command) as server:
        assert is_config(server.get(TARGET), folder)
        assert len(os.listdir(folder / "kv" / "v1" / "mdc")) == 1


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_app_behind_nginx(make_site: Callable[[], Path], samples: dict[str, str]) -> None:
    """At the root and with a prefix that nginx takes away."""  # catalogue 88
    folder = make_site()
    with served(folder, gunicorn(*CONF, "wsgi:app")) as server:
        upstream = server.url.partition("//")[2]
        with nginx(samples["nginx.conf"].replace("127.0.0.1:8000", upstream)) as path:
            assert is_config(get(path, TARGET), folder)
            assert is_config(get(path, "/models" + TARGET), folder)
            assert get(path, "/models" + TARGET.replace("_base/", "_base%2f")).status == 200
            assert get(path, TARGET.replace("_base/", "_base%2f")).status == 404
            assert get(path, TARGET + "/").status == 404
