"""The worker's commands: `selfhost serve` and `selfhost card`.

SIGTERM, SIGINT and a terminal that goes away end `serve` in order: the card is withdrawn, the server closed,
the exit code is 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Optional

from ..errors import SettingsError
from ..settings import Settings
from .support import add_command, path, print_bytes, refuse_token, text

if TYPE_CHECKING:
    from ..worker.local_model import LocalModel
    from .support import Commands

SERVE_HOST = "127.0.0.1"  # nobody else is let in unasked
SERVE_PORT = 9090  # fixed, so that the URLs are the same after a restart
CHECKSUM_WIDTH = len("blake3:") + 64  # characters

SERVE_EXAMPLES = """\
examples:
  selfhost serve ./my-model --name my/model
  selfhost serve ./my-model --host 0.0.0.0    for frontends on other machines
  selfhost serve ./my-model --host 0.0.0.0 --advertise https://gw.example/gpu7    behind NAT or a proxy
  selfhost serve ./my-model --discovery file:/srv/kv --lora my-adapter
  selfhost serve ./my-model --host 0.0.0.0 --tls-cert me.pem --tls-key me.key --token-file secret

The variables in parentheses set the defaults; flags win over them. A token itself has no flag: everybody on
the machine can read a command line. Ctrl-C, SIGTERM or SIGINT end it: the card is withdrawn, the server
closed, the exit code is 0.
"""

CARD_EXAMPLES = """\
examples:
  selfhost card ./my-model
  selfhost card ./my-model --name my/model | python3 -m json.tool
  selfhost card ./my-model --lora my-adapter

It is the card that `selfhost serve` publishes, but with the files' local paths in place of URLs.
"""


# ------------------------------------------------------------------ arguments


def add_serve(commands: Commands) -> None:
    """Add `selfhost serve`."""
    parser = add_command(
        commands, "serve", serve, "serve a model directory and publish its card", SERVE_EXAMPLES
    )
    _add_model(parser)
    add = parser.add_argument
    more = "publish a LoRA adapter on this model, too; may be repeated"
    add("--lora", metavar="NAME", type=text, action="append", default=[], help=more)
    add("--host", help=f"address to listen on (DYN_SYSTEM_HOST, else {SERVE_HOST})")
    add("--port", type=_port, help=f"0 takes any free one (DYN_SYSTEM_PORT, else {SERVE_PORT})")
    base = "base URL that frontends use (DYN_SYSTEM_ADVERTISE_URL, else the address listened on)"
    add("--advertise", metavar="URL", type=_base_url, help=base)
    where = "file:DIR, a store shared with frontends, or mem (DYN_DISCOVERY_BACKEND and DYN_FILE_KV)"
    add("--discovery", metavar="WHERE", type=_discovery, default={}, help=where)
    for part, default in (("namespace", "dynamo"), ("component", "backend"), ("endpoint", "generate")):
        add(f"--{part}", metavar="NAME", type=_part, default=default, help=f"published (default {default})")
    _add_serving(parser)
    refuse_token(parser)


def _add_serving(parser: argparse.ArgumentParser) -> None:
    """Add how the server runs, and whom it lets in."""
    add = parser.add_argument
    index = "list what is served at /v1/metadata (DYN_SYSTEM_METADATA_INDEX, else on)"
    add("--index", action=argparse.BooleanOptionalAction, help=index)
    where = "run the server on a thread or in a process of its own (DYN_SYSTEM_ISOLATION, else thread)"
    add("--isolation", choices=("thread", "process"), help=where)
    cert = "speak TLS, with this PEM file of the certificate and its chain (DYN_SYSTEM_TLS_CERT)"
    add("--tls-cert", metavar="FILE", type=path, help=cert)
    key = "PEM file of its key, if that is a file of its own (DYN_SYSTEM_TLS_KEY)"
    add("--tls-key", metavar="FILE", type=path, help=key)
    ca = "let in only clients with a certificate of these CAs, a PEM file (DYN_SYSTEM_TLS_CLIENT_CA)"
    add("--tls-client-ca", metavar="FILE", type=path, help=ca)
    ask = "ask for the bearer token in this file (DYN_SYSTEM_TOKEN_FILE, or DYN_SYSTEM_TOKEN itself)"
    add("--token-file", metavar="FILE", type=path, help=ask)


def add_card(commands: Commands) -> None:
    """Add `selfhost card`."""
    does = "print the card of a model directory as JSON"
    parser = add_command(commands, "card", print_card, does, CARD_EXAMPLES)
    _add_model(parser)
    parser.add_argument("--lora", metavar="NAME", type=text, help="the card of a LoRA adapter on this model")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", metavar="DIR", help="the model directory: config.json, tokenizer.json and so on")
    add("--name", type=text, help="what clients call the model (default: the directory's name)")
    add("--template", metavar="FILE", help="chat template in place of the directory's own")


def _part(value: str) -> str:
    """Take one of the three parts that dots join into an endpoint's path."""
    if {".", "/"} & set(text(value)):
        raise argparse.ArgumentTypeError(f"{value!r} must hold neither a dot nor a slash")
    return value


