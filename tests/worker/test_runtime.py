"""What the models of one process share, and that it ends in order."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import needs_ipv6

from selfhost.discovery import Bucket, MemoryDiscovery
from selfhost.errors import DiscoveryError, RegistrationError, SettingsError, StatusServerError
from selfhost.settings import Settings
from selfhost.worker import advertise
from selfhost.worker.local_model import LocalModel
from selfhost.worker.registry import MetadataArtifactRegistry
from selfhost.worker.runtime import DistributedRuntime
from selfhost.worker.server import SystemStatusServer

pytestmark = pytest.mark.usefixtures("leaves_nothing")
LOOPBACK = advertise.InterfaceAddress("lo", "127.0.0.1")
ETHERNET = advertise.InterfaceAddress("eth0", "192.0.2.7")


# ------------------------------------------------------------------ settings


def test_nothing_is_opened_before_the_start() -> None:
    """Making a runtime opens no socket, starts no thread and touches no store."""
    threads = threading.active_count()
    runtime = DistributedRuntime(Settings(system_port=0, file_kv="/nowhere/at/all"))

    assert threading.active_count() == threads
    assert runtime.status_server is None
    runtime.close()


def test_no_port_means_no_server(start_runtime: Any) -> None:
    """Without a port there is no server."""
    assert start_runtime(system_port=None).status_server is None


def test_port_zero_is_told(start_runtime: Any, fetch: Any) -> None:
    """Port 0 takes a free one, and URLs carry the real one."""
    runtime = start_runtime(system_port=0)

    assert runtime.base_url() == f"http://127.0.0.1:{runtime.status_server.port}"
    assert fetch(runtime.base_url() + "/live")[0] == 200


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, spy: Any, fetch: Any) -> None:
    """Without settings the environment counts, as it is then."""
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    monkeypatch.setenv("DYN_SYSTEM_HOST", "127.0.0.1")
    with DistributedRuntime(discovery=spy) as runtime:
        assert fetch(runtime.base_url() + "/live")[0] == 200


def test_taken_port(start_runtime: Any) -> None:
    """A port that is taken raises at the start, and nothing of the second runtime is left."""
    port = start_runtime().status_server.port
    second = DistributedRuntime(Settings(system_host="127.0.0.1", system_port=port))

    with pytest.raises(StatusServerError, match="in use"):
        second.start()
    second.close()


@pytest.mark.parametrize("url", ["ftp://h/", "h:80", "http://0.0.0.0:80", "http://h:99999", ""])
def test_unusable_base_url_raises_at_the_start(url: str, registry: Any) -> None:
    """A base URL that cannot be used is told before anything is opened."""
    runtime = DistributedRuntime(Settings(system_port=0, advertise_url=url), registry=registry)

    with pytest.raises(SettingsError) as caught:
        runtime.start()
    assert caught.value.variable == "DYN_SYSTEM_ADVERTISE_URL"
    assert runtime.status_server is None


# ------------------------------------------------------------------ endpoints


def test_endpoint(start_runtime: Any) -> None:
    """An endpoint is namespace, component and name; its keys carry the instance."""
    runtime = start_runtime()
    endpoint = runtime.endpoint("ns.comp.ep")

    assert (endpoint.namespace, endpoint.component, endpoint.name) == ("ns", "comp", "ep")
    assert str(endpoint.key()) == f"ns/comp/ep/{runtime.instance_id:x}"
    assert str(endpoint.key("lora")) == f"ns/comp/ep/{runtime.instance_id:x}/lora"


@pytest.mark.parametrize("path", ["", "a", "a.b", "a.b.c.d", "a..c", ".b.c", "a.b."])
def test_no_endpoint(path: str, start_runtime: Any) -> None:
    """Anything but three names is refused, with the form that is expected."""
    with pytest.raises(DiscoveryError, match=r"namespace\.component\.endpoint"):
        start_runtime().endpoint(path)


def test_instance_is_published_once_for_all_models(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """An endpoint is told of with its first model and withdrawn with its last."""
    endpoint = start_runtime().endpoint("ns.comp.ep")
    base = LocalModel.load(model_dir(), name="m")
    lora = base.derive_lora("adapter").attach(endpoint)
    base.attach(endpoint)
    assert len(spy.records(Bucket.INSTANCES)) == 1

    base.detach()
    assert len(spy.records(Bucket.INSTANCES)) == 1
    lora.detach()
    assert spy.is_empty()


def test_transport_is_published(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """The request plane's address is told to frontends as it was given."""
    endpoint = start_runtime().endpoint("ns.comp.ep", transport="10.0.0.1:5/x")
    with LocalModel.load(model_dir()).attach(endpoint):
        (text,) = spy.records(Bucket.INSTANCES).values()

    assert json.loads(text)["transport"] == {"tcp": "10.0.0.1:5/x"}


