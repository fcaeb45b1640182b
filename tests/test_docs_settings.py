"""What docs/settings.md says about each setting is compared with the code."""

from __future__ import annotations

import dataclasses
import re

import documents
import pytest

from selfhost.cli import main
from selfhost.errors import RegistrationError, SettingsError
from selfhost.frontend import ClientTls, Tokens
from selfhost.frontend.tokens import parse_origin
from selfhost.settings import FrontendSettings, ServerLimits, Settings
from selfhost.worker.access import Access
from selfhost.worker.advertise import AdvertisedAddress
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.tls import TlsFiles

TEXT = documents.read("docs/settings.md")
ROWS = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| .*? \| (.*?) \|$", TEXT, re.MULTILINE)
DEFAULTS = {name: default.strip("`") for name, default, _ in ROWS}
# The last piece of code in each row: a text, which may quote code itself.
ERRORS = {
    name: re.findall(r"(`+)(.+?)\1(?!`)", error)[-1][1]
    for name, _, error in ROWS
    if not error.startswith("none")
}


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


@pytest.mark.parametrize("variable", ERRORS)
def test_table_has_the_real_error(variable: str) -> None:
    """The error of a row is what its value really raises; a secret has three characters."""
    text = ERRORS[variable]
    value = (re.findall(r"(?<!\w)'(.*?)'", text) or ["abc"])[0]

    assert error_of(variable, value) == text


@pytest.mark.parametrize("variable", ["DYN_SYSTEM_TOKEN", "DYN_MDC_TLS_CA"])
def test_text_has_the_real_error(variable: str) -> None:
    """So are the errors that the text around the table tells, whose lines are broken."""
    (text, value) = re.findall(rf"`({variable}='(.*?)' cannot.*?)`", TEXT.replace("\n", " "))[0]

    assert error_of(variable, value) == text


def error_of(variable: str, value: str) -> str:
    """Return what is said about a value, whether it is read or used."""
    environ = {variable: value}
    try:
        settings = Settings.from_env(environ)
        if settings.advertise_url is not None:
            AdvertisedAddress.parse(settings.advertise_url, variable=variable)
        files = TlsFiles.of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        if files is not None:
            files.check()
        Access.of(settings.token, settings.token_file)
        MetadataArtifactRegistry(shared=settings.shared_dir)
        frontend = FrontendSettings.from_env(environ)
        ClientTls(frontend.tls_ca, frontend.tls_cert, frontend.tls_key).context()
        Tokens(file=frontend.tokens_file).of(parse_origin("https://gpu7:9090"))
    except (SettingsError, RegistrationError) as error:
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


def test_serve_has_the_flags_that_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a worker's settings `selfhost serve` sets all but the limits, the folder and what it always does."""
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    named = set(re.findall(r"DYN_\w+", capsys.readouterr().out))
    limits = {"DYN_SYSTEM_" + field.name.upper() for field in dataclasses.fields(ServerLimits)}
    others = {"DYN_SELF_HOST_METADATA", "DYN_SYSTEM_SHARED_DIR"}

    assert named == {name for name in DEFAULTS if not re.match("DYN_MDC|HF", name)} - limits - others
