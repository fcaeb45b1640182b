"""Which processes that share a registry are alive: a file for each, locked as long as its process lives.

The lock is one of POSIX (fcntl): the kernel gives it back at whatever death, and a forked child does not have
it. It is also lost when its process closes any descriptor of the file, so no process ever opens a file of its
own a second time; `_own` knows them, whatever registry they belong to.
"""

from __future__ import annotations

import fcntl
import os
import re

from .content import Descriptor
from .shared_folder import SharedFolder

_TOKEN = re.compile("[0-9]+-[0-9a-f]{16}")

_own: dict[str, Descriptor] = {}  # token -> the file, open and locked


def new_owner(folder: SharedFolder) -> str:
    """Make this process known as an owner and return its token; under the folder's lock. Raises OSError."""
    token = f"{os.getpid()}-{os.urandom(8).hex()}"
    descriptor = Descriptor(folder.open(f"owners/{token}", os.O_RDWR | os.O_CREAT | os.O_EXCL))
    try:
        fcntl.lockf(descriptor.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        folder.remove(f"owners/{token}")
        raise
    _own[token] = descriptor
    return token


def end_owner(folder: SharedFolder, token: str) -> None:
    """Remove an owner of this process, or one that is dead. Raises OSError."""
    _own.pop(token, None)
    folder.remove(f"owners/{token}")


def known_owners(folder: SharedFolder) -> list[str]:
    """Return the tokens of all owners that have a file, dead or alive."""
    return [name for name in folder.names("owners") if _TOKEN.fullmatch(name)]


def is_alive(folder: SharedFolder, token: str) -> bool:
    """Tell whether the process of an owner lives; under the folder's lock. Raises OSError.

    An owner without a file counts as dead: who removes the file withdraws what it stands for.
    """
    if token in _own:
        return True
    try:
        fd = folder.open(f"owners/{token}", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that is held
        return True
    finally:
        os.close(fd)
    return False


def forget_owners() -> None:
    """In a forked child: these are the parent's. Closing them here takes no lock away from it."""
    _own.clear()
