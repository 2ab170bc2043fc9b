"""An `LLMBackend` without a model and a store without Ray, for tests of what is around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from xloom.adapters.manifest import Entry, Manifest, generation_of
from xloom.adapters.residency import Refusal
from xloom.engines.base import Capabilities, Device, LLMBackend
from xloom.protocol import AdapterRef, EngineStats, TokenChunk, TokenRequest, XloomError

PAGE = 16  # tokens


class FakeBackend(LLMBackend):
    """Each token is the sum of all before it, modulo `vocab`: a replay of prompt and tokens so far goes on alike.

    With `manual`, a step happens only when the test calls `step`.
    """

    def __init__(self, vocab: int = 97, step_s: float = 0.0, pages: int = 64, manual: bool = False) -> None:
        self.vocab, self.step_s, self.pages, self.manual = vocab, step_s, pages, manual
        self.requests: dict[str, TokenRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.adapters: dict[str, AdapterRef] = {}
        self.aborted: list[str] = []
        self.refused: dict[str, Exception] = {}  # adapter name -> the error its load raises
        self.tries: list[str] = []  # names of adapters, as their loads began
        self.removing: asyncio.Event | None = None  # a removal waits for it
        self.max_running = 1 << 30
        self.closed = False
        self._death: BaseException | None = None
        self._wake = asyncio.Event()
        self._manual_steps = 0

    @classmethod
    def capabilities(cls) -> Capabilities:
        return Capabilities(paged_attention=True, xlora=("cpu",), devices=("cpu",))

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def device(cls) -> Device:
        return "cpu"

    @classmethod
    async def load(cls, model: Any, engine: Any, *, xlora: bool, max_lora_rank: int, isq: Any = None) -> FakeBackend:
        return cls(**engine.extra_args)

    def die(self, error: BaseException) -> None:
        """The engine stops, as if its process had been killed."""
        self._death = error
        self._wake.set()

    def step(self, times: int = 1) -> None:
        """Let that many engine steps happen."""
        self._manual_steps += times
        self._wake.set()

    async def submit(self, request: TokenRequest) -> None:
        if request.prompt_token_ids and max(request.prompt_token_ids) >= self.vocab * 1000:
            raise XloomError("bad_token", "A token is out of the vocabulary.", status=400)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = list(request.prompt_token_ids)
        self._wake.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self.requests.pop(request_id, None) is not None:
                self.aborted.append(request_id)
                del self.tokens[request_id]

    async def steps(self) -> AsyncIterator[list[TokenChunk]]:
        while True:
            ready = bool(self.requests) and (not self.manual or self._manual_steps > 0)
            if self._death is not None:
                raise self._death
            if not ready:
                self._wake.clear()
                await self._wake.wait()
                continue
            if self.manual:
                self._manual_steps -= 1
            else:
                await asyncio.sleep(self.step_s)
            yield [self._next(request) for request in list(self.requests.values())[: self.max_running]]

    def _next(self, request: TokenRequest) -> TokenChunk:
        tokens = self.tokens[request.request_id]
        token = (sum(tokens) + len(request.adapter.name if request.adapter else "")) % self.vocab
        tokens.append(token)
        produced = len(tokens) - len(request.prompt_token_ids)
        finished = produced >= request.sampling.get("max_tokens", 16)
        if finished:
            del self.requests[request.request_id], self.tokens[request.request_id]
        return TokenChunk(request.request_id, [token], "length" if finished else None)

    def stats(self) -> EngineStats:
        running = min(len(self.requests), self.max_running)
        used = sum(-(-len(tokens) // PAGE) for tokens in self.tokens.values())
        return EngineStats(running, len(self.requests) - running, used, self.pages, adapters=sorted(self.adapters))

    async def add_adapter(self, ref: AdapterRef, path: Path) -> None:
        self.tries.append(ref.name)
        if ref.name in self.refused:
            raise self.refused[ref.name]
        self.adapters[ref.key] = ref

    async def remove_adapter(self, ref: AdapterRef) -> None:
        if self.removing is not None:
            await self.removing.wait()
        self.adapters.pop(ref.key, None)

    async def check_health(self) -> None:
        if self._death is not None:
            raise self._death

    async def close(self) -> None:
        self.closed = True


def expected_tokens(prompt: list[int], count: int, vocab: int = 97, adapter: str = "") -> list[int]:
    """What the fake engine makes of a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(tokens) + len(adapter)) % vocab)
    return tokens[len(prompt) :]


class FakeStore:
    """The store's desired state, without Ray."""

    def __init__(self) -> None:
        self.manifest = Manifest(1)
        self.files: dict[str, dict[str, bytes]] = {}
        self.reports: list[tuple[list[str], dict[str, Refusal]]] = []
        self.away = False
        self._changed = asyncio.Event()

    def put(self, name: str, content: bytes) -> Entry:
        files = {"adapter_model.safetensors": content}
        entry = Entry(name, "lora", generation_of(files), 8, (), len(content), "test")
        self.files[entry.generation] = files
        self.set(self.manifest.with_entry(entry))
        return entry

    def set(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._changed.set()

    async def desired(self, known_version: int, timeout_s: float) -> Manifest:
        if self.away:
            raise XloomError("store_unavailable", "away", status=503)
        while self.manifest.version == known_version:
            self._changed.clear()
            await self._changed.wait()
        return self.manifest

    async def fetch(self, generation: str) -> dict[str, bytes]:
        return self.files[generation]

    async def report(self, replica_id: str, node_id: str, resident: list[str], failed: Any = None) -> None:
        if self.away:
            raise XloomError("store_unavailable", "away", status=503)
        self.reports.append((resident, failed or {}))

    async def forget(self, replica_id: str) -> None:
        self.reports.append(([], {}))


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until it holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)
