"""The peers themselves: a hand-written record and a plain file server, without a line of this package.

If these fail, the harness or the real Dynamo is at fault, not the worker under test.
"""

from __future__ import annotations

import functools
import http.server
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest

SLOTS = {
    "model_info": ("hf_config_json", "config.json"),
    "tokenizer": ("hf_tokenizer_json", "tokenizer.json"),
    "prompt_formatter": ("hf_tokenizer_config_json", "tokenizer_config.json"),
    "gen_config": ("hf_generation_config_json", "generation_config.json"),
}
INSTANCE = 0xABCDEF


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def foreign_url(model_dir: Any) -> Iterator[str]:
    """Serve a model directory with the standard library's file server."""
    handler = functools.partial(QuietHandler, directory=str(model_dir()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def checked(folder: Path, url: str, name: str) -> dict[str, str]:
    """Return one file as a card names it."""
    digest = blake3.blake3((folder / name).read_bytes()).hexdigest()
    return {"path": f"{url}/{name}", "checksum": f"blake3:{digest}"}


def hand_written_card(folder: Path, url: str) -> dict[str, Any]:
    """Return a card of the demo model, as plain JSON values."""
    slots = {slot: {variant: checked(folder, url, name)} for slot, (variant, name) in SLOTS.items()}
    template = checked(folder, url, "chat_template.jinja")
    return {
        "display_name": "foreign/model",
        "slug": "foreign_model",
        **slots,
        "chat_template_file": {"hf_chat_template": {"is_custom": False, "file": template}},
        "context_length": 512,
        "kv_cache_block_size": 16,
        "migration_limit": 0,
        "model_type": "Chat | Completions",
        "model_input": "Tokens",
        "worker_type": "aggregated",
    }


def hand_computed_mdcsum(card: dict[str, Any]) -> str:
    """Return the hash by which Dynamo knows that card."""
    template = card["chat_template_file"]["hf_chat_template"]["file"]
    files = [card["model_info"], card["tokenizer"], card["prompt_formatter"]]
    checksums = [next(iter(slot.values()))["checksum"] for slot in files]
    last = card["gen_config"]["hf_generation_config_json"]["checksum"]
    text = "".join([card["display_name"], *checksums, template["checksum"], last])
    numbers = struct.pack(">IIBI", card["context_length"], card["kv_cache_block_size"], 4, 0)
    return blake3.blake3(text.encode() + numbers).hexdigest()


def publish_by_hand(file_kv: Path, card: dict[str, Any]) -> list[Path]:
    """Write the two records of an instance with a model; return their paths."""
    owner = {"namespace": "foreign", "component": "worker", "endpoint": "generate", "instance_id": INSTANCE}
    records = {
        "instances": {"type": "Endpoint", **owner, "transport": {"tcp": "127.0.0.1:9/x"}},
        "mdc": {"type": "Model", **owner, "card_json": card},
    }
    paths = []
    for bucket, record in records.items():
        folder = file_kv / "v1" / bucket
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / ".tmp_0123456789abcdef"
        staged.write_text(json.dumps(record))
        paths.append(staged.rename(folder / f"foreign%2Fworker%2Fgenerate%2F{INSTANCE:x}"))
    return paths


def test_frontend_loads_a_hand_written_card(
    dynamo_frontend: Any, file_kv: Path, model_dir: Any, foreign_url: str
) -> None:
    """Anybody who writes two records and serves the files is listed; the cache is named by the mdcsum."""
    folder = model_dir()
    card = hand_written_card(folder, foreign_url)
    frontend = dynamo_frontend()
    records = publish_by_hand(file_kv, card)
    frontend.wait_for("foreign/model")

    cached = frontend.cached("foreign_model", hand_computed_mdcsum(card))
    assert cached == {path.name: path.read_bytes() for path in folder.iterdir()}

    for record in records:
        record.unlink()
    frontend.wait_gone("foreign/model")


def test_real_worker_publishes_a_card(dynamo_worker: Any, model_dir: Any) -> None:
    """The real worker registers a base model and an adapter, and hosts their files."""
    worker = dynamo_worker({"path": str(model_dir()), "name": "base", "loras": ["adapter"]})

    cards = {name: json.loads(text) for name, text in worker.cards().items()}
    assert sorted(cards) == ["adapter", "base"]
    assert cards["base"]["tokenizer"]["hf_tokenizer_json"]["path"].startswith("http://127.0.0.1:")
    assert cards["adapter"]["lora"] == {"name": "adapter"}


def test_real_worker_and_frontend_understand_each_other(
    dynamo_frontend: Any, dynamo_worker: Any, model_dir: Any
) -> None:
    """The reference pair works with the demo model, so a failure with our worker is our worker's."""
    frontend = dynamo_frontend()
    dynamo_worker({"path": str(model_dir()), "name": "base", "loras": ["adapter"]})

    frontend.wait_for("base")
    frontend.wait_for("adapter")
