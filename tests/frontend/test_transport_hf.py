"""Files of Hugging Face repos: out of the local cache by its layout, or by the optional package."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Optional
from urllib.parse import quote

import pytest
from helpers import MemorySink

from selfhost.card import url as urls
from selfhost.errors import FetchError, HTTPStatusError, SizeLimitExceeded
from selfhost.frontend.transport import FetchLimits
from selfhost.frontend.transport_hf import HfTransport, HubFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
NEW = "c" * 40  # what every branch stands for at the hub
pytestmark = pytest.mark.usefixtures("leaves_nothing")


def fetch(transport: HfTransport, url: str, *, max_bytes: int = 1 << 30) -> bytes:
    """Fetch into a sink that holds bytes already; return what is in it afterwards."""
    sink = MemorySink()
    sink.write(b"half of something else")
    transport.fetch(url, sink, max_bytes=max_bytes)
    return bytes(sink.data)


def refused(transport: HfTransport, url: str, match: str, **options: Any) -> FetchError:
    """Fail to fetch, with a message that matches; return the error. What the sink held stays in it."""
    sink = MemorySink()
    sink.write(b"of another source")
    with pytest.raises(FetchError, match=match) as caught:
        transport.fetch(url, sink, **{"max_bytes": 1 << 30, **options})
    assert (bytes(sink.data), sink.restarts) == (b"of another source", 0)
    assert caught.value.url == url
    return caught.value


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Return the folder of a cache in which there is nothing."""
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def put(hub: Path) -> Callable[..., Path]:
    """Return a function that puts a file into the cache as the Hugging Face libraries do; its folder."""

    def put_file(
        name: str,
        data: bytes,
        *,
        repo: str = "org/name",
        revision: Optional[str] = "main",
        commit: str = COMMIT,
        link: str = "relative",
    ) -> Path:
        folder = hub / ("models--" + repo.replace("/", "--"))
        blob = folder / "blobs" / f"etag-of-{quote(name, safe='')}-{commit[:4]}"
        path = folder / "snapshots" / commit / name
        for file in (blob, path):
            file.parent.mkdir(parents=True, exist_ok=True)
        if link == "none":  # where a file system has no links
            path.write_bytes(data)
        else:
            blob.write_bytes(data)
            path.unlink(missing_ok=True)
            path.symlink_to(blob if link == "absolute" else os.path.relpath(blob, path.parent))
        if revision is not None:
            ref = folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
        return folder

    return put_file


@pytest.fixture
def local(hub: Path) -> HfTransport:
    """Return a transport that has the local cache alone."""
    return HfTransport(hub, network=False)


# ------------------------------------------------------------------ URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://gpt2/config.json", ("gpt2", "main", "config.json")),
        ("hf://Org/Name/config.json", ("Org/Name", "main", "config.json")),
        ("hf://org/name/sub/folder/f.json", ("org/name", "main", "sub/folder/f.json")),
        ("hf://gpt2@v1.0/config.json", ("gpt2", "v1.0", "config.json")),
        ("hf://gpt2@v1.0/sub/config.json", ("gpt2", "v1.0", "sub/config.json")),
        ("hf://org/name@refs%2Fpr%2F1/f", ("org/name", "refs/pr/1", "f")),
        (f"hf://org/name@{COMMIT}/f", ("org/name", COMMIT, "f")),
        ("hf://org/name/we%20ird%25@%23.json", ("org/name", "main", "we ird%@#.json")),
        ("hf://org/name/%E6%A8%A1.json", ("org/name", "main", "模.json")),
        ("HF://org/name/模 1.json", ("org/name", "main", "模 1.json")),
        ("hf://O_r.g-1/n_a.m-e/f", ("O_r.g-1/n_a.m-e", "main", "f")),
    ],
)
def test_url(url: str, expected: tuple[str, str, str]) -> None:
    """Repo, revision and file are told apart, in the form in which a card holds the URL, too."""
    assert HubFile.parse(url) == expected
    assert HubFile.parse(str(urls.normalize(url))) == expected


