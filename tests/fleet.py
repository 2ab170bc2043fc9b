"""A dispatcher and replicas with a fake engine, over real sockets in one process."""

from __future__ import annotations

from typing import Any

from tests.fakes import FakeBackend, until
from xloom.protocol import AdapterRef, TokenChunk, TokenRequest, XloomError
from xloom.replica.server import ReplicaServer
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher

TOKEN = "secret"


class Fleet:
    """Replicas that come and go, a dispatcher over them, and what it handed back."""

    def __init__(self, ready_timeout_s: float = 10.0, silent_after_s: float = 10.0) -> None:
        self.infos: dict[str, ReplicaInfo] = {}
        self.backends: dict[str, FakeBackend] = {}
        self.servers: dict[str, ReplicaServer] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.failed: dict[str, XloomError] = {}
        self._silent_after_s = silent_after_s
        self.dispatcher = Dispatcher(
            self._discover, TOKEN, "router", ready_timeout_s=ready_timeout_s, silent_after_s=silent_after_s
        )
        self.dispatcher.on_tokens = self._take
        self.dispatcher.on_failed = self.failed.__setitem__

    async def _discover(self) -> list[ReplicaInfo]:
        return list(self.infos.values())

    def _take(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            self.tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
            if chunk.finish_reason:
                self.finished[chunk.request_id] = chunk.finish_reason

    async def add(
        self, name: str, token: str = TOKEN, kind: type[FakeBackend] = FakeBackend, **options: Any
    ) -> FakeBackend:
        backend = self.backends[name] = kind(**options)
        server = self.servers[name] = ReplicaServer(backend, name, token, silent_after_s=self._silent_after_s)
        host, port = await server.start("127.0.0.1")
        self.infos[name] = ReplicaInfo(name, "node", host, port, 1)
        self.dispatcher.directory.poll_now()
        return backend

    async def lose(self, name: str) -> None:
        self.infos.pop(name)
        await self.servers.pop(name).close()

    async def close(self) -> None:
        await self.dispatcher.close()
        for server in self.servers.values():
            await server.close()

    def holder(self) -> str:
        return next(name for name, backend in self.backends.items() if backend.requests)

    async def connected(self, count: int) -> None:
        await until(lambda: len(self.dispatcher.directory.links) == count)


def request(
    name: str = "r", prompt: list[int] | None = None, adapter: AdapterRef | None = None, **sampling: Any
) -> TokenRequest:
    return TokenRequest(name, prompt or [1, 2, 3], {"max_tokens": 8, **sampling}, adapter)
