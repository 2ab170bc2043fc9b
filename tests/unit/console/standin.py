"""An endpoint with the page and an API of a script: for what a real one says seldom."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse

from xloom.router.console import attach_console

ADAPTERS = ["code", "docs"]


@dataclass
class StandIn:
    """What it answers next."""

    url: str = ""
    models: list[dict[str, Any]] = field(default_factory=list)
    status: Response | dict[str, Any] | None = None  # None: 404
    answer: Response | bytes = b""  # a whole response, or the bytes of a stream
    chunk: int = 1_000_000  # bytes of the stream sent at once
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies

    def reset(self) -> None:
        """As at the start."""
        kinds = {"base": "base", **dict.fromkeys(ADAPTERS, "lora"), "blend": "xlora"}
        self.models = [{"id": name, "kind": kind} for name, kind in kinds.items()]
        self.models[-1]["adapters"] = ADAPTERS
        self.status, self.answer, self.chunk, self.asked = None, b"", 1_000_000, []

    def app(self) -> FastAPI:
        """Its application."""
        app = FastAPI()
        attach_console(app)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": self.models}

        @app.get("/xloom/status")
        async def status() -> Response:
            if self.status is None:
                return Response(status_code=404)
            return self.status if isinstance(self.status, Response) else JSONResponse(self.status)

        @app.post("/v1/chat/completions")
        async def chat(body: dict[str, Any]) -> Response:
            self.asked.append(body)
            if isinstance(self.answer, Response):
                return self.answer
            return StreamingResponse(self._pieces(self.answer), media_type="text/event-stream")

        return app

    async def _pieces(self, whole: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(whole), self.chunk):
            yield whole[start : start + self.chunk]
            await asyncio.sleep(0)


def stream(
    tokens: list[str], gates: list[list[float]] | None, *, text: str | None = None, end: str = "data: [DONE]\n\n"
) -> bytes:
    """A streamed answer: a chunk a token, then the mixture with the finish reason, then `end`. `text`: what the
    endpoint makes of the tokens, if that is not just their sum."""
    rest = "".join(tokens) if text is None else text
    events: list[dict[str, Any]] = []
    for i, token in enumerate(tokens):
        size = len(rest) if i == len(tokens) - 1 else len(token)
        delta, rest = {"content": rest[:size]}, rest[size:]
        logprobs = {"content": [{"token": token, "logprob": -1.0}]}
        events.append({"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]})
    last: dict[str, Any] = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}
    if gates is not None:
        mean = [sum(column) / len(gates) for column in zip(*gates, strict=True)]
        last["mixture"] = {
            "name": "blend", "routing": "xlora", "adapters": ADAPTERS, "gates": dict(zip(ADAPTERS, mean, strict=True)),
            "prompt_gates": None, "tokens": len(gates), "prompt_tokens": 0, "cached_prompt_tokens": 9,
            "token_gates": gates,
        }  # fmt: skip
    events.append({"choices": [last]})
    return ("".join(f"data: {json.dumps(event)}\n\n" for event in events) + end).encode()


@contextmanager
def serving() -> Iterator[StandIn]:
    """It listens on a port of its own until the end."""
    made = StandIn()
    made.reset()
    server = uvicorn.Server(uvicorn.Config(made.app(), host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        made.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield made
    finally:
        server.should_exit = True
        thread.join()
