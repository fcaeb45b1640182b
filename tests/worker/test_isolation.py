"""The status server in a process of its own: what it is told, what it inherits, and how it comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import poll_until

from selfhost.errors import SettingsError, StatusServerError
from selfhost.worker import process, process_launch, process_mirror
from selfhost.worker.access import Access
from selfhost.worker.content import MAX_SEALED_FILES, pin_bytes
from selfhost.worker.process_channel import Channel, Message
from selfhost.worker.process_child import NICENESS, STALE_SECONDS, HostStates
from selfhost.worker.process_mirror import Mirror
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer
from selfhost.worker.site import Site
from selfhost.worker.tls import TlsFiles

LARGE = os.urandom(300_000)  # bytes; handed over by descriptor


@pytest.fixture
def isolation() -> str:
    """Return where the test's servers run."""
    return "process"


def pid_of(server: SystemStatusServer) -> int:
    """Return the process that serves now."""
    child = server._loop._child
    assert child is not None
    return int(child.pid)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, whether or not somebody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def children() -> set[str]:
    """Return the processes that this one has launched and not waited for."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(path.parent.name)
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Check that no process outlives its test, not even as a zombie."""
    before = children()
    yield
    assert children() <= before


@pytest.fixture
def get(connect: Any) -> Callable[..., Any]:
    """Return a function that GETs a target over a connection of its own."""

    def get(server: SystemStatusServer, target: str, *lines: str) -> Any:
        client = connect(server)
        answer = client.get(target, "Connection: close", *lines).answer()
        client.close()
        return answer

    return get


@pytest.fixture
def replaced(wait_until: Any) -> Callable[[SystemStatusServer], int]:
    """Return a function that kills the serving process, waits for the next one, and returns its id."""

    def replace(server: SystemStatusServer) -> int:
        pid = pid_of(server)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: server._loop._child is not None and pid_of(server) != pid)
        return pid_of(server)

    return replace


# ------------------------------------------------------------------ what it serves


def test_any_history_is_served_as_the_host_has_it(
    start_server: Any, get: Any, registry: MetadataArtifactRegistry, replaced: Any
) -> None:
    """After registrations in any order, and after a restart, each URL gives what the host's registry has."""
    server, site, dice = start_server(), Site(registry), random.Random(7)
    targets: set[str] = set()
    contents = [b"one", b"two", LARGE, LARGE[::-1], b""]
    open_ones: list[Any] = []
    for step in range(60):
        slug, suffix = dice.choice("ab"), dice.choice(["_base", "l"])
        kind = dice.random()
        if kind < 0.5:
            files = {name: pin_bytes(dice.choice(contents)) for name in dice.sample("xyz", 2)}
            open_ones.append(registry.register_files(slug, suffix, files))
        elif kind < 0.6:
            open_ones.append(registry.register_card(slug, suffix, json.dumps(dice.choice([1, 2]))))
        elif kind < 0.95 and open_ones:
            open_ones.pop(dice.randrange(len(open_ones))).close()
        else:
            registry.unregister(slug, suffix)
        targets |= {target for one in open_ones for target in one.targets.values()}
        targets |= {target.partition("?")[0] for target in targets}
        if step == 40:
            replaced(server)
        for target in dice.sample(sorted(targets), min(5, len(targets))):
            expected, answer = site.answer("GET", target, {}), get(server, target)
            body = expected.body if expected.content is None else expected.content.read(0, expected.stop)
            assert (answer.status, answer.body) == (expected.status, body)


def test_large_content_is_kept_once(
    start_server: Any, get: Any, registry: MetadataArtifactRegistry, serve_bytes: Any
) -> None:
    """What is handed over lies in one sealed file that host and process share."""
    server = start_server()
    target = serve_bytes(LARGE)

    (artifact,) = registry
    sealed = artifact.content.sealed()
    assert artifact.content.data is None
    assert sealed is not None
    same = [
        os.stat(f"/proc/{pid_of(server)}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{pid_of(server)}/fd")
    ]
    assert os.fstat(sealed.fd).st_ino in same
    assert get(server, target).body == LARGE


