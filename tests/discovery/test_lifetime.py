"""Interpreter exits, kills and forks, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from selfhost.discovery import Bucket, FileDiscovery, RecordKey, base

KEY = RecordKey("ns", "comp", "ep", 0xABC)
NAME = "ns%2Fcomp%2Fep%2Fabc"
CHILDS_NAME = "ns%2Fcomp%2Fep%2F1"
Start = Callable[[str], "subprocess.Popen[str]"]
DEADLINE_SECONDS = 20.0  # for a whole interpreter, on a machine that is busy

HEAD = """
import os, sys, threading, time, warnings
warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # to fork with threads is what is tested
from selfhost.discovery import Bucket, FileDiscovery, MemoryDiscovery, RecordKey

KEY, CHILDS = RecordKey("ns", "comp", "ep", 0xABC), RecordKey("ns", "comp", "ep", 1)
store = FileDiscovery(sys.argv[1], ttl_seconds=0.3)

def threads():
    return [thread for thread in threading.enumerate() if thread.name == "selfhost-keepalive"]

def wait_until(condition):
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def child_passes(function):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    deadline = time.monotonic() + 10.0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.005)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start interpreters on a store in `tmp_path`; they are killed with the test."""
    started: list[subprocess.Popen[str]] = []
    package = str(Path(base.__file__).parents[2])

    def run(script: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(script), str(tmp_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": package},
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def names(tmp_path: Path) -> list[str]:
    """Return the names of the model records."""
    return sorted(path.name for path in (tmp_path / "v1" / "mdc").iterdir())


def test_exit_withdraws_and_is_not_held_up(start: Start, tmp_path: Path) -> None:
    """A program that just ends leaves no record, no thread and no message. # catalogue 146."""
    process = start("""
        store.publish(Bucket.MODELS, KEY, "{}")
        assert len(threads()) == 1 and os.listdir(sys.argv[1] + "/v1/mdc")
    """)

    output, _ = process.communicate(timeout=DEADLINE_SECONDS)

    assert (process.returncode, output) == (0, "")
    assert names(tmp_path) == []


def test_uncaught_exception_withdraws_too(start: Start, tmp_path: Path) -> None:
    """The interpreter ends in order, only not with 0."""
    process = start("""
        store.publish(Bucket.MODELS, KEY, "{}")
        raise SystemExit(7)
    """)
    process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 7
    assert names(tmp_path) == []


