"""What docs/metrics.md shows is run, and its tables are compared with what a scrape tells."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import documents
import pytest
from foreign import environment, gunicorn, running
from prometheus_client.parser import text_string_to_metric_families

from selfhost import DistributedRuntime, LocalModel, Settings

TEXT = documents.read("docs/metrics.md")
SAMPLES = documents.samples(TEXT)
# By the name of the family, without what the samples of a counter end in.
TABLE = dict(re.findall(r"^\| `(selfhost_\w+?)(?:_total)?(?:\{.*?\})?` \| (\w+) \|", TEXT, re.MULTILINE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the samples and the model that they name."""
    return documents.write_samples(tmp_path, SAMPLES)


def told(text: str) -> dict[str, str]:
    """Return the type of each metric of ours in a scrape, by name."""
    families = text_string_to_metric_families(text)
    return {family.name: family.type for family in families if family.name.startswith("selfhost_")}


def of_side(side: str) -> dict[str, str]:
    """Return a side's table."""
    return {name: kind for name, kind in TABLE.items() if name.startswith(f"selfhost_{side}_")}


def test_every_block_is_a_sample() -> None:
    """No block goes untested."""
    assert set(SAMPLES) == {"worker_metrics.py", "gateway_metrics.py", "wsgi_metrics.py"}
    assert TEXT.count("```python") == len(SAMPLES)


def test_worker_sample(folder: Path) -> None:
    """A worker tells all that the table says, and nothing else."""
    lines = documents.run(folder, sys.executable, "-X", "dev", "worker_metrics.py")

    assert told("\n".join(lines) + "\n") == of_side("worker")
    assert "selfhost_worker_ready 1.0" in lines
    assert "selfhost_worker_files 5.0" in lines


def test_gateway_sample(folder: Path) -> None:
    """A frontend tells all that the table says, and nothing else."""
    settings = Settings(True, "127.0.0.1", 0, file_kv=str(folder / "kv"))
    with DistributedRuntime(settings) as runtime:
        LocalModel.load(folder / "my-model", name="my/model").attach(runtime.endpoint("ns.comp.ep"))
        lines = documents.run(folder, sys.executable, "-X", "dev", "gateway_metrics.py")

    assert told("\n".join(lines) + "\n") == of_side("frontend")
    assert 'selfhost_frontend_attempts_total{outcome="ok"} 5.0' in lines
    assert 'selfhost_frontend_models{state="ready"} 1.0' in lines


def test_mounted_sample(folder: Path) -> None:
    """Under gunicorn any process tells the requests of all, and what is registered."""
    (folder / "counts").mkdir()
    env = environment(
        folder,
        DYN_SELF_HOST_METADATA="1",
        DYN_SYSTEM_ADVERTISE_URL="URL",
        DYN_FILE_KV=str(folder / "kv"),
        PROMETHEUS_MULTIPROC_DIR=str(folder / "counts"),
    )
    with running(gunicorn("-w", "2", "wsgi_metrics:app"), folder, env) as server:
        for _ in range(20):
            assert server.get("/v1/metadata/my_model/_base/config.json").status == 200
        text = server.get("/metrics").body.decode()

    assert told(text).items() <= of_side("worker").items()
    assert 'selfhost_worker_requests_total{status="200"} 20.0' in text
    assert 'selfhost_worker_requests_total{status="404"}' in text  # of who waited for the first answer
    assert "selfhost_worker_files 5.0" in text
