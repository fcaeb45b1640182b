"""A model directory becomes a card: which file fills which slot, which are extras, how long the context is.

The rules are those of Dynamo 1.6.1; the order is fixed (slots as in the card, extras by the bytes of their
names). The directory is listed once, no subdirectory is entered, no weight file is opened, nothing is
downloaded. What is looked into (config.json, tokenizer_config.json, a custom template) is read a second time
after it was hashed and has to hash to the same; of other files the content does not matter. Blocks while
files are read; safe to call from any thread.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, TypeVar, Union

from ..errors import CardError, ModelDirError, RegistrationError, shown
from . import json5, json_text
from .checked_file import CheckedFile
from .checksum import MAX_FILE_BYTES, Checksum
from .model_card import ModelDeploymentCard
from .slots import ModelSlot

MAX_PARSED_BYTES = 64 << 20  # of a file that is looked into, so held in memory; real ones have few MiB
WEIGHT_EXTENSIONS = frozenset(  # case matters
    ("safetensors", "bin", "gguf", "onnx", "tflite", "h5", "pt", "pth", "msgpack")
)

_LENGTH = "max_position_embeddings"
_MAX_LENGTH = (1 << 32) - 1  # tokens
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
# Something other than a file may have come to this name meanwhile: it must not block, nor be our terminal.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_log = logging.getLogger(__name__)

ReadFile = Callable[[str], CheckedFile]
PathLike = Union[str, "os.PathLike[str]"]
T = TypeVar("T")


def load_card(
    directory: PathLike,
    *,
    custom_template: Optional[PathLike] = None,
    name: Optional[str] = None,
    harvest: bool = True,
    read_file: ReadFile = CheckedFile.from_disk,
) -> ModelDeploymentCard:
    """Return the card of the model in `directory`; raise one ModelDirError that lists all that is wrong.

    `name` None: the model is called by the path that was passed. `custom_template` takes the place of the
    directory's own chat template. `harvest` False: no `extra_files`. `read_file` is called once for each file
    that enters the card, with an absolute path; its OSError or RegistrationError is one of the problems.
    """
    given = os.fspath(directory)
    reading = _Reading(_scan(given), read_file)
    if not reading.listing.is_mistral():
        reading.fill_slots(custom_template)
    extras = tuple(reading.extra_files()) if harvest else ()
    length = reading.context_length()
    if reading.issues:
        raise _error(given, *reading.issues)
    return ModelDeploymentCard(
        display_name=given if name is None else name,
        source_path=given,
        architectural_max_context_length=length or None,
        extra_files=extras,
        **reading.slots,
    )


def _scan(given: str) -> _Listing:
    """List the directory under its real path; an empty path is no directory, not the current one."""
    try:
        given.encode()
        path = os.path.realpath(given) if given else given
        with os.scandir(path) as entries:
            return _Listing(path, {entry.name: entry for entry in entries})
    except (OSError, ValueError) as err:  # ValueError: NUL, or bytes that are no UTF-8
        raise _error(given, _no_directory(given, err)) from err


class _Listing:
    """The entries of a directory, as one pass over it saw them."""

    def __init__(self, path: str, entries: dict[str, os.DirEntry[str]]) -> None:
        self.path = path  # absolute
        self.entries = entries

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def status(self, name: str) -> Optional[os.stat_result]:
        """Return what the entry, or its link's target, is; None: no entry, or a link that leads nowhere."""
        entry = self.entries.get(name)
        try:
            return None if entry is None else entry.stat()
        except OSError:
            return None

    def is_file(self, name: str) -> bool:
        status = self.status(name)
        return status is not None and stat.S_ISREG(status.st_mode)

    def is_mistral(self) -> bool:
        """Whether params.json stands in for config.json; such a model has extra files only."""
        config = self.entries.get("config.json")
        try:
            if config is not None:
                config.stat()
                return False
        except FileNotFoundError:
            pass
        except OSError:  # a link in circles counts as there, unlike one to nothing
            return False
        return self.status("params.json") is not None


class _Candidate(NamedTuple):
    """A file that is to fill a slot."""

    slot: str
    variant: str
    path: str
    status: Optional[os.stat_result]
    is_custom: bool = False


