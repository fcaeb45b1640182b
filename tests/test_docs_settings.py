"""What docs/settings.md says about each setting is compared with the code."""

from __future__ import annotations

import dataclasses
import re

import documents
import pytest

from selfhost.errors import SettingsError
from selfhost.settings import FrontendSettings, ServerLimits, Settings
from selfhost.worker.advertise import AdvertisedAddress

ROWS = re.findall(
    r"^\| `([A-Z_]+)` \| (.*?) \| .*? \| (.*?) ?\|$", documents.read("docs/settings.md"), re.MULTILINE
)
DEFAULTS = {name: default.strip("`") for name, default, _ in ROWS}


def test_table_has_every_setting() -> None:
    """Each variable that the code reads is in the table, and no other."""

    class Asked(dict[str, str]):
        def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
            asked.add(name)
            return default

    asked: set[str] = set()
    Settings.from_env(Asked())
    FrontendSettings.from_env(Asked())
    mentioned = {name for _, default, _ in ROWS for name in re.findall(r"\$(\w+)", default)}

    assert {name for name, _, _ in ROWS} | mentioned == asked


@pytest.mark.parametrize("text", [error.strip("`") for _, _, error in ROWS if error])
def test_table_has_the_real_error(text: str) -> None:
    """The error of a row is what its value really raises."""
    variable, value = re.findall(r"^(\w+)='(.*?)' cannot", text)[0]

    assert error_of(variable, value) == text


def error_of(variable: str, value: str) -> str:
    """Return what is said about a value, whether it is read or used."""
    try:
        url = Settings.from_env({variable: value}).advertise_url
        AdvertisedAddress.parse(str(url), variable=variable)
    except SettingsError as error:
        return str(error)
    return ""


def test_table_has_the_real_defaults() -> None:
    """Without a variable the settings are what the table says."""
    settings = Settings.from_env({"TMPDIR": "$TMPDIR"})
    frontend = FrontendSettings.from_env({"HOME": "/home"})

    assert DEFAULTS["DYN_SYSTEM_HOST"] == settings.system_host
    assert DEFAULTS["DYN_DISCOVERY_BACKEND"] == settings.discovery_backend
    assert DEFAULTS["DYN_SYSTEM_ISOLATION"] == settings.isolation
    assert DEFAULTS["DYN_FILE_KV"] == settings.file_kv
    assert DEFAULTS["DYN_MDC_CACHE"].replace("$HOME", "/home") == frontend.cache_root
    assert f"{frontend.hf_hub_cache}`" in DEFAULTS["HF_HUB_CACHE"].replace("$HOME", "/home") + "`"


@pytest.mark.parametrize("limit", [field.name for field in dataclasses.fields(ServerLimits)])
def test_table_has_the_real_limits(limit: str) -> None:
    """Each limit has the default that the table says."""
    assert DEFAULTS["DYN_SYSTEM_" + limit.upper()] == str(getattr(ServerLimits(), limit))


def test_all_else_is_off() -> None:
    """Whatever is no address, place or limit is off unless it is set."""
    settings = Settings()
    off = {"self_host_metadata": False, "metadata_index": False}

    assert {name: getattr(settings, name) for name in off} == off
    for name in (
        "system_port",
        "advertise_url",
        "shared_dir",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "token",
    ):
        assert getattr(settings, name) is None
