"""What a client may ask for holds up no router's event loop: the front end, its limits and a fake engine, measured."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from tests.fakes import FakeBackend, until
from tests.models import tiny_model
from tests.stalls import measured
from xloom.protocol import Logprobs, TokenChunk, TokenRequest
from xloom.replica.server import ReplicaServer
from xloom.router.connection import limited
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher
from xloom.router.errors import CodedErrors
from xloom.router.limits import BodyLimits
from xloom.router.routes import keep_listed
from xloom.settings import Settings, parse_settings
from xloom.vllm.front_end import large_answers, open_front_end

pytestmark = pytest.mark.timeout(300)
LENGTH = 8192  # of the context, tokens
BUSY_S = 0.05  # on a core that takes REFERENCE_S for `reference`; as much longer as it takes longer
REFERENCE_S = 0.02
TRIES = 3


def reference() -> float:
    """Seconds of processor time for a fixed piece of work, of the kind that a front end does."""
    took = []
    for _ in range(5):
        began = time.thread_time()
        for number in range(40):
            json.loads(json.dumps([{"type": "text", "text": str(each)} for each in range(number, number + 250)]))
        took.append(time.thread_time() - began)
    return min(took)


class Backend(FakeBackend):
    """Gives log-probabilities too."""

    def _next(self, request: TokenRequest) -> TokenChunk:
        prompt = request.prompt_token_ids
        first = len(self.tokens[request.request_id]) == len(prompt)
        chunk = super()._next(request)
        if (asked := request.sampling.get("logprobs")) is not None:
            chunk.logprobs = Logprobs([[chunk.token_ids[0], *range(asked)]], [[-1.5] * (asked + 1)], [1])
        if first and (asked := request.sampling.get("prompt_logprobs")) is not None:
            rows = len(prompt) - 1
            ids = [[token, *range(asked)] for token in prompt[1:]]
            chunk.prompt_logprobs = Logprobs(ids, [[-1.5] * (asked + 1)] * rows, [1] * rows)
        return chunk


class Endpoint:
    """A router's application behind its limits, on a port, over one replica."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._infos: list[ReplicaInfo] = []
        self.dispatcher = Dispatcher(self._discover, "secret", "router")
        self._replica = ReplicaServer(Backend(), "one", "secret")

    async def _discover(self) -> list[ReplicaInfo]:
        return self._infos

    async def start(self) -> None:
        self._infos = [ReplicaInfo("one", "node", *await self._replica.start("127.0.0.1"), 1)]
        self._front_end = await open_front_end(self._settings, self.dispatcher)
        app, limits = self._front_end.app, self._settings.router.limits
        keep_listed(app)
        stack = CodedErrors(BodyLimits(app, limits), reword=self._front_end.reword)
        config = uvicorn.Config(stack, port=0, http=limited(limits), ws="none", log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self.dispatcher.start()
        self._serving = asyncio.create_task(self._server._serve())
        await until(lambda: self._server.started and self.dispatcher.is_ready)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.should_exit = True
        await self._serving
        self._front_end.shutdown()
        await self.dispatcher.close()
        await self._replica.close()

    async def ask(self, route: str, body: Any) -> tuple[int, bytes]:
        """POST from a thread."""
        return await asyncio.to_thread(self._ask, route, body)

    def _ask(self, route: str, body: Any) -> tuple[int, bytes]:
        content = None if body is None else json.dumps(body).encode()
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            client.request("GET" if content is None else "POST", route, content, {"Content-Type": "application/json"})
            answer = client.getresponse()
            return answer.status, answer.read()
        finally:
            client.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = tiny_model(tmp_path_factory.mktemp("loop") / "base", "llama")
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        written = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(written | {key: LENGTH}))
    data = {"model": {"source": str(model), "served_name": "base"}, "engine": {"max_model_len": LENGTH}}
    return parse_settings(data, with_keys=False)


@pytest.fixture
async def endpoint(settings: Settings) -> AsyncIterator[Endpoint]:
    made = Endpoint(settings)
    await made.start()
    gc.collect()
    gc.freeze()  # as Ray Serve does when a router has started
    yield made
    gc.unfreeze()
    await made.close()


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "Hello", "max_tokens": 2, **fields}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": list(messages), "max_tokens": 2, **fields}


def tool(number: int) -> dict[str, Any]:
    properties = {f"p{each}": {"type": "string"} for each in range(25)}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": {"properties": properties}}}