class _Reading:
    """The way from a listing to slots, extras and context length; problems are collected, not raised."""

    def __init__(self, listing: _Listing, read_file: ReadFile) -> None:
        self.listing = listing
        self.issues: list[str] = []
        self.slots: dict[str, Any] = {}  # of ModelSlot, by field of the card
        self._read_file = read_file
        self._slot_names: set[str] = set()
        self._checksums: dict[str, Checksum] = {}  # by path, of what was hashed

    def fill_slots(self, custom_template: Optional[PathLike]) -> None:
        for candidate in self._candidates(custom_template):
            self._slot_names.add(os.path.basename(candidate.path))
            file = self._checked(candidate.path, candidate.status)
            if file is None:
                continue
            self.slots[candidate.slot] = ModelSlot(candidate.variant, file, candidate.is_custom)
            if candidate.is_custom:
                self._look_into(candidate.path, bytes.decode)

    def context_length(self) -> Optional[int]:
        """Return the tokens that config.json tells, else those of tokenizer_config.json, else None.

        The latter counts even where it fills no slot, in a Mistral directory. Call this last.
        """
        config, fallback = map(self.listing.path_of, ("config.json", "tokenizer_config.json"))
        length = self._look_into(config, _declared_length) if "model_info" in self.slots else None
        if length is not None or self.issues or not self.listing.is_file("tokenizer_config.json"):
            return length
        return self._look_into(fallback, _tokenizer_length)

    def extra_files(self) -> Iterator[CheckedFile]:
        """Hash and yield what is harvested, in the order of the names (that of their UTF-8 bytes, too)."""
        for name in sorted(self.listing.entries.keys() - self._slot_names):
            status = self.listing.status(name) if _is_harvested(name) else None
            if status is None or not stat.S_ISREG(status.st_mode):
                continue
            path = self.listing.path_of(name)
            if status.st_size > MAX_FILE_BYTES:
                _log.warning(
                    "%r is left out: it has %d bytes and no frontend takes more than %d",
                    path,
                    status.st_size,
                    MAX_FILE_BYTES,
                )
                continue
            file = self._checked(path, status)
            if file is not None:
                yield file

    def _candidates(self, custom_template: Optional[PathLike]) -> Iterator[_Candidate]:
        yield self._entry("model_info", "hf_config_json", "config.json")
        yield from self._tokenizer()
        yield from self._if_file("prompt_formatter", "hf_tokenizer_config_json", "tokenizer_config.json")
        yield from self._chat_template(custom_template)
        yield from self._if_file("gen_config", "hf_generation_config_json", "generation_config.json")

    def _tokenizer(self) -> Iterator[_Candidate]:
        for variant, name in (("hf_tokenizer_json", "tokenizer.json"), ("tik_token_model", "tiktoken.model")):
            if self.listing.status(name) is not None:
                yield self._entry("tokenizer", variant, name)
                return
        names = sorted(filter(_is_tiktoken, self.listing.entries))
        if len(names) > 1:
            self.issues.append(f"*.tiktoken: expected one tokenizer, found {', '.join(map(shown, names))}")
        elif names:
            yield self._entry("tokenizer", "tik_token_model", names[0])

    def _chat_template(self, custom_template: Optional[PathLike]) -> Iterator[_Candidate]:
        slot = "chat_template_file"
        if custom_template is not None:
            path = os.path.abspath(custom_template)
            yield _Candidate(slot, "hf_chat_template", path, _status(path), is_custom=True)
        elif self.listing.status("chat_template.jinja") is not None:
            yield self._entry(slot, "hf_chat_template", "chat_template.jinja")
        elif self.listing.status("chat_template.json") is not None:
            yield self._entry(slot, "hf_chat_template_json", "chat_template.json")

    def _if_file(self, slot: str, variant: str, name: str) -> Iterator[_Candidate]:
        if self.listing.is_file(name):
            yield self._entry(slot, variant, name)

    def _entry(self, slot: str, variant: str, name: str) -> _Candidate:
        return _Candidate(slot, variant, self.listing.path_of(name), self.listing.status(name))

    def _checked(self, path: str, status: Optional[os.stat_result]) -> Optional[CheckedFile]:
        """Hash a file that enters the card; None: it cannot, and `issues` says why."""
        problem = _unfit(path, status)
        if not problem:
            try:
                file = self._read_file(path)
                self._checksums[path] = file.checksum
                return file
            except (OSError, RegistrationError) as err:
                problem = f"expected a readable file, found: {_reason(err)}"
        self._complain(path, problem)
        return None

    def _look_into(self, path: str, parse: Callable[[bytes], T]) -> Optional[T]:
        """Parse a file's bytes; None: there is nothing to find, or `issues` says why it was not found."""
        try:
            return parse(_reread(path, self._checksums.get(path)))
        except (OSError, ValueError) as err:
            self._complain(path, _reason(err))
            return None

    def _complain(self, path: str, problem: str) -> None:
        inside = os.path.dirname(path) == self.listing.path
        self.issues.append(f"{os.path.basename(path) if inside else path}: {problem}")


