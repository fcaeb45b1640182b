"""Settings: what each variable means, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from typing import Optional

import pytest

from selfhost.errors import SettingsError
from selfhost.settings import FrontendSettings, ServerLimits, Settings


def test_nothing_set_gives_the_defaults() -> None:
    """An empty environment is the same as no environment at all."""
    assert Settings.from_env({}) == Settings()
    first = dataclasses.astuple(Settings())[:6]
    assert first == (False, "0.0.0.0", None, None, "/tmp/dynamo_store_kv", "file")


@pytest.mark.parametrize("text", ["1", "true", "yes", "on", "ON", "True", " yes ", "\ton\n"])
def test_self_hosting_is_on_when_asked_for(text: str) -> None:
    """Four words mean on, in any case and with space around. # catalogue 111."""
    assert Settings.from_env({"DYN_SELF_HOST_METADATA": text}).self_host_metadata is True


@pytest.mark.parametrize(
    "text", ["", " ", "0", "false", "No", "OFF", " off ", "2", "y", "enabled", "junk", "1 1"]
)
def test_self_hosting_is_off_otherwise(text: str) -> None:
    """Everything else is off, garbage too. # catalogue 111."""
    assert Settings.from_env({"DYN_SELF_HOST_METADATA": text}).self_host_metadata is False


@pytest.mark.parametrize(
    ("text", "port"),
    [("", None), ("  ", None), ("-1", None), ("-99999", None), ("0", 0), ("1", 1), (" 9090 ", 9090),
     ("32768", 32768), ("65535", 65535), ("08080", 8080)],
)  # fmt: skip
def test_port_is_read(text: str, port: int) -> None:
    """None stands for no server, 0 for any port; ports above 32767 work."""
    assert Settings.from_env({"DYN_SYSTEM_PORT": text}).system_port == port


@pytest.mark.parametrize(
    "text",
    ["65536", "9" * 5000, "http", "80.0", "1e3", "0x50", "+80", "8_0", "٨٠", "80 81", "--1", "-", "1,2"],
)
def test_unusable_port_is_an_error_that_tells_all(text: str) -> None:
    """The error carries variable, value and what is accepted, and its message says all three."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"DYN_SYSTEM_PORT": text})

    assert (caught.value.variable, caught.value.value) == ("DYN_SYSTEM_PORT", text)
    assert "1 to 65535" in caught.value.accepted
    assert all(part in str(caught.value) for part in ("DYN_SYSTEM_PORT", repr(text), caught.value.accepted))


@pytest.mark.parametrize(
    ("text", "host"),
    [("", "0.0.0.0"), (" ", "0.0.0.0"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("[::1]", "::1"),
     (" localhost ", "localhost"), ("fe80::1%eth0", "fe80::1%eth0")],
)  # fmt: skip
def test_host_is_read(text: str, host: str) -> None:
    """Empty means the default; IPv6 may stand in brackets."""
    assert Settings.from_env({"DYN_SYSTEM_HOST": text}).system_host == host


@pytest.mark.parametrize("text", ["a b", "a\nb", "http://h", "hôte", "a\x00"])
def test_unusable_host_is_an_error(text: str) -> None:
    """What cannot be a host is refused where it is set, not when a socket is bound."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"DYN_SYSTEM_HOST": text})

    assert (caught.value.variable, caught.value.value) == ("DYN_SYSTEM_HOST", text)


@pytest.mark.parametrize(("text", "url"), [("", None), (" ", None), (" http://h:1/p ", "http://h:1/p")])
def test_advertise_url_is_trimmed_text(text: str, url: str) -> None:
    """The base URL is handed on as text; empty means none."""
    assert Settings.from_env({"DYN_SYSTEM_ADVERTISE_URL": text}).advertise_url == url


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"TMPDIR": "/scratch"}, "/scratch/dynamo_store_kv"),
        ({"TMPDIR": ""}, "/tmp/dynamo_store_kv"),
        ({"DYN_FILE_KV": "", "TMPDIR": "/scratch/"}, "/scratch/dynamo_store_kv"),
        ({"DYN_FILE_KV": "/a b ", "TMPDIR": "/scratch"}, "/a b "),
    ],
)
def test_file_store_is_where_dynamo_has_it(environ: dict[str, str], path: str) -> None:
    """A path is taken as it is; without one the store lies in the temporary directory."""
    assert Settings.from_env(environ).file_kv == path


@pytest.mark.parametrize(("text", "backend"), [("", "file"), ("file", "file"), (" mem ", "mem")])
def test_discovery_backend_is_read(text: str, backend: str) -> None:
    """The file store is the default."""
    assert Settings.from_env({"DYN_DISCOVERY_BACKEND": text}).discovery_backend == backend


@pytest.mark.parametrize("text", ["etcd", "kubernetes", "FILE", "files"])
def test_unknown_discovery_backend_is_an_error(text: str) -> None:
    """A backend that is not there is refused, with those that are."""
    with pytest.raises(SettingsError, match="expected file or mem") as caught:
        Settings.from_env({"DYN_DISCOVERY_BACKEND": text})

    assert caught.value.value == text