@pytest.mark.parametrize(
    "url",
    [
        "hf://",
        "hf:///",
        "hf://name",
        "hf://name/",
        "hf://org/name/",
        "hf://org/name/f/",
        "hf://org//f",
        "hf:///org/name/f",
        "hf:org/name/f",
        "hf://name@/f",
        "hf://org@main@x/f",
        "hf://na:me@main/f",
        "hf://name:80/f",
        "hf://[::1]/name/f",
        "hf://org/name/f?download=true",
        "hf://org/name/f#l1",
        "http://org/name/f",
        "/org/name/f",
        "org/name/f",
        # not what the hub calls a repo; what is in one folder would be two repos'
        "hf://a--b/c/f",
        "hf://a/b--c/f",
        "hf://.org/name/f",
        "hf://org/name./f",
        "hf://-org/name/f",
        "hf://o..g/name/f",
        f"hf://{'a' * 97}/name/f",
        "hf://o%72g/name/f",
        "hf://模/name/f",
        # traversal
        "hf://../name/f",
        "hf://%2e%2e%2fx/name/f",
        "hf://org/name/..%2f..%2fetc%2fpasswd",
        "hf://org/name/%2e%2e%2fpasswd",
        "hf://org/name/%2Fetc%2Fpasswd",
        "hf://org/name/a%2F%2Fb",
        "hf://org/name/a%2F.%2Fb",
        "hf://org/name/a%5Cb",
        "hf://org/name/a%00b",
        "hf://org/name/a%0Ab",
        "hf://org/name/%FF",
        "hf://org/name/\ud800",
        f"hf://org/name/{'x' * 256}",
        "hf://org/name@..%2f..%2fx/f",
        "hf://org/name@%2e%2e/f",
        "hf://org/name@.%2F/f",
        "hf://org/name@%2Fetc/f",
        "hf://org/name@a%00/f",
        "hf://org/name@%FF/f",
    ],
)
def test_url_refused(local: HfTransport, url: str) -> None:
    """What is no file of a repo, or would leave its folder, is refused (catalogue 8)."""
    refused(local, url, r"expected hf://repo\[@revision\]/file")


# ------------------------------------------------------------------ the local cache


@pytest.mark.parametrize("link", ["relative", "absolute", "none"])
def test_cached(put: Callable[..., Path], local: HfTransport, link: str) -> None:
    """A cached file is read over its link into blobs/, or as it stands where there are no links."""
    put("config.json", b"config", link=link)
    put("sub/tokenizer model.json", b"tokenizer", link=link)
    put("config.json", b"gpt2", repo="gpt2", link=link)

    assert fetch(local, "hf://org/name/config.json") == b"config"
    assert fetch(local, "hf://org/name@main/sub/tokenizer%20model.json") == b"tokenizer"
    assert fetch(local, "hf://gpt2/config.json") == b"gpt2"


def test_cached_revisions(put: Callable[..., Path], local: HfTransport) -> None:
    """Branch, tag, pull request and commit each select their snapshot."""
    put("f", b"new")
    put("f", b"old", revision="v1.0", commit=OTHER)
    put("f", b"old", revision="refs/pr/1", commit=OTHER)

    assert fetch(local, "hf://org/name/f") == b"new"
    assert fetch(local, "hf://org/name@v1.0/f") == b"old"
    assert fetch(local, "hf://org/name@refs%2Fpr%2F1/f") == b"old"
    assert fetch(local, f"hf://org/name@{OTHER}/f") == b"old"
    assert fetch(local, f"hf://org/name@{COMMIT}/f") == b"new"


def test_commit_needs_no_ref(put: Callable[..., Path], local: HfTransport) -> None:
    """A commit is its own revision."""
    put("f", b"f", revision=None)

    assert fetch(local, f"hf://org/name@{COMMIT}/f") == b"f"
    refused(local, "hf://org/name/f", "not in the local cache")


@pytest.mark.parametrize(
    "ref",
    [b"", b"main", COMMIT[:39].encode(), b"../../x", COMMIT.upper().encode(), b"\xff" * 40, bytes(1 << 20)],
)
def test_ref_that_is_no_commit(put: Callable[..., Path], local: HfTransport, ref: bytes) -> None:
    """A torn or wrong ref is a miss."""
    folder = put("f", b"f")
    (folder / "refs" / "main").write_bytes(ref)

    refused(local, "hf://org/name/f", "not in the local cache")


def test_ref_with_newline(put: Callable[..., Path], local: HfTransport) -> None:
    """A ref may end in a newline, as a human's editor leaves it."""
    folder = put("f", b"f")
    (folder / "refs" / "main").write_text(COMMIT + "\n")

    assert fetch(local, "hf://org/name/f") == b"f"


