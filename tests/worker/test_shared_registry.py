"""One registry for the processes of a host: what one registers, all serve; what dies with whom; forks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from helpers import TIMEOUT, poll_until

import selfhost
from selfhost.errors import RegistrationError
from selfhost.worker.answer import find
from selfhost.worker.artifacts import Row
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry, Registration
from selfhost.worker.shared import GHOST_SECONDS

PLAIN = "/v1/metadata/m/_base/f"
ONE, TWO = b"one", b"two"

PEER = """
import json, os, sys
from selfhost.worker.content import pin_bytes
from selfhost.worker.registry import MetadataArtifactRegistry

def put(slug, text, name="f"):
    held.append(registry.register(slug, "_base", name, pin_bytes(text.encode())))
    return dict(held[-1].targets)

def get(target):
    artifact = registry.lookup(target)
    return artifact and artifact.content.read(0, artifact.content.size).decode()

def targets():
    return {target: one.content.hex for target, one in registry._current().targets.items()}

registry, held = MetadataArtifactRegistry(shared=sys.argv[1]), []
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Peer:
    """Another process with a registry on the same folder; evaluates what it is asked."""

    def __init__(self, folder: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PEER, folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, expression: str) -> Any:
        """Return the value of a Python expression there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{expression}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self, number: int = 0) -> None:
        """Let the process exit, or kill it with a signal; wait until it is gone."""
        if number:
            self.process.send_signal(number)
        self.process.communicate(timeout=TIMEOUT)


@pytest.fixture
def registry(shared: Callable[[], MetadataArtifactRegistry]) -> MetadataArtifactRegistry:
    """Return this process's registry on the folder."""
    return shared()


@pytest.fixture
def start_peer(folder: str) -> Iterator[Callable[[], Peer]]:
    """Start other processes; they end with the test."""
    peers: list[Peer] = []

    def start() -> Peer:
        peers.append(Peer(folder))
        return peers[-1]

    yield start
    for peer in peers:
        if peer.process.returncode is None:
            peer.end(signal.SIGKILL)


def read(registry: MetadataArtifactRegistry, target: str) -> bytes | None:
    """Return the bytes that answer a URL."""
    artifact = registry.lookup(target)
    return artifact and artifact.content.read(0, artifact.content.size)


def targets(registry: MetadataArtifactRegistry) -> dict[str, str]:
    """Return the digest that answers each URL."""
    return {target: artifact.content.hex for target, artifact in registry._current().targets.items()}


def names(folder: str, part: str) -> list[str]:
    """Return the names in a part of the folder."""
    return os.listdir(f"{folder}/{part}")


# ------------------------------------------------------------------ served by all


def test_registered_in_one_is_served_by_all_at_once(
    registry: MetadataArtifactRegistry, start_peer: Callable[[], Peer]
) -> None:
    """Each of four processes has it at its very next look-up, and no longer after it was closed."""
    peers = [start_peer() for _ in range(4)]  # catalogue 141
    served = withdrawn = 0
    for number in range(100):
        text = f"content {number}"
        with registry.register("m", "_base", "f", pin_bytes(text.encode())):
            served += sum(peer(f"get({PLAIN!r})") == text for peer in peers)
        withdrawn += sum(peer(f"get({PLAIN!r})") is None for peer in peers)

    assert (served, withdrawn) == (400, 400)


def test_every_question_is_asked_of_all(shared: Callable[[], MetadataArtifactRegistry]) -> None:
    """Whatever is asked first of a registry, the answer includes what another one has just registered."""
    one, other = shared(), shared()
    questions: list[Callable[[MetadataArtifactRegistry], Any]] = [
        lambda r: r.get("m", "_base", "f"),
        lambda r: r.lookup(PLAIN),
        lambda r: find(r, PLAIN, ""),
        lambda r: list(r),
        len,
        lambda r: not r.is_empty(),
        lambda r: r.keys(),
        lambda r: r.model("m", "_base"),
        lambda r: r.pinned_bytes,
        lambda r: "files=1" in repr(r),
    ]
    for ask in questions:
        assert not ask(other)
        with one.register("m", "_base", "f", pin_bytes(ONE)):
            assert ask(other)


