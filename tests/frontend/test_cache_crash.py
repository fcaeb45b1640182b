"""A process that dies, or is told of an error, at every call by which it changes the disk; and many at once.

Two ways to inject: strace tampers with the system calls themselves while a cache is used, and functions of
`os` are wrapped in a forked child that resolves a card over HTTP. After each: no torn file bears a digest's
name, no directory of a model lacks a file, the next run is right, and an hour later nothing is left over.
What a power cut does is shown by the order of the calls only (test_blob_writer.py): no disk is cut off here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Callable

import cache_kit
import helpers
import pytest
from cache_kit import DATA, HOUR, Clock, environment, names, resolve, run_python, scenario, temporaries, torn

from selfhost.card.checksum import Checksum
from selfhost.frontend.cache import BlobCache

ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE]


def check_aftermath(root: Path, again: Callable[[str, Clock], dict[str, bytes]] = scenario) -> None:
    """Check what a run left, and that the next one and the collector make it good."""
    assert torn(root) == []
    for model in root.glob("by-slug/*/[0-9a-f]*"):
        assert {name: (model / name).read_bytes() for name in names(model)} == DATA
    clock = Clock()
    clock.ahead = 2 * HOUR
    assert again(str(root), clock) == DATA
    BlobCache(root, clock=clock).collect()
    assert temporaries(root) == []
    assert torn(root) == []
    assert len(list(root.glob("by-slug/*/*/*"))) == len(DATA)


# --- wrapped functions

# Forks once for each call and each way to fail; reports what happened as lines "action call exit-code root".
INJECT = """
    import errno, fcntl, logging, os, signal, sys, types
    import cache_kit
    from selfhost.errors import CacheError

    folder, url, *actions = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    cache_kit.resolve(f"{folder}/first", url)  # loads all that is loaded when it is needed
    CHANGES = "write ftruncate fchmod fsync rename mkdir symlink unlink rmdir utime".split()
    count = 0

    def wrap(module, name, action, when):
        function = getattr(module, name)

        def call(*args, **options):
            global count
            if name == "open" and not args[1] & os.O_CREAT:
                return function(*args, **options)
            count += 1
            if count == when and action == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if count == when and action > 0:
                raise OSError(action, os.strerror(action))
            result = function(*args, **options)
            if count == when and action == -1:
                os.kill(os.getpid(), signal.SIGKILL)  # done, but nobody was told
            return result

        setattr(module, name, call)

    def child(root, action, when):
        for name in [*CHANGES, "open"]:
            wrap(os, name, action, when)
        wrap(fcntl, "flock", action, when)
        try:
            right = cache_kit.resolve(root, url) == cache_kit.DATA
        except CacheError:
            return 3
        return 4 if count < when else 0 if right else 1

    for action in map(int, actions):
        when, code = 0, 0
        while code != 4:
            when += 1
            root = f"{folder}/{action}-{when}"
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    code = child(root, action, when)
                finally:
                    os._exit(code)
            code = os.waitpid(pid, 0)[1]
            code = code >> 8 if code >> 8 else -(code & 127)
            print(action, when, code, root)
"""


def test_killed_or_refused_at_every_call(tmp_path: Path, counting_origin: helpers.RudeOrigin) -> None:
    """Wrapped functions: killed before and after each call, and four errors from each. # catalogue 19, 20"""
    counting_origin.files.update({f"/{name}": data for name, data in DATA.items()})
    done = run_python(INJECT, tmp_path, counting_origin.url, 0, -1, *ERRORS)
    lines = [line.split() for line in done.stdout.splitlines()]

    assert len(lines) > 6 * 40
    for action, when, code, root in lines:
        killed = int(action) <= 0 and int(code) == -9
        assert killed or int(code) in (0, 3, 4), (action, when, code)
        if not killed:  # it was told of the error, so it has cleaned up; unless that was what failed
            assert len(temporaries(Path(root))) <= (int(code) != 4), (action, when)
        check_aftermath(Path(root), lambda path, clock: resolve(path, counting_origin.url, clock))
        shutil.rmtree(root)


def test_error_is_typed_where_bytes_are_written(tmp_path: Path, counting_origin: helpers.RudeOrigin) -> None:
    """Most calls that fail are told as an error; those of locks, stamps and cleaning up need not be."""
    counting_origin.files.update({f"/{name}": data for name, data in DATA.items()})
    done = run_python(INJECT, tmp_path, counting_origin.url, errno.ENOSPC)
    codes = [int(line.split()[2]) for line in done.stdout.splitlines()]

    assert codes.count(3) >= 18, codes


# --- system calls

# Those by which the scenario changes the disk; `openat` counts where it creates.
CALLS = (
    "openat,write,ftruncate,fchmod,fsync,rename,renameat,renameat2,mkdir,mkdirat,symlinkat,unlinkat,utimensat,"
    "flock"
)


