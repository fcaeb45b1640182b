"""The journal of a shared registry: one JSON line per change, appended under the folder's lock.

    ["selfhost",1]                                              the format and its version
    ["add","<id>","<slug>","<suffix>",                          a registration
     [["<name>","<hex>",<size>,<serial>,<is_plain>],...]]
    ["remove",["<id>",...]]                                     registrations that were closed
    ["gone","<owner>"]                                          all whose id is "<owner>.<number>"

Readers take no lock. Bytes once written never change, so whatever stands before the last newline is whole. A
line torn by a writer that was killed, or by a full disk, is ended by the next writer, and stays unreadable.
A journal of mostly old news is replaced by a new file; readers see that theirs has no name any more.

Lines are not synced: after a crash of the machine every owner is gone, and with it what it registered.
A new file is, before it has its name: an empty one would keep everybody out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Optional, Union

from ..card.checksum import MAX_FILE_BYTES
from ..errors import RegistrationError
from .answer import CARD
from .artifacts import model_target
from .content import Descriptor
from .names import segment
from .shared_folder import SharedFolder

MAX_LINE_BYTES = 1024 * 1024  # about 9,000 files in one registration; readers hold no more than this
_HEADER = b'["selfhost",1]'
_TORN = b" torn\n"  # after any text, even a whole line without its end, this is no JSON
_ID = re.compile(r"[0-9]+-[0-9a-f]{16}\.[0-9]+")  # the owner's token, and a number
_HEX = re.compile("[0-9a-f]{64}")


class File(NamedTuple):
    """One file of an `Add`; see `Row`."""

    name: str
    hex: str
    size: int
    serial: int
    is_plain: bool


class Add(NamedTuple):
    """A registration."""

    id: str
    slug: str
    suffix: str
    files: tuple[File, ...]


class Remove(NamedTuple):
    """Registrations that were closed."""

    ids: tuple[str, ...]


class Gone(NamedTuple):
    """A process that ended."""

    owner: str


Change = Union[Add, Remove, Gone]


def owner_of(id: str) -> str:
    """Return the token of the process whose registration this is."""
    return id.rpartition(".")[0]


class Journal:
    """The open journal of a folder. `size` is where the lines end that have been read, in bytes.

    `seen` is where the file ended then: behind `size`, if the last line has no end. `read` and `append`
    belong under the lock of the index that follows; any thread may look at the numbers.
    """

    def __init__(self, folder: SharedFolder) -> None:
        self._descriptor = Descriptor(folder.open("journal", os.O_RDWR | os.O_APPEND))
        self.fd = self._descriptor.fd
        self.size = self.seen = 0
        if os.pread(self.fd, len(_HEADER) + 1, 0) != _HEADER + b"\n":
            raise folder.refusal("holds no journal that this version of selfhost can read; name another one")

    def read(self) -> Iterator[Optional[Change]]:
        """Yield what the new whole lines say; None for a line that says nothing."""
        while True:
            data = os.pread(self.fd, MAX_LINE_BYTES, self.size)
            end = data.rfind(b"\n") + 1
            for line in data[:end].split(b"\n")[:-1]:
                yield parse(line)
            if len(data) < MAX_LINE_BYTES:
                self.seen = self.size + len(data)
                self.size += end
                return
            self.size += end or len(data)  # a line longer than any of ours is skipped piece by piece

    def append(self, line: bytes) -> None:
        """Write one line, under the folder's lock and with all of the journal read. Raises OSError."""
        is_torn = os.fstat(self.fd).st_size != self.size
        data = memoryview((_TORN if is_torn else b"") + line)
        while data:
            data = data[os.write(self.fd, data) :]


def write_journal(folder: SharedFolder, lines: Iterable[bytes]) -> None:
    """Put a new journal in the place of the old one, in one step; under the lock. Raises OSError."""
    fd = folder.open("journal.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with open(fd, "wb") as file:
            file.write(_HEADER + b"\n")
            file.writelines(lines)
            file.flush()
            os.fsync(fd)
        os.replace("journal.new", "journal", src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    except BaseException:
        folder.remove("journal.new")
        raise


# ------------------------------------------------------------------ lines


def render(change: Change) -> bytes:
    """Return the line of a change."""
    name = type(change).__name__.lower()
    return json.dumps([name, *change], ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes) -> Optional[Change]:
    """Return what a line says, or None for one that nobody of us wrote whole."""
    try:
        name, *fields = json.loads(line)
        change: Change = _PARSERS[name](*fields)
    except (ValueError, TypeError, LookupError, RecursionError, RegistrationError):
        return None
    return change


def _parse_add(id: Any, slug: Any, suffix: Any, files: Any) -> Add:
    model_target(slug, suffix)
    return Add(_parse_id(id), slug, suffix, tuple([_parse_file(*file) for file in files]))


def _parse_file(name: Any, hex: Any, size: Any, serial: Any, is_plain: Any) -> File:
    if name != CARD:
        segment(name, "filename")
    is_right = type(size) is int and 0 <= size <= MAX_FILE_BYTES and type(serial) is int and serial > 0
    if not is_right or type(is_plain) is not bool or not _HEX.fullmatch(hex):
        raise ValueError("no such file")
    return File(name, hex, size, serial, is_plain)


def _parse_remove(ids: Any) -> Remove:
    return Remove(tuple(map(_parse_id, ids)))


def _parse_gone(owner: Any) -> Gone:
    return Gone(owner_of(_parse_id(f"{owner}.0")))


def _parse_id(id: Any) -> str:
    if not _ID.fullmatch(id):
        raise ValueError("no such registration")
    return str(id)


_PARSERS: dict[str, Callable[..., Change]] = {"add": _parse_add, "remove": _parse_remove, "gone": _parse_gone}