def test_content_goes_with_its_last_registration(
    start_server: Any, registry: MetadataArtifactRegistry, serve_bytes: Any
) -> None:
    """What is withdrawn leaves no descriptor and no memory in the process."""
    server = start_server()
    folder = f"/proc/{pid_of(server)}/fd"
    before = len(os.listdir(folder))
    serve_bytes(LARGE)
    registry.register("n", "_base", "g.json", pin_bytes(LARGE))
    with_it = len(os.listdir(folder))
    registry.unregister("m", "_base")
    still = len(os.listdir(folder))
    registry.unregister("n", "_base")

    assert (with_it, still, len(os.listdir(folder))) == (before + 1, before + 1, before)


def test_descriptors_of_the_host_are_not_used_up(
    start_server: Any, get: Any, registry: MetadataArtifactRegistry
) -> None:
    """Beyond a number of sealed files content is copied, and served all the same."""
    server = start_server()
    before = len(os.listdir("/dev/fd"))
    files = {
        f"{number}": pin_bytes(b"%d" % number + LARGE[:70_000]) for number in range(MAX_SEALED_FILES + 20)
    }
    targets = registry.register_files("m", "_base", files).targets

    assert len(os.listdir("/dev/fd")) <= before + MAX_SEALED_FILES
    for name in ("0", str(MAX_SEALED_FILES + 19)):
        assert get(server, targets[name]).body == name.encode() + LARGE[:70_000]


def test_thousands_of_registrations(
    start_server: Any, get: Any, registry: MetadataArtifactRegistry, replaced: Any
) -> None:
    """More than the socket takes at once comes whole, at the start of a process and while it runs."""
    for number in range(2000):
        registry.register("before", "_base", f"{number}.json", pin_bytes(b"%d" % number * 100))
    server = start_server()
    registry.register_files("m", "_base", {f"{n}.json": pin_bytes(b"%d" % n * 100) for n in range(2000)})
    replaced(server)

    assert get(server, "/v1/metadata/before/_base/1999.json").body == b"1999" * 100
    assert get(server, "/v1/metadata/m/_base/1999.json").body == b"1999" * 100


def test_without_sealed_files(
    monkeypatch: pytest.MonkeyPatch, start_server: Any, get: Any, serve_bytes: Any
) -> None:
    """On a system without memfd large content is copied over the socket."""
    monkeypatch.delattr(os, "memfd_create")
    server = start_server()

    assert get(server, serve_bytes(LARGE * 20)).body == LARGE * 20