def test_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only from_env reads the environment of the process, as it is at that moment."""
    monkeypatch.setitem(os.environ, "DYN_SYSTEM_PORT", "4711")

    assert Settings.from_env().system_port == 4711
    assert Settings().system_port is None


def test_given_value_takes_the_place_of_its_variable() -> None:
    """A flag wins, and a variable that it replaces may hold what this version does not know."""
    environ = {"DYN_DISCOVERY_BACKEND": "etcd", "DYN_SYSTEM_PORT": "1234"}

    settings = Settings.from_env(environ, discovery_backend="mem")

    assert (settings.discovery_backend, settings.system_port) == ("mem", 1234)


# ------------------------------------------------------------------ a frontend's


@pytest.mark.parametrize(
    ("environ", "cache_root", "hub_cache"),
    [
        ({}, None, None),
        ({"HOME": "/h"}, "/h/.cache/dynamo/mdc", "/h/.cache/huggingface/hub"),
        ({"HOME": "/h", "HF_HOME": "/hf"}, "/h/.cache/dynamo/mdc", "/hf/hub"),
        ({"HOME": "/h", "HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}, "/h/.cache/dynamo/mdc", "/hub"),
        ({"HOME": "/h", "DYN_MDC_CACHE": "/c"}, "/c", "/h/.cache/huggingface/hub"),
        ({"HOME": "", "DYN_MDC_CACHE": "", "HF_HOME": "", "HF_HUB_CACHE": ""}, None, None),
        ({"HOME": "relative"}, None, None),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/.cache/dynamo/mdc", "/h/.cache/huggingface/hub"),
        ({"HOME": "/h", "DYN_MDC_CACHE": "~/c", "HF_HOME": "~/hf"}, "/h/c", "/h/hf/hub"),
        ({"HOME": "/h/", "DYN_MDC_CACHE": "~", "HF_HUB_CACHE": "~/hub"}, "/h", "/h/hub"),
        ({"HOME": "/h", "HF_HUB_CACHE": "~/hub", "HF_HOME": "/hf"}, "/h/.cache/dynamo/mdc", "/h/hub"),
        ({"HOME": "/", "DYN_MDC_CACHE": "~", "HF_HUB_CACHE": "~//hub"}, "/", "//hub"),
        ({"DYN_MDC_CACHE": "~/c", "HF_HOME": "~/hf"}, None, None),
        (
            {"HOME": "relative", "DYN_MDC_CACHE": "~/c", "HF_HUB_CACHE": "~", "HF_HOME": "/hf"},
            None,
            "/hf/hub",
        ),
        ({"HOME": "/h", "DYN_MDC_CACHE": "~root/c", "HF_HUB_CACHE": "/a/~/$HOME"}, "~root/c", "/a/~/$HOME"),
        ({"HOME": "/h", "DYN_MDC_CACHE": "c/d", "HF_HOME": "hf"}, "c/d", "hf/hub"),
    ],
)
def test_places_of_a_frontend(environ: dict[str, str], cache_root: str, hub_cache: str) -> None:
    """Dynamo's place below HOME and Hugging Face's; a `~` at the start of a variable is HOME."""
    assert FrontendSettings.from_env(environ) == FrontendSettings(cache_root, hub_cache)  # catalogue 139


TRUST = ["DYN_MDC_TLS_CA", "DYN_MDC_TLS_CERT", "DYN_MDC_TLS_KEY", "DYN_MDC_TOKENS_FILE"]


@pytest.mark.parametrize("variable", TRUST)
@pytest.mark.parametrize(
    ("text", "home"), [("", "/h"), (" ", "/h"), ("~/ca.pem", None), ("~", ""), ("~/ca.pem", "relative")]
)
def test_trust_that_cannot_be_told_is_an_error(variable: str, text: str, home: Optional[str]) -> None:
    """Whom to trust, and with which token, is not what somebody else says when the file has no name."""
    environ = {variable: text, **({} if home is None else {"HOME": home})}
    with pytest.raises(SettingsError, match=f"^{variable}='") as caught:
        FrontendSettings.from_env(environ)

    assert (caught.value.variable, caught.value.value) == (variable, text)
    assert ("HOME" in str(caught.value)) == text.startswith("~")


def test_trust_below_home() -> None:
    """With a HOME `~` is that."""
    found = FrontendSettings.from_env({"HOME": "/h", **dict.fromkeys(TRUST, "~/f")})

    assert [found.tls_ca, found.tls_cert, found.tls_key, found.tokens_file] == ["/h/f"] * 4


def test_frontend_settings_read_nothing_by_themselves() -> None:
    """Without from_env no place is known."""
    assert FrontendSettings() == FrontendSettings(None, None)


def test_limits_are_read_and_checked() -> None:
    """A limit comes from its variable; one that is no number above zero is refused wherever it comes from."""
    limits = Settings.from_env({"DYN_SYSTEM_IDLE_SECONDS": " 2.5 ", "DYN_SYSTEM_MAX_CONNECTIONS": "7"}).limits

    assert limits == ServerLimits(idle_seconds=2.5, max_connections=7)
    for value in (0, -1, 0.5, True, float("nan"), "7"):
        with pytest.raises(SettingsError, match=r"max_connections=.* a whole number above 0"):
            ServerLimits(max_connections=value)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="idle_seconds=inf"):
        ServerLimits(idle_seconds=float("inf"))


def test_secrets_are_not_shown() -> None:
    """The token stands in no repr, which hosts log."""
    assert "s3cret" not in repr(Settings.from_env({"DYN_SYSTEM_TOKEN": "s3cret"}))


@pytest.mark.parametrize(
    "variable",
    [
        "DYN_SYSTEM_TOKEN", "DYN_SYSTEM_TOKEN_FILE", "DYN_SYSTEM_TLS_CERT", "DYN_SYSTEM_TLS_KEY",
        "DYN_SYSTEM_TLS_CLIENT_CA",
    ],
)  # fmt: skip
@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_blank_guard_is_an_error(variable: str, blank: str) -> None:
    """A secret that did not arrive leaves no port open."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable: blank})

    assert caught.value.variable == variable
