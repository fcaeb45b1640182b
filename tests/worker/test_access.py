"""Who is let in by a bearer token, where the token comes from, and that nobody ever reads it anywhere."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from selfhost.errors import SettingsError
from selfhost.settings import ServerLimits
from selfhost.worker.access import CHECK_SECONDS, INVALID_TOKEN, UNAUTHORIZED, Access
from selfhost.worker.answer import render_fields
from selfhost.worker.app import MetadataApp
from selfhost.worker.content import pin_bytes
from selfhost.worker.event_loop import EventLoop
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.site import Site

TOKEN = "rosebud-0123456789+/._~=="
OTHER = "rosebud-0123456789+/._~="
PATH = "/v1/metadata/m/_base/f.json"


class Clock:
    """A clock that stands still until it is told to go on."""

    now = 100.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock in the test's hands."""
    return Clock()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Return a file with a token, as `echo` and editors write it."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


# ------------------------------------------------------------------ who is let in


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),  # RFC 9110 section 11.1: schemes are case-insensitive
        (f"BEARER  {TOKEN} ", True),
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        (TOKEN, False),
        (f"Basic {TOKEN}", False),
        (f"Bearer{TOKEN}", False),
        (f"Bearer {OTHER}", False),
        (f"Bearer {TOKEN}=", False),
        (f"Bearer {TOKEN.upper()}", False),
        (f"Bearer {TOKEN}, Bearer {TOKEN}", False),  # two fields, as servers join them
        (f"Bearer {TOKEN} x", False),
        (f'Bearer "{TOKEN}"', False),
        (f"Bearer token={TOKEN}", False),
        ("Bearer \xff\xfe", False),
        ("Bearer \u6a21\ud800\0", False),  # no server lets this through
        ("Bearer " + "x" * 100_000, False),
    ],
)
def test_only_the_token_lets_in(authorization: Optional[str], allowed: bool) -> None:
    """The scheme in any case, then exactly the token; nothing that comes raises."""
    assert Access(TOKEN).allows(authorization) is allowed


@pytest.mark.parametrize(
    ("authorization", "answer"),
    [
        (None, UNAUTHORIZED),
        ("", UNAUTHORIZED),
        ("Basic YTpi", UNAUTHORIZED),
        ("Bearer ", UNAUTHORIZED),
        (f"Bearer {OTHER}", INVALID_TOKEN),
    ],
)
def test_refusal_says_invalid_only_of_what_was_given(authorization: Optional[str], answer: Any) -> None:
    """A challenge without a reason asks for a token; with one it says that this is wrong (RFC 6750 3.1)."""
    fields = dict(answer.fields)

    assert Access(TOKEN).refusal(PATH, authorization) is answer
    assert answer.status == 401
    assert fields["WWW-Authenticate"].startswith('Bearer realm="selfhost"')
    assert ("invalid_token" in fields["WWW-Authenticate"]) is (answer is INVALID_TOKEN)


@pytest.mark.parametrize(
    ("path", "guarded"),
    [
        ("/v1/metadata", True),
        ("/v1/metadata/", True),
        (PATH, True),
        ("/v1/metadata/never/_heard/of", True),
        ("/v1/metadata/../../health", True),
        ("/v1\0metadata\0m", True),  # encoded slashes, as split_target writes them
        ("/v1/metadatas", False),
        ("/V1/metadata/m", False),
        ("//v1/metadata/m", False),
        ("/health", False),
        ("/live", False),
        ("/", False),
        ("", False),
    ],
)
def test_metadata_alone_is_guarded(path: str, guarded: bool) -> None:
    """All of the route and nothing else, whether registered or not."""
    access = Access(TOKEN)

    assert (access.refusal(path, "") is not None) is guarded
    assert access.refusal(path, f"Bearer {TOKEN}") is None


# ------------------------------------------------------------------ tokens that cannot be used


@pytest.mark.parametrize(
    "token",
    ["", "short", "x" * 15, "two words are not enough", "with\ttab-0123456789", "line\nbreak-0123456789",
     "nul\0-0123456789abc", "kein-umlaut-ä-0123456789", "sur\ud800rogate-0123456789",
     "comma,0123456789abcdef", "=0123456789abcdef", "0123456789=abcdef", "x" * 1025],
)  # fmt: skip
def test_unusable_token_is_refused(token: str, tmp_path: Path) -> None:
    """A token that no request can carry, or that is soon guessed, is an error that does not repeat it."""
    (tmp_path / "token").write_bytes(token.encode("utf-8", "surrogatepass"))
    for given in ({"token": token}, {"token_file": tmp_path / "token"}):
        with pytest.raises(SettingsError, match=r"DYN_SYSTEM_TOKEN.*expected 16 to 1024") as caught:
            Access(**given)

        shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb)[-1:])
        assert token == "" or token not in shown
        assert caught.value.value is None