def test_all_agree_on_the_oldest(registry: MetadataArtifactRegistry, start_peer: Callable[[], Peer]) -> None:
    """Contents of one key have the same URLs everywhere, in whatever order processes come and go."""
    first, second = start_peer(), start_peer()
    assert first("put('m', 'one')") == {"f": PLAIN}
    (url,) = second("put('m', 'two')").values()
    assert url == f"{PLAIN}?blake3={pin_bytes(TWO).hex}"
    assert first("put('m', 'two')") == {"f": url}
    registry.register("m", "_base", "f", pin_bytes(b"three"))
    late = start_peer()
    assert late("targets()") == first("targets()") == targets(registry)

    second.end()
    assert (late(f"get({PLAIN!r})"), late(f"get({url!r})")) == ("one", "two")
    first.end()
    assert late(f"get({PLAIN!r})") == "three"
    assert late("targets()") == targets(registry)
    assert start_peer()("targets()") == targets(registry)


def test_unregister_takes_out_what_all_registered(
    registry: MetadataArtifactRegistry, folder: str, start_peer: Callable[[], Peer]
) -> None:
    """A model goes whoever registered it; handles of other processes then take nothing of a newcomer's."""
    peer = start_peer()
    peer("put('m', 'one')")
    peer("put('m', 'two')")
    peer("put('n', 'two')")
    assert registry.unregister("m", "_base") == 2
    assert registry.unregister("m", "_base") == 0
    registry.register("m", "_base", "f", pin_bytes(ONE))
    peer("held[0].close()")

    assert peer(f"get({PLAIN!r})") == "one"
    assert sorted(names(folder, "content")) == sorted([pin_bytes(ONE).hex, pin_bytes(TWO).hex])


class Noted:
    """A follower that notes names."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def added(self, registration: Registration) -> None:
        """Note it."""
        self.told.append(f"+{registration.slug}")

    def removed(self, registration: Registration) -> None:
        """Note it."""
        self.told.append(f"-{registration.slug}")

    def settle(self) -> None:
        """Nobody has to wait for what others register."""
        self.told.append("settle")


def test_followers_and_version_see_what_others_do(shared: Callable[[], MetadataArtifactRegistry]) -> None:
    """A change of another process is told at the next look-up."""
    one, other, noted = shared(), shared(), Noted()
    other.follow(noted)
    before = other.version
    with one.register("m", "_base", "f", pin_bytes(ONE)):
        between = other.version
    after = other.version

    assert noted.told == ["+m", "-m"]
    assert len({before, between, after, other.version}) == 3


def test_card_is_shared_too(shared: Callable[[], MetadataArtifactRegistry]) -> None:
    """A card answers the model's URL in all processes."""
    card = shared().register_card("m", "_base", '{"名": 1}')

    assert read(shared(), card.targets[""]) == '{"名": 1}'.encode()


def test_registration_of_another_process_cannot_be_closed(
    shared: Callable[[], MetadataArtifactRegistry],
) -> None:
    """A registry releases what it registered itself, and nothing else."""
    one, other = shared(), shared()
    registration = one.register("m", "_base", "f", pin_bytes(ONE))
    other.release(registration)

    assert read(one, PLAIN) == read(other, PLAIN) == ONE


# ------------------------------------------------------------------ the end of a process


@pytest.mark.parametrize("number", [0, signal.SIGKILL], ids=["exit", "SIGKILL"])
def test_what_a_dead_process_registered_goes(
    registry: MetadataArtifactRegistry, folder: str, start_peer: Callable[[], Peer], number: int
) -> None:
    """All of it goes, at once where the process could say so; what others registered stays."""
    peer, other = start_peer(), start_peer()
    peer("put('m', 'of the dead')")
    peer("put('k', 'of both')")
    other("put('k', 'of both')")
    registry.register("n", "_base", "f", pin_bytes(ONE))
    assert read(registry, PLAIN) == b"of the dead"
    peer.end(number)

    if number:
        assert poll_until(lambda: registry.lookup(PLAIN) is None, GHOST_SECONDS + TIMEOUT)
    assert other(f"get({PLAIN!r})") is None
    assert read(registry, PLAIN) is None
    assert read(registry, "/v1/metadata/k/_base/f") == b"of both"
    assert other("get('/v1/metadata/n/_base/f')") == "one"
    assert sorted(names(folder, "content")) == sorted(pin_bytes(data).hex for data in (ONE, b"of both"))
    assert len(names(folder, "owners")) == 2


def test_dead_make_room_before_the_living_register(
    registry: MetadataArtifactRegistry, start_peer: Callable[[], Peer]
) -> None:
    """A newcomer finds no ghost: it has the plain URL."""
    registry.register("n", "_base", "f", pin_bytes(ONE))
    peer = start_peer()
    peer("put('m', 'of the dead')")
    peer.end(signal.SIGKILL)

    registry._shared._sweep_at = 0.0

    assert registry.register("m", "_base", "f", pin_bytes(TWO)).targets == {"f": PLAIN}