def test_registrations_from_many_threads(start_server: Any, get: Any, registry: Any) -> None:
    """Each thread's registration is served when its call returns."""
    server, wrong = start_server(), []

    def register(name: str) -> None:
        for number in range(20):
            content = f"{name} {number}".encode()
            with registry.register(name, "_base", "f", pin_bytes(content)) as registration:
                wrong.extend(t for t in registration.targets.values() if get(server, t).body != content)
            wrong.extend(t for t in registration.targets.values() if get(server, t).status != 404)

    threads = [threading.Thread(target=register, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_shared_registry(tmp_path: Path, get: Any, leaves_nothing: None) -> None:
    """The process reads a registry that processes share, and so knows what any of them registered."""
    registries = [MetadataArtifactRegistry(shared=tmp_path / "shared") for _ in range(2)]
    with SystemStatusServer(registries[0], isolation="process") as server:
        for number, registry in enumerate(registries):
            target = registry.register("m", "_base", f"{number}", pin_bytes(LARGE)).targets[f"{number}"]
            assert get(server, target).body == LARGE
    for registry in registries:
        registry.close()


def test_options_arrive(
    start_server: Any, get: Any, serve_bytes: Any, tmp_path: Path, replaced: Any, wait_until: Any
) -> None:
    """Token and index are in force there, too; a token survives its file, and is in no argument."""
    token, file = "isolated-0123456789abcdef", tmp_path / "token"
    file.write_text(token)
    server = start_server(access=Access(token_file=file), index=True)
    target = serve_bytes(b"{}")
    file.unlink()
    pid = replaced(server)
    with_token = f"Authorization: Bearer {token}"

    assert [get(server, t).status for t in (target, "/v1/metadata", "/live")] == [401, 401, 200]
    assert [get(server, t, with_token).status for t in (target, "/v1/metadata")] == [200, 200]
    for name in ("cmdline", "environ"):
        assert token.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    file.write_text(token[::-1])
    assert wait_until(lambda: get(server, target, with_token).status == 401)


def test_tls(start_tls: Any, connect_tls: Any, serve_bytes: Any, replaced: Any) -> None:
    """The process speaks TLS with the host's files, the next one too."""
    server = start_tls()
    target = serve_bytes(LARGE)
    bodies = [connect_tls(server).get(target).answer().body]
    replaced(server)
    bodies.append(connect_tls(server).get(target).answer().body)

    assert (server.scheme, bodies) == ("https", [LARGE, LARGE])


def test_certificate_that_the_next_process_cannot_use(
    start_tls: Any,
    connect_tls: Any,
    tls_files: TlsFiles,
    caplog: pytest.LogCaptureFixture,
    wait_until: Any,
) -> None:
    """The log says in one line which file it is and what is wrong; once it can be used again, it is."""
    server = start_tls()
    good = os.path.dirname(tls_files.cert) + "/good.pem"
    os.rename(tls_files.cert, good)
    Path(tls_files.cert).write_text("nonsense")
    os.kill(pid_of(server), signal.SIGKILL)
    assert wait_until(lambda: "cannot be relaunched" in caplog.text)
    os.replace(good, tls_files.cert)

    assert connect_tls(server).get("/live").answer().status == 200
    (line,) = [record.getMessage() for record in caplog.records if "relaunched" in record.getMessage()]
    assert re.fullmatch(r"[^\n]*cannot be relaunched: [^\n]*; trying again", line)
    assert tls_files.cert in line
    assert "no certificate in it" in line


def test_unusable_certificate(start_tls: Any, tls_files: TlsFiles) -> None:
    """Files that cannot be used are an error of the start, as for a thread."""
    Path(tls_files.cert).write_text("nonsense")

    with pytest.raises(SettingsError, match="DYN_SYSTEM_TLS_CERT"):
        start_tls()


def test_counters(start_server: Any, get: Any, connect: Any, wait_until: Any) -> None:
    """The process's counters are told when they are asked for."""
    server = start_server()
    get(server, "/live")
    get(server, "/nothing")
    connect(server)

    assert wait_until(lambda: server.counters().accepted == 3)
    assert wait_until(lambda: server.open_connections == 1)
    assert server.counters().requests == {200: 1, 404: 1}


def test_isolation_must_be_known(registry: MetadataArtifactRegistry) -> None:
    """Any other word is refused."""
    with pytest.raises(SettingsError, match="thread or process"):
        SystemStatusServer(registry, isolation="fiber")


# ------------------------------------------------------------------ health


def test_changed_state_is_told_at_once(start_server: Any, get: Any) -> None:
    """A state is in force when `states_changed` returns, however often it changes."""
    state = {"generate": "ready"}
    server = start_server(endpoints=lambda: dict(state))
    statuses = [get(server, "/health").status]
    for word in ("notready", "ready", "notready"):
        state["generate"] = word
        server.states_changed()
        statuses.append(get(server, "/health").status)

    assert statuses == [200, 503, 200, 503]


def test_state_that_nobody_announces(start_server: Any, get: Any, wait_until: Any) -> None:
    """A change that nobody tells of is found within about a second, also by the next process."""
    state = {"generate": "ready"}
    server = start_server(endpoints=lambda: dict(state))
    state["generate"] = "notready"

    assert wait_until(lambda: b'"notready"}' in get(server, "/health").body)


def test_hanging_callback(
    start_server: Any, get: Any, serve_bytes: Any, replaced: Any, wait_until: Any
) -> None:
    """A host's callback that never returns keeps neither files nor restarts from it, nor the stop."""
    is_over = threading.Event()
    server = start_server(endpoints=lambda: {str(is_over.wait(30)): "ready"})
    target = serve_bytes(LARGE)
    replaced(server)

    health = get(server, "/health")
    assert (health.status, b"not known" in health.body) == (503, True)
    assert get(server, target).body == LARGE
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 3.0
    is_over.set()


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(1)])
def test_callback_that_raises_anything(
    error: BaseException, start_server: Any, get: Any, wait_until: Any
) -> None:
    """Whatever a host's callback raises, it is asked again a second later."""
    errors = [error]

    def states() -> dict[str, str]:
        if errors:
            raise errors[0]
        return {"generate": "ready"}

    server = start_server(endpoints=states)
    health = get(server, "/health")
    errors.clear()

    assert (health.status, b"not known" in health.body) == (503, True)
    assert wait_until(lambda: get(server, "/health").status == 200)