def test_ref_that_blocks(put: Callable[..., Path], local: HfTransport) -> None:
    """A FIFO in the place of a ref does not block."""
    folder = put("f", b"f")
    (folder / "refs" / "main").unlink()
    os.mkfifo(folder / "refs" / "main")

    refused(local, "hf://org/name/f", "not in the local cache")


def test_not_cached(put: Callable[..., Path], local: HfTransport, hub: Path) -> None:
    """What is not there is an error that names the cache and says why nothing else was tried."""
    folder = put("f", b"f")
    (folder / "snapshots" / COMMIT / "broken").symlink_to("../../blobs/gone")

    for url in ("hf://org/name/g", "hf://org/name/f/g", "hf://org/name/broken", "hf://other/f"):
        error = refused(local, url, f"not in the local cache '{hub}', and the hub must not be asked")
        assert not error.is_transient


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret", "../../../models--x--y/blobs/b"])
def test_link_out_of_the_repo(put: Callable[..., Path], local: HfTransport, hub: Path, target: str) -> None:
    """A link that leaves the repo's folder is refused (catalogue 8)."""
    folder = put("f", b"f")
    (hub / "secret").write_bytes(b"secret")
    put("b", b"b", repo="x/y")
    (hub / "models--x--y" / "blobs" / "b").write_bytes(b"b")
    (folder / "snapshots" / COMMIT / "evil").symlink_to(target)

    refused(local, "hf://org/name/evil", "expected a file in .*, found a link to")


def test_repo_on_another_disk(put: Callable[..., Path], local: HfTransport, tmp_path: Path) -> None:
    """A repo's folder may be a link itself."""
    folder = put("f", b"f")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")

    assert fetch(local, "hf://org/name/f") == b"f"


def test_no_regular_file(put: Callable[..., Path], local: HfTransport) -> None:
    """A folder or a FIFO in the place of the file is refused and does not block."""
    folder = put("sub/f", b"f")
    os.mkfifo(folder / "snapshots" / COMMIT / "fifo")

    refused(local, "hf://org/name/sub", "not a regular file")
    refused(local, "hf://org/name/fifo", "not a regular file")


def test_cached_file_too_long(put: Callable[..., Path], hub: Path) -> None:
    """The caps of card and frontend hold for the cache, too."""
    put("f", b"12345")

    assert fetch(HfTransport(hub, network=False), "hf://org/name/f", max_bytes=5) == b"12345"
    for limits, max_bytes in ((FetchLimits(), 4), (FetchLimits(max_bytes=4), 5)):
        transport = HfTransport(hub, network=False, limits=limits)
        error = refused(transport, "hf://org/name/f", "at most 4 bytes", max_bytes=max_bytes)
        assert isinstance(error, SizeLimitExceeded)