def test_killed_owners_record_expires(start: Start, tmp_path: Path) -> None:
    """Nobody withdraws it, and everybody who looks sees it go. # catalogue 113."""
    process = start("""
        store.publish(Bucket.MODELS, KEY, "{}")
        print("published", flush=True)
        sys.stdin.read()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "published\n"
    store = FileDiscovery(tmp_path, ttl_seconds=0.3)
    assert list(store.records(Bucket.MODELS)) == [KEY]

    process.kill()
    process.wait()

    deadline = time.monotonic() + DEADLINE_SECONDS
    while store.records(Bucket.MODELS):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert names(tmp_path) == [NAME]


def test_stopped_owner_publishes_again_when_it_goes_on(start: Start, tmp_path: Path) -> None:
    """Others took it for dead and removed the record; Dynamo's would be lost for good."""
    process = start("""
        store.publish(Bucket.MODELS, KEY, '{"a":1}')
        print("published", flush=True)
        sys.stdin.read()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "published\n"
    with FileDiscovery(tmp_path, ttl_seconds=0.3) as other:
        other.publish(Bucket.INSTANCES, KEY, "{}")

        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: names(tmp_path) == [])
        process.send_signal(signal.SIGCONT)

        wait_for(lambda: other.records(Bucket.MODELS) == {KEY: '{"a":1}'})


def test_forked_child_does_not_touch_what_its_parent_published(start: Start) -> None:
    """It withdraws nothing, replaces nothing, keeps nothing alive, whatever it calls."""
    process = start("""
        store = FileDiscovery(sys.argv[1])  # its records do not expire on a busy machine
        publication = store.publish(Bucket.MODELS, KEY, "{}")
        path = sys.argv[1] + "/v1/mdc/ns%2Fcomp%2Fep%2Fabc"
        inode = os.stat(path).st_ino

        def child():
            assert threads() == []
            publication.withdraw()
            try:
                publication.replace('{"child":1}')
            except Exception as err:
                assert "forked" in str(err), err
            else:
                raise AssertionError("it was replaced")
            assert list(store.records(Bucket.MODELS)) == [KEY]
            store.close()

        assert child_passes(child)
        assert os.stat(path).st_ino == inode and store.records(Bucket.MODELS) == {KEY: "{}"}
    """)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)

    assert (process.returncode, output) == (0, "")


def test_forked_child_that_exits_in_order_leaves_its_parents_records(start: Start) -> None:
    """The hooks that run at its exit are copies of the parent's, as is the object."""
    process = start("""
        store.publish(Bucket.MODELS, KEY, "{}")
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert list(store.records(Bucket.MODELS)) == [KEY]
        assert os.path.exists(sys.argv[1] + "/v1/mdc/ns%2Fcomp%2Fep%2Fabc")
    """)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)

    assert (process.returncode, output) == (0, "")


def test_parents_record_dies_with_it_though_a_child_lives(start: Start, tmp_path: Path) -> None:
    """A child that publishes something of its own keeps that alive, and only that."""
    process = start("""
        store.publish(Bucket.MODELS, KEY, "{}")
        if os.fork() == 0:
            store.publish(Bucket.MODELS, CHILDS, "{}")
            assert len(threads()) == 1
            print("published", flush=True)
            sys.stdin.read()
            sys.exit(0)
        time.sleep(60)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "published\n"

    process.kill()
    process.wait()

    wait_for(lambda: names(tmp_path) == [CHILDS_NAME])
    inode = (tmp_path / "v1" / "mdc" / CHILDS_NAME).stat().st_ino
    time.sleep(0.4)
    assert (tmp_path / "v1" / "mdc" / CHILDS_NAME).stat().st_ino == inode
    process.communicate(timeout=DEADLINE_SECONDS)
    wait_for(lambda: names(tmp_path) == [])


def test_child_cannot_take_its_parents_key(start: Start) -> None:
    """It has the parent's instance id in memory; the record under it stays the parent's."""
    process = start("""
        store = FileDiscovery(sys.argv[1])  # its records do not expire on a busy machine
        store.publish(Bucket.MODELS, KEY, "{}")

        def child():
            try:
                store.publish(Bucket.MODELS, KEY, '{"child":1}')
            except Exception as err:
                assert "somebody else" in str(err), err
            else:
                raise AssertionError("it was published")
            assert threads() == []

        assert child_passes(child)
    """)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)

    assert (process.returncode, output) == (0, "")


def test_forks_beside_busy_threads_do_not_lock_children_up(start: Start, tmp_path: Path) -> None:
    """A lock may be held by a thread that the child does not have. # catalogue 43."""
    process = start("""
        memory = MemoryDiscovery()
        done = threading.Event()

        def work(number):
            key = RecordKey("ns", "comp", "ep", 100 + number)
            while not done.is_set():
                for each in (store, memory):
                    with each.publish(Bucket.MODELS, key, "{}"):
                        pass

        def child():
            for each in (store, memory):
                key = RecordKey("ns", "comp", "ep", os.getpid() + 1000)
                with each.publish(Bucket.MODELS, key, "{}"):
                    assert key in each.records(Bucket.MODELS)
                each.close()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        passed = [child_passes(child) for _ in range(40)]
        done.set()
        for worker in workers:
            worker.join()
        assert all(passed), passed
    """)
    output, _ = process.communicate(timeout=60)

    assert (process.returncode, output) == (0, "")
    assert names(tmp_path) == []


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the condition holds, or fail."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)
