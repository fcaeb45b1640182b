"""The status server at the exit of its interpreter, and in forked and spawned children of its host."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(params=["thread", "process"])
def run_host(request: pytest.FixtureRequest, run_script: Any) -> Any:
    """Return the function that runs code in a host, whose servers run as ISOLATION says."""
    return lambda code, *args, **options: run_script(
        f"ISOLATION = {request.param!r}\n{code}", *args, **options
    )


# ------------------------------------------------------------------ exits of the interpreter

PRELUDE = """
import http.client, os, socket, sys, threading, time
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.content import pin_bytes
from selfhost.worker.server import SystemStatusServer

registry = MetadataArtifactRegistry()
TARGET = registry.register("m", "_base", "f.json", pin_bytes(b"x" * 12_000_000)).targets["f.json"]
server = SystemStatusServer(registry, isolation=ISOLATION)

def get(port, target=TARGET):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", target)
    size = len(connection.getresponse().read())
    connection.close()
    return size

"""


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("server.start(); get(server.port)", 0, ""),
        ("server.start(); socket.create_connection((server.host, server.port)).detach()", 0, ""),
        ("server.start(); sys.exit(3)", 3, ""),
        ("server.start(); os._exit(4)", 4, ""),
        ("server.start(); raise RuntimeError('the host failed')", 1, "the host failed"),
        ("other = threading.Thread(target=server.start); other.start(); other.join()", 0, ""),
        (
            "server.start(); threading.Thread(target=lambda: (time.sleep(0.1), get(server.port))).start()",
            0,
            "",
        ),
        ("server.start(); server.close()", 0, ""),
    ],
)
def test_exit_with_the_server_running(ending: str, code: int, said: str, run_host: Any) -> None:
    """However the interpreter ends, a running server neither delays it nor says a word."""  # catalogue 146
    started = time.monotonic()
    done = run_host(PRELUDE + ending)

    assert done.returncode == code
    assert done.stdout == ""
    assert said in done.stderr if said else done.stderr == ""
    assert time.monotonic() - started < 15.0  # one or two interpreters included; a client may idle for 30


def test_client_that_leaves_sends_no_sigpipe(run_host: Any) -> None:
    """Where the host wants SIGPIPE to end it, a client that hangs up must not."""
    code = """
import signal
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
server.start()
for _ in range(5):
    client = socket.create_connection((server.host, server.port))
    client.send(f"GET {TARGET} HTTP/1.1\\r\\nHost: h\\r\\n\\r\\n".encode())
    client.recv(1)
    client.close()
assert get(server.port) == 12_000_000
print("lives")
"""
    done = run_host(PRELUDE + code)

    assert (done.returncode, done.stdout, done.stderr) == (0, "lives\n", "")


def test_exit_within_a_transfer(run_host: Any) -> None:
    """A client that takes its answer slowly delays the exit by a second at most."""
    code = """