def test_stopped_process_is_alive(registry: MetadataArtifactRegistry, start_peer: Callable[[], Peer]) -> None:
    """Who is stopped, or just slow, keeps what it registered."""
    peer = start_peer()
    peer("put('m', 'one')")
    peer.process.send_signal(signal.SIGSTOP)
    registry._shared._sweep_at = 0.0

    assert read(registry, PLAIN) == ONE
    assert registry._shared._sweep_at > 0.0


def test_registries_of_one_process_do_not_take_each_other_for_dead(
    shared: Callable[[], MetadataArtifactRegistry], start_peer: Callable[[], Peer]
) -> None:
    """Closing one, or looking for the dead in one, leaves the others' locks alone."""
    one, other, third = shared(), shared(), shared()
    one.register("m", "_base", "f", pin_bytes(ONE))
    other.register("n", "_base", "f", pin_bytes(TWO))
    third.register("k", "_base", "f", pin_bytes(TWO))
    third.close()
    other._shared._sweep_at = 0.0
    assert read(other, PLAIN) == ONE
    peer = start_peer()  # looks for the dead when it starts

    assert peer("sorted(registry.keys())") == [["m", "_base"], ["n", "_base"]]


def test_close_withdraws_at_once_and_leaves_the_folder(
    shared: Callable[[], MetadataArtifactRegistry], folder: str
) -> None:
    """A closed registry is empty and takes in nothing; its registrations are gone for everybody."""
    one, other = shared(), shared()
    registration = one.register("m", "_base", "f", pin_bytes(ONE))
    other.register("n", "_base", "f", pin_bytes(TWO))
    one.close()
    one.close()
    registration.close()

    assert (one.is_empty(), one.lookup(PLAIN), len(one), one.shared) == (True, None, 0, folder)
    assert other.keys() == [("n", "_base")]
    assert names(folder, "content") == [pin_bytes(TWO).hex]
    with pytest.raises(RegistrationError, match="the registry is closed"):
        one.register("m", "_base", "f", pin_bytes(ONE))


