"""A router of a build for GPUs, on a node that has none: vLLM finds no device there, and the front end needs none."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio
import httpx
from vllm import platforms
from vllm.platforms.interface import UnspecifiedPlatform

platforms._current_platform = UnspecifiedPlatform()  # what such a build comes to

from xloom.router.dispatch import Dispatcher
from xloom.settings import load_settings
from xloom.vllm.front_end import open_front_end

async def main():
    async def nobody():
        return []

    dispatcher = Dispatcher(nobody, "token", "router-1", ready_timeout_s=0.5)
    front_end = await open_front_end(load_settings(None), dispatcher)
    dispatcher.start()
    transport = httpx.ASGITransport(app=front_end.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        answer = await client.post("/v1/chat/completions", json=body, timeout=30)
    print(answer.json()["error"]["code"])
    front_end.shutdown()
    await dispatcher.close()

asyncio.run(main())
"""


def test_a_router_on_a_node_without_a_gpu_opens_and_sends_requests_on() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["no_replica_ready"], done.stderr[-2000:]