def _port(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 5 and int(value) <= 65535):
        raise argparse.ArgumentTypeError(f"{value!r}: expected 1 to 65535, or 0 for any free port")
    return int(value)


def _base_url(value: str) -> str:
    from ..worker.advertise import AdvertisedAddress

    try:
        return AdvertisedAddress.parse(value, variable="--advertise").base_url
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _discovery(value: str) -> dict[str, str]:
    """Return the settings that `file:DIR`, `file` or `mem` change."""
    backend, colon, root = value.partition(":")
    if backend == "file" and bool(colon) == bool(root):
        return {"discovery_backend": backend, **({"file_kv": os.path.abspath(root)} if root else {})}
    if value == "mem":
        return {"discovery_backend": value}
    raise argparse.ArgumentTypeError(f"{value!r}: expected file:DIR, file or mem")


def _name(arguments: argparse.Namespace) -> str:
    given: Optional[str] = arguments.name
    return given or os.path.basename(os.path.abspath(arguments.directory)) or arguments.directory


# ------------------------------------------------------------------ card


def print_card(arguments: argparse.Namespace) -> None:
    """Print the card of a model directory, or of an adapter on it."""
    from ..card.model_dir import load_card
    from ..card.model_type import WorkerType

    loaded = load_card(arguments.directory, name=_name(arguments), custom_template=arguments.template)
    loaded = dataclasses.replace(loaded, worker_type=WorkerType.Aggregated)
    if arguments.lora is not None:
        loaded = loaded.derive_lora(arguments.lora)
    print_bytes(loaded.to_json().encode())  # JSON is UTF-8, whatever the terminal is


# ------------------------------------------------------------------ serve


def serve(arguments: argparse.Namespace) -> None:
    """Serve a model directory until a signal ends it; then withdraw and close."""
    from ..worker.answer import INDEX
    from ..worker.runtime import DistributedRuntime

    with _EndingSignals() as ending:
        settings = serve_settings(arguments)
        models = _load_all(arguments)
        ending.hold()
        with DistributedRuntime(settings) as runtime:
            endpoint = runtime.endpoint(f"{arguments.namespace}.{arguments.component}.{arguments.endpoint}")
            for model in models:
                model.attach(endpoint)
            _print_table(models)
            if runtime.settings.metadata_index:
                print(f"See it all: {runtime.base_url()}{INDEX}")
            _print_next(runtime.settings, models)
            ending.wait()


class _Ended(BaseException):
    """A signal came while nothing was published yet."""


class _EndingSignals:
    """The signals that end `serve`; a context manager.

    Up to `hold` one of them ends the block at once. From then on none interrupts a step half way: `wait`
    returns when one has come, be it long before. After an error the handlers are again as they were; else the
    signals are ignored, because the process ends next and a late one must not change its exit code.

    No mask and no sigwait: they fail where another thread, such as one that hashes, does not block the
    signal. Python writes each signal into our pipe, whichever thread the system chose for it.
    """

    def __init__(self) -> None:
        self._numbers = {signal.SIGINT, signal.SIGTERM}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            self._numbers.add(signal.SIGHUP)
        self._is_held = False

    def hold(self) -> None:
        """Let signals wait from now on."""
        self._is_held = True

    def wait(self) -> None:
        """Return when one of the signals has come."""
        while os.read(self._reading, 1)[0] not in self._numbers:
            pass

    def _handle(self, number: int, frame: object) -> None:
        if not self._is_held:
            self._is_held = True  # a second one must not interrupt the clearing up
            raise _Ended

    def __enter__(self) -> _EndingSignals:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> bool:
        self._is_held = True
        is_in_order = error is None or isinstance(error, _Ended)
        for number, before in self._handlers_before.items():
            signal.signal(number, signal.SIG_IGN if is_in_order else before or signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reading)
        os.close(self._writing)
        return is_in_order


