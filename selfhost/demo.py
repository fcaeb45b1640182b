"""`selfhost demo`: the whole way once, in one process - write a model, serve it, fetch it as a frontend does.

Prints what happens. Loopback only, a free port, a discovery that nobody else sees, a cache of its own.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from .card.model_card import ModelDeploymentCard
from .card.model_type import ModelInput, ModelType, WorkerType
from .demo_model import write_demo_model
from .errors import SelfHostError
from .frontend.cache import BlobCache
from .frontend.resolver import MetadataResolver
from .settings import Settings
from .worker.entry_point import register_model
from .worker.runtime import DistributedRuntime

NAME = "selfhost/demo"
SETTINGS = Settings(self_host_metadata=True, system_host="127.0.0.1", system_port=0, discovery_backend="mem")


def run(*, keep: bool) -> None:
    """Serve the demo model, then fetch and verify all files of its card; `keep` leaves the model directory.

    Raises ResolveError or another SelfHostError if a file is not as promised; OSError.
    """
    with _directory(keep=keep) as directory, tempfile.TemporaryDirectory(prefix="selfhost-cache-") as root:
        write_demo_model(directory)
        print(f"Wrote a small model to {directory}")
        with DistributedRuntime(SETTINGS) as runtime, MetadataResolver(BlobCache(root)) as resolver:
            card = _serve(runtime, directory)
            _fetch(resolver, card)
            _fetch_again(resolver, card)
        model = directory if keep else "DIR"
        print(f"Every checksum is what the card says. Next: selfhost serve {model} --name my/model")


@contextlib.contextmanager
def _directory(*, keep: bool) -> Iterator[str]:
    if keep:
        yield tempfile.mkdtemp(prefix="selfhost-demo-")
    else:
        with tempfile.TemporaryDirectory(prefix="selfhost-demo-") as directory:
            yield directory


def _serve(runtime: DistributedRuntime, directory: str) -> ModelDeploymentCard:
    """Register the model; return the card as a frontend reads it."""
    model = register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        runtime.endpoint("demo.worker.generate"),
        directory,
        NAME,
        worker_type=WorkerType.Aggregated,
    )
    print(f"Serving {NAME}, its card at {model.card_url}; fetching as a frontend would:")
    return ModelDeploymentCard.from_json(model.card.to_json())


def _fetch(resolver: MetadataResolver, card: ModelDeploymentCard) -> None:
    resolved = resolver.resolve(card)
    for file, _ in resolved.card.iter_metadata_files():
        size = os.stat(file.path).st_size
        print(f"  ok  {size:>6} bytes  {file.checksum}  {file.basename}")


def _fetch_again(resolver: MetadataResolver, card: ModelDeploymentCard) -> None:
    resolved = resolver.resolve(card)
    if resolved.fetched:
        raise SelfHostError(f"these were fetched twice: {', '.join(resolved.fetched)}")
    print("Resolved once more: all of it was in the cache, and nothing was asked for.")
