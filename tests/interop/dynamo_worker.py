"""The real Dynamo worker, hosting its models' metadata; run by an interpreter that has Dynamo 1.6.1.

    python dynamo_worker.py '[{"path": DIR, "name": NAME, "endpoint": "ns.comp.ep", "loras": [NAME],
                               "custom_template": PATH}]' [--spin]

Only path and name are needed. `--spin` adds a thread that spins in Python, counting its turns: a host
that hogs the interpreter; the count so far is printed for every line read from standard input. Where
Dynamo listens and what it uses for discovery is set by its own environment variables. Runs until killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime


async def generate(request: Any, context: Any = None) -> AsyncIterator[dict[str, Any]]:
    """Answer any request with one token."""
    yield {"token_ids": [1], "finish_reason": "stop"}


async def register(endpoint: Any, model: dict[str, Any], lora: str | None = None) -> None:
    """Register a base model, or one adapter on it."""
    adapter = {"lora_name": lora, "base_model_path": model["path"]} if lora else {}
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        model["path"],
        lora or model["name"],
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=16,
        custom_template_path=model.get("custom_template"),
        **adapter,
    )
    print("registered", lora or model["name"], flush=True)


async def serve(models: list[dict[str, Any]]) -> None:
    """Register every model on its endpoint and serve until killed."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    endpoints = {}
    for model in models:
        name = model.get("endpoint", "ns.comp.ep")
        endpoints[name] = endpoints.get(name) or runtime.endpoint(name)
        await register(endpoints[name], model)
        for lora in model.get("loras", ()):
            await register(endpoints[name], model, lora)
    await asyncio.gather(*(endpoint.serve_endpoint(generate) for endpoint in endpoints.values()))


def spin() -> None:
    """Hog the interpreter for ever, and tell the turns when asked."""
    turns = [0]

    def tell() -> None:
        for _ in sys.stdin:
            print("turns", turns[0], flush=True)

    threading.Thread(target=tell, daemon=True).start()
    while True:
        turns[0] += 1


if __name__ == "__main__":
    if "--spin" in sys.argv:
        threading.Thread(target=spin, daemon=True).start()
    asyncio.run(serve(json.loads(sys.argv[1])))
