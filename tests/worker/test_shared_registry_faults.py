"""What may happen to the folder of a shared registry: killed writers, full disks, garbage, strangers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import open_descriptors

from selfhost.discovery import shared_instance_id
from selfhost.errors import RegistrationError
from selfhost.worker import shared as shared_module
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry, Registration
from selfhost.worker.shared_folder import PUBLISH
from selfhost.worker.shared_journal import MAX_LINE_BYTES, render

PLAIN = "/v1/metadata/m/_base/f"
ONE, TWO = b"one", b"two"
HEX = "0" * 64


def read(registry: MetadataArtifactRegistry, target: str = PLAIN) -> bytes | None:
    """Return the bytes that answer a URL."""
    artifact = registry.lookup(target)
    return artifact and artifact.content.read(0, artifact.content.size)


def names(folder: str, part: str = "content") -> list[str]:
    """Return the names in a part of the folder."""
    return os.listdir(f"{folder}/{part}")


def append(folder: str, data: bytes) -> None:
    """Append to the journal as a writer that does not know what it does."""
    with open(f"{folder}/journal", "ab") as file:
        file.write(data)


def line(name: str, *fields: object) -> bytes:
    """Return a line of the journal."""
    return json.dumps([name, *fields]).encode() + b"\n"


# ------------------------------------------------------------------ writers that are killed

KILLED = """
import contextlib, fcntl, os, signal, sys
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry

STEPS = [(os, name) for name in (
    "open", "write", "pread", "close", "stat", "fstat", "fchmod", "replace", "unlink", "mkdir", "listdir"
)] + [(fcntl, "flock"), (fcntl, "lockf")]
folder = sys.argv[1]
step = 0

def die_at(last):
    def wrap(real):
        def call(*args, **options):
            global step
            step += 1
            if step == last and real is os_write:  # half of it is on the disk
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    os_write = os.write
    for module, name in STEPS:
        setattr(module, name, wrap(getattr(module, name)))

def victim(last):
    die_at(last)
    registry = MetadataArtifactRegistry(shared=folder)
    files = {"f": pin_bytes(b"of the victim"), "g": pin_bytes(b"large" * 50_000), "h": pin_bytes(b"of both")}
    with registry.register_files("m", "_base", files):
        registry.register_card("m", "_base", "{}")
        registry.unregister("m", "_base")
    registry.close()
    os._exit(0)

for last in range(1, 1000):
    child = os.fork()
    if not child:
        victim(last)
    status = os.waitpid(child, 0)[1]
    with contextlib.closing(MetadataArtifactRegistry(shared=folder)) as registry:
        assert registry.is_empty(), (last, list(registry))
        assert os.listdir(folder + "/content") == [], (last, os.listdir(folder + "/content"))
        with registry.register("m", "_base", "h", pin_bytes(b"of both")) as mine:
            assert mine.targets == {"h": "/v1/metadata/m/_base/h"}, last
            found = registry.lookup("/v1/metadata/m/_base/h")
            assert found.content.read(0, 7) == b"of both", last
        assert registry.is_empty(), last
    assert os.listdir(folder + "/owners") == [], last
    assert sorted(os.listdir(folder)) == ["content", "journal", "lock", "owners"], last
    if not status:
        break
