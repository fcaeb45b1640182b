"""Servers that are not ours, as processes that end with their test; for the tests in mounted/."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable, NamedTuple, Union

from helpers import TIMEOUT, poll_until

import selfhost

HERE = Path(__file__).parent
NGINX_CONF = """
daemon off; master_process off; pid FOLDER/pid; error_log FOLDER/error.log;
events {}
http {
    access_log off;
    client_body_temp_path FOLDER/1; proxy_temp_path FOLDER/2; fastcgi_temp_path FOLDER/3;
    uwsgi_temp_path FOLDER/4; scgi_temp_path FOLDER/5;
    server { listen unix:FOLDER/socket; LOCATIONS }
}"""
PACKAGE = str(Path(selfhost.__file__).parents[1])
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


Command = Callable[[int], Sequence[object]]  # of a server that listens on that descriptor
Environment = Callable[[str], Mapping[str, str]]  # of a server at that URL


Address = Union[tuple[str, int], str]  # host and port, or the path of a socket


class Got(NamedTuple):
    """One answer."""

    status: int
    fields: http.client.HTTPMessage
    body: bytes


def connect(address: Address) -> socket.socket:
    """Connect to a server; nothing waits for ever."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.settimeout(TIMEOUT)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def is_listening(address: Address) -> bool:
    """Tell whether somebody takes connections there."""
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def get(address: Address, target: str) -> Got:
    """GET a target over a connection of its own; raises what the client raises."""
    with contextlib.closing(http.client.HTTPConnection("worker")) as client:
        client.sock = connect(address)
        client.request("GET", target, headers={"Connection": "close"})
        response = client.getresponse()
        return Got(response.status, response.headers, response.read())


class Running:
    """A server in a process of its own, on a socket that is its own from then on; `log` is what it says."""

    def __init__(self, command: Command, folder: Path, env: Environment) -> None:
        self.log = folder / "log"
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, self.log.open("ab") as log:
            self.address: tuple[str, int] = listener.getsockname()
            self.url = "http://{}:{}".format(*self.address)
            fd = listener.fileno()
            self.process = subprocess.Popen(
                [str(word) for word in command(fd)], cwd=folder, env=env(self.url), pass_fds=[fd],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def get(self, target: str) -> Got:
        """Ask over a connection of its own; raises what the client raises."""
        return get(self.address, target)

    def wait_for_answer(self, target: str = "/") -> Running:
        """Wait until somebody answers at the socket; show what the server said if nobody does."""

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError, http.client.HTTPException):
                return bool(self.get(target).status)
            return False

        assert poll_until(answers), self.log.read_text()
        return self

    @property
    def workers(self) -> list[int]:
        """The process ids of the children that live."""
        return sorted(int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if self._has(path))

    def _has(self, stat: Path) -> bool:
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            return False
        return int(parent) == self.process.pid and state != "Z"

    def stop(self) -> int:
        """End it as an operator would; return its exit status."""
        self.process.terminate()
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        """End it and all its children; harmless when they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)


def environment(folder: Path, *paths: object, **more: str) -> Environment:
    """Return an environment with nothing but what Python and our package need; modules are in `paths`.

    In further variables URL stands for where the server is.
    """
    given = {
        "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath))),
        "PYTHONPATH": os.pathsep.join([PACKAGE, *map(str, paths)]),
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }
    return lambda url: {**given, **{name: value.replace("URL", url) for name, value in more.items()}}


@contextlib.contextmanager
def running(command: Command, folder: Path, env: Environment) -> Iterator[Running]:
    """Run a server in a folder for the time of a `with`, from when it answers."""
    server = Running(command, folder, env)
    try:
        yield server.wait_for_answer()
    finally:
        server.kill()


def gunicorn(*options: object) -> Command:
    """Return the command that runs gunicorn; nothing of it lands in the home directory."""
    from gunicorn.config import KNOWN_SETTINGS

    if any("--no-control-socket" in (setting.cli or ()) for setting in KNOWN_SETTINGS):
        options = ("--no-control-socket", *options)
    return lambda fd: [sys.executable, "-m", "gunicorn", "-b", f"fd://{fd}", *options]


@contextlib.contextmanager
def nginx(locations: str) -> Iterator[str]:
    """Run nginx as one process with what its `server` block is to hold; gives the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="sh-") as folder:  # such a path has to be short
        conf = Path(folder, "conf")
        conf.write_text(NGINX_CONF.replace("FOLDER", folder).replace("LOCATIONS", locations))
        with subprocess.Popen([str(NGINX), "-p", folder, "-c", conf]) as process:
            try:
                assert poll_until(lambda: process.poll() is not None or is_listening(f"{folder}/socket"))
                yield f"{folder}/socket"
            finally:
                process.terminate()
                process.wait(TIMEOUT)
