"""How gunicorn and its workers end: after so many requests, within a download, without master or model."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from gunicorn_site import GTHREAD_DROPS, PATIENCE_SECONDS, Load, running_site
from helpers import TIMEOUT, poll_until

from selfhost import (
    BlobCache,
    DistributedRuntime,
    LocalModel,
    MetadataResolver,
    ModelDeploymentCard,
    Settings,
)
from selfhost.discovery import Bucket
from selfhost.frontend.progress import Progress

LARGE_BYTES = 32 << 20  # more than the kernel's buffers between two sockets hold


def test_worker_that_has_answered_enough_is_replaced_unnoticed(make_site: Callable[[], Path]) -> None:
    """One after the other ends and another starts; every answer is right."""  # catalogue 142
    seen: set[int] = set()
    options = ("--max-requests", "100", "--max-requests-jitter", "100")
    with running_site(make_site(), *options) as site, Load(site) as load:
        assert poll_until(lambda: seen.update(site.server.workers) or len(seen) >= 12, PATIENCE_SECONDS)

    assert load.wrong == []
    assert load.broken == [] or GTHREAD_DROPS


def test_broken_download_is_finished_elsewhere(make_site: Callable[[], Path], tmp_path: Path) -> None:
    """Who only reads sees that it is short; a resolver goes on at the next worker."""  # catalogue 56
    folder = make_site()
    large = folder / "my-model" / "large.json"
    large.write_bytes(b"0123456789abcdef" * (LARGE_BYTES // 16))
    with running_site(folder, "--graceful-timeout", "1", workers=1) as site, another_worker(folder) as other:

        def end_within(progress: Progress) -> None:
            if progress.filename == large.name and site.server.process.poll() is None:
                site.server.stop()

        (card,) = site.cards()
        client = http.client.HTTPConnection(*site.server.address, timeout=TIMEOUT)
        client.request("GET", site.targets(card)[large.name])
        response = client.getresponse()
        with MetadataResolver(BlobCache(tmp_path / "cache")) as resolver:
            resolved = resolver.resolve(card, replicas=[other], progress=end_within)
        with contextlib.closing(client), pytest.raises(http.client.IncompleteRead):
            response.read()

    assert site.server.process.returncode == 0
    assert (Path(resolved.local_dir) / large.name).read_bytes() == large.read_bytes()


@contextlib.contextmanager
def another_worker(folder: Path) -> Iterator[ModelDeploymentCard]:
    """Serve the same model from here; gives its card."""
    settings = Settings(True, "127.0.0.1", 0, discovery_backend="mem")
    with DistributedRuntime(settings) as runtime:
        yield LocalModel.load(folder / "my-model", name="my/model").attach(runtime.endpoint("a.b.c")).card


def test_workers_without_master_withdraw_the_record(make_site: Callable[[], Path]) -> None:
    """They notice within a second or two that it was killed, and end in order."""
    with running_site(make_site()) as site:
        workers = site.server.workers

        site.server.process.kill()

        assert poll_until(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in workers))
        assert [list(site.store.records(bucket)) for bucket in Bucket] == [[], []]


def test_worker_that_cannot_register_serves_what_others_did(make_site: Callable[[], Path]) -> None:
    """It tries again until it can; gunicorn goes on."""
    folder = make_site()
    conf = folder / "gunicorn.conf.py"
    sooner = conf.read_text().replace("Timer(10,", "Timer(0.2,")
    assert sooner != conf.read_text()
    conf.write_text(sooner)
    with running_site(folder, workers=2) as site:
        targets = site.targets(site.cards()[0]).values()
        first, other = site.server.workers
        (folder / "my-model").rename(folder / "away")
        os.kill(first, signal.SIGKILL)
        assert poll_until(lambda: "trying again" in site.server.log.read_text(), PATIENCE_SECONDS)

        os.kill(other, signal.SIGSTOP)  # so that the new one answers
        assert [site.server.get(target).status for target in targets] == [200] * len(targets)
        os.kill(other, signal.SIGCONT)

        (folder / "away").rename(folder / "my-model")
        assert other in site.wait_for_workers(2, without=frozenset({first}))


def test_first_worker_that_cannot_register_ends_gunicorn(make_site: Callable[[], Path]) -> None:
    """With the reason: there is nobody whose registrations it could serve."""
    folder = make_site()
    (folder / "my-model").rename(folder / "away")

    with (
        pytest.raises(AssertionError, match=r"(?s)ModelDirError.*Worker failed to boot"),
        running_site(folder),
    ):
        pass
