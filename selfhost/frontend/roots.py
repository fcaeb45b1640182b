"""Which root a cache has: the one that is asked for, Dynamo's below HOME, or a private temporary one."""

from __future__ import annotations

import atexit
import functools
import logging
import os
from typing import Optional

from ..errors import CacheError, shown
from ..settings import FrontendSettings
from .folders import Root, attempt

logger = logging.getLogger(__name__)

_private: dict[str, str] = {}  # the "root" of this process, once there is one


def choose_root(root: Optional[str], *, fsync: bool) -> tuple[Root, list[Root]]:
    """Return the root to write to, made if it is missing, and what to read from besides.

    None stands for the one of the environment. If that cannot be used, this process's private temporary root
    takes its place; if it can be read, it is read from. Raises CacheError if a given root is unusable,
    SettingsError as FrontendSettings does.
    """
    if root is not None:
        return _usable(Root(root, fsync=fsync)), []
    settings = FrontendSettings.from_env()
    path = settings.cache_root
    if path is None:
        found = f"HOME is {shown(settings.home)}, no absolute path" if settings.home else "nor is HOME"
        return _temporary(f"DYN_MDC_CACHE is not set, {found}", fsync), []
    try:
        usual = _usable(Root(path, fsync=fsync))
    except CacheError as err:
        return _temporary(str(err), fsync), []
    if os.access(path, os.W_OK | os.X_OK):
        return usual, []
    return _temporary(f"{path!r} can only be read", fsync), [Root(path, is_lower=True)]


def _usable(root: Root) -> Root:
    """Return the root, opened once to see that it works; making it is left to this, too."""
    with attempt("use the cache root", root.path), root.open(make=True):
        return root


def _temporary(reason: str, fsync: bool) -> Root:
    """Return the root for this process alone, made with one warning, which goes when the process ends."""
    if "root" not in _private:
        import tempfile

        try:
            path = tempfile.mkdtemp(prefix="selfhost-mdc-")  # mode 0700
        except OSError as err:
            message = f"the usual cache cannot be used: {reason}; nor can a temporary one be made: {err}"
            hint = "set DYN_MDC_CACHE to a folder that can be written"
            raise CacheError(f"{message}; {hint}", path=err.filename or "", errno=err.errno) from err
        if _private.setdefault("root", path) != path:  # another thread was faster
            os.rmdir(path)
        else:
            # Not when the cache object goes: the directories that it returned are still in use then.
            atexit.register(functools.partial(_remove_tree, path, os.getpid()))
            logger.warning(
                "the usual cache cannot be used: %s; %r is used until this process ends", reason, path
            )
    return Root(_private["root"], fsync=fsync)


def _remove_tree(path: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked child uses it, but it is its parent's
        import shutil

        shutil.rmtree(path, ignore_errors=True)