def test_interrupt_while_states_are_told(start_server: Any, get: Any) -> None:
    """In a thread of the host's own what ends a program goes on to the host, and nothing else does."""
    errors: list[BaseException] = []

    def states() -> dict[str, str]:
        raise errors[0] if errors else ValueError

    server = start_server(endpoints=states)
    for error in (KeyboardInterrupt(), SystemExit(1)):
        errors[:] = [error]
        with pytest.raises(type(error)):
            server.states_changed()
    errors[:] = [asyncio.CancelledError()]
    server.states_changed()

    assert get(server, "/health").status == 503


def test_states_are_told_in_the_order_of_asking() -> None:
    """What a slow call found is not told any more once a later call has found something else."""
    mirror = Mirror(lambda: None)

    def slow() -> dict[str, str]:
        mirror.ask_states(lambda: {"generate": "new"})
        return {"generate": "old"}

    mirror.ask_states(slow)

    assert [m.head for m in iter_messages(mirror) if "states" in m.head] == [{"states": {"generate": "new"}}]


def test_process_serves_when_it_knows_everything(registry: MetadataArtifactRegistry) -> None:
    """It is not told to serve before all notes are told."""
    mirror = Mirror(lambda: None)
    registry.follow(mirror)
    registry.register("m", "_base", "f", pin_bytes(b""))

    assert not mirror.begin()
    assert len(list(iter_messages(mirror))) == 3
    assert mirror.begin()


def iter_messages(mirror: Mirror) -> Iterator[Message]:
    """Yield all that is to be told."""
    while messages := mirror.next():
        yield from messages


def test_host_that_has_fallen_silent() -> None:
    """States that the host has not confirmed for a while are no longer taken for true."""
    now = [0.0]
    states = HostStates(clock=lambda: now[0])
    with pytest.raises(RuntimeError, match="not told it yet"):
        states()
    states.tell({"generate": "ready"}, "")
    now[0] = STALE_SECONDS
    assert states() == {"generate": "ready"}
    now[0] += 1

    with pytest.raises(TimeoutError, match="for 11 s"):
        states()


# ------------------------------------------------------------------ what it inherits


def test_inherits_nothing(start_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host's descriptors, environment, signals, session and directory the process has nothing."""
    monkeypatch.setenv("DYN_SECRET", "x")
    monkeypatch.chdir(tmp_path)
    gpu = os.open("/dev/zero", os.O_RDWR)  # what stands for a GPU's device file
    pair = socket.socketpair()
    os.set_inheritable(gpu, True)
    pair[0].set_inheritable(True)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        pid = pid_of(start_server())
    finally:
        signal.signal(signal.SIGUSR2, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    inode = os.fstat(pair[0].fileno()).st_ino
    os.close(gpu)
    for sock in pair:
        sock.close()

    assert not {"/dev/zero", f"socket:[{inode}]"} & set(links)
    assert len(links) <= 12
    assert set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")) <= {b""} | {
        f"LD_LIBRARY_PATH={os.environ.get('LD_LIBRARY_PATH')}".encode()
    }
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert int(status["SigBlk"], 16) == 0
    assert {b"-I", b"-S"} <= set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    assert "blake3" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_vendored_copy_never_imports_its_host(kind: str, run_script: Any, tmp_path: Path) -> None:
    """A copy below another package, or in a zip, is run without that package being imported again."""
    import shutil

    vendor = tmp_path / "host" / "_vendor"
    source = Path(process.__file__).parents[1]
    shutil.copytree(source, vendor / "carried", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "host" / "__init__.py").write_text(
        "import os\nwith open('imports', 'a') as file:\n    file.write(f'{os.getpid()}\\n')\n"
    )
    (vendor / "__init__.py").write_text("")
    place = tmp_path
    if kind == "zip":
        place = Path(shutil.make_archive(str(tmp_path / "app"), "zip", tmp_path, "host"))
        shutil.rmtree(tmp_path / "host")
    code = """
import os, sys, urllib.request
sys.path.insert(0, sys.argv[1])
os.chdir(sys.argv[2])
from host._vendor.carried.worker.registry import MetadataArtifactRegistry
from host._vendor.carried.worker.server import SystemStatusServer
with SystemStatusServer(MetadataArtifactRegistry(), isolation="process") as server:
    print(urllib.request.urlopen(f"http://{server.address}/live").status)
with open("imports") as file:
    print(len(file.readlines()))
"""
    done = run_script(code, str(place), str(tmp_path))

    assert (done.stdout, done.stderr, done.returncode) == ("200\n1\n", "", 0)


@pytest.mark.parametrize("executable", [None, "", "/usr/sbin/uwsgi"])
def test_no_interpreter(
    executable: Any, registry: MetadataArtifactRegistry, monkeypatch: pytest.MonkeyPatch, leaves_nothing: None
) -> None:
    """Where Python is embedded in another program, the error says so and what to do."""
    monkeypatch.setattr(sys, "executable", executable)

    with pytest.raises(StatusServerError, match='isolation="thread"'):
        SystemStatusServer(registry, isolation="process").start()


def test_process_that_cannot_start(
    registry: MetadataArtifactRegistry, monkeypatch: pytest.MonkeyPatch, leaves_nothing: None
) -> None:
    """A process that ends at once is an error of the start, with what it said last."""
    monkeypatch.setattr(process_launch, "_PROGRAM", "raise SystemExit('no such luck')")
    server = SystemStatusServer(registry, isolation="process")

    with pytest.raises(StatusServerError, match="exit code 1: no such luck"):
        server.start()
    assert not server.is_running


# ------------------------------------------------------------------ ends and restarts


def test_host_goes_first(start_server: Any, get: Any) -> None:
    """The process is nicer than its host, also where Linux shares processors out to sessions first."""
    server = start_server()
    assert get(server, "/live").status == 200
    pid, mine = pid_of(server), os.getpriority(os.PRIO_PROCESS, 0)

    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, mine + NICENESS)
    group = Path(f"/proc/{pid}/autogroup")
    text = group.read_text() if group.exists() else ""
    assert not text or text.endswith(f" nice {NICENESS}\n")


