"""Our worker hosts its metadata, and the real frontend, which knows nothing of us, loads the models."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from selfhost import (
    Checksum,
    DistributedRuntime,
    LocalModel,
    ModelDeploymentCard,
    ModelInput,
    ModelType,
    Settings,
    WorkerType,
    register_model,
)

HOSTILE_NAMES = [
    "question?.json",
    "hash#mark.json",
    "percent%41.json",
    "percent%2541.json",
    "100%.json",
    "two  spaces .json",
    "quote\"s'.json",
    "tiny-模型-é.json",
    "angle<>{}`^|.json",
    "semi;colon&amp=1+2,3@4:5!$*()~[].json",
]
SLOT_FILES = [
    "model_info.hf_config_json",
    "tokenizer.hf_tokenizer_json",
    "prompt_formatter.hf_tokenizer_config_json",
    "chat_template_file.hf_chat_template.file",
    "gen_config.hf_generation_config_json",
]
OTHER_TEMPLATE = b"{% for message in messages %}{{ message['content'] }};{% endfor %}"


@pytest.fixture
def system_host() -> str:
    """Return the address that the worker listens on."""
    return "127.0.0.1"


@pytest.fixture
def runtime(file_kv: Path, system_host: str) -> Iterator[DistributedRuntime]:
    """Run our worker's runtime in this process, on loopback and the test's file store."""
    settings = Settings(self_host_metadata=True, system_host=system_host, system_port=0, file_kv=str(file_kv))
    with DistributedRuntime(settings) as started:
        yield started


@pytest.fixture
def attach(runtime: DistributedRuntime) -> Callable[..., LocalModel]:
    """Register a chat model on an endpoint of our runtime."""

    def register(path: Path, name: str, endpoint: str = "ns.comp.ep", **more: Any) -> LocalModel:
        return register_model(
            ModelInput.Tokens,
            ModelType.Chat | ModelType.Completions,
            runtime.endpoint(endpoint),
            str(path),
            name,
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=16,
            **more,
        )

    return register


def downloaded(frontend: Any, model: LocalModel) -> dict[str, bytes]:
    """Return what the frontend keeps of `model`, having checked it against the card, file by file."""
    cached: dict[str, bytes] = frontend.cached(model.card.slug, model.card.mdcsum)
    promised = {
        urllib.parse.urlsplit(file.url).path.rpartition("/")[2]: (file.size, file.checksum)
        for file in model.files
    }
    assert {name: (len(body), Checksum.of(body)) for name, body in cached.items()} == promised
    assert len(promised) == len(list(model.card.iter_metadata_files()))
    return {urllib.parse.unquote(name): body for name, body in cached.items()}


def fetch(url: str) -> bytes:
    """Return what is served at `url`."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().read()
    finally:
        connection.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Return name and content of every file in a flat directory."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_base_model_and_adapter_are_listed(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """A base model and an adapter on it are served to a frontend that was there before them."""
    folder = model_dir()
    frontend = dynamo_frontend()
    base = attach(folder, "my-org/Tiny Model")
    adapter = attach(folder, "my-adapter", lora_name="my-adapter", base_model_path=str(folder))
    frontend.wait_for("my-org/Tiny Model")
    frontend.wait_for("my-adapter")

    assert downloaded(frontend, base) == contents(folder)
    assert frontend.cache_dir("my-org_tiny_model", base.card.mdcsum).is_dir()
    # The real frontend lets an adapter use its base model's pipeline and never fetches the adapter's files.
    assert frontend.cached(adapter.card.slug, adapter.card.mdcsum) == {}
    assert {file.filename: fetch(file.url) for file in adapter.files} == contents(folder)


def test_frontend_that_comes_later_loads_too(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """A frontend started after the registration finds the model, and loads it from us."""
    model = attach(model_dir(), "early")
    frontend = dynamo_frontend()
    frontend.wait_for("early")

    assert downloaded(frontend, model) == contents(model_dir())


@pytest.mark.parametrize("system_host", ["::1"])
def test_ipv6(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel], system_host: str
) -> None:
    """A worker that listens on IPv6 publishes bracketed addresses, and the frontend fetches from them."""
    try:
        socket.create_server((system_host, 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    frontend = dynamo_frontend()
    model = attach(model_dir(), "six")
    frontend.wait_for("six")

    assert model.files[0].url.startswith("http://[::1]:")
    assert downloaded(frontend, model) == contents(model_dir())


def test_edited_and_deleted_files_are_served_as_registered(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """What happens to the directory after the registration changes nothing for frontends."""
    folder = model_dir(files={"large.txt": b"0123456789abcdef" * 1_000_000})
    before = contents(folder)
    model = attach(folder, "pinned")
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text("{}")
    frontend = dynamo_frontend()
    frontend.wait_for("pinned")

    assert downloaded(frontend, model) == before


def test_detached_model_is_gone(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """Detaching withdraws one model at once and leaves the other alone."""
    frontend = dynamo_frontend()
    leaving = attach(model_dir("a"), "leaving", endpoint="ns.comp.a")
    attach(model_dir("b"), "staying", endpoint="ns.comp.b")
    frontend.wait_for("leaving")
    frontend.wait_for("staying")

    leaving.detach()
    frontend.wait_gone("leaving")

    assert frontend.models() == ["staying"]


def test_detached_adapter_leaves_its_base(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """An adapter comes and goes while its base model stays listed."""
    folder = model_dir()
    frontend = dynamo_frontend()
    attach(folder, "base")
    adapter = attach(folder, "adapter", lora_name="adapter", base_model_path=str(folder))
    frontend.wait_for("adapter")

    adapter.detach()
    frontend.wait_gone("adapter")

    assert frontend.models() == ["base"]


def test_closed_runtime_takes_everything_along(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel], runtime: DistributedRuntime
) -> None:
    """Closing the runtime withdraws models that nobody detached."""
    frontend = dynamo_frontend()
    attach(model_dir(), "forgotten")
    frontend.wait_for("forgotten")

    runtime.close()
    frontend.wait_gone("forgotten")

    assert frontend.models() == []


def test_one_name_on_two_endpoints_with_two_templates(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """Two endpoints of one process serve different files under one slug, and both models load."""
    frontend = dynamo_frontend()
    plain, other = model_dir("plain"), model_dir("other", {"chat_template.jinja": OTHER_TEMPLATE})
    first = attach(plain, "shared", endpoint="ns.prefill.generate")
    second = attach(other, "shared", endpoint="ns.decode.generate")
    frontend.wait_until("both load", lambda: all(map(frontend_has(frontend), (first, second))), 15)

    assert downloaded(frontend, first) == contents(plain)
    assert downloaded(frontend, second) == contents(other)
    assert frontend.models() == ["shared"]


def frontend_has(frontend: Any) -> Callable[[LocalModel], bool]:
    """Return a function that tells whether the frontend has every file of a model."""
    return lambda model: (
        len(frontend.cached(model.card.slug, model.card.mdcsum))
        == len(list(model.card.iter_metadata_files()))
    )


def test_names_that_share_a_slug(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]
) -> None:
    """`a/b` and `a_b` have the same slug and different files; each is served its own."""
    frontend = dynamo_frontend()
    plain, other = model_dir("plain"), model_dir("other", {"chat_template.jinja": OTHER_TEMPLATE})
    first = attach(plain, "a/b", endpoint="ns.one.generate")
    second = attach(other, "a_b", endpoint="ns.two.generate")
    frontend.wait_for("a/b")
    frontend.wait_for("a_b")

    assert first.card.slug == second.card.slug == "a_b"
    assert downloaded(frontend, first) == contents(plain)
    assert downloaded(frontend, second) == contents(other)


def test_hostile_file_names(dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel]) -> None:
    """File names that make the real worker's models unloadable are served as they are."""
    folder = model_dir(files={name: f"the file {name}".encode() for name in HOSTILE_NAMES})
    frontend = dynamo_frontend()
    model = attach(folder, "hostile")
    frontend.wait_for("hostile")

    assert downloaded(frontend, model) == contents(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "other.jinja", "sp ace?.jinja"])