def test_health_names_the_endpoints(start_runtime: Any, model_dir: Any, fetch: Any) -> None:
    """/health lists the endpoints that have a model."""
    runtime = start_runtime()
    with LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.generate")):
        state = json.loads(fetch(runtime.base_url() + "/health")[1])

    assert state["endpoints"] == {"generate": "ready"}
    assert json.loads(fetch(runtime.base_url() + "/health")[1])["endpoints"] == {}


def test_slow_store_does_not_delay_health(start_runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """While a record is being published, the server goes on answering."""
    runtime, released, publishing = start_runtime(), threading.Event(), threading.Event()
    spy.on_call = lambda *_: (publishing.set(), released.wait(20))
    model = LocalModel.load(model_dir())
    thread = threading.Thread(target=model.attach, args=(runtime.endpoint("ns.comp.ep"),))
    thread.start()
    assert publishing.wait(5)

    try:
        assert fetch(f"http://{runtime.status_server.address}/health")[0] == 503
    finally:
        released.set()
        thread.join()


# ------------------------------------------------------------------ base URL


def test_no_address_to_publish(start_runtime: Any) -> None:
    """Without server and base URL the error names the settings."""
    with pytest.raises(SettingsError, match="DYN_SYSTEM_ADVERTISE_URL") as caught:
        start_runtime(system_port=None).base_url()

    assert caught.value.variable == "DYN_SYSTEM_PORT"


def test_base_url_given_outright(start_runtime: Any) -> None:
    """A given URL counts more than the bound address, an argument more than the setting."""
    runtime = start_runtime(advertise_url="https://proxy.example/models/")

    assert runtime.base_url() == "https://proxy.example/models"
    assert runtime.base_url("http://other:81") == "http://other:81"


def test_base_url_without_a_server(start_runtime: Any) -> None:
    """A given URL needs no server of ours."""
    assert start_runtime(system_port=None, advertise_url="http://h").base_url() == "http://h"


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_wildcard_is_never_published(host: str, start_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on every address tells the address of an interface, not of loopback."""  # catalogue 45
    monkeypatch.setattr(advertise, "local_interfaces", lambda: [LOOPBACK, ETHERNET])
    runtime = start_runtime(system_host=host)

    assert runtime.base_url() == f"http://192.0.2.7:{runtime.status_server.port}"


def test_wildcard_without_any_interface(start_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only loopback is there, a wildcard cannot be published."""
    monkeypatch.setattr(advertise, "local_interfaces", lambda: [LOOPBACK])

    with pytest.raises(StatusServerError, match="other than loopback"):
        start_runtime(system_host="0.0.0.0").base_url()


@pytest.mark.parametrize(
    ("host", "written"),
    [("127.0.0.1", "127.0.0.1"), pytest.param("::1", "[::1]", marks=needs_ipv6), ("localhost", None)],
)
def test_bound_address_is_published(host: str, written: str, start_runtime: Any, fetch: Any) -> None:
    """An address that was bound is published as it is, an IPv6 one in brackets, a name as its address."""
    runtime = start_runtime(system_host=host)

    shown = written or ("[::1]" if ":" in runtime.status_server.host else "127.0.0.1")
    assert runtime.base_url() == f"http://{shown}:{runtime.status_server.port}"
    assert fetch(runtime.base_url() + "/live")[0] == 200


# ------------------------------------------------------------------ the end


def test_cards_are_withdrawn_before_the_server_stops(
    start_runtime: Any, spy: Any, model_dir: Any, fetch: Any
) -> None:
    """At the end no frontend is ever sent to a server that is gone."""
    runtime = start_runtime(self_host_metadata=True)
    models = [LocalModel.load(model_dir(), name=f"m{n}") for n in range(3)]
    for number, model in enumerate(models):
        model.attach(runtime.endpoint(f"ns.comp.ep{number}"))
    urls = [model.files[0].url for model in models]
    seen: list[list[int]] = []
    spy.on_call = lambda action, bucket: (
        seen.append([fetch(url)[0] for url in urls]) if bucket is Bucket.MODELS else None
    )

    runtime.close()

    assert seen == [[200, 200, 200], [200, 200, 404], [200, 404, 404]]
    assert spy.is_empty()
    assert runtime.metadata_artifacts.is_empty()


def test_close_goes_on_after_a_failure(
    start_runtime: Any, spy: Any, model_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that fails is logged, and every other step is taken."""
    runtime = start_runtime(self_host_metadata=True)
    for number in range(2):
        LocalModel.load(model_dir(), name=f"m{number}").attach(runtime.endpoint(f"ns.comp.ep{number}"))
    server = runtime.status_server

    def fail(action: str, bucket: Bucket) -> None:
        raise RuntimeError("the store is gone")

    spy.on_call = fail
    runtime.close()
    spy.on_call = lambda *_: None

    assert caplog.text.count("the store is gone") >= 2
    assert not server.is_running
    assert runtime.metadata_artifacts.is_empty()
    caplog.clear()


def test_close_twice_and_start_again(start_runtime: Any, spy: Any, model_dir: Any, fetch: Any) -> None:
    """A runtime can be closed twice, and started anew."""
    runtime = start_runtime(self_host_metadata=True)
    model = LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.ep"))
    runtime.close()
    runtime.close()
    assert not model.is_attached

    runtime.start()
    model.attach(runtime.endpoint("ns.comp.ep"))
    assert fetch(model.files[0].url)[0] == 200


def test_discovery_of_the_host_stays_open(start_runtime: Any, spy: Any) -> None:
    """A discovery that was passed in is closed by whoever made it."""
    start_runtime().close()

    assert not spy.is_closed


def test_own_discovery_is_closed(model_dir: Any) -> None:
    """A discovery that the runtime opened itself ends with it."""
    with DistributedRuntime(Settings(discovery_backend="mem")) as runtime:
        LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.ep"))
        discovery = runtime.discovery
        assert isinstance(discovery, MemoryDiscovery)

    with pytest.raises(RegistrationError, match="closed"):
        _ = runtime.discovery
    with pytest.raises(DiscoveryError, match="closed"):
        discovery.publish(Bucket.MODELS, runtime.endpoint("a.b.c").key(), "{}")
    runtime.close()


def test_context_manager_closes_after_an_exception(spy: Any) -> None:
    """An exception in the block passes through, and the server ends."""
    runtime = DistributedRuntime(Settings(system_host="127.0.0.1", system_port=0), discovery=spy)
    servers: list[Any] = []

    def host() -> None:
        with runtime:
            servers.append(runtime.status_server)
            raise KeyError("host")

    with pytest.raises(KeyError, match="host"):
        host()
    assert not servers[0].is_running


def test_two_runtimes_in_one_process(spy: Any, model_dir: Any, fetch: Any) -> None:
    """Two runtimes have their own ports, instances and routes, and end independently."""
    settings = Settings(self_host_metadata=True, system_host="127.0.0.1", system_port=0)
    with DistributedRuntime(settings, discovery=spy) as one:
        with DistributedRuntime(settings, discovery=spy) as two:
            first = LocalModel.load(model_dir(), name="m").attach(one.endpoint("ns.comp.ep"))
            second = LocalModel.load(model_dir(), name="m").attach(two.endpoint("ns.comp.ep"))
            assert one.instance_id != two.instance_id
            assert fetch(second.files[0].url) == fetch(first.files[0].url)
        assert fetch(first.files[0].url)[0] == 200
        assert len(spy.cards()) == 1


# ------------------------------------------------------------------ closed, and other threads


def test_closed_runtime_takes_no_model(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """Attaching to a closed runtime is refused and starts nothing."""
    runtime = start_runtime(self_host_metadata=True)
    runtime.close()

    with pytest.raises(RegistrationError, match="the runtime is closed"):
        LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.ep"))
    assert (runtime.status_server, spy.is_empty()) == (None, True)


def test_close_undoes_an_attach_that_runs(
    start_runtime: Any, spy: Any, model_dir: Any, wait_until: Any
) -> None:
    """A model that another thread attaches while the runtime closes is detached again."""
    runtime, released, publishing = (
        start_runtime(self_host_metadata=True),
        threading.Event(),
        threading.Event(),
    )
    spy.on_call = lambda *_: (publishing.set(), released.wait(20))
    model = LocalModel.load(model_dir())
    attaching = threading.Thread(target=model.attach, args=(runtime.endpoint("ns.comp.ep"),))
    closing = threading.Thread(target=runtime.close)
    attaching.start()
    assert publishing.wait(5)
    closing.start()
    assert wait_until(lambda: runtime._is_closed)
    released.set()
    attaching.join()
    closing.join()

    assert (model.is_attached, spy.is_empty(), runtime.metadata_artifacts.is_empty()) == (False, True, True)


def test_slow_store_delays_no_other_endpoint(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """While the record of one endpoint is being written, a model comes and goes on another."""
    runtime, released, publishing = start_runtime(), threading.Event(), threading.Event()
    spy.on_call = lambda *_: (publishing.set(), released.wait(20))
    slow = threading.Thread(
        target=LocalModel.load(model_dir()).attach, args=(runtime.endpoint("ns.comp.slow"),)
    )
    slow.start()
    assert publishing.wait(5)
    spy.on_call = lambda *_: None
    quick = threading.Thread(
        target=lambda: LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.quick")).detach()
    )
    quick.start()
    quick.join(5)
    was_quick = not quick.is_alive()
    released.set()
    slow.join()
    quick.join()

    assert was_quick


def test_second_transport_is_refused(start_runtime: Any, spy: Any, model_dir: Any) -> None:
    """An endpoint has one transport in a process; the error names both."""
    runtime = start_runtime()
    model = LocalModel.load(model_dir(), name="m")
    model.attach(runtime.endpoint("ns.comp.ep", transport="h:1/a"))

    with pytest.raises(RegistrationError, match=r"'h:1/a'.*'h:2/b'"):
        model.derive_lora("x").attach(runtime.endpoint("ns.comp.ep", transport="h:2/b"))
    assert len(spy.cards()) == 1


# ------------------------------------------------------------------ forks and exits

IN_A_CHILD = """
    import os, sys
    from selfhost import DistributedRuntime, LocalModel, SelfHostError, Settings
    from selfhost.demo_model import write_demo_model

    write_demo_model(sys.argv[1])
    settings = Settings(True, "127.0.0.1", 0, discovery_backend="mem")
    runtime = DistributedRuntime(settings)
    model = LocalModel.load(sys.argv[1]).attach(runtime.endpoint("a.b.c"))
    for lock in (runtime._life, runtime._lock, model._lock):
        lock.acquire()
    if os.fork() == 0:
        import threading
        def child():
            runtime.close()
            model.detach()
            try:
                LocalModel.load(sys.argv[1]).attach(runtime.endpoint("a.b.d"))
            except SelfHostError as error:
                assert "after the fork" in str(error)
            with DistributedRuntime(settings) as own:
                model.attach(own.endpoint("a.b.c"))
            os.write(1, b"child done ")
            os._exit(0)
        threading.Thread(target=child).start()
        threading.Event().wait(8)
        os._exit(1)
    _, status = os.wait()
    assert status == 0 and model.is_attached
    os.write(1, b"parent done")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inherited_runtime_is_inert(run_script: Any, tmp_path: Any) -> None:
    """In a forked child, close and detach touch nothing and wait for nobody, and attaching is refused."""
    result = run_script(f"import warnings; warnings.simplefilter('ignore')\n{textwrap.dedent(IN_A_CHILD)}",
        str(tmp_path / "m"), timeout=20,
    )  # fmt: skip

    assert (result.stdout, result.returncode) == ("child done parent done", 0), result.stderr


AT_EXIT = """
    import os, sys
    from selfhost import DistributedRuntime, LocalModel, Settings, SystemStatusServer
    from selfhost.demo_model import write_demo_model
    from selfhost.discovery import Bucket, FileDiscovery

    write_demo_model(sys.argv[1] + "/m")
    discovery = FileDiscovery(sys.argv[1] + "/kv")
    close = SystemStatusServer.close

    def told(self, timeout=5.0):
        os.write(1, f"{len(os.listdir(sys.argv[1] + '/kv/v1/mdc'))} cards\\n".encode())
        close(self, timeout)

    SystemStatusServer.close = told
    settings = Settings(self_host_metadata=True, system_host="127.0.0.1", system_port=0)
    runtime = DistributedRuntime(settings, discovery=discovery)
    LocalModel.load(sys.argv[1] + "/m").attach(runtime.endpoint("a.b.c"))
    assert len(discovery.records(Bucket.MODELS)) == 1
"""


def test_exit_withdraws_before_the_server_ends(run_script: Any, tmp_path: Any) -> None:
    """At the interpreter's exit, too, the card goes first, whichever object was made first."""
    result = run_script(AT_EXIT.replace("\\\\n", "\\n"), str(tmp_path))

    assert (result.stdout.splitlines()[:1], result.returncode) == (["0 cards"], 0), result.stderr


# ------------------------------------------------------------------ reaching itself


def test_worker_that_cannot_reach_itself_warns_once(
    start_runtime: Any, model_dir: Any, spy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An address that does not lead back here is only a warning, and only for the first model."""
    runtime = start_runtime(self_host_metadata=True, advertise_url="http://127.0.0.1:9")
    for number in range(3):
        LocalModel.load(model_dir(), name=f"m{number}").attach(runtime.endpoint(f"ns.comp.ep{number}"))

    assert caplog.text.count("cannot fetch its own") == 1
    assert len(spy.cards()) == 3


def test_address_of_somebody_else_warns(
    start_runtime: Any, model_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An address at which somebody else answers is noticed."""
    with SystemStatusServer(MetadataArtifactRegistry()) as other:
        runtime = start_runtime(self_host_metadata=True, advertise_url=f"http://{other.address}")
        LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.ep"))

    assert "status 404" in caplog.text


def test_worker_that_reaches_itself(
    start_runtime: Any, model_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all is well there is no warning."""
    runtime = start_runtime(self_host_metadata=True)
    LocalModel.load(model_dir()).attach(runtime.endpoint("ns.comp.ep"))

    assert "cannot fetch" not in caplog.text


def test_each_base_url_is_checked(start_runtime: Any) -> None:
    """One base URL that leads nowhere says nothing of another, and is tried once."""
    runtime, asked = start_runtime(), []

    def check(url: str, answer: bool) -> bool:
        return runtime.reachable(url, lambda: asked.append(url) or answer)

    assert [check("http://a", False), check("http://a", True), check("http://b", True)] == [
        False,
        False,
        True,
    ]
    assert asked == ["http://a", "http://b"]


def test_argument_is_blamed_for_itself(start_runtime: Any) -> None:
    """A base URL that came as an argument is called so in the error."""
    with pytest.raises(SettingsError, match="advertise_url='ftp://x'") as caught:
        start_runtime().base_url("ftp://x")

    assert caught.value.variable == "advertise_url"


def test_models_that_come_and_go_leave_no_exit_hooks(runtime: Any, model_dir: Any) -> None:
    """Attaching a thousand adapters in turn takes no memory for good."""
    model = LocalModel.load(model_dir(), name="m")
    model.attach(runtime.endpoint("a.b.c")).detach()
    before = atexit._ncallbacks()
    for _ in range(5):
        model.attach(runtime.endpoint("a.b.c")).detach()

    assert atexit._ncallbacks() == before


def test_folder_of_a_runtime_that_had_a_registry_of_its_own(tmp_path: Path) -> None:
    """What its processes agreed in `shared_dir` keeps no registry out of it."""
    folder = str(tmp_path / "shared")
    settings = Settings(shared_dir=folder)
    with contextlib.closing(DistributedRuntime(settings, registry=MetadataArtifactRegistry())) as first:
        assert os.listdir(folder) != []
    with contextlib.closing(DistributedRuntime(settings)) as second:
        assert (second.metadata_artifacts.shared, second.instance_id) == (folder, first.instance_id)
