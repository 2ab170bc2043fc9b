"""One engine for `benchmarks.rows` and `benchmarks.unused`, in a process of its own: versions of xloom can take turns.

Reads lines of JSON from standard input, the adapters first and then jobs, and answers each with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from xloom.engines.registry import load_backend
from xloom.protocol import AdapterRef, TokenRequest
from xloom.settings import EngineSettings, ModelSettings


class Driver:
    """Sends bursts of requests to one engine and waits for them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._left: set[str] = set()
        self._first: dict[str, float] = {}
        self._times: dict[str, list[float]] = {}  # of each request's tokens
        self._decoding: float | None = None  # when the last first token came
        self._done = asyncio.Event()
        self._count = self._count_now = 0
        self._pump = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for step in self._backend.steps():
            now = time.perf_counter()
            for chunk in step:
                if chunk.token_ids:
                    self._first.setdefault(chunk.request_id, now)
                    self._times.setdefault(chunk.request_id, []).extend([now] * len(chunk.token_ids))
                if chunk.finish_reason is not None:
                    self._left.discard(chunk.request_id)
            if self._decoding is None and len(self._first) == self._count_now:
                self._decoding = now
            if not self._left:
                self._done.set()

    async def run(self, job: dict[str, Any], refs: dict[str, AdapterRef | None], vocabulary: int) -> dict[str, float]:
        """A burst of `job["kinds"]`: tokens/s over all, and by kind tokens/s of a row and its time to first token."""
        draw = random.Random(job["seed"])
        requests = []
        for kind, count in job["kinds"].items():
            for _ in range(count):
                self._count += 1
                prompt = [draw.randrange(5, vocabulary - 5) for _ in range(job["prompt"])]
                sampling = {"temperature": 0.0, "max_tokens": job["new"], "ignore_eos": True}
                requests.append((kind, TokenRequest(f"rows-{self._count}", prompt, sampling, refs[kind])))
        draw.shuffle(requests)
        self._first, self._times, self._decoding = {}, {}, None
        self._count_now = len(requests)
        self._left = {request.request_id for _, request in requests}
        self._done.clear()
        start = time.perf_counter()
        for _, request in requests:
            await self._backend.submit(request)
        waiting = asyncio.create_task(self._done.wait())
        await asyncio.wait({waiting, self._pump}, return_when=asyncio.FIRST_COMPLETED)
        if self._pump.done():
            waiting.cancel()
            self._pump.result()
        found = {"all": len(requests) * job["new"] / (time.perf_counter() - start)}
        assert self._decoding is not None
        for kind in job["kinds"]:
            ids = [request.request_id for each, request in requests if each == kind]
            steps = [_steps([time for time in self._times[each] if time >= self._decoding]) for each in ids]
            found[f"row {kind}"] = 1 / statistics.median(step for step in steps if step)
            found[f"first {kind}"] = 1e3 * statistics.median(self._first[each] - start for each in ids)
        return found

    async def close(self) -> None:
        self._pump.cancel()
        await self._backend.close()


def _steps(times: list[float]) -> float:
    """Seconds a token, once no prompt is left: the mean without the quickest and slowest tenth: no stalls."""
    each = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    cut = len(each) // 10
    return statistics.fmean(each[cut : len(each) - cut]) if each else 0.0


async def serve(options: dict[str, Any]) -> None:
    """Load the engine, take its adapters, then answer jobs until standard input ends."""
    engine = EngineSettings(**options["engine"])
    model = ModelSettings(source=options["model"])
    backend = await load_backend("vllm").load(model, engine, xlora=options["xlora"], max_lora_rank=options["rank"])
    loop = asyncio.get_running_loop()
    refs: dict[str, AdapterRef | None] = {"base": None}
    given = await loop.run_in_executor(None, sys.stdin.readline)
    for name, (kind, folder) in json.loads(given or "{}").items():
        refs[name] = AdapterRef(name, "bench", kind)
        await backend.add_adapter(refs[name], Path(folder))
    driver = Driver(backend)
    say({"pages": backend.stats().kv_pages_total})
    with contextlib.suppress(EOFError):
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            say(await driver.run(json.loads(line), refs, options["vocabulary"]))
    await driver.close()


def say(answer: dict[str, Any]) -> None:
    """One line to the one who asks."""
    print("rows:" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