def test_killed_process_is_replaced(
    start_server: Any, get: Any, serve_bytes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The port never closes: who connects right after a kill is served by the next process."""
    server = start_server(endpoints=lambda: {"generate": "ready"})
    small, large = serve_bytes(b"{}"), serve_bytes(LARGE, "g.json")
    pids = set()
    for _ in range(3):
        pids.add(pid_of(server))
        os.kill(pid_of(server), signal.SIGKILL)
        assert [get(server, t).body for t in (small, large)] == [b"{}", LARGE]
        assert get(server, "/health").status == 200

    assert len(pids) == 3
    assert all(is_gone(pid) for pid in pids)
    # The last words: where it was killed before its host heard that it serves.
    ends = re.findall(r"\(signal 9\); another takes its place|cannot be relaunched: signal 9", caplog.text)
    assert len(ends) == 3


@pytest.mark.parametrize("error", [RuntimeError("the sink is down"), SystemExit(1)])
def test_log_handler_that_raises(error: BaseException, start_server: Any, get: Any, replaced: Any) -> None:
    """A host's handler that fails, or would end the program, costs it the record but not the server."""
    records = []

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())
            raise error

    handler, logger = Broken(), logging.getLogger("selfhost.worker.process")
    logger.addHandler(handler)
    try:
        server = start_server()
        replaced(server)
        assert get(server, "/live").status == 200
        assert any("another takes its place" in record for record in records)
    finally:
        logger.removeHandler(handler)