def test_place_of_the_cache(
    put: Callable[..., Path], hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a place the environment says where the cache is, when the transport is made."""
    put("f", b"f")
    for variable in ("HF_HUB_CACHE", "HF_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    homeless = HfTransport(network=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    transport = HfTransport(network=False)
    monkeypatch.delenv("HF_HOME")

    assert fetch(transport, "hf://org/name/f") == b"f"
    refused(homeless, "hf://org/name/f", "there is no local cache, and the hub")


def test_facts(local: HfTransport, hub: Path) -> None:
    """A branch may drift, closing is harmless, and no token is shown."""
    local.close()

    assert local.may_drift is True
    assert repr(HfTransport(hub, token="hf_secret")) == f"<HfTransport hub_cache={str(hub)!r} network=True>"


# ------------------------------------------------------------------ the package

# What is used of huggingface_hub, with its signatures (0.25 to 2.4); it writes down how it was called.
FAKE = """
    import json, os, pathlib, types

    HERE = pathlib.Path(__file__).parent

    class HfHubHTTPError(OSError):
        def __init__(self, message, status):
            super().__init__(message)
            self.response = types.SimpleNamespace(status_code=status)

    def note(*call):
        with open(HERE / "calls", "a") as file:
            print(json.dumps(call), file=file)

    def hf_hub_url(repo_id, filename, *, subfolder=None, repo_type=None, revision=None, endpoint=None):
        return f"https://hub.invalid/{repo_id}/resolve/{revision}/{filename}"

    def get_hf_file_metadata(url, token=None, timeout=10, library_name=None, library_version=None,
                             user_agent=None, headers=None, endpoint=None):
        note("metadata", url, token, timeout)
        if "missing" in url:
            raise HfHubHTTPError(f"404 Client Error for url: {url}?Signature=secret\\nmore", 404)
        if "busy" in url:
            raise HfHubHTTPError("503", 503)
        if "strange" in url:
            raise KeyError("strange")
        size = None if "unsized" in url else (HERE / "file").stat().st_size
        return types.SimpleNamespace(size=size, commit_hash="../stray" if "evil" in url else "c" * 40)

    def hf_hub_download(repo_id, filename, *, subfolder=None, repo_type=None, revision=None,
                        library_name=None, library_version=None, cache_dir=None, local_dir=None,
                        user_agent=None, force_download=False, etag_timeout=10, token=None,
                        local_files_only=False, headers=None, endpoint=None):
        note("download", repo_id, filename, revision, cache_dir, token)
        if "broken" in filename:
            raise ConnectionError("broken")
        folder = pathlib.Path(cache_dir, "models--" + repo_id.replace("/", "--"))
        blob, path = folder / "blobs" / "b", folder / "snapshots" / ("c" * 40) / filename
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes((HERE / "file").read_bytes())
        path.symlink_to(os.path.relpath(blob, path.parent))
        return str(path)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Any]]]:
    """Install a huggingface_hub that brings `from the hub`; return what tells how it was called."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "huggingface_hub.py").write_text(textwrap.dedent(FAKE))
    (folder / "file").write_bytes(b"from the hub")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    calls = folder / "calls"
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.fixture(autouse=True)
def forget_package() -> Any:
    """Leave no huggingface_hub loaded behind a test."""
    yield
    sys.modules.pop("huggingface_hub", None)


def test_from_the_hub(package: Callable[[], list[list[Any]]], hub: Path) -> None:
    """What is not cached comes through the package: into this cache, without credentials."""
    transport = HfTransport(hub)

    assert "huggingface_hub" not in sys.modules
    assert fetch(transport, "hf://org/name@refs%2Fpr%2F1/sub/a%20b.json") == b"from the hub"
    assert package() == [
        ["metadata", "https://hub.invalid/org/name/resolve/refs/pr/1/sub/a b.json", False, 10.0],
        ["download", "org/name", "sub/a b.json", "refs/pr/1", str(hub), False],
    ]


def test_cached_commit_needs_no_hub(
    package: Callable[[], list[list[Any]]], put: Callable[..., Path], hub: Path
) -> None:
    """A commit never changes: what is cached of it needs no package."""
    put("f", b"cached")

    assert fetch(HfTransport(hub), f"hf://org/name@{COMMIT}/f") == b"cached"
    assert package() == []
    assert "huggingface_hub" not in sys.modules


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0"])
def test_cached_branch_may_be_stale(
    package: Callable[[], list[list[Any]]], put: Callable[..., Path], hub: Path, revision: str
) -> None:
    """What a branch stood for once does not hide what the hub has now."""
    put("f", b"old")
    put("f", b"old", revision="v1.0")

    assert fetch(HfTransport(hub), f"hf://org/name{revision}/f") == b"from the hub"
    assert [call[0] for call in package()] == ["metadata", "download"]


@pytest.mark.parametrize("ref", ["main", None])
def test_cached_branch_that_is_fresh(
    package: Callable[[], list[list[Any]]], put: Callable[..., Path], hub: Path, ref: Optional[str]
) -> None:
    """Where the commit that the hub names is cached, nothing is downloaded, whatever the ref says."""
    put("f", b"old")
    put("f", b"cached", revision=ref, commit=NEW)

    assert fetch(HfTransport(hub), "hf://org/name/f") == b"cached"
    assert [call[0] for call in package()] == ["metadata"]


@pytest.mark.parametrize("name", ["missing", "busy", "strange", "broken"])
def test_cached_branch_for_want_of_the_hub(
    package: Callable[[], list[list[Any]]],
    put: Callable[..., Path],
    hub: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Where the hub does not give the file, the cached one may be the right one; the log says why."""
    caplog.set_level(logging.INFO, "selfhost")
    put(name, b"cached")

    assert fetch(HfTransport(hub), f"hf://org/name/{name}") == b"cached"
    assert package()[0][0] == "metadata"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "huggingface_hub says" in caplog.text
    assert "secret" not in caplog.text


