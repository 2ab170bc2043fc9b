"""What stands between a client and a streaming ASGI app: Serve's proxy, HAProxy with direct ingress, or uvicorn alone.

64 streams of 100 chunks from an app that does nothing else; run as `python -m benchmarks.http_path`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

STREAMS, CHUNKS, ROUNDS = 64, 100, 5
BODY = b'data: {"choices":[{"index":0,"text":" token"}]}\n\n'
PATHS: dict[str, dict[str, str]] = {
    "proxy": {},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "own uvicorn": {},
}


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """The app: one chunk at a time, as tokens come."""
    if scope["type"] != "http":
        return
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": BODY, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


class App:
    """The same as an object: Serve takes a plain function for a builder of apps."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await stream(scope, receive, send)


async def _one(port: int) -> float:
    """One stream over a raw socket; seconds to its first chunk."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    first = 0.0
    seen = 0
    while data := await reader.read(1 << 16):
        seen += data.count(b"data: ")
        if seen and not first:
            first = time.perf_counter() - started
    writer.close()
    if seen != CHUNKS:
        raise RuntimeError(f"{seen} chunks instead of {CHUNKS}")
    return first


async def _load(port: int) -> tuple[float, float]:
    """Median chunks a second over the rounds, and milliseconds to the first chunk of a lone stream."""
    for attempt in range(200):
        try:
            await _one(port)
            break
        except (OSError, RuntimeError):
            if attempt == 199:
                raise
            await asyncio.sleep(0.2)
    lone = statistics.median([await _one(port) for _ in range(30)])
    rates = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        await asyncio.gather(*(_one(port) for _ in range(STREAMS)))
        rates.append(STREAMS * CHUNKS / (time.perf_counter() - started))
    return statistics.median(rates), lone * 1000


def _serve(path: str, port: int) -> None:
    """In a process of its own, since Serve reads these variables as it is imported."""
    import ray
    from ray import serve

    folder = tempfile.mkdtemp(prefix="hp-", dir="/tmp")
    # Token authentication would leave a token in the home folder.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    if path == "own uvicorn":
        serve.start(proxy_location="Disabled")

        class Own:
            async def __init__(self) -> None:  # type: ignore[misc]
                from xloom.router.listener import HttpListener
                from xloom.settings import LimitSettings

                self._listener = HttpListener(stream, "127.0.0.1", port, "http_path", LimitSettings())
                self._listener.server.config.lifespan = "off"
                await self._listener.start()

        serve.run(serve.deployment(Own, max_ongoing_requests=1000).bind(), route_prefix=None)
    else:
        serve.start(http_options={"host": "127.0.0.1", "port": port})

        @serve.deployment(max_ongoing_requests=1000)
        @serve.ingress(App())
        class Behind:
            pass

        serve.run(Behind.bind())
    rate, lone = asyncio.run(_load(port))
    print(f"RESULT {rate:.0f} {lone:.2f}", flush=True)
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Each path in turn, and a table of what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=list(PATHS))
    parser.add_argument("--port", type=int, default=8321)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve(arguments.serve, arguments.port)
        return
    print("| path | chunks/s, 64 streams | first chunk, 1 stream |\n|---|---:|---:|")
    for path, variables in PATHS.items():
        command = [sys.executable, "-m", "benchmarks.http_path", "--serve", path, "--port", str(arguments.port)]
        lines: list[str] = []
        for _ in range(3):  # on a busy machine Ray's own start may time out
            found = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
            lines = [line for line in found.stdout.splitlines() if line.startswith("RESULT")]
            if lines:
                break
        if not lines:
            print(f"| {path} | failed: {found.stderr.strip()[-1500:]} | |")
            continue
        _, rate, lone = lines[0].split()
        print(f"| {path} | {rate} | {lone} ms |", flush=True)


if __name__ == "__main__":
    main()