def test_log_of_the_process_that_nobody_can_take(
    start_server: Any, get: Any, serve_bytes: Any, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The process goes on when a host's handler fails with one of its records."""
    records = []

    def fail(record: logging.LogRecord) -> bool:
        records.append(record)
        raise RuntimeError("the sink is down")

    logger = logging.getLogger("selfhost.worker.site")
    logger.addFilter(fail)
    try:
        server = start_server(endpoints=lambda: {}["x"])
        pid = pid_of(server)
        assert get(server, "/health").status == 503
        assert wait_until(lambda: records)
        server.counters()  # answered after the record was taken
        assert (get(server, "/live").status, pid_of(server)) == (200, pid)
        assert "unexpected error" not in caplog.text
    finally:
        logger.removeFilter(fail)


def test_system_without_pidfd(
    start_server: Any, get: Any, replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing but the connection tells of the process's end, it is replaced all the same."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    server = start_server()
    replaced(server)

    assert get(server, "/live").status == 200


def test_registration_while_there_is_no_process(
    start_server: Any, get: Any, registry: MetadataArtifactRegistry
) -> None:
    """What is registered right after a kill does not wait for long, and is served at the next request."""
    server = start_server()
    for number in range(3):
        os.kill(pid_of(server), signal.SIGKILL)
        target = registry.register("m", "_base", f"{number}", pin_bytes(b"%d" % number)).targets[f"{number}"]
        assert get(server, target).body == b"%d" % number


def test_withdrawn_while_no_process_can_be_launched(
    start_server: Any,
    get: Any,
    registry: MetadataArtifactRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Any,
) -> None:
    """What comes and goes meanwhile is not kept for the next process, what stays is served by it."""
    server = start_server(endpoints=lambda: {"generate": "ready"})
    early = registry.register("m", "_base", "early", pin_bytes(LARGE))
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    os.kill(pid_of(server), signal.SIGKILL)
    assert wait_until(lambda: "cannot be relaunched" in caplog.text)
    late = registry.register("m", "_base", "late", pin_bytes(LARGE[::-1]))
    target = registry.register("m", "_base", "kept", pin_bytes(LARGE[1:])).targets["kept"]
    late.close()
    early.close()
    kept = [weakref.ref(one) for one in (early, late)]
    del early, late

    assert wait_until(lambda: [ref() for ref in kept] == [None, None])
    monkeypatch.undo()
    assert get(server, target).body == LARGE[1:]
    assert get(server, "/health").status == 200


def test_process_that_fails_again_and_again(
    start_server: Any,
    get: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Any,
) -> None:
    """It is launched more and more slowly, the port stays open, and the first that works serves who waits."""
    caplog.set_level(logging.DEBUG, "selfhost")
    server = start_server()
    monkeypatch.setattr(process_launch, "_PROGRAM", "raise SystemExit('no such luck')")
    os.kill(pid_of(server), signal.SIGKILL)
    assert wait_until(lambda: caplog.text.count("no such luck") >= 3)
    waiting = socket.create_connection((server.host, server.port))
    monkeypatch.undo()

    assert get(server, "/live").status == 200
    waiting.close()
    failures = [record.created for record in caplog.records if "no such luck" in record.getMessage()]
    assert failures[2] - failures[0] >= 0.6  # seconds
    levels = [record.levelname for record in caplog.records if "no such luck" in record.getMessage()]
    assert levels[:3] == ["WARNING", "DEBUG", "DEBUG"]  # it is one trouble


def test_process_that_is_stopped_does_not_stop_its_host(
    start_server: Any,
    get: Any,
    serve_bytes: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A registration waits for a process that does not answer for a limited time, with a warning."""
    monkeypatch.setattr(process_mirror, "SETTLE_SECONDS", 0.2)
    server = start_server()
    os.kill(pid_of(server), signal.SIGSTOP)
    target = serve_bytes(b"{}")
    assert "has not answered for" in caplog.text
    os.kill(pid_of(server), signal.SIGCONT)

    assert poll_until(lambda: get(server, target).body == b"{}")


def test_process_that_hangs_is_replaced(
    start_server: Any, get: Any, serve_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer at all is ended in the end."""
    monkeypatch.setattr(process_mirror, "SETTLE_SECONDS", 0.1)
    server = start_server()
    monkeypatch.setattr(process, "HUNG_SECONDS", 1.0)
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)
    target = serve_bytes(b"{}")

    assert get(server, target).body == b"{}"
    assert is_gone(pid)


def test_process_that_hangs_unnoticed_is_replaced(
    start_server: Any,
    get: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Any,
) -> None:
    """It is asked from time to time, also where there is nothing to tell it."""
    monkeypatch.setattr(process, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(process, "HUNG_SECONDS", 2.0)
    server = start_server()
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)

    assert wait_until(lambda: is_gone(pid))
    assert get(server, "/live").status == 200
    assert f"{pid} has ended (it did not answer; signal 9); another takes its place" in caplog.text


class Clock:
    """A monotonic clock that can be set forward."""

    seconds = 0.0

    def monotonic(self) -> float:
        """Return the seconds."""
        return time.monotonic() + self.seconds


def test_process_is_left_alone_after_all_were_suspended(
    start_server: Any, get: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    """A host that goes on first, hours later, must not take the other's silence for a fault."""
    clock = Clock()
    monkeypatch.setattr(process, "time", clock)
    monkeypatch.setattr(process, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(process, "HUNG_SECONDS", 600.0)
    server = start_server()
    pid, supervisor = pid_of(server), server._loop
    os.kill(pid, signal.SIGSTOP)
    assert wait_until(lambda: supervisor._turn_by < float("inf"))
    clock.seconds = 3600.0
    supervisor._wake()
    assert wait_until(lambda: 300 < supervisor._turn_by - clock.monotonic() < 3000)
    os.kill(pid, signal.SIGCONT)

    assert get(server, "/live").status == 200
    assert pid_of(server) == pid


def test_loop_that_hangs_is_replaced(
    start_server: Any,
    get: Any,
    connect: Any,
    serve_bytes: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Any,
) -> None:
    """A process whose other thread still answers serves nobody when the one that serves hangs."""
    hang = "import os, time; os.sendfile = lambda *_: time.sleep(600); "
    monkeypatch.setattr(process_launch, "_PROGRAM", hang + process_launch._PROGRAM)
    monkeypatch.setattr(process, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(process, "HUNG_SECONDS", 2.0)
    server = start_server(endpoints=lambda: {"generate": "ready"})
    pid = pid_of(server)
    connect(server).get(serve_bytes(LARGE * 20))

    assert wait_until(lambda: is_gone(pid))
    assert get(server, "/health").status == 200


def test_process_that_turns_is_left_alone(
    start_server: Any, get: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    """However often it was asked it answers, serves, and ends when told to."""
    asked = []
    send = Channel.send

    def count(channel: Channel, message: Message) -> None:
        asked.extend(key for key in message.head if key == "turn")
        send(channel, message)

    monkeypatch.setattr(Channel, "send", count)
    monkeypatch.setattr(process, "TURN_SECONDS", 0.0)
    server = start_server()
    pid, client = pid_of(server), connect(server)

    assert wait_until(lambda: len(asked) > 50)
    assert client.get("/live").answer().status == 200
    assert pid_of(server) == pid
    server.close()
    assert client.rest() == b""


def test_process_that_ends_gracefully_is_left_alone(
    start_server: Any, connect: Any, serve_bytes: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    """It answers also while the last downloads finish, however long they may take."""
    sent: list[str] = []
    send = Channel.send

    def note(channel: Channel, message: Message) -> None:
        sent.extend(message.head)
        send(channel, message)

    monkeypatch.setattr(Channel, "send", note)
    monkeypatch.setattr(process, "TURN_SECONDS", 0.01)
    server = start_server()
    client = connect(server, receive_buffer=65536).get(serve_bytes(LARGE * 40))
    begin = client.read_some(1000)
    stopping = threading.Thread(target=server.close, kwargs={"timeout": 60.0})
    stopping.start()

    assert wait_until(lambda: "stop" in sent and sent[sent.index("stop") :].count("turn") > 5)
    assert (begin + client.rest()).endswith(LARGE)
    stopping.join()


# Says something, and hangs before it serves.
HANGING_PROGRAM = """
import socket, sys, time
from importlib import import_module
sys.path.append(sys.argv[1])
channel = import_module(sys.argv[2].replace("process_child", "process_channel"))
host = channel.Channel(socket.socket(fileno=int(sys.argv[3])))
host.send(channel.Message({"log": "hello", "logger": "worker.site", "level": 30}))
time.sleep(600)
"""


def test_process_that_never_serves_is_replaced(
    start_server: Any,
    get: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Any,
) -> None:
    """Each has a limited time to begin, whatever it says meanwhile and whoever has served before it."""
    server = start_server()
    with monkeypatch.context() as patch:
        patch.setattr(process, "START_SECONDS", 2.0)
        patch.setattr(process_launch, "_PROGRAM", HANGING_PROGRAM)
        os.kill(pid_of(server), signal.SIGKILL)
        assert wait_until(lambda: "hello" in caplog.text)

    assert get(server, "/live").status == 200


def test_signals_for_the_service_are_the_hosts(start_server: Any, get: Any) -> None:
    """Who interrupts or ends every process of a service does not end this one before its host."""
    server = start_server()
    pid = pid_of(server)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)

    assert get(server, "/live").status == 200
    assert pid_of(server) == pid


HOST = """
import contextlib, os, signal, sys, time, urllib.request
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.server import SystemStatusServer
from selfhost.worker.site import Site
from selfhost.worker.tls import TlsFiles
server = SystemStatusServer(MetadataArtifactRegistry(), isolation="process")

def start():
    server.start()
    print(server._loop._child.pid, flush=True)

def wait_for_any(*_):
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)

def live():
    return urllib.request.urlopen(f"http://{server.address}/live", timeout=10).status
"""


@pytest.fixture
def run_host(run_script: Any) -> Callable[..., Any]:
    """Run a host that ends as the code says; return what it said, and whether its process is gone."""

    def run(code: str) -> Any:
        done = run_script(HOST + code)
        pid = int(done.stdout.split()[0])
        deadline = time.monotonic() + 5
        while not is_gone(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        return done, is_gone(pid)

    return run


@pytest.mark.parametrize(
    "ending",
    [
        "start(); os._exit(0)",
        "start(); os.kill(os.getpid(), signal.SIGKILL)",
        "start(); os.execv('/bin/true', ['true'])",
        "start(); sys.exit()",
        # A system that cannot tell of the end of a process that is not a child.
        "from selfhost.worker import process_launch\n"
        "process_launch._PROGRAM = 'import os; vars(os).pop(\"pidfd_open\"); ' + process_launch._PROGRAM\n"
        "start(); os._exit(0)",
        # A child that keeps copies of every descriptor, made before ours are closed in it.
        "copy = lambda: [os.dup(fd) for fd in range(3, 40) if os.path.exists(f'/dev/fd/{fd}')]\n"
        "os.register_at_fork(after_in_child=copy)\nstart()\n"
        "if os.fork() == 0:\n    [os.close(fd) for fd in range(3)]\n    time.sleep(20)\n    os._exit(0)\n"
        "time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)",
    ],
    ids=["_exit", "kill -9", "exec", "exit", "without pidfd", "forked child with copies"],
)
def test_gone_with_its_host(ending: str, run_host: Any) -> None:
    """However the host ends, its process is gone within moments."""
    done, is_over = run_host(ending)

    assert done.stderr == ""
    assert is_over


@pytest.mark.parametrize(
    "habit",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "signal.signal(signal.SIGCHLD, wait_for_any)",
    ],
    ids=["ignores SIGCHLD", "waits for any child"],
)
def test_host_with_habits_of_its_own(habit: str, run_host: Any) -> None:
    """A host that deals with ended children itself neither keeps us from restarting nor from stopping."""
    done, is_over = run_host(
        f"""{habit}
start()
os.kill(server._loop._child.pid, signal.SIGKILL)
assert live() == 200
began = time.monotonic()
server.close()
assert time.monotonic() - began < 3
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no zombie")
"""
    )

    assert (done.returncode, is_over) == (0, True)
    assert re.fullmatch(r".* has ended \(.*\); another takes its place\n", done.stderr)
    assert "no zombie" in done.stdout


def test_threads_take_no_signal_of_the_host(run_script: Any) -> None:
    """What the host blocks later, to fetch it when it suits, is delivered to no thread of ours."""
    code = """
server = SystemStatusServer(MetadataArtifactRegistry(), endpoints=dict, isolation="process")
start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
print(signal.sigtimedwait({signal.SIGTERM}, 20).si_signo == signal.SIGTERM)
server.close()
"""
    done = run_script(HOST + code)

    assert (done.returncode, done.stderr, done.stdout.split()[1:]) == (0, "", ["True"])


def test_interrupt_is_for_the_host(run_script: Any) -> None:
    """Ctrl-C reaches the host's process group, and the process serves until the host stops it."""
    code = """
start()
with contextlib.suppress(KeyboardInterrupt):
    os.killpg(os.getpgrp(), signal.SIGINT)
    time.sleep(5)
print(live())
server.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", HOST + code],
        env={**os.environ, "PYTHONPATH": str(Path(process.__file__).parents[2])},
        capture_output=True, text=True, timeout=20, start_new_session=True,
    )  # fmt: skip

    assert (done.stderr, done.stdout.split()[1:]) == ("", ["200"])
