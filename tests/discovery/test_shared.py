"""One publisher per host: who holds the record, who takes it over, and that it is never gone meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from helpers import nothing_left

from selfhost.discovery import (
    Bucket,
    Discovery,
    FileDiscovery,
    MemoryDiscovery,
    RecordKey,
    SharedDiscovery,
    base,
    claims,
    shared,
    shared_instance_id,
)
from selfhost.errors import DiscoveryError

KEY, OTHER = RecordKey("ns", "comp", "ep", 0xABC), RecordKey("ns", "comp", "ep", 0xABC, "lora")
NAME = "ns%2Fcomp%2Fep%2Fabc"
PACKAGE = str(Path(base.__file__).parents[2])

Eventually = Callable[[Callable[[], object]], None]

PARTICIPANT = """
import os, sys, time, warnings
warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # to fork with threads is what is tested
from selfhost.discovery import Bucket, FileDiscovery, RecordKey, SharedDiscovery, claims, shared
shared.STAND_BY_SECONDS = 0.02
kv, share, ttl_seconds = sys.argv[1:]
discovery = SharedDiscovery(FileDiscovery(kv, ttl_seconds=float(ttl_seconds)), share)
key = RecordKey("ns", "comp", "ep", 0xABC)
publication = None

def publish(text):
    global publication
    publication = discovery.publish(Bucket.MODELS, key, text)

for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except Exception as err:
        print("error:", err, flush=True)
"""


class Participant:
    """A process that evaluates what it is told, with `publish`, `publication` and `discovery` at hand."""

    def __init__(self, folder: Path, ttl_seconds: float) -> None:
        command = [sys.executable, "-W", "error", "-c", PARTICIPANT, str(folder), f"{folder}/share"]
        self.process = subprocess.Popen(
            [*command, str(ttl_seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE},
        )  # fmt: skip

    def tell(self, code: str) -> None:
        """Have it evaluate something."""
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Return the result of what it was told."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def do(self, code: str) -> str:
        """Have it evaluate something; return the result."""
        self.tell(code)
        return self.answer()

    def publish(self, text: str = "{}") -> bool:
        """Have it publish; tell whether it is the one that holds the record."""
        assert self.do(f"publish({text!r})") == "None"
        return self.is_leading()

    def is_leading(self) -> bool:
        """Tell whether it holds a record."""
        return "leading=1" in self.do("discovery")

    def end(self, how: Optional[signal.Signals] = None) -> None:
        """Kill it, or let it exit in order."""
        if how is not None:
            self.process.send_signal(how)
        self.process.communicate(timeout=20)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Participant]]:
    """Start processes that share a folder and a store; they are killed with the test."""
    started: list[Participant] = []

    def run(ttl_seconds: float = 10.0) -> Participant:
        started.append(Participant(tmp_path, ttl_seconds))
        return started[-1]

    yield run
    for each in started:
        each.end(signal.SIGKILL)


class Sight:
    """What a frontend that looks all the time sees of the record: its texts in turn, None for none."""

    def __init__(self, path: Path) -> None:
        self.texts: list[Optional[str]] = []
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._note()
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.0002):
            self._note()

    def _note(self) -> None:
        try:
            text: Optional[str] = self._path.read_text()
        except FileNotFoundError:
            text = None
        if self.texts[-1:] != [text]:
            self.texts.append(text)

    def __enter__(self) -> Sight:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Name the file of the record."""
    return tmp_path / "v1" / "mdc" / NAME


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SharedDiscovery]]:
    """Make participants in this process, which look often; they are closed with the test."""
    monkeypatch.setattr(shared, "STAND_BY_SECONDS", 0.02)
    made: list[SharedDiscovery] = []

    def make(inner: Optional[Discovery] = None) -> SharedDiscovery:
        made.append(SharedDiscovery(inner or FileDiscovery(tmp_path), tmp_path / "share"))
        return made[-1]

    with nothing_left():
        yield make
        for each in made:
            each.close()


