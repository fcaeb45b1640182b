"""The command line: `selfhost card`, `selfhost serve`, `selfhost demo`.

Exit codes: 0 done; 1 an error, told in one line on stderr; 2 wrong usage. SIGTERM, SIGINT and a terminal that
goes away end `serve` in order: the card is withdrawn, the server closed, the code is 0. Results go to stdout,
everything else to stderr; when the reader of stdout leaves, the command ends quietly with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Callable, Optional

from . import __version__, demo
from .card.model_dir import load_card
from .card.model_type import WorkerType
from .errors import SelfHostError, SettingsError
from .settings import Settings
from .worker.advertise import AdvertisedAddress
from .worker.local_model import LocalModel, ServedFile
from .worker.runtime import DistributedRuntime

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

SERVE_HOST = "127.0.0.1"  # nobody else is let in unasked
SERVE_PORT = 9090  # fixed, so that the URLs are the same after a restart
CHECKSUM_WIDTH = len("blake3:") + 64  # characters


DEMO_EXAMPLES = """\
examples:
  selfhost demo           a tiny model on a free loopback port; exit code 1 if any byte is wrong
  selfhost demo --keep    the same, and leave its directory for a `selfhost serve` of your own
"""

SERVE_EXAMPLES = """\
examples:
  selfhost serve ./my-model --name my/model
  selfhost serve ./my-model --host 0.0.0.0                       for frontends on other machines
  selfhost serve ./my-model --advertise https://gw.example/gpu7  behind NAT or a proxy
  selfhost serve ./my-model --discovery file:/srv/kv --lora my-adapter

The variables in parentheses set the defaults; flags win over them. Ctrl-C, SIGTERM or SIGINT end it: the
card is withdrawn, the server closed, the exit code is 0.
"""

CARD_EXAMPLES = """\
examples:
  selfhost card ./my-model
  selfhost card ./my-model --name my/model | python3 -m json.tool
  selfhost card ./my-model --lora my-adapter

