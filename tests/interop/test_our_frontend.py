"""Our frontend with the real Dynamo: its worker's files fetched by us, one cache shared with its frontend."""

from __future__ import annotations

import functools
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.parse import quote

import pytest

from selfhost import ModelDeploymentCard, load_card
from selfhost.discovery import Bucket, FileDiscovery, RecordKey, instance_record, model_record
from selfhost.frontend import BlobCache, MetadataResolver

NAME = "shared/model"
FILES = {
    "tokenizer.json",
    "config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
}
CACHE_BELOW_HOME = Path(".cache") / "dynamo" / "mdc"


class Origin(NamedTuple):
    """A plain file server that counts what it is asked for, and takes a second for the files in `slow`."""

    url: str
    requests: Counter[str]
    slow: set[str]


@pytest.fixture
def origin(model_dir: Any) -> Iterator[Origin]:
    """Serve the demo model and count the requests by file name."""
    requests: Counter[str] = Counter()
    slow: set[str] = set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            requests[self.path.rpartition("/")[2]] += 1

        def copyfile(self, source: Any, outputfile: Any) -> None:
            if self.path.rpartition("/")[2] not in slow:
                super().copyfile(source, outputfile)
                return
            data = source.read()
            for number in range(10):
                time.sleep(0.1)
                outputfile.write(data[number * len(data) // 10 : (number + 1) * len(data) // 10])

    handler = functools.partial(Handler, directory=str(model_dir()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield Origin(f"http://127.0.0.1:{server.server_address[1]}", requests, slow)
        server.shutdown()
        thread.join()


@pytest.fixture
def card(model_dir: Any, origin: Origin) -> ModelDeploymentCard:
    """Return the demo model's card with the origin's URLs."""
    return load_card(model_dir(), name=NAME).map_files(
        lambda file: file.move_to_url(f"{origin.url}/{quote(Path(file.path).name)}")
    )


@pytest.fixture
def publish(file_kv: Path) -> Iterator[Callable[[ModelDeploymentCard], None]]:
    """Publish cards in the test's file store, until the test ends."""
    with FileDiscovery(str(file_kv)) as discovery:

        def publish_card(card: ModelDeploymentCard) -> None:
            key = RecordKey("dynamo", "backend", "generate", 77)
            discovery.publish(Bucket.INSTANCES, key, instance_record(key, transport="127.0.0.1:9/x"))
            discovery.publish(Bucket.MODELS, key, model_record(key, card.to_json()))

        yield publish_card


def read_all(folder: str) -> dict[str, bytes]:
    """Return name and content of every file in a directory."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_file_of_a_real_worker(
    dynamo_worker: Any, model_dir: Any, dynamo_mdcsum: Callable[[str], str], tmp_path: Path
) -> None:
    """Base and LoRA of the real worker arrive whole, in directories named as its own frontend names them."""
    # catalogue 110, 116: it has neither ETag nor ranges
    extra = {"space in name.json": b"{}", "empty.txt": b"", "模型.json": b"[]", "big.json": b"7" * 3_000_000}
    folder = model_dir(files=extra)
    worker = dynamo_worker({"path": str(folder), "name": "base", "loras": ["adapter"]})
    expected = {quote(path.name): path.read_bytes() for path in folder.iterdir()}

    with MetadataResolver(BlobCache(tmp_path / "cache")) as resolver:
        for name, text in worker.cards().items():
            model = resolver.resolve(ModelDeploymentCard.from_json(text))

            assert Path(model.local_dir).parts[-2:] == (name, dynamo_mdcsum(text))
            assert read_all(model.local_dir) == expected
            assert all(file.matches(file.path) for file, _ in model.card.iter_metadata_files())
            assert bool(model.fetched) == (name == "base")  # the adapter has the base model's files


def test_a_real_worker_that_is_gone_is_no_loss(dynamo_worker: Any, model_dir: Any, tmp_path: Path) -> None:
    """What was fetched once is there without the worker, by another process's cache object."""
    worker = dynamo_worker({"path": str(model_dir()), "name": "base"})
    card = ModelDeploymentCard.from_json(worker.cards()["base"])
    with MetadataResolver(BlobCache(tmp_path / "cache")) as resolver:
        resolver.resolve(card)
    worker.kill()

    with MetadataResolver(BlobCache(tmp_path / "cache"), offline=True) as resolver:
        assert set(read_all(resolver.resolve(card).local_dir)) == FILES


def test_our_blobs_serve_the_real_frontend(
    dynamo_frontend: Any, card: ModelDeploymentCard, publish: Any, origin: Origin, tmp_path: Path
) -> None:
    """What we fetched into its cache, the real frontend does not fetch again; our links stay right."""
    # catalogue 140
    home = tmp_path / "home"
    with MetadataResolver(BlobCache(home / CACHE_BELOW_HOME)) as resolver:
        ours = resolver.resolve(card)
        fetched = Counter(origin.requests)
        publish(card)
        frontend = dynamo_frontend(home=home)
        frontend.wait_for(NAME)

        assert fetched == Counter(dict.fromkeys(FILES, 1))
        assert origin.requests == fetched
        assert frontend.cache_dir(card.slug, card.mdcsum) == Path(ours.local_dir)
        assert resolver.resolve(card).fetched == ()  # whatever it did to our links
    assert origin.requests == fetched


def test_the_real_frontends_blobs_serve_us(
    dynamo_frontend: Any, card: ModelDeploymentCard, publish: Any, origin: Origin, tmp_path: Path
) -> None:
    """What the real frontend fetched is a hit for us, in its very directory."""
    publish(card)
    frontend = dynamo_frontend(home=tmp_path / "home")
    frontend.wait_for(NAME)
    fetched = Counter(origin.requests)

    with MetadataResolver(BlobCache(tmp_path / "home" / CACHE_BELOW_HOME)) as resolver:
        model = resolver.resolve(card)

    assert model.fetched == ()
    assert origin.requests == fetched
    assert read_all(model.local_dir) == frontend.cached(card.slug, card.mdcsum)


def test_both_frontends_at_once(
    dynamo_frontend: Any, card: ModelDeploymentCard, publish: Any, origin: Origin, tmp_path: Path
) -> None:
    """Both fetch one model into one cache at once: all is right, and nothing is fetched twice."""
    frontend = dynamo_frontend(home=tmp_path / "home")
    origin.slow.add("config.json")  # which the real one fetches first: we come while it does
    with MetadataResolver(BlobCache(tmp_path / "home" / CACHE_BELOW_HOME)) as resolver:
        publish(card)
        frontend.wait_until("it fetches", lambda: origin.requests["config.json"], seconds=10.0)
        model = resolver.resolve(card)
        frontend.wait_for(NAME)
        fetched = Counter(origin.requests)

        assert fetched == Counter(dict.fromkeys(FILES, 1))
        assert "config.json" not in model.fetched
        assert all(file.matches(file.path) for file, _ in model.card.iter_metadata_files())
        assert frontend.cached(card.slug, card.mdcsum) == read_all(model.local_dir)
        assert resolver.resolve(card).fetched == ()
    assert origin.requests == fetched
    digests = {file.checksum.hex for file, _ in card.iter_metadata_files()}
    blobs = (tmp_path / "home" / CACHE_BELOW_HOME / "blobs").iterdir()
    assert {path.name for path in blobs} == digests  # no temporary file is left


def test_card_read_from_the_store_is_the_published_one(dynamo_worker: Any, model_dir: Any) -> None:
    """Our discovery reads the record of a real worker; its card is the one in the file."""
    worker = dynamo_worker({"path": str(model_dir()), "name": "base"})
    with FileDiscovery(str(worker.file_kv)) as discovery:
        (text,) = discovery.records(Bucket.MODELS).values()

    published = json.dumps(json.loads(text)["card_json"], ensure_ascii=False)
    assert ModelDeploymentCard.from_json(published) == ModelDeploymentCard.from_json(worker.cards()["base"])