# --- who holds the record


def test_one_process_holds_the_record(start: Callable[..., Participant], record: Path) -> None:
    """Of four that publish it; the others see it as their own."""
    participants = [start() for _ in range(4)]

    leading = [each.publish() for each in participants]

    assert leading == [True, False, False, False]
    assert [path.name for path in record.parent.iterdir()] == [NAME]
    assert all(each.do("list(discovery.records(Bucket.MODELS)) == [key]") == "True" for each in participants)


def test_processes_lead_record_by_record(start: Callable[..., Participant], tmp_path: Path) -> None:
    """Who has a LoRA of its own publishes that, whoever holds the base model's record."""
    first, second = start(), start()
    first.publish()
    second.publish()

    second.do('discovery.publish(Bucket.MODELS, RecordKey("ns", "comp", "ep", 0xABC, "lora"), "{}")')

    assert list(FileDiscovery(tmp_path).records(Bucket.MODELS)) == [KEY, OTHER]


def test_holder_of_another_discovery_in_the_process_stays_the_holder(
    share: Callable[..., SharedDiscovery], start: Callable[..., Participant]
) -> None:
    """A process loses its locks on a file when it closes it anywhere, so it must not."""
    one, other = share(), share()
    one.publish(Bucket.MODELS, KEY, "{}")
    other.publish(Bucket.MODELS, OTHER, "{}").withdraw()
    other.close()

    assert not start().publish()


# --- the hand-over


def test_withdrawn_record_stays_for_those_who_stand_by(
    start: Callable[..., Participant], record: Path, eventually: Eventually
) -> None:
    """Its holder hands it over; the very file stays and is kept alive, and only the last one removes it."""
    first, second = start(), start()
    first.publish()
    second.publish()
    inode = record.stat().st_ino

    with Sight(record) as sight:
        first.do("publication.withdraw()")
        eventually(second.is_leading)

    assert sight.texts == ["{}"]
    assert record.stat().st_ino == inode
    second.do("publication.withdraw()")
    assert not record.exists()


@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGKILL])
def test_record_outlives_its_holder(
    start: Callable[..., Participant], record: Path, eventually: Eventually, how: Optional[signal.Signals]
) -> None:
    """However the process ends, another has the record before anybody misses it."""  # catalogue 142
    first, second = start(), start()
    first.publish()
    second.publish()

    with Sight(record) as sight:
        first.end(how)
        eventually(second.is_leading)

    assert sight.texts == ["{}"]


def test_successor_publishes_its_own_text(
    start: Callable[..., Participant], record: Path, eventually: Eventually
) -> None:
    """As new workers do that were started with another model: one text follows on the other."""
    first, second = start(), start()
    first.publish('{"a":1}')
    second.publish('{"a":2}')

    with Sight(record) as sight:
        first.end(signal.SIGKILL)
        eventually(lambda: len(sight.texts) == 2)
        second.do("""publication.replace('{"a":3}')""")
        eventually(lambda: len(sight.texts) == 3)

    assert sight.texts == ['{"a":1}', '{"a":2}', '{"a":3}']


def test_replacing_while_standing_by_counts_after_the_take_over(
    start: Callable[..., Participant], record: Path, eventually: Eventually
) -> None:
    """Until then the record is the holder's."""
    first, second = start(), start()
    first.publish('{"a":1}')
    second.publish('{"a":2}')

    second.do("""publication.replace('{"a":3}')""")

    assert record.read_text() == '{"a":1}'
    first.do("publication.withdraw()")
    eventually(lambda: record.read_text() == '{"a":3}')


def test_of_many_that_go_at_once_the_last_removes_the_record(
    start: Callable[..., Participant], record: Path
) -> None:
    """None may go in the belief that another one takes over."""
    participants = [start() for _ in range(4)]
    for _ in range(10):
        for each in participants:
            each.publish()
        for each in participants:
            each.tell("publication.withdraw()")

        assert [each.answer() for each in participants] == ["None"] * 4
        assert not record.exists()


