"""What a worker tells Prometheus, read back with Prometheus's own parser."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import selfhost
from selfhost import DistributedRuntime, LocalModel, MetadataApp, MetadataArtifactRegistry
from selfhost.worker.counters import ServerCounters
from selfhost.worker.metrics import CountingApp, WorkerCollector

Fetch = Callable[[str], "tuple[int, bytes]"]


def scrape(collector: object) -> dict[str, float]:
    """Return every sample of a collector, or of a registry, by its name and labels as they are written."""
    if not isinstance(collector, CollectorRegistry):
        registry = CollectorRegistry()
        registry.register(collector)  # type: ignore[arg-type]
        collector = registry
    families = text_string_to_metric_families(generate_latest(collector).decode())
    return {
        sample.name.replace("selfhost_worker_", "") + "".join(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def observed(registry: MetadataArtifactRegistry, **others: Any) -> Any:
    """Return what a collector looks at, without a server and ready."""
    states = {
        "metadata_artifacts": registry,
        "status_server": None,
        "endpoint_states": lambda: {"e": "ready"},
    }
    return SimpleNamespace(**{**states, **others})


def test_requests_and_connections(runtime: DistributedRuntime, model_dir: Any, fetch: Fetch) -> None:
    """What the embedded server answered is told, by status, and how many clients it has."""
    collector = WorkerCollector(runtime)
    model = LocalModel.load(model_dir()).attach(runtime.endpoint("a.b.c"))
    before = scrape(collector)
    sizes = [len(fetch(file.url)[1]) for file in model.files]
    assert fetch(model.files[0].url + ".gone")[0] == 404
    after = scrape(collector)

    assert after["requests_total200"] - before["requests_total200"] == 5
    assert after["requests_total404"] - before.get("requests_total404", 0) == 1
    assert after["sent_bytes_total"] - before["sent_bytes_total"] > sum(sizes)
    assert after["connections_total"] - before["connections_total"] == 6
    assert (after["refused_connections_total"], after["handshake_failures_total"]) == (0, 0)
    assert after["open_connections"] <= 6


def test_every_count_has_its_metric(registry: MetadataArtifactRegistry) -> None:
    """Each number of the server's counters is told under its own name."""
    counters = ServerCounters({200: 1, 503: 2}, 3, 4, 5, 6, 7)
    server = SimpleNamespace(counters=lambda: counters)
    told = scrape(WorkerCollector(observed(registry, status_server=server)))

    assert (told["requests_total200"], told["requests_total503"]) == (1, 2)
    assert told["sent_bytes_total"] == 3
    assert (told["connections_total"], told["refused_connections_total"]) == (4, 5)
    assert (told["handshake_failures_total"], told["open_connections"]) == (6, 7)


def test_what_is_registered(runtime: DistributedRuntime, model_dir: Any) -> None:
    """Models, files and the memory that they take follow what is attached; so does readiness."""
    collector = WorkerCollector(runtime)
    nothing = scrape(collector)
    model = LocalModel.load(model_dir()).attach(runtime.endpoint("a.b.c"))
    adapter = model.derive_lora("adapter").attach(runtime.endpoint("a.b.c"))
    both = scrape(collector)
    size = sum(file.size for file in model.files)
    adapter.detach()
    model.detach()

    assert [both[name] for name in ("models", "files", "pinned_bytes", "ready")] == [2, 10, size, 1]
    for told in (nothing, scrape(collector)):
        assert [told[name] for name in ("models", "files", "pinned_bytes", "ready")] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("states", "ready"), [({}, 0), ({"a": "ready", "b": "notready"}, 0), ({"a": "ready", "b": "ready"}, 1)]
)
def test_ready_as_health_says(
    registry: MetadataArtifactRegistry, states: Mapping[str, str], ready: int
) -> None:
    """Ready is a worker with an endpoint, all of which are."""
    collector = WorkerCollector(observed(registry, endpoint_states=lambda: states))

    assert scrape(collector)["ready"] == ready


