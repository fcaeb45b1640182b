"""How the directory store is laid out on disk (Dynamo 1.6.1): names, and reading one record.

`<root>/v1/<bucket>/<key>`, where every byte of the key that is no ASCII letter or digit is written `%XX`; a
record in the making is called `.tmp_` and 16 hex digits. Whatever is named otherwise is not ours to touch.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Optional
from urllib.parse import unquote_to_bytes

from ..errors import DiscoveryError
from .base import Bucket, RecordKey, is_record

MAX_RECORD_BYTES = 16 << 20  # far above any card; what is larger is no record, and would fill the memory

_TO_ESCAPE = re.compile(rb"[^A-Za-z0-9]")
_TEMPORARY = re.compile(r"\.tmp_[0-9a-f]{16}")


def bucket_directory(root: str, bucket: Bucket) -> str:
    """Return the directory that holds the records of one bucket."""
    return os.path.join(root, "v1", bucket.value)


def file_name(key: RecordKey) -> str:
    """Return the file name of a key."""
    return _TO_ESCAPE.sub(lambda match: f"%{match[0][0]:02X}".encode(), str(key).encode()).decode()


def key_of(name: str) -> Optional[RecordKey]:
    """Return the key that a file name stands for, None where it stands for none.

    As lenient as Dynamo: zero-padded ids and characters that were left unescaped are fine.
    """
    try:
        return RecordKey.parse(unquote_to_bytes(name).decode())
    except (DiscoveryError, UnicodeError):
        return None


def new_temporary_name() -> str:
    """Return a name for a record in the making that nobody else has."""
    return f".tmp_{os.urandom(8).hex()}"


def is_temporary(name: str) -> bool:
    """Tell whether the name is one of a record in the making."""
    return _TEMPORARY.fullmatch(name) is not None


def read_bytes(path: str) -> bytes:
    """Read a whole record file; OSError where it is no regular file, or larger than any record."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not block
    descriptor = os.open(path, flags)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path!r} is no regular file")
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise OSError(f"{path!r} is larger than {MAX_RECORD_BYTES} bytes")
    return data


def text_of(data: bytes) -> Optional[str]:
    """Return the text of a record, None where the bytes are none (yet)."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if is_record(text) else None