def test_custom_template(
    dynamo_frontend: Any, model_dir: Any, attach: Callable[..., LocalModel], tmp_path: Path, name: str
) -> None:
    """A custom template loads, also one with the base name of another file of the card."""
    template = tmp_path / "templates" / name
    template.parent.mkdir()
    template.write_bytes(OTHER_TEMPLATE)
    folder = model_dir()
    frontend = dynamo_frontend()
    model = attach(folder, "custom", custom_template_path=str(template))
    frontend.wait_for("custom")

    files = downloaded(frontend, model)
    assert OTHER_TEMPLATE in files.values()
    assert contents(folder).items() <= files.items()


@pytest.mark.parametrize("lora", [None, "adapter"])
def test_our_card_is_the_real_workers(
    dynamo_worker: Any,
    dynamo_mdcsum: Callable[[str], str],
    model_dir: Any,
    attach: Callable[..., LocalModel],
    read_published_cards: Callable[[Path], dict[str, str]],
    runtime: DistributedRuntime,
    tmp_path: Path,
    lora: Optional[str],
) -> None:
    """For one directory, the real worker and ours publish the same card, but for where the files are."""
    extras = {"LICENSE": b"free", "zeta.txt": b"", "alpha.txt": b"a"}
    folder = model_dir(files={**extras, "README.md": b"not harvested"})
    store = tmp_path / "their store"
    store.mkdir()
    their_worker = dynamo_worker(
        {"path": str(folder), "name": "org/Model", "loras": [lora] if lora else []}, store=store
    )
    attach(folder, "org/Model")
    if lora:
        attach(folder, lora, lora_name=lora, base_model_path=str(folder))

    published = read_published_cards(Path(runtime.settings.file_kv))[lora or "org/Model"]
    ours = ModelDeploymentCard.from_json(published)
    theirs = ModelDeploymentCard.from_json(their_worker.cards()[lora or "org/Model"])
    assert ours.mdcsum == dynamo_mdcsum(their_worker.cards()[lora or "org/Model"]) == dynamo_mdcsum(published)
    assert {difference.field for difference in ours.diff(theirs)} == {
        f"{place}.path" for place in (*SLOT_FILES, *map("extra_files[{}]".format, extras))
    }
    assert list(json.loads(published)) == list(json.loads(their_worker.cards()[lora or "org/Model"]))