It is the card that `selfhost serve` publishes, but with the files' local paths in place of URLs.
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code; wrong usage and --help raise SystemExit, as argparse does."""
    arguments = make_parser().parse_args(argv)
    level = logging.DEBUG if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="selfhost: %(levelname)s: %(message)s")
    try:
        arguments.run(arguments)
        _flush()
    except BrokenPipeError:  # whoever read our output has left; nobody is there to be told
        _discard_stdout()
        return 1
    except (SelfHostError, OSError, UnicodeError) as error:  # the last: a name that stdout cannot show
        return _fail(_one_line(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


# ------------------------------------------------------------------ arguments


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; `run` of its result is the command's function."""
    parser = argparse.ArgumentParser(
        prog="selfhost",
        description="A worker serves its own model metadata, and frontends fetch exactly those bytes.",
        epilog="Start with `selfhost demo`; `selfhost COMMAND --help` has examples of each command.",
    )
    parser.add_argument("--version", action="version", version=f"selfhost {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_serve(commands)
    _add_card(commands)
    return parser


def _add_demo(commands: _Commands) -> None:
    does = "serve a tiny model to ourselves, fetch every file back and verify it"
    parser = _add(commands, "demo", _demo, does, DEMO_EXAMPLES)
    parser.add_argument("--keep", action="store_true", help="keep the model directory that is made")


def _add_serve(commands: _Commands) -> None:
    parser = _add(commands, "serve", _serve, "serve a model directory and publish its card", SERVE_EXAMPLES)
    _add_model(parser)
    add = parser.add_argument
    more = "publish a LoRA adapter on this model, too; may be repeated"
    add("--lora", metavar="NAME", type=_text, action="append", default=[], help=more)
    add("--host", help=f"address to listen on (DYN_SYSTEM_HOST, else {SERVE_HOST})")
    add("--port", type=_port, help=f"0 takes any free one (DYN_SYSTEM_PORT, else {SERVE_PORT})")
    base = "base URL that frontends use (DYN_SYSTEM_ADVERTISE_URL, else the address listened on)"
    add("--advertise", metavar="URL", type=_base_url, help=base)
    where = "file:DIR, a store shared with frontends, or mem (DYN_DISCOVERY_BACKEND and DYN_FILE_KV)"
    add("--discovery", metavar="WHERE", type=_discovery, default={}, help=where)
    for part, default in (("namespace", "dynamo"), ("component", "backend"), ("endpoint", "generate")):
        add(f"--{part}", metavar="NAME", type=_part, default=default, help=f"published (default {default})")


def _add_card(commands: _Commands) -> None:
    parser = _add(commands, "card", _card, "print the card of a model directory as JSON", CARD_EXAMPLES)
    _add_model(parser)
    parser.add_argument("--lora", metavar="NAME", type=_text, help="the card of a LoRA adapter on this model")


def _add(
    commands: _Commands, name: str, run: Callable[[argparse.Namespace], None], does: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done to stderr")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", metavar="DIR", help="the model directory: config.json, tokenizer.json and so on")
    add("--name", type=_text, help="what clients call the model (default: the directory's name)")
    add("--template", metavar="FILE", help="chat template in place of the directory's own")


def _text(value: str) -> str:
    """Take a name that JSON can carry: not empty, and no bytes that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid UTF-8") from None
    if not value:
        raise argparse.ArgumentTypeError("it must not be empty")
    return value


def _part(value: str) -> str:
    """Take one of the three parts that dots join into an endpoint's path."""
    if {".", "/"} & set(_text(value)):
        raise argparse.ArgumentTypeError(f"{value!r} must hold neither a dot nor a slash")
    return value


def _port(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 5 and int(value) <= 65535):
        raise argparse.ArgumentTypeError(f"{value!r}: expected 1 to 65535, or 0 for any free port")
    return int(value)


def _base_url(value: str) -> str:
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


# ------------------------------------------------------------------ demo and card


def _demo(arguments: argparse.Namespace) -> None:
    demo.run(keep=arguments.keep)


def _card(arguments: argparse.Namespace) -> None:
    """Print the card of a model directory, or of an adapter on it."""
    loaded = load_card(arguments.directory, name=_name(arguments), custom_template=arguments.template)
    loaded = dataclasses.replace(loaded, worker_type=WorkerType.Aggregated)
    if arguments.lora is not None:
        loaded = loaded.derive_lora(arguments.lora)
    _flush()
    sys.stdout.buffer.write(loaded.to_json().encode() + b"\n")  # JSON is UTF-8, whatever the terminal is


# ------------------------------------------------------------------ serve


def _serve(arguments: argparse.Namespace) -> None:
    """Serve a model directory until a signal ends it; then withdraw and close."""
    with _EndingSignals() as ending:
        settings = serve_settings(arguments)
        models = _load_all(arguments)
        ending.hold()
        with DistributedRuntime(settings) as runtime:
            endpoint = runtime.endpoint(f"{arguments.namespace}.{arguments.component}.{arguments.endpoint}")
            for model in models:
                model.attach(endpoint)
            _print_table([file for model in models for file in model.files])
            print(_what_next(runtime.settings, models), flush=True)
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
    """The environment's settings, but loopback where it names no address."""

    system_host: str = SERVE_HOST


def serve_settings(arguments: argparse.Namespace) -> Settings:
    """Return what the flags say, else the environment, else a fixed port of loopback; SettingsError."""
    given = {"self_host_metadata": True, **arguments.discovery}
    flags = {
        "system_host": arguments.host,
        "system_port": arguments.port,
        "advertise_url": arguments.advertise,
    }
    given.update((name, value) for name, value in flags.items() if value is not None)
    settings = _ServeSettings.from_env(**given)
    return (
        settings
        if settings.system_port is not None
        else dataclasses.replace(settings, system_port=SERVE_PORT)
    )


def _load_all(arguments: argparse.Namespace) -> list[LocalModel]:
    """Load the model, then make each adapter on it with the same pinned files."""
    loaded = LocalModel.load(arguments.directory, name=_name(arguments), custom_template=arguments.template)
    card = dataclasses.replace(loaded.card, worker_type=WorkerType.Aggregated)
    model = LocalModel(card, contents=loaded.contents)
    return [model, *(model.derive_lora(name) for name in arguments.lora)]


def _print_table(files: Sequence[ServedFile]) -> None:
    """Print one line a file, the URL last: it is the one that may be long."""
    width = max(len(text) for text in ("BYTES", *(str(file.size) for file in files)))
    print(f"{'BYTES':>{width}}  {'CHECKSUM':<{CHECKSUM_WIDTH}}  URL")
    for file in files:
        print(f"{file.size:>{width}}  {file.checksum!s:<{CHECKSUM_WIDTH}}  {file.url}")


def _what_next(settings: Settings, models: Sequence[LocalModel]) -> str:
    names = ", ".join(repr(model.card.display_name) for model in models)
    if settings.discovery_backend == "file":
        store = shlex.quote(os.path.abspath(settings.file_kv))
        frontend = f"DYN_FILE_KV={store} python -m dynamo.frontend --discovery-backend file"
        return f"Serving {names} until Ctrl-C. A Dynamo frontend lists it: {frontend}"
    return f"Serving {names} until Ctrl-C, published to nobody; for frontends, add --discovery file:DIR"


# ------------------------------------------------------------------ output


def _fail(message: str) -> int:
    with contextlib.suppress(OSError):
        print(f"selfhost: error: {message}", file=sys.stderr, flush=True)
    return 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}"
    return " ".join(str(error).split())


def _flush() -> None:
    if sys.stdout is not None:  # None: the process was started without one
        sys.stdout.flush()


def _discard_stdout() -> None:
    """Let the interpreter's last flush go nowhere, where it cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