TEXT = "long " * 100_000
STRINGS = {"return_token_strs": True}
USER = {"role": "user", "content": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}] * 3000}
CALLS = {"role": "assistant", "content": "a", "tool_calls": [CALL] * 2800}
WRONG = {"role": "user", "content": [{"type": 5}] * 3000}
LOGPROBS = {"model": "base", "logprobs": True, "top_logprobs": 20, "max_tokens": 1500}
RESPONSES = {
    "model": "base",
    "input": "a",
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 20,
    "max_output_tokens": 3100,
}
# As much as the limits let through, or just beyond them.
REQUESTS: list[tuple[str, str, Any]] = [
    ("metrics", "/metrics", None),
    ("a quarter of a megabyte to tokenise", "/tokenize", {"model": "base", "prompt": TEXT[:250_000]}),
    (
        "a text to tokenise into strings",
        "/tokenize",
        {"model": "base", "prompt": TEXT[:60_000], "return_token_strs": True},
    ),
    ("many tokens to detokenise", "/detokenize", {"model": "base", "tokens": [65] * 300_000}),
    ("a prompt of 300,000 tokens", "/v1/completions", completion(prompt=[65] * 300_000)),
    ("512 sequences", "/v1/completions", completion(prompt=["a"] * 128, n=4, temperature=1)),
    ("half a megabyte of text", "/v1/completions", completion(prompt=TEXT)),
    ("500 messages", "/v1/chat/completions", chat(*[USER] * 500)),
    ("3,000 parts of a message", "/v1/chat/completions", chat(PARTS)),
    ("2,800 calls of tools", "/v1/chat/completions", chat(CALLS)),
    ("128 tools", "/v1/chat/completions", chat(USER, tools=[tool(number) for number in range(128)])),
    ("19,000 prompts that are none", "/v1/completions", completion(prompt=[{}] * 19_000)),
    ("500 messages that are none", "/v1/chat/completions", chat(*[{"role": 5}] * 500)),
    ("3,000 parts that are none", "/v1/chat/completions", chat(WRONG)),
    ("500 items of input", "/v1/responses", {"model": "base", "input": [USER] * 500}),
    ("500 items that are none", "/v1/responses", {"model": "base", "input": [{"role": 5}] * 500}),
    ("an item of 3,000 parts that are none", "/v1/responses", {"model": "base", "input": [WRONG]}),
    ("500 messages of Anthropic's", "/v1/messages", chat(*[USER] * 500)),
    ("128 conversations", "/v1/chat/completions/batch", chat(*[[USER] * 4] * 128)),
    ("a prompt's log-probabilities", "/v1/completions", completion(prompt=[65] * 8000, prompt_logprobs=15)),
    ("a prompt's log-probabilities again", "/v1/completions", completion(prompt=[65] * 8000, echo=True, logprobs=7)),
    ("echoed in a stream", "/v1/completions", completion(prompt=[65] * 2000, echo=True, logprobs=1, stream=True)),
    (
        "65,000 log-probabilities of an answer",
        "/v1/chat/completions",
        {**LOGPROBS, "messages": [USER], "max_tokens": 3100},
    ),
    ("as many of two conversations", "/v1/chat/completions/batch", {**LOGPROBS, "messages": [[USER]] * 2}),
    ("as many of a completion", "/v1/completions", completion(logprobs=20, max_tokens=3100)),
    ("as many of the Responses API", "/v1/responses", RESPONSES),
    ("half a megabyte to tokenise", "/tokenize", {"model": "base", "prompt": TEXT + TEXT[:24_000]}),
    ("128 prompts of 4,000 characters", "/v1/completions", completion(prompt=[TEXT[:4000]] * 128)),
    ("128 prompts of 2,000 tokens", "/v1/completions", completion(prompt=[[65] * 2000] * 128)),
    ("9,000 parts that are none", "/v1/chat/completions", chat({"role": "user", "content": [{"type": 5}] * 9000})),
    ("4,000 parts that are none", "/v1/chat/completions", chat({"role": "user", "content": [{"type": 5}] * 4000})),
]


async def test_nothing_that_a_client_may_ask_for_holds_the_event_loop_up_for_long(endpoint: Endpoint) -> None:
    most = BUSY_S * max(1.0, reference() / REFERENCE_S)
    async with measured() as stalls:
        await endpoint.ask("/v1/completions", completion())  # what is loaded once
        await endpoint.ask("/v1/chat/completions", chat(USER))
        slow: list[tuple[str, list[float], str]] = []
        for name, route, body in REQUESTS:
            took: list[float] = []
            while len(took) < TRIES and min(took, default=most) >= most:
                stalls.forget()
                status, answer = await endpoint.ask(route, body)
                assert status in (200, 400, 413), (name, status, answer[:300])
                took.append(stalls.busy_s)
            if min(took) >= most:
                slow.append((name, took, stalls.culprit))
    assert slow == []
    assert endpoint.dispatcher.in_flight == 0


SAME: list[tuple[str, Any]] = [
    ("/v1/chat/completions", chat(USER, logprobs=True, top_logprobs=3, prompt_logprobs=2, n=2, temperature=1)),
    ("/v1/chat/completions", chat(USER, logprobs=True, return_token_ids=True)),
    ("/v1/chat/completions/batch", {**LOGPROBS, "messages": [[USER]] * 2, "max_tokens": 3}),
    ("/v1/completions", completion(prompt=["a", "b"], logprobs=3, prompt_logprobs=2, n=2, temperature=1)),
    ("/v1/completions", completion(echo=True, logprobs=2)),
    ("/v1/responses", {**RESPONSES, "max_output_tokens": 3}),
]


async def test_an_answer_is_the_same_wherever_it_is_put_together(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for route, body in SAME:
        aside = status_and_answer(await endpoint.ask(route, body))
        with monkeypatch.context() as patch:
            patch.setattr(large_answers, "asks_for_logprobs", lambda request: False)
            patch.setattr(large_answers, "SimpleContext", type(None))
            at_once = status_and_answer(await endpoint.ask(route, body))
        assert aside == at_once, route
        assert aside[0] == 200, route


def status_and_answer(answered: tuple[int, bytes]) -> tuple[int, Any]:
    status, answer = answered
    return status, without_identity(json.loads(answer))


def without_identity(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_identity(each) for name, each in value.items() if name not in IDENTITY}
    return [without_identity(each) for each in value] if isinstance(value, list) else value


IDENTITY = ("id", "request_id", "created", "created_at")


async def test_a_length_that_is_not_given_ends_where_log_probabilities_may_end(endpoint: Endpoint) -> None:
    status, answer = await endpoint.ask("/v1/chat/completions", chat(USER, logprobs=True, top_logprobs=20) | UNSET)
    [choice] = json.loads(answer)["choices"]
    assert (status, choice["finish_reason"]) == (200, "length")
    assert len(choice["logprobs"]["content"]) == 131_072 // 21


UNSET = {"max_tokens": None}