print(last > 100, status)
"""


def test_killed_at_every_step(run_script: Any, folder: str) -> None:
    """Wherever a writer dies, the next process registers right and nothing of the dead one is left."""
    done = run_script(KILLED, folder, timeout=60)

    assert (done.stdout, done.stderr) == ("True 0\n", "")


def test_torn_line_is_ended_by_the_next_writer(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """Half a line, or a whole one without its end, says nothing, then or later; what follows is read."""
    one, other = shared(), shared()
    owner = one.register("m", "_base", "f", pin_bytes(ONE)).id.partition(".")[0]
    for torn in (b'["gone","', line("gone", owner)[:-1]):
        append(folder, torn)
        assert read(one) == read(other) == ONE
        with other.register("n", "_base", "f", pin_bytes(TWO)):
            assert read(one, "/v1/metadata/n/_base/f") == TWO

    assert read(one) == read(shared()) == ONE


def test_torn_line_is_looked_at_once(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until somebody ends it, or goes on with it, look-ups cost what they always do."""
    one, other = shared(), shared()
    one.register("m", "_base", "f", pin_bytes(ONE))
    removal = line("gone", one._shared._owner)
    append(folder, removal[:-9])
    other._shared._sweep_at = float("inf")  # who looks for the dead reads it, too
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or real(*args))
    for _ in range(3):
        other.lookup(PLAIN)
    assert len(reads) == 1
    append(folder, removal[-9:])

    assert other.lookup(PLAIN) is None


GARBAGE = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'"add"',
    b"[[[[",
    b"[" * 100_000,
    line("add"),
    line("unknown", "x"),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["f", HEX[1:], 1, 1, True]]),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["f", "../../journal", 1, 1, True]]),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["f", HEX, -1, 1, True]]),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["f", HEX, 1 << 40, 1, True]]),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["f", HEX, 1, 0, True]]),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["f", HEX, 1, 1, 1]]),
    line("add", "1-0123456789abcdef.1", "m", "_base", [["../f", HEX, 1, 1, True]]),
    line("add", "1-0123456789abcdef.1", "m", "", [["f", HEX, 1, 1, True]]),
    line("add", "1-0123456789abcdef.1", "m\ud800", "_base", []),
    line("add", "1-0123456789abcdef.1", ["m"], "_base", []),
    line("add", "../x.1", "m", "_base", []),
    line("add", 7, "m", "_base", []),
    line("remove", "x"),
    line("remove", [7]),
    line("remove", ["1-0123456789abcdef.9"]),
    line("gone", None),
    line("gone", "../journal"),
    b"x" * (3 * MAX_LINE_BYTES),
]


def test_garbage_is_ignored(shared: Callable[[], MetadataArtifactRegistry], folder: str) -> None:
    """Lines that nobody of us wrote change nothing and raise nothing, and what follows is read."""
    one, other = shared(), shared()
    one.register("m", "_base", "f", pin_bytes(ONE))
    for garbage in GARBAGE:
        append(folder, garbage + b"\n")
        assert other.keys() == [("m", "_base")]
        with one.register("n", "_base", "f", pin_bytes(TWO)):
            assert read(other, "/v1/metadata/n/_base/f") == TWO

    assert shared().keys() == [("m", "_base")]
    assert names(folder, "owners") == [one._shared._owner]


def test_same_line_twice_counts_once(shared: Callable[[], MetadataArtifactRegistry], folder: str) -> None:
    """What was read before is not done again."""
    one, other = shared(), shared()
    registration = one.register("m", "_base", "f", pin_bytes(ONE))
    append(folder, Path(folder, "journal").read_bytes().splitlines(keepends=True)[1])
    assert len(other) == 1
    registration.close()

    assert (len(other), len(one), names(folder)) == (0, 0, [])


@pytest.mark.parametrize("is_first", [True, False])
def test_line_with_a_wrong_size(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, is_first: bool
) -> None:
    """It is a registration that cannot be served; that of the right size can, and its file stays."""
    wrong = line("add", "1-0123456789abcdef.1", "n", "_base", [["f", pin_bytes(ONE).hex, 7, 1, True]])
    one, other = shared(), shared()
    if is_first:
        append(folder, wrong)
    one.register("m", "_base", "f", pin_bytes(ONE))
    if not is_first:
        append(folder, wrong)
    for registry in (one, other):
        assert read(registry) == ONE
    other._shared._sweep_at = 0.0  # that owner does not live
    assert other.keys() == [("m", "_base")]

    assert [read(registry) for registry in (one, other, shared())] == [ONE] * 3


# ------------------------------------------------------------------ the lock