def test_cached_branch_for_want_of_the_package(
    put: Callable[..., Path], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package the cache is all there is."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    put("f", b"cached")

    assert fetch(HfTransport(hub), "hf://org/name/f") == b"cached"


def test_cached_branch_of_which_the_hub_has_more(
    package: Callable[[], list[list[Any]]], put: Callable[..., Path], hub: Path
) -> None:
    """A file that has become too long at the hub is not downloaded, and the cached one is brought."""
    put("f", b"cached")

    assert fetch(HfTransport(hub), "hf://org/name/f", max_bytes=11) == b"cached"
    assert [call[0] for call in package()] == ["metadata"]


def test_strange_commit_of_the_hub(
    package: Callable[[], list[list[Any]]], put: Callable[..., Path], hub: Path
) -> None:
    """What the hub calls a commit and is none does not become part of a path (catalogue 8)."""
    folder = put("evil", b"cached")
    (folder / "stray").write_text(COMMIT)

    assert fetch(HfTransport(hub), "hf://org/name/evil") == b"from the hub"


def test_offline(package: Callable[[], list[list[Any]]], put: Callable[..., Path], hub: Path) -> None:
    """Without a network there is the same cache, and the package is not even loaded."""
    put("f", b"cached")
    transport = HfTransport(hub)
    view = transport.offline()

    assert fetch(view, "hf://org/name/f") == b"cached"
    refused(view, "hf://org/name/g", "the hub must not be asked")
    assert repr(view) == f"<HfTransport hub_cache={str(hub)!r} network=False>"
    assert view.offline() is view
    assert "huggingface_hub" not in sys.modules

    assert fetch(transport, "hf://org/name/g") == b"from the hub"


def test_offline_reads_no_environment(put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport that found no cache when it was made has none offline either."""
    for variable in ("HF_HUB_CACHE", "HF_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    homeless = HfTransport()
    monkeypatch.setenv("HF_HUB_CACHE", str(put("f", b"cached").parent))

    refused(homeless.offline(), "hf://org/name/f", "there is no local cache")


@pytest.mark.parametrize("token", [True, "hf_secret"])
def test_token(package: Callable[[], list[list[Any]]], hub: Path, token: Any) -> None:
    """Credentials are used where they are asked for."""
    fetch(HfTransport(hub, token=token), "hf://org/name/f")

    assert [call[-1 if call[0] == "download" else 2] for call in package()] == [token, token]


def test_too_long_at_the_hub(package: Callable[[], list[list[Any]]], hub: Path) -> None:
    """What the hub announces as too long is not downloaded: the package would fill the disk with it."""
    error = refused(HfTransport(hub), "hf://org/name/f", "the hub announces 12", max_bytes=11)

    assert isinstance(error, SizeLimitExceeded)
    assert (error.limit, error.received) == (11, 12)
    assert [call[0] for call in package()] == ["metadata"]
    assert list(hub.iterdir()) == []


def test_longer_than_the_hub_says(package: Callable[[], list[list[Any]]], hub: Path) -> None:
    """The cap holds for what was downloaded, whatever was announced."""
    error = refused(HfTransport(hub), "hf://org/name/unsized", "at most 11 bytes", max_bytes=11)

    assert isinstance(error, SizeLimitExceeded)


@pytest.mark.parametrize(("name", "status", "is_transient"), [("missing", 404, False), ("busy", 503, True)])
def test_status_of_the_hub(
    package: Callable[[], list[list[Any]]], hub: Path, name: str, status: int, is_transient: bool
) -> None:
    """A status of the hub is kept; no query, which may hold a signature, gets into the message."""
    error = refused(HfTransport(hub), f"hf://org/name/{name}", "huggingface_hub says HfHubHTTPError")

    assert isinstance(error, HTTPStatusError)
    assert (error.status, error.is_transient) == (status, is_transient)
    assert "secret" not in str(error)


def test_strange_error_of_the_package(package: Callable[[], list[list[Any]]], hub: Path) -> None:
    """Whatever the package raises becomes a FetchError with its cause."""
    error = refused(HfTransport(hub), "hf://org/name/strange", "huggingface_hub says KeyError")

    assert isinstance(error.__cause__, KeyError)


def test_network_not_allowed(package: Callable[[], list[list[Any]]], local: HfTransport) -> None:
    """Where the hub must not be asked, the package is not even loaded."""
    refused(local, "hf://org/name/f", "the hub must not be asked")

    assert "huggingface_hub" not in sys.modules


def test_package_missing(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    refused(HfTransport(hub), "hf://org/name/f", r"not in the local cache .*pip install 'selfhost\[hf\]'")
