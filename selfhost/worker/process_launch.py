"""Launches the status server's process: a fresh interpreter that inherits two sockets and nothing else.

By exec, never by fork alone: of the host's memory, locks, threads, GPU handles, open files, signal handlers,
environment and working directory nothing is left. Nor does it load anything of the host's: only this package,
from wherever its folder or zip file lies, and the standard library; and blake3, once there is something to
hash, which only the index page and a registry that processes share have.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Optional

from ..errors import StatusServerError
from ..settings import loader_environment
from .process_channel import Channel, Message, open_pidfd

if TYPE_CHECKING:
    import subprocess

# -I and -S: no environment, no user's or site's packages. The folder comes last, so it hides nothing.
_OPTIONS = ["-I", "-S", "-X", "utf8"]
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); from importlib import import_module; "
    "import_module(sys.argv[2]).main(*map(int, sys.argv[3:]))"
)
END_SECONDS = 1.0  # from the end of the connection to that of the process
_LAST_WORDS_BYTES = 4096  # of what it prints, which is nothing unless it fails


class Child:
    """A launched process and the host's end of the connection to it."""

    def __init__(self, listener: socket.socket) -> None:
        import subprocess

        command = [_interpreter(), *_OPTIONS, *["-B"] * sys.dont_write_bytecode, "-c", _PROGRAM, *_package()]
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            # Of our own making: Popen leaves some open when it runs out of descriptors.
            nothing = theirs.enter_context(open(os.devnull, "rb+", buffering=0))
            control, stderr = (_connection(ours, theirs) for _ in range(2))
            fds = (control[1].fileno(), listener.fileno())
            self.process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 - ourselves
                [*command, *map(str, (*fds, os.getpid()))],
                pass_fds=fds,
                env=loader_environment(),
                cwd="/",
                stdin=nothing,
                stdout=nothing,
                stderr=stderr[1].fileno(),
                start_new_session=True,  # Ctrl-C in a terminal is for the host
            )
            ours.pop_all()
        self.channel, self._stderr = Channel(control[0]), stderr[0]
        self._pidfd = open_pidfd(self.process.pid)
        self._said = b""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def wait(self, other: socket.socket, seconds: float) -> set[int]:
        """Wait until the process has something to say, or `other` has; return the descriptors that have."""
        poller = select.poll()
        poller.register(other, select.POLLIN)
        poller.register(self.channel.sock, select.POLLIN | select.POLLOUT * self.channel.has_unsent)
        poller.register(self._stderr, select.POLLIN)
        if self._pidfd is not None:  # forked children of the host may keep the other end of the channel open
            poller.register(self._pidfd.fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(None if seconds == float("inf") else max(0, 1000 * seconds))}

    def messages(self, ready: set[int]) -> list[Message]:
        """Read what it says, and send what it did not take; EOFError when it has ended."""
        if self._stderr.fileno() in ready:
            self._listen()
        if self.channel.sock.fileno() in ready:
            self.channel.flush()
            return self.channel.receive()
        if self._pidfd is not None and self._pidfd.fd in ready:
            raise EOFError
        return []

    def end(self, *, at_once: bool) -> str:
        """Wait for its end, or bring it about; say how it ended."""
        import subprocess

        try:
            self.process.wait(0 if at_once else END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        self._listen()
        self.close_descriptors()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        last_words = self._said.decode("utf-8", "replace").strip()
        return f"{how}: {last_words}" if last_words else how

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # it has said nothing more
            self._said = (self._said + self._stderr.recv(_LAST_WORDS_BYTES))[-_LAST_WORDS_BYTES:]

    def disown(self) -> None:
        """In a forked child: it is the parent's."""
        self.process.returncode = 0  # there is nothing to wait for
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close what connects the host with it."""
        self.channel.close()
        self._stderr.close()
        self._pidfd = None


def _connection(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """Return a pair of connected sockets, each to be closed by its stack; ours does not block."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for stack, sock in zip((ours, theirs), pair):
        stack.enter_context(sock)
    pair[0].setblocking(False)
    return pair


def _interpreter() -> str:
    """Return the Python to run, or raise StatusServerError where there is none to be sure of."""
    path: Optional[str] = sys.executable
    name = os.path.basename(path or "").lower()
    if not path or getattr(sys, "frozen", False) or not ("python" in name or "pypy" in name):
        raise StatusServerError(
            f'isolation="process" needs a Python interpreter to run, but sys.executable is {path!r}, as it '
            'is where Python is embedded in another program: use isolation="thread" (DYN_SYSTEM_ISOLATION)',
            address="",
        )
    if not hasattr(socket, "send_fds"):
        raise StatusServerError(
            'isolation="process" needs a system that can send descriptors over UNIX sockets: use '
            'isolation="thread" (DYN_SYSTEM_ISOLATION)',
            address="",
        )
    return path


def wheels_folder() -> Optional[str]:
    """Return where blake3 lies: the index and a shared registry hash, and no other wheel is ever imported."""
    from importlib.util import find_spec

    try:
        spec = find_spec("blake3")
    except (ImportError, ValueError):
        return None
    return None if spec is None or not spec.origin else os.path.dirname(os.path.dirname(spec.origin))


def _package() -> tuple[str, str]:
    """Return the folder or zip file that this package lies in, and what the child's module is called there.

    Below that folder alone: a copy in `host/_vendor/selfhost` is plain `selfhost` to the child, which then
    never imports `host`.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(package), f"{os.path.basename(package)}.worker.process_child"
