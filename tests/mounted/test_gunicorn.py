"""Several gunicorn workers as one: what one registers all serve, one publishes, and none is missed.

They run the samples of docs/gunicorn.md with docs/gunicorn.conf.py, as an operator would.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from gunicorn_site import GTHREAD_DROPS, LEADER, Load, Records, Site, running_site
from helpers import poll_until

from selfhost import Checksum
from selfhost.discovery import Bucket

KINDS = {
    "sync": ["-k", "sync", "--threads", "1"],
    "gthread": ["-k", "gthread"],
    "gevent": ["-k", "gevent"],
    "preload": ["--preload"],
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Name a way to run the workers."""
    if request.param == "gevent":
        pytest.importorskip("gevent")
    return str(request.param)


@pytest.fixture(scope="module")
def site(kind: str, make_site: Callable[[], Path]) -> Iterator[Site]:
    """Run gunicorn in one way for all tests of the module."""
    with running_site(make_site(), *KINDS[kind]) as site:
        yield site


# --- at rest


def test_one_worker_publishes_at_the_advertised_url(site: Site) -> None:
    """One record of each kind for four workers; its URLs are the setting's, and lead somewhere."""
    (card,) = site.cards()

    assert len(site.store.records(Bucket.INSTANCES)) == 1
    assert len(site.holders(LEADER)) == 1
    for file, _ in card.iter_metadata_files():
        assert file.path.startswith(f"{site.server.url}/internal/v1/metadata/my_model/_base/")
        got = site.server.get(file.path[len(site.server.url) :])
        assert (got.status, Checksum.of(got.body)) == (200, file.checksum)


def test_what_one_worker_registers_all_serve(site: Site) -> None:
    """A request makes one of four workers load an adapter: 400 of 400 fetches find it."""  # catalogue 141
    assert site.server.get("/?lora=my-lora").status == 204
    _, lora = site.cards()
    targets = list(site.targets(lora).values())
    targets.append(os.path.dirname(targets[0]))  # the card itself

    got = [site.server.get(target).status for target in itertools.islice(itertools.cycle(targets), 400)]

    assert got == [200] * 400


# --- while workers come and go


def test_clients_notice_no_change_of_workers(site: Site, kind: str) -> None:
    """HUP, TTIN, TTOU: all answers are right, and the record stays if the master has it."""  # catalogue 142
    workers = site.wait_for_workers(4)
    with Load(site) as load, Records(site) as records:
        site.server.process.send_signal(signal.SIGTTIN)
        site.wait_for_workers(5)
        site.server.process.send_signal(signal.SIGTTOU)
        site.wait_for_workers(4)
        site.server.process.send_signal(signal.SIGHUP)
        site.wait_for_workers(4, without=workers)
        assert poll_until(lambda: load.right > 100 and [len(names) for names in records.seen[-1:]] == [1])

    assert load.wrong == []
    assert load.broken == [] or (GTHREAD_DROPS and kind in ("gthread", "preload"))
    assert kind != "preload" or all(records.seen)


def test_killed_publisher_is_succeeded(site: Site) -> None:
    """Its own clients may lose their connection, nobody else; the record stays."""  # catalogue 142
    workers = site.wait_for_workers(4)
    victim = min(site.holders(LEADER) & workers or workers)
    with Load(site) as load, Records(site) as records:
        os.kill(victim, signal.SIGKILL)
        site.wait_for_workers(4, without=frozenset({victim}))
        assert poll_until(lambda: len(site.holders(LEADER)) == 1 and load.right > 100)

    assert load.wrong == []
    assert len(load.broken) <= 4
    assert len(records.seen) == 1


def test_end_leaves_no_record(site: Site) -> None:
    """All workers go at once, and the last one removes what they published."""
    assert site.server.stop() == 0

    assert [list(site.store.records(bucket)) for bucket in Bucket] == [[], []]
    assert "Traceback" not in site.server.log.read_text()