def test_dead_holders_record_is_removed_by_a_successor(
    start: Callable[..., Participant], record: Path
) -> None:
    """Even if it goes before it has taken over."""
    first, second = start(), start()
    first.publish()
    second.do('setattr(shared, "STAND_BY_SECONDS", 3600)')
    second.publish()
    first.end(signal.SIGKILL)

    second.end()

    assert not record.exists()


def test_next_run_takes_over_what_a_killed_one_left(start: Callable[..., Participant], record: Path) -> None:
    """At once, where a store alone would refuse the key until the record has expired."""
    first = start()
    first.publish('{"a":1}')
    first.end(signal.SIGKILL)

    assert start().publish('{"a":2}')
    assert record.read_text() == '{"a":2}'


def test_stopped_holder_stays_the_holder(
    start: Callable[..., Participant], tmp_path: Path, eventually: Eventually
) -> None:
    """Its record expires as it would without the others, who are not held up, and comes back with it."""
    first, second = start(0.3), start(0.3)
    first.publish()
    store = FileDiscovery(tmp_path, ttl_seconds=0.3)

    first.process.send_signal(signal.SIGSTOP)
    assert not second.publish()
    eventually(lambda: store.records(Bucket.MODELS) == {})
    first.process.send_signal(signal.SIGCONT)

    eventually(lambda: store.records(Bucket.MODELS) == {KEY: "{}"})
    assert first.is_leading()


def test_failed_take_over_is_tried_again(
    share: Callable[..., SharedDiscovery],
    start: Callable[..., Participant],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With one warning, until it works."""

    class Failing(MemoryDiscovery):
        failures = 3

        def publish(self, bucket: Bucket, key: RecordKey, text: str, **options: Any) -> base.Publication:
            self.failures -= 1
            if self.failures >= 0:
                raise DiscoveryError("told to fail", backend="mem")
            return super().publish(bucket, key, text, **options)

    first = start()
    first.publish()
    discovery = share(Failing())
    discovery.publish(Bucket.MODELS, KEY, "{}")

    first.end(signal.SIGKILL)

    eventually(lambda: discovery.records(Bucket.MODELS))
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
        "cannot take over the record mdc/ns/comp/ep/abc (tried again): told to fail"
    ]


# --- forks


def test_forked_child_does_not_keep_its_dead_parent_in_office(
    start: Callable[..., Participant], eventually: Eventually
) -> None:
    """As it would with locks that children inherit."""
    first, second = start(), start()
    first.publish()
    second.publish()
    child = int(first.do("os.fork() or [time.sleep(60), os._exit(0)]"))

    try:
        first.process.kill()
        eventually(second.is_leading)
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_forked_child_leaves_its_parents_record_alone(
    start: Callable[..., Participant], record: Path
) -> None:
    """It withdraws and replaces nothing; what it publishes itself under that key stands by."""
    first, second = start(), start()
    first.publish()
    child = (
        "publication.withdraw(), publish('{\"a\":2}'), stands_by := 'leading=0' in repr(discovery), "
        "publication.withdraw(), discovery.close(), os._exit(7 * stands_by)"
    )

    status = first.do(f"os.waitstatus_to_exitcode(os.waitpid(os.fork() or [{child}], 0)[1])")

    assert status == "7"
    assert record.read_text() == "{}"
    assert first.is_leading()
    assert not second.publish()


# --- what goes wrong


def test_folder_of_others_is_refused(share: Callable[..., SharedDiscovery], tmp_path: Path) -> None:
    """Whoever can lock its file can keep a record from being published."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share").chmod(0o755)

    with pytest.raises(
        DiscoveryError, match=r"user \d+ alone \(mode 700\), found one of user \d+ \(mode 755\)"
    ):
        share().publish(Bucket.MODELS, KEY, "{}")


