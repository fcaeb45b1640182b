"""`selfhost demo`: the whole way once, in one process - write a model, serve it, fetch it back, compare.

Prints what happens. Loopback only, a free port, a discovery that nobody else sees.
"""

from __future__ import annotations

import contextlib
import http.client
import tempfile
from collections.abc import Iterator

from .card.checked_file import CheckedFile
from .card.checksum import Checksum
from .card.model_type import ModelInput, ModelType, WorkerType
from .demo_model import write_demo_model
from .errors import SelfHostError, VerificationError
from .settings import Settings
from .worker.local_model import register_model
from .worker.runtime import DistributedRuntime
from .worker.self_check import fetch

NAME = "selfhost/demo"
FETCH_SECONDS = 10.0  # for one file
SETTINGS = Settings(self_host_metadata=True, system_host="127.0.0.1", system_port=0, discovery_backend="mem")


def run(*, keep: bool) -> None:
    """Serve the demo model and fetch each file of its card; `keep` leaves the model directory behind.

    Raises VerificationError or another SelfHostError at the first file that is not as promised; OSError.
    """
    with _directory(keep=keep) as directory:
        write_demo_model(directory)
        print(f"Wrote a small model to {directory}")
        _serve_and_fetch(directory)
        model = directory if keep else "DIR"
        print(f"Every size and checksum is what the card says. Next: selfhost serve {model} --name my/model")


@contextlib.contextmanager
def _directory(*, keep: bool) -> Iterator[str]:
    if keep:
        yield tempfile.mkdtemp(prefix="selfhost-demo-")
    else:
        with tempfile.TemporaryDirectory(prefix="selfhost-demo-") as directory:
            yield directory


def _serve_and_fetch(directory: str) -> None:
    with DistributedRuntime(SETTINGS) as runtime:
        model = register_model(
            ModelInput.Tokens,
            ModelType.Chat | ModelType.Completions,
            runtime.endpoint("demo.worker.generate"),
            directory,
            NAME,
            worker_type=WorkerType.Aggregated,
        )
        print(f"Serving {NAME} at {runtime.base_url()}; fetching each file back as a frontend would:")
        for file, _ in model.card.iter_metadata_files():
            data = fetch_verified(file)
            print(f"  ok  {len(data):>6} bytes  {file.checksum}  {file.basename}")


def fetch_verified(file: CheckedFile) -> bytes:
    """Fetch a file of known size from its http URL and return its bytes.

    Raises VerificationError if they are not the promised ones, SelfHostError if there is no answer at all.
    """
    try:
        status, data = fetch(file.path, (file.size or 0) + 1, FETCH_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        raise SelfHostError(f"cannot fetch {file.path}: {type(error).__name__}: {error}") from error
    actual = Checksum.of(data)
    if status != 200 or len(data) != file.size or actual != file.checksum:
        raise VerificationError(
            f"{file.path}: expected status 200 and {file.size} bytes with {file.checksum}, "
            f"found status {status} and {len(data)} bytes with {actual}",
            url=file.path,
            expected=str(file.checksum),
            actual=str(actual),
            size=len(data),
        )
    return data