def test_close_beside_a_thread_that_registers(
    shared: Callable[[], MetadataArtifactRegistry], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gets the lock before `close` does is refused, and leaves no ghost for the others."""
    one, other = shared(), shared()
    one.register("m", "_base", "f", pin_bytes(ONE))
    real = one._shared.folder.locked

    def locked(seconds: Optional[float] = None) -> Any:
        monkeypatch.undo()
        with pytest.raises(RegistrationError, match="the registry is closed; make another one"):
            one._shared.register("m", "_base", [Row("late", pin_bytes(TWO))])
        return real(seconds)

    monkeypatch.setattr(one._shared.folder, "locked", locked)
    one.close()

    assert other.is_empty()
    assert (names(folder, "owners"), names(folder, "content")) == ([], [])


def test_dropped_registry_withdraws_what_it_registered(
    registry: MetadataArtifactRegistry, folder: str
) -> None:
    """Nobody has to close a registry before forgetting it; while a handle is there, it is not forgotten."""
    handle = MetadataArtifactRegistry(shared=folder).register("m", "_base", "f", pin_bytes(ONE))
    assert read(registry, PLAIN) == ONE
    del handle

    assert read(registry, PLAIN) is None


def test_nothing_stays_open(leaves_nothing: None, folder: str) -> None:
    """Neither descriptors nor threads outlive `close`, although somebody still has the registry."""
    registries = [MetadataArtifactRegistry(shared=folder) for _ in range(20)]
    for number, registry in enumerate(registries):
        registry.register("m", "_base", "f", pin_bytes(b"%d" % number * 100_000))
        read(registry, PLAIN)
    for registry in registries:
        registry.close()

    assert (names(folder, "content"), names(folder, "owners")) == ([], [])


# ------------------------------------------------------------------ forks


def test_child_serves_what_its_parent_registered(run_script: Any, folder: str) -> None:
    """What is the parent's goes with the parent, not by a child's copy of the handle; a child has its own."""
    done = run_script(  # as under gunicorn --preload
        """
        import os, signal, sys, time
        from selfhost.worker import shared
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        shared.GHOST_SECONDS = 0.1

        def fork(work):
            child = os.fork()
            if not child:
                work()
                sys.stdout.flush()
                os._exit(0)
            return child

        def parent():
            registry = MetadataArtifactRegistry(shared=sys.argv[1])
            handle = registry.register("m", "_base", "f", pin_bytes(b"parent's"))

            def child():
                signal.alarm(20)
                print(registry.get("m", "_base", "f").content.read(0, 8))
                handle.close()
                own = registry.register("n", "_base", "f", pin_bytes(b"child's"))
                os.write(ready[1], b"!")
                while registry.get("m", "_base", "f"):  # until the parent is gone
                    time.sleep(0.01)
                print(registry.get("n", "_base", "f").content.read(0, 8))

            os.waitpid(fork(lambda: handle.close() or registry.close()), 0)
            os.close(ended[0])
            ready = os.pipe()
            fork(child)
            os.read(ready[0], 1)
            print(len(registry))
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        ended = os.pipe()
        os.waitpid(fork(parent), 0)
        os.close(ended[1])
        os.read(ended[0], 1)  # the child's copy closes with it
        registry = MetadataArtifactRegistry(shared=sys.argv[1])
        while not registry.is_empty():
            time.sleep(0.01)
        print("empty", os.listdir(sys.argv[1] + "/content"), os.listdir(sys.argv[1] + "/owners"))
        """,
        folder,
    )

    expected = ['b"parent\'s"', "2", 'b"child\'s"', "empty [] []"]
    assert (sorted(done.stdout.splitlines()), done.stderr) == (sorted(expected), "")


def test_forks_beside_busy_threads_do_not_hang(run_script: Any, folder: str) -> None:
    """Forked at any moment of other threads' registrations, a child registers and looks up at once."""
    done = run_script(
        """
        import os, signal, sys, threading, warnings
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the very subject
        sys.setswitchinterval(1e-4)
        registry, stop = MetadataArtifactRegistry(shared=sys.argv[1]), threading.Event()
        registry.register("m", "_base", "f", pin_bytes(b"before the fork"))

        def work(number):
            while not stop.is_set():
                registry.register(f"t{number}", "_base", "f", pin_bytes(b"%d" % number)).close()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            child = os.fork()
            if not child:
                signal.alarm(30)  # a child that waits for a lock would wait for ever
                found = registry.get("m", "_base", "f")
                with registry.register("c", "_base", "f", pin_bytes(b"in the child")):
                    ok = found.content.read(0, 6) == b"before" and registry.get("c", "_base", "f")
                registry.close()
                os._exit(0 if ok else 1)
            failed = os.waitpid(child, 0)[1]
            if failed:
                break
        stop.set()
        for thread in threads:
            thread.join()
        print(failed, len(registry), len(os.listdir(sys.argv[1] + "/owners")))
        """,
        folder,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("0 1 1\n", "")


# ------------------------------------------------------------------ what a look-up costs


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_look_up_is_one_system_call(run_script: Any, folder: str, tmp_path: Path) -> None:
    """An fstat of the journal, whatever the number of files; nothing else where nothing is new."""
    done = run_script(
        """
        import os, subprocess, sys
        from selfhost.worker import shared
        from selfhost.worker.content import pin_bytes
        from selfhost.worker.registry import MetadataArtifactRegistry

        shared.GHOST_SECONDS = 3600  # until one of them looks who is alive
        registry = MetadataArtifactRegistry(shared=sys.argv[1])
        for number in range(50):
            registry.register("m", "_base", f"f{number}", pin_bytes(b"%d" % number))
        registry.lookup("/v1/metadata/m/_base/f7")
        registry._shared._sweep_at = float("inf")  # however long the tracer takes
        tracer = subprocess.Popen(
            ["strace", "-e", "trace=all", "-o", sys.argv[2], "-p", str(os.getpid())],
            stderr=subprocess.PIPE,
        )
        if b"attached" not in tracer.stderr.readline():
            sys.exit("strace may not attach")
        os.getppid()
        for number in range(50):
            assert registry.lookup(f"/v1/metadata/m/_base/f{number}").content.data == b"%d" % number
        os.getppid()
        tracer.terminate()
        tracer.communicate()
        """,
        folder,
        str(tmp_path / "trace"),
    )
    if "may not attach" in done.stderr:
        pytest.skip("strace may not attach to a process here")
    calls = [line.partition("(")[0] for line in (tmp_path / "trace").read_text().splitlines()]
    start = calls.index("getppid")
    between = calls[start + 1 : calls.index("getppid", start + 1)]

    assert done.stderr == ""
    assert len(between) == 50
    assert set(between) <= {"fstat", "newfstatat", "statx"}