import atexit
atexit.register(lambda: print(time.monotonic() - started))  # before the server's own hook, so run after it
server.start()
client = socket.create_connection((server.host, server.port))
client.sendall(f"GET {TARGET} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
client.recv(100)
client.detach()
started = time.monotonic()
"""
    done = run_host(PRELUDE + code)

    assert done.stderr == ""
    assert 0.9 < float(done.stdout) < 4.0  # without a limit of its own, a close takes 5


def test_start_when_the_interpreter_ends(run_host: Any) -> None:
    """A start in an atexit hook works or raises the one error, and never hangs."""
    code = """
from selfhost.errors import StatusServerError
import atexit
def late():
    try:
        server.start().close()
    except StatusServerError:
        pass
atexit.register(late)
"""
    done = run_host(PRELUDE + code)

    assert (done.stderr, done.returncode) == ("", 0)


# ------------------------------------------------------------------ forks

FORKING = PRELUDE.replace("import http", "import warnings\nwarnings.simplefilter('ignore')\nimport http") + (
    """
def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return pid

def ended_well(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

server.start()
"""
)


def test_child_has_no_running_server(run_host: Any) -> None:
    """A forked child has no server, keeps none of its sockets, and can neither use nor disturb it."""
    code = """
idle = socket.create_connection((server.host, server.port))
busy = socket.create_connection((server.host, server.port))
busy.settimeout(5)
busy.sendall(f"GET {TARGET} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
received = len(busy.recv(1000))
while server.open_connections < 2:
    time.sleep(0.01)

def child():
    assert not server.is_running
    assert server.open_connections == 0
    server.close()
    assert len(registry) == 1

assert ended_well(in_child(child))
while True:
    piece = busy.recv(1 << 20)
    if not piece:
        break
    received += len(piece)
assert received > 12_000_000, received
idle.settimeout(5)
idle.sendall(b"GET /nothing HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
assert idle.recv(100).startswith(b"HTTP/1.1 404")
assert get(server.port) == 12_000_000
"""
    done = run_host(FORKING + code)

    assert (done.stderr, done.returncode) == ("", 0)


def test_child_that_lives_on_holds_no_port(run_host: Any) -> None:
    """When the parent stops, the port is free and clients see the end, though a child lives."""
    code = """
client = socket.create_connection((server.host, server.port))
while not server.open_connections:
    time.sleep(0.01)
reader, writer = os.pipe()
ready_reader, ready_writer = os.pipe()
def child():
    os.close(writer)  # so that it ends with its parent at the latest
    os.write(ready_writer, b"x")
    os.read(reader, 1)
pid = in_child(child)
os.read(ready_reader, 1)
port = server.port
server.close()
client.settimeout(5)
assert client.recv(1) == b""
SystemStatusServer(registry, port=port, isolation=ISOLATION).start().close()
os.write(writer, b"x")
assert ended_well(pid)
"""
    done = run_host(FORKING + code)

    assert (done.stderr, done.returncode) == ("", 0)


SOCKETS = """
import stat
def is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
def sockets():
    return [fd for fd in range(256) if is_socket(fd)]
"""


def test_fork_while_the_server_ends(run_host: Any) -> None:
    """A child that is forked while answers on their way hold up the end keeps no socket either."""
    code = """
client = socket.create_connection((server.host, server.port))
client.sendall(f"GET {TARGET} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
client.recv(100)
stopping = threading.Thread(target=server.close)
stopping.start()
time.sleep(0.1)
def child():
    assert sockets() == [client.fileno()], sockets()
    server.start().close()
assert ended_well(in_child(child))
assert stopping.is_alive()
client.close()
"""
    done = run_host(FORKING + SOCKETS + code)

    assert (done.stderr, done.returncode) == ("", 0)


def test_fork_while_the_server_starts(run_script: Any) -> None:
    """A child that is forked while another thread starts the server keeps no socket either."""
    code = """
begun = threading.Event()
server = SystemStatusServer(registry, isolation="process", endpoints=lambda: begun.set() or time.sleep(0.3))
starting = threading.Thread(target=server.start)
starting.start()
begun.wait()
def child():
    assert sockets() == [], sockets()
    SystemStatusServer(registry).start().close()
assert ended_well(in_child(child))
starting.join()
server.close()
"""
    done = run_script('ISOLATION = "thread"\n' + FORKING.replace("server.start()\n", "") + SOCKETS + code)

    assert (done.stderr, done.returncode) == ("", 0)


def test_child_starts_a_server_of_its_own(run_host: Any) -> None:
    """A child may start its own server over the registry that it inherited; both serve."""
    code = """
reader, writer = os.pipe()
stop_reader, stop_writer = os.pipe()
def child():
    os.close(stop_writer)
    with server:  # the same object, anew
        os.write(writer, b"%06d" % server.port)
        os.read(stop_reader, 1)
pid = in_child(child)
port = int(os.read(reader, 6))
assert port != server.port
assert get(port) == get(server.port) == 12_000_000
os.write(stop_writer, b"x")
assert ended_well(pid)
assert get(server.port) == 12_000_000
"""
    done = run_host(FORKING + code)

    assert (done.stderr, done.returncode) == ("", 0)


def test_child_that_exits_like_a_program(run_host: Any) -> None:
    """A child that runs its exit hooks leaves the parent's server alone."""
    code = """
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert ended_well(pid)
assert get(server.port) == 12_000_000
"""
    done = run_host(FORKING + code)

    assert (done.stderr, done.returncode) == ("", 0)


def test_forks_under_load(run_host: Any) -> None:
    """200 forks while clients download and files are registered: no child hangs, no download breaks."""
    code = """
stop = threading.Event()
def download():
    while not stop.is_set():
        assert get(server.port) == 12_000_000
def register():
    number = 0
    while not stop.is_set():
        number += 1
        registry.register("n", "_base", "g.json", pin_bytes(b"%d" % number)).close()
threads = [threading.Thread(target=download), threading.Thread(target=register)]
for thread in threads:
    thread.start()
def child():
    registry.register("c", "_base", "g.json", pin_bytes(b"child")).close()
for number in range(200):
    pid = in_child(child)
    deadline = time.monotonic() + 5
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            print("hung", number)
            break
        time.sleep(0.001)
    if status:
        print("failed", status)
stop.set()
for thread in threads:
    thread.join()
"""  # catalogue 43
    done = run_host(FORKING + code, timeout=60)

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_child_of_a_worker_leaves_its_card(run_host: Any, model_dir: Any, tmp_path: Path) -> None:
    """A child that leaves the worker's blocks and exits withdraws neither card nor routes."""
    code = """
from selfhost import DistributedRuntime, LocalModel, Settings
from selfhost.discovery import Bucket

model_path, store = sys.argv[1:]
settings = Settings(
    self_host_metadata=True, system_host="127.0.0.1", system_port=0, file_kv=store, isolation=ISOLATION
)
with DistributedRuntime(settings) as runtime, LocalModel.load(model_path, name="m") as model:
    model.attach(runtime.endpoint("ns.comp.ep"))
    pid = os.fork()
    if pid == 0:
        runtime.close()
        model.detach()
        sys.exit(0)
    assert ended_well(pid)
    assert len(runtime.discovery.records(Bucket.MODELS)) == 1
    assert get(runtime.status_server.port, "/v1/metadata/m/_base/config.json") == model.files[0].size
"""
    done = run_host(FORKING.replace("server.start()\n", "") + code, model_dir(), str(tmp_path / "kv"))

    assert (done.stderr, done.returncode) == ("", 0)


CHILD_MODULE = """
import socket
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer

def serve_once(sender):
    with SystemStatusServer(MetadataArtifactRegistry()) as server:
        with socket.create_connection((server.host, server.port), timeout=5) as sock:
            sock.sendall(b"GET /live HTTP/1.0\\r\\n\\r\\n")
            sender.send(sock.recv(12))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, run_host: Any, tmp_path: Path) -> None:
    """Children of every start method serve for themselves, while the parent goes on serving."""
    (tmp_path / "child_module.py").write_text(CHILD_MODULE)  # catalogue 148
    code = """
server.start()
sys.path.insert(0, sys.argv[2])
import child_module, multiprocessing
context = multiprocessing.get_context(sys.argv[1])
receiver, sender = context.Pipe()
process = context.Process(target=child_module.serve_once, args=(sender,))
process.start()
assert receiver.recv() == b"HTTP/1.1 200"
process.join()
assert process.exitcode == 0
assert get(server.port) == 12_000_000
"""
    done = run_host(FORKING.replace("server.start()\n", "") + code, method, str(tmp_path))

    assert (done.stderr, done.returncode) == ("", 0)
