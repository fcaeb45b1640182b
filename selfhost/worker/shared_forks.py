"""Forks beside threads that use shared registries: a child holds no lock of its parent's and owns nothing."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import TYPE_CHECKING

from .shared_folder import forget_locks
from .shared_owners import forget_owners

if TYPE_CHECKING:
    from .shared import Shared

_all: weakref.WeakValueDictionary[int, Shared] = weakref.WeakValueDictionary()  # by id
_forking = threading.local()  # `.held`: what the forking thread has locked


def track(shared: Shared) -> None:
    """See to it that every child's copy can be used, and owns nothing."""
    _all[id(shared)] = shared


@functools.cache
def install_fork_hooks() -> None:
    """Be asked at every fork; before anything is locked."""
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _before_fork() -> None:
    held = _forking.__dict__.setdefault("held", [])
    for shared in filter(None, [reference() for reference in _all.valuerefs()]):  # others may add
        shared.index.lock.acquire()
        held.append(shared)


def _after_fork() -> None:
    held = _forking.__dict__.get("held", [])
    while held:  # all: two threads that made the first registries may have installed the hooks twice
        held.pop().index.lock.release()


def _in_child() -> None:
    _after_fork()
    forget_locks()
    forget_owners()
    for shared in list(_all.values()):
        shared.forget_parent()