def test_made_folders_are_private(share: Callable[..., SharedDiscovery], tmp_path: Path) -> None:
    """Whatever the umask; nothing in it tells a model's name."""
    share().publish(Bucket.MODELS, KEY, "{}")

    assert (tmp_path / "share").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["claims"]
    assert (tmp_path / "share" / "claims").read_bytes() == b""


def test_nothing_is_opened_before_something_is_published(tmp_path: Path) -> None:
    """Reading needs no folder."""
    with SharedDiscovery(FileDiscovery(tmp_path / "kv"), tmp_path / "share") as discovery:
        assert discovery.records(Bucket.MODELS) == {}

    assert list(tmp_path.iterdir()) == []


def test_process_that_stops_in_its_turn_delays_others_in_bounds(
    share: Callable[..., SharedDiscovery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing fails then, with nothing left behind; it works again when the other one is done."""
    monkeypatch.setattr(claims, "TURN_SECONDS", 0.05)
    discovery = share()
    discovery.publish(Bucket.MODELS, OTHER, "{}")
    with subprocess.Popen(
        [sys.executable, "-c", IN_TURN, str(tmp_path / "share" / "claims")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PACKAGE},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DiscoveryError, match=r"cannot publish 'ns/comp/ep/abc': .*waited 0.05 s"):
            discovery.publish(Bucket.MODELS, KEY, "{}")
        other.communicate(timeout=20)

    discovery.publish(Bucket.MODELS, KEY, "{}")
    assert list(discovery.records(Bucket.MODELS)) == [KEY, OTHER]


IN_TURN = """
import fcntl, sys
from selfhost.discovery import claims
with open(sys.argv[1], "r+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, claims._place_of("mdc/ns/comp/ep/abc"))
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_missing_thread_is_an_error(
    share: Callable[..., SharedDiscovery], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody would stand by; nothing is published then."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    discovery = share(MemoryDiscovery())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DiscoveryError, match="can't start new thread"):
            discovery.publish(Bucket.MODELS, KEY, "{}")

    assert discovery.records(Bucket.MODELS) == {}
    discovery.publish(Bucket.MODELS, KEY, "{}")


def test_refused_publication_leaves_no_claim(share: Callable[..., SharedDiscovery], tmp_path: Path) -> None:
    """Neither the key nor the thread nor the descriptor; the next one may have it."""
    (tmp_path / "v1").write_text("no directory")
    discovery = share()
    with pytest.raises(DiscoveryError, match="cannot publish"):
        discovery.publish(Bucket.MODELS, KEY, "{}")
    (tmp_path / "v1").unlink()

    discovery.publish(Bucket.MODELS, KEY, "{}")

    assert list(discovery.records(Bucket.MODELS)) == [KEY]
    assert repr(discovery) == f"<SharedDiscovery {str(tmp_path / 'share')!r} published=1 leading=1>"


# --- one instance


def test_processes_of_a_folder_are_one_instance(tmp_path: Path) -> None:
    """Whoever asks first, and however many at once."""
    code = "import sys; from selfhost.discovery import shared_instance_id as i; print(i(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "share")]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PACKAGE}
        )
        for _ in range(6)
    ]
    ids = {int(process.communicate(timeout=20)[0]) for process in processes}

    assert ids == {shared_instance_id(tmp_path / "share")}
    assert 0 < ids.pop() < 2**63
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["instance"]
    assert shared_instance_id(tmp_path / "other") != shared_instance_id(tmp_path / "share")


def test_instance_of_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """What lies there under that name, or may be changed by others, is not believed."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "junk").mkdir(mode=0o700)
    (tmp_path / "junk" / "instance").write_text("junk")

    for folder in ("open", "junk"):
        with pytest.raises(DiscoveryError, match="cannot share an instance id in .*" + folder):
            shared_instance_id(tmp_path / folder)