def test_files_are_gone_over_only_after_a_change(
    registry: MetadataArtifactRegistry, make_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape of tens of thousands of files costs nothing as long as they stay."""
    rounds = []
    real = MetadataArtifactRegistry.pinned_bytes.fget  # type: ignore[attr-defined]

    def counted(self: MetadataArtifactRegistry) -> int:
        rounds.append(self)
        return int(real(self))

    monkeypatch.setattr(MetadataArtifactRegistry, "pinned_bytes", property(counted))
    collector = WorkerCollector(observed(registry))
    scrape(collector)
    scrape(collector)
    registry.register("m", "_base", "config.json", make_file("config.json", b"{}"))
    told = [scrape(collector)["files"] for _ in range(2)]

    assert len(rounds) == 2
    assert told == [1, 1]


def test_without_a_server_no_requests_are_told(registry: MetadataArtifactRegistry) -> None:
    """Of a mounted app only what is registered is known, so that nothing is told twice."""
    assert set(scrape(WorkerCollector(observed(registry)))) == {"models", "files", "pinned_bytes", "ready"}


def test_failing_part_is_left_out(
    registry: MetadataArtifactRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape of the host goes on without what cannot be told."""

    def fail() -> ServerCounters:
        raise OSError("the process is gone")

    collector = WorkerCollector(observed(registry, status_server=SimpleNamespace(counters=fail)))
    with caplog.at_level(logging.ERROR):
        told = scrape(collector)

    assert set(told) == {"models", "files", "pinned_bytes", "ready"}
    assert "some metrics cannot be told" in caplog.text


# ------------------------------------------------------------------ an app in another server


def ask(app: Any, method: str, path: str, **fields: str) -> bytes:
    """Ask an app as a server does; return the body."""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", **fields}
    body = app(environ, lambda status, headers, *error: None)
    try:
        return b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()


def test_app_is_counted(registry: MetadataArtifactRegistry, make_file: Any) -> None:
    """Answers count by status, their bytes as announced; what has no body has none."""
    registry.register("m", "_base", "config.json", make_file("config.json", b"0123456789"))
    counts = CollectorRegistry()
    app = CountingApp(MetadataApp(registry), registry=counts)
    path = "/v1/metadata/m/_base/config.json"
    assert ask(app, "GET", path) == b"0123456789"
    assert ask(app, "HEAD", path) == b""
    assert ask(app, "GET", path, HTTP_RANGE="bytes=0-3") == b"0123"
    assert ask(app, "GET", path, HTTP_IF_NONE_MATCH="*") == b""
    assert ask(app, "HEAD", path + ".gone") == b""

    assert scrape(counts) == {
        "requests_total200": 2,
        "requests_total206": 1,
        "requests_total304": 1,
        "requests_total404": 1,
        "sent_bytes_total": 14,
    }


def test_app_answers_as_before(registry: MetadataArtifactRegistry, make_file: Any) -> None:
    """Status, fields and the very body object go through as they are."""
    registry.register("m", "_base", "config.json", make_file("config.json", b"{}"))
    plain = MetadataApp(registry)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/v1/metadata/m/_base/config.json", "QUERY_STRING": ""}
    seen: list[Any] = []
    app = CountingApp(plain, registry=CollectorRegistry())
    bodies = [each(environ, lambda *given: seen.append(given)) for each in (plain, app)]

    assert seen[0] == seen[1]
    assert bodies[0] == bodies[1] == [b"{}"]


MANY = """
import sys
from prometheus_client import CollectorRegistry, generate_latest
from selfhost.worker.metrics import CountingApp
def answer(environ, start_response):
    start_response("200 OK", [("Content-Length", "3")])
    return [b"abc"]
app = CountingApp(answer)
for _ in range(int(sys.argv[1])):
    app({"REQUEST_METHOD": "GET"}, print)
"""
SUM = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def run_python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which finds this very package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(selfhost.__file__).parents[1]), **variables}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_processes_add_up(tmp_path: Path) -> None:
    """In prometheus_client's multi-process mode the answers of all processes are one number."""
    for count in ("3", "4"):
        assert run_python(MANY, count, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).returncode == 0
    text = run_python(SUM, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).stdout

    assert 'selfhost_worker_requests_total{status="200"} 7.0' in text
    assert "selfhost_worker_sent_bytes_total 21.0" in text


# ------------------------------------------------------------------ without prometheus_client

ABSENT = """
import sys
import selfhost.worker.metrics, selfhost.frontend.metrics
from selfhost import demo
demo.run(keep=False)
print("loaded" if "prometheus_client" in sys.modules else "not loaded")
sys.modules["prometheus_client"] = None  # as if it were not installed
for make in (
    lambda: selfhost.worker.metrics.WorkerCollector(None),
    lambda: selfhost.worker.metrics.CountingApp(None),
    lambda: selfhost.frontend.metrics.FrontendCollector(None),
):
    try:
        make()
    except selfhost.SelfHostError as error:
        print(error)
"""


def test_missing_client_is_told_when_it_is_needed() -> None:
    """Nobody loads prometheus_client unasked; without it only a collector fails, and says what to install."""
    result = run_python(ABSENT)
    *_, loaded, worker, app, frontend = result.stdout.splitlines()

    assert (result.returncode, result.stderr, loaded) == (0, "", "not loaded")
    for said in (worker, app, frontend):
        assert said.startswith("metrics need the package `prometheus_client`")
        assert "pip install 'selfhost[metrics]'" in said