def test_lock_that_is_never_released(shared: Callable[[], MetadataArtifactRegistry], folder: str) -> None:
    """A stopped process that holds the lock hangs nobody: look-ups go on, changes are refused in time."""
    registry = shared()
    registration = registry.register("m", "_base", "f", pin_bytes(ONE))
    script = "import fcntl, os, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, f"{folder}/lock"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.send_signal(signal.SIGSTOP)
        registry._shared.folder.lock_seconds = 0.1
        registry._shared._sweep_at = 0.0
        assert read(registry) == ONE
        with pytest.raises(RegistrationError, match=r"held its lock for 0\.1 s") as caught:
            registry.register("m", "_base", "g", pin_bytes(TWO))
        registration.close()  # for the others, as soon as it can be said
        assert registry.is_empty()
        assert folder in str(caught.value)
    finally:
        holder.kill()
        holder.communicate()
    assert read(shared()) == ONE
    registry.register("n", "_base", "f", pin_bytes(TWO))

    assert read(shared()) is None
    assert names(folder) == [pin_bytes(TWO).hex]
    registry.close()


def withdraw_in_vain(registration: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close a registration while the disk is full."""
    monkeypatch.setattr(os, "write", failing(os.write, 1, errno.ENOSPC))
    registration.close()
    monkeypatch.undo()


def test_withdrawal_that_could_not_be_written_is_said_later(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look-ups are enough; until then the others serve it whole, and its own process does not."""
    registry, other = shared(), shared()
    small, large = registry.register("m", "_base", "f", pin_bytes(ONE)), pin_bytes(bytes(100_000))
    more = registry.register("n", "_base", "f", large)
    withdraw_in_vain(small, monkeypatch)
    withdraw_in_vain(more, monkeypatch)
    monkeypatch.setattr(os, "write", failing(os.write, 2, errno.ENOSPC))  # the second again
    registry._shared._sweep_at = 0.0
    assert registry.is_empty()
    monkeypatch.undo()
    assert shared().keys() == other.keys() == [("n", "_base")]
    assert read(other, "/v1/metadata/n/_base/f") == bytes(100_000)
    registry._shared._sweep_at = 0.0
    assert registry.is_empty()

    assert other.is_empty()
    assert names(folder) == []


def test_withdrawn_does_not_come_back_with_a_compaction(
    shared: Callable[[], MetadataArtifactRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new journal may still have what this process could not say."""
    registry, other = shared(), shared()
    registration = registry.register("m", "_base", "f", pin_bytes(ONE))
    withdraw_in_vain(registration, monkeypatch)
    compact(other)
    assert (read(other), read(registry)) == (ONE, None)
    assert not registry.holds(registration)
    registry.register("n", "_base", "f", pin_bytes(TWO))

    assert other.keys() == registry.keys() == [("n", "_base")]


def test_interrupted_thread_gives_the_lock_back(
    shared: Callable[[], MetadataArtifactRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a signal handler, raised the moment the lock is taken, does not leave it locked."""
    registry = shared()
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if operation & fcntl.LOCK_EX:
            raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KeyboardInterrupt):
        registry.unregister("m", "_base")
    monkeypatch.undo()

    with shared()._shared.folder.locked(0):
        pass


def test_child_does_not_keep_its_parents_lock(run_script: Any, folder: str) -> None:
    """A process that was killed with the lock has given it back, although a child of it lives."""
    done = run_script(
        """
        import os, signal, sys, threading, warnings
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        def hold():
            with registry._shared.folder.locked():
                held.set()
                threading.Event().wait()

        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the very subject
        forked, ended = os.pipe(), os.pipe()
        if not os.fork():
            registry, held = MetadataArtifactRegistry(shared=sys.argv[1]), threading.Event()
            threading.Thread(target=hold, daemon=True).start()
            held.wait()
            if os.fork():
                os.read(forked[0], 1)
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(forked[1], b"!")
            os.close(ended[1])
            os.read(ended[0], 1)  # until the script ends
            os._exit(0)
        os.wait()
        registry = MetadataArtifactRegistry(shared=sys.argv[1])
        registry.register("m", "_base", "f", pin_bytes(b"one"))
        print(len(registry))
        """,
        folder,
    )

    assert (done.stdout, done.stderr) == ("1\n", "")


def test_fork_hooks_that_are_installed_twice(run_script: Any, folder: str) -> None:
    """Two threads that make the first registries may both install them: locks are given back all the same."""
    done = run_script(
        """
        import os, sys, threading
        from selfhost.worker import shared_forks
        from selfhost.worker.registry import MetadataArtifactRegistry

        registry = MetadataArtifactRegistry(shared=sys.argv[1])
        shared_forks.install_fork_hooks.__wrapped__()

        def take():
            if registry._index.lock.acquire(timeout=1):
                registry._index.lock.release()
                os.write(1, b"free\\n")  # at once: parent and child write side by side

        child = os.fork()
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        """,
        folder,
    )

    assert (done.stdout, done.stderr) == ("free\nfree\n", "")


def test_dead_are_withdrawn_although_the_disk_is_full(
    shared: Callable[[], MetadataArtifactRegistry],
    run_script: Any,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who cannot tell the others that a process is gone sees it for itself."""
    registry = shared()
    run_script(
        """
        import os, sys
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry
        handle = MetadataArtifactRegistry(shared=sys.argv[1]).register("m", "_base", "f", pin_bytes(b"one"))
        os._exit(0)
        """,
        folder,
    )
    assert read(registry) == ONE
    monkeypatch.setattr(os, "write", failing(os.write, 1, errno.ENOSPC))
    registry._shared._sweep_at = 0.0
    registry.is_empty()
    monkeypatch.undo()

    assert read(registry) is None
    assert (names(folder), names(folder, "owners")) == ([], [])


def test_leftovers_of_the_dead_go_where_one_process_has_registrations(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """A process killed in its first copy has nothing registered; nobody has to start for its files to go."""
    registry = shared()
    registry.register("m", "_base", "f", pin_bytes(ONE))
    dead = "1-0123456789abcdef"
    for name in (f"content/.{dead}.0", f"content/{HEX}", f"owners/{dead}"):
        Path(folder, name).touch()
    registry._shared._sweep_at = 0.0
    assert read(registry) == ONE

    assert names(folder) == [pin_bytes(ONE).hex]
    assert names(folder, "owners") == [registry._shared._owner]


def test_leftovers_go_when_a_process_starts(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """Content that nobody registered, or that nobody finished, is removed; what is not ours stays."""
    registry = shared()
    registration = registry.register("m", "_base", "f", pin_bytes(ONE))
    owner = registration.id.rpartition(".")[0]
    left = {HEX, ".1-0123456789abcdef.7", f".{owner}.7", "notes.txt"}
    for name in left:
        Path(folder, "content", name).touch()
    Path(folder, "owners", "notes.txt").touch()
    shared()

    assert set(names(folder)) == {pin_bytes(ONE).hex, f".{owner}.7", "notes.txt"}
    assert set(names(folder, "owners")) == {owner, "notes.txt"}


# ------------------------------------------------------------------ compaction


@pytest.fixture
def compact_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a journal as soon as most of it is old."""
    monkeypatch.setattr(shared_module, "_COMPACT_BYTES", 2_000)


def compact(registry: MetadataArtifactRegistry) -> None:
    """Replace the journal now."""
    shared = registry._shared
    with shared._writing():
        shared._rewrite([render(change) for change in shared._replica.snapshot()])


def test_journal_does_not_grow_for_ever(
    compact_soon: None, shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """It is replaced when most of it is old news, again and again; who follows it misses nothing."""
    registry, follower, rare = shared(), shared(), shared()
    registry.register("stays", "_base", "f", pin_bytes(ONE))
    sizes = []
    for number in range(300):
        with registry.register("m", "_base", "f", pin_bytes(b"%d" % number)):
            assert read(follower) == b"%d" % number
        sizes.append(os.stat(f"{folder}/journal").st_size)

    assert max(sizes) < 5_000
    assert sum(after < before for before, after in zip(sizes, sizes[1:])) > 10
    assert follower.keys() == rare.keys() == shared().keys() == [("stays", "_base")]
    assert open_descriptors() < 100


def test_readers_never_miss_what_stays(
    compact_soon: None, shared: Callable[[], MetadataArtifactRegistry]
) -> None:
    """While the journal is replaced under them, threads of other registries find every file at any moment."""
    writer, readers = shared(), [shared() for _ in range(3)]
    writer.register("m", "_base", "f", pin_bytes(ONE))
    missing: list[object] = []
    stop = threading.Event()

    def look(registry: MetadataArtifactRegistry) -> None:
        while not stop.is_set():
            if read(registry) != ONE:
                missing.append(registry)

    threads = [threading.Thread(target=look, args=(registry,)) for registry in readers * 2]
    for thread in threads:
        thread.start()
    for number in range(300):
        writer.register("n", "_base", "f", pin_bytes(b"%d" % number)).close()
    stop.set()
    for thread in threads:
        thread.join()

    assert missing == []


@pytest.mark.parametrize("is_closed", [False, True], ids=["open", "closed since"])
def test_content_that_came_again_before_a_compaction(
    shared: Callable[[], MetadataArtifactRegistry], is_closed: bool
) -> None:
    """Who looked neither before it went nor before it came again has it where all others have it."""
    registry, rare = shared(), shared()
    first = registry.register("m", "_base", "f", pin_bytes(ONE))
    assert read(rare) == ONE
    first.close()
    registry.register("m", "_base", "f", pin_bytes(TWO))
    again = registry.register("m", "_base", "f", pin_bytes(ONE))
    (target,) = again.targets.values()
    assert target == f"{PLAIN}?blake3={pin_bytes(ONE).hex}"
    compact(registry)
    if is_closed:
        again.close()

    for one in (registry, rare, shared()):
        assert read(one) == TWO
        assert read(one, target) == (None if is_closed else ONE)
        assert len(one) == 1 + (not is_closed)
    registry.unregister("m", "_base")
    assert rare._current().targets == {}


def test_younger_content_that_came_again_before_a_compaction(
    shared: Callable[[], MetadataArtifactRegistry],
) -> None:
    """Its URL is the same, and answers everywhere."""
    registry, rare = shared(), shared()
    registry.register("m", "_base", "f", pin_bytes(TWO))
    first = registry.register("m", "_base", "f", pin_bytes(ONE))
    (target,) = first.targets.values()
    assert read(rare, target) == ONE
    first.close()
    registry.register("m", "_base", "f", pin_bytes(ONE))
    compact(registry)

    assert read(rare, target) == read(registry, target) == ONE


def test_content_that_changed_places_before_a_compaction(
    shared: Callable[[], MetadataArtifactRegistry],
) -> None:
    """A new process counts from the oldest that is left: the same number may stand for another place."""
    registry, rare = shared(), shared()
    registry.register("m", "_base", "f", pin_bytes(TWO))
    registry.register("m", "_base", "f", pin_bytes(ONE))  # the second, behind a query
    assert read(rare) == TWO
    registry.unregister("m", "_base")
    compact(registry)
    late = shared()
    late.register("n", "_base", "f", pin_bytes(TWO))
    late.register("m", "_base", "f", pin_bytes(ONE))  # the second, with the plain URL
    compact(late)

    found = [set(one._current().targets) for one in (late, rare)]
    assert found == [{PLAIN, "/v1/metadata/n/_base/f"}] * 2


def test_small_journal_is_kept(shared: Callable[[], MetadataArtifactRegistry], folder: str) -> None:
    """Replacing a file that is small anyway would save nothing."""
    registry = shared()
    before = os.stat(f"{folder}/journal").st_ino
    for _ in range(100):
        registry.register("m", "_base", "f", pin_bytes(ONE)).close()

    assert os.stat(f"{folder}/journal").st_ino == before


# ------------------------------------------------------------------ disks


def failing(real: Callable[..., Any], number: int, code: int) -> Callable[..., Any]:
    """Return a system call that fails at its so many-th use, after doing half of what it can do by halves."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return real(*args, **options)
        if real is os.write:
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        raise OSError(code, os.strerror(code))

    call.calls = lambda: calls  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("name", ["write", "replace", "open", "fchmod", "pread", "fstat", "stat"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_that_fails_at_any_step(
    shared: Callable[[], MetadataArtifactRegistry],
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
) -> None:
    """All or nothing, no file left over, a typed error that says what to do; then it works again."""
    registry, other = shared(), shared()
    registry.register("m", "_base", "f", pin_bytes(ONE))
    files = {"g": pin_bytes(b"small"), "h": pin_bytes(b"large" * 50_000), "i": pin_bytes(ONE)}
    real, reached = getattr(os, name), 0
    for number in range(1, 30):
        call = failing(real, number, code)
        monkeypatch.setattr(os, name, call)
        refusal = ""
        try:
            registry.register_files("m", "_base", files).close()
        except RegistrationError as error:
            refusal = str(error)
        monkeypatch.setattr(os, name, real)
        reached += bool(refusal)
        assert not refusal or (folder in refusal and os.strerror(code) in refusal)
        registry.register("x", "_base", "x", pin_bytes(ONE)).close()  # says what could not be said
        assert read(registry) == read(other) == ONE
        assert len(other) == len(registry) == 1, number
        assert names(folder) == [pin_bytes(ONE).hex], number
        if call.calls() < number:  # type: ignore[attr-defined]
            break

    assert reached >= 2
    with registry.register_files("m", "_base", files):
        assert len(other) == 4


def test_file_size_limit(run_script: Any, folder: str) -> None:
    """A limit of the process is a disk that is full: what is too large is refused and leaves nothing."""
    done = run_script(
        """
        import os, resource, sys
        from selfhost.errors import RegistrationError
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        registry = MetadataArtifactRegistry(shared=sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            registry.register_files("m", "_base", {"a": pin_bytes(b"a"), "b": pin_bytes(bytes(100_001))})
        except RegistrationError as error:
            print(error.reason.partition(": ")[2])
        print(os.listdir(sys.argv[1] + "/content"), registry.is_empty())
        registry.register("m", "_base", "c", pin_bytes(bytes(99_999)))
        print(len(registry))
        """,
        folder,
    )

    assert done.stdout == "File too large; make room there, or name another folder\n[] True\n1\n"
    assert done.stderr == ""


def test_source_that_cannot_be_pinned_leaves_nothing(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """Files that stood before it in the same registration are taken out of the folder again."""
    registry = shared()
    with pytest.raises(RegistrationError, match="'/nowhere/at/all': No such file or directory"):
        registry.register_files("m", "_base", {"a": pin_bytes(ONE), "b": "/nowhere/at/all"})

    assert (names(folder), registry.is_empty()) == ([], True)


def test_too_many_files_for_a_line(shared: Callable[[], MetadataArtifactRegistry], folder: str) -> None:
    """A registration that readers would not read is refused."""
    registry = shared()
    content = pin_bytes(ONE)
    with pytest.raises(RegistrationError, match="register fewer files at once"):
        registry.register_files("m", "_base", {f"{number:0200}": content for number in range(4_000)})

    assert (names(folder), registry.is_empty()) == ([], True)


# ------------------------------------------------------------------ the folder


def test_new_folder_is_this_users_alone(tmp_path: Path) -> None:
    """Made with mode 0700 whatever the umask is, and its files cannot be read by others either."""
    for umask in (0o000, 0o777):
        folder = tmp_path / f"{umask:o}"
        before = os.umask(umask)
        try:
            with contextlib.closing(MetadataArtifactRegistry(shared=folder)) as registry:
                registry.register("m", "_base", "f", pin_bytes(ONE))
                modes = [os.stat(folder / name).st_mode & 0o777 for name in ("", "content", "owners")]
                assert modes == [0o700] * 3
                assert os.stat(folder / "content" / pin_bytes(ONE).hex).st_mode & 0o777 == 0o400
                assert os.stat(folder / "journal").st_mode & 0o077 == 0
        finally:
            os.umask(before)


def link(path: Path) -> None:
    """Make a symbolic link to a folder."""
    path.with_name("elsewhere").mkdir()
    path.symlink_to("elsewhere")


def with_mode(mode: int) -> Callable[[Path], None]:
    """Return what makes a folder of that mode."""

    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)

    return make


def of_another_user(path: Path) -> None:
    """Make somebody else's folder."""
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    path.mkdir()
    os.chown(path, 65534, 65534)


def with_files(path: Path) -> None:
    """Make a folder that holds something else."""
    (path / "content").mkdir(parents=True)
    (path / "model.bin").touch()


def of_another_version(path: Path) -> None:
    """Make a folder with a journal of a format to come."""
    path.mkdir()
    (path / "journal").write_bytes(b'["selfhost",2]\n')


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (link, "it is a symbolic link"),
        (Path.touch, "it is no folder"),
        (with_mode(0o770), r"others may write to it \(mode 0770\); `chmod 700` it"),
        (with_mode(0o707), r"others may write to it \(mode 0707\)"),
        (of_another_user, "it belongs to user 65534, and this process runs as 0"),
        (with_files, "is not empty and holds no journal"),
        (of_another_version, "holds no journal that this version of selfhost can read"),
        (lambda path: path.parent.rmdir(), "No such file or directory"),
    ],
    ids=["link", "file", "group", "world", "owner", "used", "version", "no parent"],
)
def test_folder_that_cannot_be_trusted_is_refused(
    tmp_path: Path, leaves_nothing: None, make: Callable[[Path], object], found: str
) -> None:
    """The error names the folder, what was found and what to do; nothing is changed there."""
    folder = tmp_path / "parent" / "shared"
    folder.parent.mkdir()
    make(folder)
    with pytest.raises(RegistrationError, match=found) as caught:
        MetadataArtifactRegistry(shared=folder)

    assert repr(str(folder)) in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 300])
def test_impossible_path(path: str) -> None:
    """What is no path is refused as any other folder."""
    with pytest.raises(RegistrationError, match="cannot be used"):
        MetadataArtifactRegistry(shared=f"/tmp/{path}")


def test_folder_that_a_killed_process_began(folder: str) -> None:
    """Parts without a journal are completed."""
    for part in ("content", "owners"):
        os.makedirs(f"{folder}/{part}")
    os.chmod(folder, 0o700)
    Path(folder, "journal.new").write_bytes(b'["self')

    with contextlib.closing(MetadataArtifactRegistry(shared=folder)) as registry:
        registry.register("m", "_base", "f", pin_bytes(ONE))
        assert read(registry) == ONE
    assert sorted(os.listdir(folder)) == ["content", "journal", "lock", "owners"]


def test_journal_that_was_lost_is_made_anew(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """After a crash of the machine, or of whoever removes old files, a start is all that is needed."""
    for lose in (lambda path: os.truncate(path, 0), os.unlink):
        registry = shared()
        shared_instance_id(f"{folder}/{PUBLISH}")  # as a runtime puts there
        registry.close()
        lose(f"{folder}/journal")

        assert shared().register("m", "_base", "f", pin_bytes(ONE)).targets == {"f": PLAIN}


def test_new_journal_is_on_the_disk_before_it_has_its_name(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is renamed before it is written would be empty after a power cut."""
    registry = shared()
    synced: list[int] = []
    sync, replace = os.fsync, os.replace

    def check(source: str, *args: Any, **options: Any) -> None:
        found = os.stat(f"{folder}/{source}")
        assert synced == [found.st_size] != [0]
        replace(source, *args, **options)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or sync(fd))
    monkeypatch.setattr(os, "replace", check)
    compact(registry)

    assert len(synced) == 1


def test_registry_follows_its_folder_not_its_path(
    folder: str, shared: Callable[[], MetadataArtifactRegistry]
) -> None:
    """A folder that was renamed, or left by chdir, is the same folder."""
    registry = shared()
    os.rename(folder, f"{folder}2")
    registry.register("m", "_base", "f", pin_bytes(ONE))

    assert names(f"{folder}2") == [pin_bytes(ONE).hex]
    assert not os.path.exists(folder)


def remove_folder(folder: str) -> None:
    """Remove everything."""
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(f"{root}/{name}")
        for name in folders:
            os.rmdir(f"{root}/{name}")
    os.rmdir(folder)


@pytest.mark.parametrize(
    "harm",
    [
        remove_folder,
        lambda folder: os.unlink(f"{folder}/journal"),
        lambda folder: Path(folder, "journal").write_bytes(b""),
        lambda folder: os.replace(f"{folder}/lock", f"{folder}/journal"),
    ],
    ids=["folder removed", "journal removed", "journal emptied", "journal replaced"],
)
def test_what_is_known_is_served_without_the_folder(
    shared: Callable[[], MetadataArtifactRegistry],
    folder: str,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[str], object],
) -> None:
    """Look-ups go on, one warning says so, registering is refused; closing raises nothing."""
    registry, other = shared(), shared()
    registration = registry.register_files(
        "m", "_base", {"f": pin_bytes(ONE), "g": pin_bytes(bytes(100_000))}
    )
    other.register("n", "_base", "f", pin_bytes(TWO))
    assert read(registry, "/v1/metadata/m/_base/g") == bytes(100_000)
    harm(folder)

    registry._shared._sweep_at = 0.0
    for _ in range(3):
        assert read(registry) == ONE
        assert read(registry, "/v1/metadata/m/_base/g") == bytes(100_000)
        assert len(registry) == 3
    assert caplog.text.count("goes on with what it knows") == 1
    assert repr(folder) in caplog.text
    with pytest.raises(RegistrationError):
        registry.register("m", "_base", "h", pin_bytes(TWO))
    registration.close()
    registry.close()
    other.close()


def test_removed_owner_file_withdraws_what_it_stands_for(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """Others take its process for dead; that one sees so too, and registers anew as somebody else."""
    registry, other = shared(), shared()
    other.register("n", "_base", "f", pin_bytes(TWO))
    old = registry.register("m", "_base", "f", pin_bytes(ONE))
    os.unlink(f"{folder}/owners/{registry._shared._owner}")
    with contextlib.suppress(KeyError):
        from selfhost.worker import shared_owners

        del shared_owners._own[registry._shared._owner]  # as another process sees it
    other._shared._sweep_at = 0.0
    assert read(other) is None
    assert read(registry) is None
    registry.register("m", "_base", "f", pin_bytes(ONE))
    old.close()
    other._shared._sweep_at = 0.0

    assert read(other) == read(registry) == ONE


def test_folder_of_another_process_user(run_script: Any, folder: str) -> None:
    """A child that gave up its rights serves what it knows, and is told why it cannot register."""
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    done = run_script(
        """
        import os, sys
        from selfhost.errors import RegistrationError
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        registry = MetadataArtifactRegistry(shared=sys.argv[1])
        registry.register("m", "_base", "f", pin_bytes(b"one"))
        registry.lookup("/v1/metadata/m/_base/f").content.data
        sys.stdout.flush()
        if not os.fork():
            os.setuid(65534)
            print(registry.lookup("/v1/metadata/m/_base/f").content.read(0, 3))
            try:
                registry.register("m", "_base", "g", pin_bytes(b"two"))
            except RegistrationError as error:
                print(error.reason.partition(": ")[2])
            sys.stdout.flush()
            os._exit(0)
        os.wait()
        """,
        folder,
    )

    assert done.stdout == "b'one'\nPermission denied; all processes that share it must run as one user\n"
    assert done.stderr == ""