@pytest.mark.parametrize("token", ["x" * 16, "x" * 1024, "a-b.c_d~e+f/0123==", "0123456789abcdef"])
def test_usable_token_is_taken(token: str) -> None:
    """Everything that RFC 6750 calls a token and that is long enough."""
    assert Access(token).allows(f"Bearer {token}")


def test_either_token_or_file(token_file: Path) -> None:
    """Both or neither is an error; where settings name neither, there is no access to make."""
    for given in ((None, None), (TOKEN, token_file)):
        with pytest.raises(SettingsError, match=r"either a bearer token .* set"):
            Access(*given)

    assert Access.of(None, None) is None
    assert Access.of(None, token_file).allows(f"Bearer {TOKEN}")
    assert Access.of(TOKEN, None).allows(f"Bearer {TOKEN}")


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """Missing, a folder, a FIFO that nobody writes to: each is said at once, with its name."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("missing", "No such file"),
        ("folder", "directory"),
        ("fifo", "no regular file"),
        ("nu\0l", "null byte"),
    ):
        with pytest.raises(SettingsError, match=f"{name[:2]}.*DYN_SYSTEM_TOKEN_FILE.*{reason}"):
            Access(token_file=tmp_path / name)


def test_only_a_small_regular_file_is_read(token_file: Path) -> None:
    """An endless device is not begun, and no token is cut out of a large file."""
    token_file.write_text(" " * 4080 + TOKEN)
    with pytest.raises(SettingsError, match="more than 4096 bytes"):
        Access(token_file=token_file)
    with pytest.raises(SettingsError, match="regular file"):
        Access(token_file="/dev/zero")


# ------------------------------------------------------------------ a token that changes


def test_changed_file_is_in_force_within_a_second(token_file: Path, clock: Clock) -> None:
    """The new token lets in, the old one no longer does, and the version tells of it; not before a look."""
    access = Access(token_file=token_file, clock=clock)
    before = access.version
    token_file.write_text(OTHER)

    assert access.allows(f"Bearer {TOKEN}")
    assert access.version == before
    clock.now += CHECK_SECONDS
    assert access.version != before
    assert access.allows(f"Bearer {OTHER}")
    assert not access.allows(f"Bearer {TOKEN}")
    assert access.token == OTHER


def test_replaced_link_is_followed(tmp_path: Path, clock: Clock) -> None:
    """A secret that is mounted as a link to a link changes when the inner one is swapped."""
    for name, token in (("old", TOKEN), ("new", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(token)
    (tmp_path / "data").symlink_to("old")
    (tmp_path / "token").symlink_to("data/token")
    access = Access(token_file=tmp_path / "token", clock=clock)
    (tmp_path / "next").symlink_to("new")
    os.replace(tmp_path / "next", tmp_path / "data")
    clock.now += CHECK_SECONDS

    assert access.allows(f"Bearer {OTHER}")


def test_rewritten_file_keeps_the_version(token_file: Path, clock: Clock) -> None:
    """The same token written anew is no change."""
    access = Access(token_file=token_file, clock=clock)
    before = access.version
    token_file.write_text(f"  {TOKEN}\r\n")
    clock.now += CHECK_SECONDS

    assert access.version == before


@pytest.mark.parametrize("content", [None, "", "\n", "short", "two words are not enough"])
def test_last_good_token_stays(
    token_file: Path, clock: Clock, caplog: pytest.LogCaptureFixture, content: Optional[str]
) -> None:
    """A file that vanishes, empties or spoils is warned of once a spell, and opens nothing."""
    access = Access(token_file=token_file, clock=clock)
    for _ in range(2):
        token_file.unlink()
        if content is not None:
            token_file.write_text(content)
        for _ in range(3):
            clock.now += CHECK_SECONDS
            assert access.allows(f"Bearer {TOKEN}")
            assert not access.allows(f"Bearer {content}")
        token_file.write_text(TOKEN)
        clock.now += CHECK_SECONDS
        assert access.version == 0

    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("the last good token stays in force" in record.message for record in warnings)


def test_file_is_read_once_a_second_at_most(
    token_file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests come, and not at all while none does."""
    access = Access(token_file=token_file, clock=clock)
    opened: list[str] = []
    monkeypatch.setattr(
        "builtins.open", lambda path, *_, **__: opened.append(path) or (_ for _ in ()).throw(OSError)
    )
    for _ in range(100):
        clock.now += CHECK_SECONDS / 10
        for _ in range(5):
            access.allows(None)
            assert access.version == 0

    assert 9 <= len(opened) <= 11