def trace(root: Path, *inject: str) -> subprocess.CompletedProcess[str]:
    """Run the scenario under strace."""
    script = [sys.executable, "-S", "-B", str(cache_kit.__file__), str(root)]
    command = ["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-e", "signal=none", *inject]
    log = root.with_suffix(".log")
    done = subprocess.run(
        [*command, "-o", str(log), *script], env=environment(), capture_output=True, text=True, timeout=60
    )
    done.stdout += log.read_text()
    log.unlink()
    return done


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Return each system call of the scenario that changes the disk: its name and how many were before it."""
    if shutil.which("strace") is None:
        pytest.skip("there is no `strace` here")
    root = tmp_path_factory.mktemp("traced") / "mdc"
    done = trace(root)
    if done.returncode:
        pytest.skip(f"strace does not work here: {done.stderr.strip()}")
    seen: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    for name, rest in re.findall(r"^(?:\d+ +)?(\w+)\((.*)", done.stdout, re.MULTILINE):
        seen[name] = seen.get(name, 0) + 1
        if name != "openat" or "O_CREAT" in rest:
            found.append((name, seen[name]))
    return found


def test_every_system_call_killed(changes: list[tuple[str, int]], tmp_path: Path) -> None:
    """strace: SIGKILL at each system call that changes the disk. # catalogue 19"""
    assert len(changes) > 30
    assert "utimensat" in dict(changes)
    for name, when in changes:
        root = tmp_path / f"{name}-{when}"
        done = trace(root, "-e", f"inject={name}:signal=KILL:when={when}")

        assert done.returncode in (-9, 137), (name, when, done.returncode)
        check_aftermath(root)


def test_every_system_call_refused(changes: list[tuple[str, int]], tmp_path: Path) -> None:
    """strace: an error at each of them, a different kind each time. # catalogue 20"""
    # --seccomp-bpf stops at these calls only, which is faster, but lets no signal through
    for index, (name, when) in enumerate(changes):
        code = errno.errorcode[ERRORS[index % len(ERRORS)]]
        root = tmp_path / f"{name}-{when}"
        done = trace(root, "--seccomp-bpf", "-e", f"inject={name}:error={code}:when={when}")

        assert done.returncode in (0, 3), (name, when, code, done.stderr)
        assert done.returncode == 0 or "cannot " in done.stdout
        check_aftermath(root)


# --- many at once

BLOBS = 5
CROWD = """
    import fcntl, os, sys, threading, time
    from pathlib import Path
    from cache_kit import OTHER_MODEL
    from selfhost.card.checksum import Checksum
    from selfhost.frontend.cache import BlobCache

    root, counter, locks = sys.argv[1:4]
    if locks == "grant everybody":
        fcntl.flock = lambda fd, kind: None
    data = [bytes([index]) * 50_000 for index in range(int(sys.argv[4]))]
    files = {f"file-{index}": Checksum.of(content) for index, content in enumerate(data)}
    cache = BlobCache(root)
    wrong = []

    def fetch(index):
        checksum = files[f"file-{index}"]
        with cache.lock(checksum):
            if cache.find(checksum) is not None:
                return
            with open(counter, "a") as file:
                file.write(f"{index}\\n")  # one write of one line: never mixed
            with cache.write(checksum) as writer:
                for start in range(0, 50_000, 10_000):
                    writer.write(data[index][start : start + 10_000])
                    time.sleep(0.002)  # a slow network
                writer.publish("test")

    def work(number):
        try:
            for step in range(len(data)):
                fetch((number + step) % len(data))
            folder = cache.find_model(OTHER_MODEL, files) or cache.publish_model(OTHER_MODEL, files)
            assert [Path(folder, f"file-{index}").read_bytes() for index in range(len(data))] == data
        except BaseException as err:
            wrong.append(repr(err))

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    sys.exit("; ".join(wrong) or 0)
"""


# catalogue 25, 26
@pytest.mark.parametrize("locks", ["work", "grant everybody"])
def test_eight_processes_of_eight_threads(tmp_path: Path, locks: str) -> None:
    """All get the right files; while locks work, each is fetched once."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(CROWD)]
    arguments = [str(tmp_path / "mdc"), str(tmp_path / "counter"), locks, str(BLOBS)]
    crowd = [
        subprocess.Popen([*command, *arguments], env=environment(), stderr=subprocess.PIPE) for _ in range(8)
    ]
    complaints = [child.communicate(timeout=60)[1] for child in crowd]
    fetched = (tmp_path / "counter").read_text().split()

    assert complaints == [b""] * 8
    assert set(fetched) == set(map(str, range(BLOBS)))
    assert torn(tmp_path / "mdc") == []
    assert temporaries(tmp_path / "mdc") == []
    assert len(fetched) == BLOBS if locks == "work" else len(fetched) > BLOBS
    assert len(names(tmp_path / "mdc" / "blobs")) == BLOBS


PUBLISH = """
    import sys
    from cache_kit import DATA, put
    from selfhost.frontend.cache import BlobCache

    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(100):
        put(BlobCache(sys.argv[1]), DATA["tokenizer.json"])
"""


def test_reading_while_others_publish(tmp_path: Path) -> None:
    """While three processes publish the same blob without any lock, it is whole and stays the same file."""
    cache = BlobCache(tmp_path / "mdc")
    checksum = Checksum.of(DATA["tokenizer.json"])
    command = [sys.executable, "-c", textwrap.dedent(PUBLISH), cache.root]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    inodes, wrong = set(), 0
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(subprocess.Popen(command, env=environment(), **pipes)) for _ in range(3)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdin is not None
            assert child.stdout.readline() == b"ready\n"
        for child in children:
            child.stdin.close()
        while any(child.poll() is None for child in children):
            path = cache.find(checksum)
            if path is not None:
                with open(path, "rb") as file:
                    inodes.add(os.fstat(file.fileno()).st_ino)
                    wrong += file.read() != DATA["tokenizer.json"]

    assert [child.returncode for child in children] == [0] * 3
    assert wrong == 0
    assert 1 <= len(inodes) <= 3  # those that began before the first one was published may replace it
    assert temporaries(tmp_path / "mdc") == []
