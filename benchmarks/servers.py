"""The servers that bench_serve.py compares: how to start each, what it is called, what memory it takes.

Each is a process (with children, for some) on a free port of loopback that serves the same folder, and is
killed when the benchmark leaves its `with`.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import support

HERE = Path(__file__).resolve().parent
START_SECONDS = 30.0

NGINX_CONFIGURATION = """
daemon off; pid {scratch}/nginx.pid; error_log stderr crit; worker_processes 1; {user}
events {{ worker_connections 2048; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path {scratch}; proxy_temp_path {scratch}; fastcgi_temp_path {scratch};
    uwsgi_temp_path {scratch}; scgi_temp_path {scratch};
    server {{ listen 127.0.0.1:{port} backlog=1024; root {folder}; }}
}}
"""


class Server:
    """A running server: `url_path(name)` on `port` answers with a file."""

    port: int
    prefix = "/"

    def __init__(self, name: str, command: Sequence[str], scratch: Path, **environment: str) -> None:
        self.name = name
        scratch.mkdir()
        self._log = scratch / "log"
        clean = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(scratch)}
        with open(self._log, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                env={**clean, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # the session that we made: the server and its children
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def url_path(self, name: str) -> str:
        """Return the path of a file's URL."""
        return self.prefix + urllib.parse.quote(name)

    def wait_ready(self, name: str, size: int) -> None:
        """Wait until the file is served, whole."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self._length_of(name) == size:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise SystemExit(f"{self.name} does not serve {name}:\n{self.log()}")

    def _length_of(self, name: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", self.url_path(name))
            return len(connection.getresponse().read())
        finally:
            connection.close()

    def log(self) -> str:
        """Return the end of what it printed as errors."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def read_line(self, start: str) -> list[str]:
        """Return the words of the next line printed that begins with `start`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.split()
        raise SystemExit(f"{self.name} has ended:\n{self.log()}")

    def turns(self) -> tuple[int, float]:
        """Return turns and clock of the loop that hogs this host."""
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        _, turns, clock = self.read_line("turns ")
        return int(turns), float(clock)

    def pause(self) -> None:
        """Stop all of it, so that it takes no time from others."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def memory_bytes(self, *, peak: bool = False) -> int:
        """Return resident memory of all its processes, with files in memory that they hold open."""
        field = "VmHWM:" if peak else "VmRSS:"
        resident = sum(status_bytes(pid, field) for pid in self._pids())
        files = {key: size for pid in self._pids() for key, size in open_memory_files(pid)}
        return resident + sum(files.values())

    def forget_peak(self) -> None:
        """Let the peak of resident memory start anew from now."""
        for pid in self._pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _pids(self) -> list[int]:
        """Return its processes: those of its session, and a child that began one of its own."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[1:4]
            except OSError:  # it has ended
                continue
            if self.process.pid in (int(parent), int(session)):
                found.append(int(entry.name))
        return found


def status_bytes(pid: int, field: str) -> int:
    """Return one figure of a process's memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field)), 0)


def open_memory_files(pid: int) -> list[tuple[int, int]]:
    """Return inode and memory of every memfd that a process holds: no resident memory shows it."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:"):
                status = os.stat(link)
                found.append((status.st_ino, status.st_blocks * 512))
        except OSError:
            pass
    return found


def unused_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python_host(kind: str, folder: Path, scratch: Path, head: list[str], *, spin: bool = False) -> Server:
    """Start a kind of host_python.py."""
    command = [*head, sys.executable, str(HERE / "host_python.py"), kind, str(folder), *["spin"] * spin]
    server = Server(kind, command, scratch)
    server.prefix = "/" if kind in ("stdlib", "none") else "/v1/metadata/bench/_base/"
    server.port = int(server.read_line("ready ")[1])
    return server


def gunicorn(folder: Path, scratch: Path, head: list[str]) -> Server:
    """Start our WSGI application under gunicorn, one process with 16 threads."""
    port = unused_port()
    options = ["--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--threads", "16"]
    command = [*head, sys.executable, "-m", "gunicorn", *options, "--chdir", str(HERE), "host_python:app()"]
    server = Server("gunicorn", command, scratch, FOLDER=str(folder))
    server.prefix, server.port = "/v1/metadata/bench/_base/", port
    return server


def nginx(folder: Path, scratch: Path, head: list[str]) -> Server:
    """Start nginx with sendfile and one worker process."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    port = unused_port()
    configuration = scratch.with_suffix(".conf")
    user = "user root;" if os.getuid() == 0 else ""
    text = NGINX_CONFIGURATION.format(scratch=scratch, folder=folder, port=port, user=user)
    configuration.write_text(text)
    server = Server("nginx", [*head, program, "-e", "stderr", "-c", str(configuration)], scratch)
    server.port = port
    return server


def limit(folder: Path, names: Sequence[str], scratch: Path, head: list[str]) -> Server:
    """Start limit.c, which shows what the machine allows."""
    program = compile_c("limit", scratch.with_suffix(".program"))
    server = Server("limit", [*head, str(program), *(str(folder / name) for name in names)], scratch)
    server.port = int(server.read_line("ready ")[1])
    return server


def dynamo(
    python: str, folder: Path, scratch: Path, head: list[str], *, spin: bool = False, pace: bool = False
) -> Server:
    """Start the real Dynamo worker; the folder must hold a model."""
    store = scratch.with_suffix(".kv")
    models = json.dumps([{"path": str(folder), "name": "bench"}])
    loopback = {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1"}
    server = Server(
        "dynamo",
        [*head, python, str(HERE / "host_dynamo.py"), models, *["spin"] * spin, *["pace"] * pace],
        scratch,
        DYN_LOG="off",
        DYN_FILE_KV=str(store),
        DYN_DISCOVERY_BACKEND="file",
        DYN_EVENT_PLANE="zmq",
        DYN_SYSTEM_HOST="127.0.0.1",
        DYN_SYSTEM_PORT="0",
        **loopback,
    )
    server.read_line("registered ")
    record = json.loads(next((store / "v1" / "mdc").glob("[!.]*")).read_text())
    url = urllib.parse.urlsplit(record["card_json"]["model_info"]["hf_config_json"]["path"])
    server.port, server.prefix = url.port or 80, url.path.rpartition("/")[0] + "/"
    return server


def compile_c(name: str, program: Path) -> Path:
    """Compile a C file of this folder and return the program."""
    subprocess.run(["cc", "-O2", "-o", str(program), str(HERE / f"{name}.c")], check=True)
    return program


class Load:
    """The load generator, kept on a processor of its own."""

    def __init__(self, program: Path, processor: Optional[int]) -> None:
        self._head = [*support.pin(processor), str(program), "127.0.0.1"]

    def __call__(
        self, server: Server, name: str, size: int, connections: int, mode: str, length: str
    ) -> tuple[int, int, float]:
        """Return requests, bytes and seconds; `length` is seconds, or a count with an x."""
        url = [str(server.port), server.url_path(name)]
        shape = [str(connections), mode, str(size), length]
        done = subprocess.run([*self._head, *url, *shape], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{server.name}, {name}, {connections} {mode}: {done.stderr}{server.log()}")
        requests, received, seconds, _ = done.stdout.split()
        return int(requests), int(received), float(seconds)