@dataclasses.dataclass(frozen=True)
class _ServeSettings(Settings):
    """The environment's settings, but for what they are where it says nothing."""

    system_host: str = SERVE_HOST
    metadata_index: bool = True


def serve_settings(arguments: argparse.Namespace) -> Settings:
    """Return what the flags say, else the environment, else a fixed port of loopback; SettingsError."""
    given = {"self_host_metadata": True, **arguments.discovery}
    flags = {
        "system_host": arguments.host,
        "system_port": arguments.port,
        "advertise_url": arguments.advertise,
        "metadata_index": arguments.index,
        "isolation": arguments.isolation,
        "tls_cert": arguments.tls_cert,
        "tls_key": arguments.tls_key,
        "tls_client_ca": arguments.tls_client_ca,
        "token_file": arguments.token_file,
    }
    if arguments.token_file is not None:
        given["token"] = None  # the environment's, which would be a second one
    given.update((name, value) for name, value in flags.items() if value is not None)
    settings = _ServeSettings.from_env(**given)
    return (
        settings
        if settings.system_port is not None
        else dataclasses.replace(settings, system_port=SERVE_PORT)
    )


def _load_all(arguments: argparse.Namespace) -> list[LocalModel]:
    """Load the model, then make each adapter on it with the same pinned files."""
    from ..card.model_type import WorkerType
    from ..worker.local_model import LocalModel

    loaded = LocalModel.load(arguments.directory, name=_name(arguments), custom_template=arguments.template)
    card = dataclasses.replace(loaded.card, worker_type=WorkerType.Aggregated)
    model = LocalModel(card, contents=loaded.contents)
    return [model, *(model.derive_lora(name) for name in arguments.lora)]


def _print_table(models: Sequence[LocalModel]) -> None:
    """Print one line a file, the URL last: it is the one that may be long."""
    files = [file for model in models for file in model.files]
    width = max(map(len, ("BYTES", *(str(file.size) for file in files))))
    print(f"{'BYTES':>{width}}  {'CHECKSUM':<{CHECKSUM_WIDTH}}  URL")
    for file in files:
        print(f"{file.size:>{width}}  {file.checksum!s:<{CHECKSUM_WIDTH}}  {file.url}")


def _print_next(settings: Settings, models: Sequence[LocalModel]) -> None:
    for model in models:
        print(f"Fetch it: selfhost fetch {shlex.quote(str(model.card_url))}")
    # What a proxy in front asks for and shows nobody here knows.
    is_secure = settings.tls_cert is not None and str(models[0].card_url).startswith("https:")
    needed = _needed(settings, is_secure=is_secure)
    if needed:
        print(f"Whoever fetches needs {' and '.join(needed)}")
    names = ", ".join(repr(model.card.display_name) for model in models)
    if settings.discovery_backend == "file":
        print(f"Serving {names} until Ctrl-C. {_about_dynamo(settings, is_secure=is_secure)}", flush=True)
    else:
        what = "published to nobody; for frontends, add --discovery file:DIR"
        print(f"Serving {names} until Ctrl-C, {what}", flush=True)


def _about_dynamo(settings: Settings, *, is_secure: bool) -> str:
    """Return how Dynamo's own frontend comes to the model, or why it cannot."""
    if settings.token is not None or settings.token_file is not None or settings.tls_client_ca is not None:
        return "Dynamo's own frontend cannot fetch it: it sends neither a token nor a client certificate"
    trust = "SSL_CERT_FILE=CA.pem " if is_secure else ""  # which stands for that of the certificate
    store = shlex.quote(os.path.abspath(settings.file_kv))
    frontend = f"{trust}DYN_FILE_KV={store} python -m dynamo.frontend --discovery-backend file"
    return f"A Dynamo frontend lists it: {frontend}"


def _needed(settings: Settings, *, is_secure: bool) -> list[str]:
    """Return what clients must have, and which option or variable of theirs names it."""
    needed = []
    if is_secure:
        needed.append("to trust the certificate's CA (--ca or DYN_MDC_TLS_CA, if the system does not)")
    if settings.tls_client_ca is not None:
        needed.append("a client certificate (--cert or DYN_MDC_TLS_CERT)")
    if settings.token is not None or settings.token_file is not None:
        needed.append("the bearer token (--token-file or DYN_MDC_TOKENS_FILE)")
    return needed