def _status(path: str) -> Optional[os.stat_result]:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _is_harvested(name: str) -> bool:
    """Whether a file of this name becomes an extra file (if it fills no slot)."""
    if name.startswith(".") or name == "README.md" or not _is_utf8(name):
        return False
    _, dot, extension = name.rpartition(".")
    return not dot or extension not in WEIGHT_EXTENSIONS


def _is_tiktoken(name: str) -> bool:
    stem, _, extension = name.rpartition(".")
    return bool(stem) and extension == "tiktoken"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unfit(path: str, status: Optional[os.stat_result]) -> str:
    """Say why what is at `path` cannot enter a card; "": it may."""
    if status is None:
        return "expected a regular file, found nothing of that name (or a link that leads nowhere)"
    if not stat.S_ISREG(status.st_mode):
        return f"expected a regular file, found {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}"
    if status.st_size > MAX_FILE_BYTES:
        return f"expected at most {MAX_FILE_BYTES} bytes, found {status.st_size}"
    return "" if _is_utf8(path) else f"expected a path in UTF-8, found {shown(path)}"


def _reread(path: str, checksum: Optional[Checksum]) -> bytes:
    """Return a file's bytes; raises ValueError if they do not hash to `checksum` (None: nothing is known)."""
    with open(os.open(path, _OPEN_FLAGS), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_PARSED_BYTES:
            raise ValueError(f"expected at most {MAX_PARSED_BYTES} bytes, found {size}")
        data = file.read(size + 1)
    found = Checksum.of(data) if checksum else None
    if found != checksum:
        raise ValueError(f"changed while the model directory was read: expected {checksum}, found {found}")
    return data


def _declared_length(config: bytes) -> Optional[int]:
    """Return the context length in tokens that a config.json declares; raises ValueError if Dynamo would."""
    outer = json5.fields(json5.loads(config.decode()), (_LENGTH, "text_config"), at_least=2)
    nested = outer.get("text_config")
    inner = {} if nested is None else json5.fields(nested, (_LENGTH,))
    json5.whole([outer.get(_LENGTH), inner.get(_LENGTH)])
    if _LENGTH in outer:
        return _tokens(_LENGTH, outer[_LENGTH])
    return _tokens(f"text_config.{_LENGTH}", inner[_LENGTH]) if _LENGTH in inner else None


def _tokens(field: str, value: Any) -> int:
    if type(value) is int and 0 <= value <= _MAX_LENGTH:
        return value
    raise ValueError(f"{field}: expected a whole number from 0 to {_MAX_LENGTH}, found {shown(value)}")


def _tokenizer_length(config: bytes) -> Optional[int]:
    """Return the context length in tokens that a tokenizer_config.json tells, None if it is of no use."""
    try:
        value = json_text.loads(config)
    except CardError:
        return None
    length = value.get("model_max_length") if isinstance(value, dict) else None
    return length if type(length) is int and 0 <= length <= _MAX_LENGTH else None


def _reason(err: Exception) -> str:
    if isinstance(err, UnicodeDecodeError):
        return f"expected UTF-8, found the byte 0x{err.object[err.start]:02x} at offset {err.start}"
    return (err.strerror if isinstance(err, OSError) else None) or str(err)


def _no_directory(given: str, err: Exception) -> str:
    if isinstance(err, NotADirectoryError):
        return "expected a model directory, found a file: pass the directory that it is in"
    if not isinstance(err, FileNotFoundError):
        return f"expected a model directory that can be listed, found: {_reason(err)}"
    if _REPO_ID.fullmatch(given):
        return (
            "expected a model directory, found nothing here: if this is a Hugging Face repo id, download the"
            " repo first and pass the directory, selfhost does not download"
        )
    return "expected a model directory, found nothing there"


def _error(given: str, *issues: str) -> ModelDirError:
    return ModelDirError(f"model directory {shown(given)}: {'; '.join(issues)}", path=given, issues=issues)