def test_relative_file_is_found_after_chdir(
    token_file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The host may change its working directory."""
    monkeypatch.chdir(token_file.parent)
    access = Access(token_file="token", clock=clock)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    token_file.write_text(OTHER)
    clock.now += CHECK_SECONDS

    assert access.allows(f"Bearer {OTHER}")


def test_renewing_leaves_nothing(token_file: Path, clock: Clock, leaves_nothing: None) -> None:
    """No descriptor stays, of good files or bad ones."""
    access = Access(token_file=token_file, clock=clock)
    for number in range(20):
        clock.now += CHECK_SECONDS
        token_file.write_text(TOKEN if number % 2 else "")
        assert access.version == 0


# ------------------------------------------------------------------ where the token is not


def test_token_is_nowhere_to_be_read(
    registry: MetadataArtifactRegistry, token_file: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in a repr nor in a log nor in an answer."""
    caplog.set_level(logging.DEBUG)
    access = Access(token_file=token_file, clock=clock)
    site = Site(registry, access=access, index=True)
    registry.register("m", "_base", "f.json", pin_bytes(b"{}"))
    headers = {"authorization": f"Bearer {TOKEN}"}
    answers = [
        site.answer("GET", target, headers) for target in (PATH, "/v1/metadata", f"/{TOKEN}", "/health")
    ]
    answers += [site.answer("GET", PATH, {"authorization": f"Bearer {TOKEN}x"})]
    token_file.write_text(OTHER)
    clock.now += CHECK_SECONDS
    assert access.version == 1
    seen = [repr(thing) for thing in (access, Access(TOKEN), site, MetadataApp(registry, token=TOKEN))]
    seen += [caplog.text, *(repr((render_fields(a.fields), a.body)) for a in answers)]

    assert "has changed" in caplog.text
    assert not [text for text in seen if "rosebud" in text]


def test_token_in_the_query_is_none(registry: MetadataArtifactRegistry) -> None:
    """RFC 6750 section 2.3 is not done here: addresses end up in logs."""
    site = Site(registry, access=Access(TOKEN))

    assert site.answer("GET", f"{PATH}?access_token={TOKEN}", {}) is UNAUTHORIZED


def test_access_can_be_handed_to_another_process(token_file: Path) -> None:
    """A copy knows the token and its file; it goes over a pipe, never into a command line."""
    for access in (Access(TOKEN), Access(token_file=token_file)):
        copy = pickle.loads(pickle.dumps(access))
        assert copy.allows(f"Bearer {TOKEN}")
        assert not copy.allows(f"Bearer {OTHER}")
        assert repr(copy) == repr(access)


def test_many_threads_see_one_change(token_file: Path, clock: Clock) -> None:
    """While the token changes every thread finds the old or the new one, and none fails."""
    access = Access(token_file=token_file, clock=clock)
    found: set[object] = set()

    def ask() -> None:
        try:
            for _ in range(300):
                access.allows(f"Bearer {TOKEN}")
                found.add(access.token)
                clock.now += CHECK_SECONDS
        except BaseException as error:
            found.add(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(50):
        spare = token_file.with_name(f"token.{number}")
        spare.write_text((TOKEN, OTHER)[number % 2])
        os.replace(spare, token_file)
    for thread in threads:
        thread.join()

    assert found <= {TOKEN, OTHER}
    clock.now += CHECK_SECONDS
    assert access.allows(f"Bearer {OTHER}")


# ------------------------------------------------------------------ under the embedded server


@pytest.fixture
def serve(registry: MetadataArtifactRegistry, leaves_nothing: None) -> Iterator[Callable[[Access], Any]]:
    """Return a function that starts a server of one small file with that access, and returns its address."""
    registration = registry.register("m", "_base", "f.json", pin_bytes(b"{}"))
    loops: list[EventLoop] = []

    def start(access: Access) -> Any:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        loops.append(EventLoop(Site(registry, access=access), listener, ServerLimits()))
        loops[-1].start()
        return loops[-1].bound

    yield start
    for loop in loops:
        loop.stop(0.1)
    registration.close()


def statuses(address: Any, exchange: Any, authorization: str, times: int) -> list[int]:
    """Send the very same head again and again, each on a connection of its own; return what came."""
    head = f"GET {PATH} HTTP/1.1\r\nHost: x\r\n{authorization}Connection: close\r\n\r\n".encode()
    return [exchange(address, head, ["GET"])[0].status for _ in range(times)]


@pytest.mark.parametrize("authorization", ["", f"Authorization: Bearer {OTHER}\r\n"])
def test_refused_head_is_not_remembered(serve: Any, exchange: Any, authorization: str) -> None:
    """What was refused once is refused again: the server's short cut for known heads lets nobody in."""
    assert statuses(serve(Access(TOKEN)), exchange, authorization, 4) == [401] * 4


def test_known_head_is_forgotten_with_its_token(
    serve: Any, exchange: Any, token_file: Path, clock: Clock
) -> None:
    """A head that was let in, and is known since, is refused once its token has changed."""
    address = serve(Access(token_file=token_file, clock=clock))
    old = f"Authorization: Bearer {TOKEN}\r\n"
    assert statuses(address, exchange, old, 3) == [200] * 3
    token_file.write_text(OTHER)
    clock.now += CHECK_SECONDS

    assert statuses(address, exchange, old, 3) == [401] * 3
    assert statuses(address, exchange, f"Authorization: Bearer {OTHER}\r\n", 3) == [200] * 3
    assert statuses(address, exchange, old, 1) == [401]
