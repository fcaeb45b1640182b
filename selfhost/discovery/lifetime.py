"""What becomes of a discovery object at interpreter exit, and in a forked child.

At exit it is closed, which withdraws what it published; in a child it begins anew, with nothing published.
What was made last is closed first, as it may rest on what was there. The hooks are set once, when the first
object is made, and keep none of them alive.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import weakref
from typing import Protocol


class Tracked(Protocol):
    """Something with an end and, in a forked child, a new beginning."""

    def close(self) -> None:
        """End it; called at interpreter exit."""

    def begin_anew(self) -> None:
        """Forget the parent's state, locks included: a thread that is not there now may have held one."""


_tracked: weakref.WeakValueDictionary[int, Tracked] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def track(discovery: Tracked) -> None:
    """See to it that the object is closed at exit and begins anew in forked children."""
    _install_hooks()
    _tracked[next(_numbers)] = discovery


@functools.cache
def _install_hooks() -> None:
    atexit.register(_close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_anew_all)


def _close_all() -> None:
    for _, discovery in sorted(_tracked.items(), reverse=True):
        discovery.close()


def _begin_anew_all() -> None:
    for discovery in list(_tracked.values()):
        discovery.begin_anew()
