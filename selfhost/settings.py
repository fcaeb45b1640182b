"""What the environment can set, as one frozen value; the only module that reads `os.environ`.

The names and the meaning of their values are Dynamo's (1.6.1), with two differences. Self-hosting is off
unless it is asked for, as in Dynamo 1.2 and 1.3. A port up to 65535 works and a value that cannot be used is
a `SettingsError`, where Dynamo's process dies of it. The environment is read when `Settings.from_env` is
called, never at import; `Settings()` reads nothing at all.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Optional

from .errors import SettingsError

_ON = frozenset({"1", "true", "yes", "on"})
_TMP = "/tmp"  # noqa: S108 - Dynamo's place; processes meet there
_STORE_NAME = "dynamo_store_kv"
_BACKENDS = ("file", "mem")
_ISOLATIONS = ("thread", "process")
_DIGITS = re.compile(r"[0-9]{1,9}")  # bounded: int() refuses or crawls on thousands of digits
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_NEGATIVE = re.compile(r"-[0-9]+")
_HOST = re.compile(r"[!-~]+")  # printable ASCII without the space


@dataclass(frozen=True)
class ServerLimits:
    """What the clients of the embedded server may cost; every number is above zero, and finite.

    A field's variable is DYN_SYSTEM_ and its name in capitals. Raises SettingsError.
    """

    # Half of the files that the process may open at most. Then one that waits or has stalled makes room, else
    # the new one gets 503, or under TLS is hung up on: before a handshake nothing can be said.
    max_connections: int = 512
    max_head_bytes: int = 16 * 1024  # request line and fields together; twice what browsers and proxies send
    handshake_seconds: float = 10.0  # of TLS, from the connection on
    idle_seconds: float = 30.0  # without a request
    head_seconds: float = 10.0  # from a head's first byte to its last
    stall_seconds: float = 20.0  # without taking a byte of an answer
    min_bytes_per_second: int = 16 * 1024  # averaged over an answer, after the first stall_seconds
    linger_seconds: float = 1.0  # after a refusal

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            kinds = (int,) if limit.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
                raise _unusable(limit.name, value, _accepted_number(limit.type))

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None) -> ServerLimits:
        """Read the limits from `environ` (None: this process's own, as it is now)."""
        env = os.environ if environ is None else environ
        given: dict[str, Any] = {}
        for limit in fields(cls):
            variable = "DYN_SYSTEM_" + limit.name.upper()
            if env.get(variable, "").strip():
                given[limit.name] = _number(variable, env, str(limit.type))
        return cls(**given)


@dataclass(frozen=True)
class Settings:
    """Everything that can be set from outside on the worker's side; see `from_env` for the variables.

    Half a configuration (a key without a certificate, say) is an error of what is made from it.
    """

    self_host_metadata: bool = False
    system_host: str = "0.0.0.0"
    system_port: Optional[int] = None  # None: no status server; 0: any free port
    advertise_url: Optional[str] = None  # base URL to publish; None: derived from the bound address
    file_kv: str = _TMP + "/" + _STORE_NAME
    discovery_backend: str = "file"  # or "mem"
    isolation: str = "thread"  # where the status server runs; or "process"
    shared_dir: Optional[str] = None  # the folder of a registry that processes of this host share
    metadata_index: bool = False  # whether GET /v1/metadata lists what is registered
    tls_cert: Optional[str] = None  # PEM file, the server's certificate and its chain; None: plain HTTP
    tls_key: Optional[str] = None  # PEM file; None: the key is in `tls_cert`
    tls_client_ca: Optional[str] = None  # PEM file; clients must show a certificate of one of these
    token: Optional[str] = field(default=None, repr=False)  # the bearer token that metadata routes ask for
    token_file: Optional[str] = None  # the file that holds it, read again when it changes
    limits: ServerLimits = ServerLimits()

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None, **given: Any) -> Settings:
        """Read the settings from `environ` (None: this process's own, as it is now).

        A value that is `given` takes the place of its variable, which is then not looked at. Raises
        SettingsError for the first variable whose value cannot be used.
        """
        env = os.environ if environ is None else environ
        readers: dict[str, Callable[[], Any]] = {
            "self_host_metadata": lambda: _is_on("DYN_SELF_HOST_METADATA", env, cls.self_host_metadata),
            "system_host": lambda: _host("DYN_SYSTEM_HOST", env) or cls.system_host,
            "system_port": lambda: _port("DYN_SYSTEM_PORT", env),
            "advertise_url": lambda: env.get("DYN_SYSTEM_ADVERTISE_URL", "").strip() or None,
            "file_kv": lambda: env.get("DYN_FILE_KV") or os.path.join(env.get("TMPDIR") or _TMP, _STORE_NAME),
            "discovery_backend": lambda: _one_of("DYN_DISCOVERY_BACKEND", env, _BACKENDS),
            "isolation": lambda: _one_of("DYN_SYSTEM_ISOLATION", env, _ISOLATIONS),
            "shared_dir": lambda: env.get("DYN_SYSTEM_SHARED_DIR") or None,
            "metadata_index": lambda: _is_on("DYN_SYSTEM_METADATA_INDEX", env, cls.metadata_index),
            "tls_cert": lambda: _guard("DYN_SYSTEM_TLS_CERT", env),
            "tls_key": lambda: _guard("DYN_SYSTEM_TLS_KEY", env),
            "tls_client_ca": lambda: _guard("DYN_SYSTEM_TLS_CLIENT_CA", env),
            "token": lambda: (_guard("DYN_SYSTEM_TOKEN", env) or "").strip() or None,
            "token_file": lambda: _guard("DYN_SYSTEM_TOKEN_FILE", env),
            "limits": lambda: ServerLimits.from_env(env),
        }
        return cls(**{**{name: read() for name, read in readers.items() if name not in given}, **given})


