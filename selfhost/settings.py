"""What the environment can set, as one frozen value; the only module that reads `os.environ`.

The names and the meaning of their values are Dynamo's (1.6.1), with two differences. Self-hosting is off
unless it is asked for, as in Dynamo 1.2 and 1.3. A port up to 65535 works and a value that cannot be used is
a `SettingsError`, where Dynamo's process dies of it. The environment is read when `Settings.from_env` is
called, never at import; `Settings()` reads nothing at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from .errors import SettingsError

_ON = frozenset({"1", "true", "yes", "on"})
_TMP = "/tmp"  # noqa: S108 - Dynamo's place; processes meet there
_STORE_NAME = "dynamo_store_kv"
_BACKENDS = ("file", "mem")
_DIGITS = re.compile(r"[0-9]{1,9}")  # bounded: int() refuses or crawls on thousands of digits
_NEGATIVE = re.compile(r"-[0-9]+")
_HOST = re.compile(r"[!-~]+")  # printable ASCII without the space


@dataclass(frozen=True)
class Settings:
    """Everything that can be set from outside; see `from_env` for the variables."""

    self_host_metadata: bool = False
    system_host: str = "0.0.0.0"
    system_port: Optional[int] = None  # None: no status server; 0: any free port
    advertise_url: Optional[str] = None  # base URL to publish; None: derived from the bound address
    file_kv: str = _TMP + "/" + _STORE_NAME
    discovery_backend: str = "file"  # or "mem"

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None, **given: Any) -> Settings:
        """Read the settings from `environ` (None: this process's own, as it is now).

        A value that is `given` takes the place of its variable, which is then not looked at. Raises
        SettingsError for the first variable whose value cannot be used.
        """
        env = os.environ if environ is None else environ
        readers: dict[str, Callable[[], Any]] = {
            "self_host_metadata": lambda: env.get("DYN_SELF_HOST_METADATA", "").strip().lower() in _ON,
            "system_host": lambda: _host("DYN_SYSTEM_HOST", env) or cls.system_host,
            "system_port": lambda: _port("DYN_SYSTEM_PORT", env),
            "advertise_url": lambda: env.get("DYN_SYSTEM_ADVERTISE_URL", "").strip() or None,
            "file_kv": lambda: env.get("DYN_FILE_KV") or os.path.join(env.get("TMPDIR") or _TMP, _STORE_NAME),
            "discovery_backend": lambda: _backend("DYN_DISCOVERY_BACKEND", env),
        }
        return cls(**{**{name: read() for name, read in readers.items() if name not in given}, **given})


@dataclass(frozen=True)
class FrontendSettings:
    """What a frontend takes from the environment: places on its own disk.

    A `~` that a variable begins with is HOME, as huggingface_hub has it; without a HOME such a variable is as
    good as unset. Nothing else is expanded. A relative path is left as it is: a cache or transport
    takes it from the working directory in which it is made. Set absolute ones.
    """

    cache_root: Optional[str] = None  # DYN_MDC_CACHE, else Dynamo's place below HOME; None: there is no HOME
    hf_hub_cache: Optional[str] = None  # HF_HUB_CACHE, else `hub` in HF_HOME, else below HOME
    home: str = field(default="", compare=False)  # HOME as it is found, to say why it cannot be used

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None) -> FrontendSettings:
        """Read the settings from `environ` (None: this process's own, as it is now); never raises."""
        env = os.environ if environ is None else environ
        home = env.get("HOME", "")
        below_home = os.path.join(home, ".cache") if os.path.isabs(home) else None
        return cls(
            cache_root=_place("DYN_MDC_CACHE", env) or _join(below_home, "dynamo", "mdc"),
            hf_hub_cache=_place("HF_HUB_CACHE", env)
            or _join(_place("HF_HOME", env) or _join(below_home, "huggingface"), "hub"),
            home=home,
        )


def _place(variable: str, env: Mapping[str, str]) -> Optional[str]:
    """Return the folder that a variable names, None where it is unset or would need a HOME that is none."""
    text = env.get(variable, "")
    if text != "~" and not text.startswith("~/"):
        return text or None
    home = env.get("HOME", "")
    return home.rstrip("/") + text[1:] or "/" if os.path.isabs(home) else None


def _join(folder: Optional[str], *parts: str) -> Optional[str]:
    return None if folder is None else os.path.join(folder, *parts)


def _host(variable: str, env: Mapping[str, str]) -> str:
    """Return the host to bind, "" when none is set; `[::1]` is taken for `::1`."""
    text = env.get(variable, "").strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if text and (not _HOST.fullmatch(text) or "/" in text):
        raise _unusable(variable, env[variable], "an IP address or host name, such as :: or localhost")
    return text


def _port(variable: str, env: Mapping[str, str]) -> Optional[int]:
    """Return the port, None where no server is wanted (unset, empty or negative)."""
    text = env.get(variable, "").strip()
    if not text or _NEGATIVE.fullmatch(text):
        return None
    port = int(text) if _DIGITS.fullmatch(text) else -1
    if not 0 <= port <= 65535:
        accepted = "1 to 65535, 0 for any free port, or nothing (or a negative number) for no server"
        raise _unusable(variable, env[variable], accepted)
    return port


def _backend(variable: str, env: Mapping[str, str]) -> str:
    """Return the name of the discovery backend."""
    text = env.get(variable, "").strip() or _BACKENDS[0]
    if text not in _BACKENDS:
        raise _unusable(variable, env[variable], " or ".join(_BACKENDS))
    return text


def _unusable(variable: str, value: str, accepted: str) -> SettingsError:
    message = f"{variable}={value!r} cannot be used: expected {accepted}"
    return SettingsError(message, variable=variable, value=value, accepted=accepted)