@dataclass(frozen=True)
class FrontendSettings:
    """What a frontend takes from the environment: places on its own disk, and whom it trusts.

    A `~` that a variable begins with is HOME, as huggingface_hub has it. A place that is blank, or needs a
    HOME that is none, is as good as unset; where that is about trust, it is an error: without a word, a CA of
    one's own would become all public ones. Nothing else is expanded. A relative path is left as it is: a
    cache or transport takes it from the working directory in which it is made. Set absolute ones.
    """

    cache_root: Optional[str] = None  # DYN_MDC_CACHE, else Dynamo's place below HOME; None: there is no HOME
    hf_hub_cache: Optional[str] = None  # HF_HUB_CACHE, else `hub` in HF_HOME, else below HOME
    tls_ca: Optional[str] = None  # DYN_MDC_TLS_CA: PEM file of the CAs to trust; None: the system's
    tls_cert: Optional[str] = None  # DYN_MDC_TLS_CERT: PEM file, the certificate to show to servers
    tls_key: Optional[str] = None  # DYN_MDC_TLS_KEY: PEM file; None: the key is in `tls_cert`
    tokens_file: Optional[str] = None  # DYN_MDC_TOKENS_FILE: which bearer token goes to which origin
    home: str = field(default="", compare=False)  # HOME as it is found, to say why it cannot be used

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None) -> FrontendSettings:
        """Read the settings from `environ` (None: this process's own, as it is now).

        Raises SettingsError for a variable about trust that is set, and names no file.
        """
        env = os.environ if environ is None else environ
        home = env.get("HOME", "")
        below_home = os.path.join(home, ".cache") if os.path.isabs(home) else None
        return cls(
            cache_root=_place("DYN_MDC_CACHE", env) or _join(below_home, "dynamo", "mdc"),
            hf_hub_cache=_place("HF_HUB_CACHE", env)
            or _join(_place("HF_HOME", env) or _join(below_home, "huggingface"), "hub"),
            tls_ca=_trust("DYN_MDC_TLS_CA", env),
            tls_cert=_trust("DYN_MDC_TLS_CERT", env),
            tls_key=_trust("DYN_MDC_TLS_KEY", env),
            tokens_file=_trust("DYN_MDC_TOKENS_FILE", env),
            home=home,
        )


def loader_environment(environ: Optional[Mapping[str, str]] = None) -> dict[str, str]:
    """Return what a Python that is launched without any environment may need to find its own libraries."""
    env = os.environ if environ is None else environ
    return {name: env[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in env}


def _place(variable: str, env: Mapping[str, str]) -> Optional[str]:
    """Return the place that a variable names, None where it is unset or would need a HOME that is none."""
    text = env.get(variable, "")
    if text != "~" and not text.startswith("~/"):
        return text or None
    home = env.get("HOME", "")
    return home.rstrip("/") + text[1:] or "/" if os.path.isabs(home) else None


def _trust(variable: str, env: Mapping[str, str]) -> Optional[str]:
    """Return the file that says whom to trust or what to show, None where the variable is unset."""
    text = _guard(variable, env)
    place = _place(variable, env)
    if text is not None and place is None:
        raise _unusable(variable, text, "an absolute path, for there is no HOME that ~ could stand for")
    return place


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


def _guard(variable: str, env: Mapping[str, str]) -> Optional[str]:
    """Return what guards a port or a frontend, None where the variable is unset.

    One that is set but blank is most likely a secret that did not arrive: nothing must stand open then.
    """
    text = env.get(variable)
    if text is not None and not text.strip():
        raise _unusable(variable, text, "a value, or the variable to be unset")
    return text


def _is_on(variable: str, env: Mapping[str, str], default: bool) -> bool:
    text = env.get(variable, "").strip().lower()
    return text in _ON if text else default


def _one_of(variable: str, env: Mapping[str, str], accepted: tuple[str, ...]) -> str:
    """Return one of the accepted words, the first where the variable is unset or empty."""
    text = env.get(variable, "").strip() or accepted[0]
    if text not in accepted:
        raise _unusable(variable, env[variable], " or ".join(accepted))
    return text


def _number(variable: str, env: Mapping[str, str], kind: str) -> float:
    """Return a number above zero, a whole one where `kind` is "int"."""
    text = env[variable].strip()
    pattern = _DIGITS if kind == "int" else _DECIMAL
    if not pattern.fullmatch(text) or not float(text):
        raise _unusable(variable, env[variable], _accepted_number(kind))
    return int(text) if kind == "int" else float(text)


def _accepted_number(kind: object) -> str:
    return "a whole number above 0" if kind == "int" else "a finite number above 0"


def _unusable(variable: str, value: object, accepted: str) -> SettingsError:
    message = f"{variable}={value!r} cannot be used: expected {accepted}"
    return SettingsError(message, variable=variable, value=str(value), accepted=accepted)
