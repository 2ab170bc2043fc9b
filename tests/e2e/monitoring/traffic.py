"""Requests of all kinds at an endpoint of the sample, and the events that monitoring is to show."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from ..served import ADMIN_KEY, API_KEY

ADDED = "sums"  # an adapter added at run time
PROMPTS = {
    "code": "def load(path):\n    with open(path) as file:\n        return",
    "docs": "The with statement is used to wrap the execution of a block with",
    "json": '{"name": "Ada", "city": "Oslo", "orders": [{"product": "lamp", "price":',
    "maths": "Ada has 12 apples and buys 7 more. How many apples does Ada have?",
}
MODELS = ("base", "blend", *PROMPTS)
PATIENCE_S = 240  # a request may wait for a replica that starts beside it


class Endpoint:
    """One endpoint over HTTP, with a user's key and an administrator's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(
            base_url=url,
            timeout=PATIENCE_S,
            headers={"Authorization": f"Bearer {API_KEY}"},
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def close(self) -> None:
        """Drop its connections."""
        self._http.close()

    def post(self, route: str, body: dict[str, Any], key: str = API_KEY) -> httpx.Response:
        """POST JSON to a route below /v1."""
        return self._http.post(f"/v1/{route}", json=body, headers={"Authorization": f"Bearer {key}"})

    def replicas(self) -> list[dict[str, Any]]:
        """The connected replicas, as GET /xloom/status has them."""
        answer = self._http.get("/xloom/status")
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["replicas"]
        return found

    def ask(self, model: str, prompt: str, length: int, *, chat: bool = False) -> None:
        """One whole answer."""
        route, asked = _question(prompt, chat)
        answer = self.post(route, asked | {"model": model, "max_tokens": length})
        assert answer.status_code == 200, answer.text

    def stream(self, model: str, prompt: str, length: int, left: Callable[[], bool], *, chat: bool = False) -> None:
        """One streamed answer; the client leaves it as soon as `left` says so."""
        route, asked = _question(prompt, chat)
        body = asked | {"model": model, "max_tokens": length, "stream": True}
        with self._http.stream("POST", f"/v1/{route}", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith('data: {"error"'):
                    raise AssertionError(line)
                if left():
                    return


def _question(prompt: str, chat: bool) -> tuple[str, dict[str, Any]]:
    common = {"temperature": 0.7, "ignore_eos": True}
    if chat:
        return "chat/completions", common | {"messages": [{"role": "user", "content": prompt}]}
    return "completions", common | {"prompt": prompt}


class Load:
    """So many requests at once, in a `with` block: its end raises what went wrong with any of them."""

    def __init__(
        self,
        endpoint: Endpoint,
        lanes: int,
        length: int,
        *,
        models: Iterable[str] = MODELS,
        domains: Iterable[str] = tuple(PROMPTS),
        pause_s: float = 0.0,
    ) -> None:
        self._endpoint, self._lanes, self._length = endpoint, lanes, length
        self._models, self._domains, self._pause_s = tuple(models), tuple(domains), pause_s
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(lanes)
        self._running: list[Future[int]] = []

    def __enter__(self) -> Self:
        self._running = [self._pool.submit(self._lane, number) for number in range(self._lanes)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._pool.shutdown(wait=True)
        if error is None:
            for lane in self._running:
                lane.result()

    def _lane(self, number: int) -> int:
        """Plain and streamed, text and chat; a third of the prompts has been seen before. Returns how many."""
        rng = random.Random(number)
        models = itertools.islice(itertools.cycle(self._models), number % len(self._models), None)
        for count, model in enumerate(models):
            if self._done.is_set():
                return count
            prompt = (
                3 * PROMPTS[model if model in PROMPTS else rng.choice(self._domains)]
            )  # more than a page, to be cached
            if rng.random() < 0.7:
                prompt = f"{rng.randrange(10**6)} {prompt}"
            length, chat = rng.randint(self._length // 2, self._length), rng.random() < 0.3
            if count % 3 == 2 and length < 200:
                self._endpoint.ask(model, prompt, length, chat=chat)
            else:
                self._endpoint.stream(model, prompt, length, self._done.is_set, chat=chat)
            self._done.wait(self._pause_s * rng.random() * 2)
        return 0


def refused_requests(endpoint: Endpoint) -> None:
    """A model that is not there, a prompt that is too long, a wrong key."""
    short = {"prompt": "Hello", "max_tokens": 1}
    for route in ("completions", "chat/completions"):
        body = short if route == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
        assert endpoint.post(route, body | {"model": "nobody"}).status_code == 404
    assert endpoint.post("completions", {"model": "base", "prompt": "long " * 5000}).status_code == 400
    assert endpoint.post("completions", short | {"model": "base"}, key="wrong").status_code == 401


def adapters_come_and_go(endpoint: Endpoint, source: Path) -> None:
    """One is added, used and removed; another is refused."""
    add, remove = "load_lora_adapter", "unload_lora_adapter"
    added = endpoint.post(add, {"lora_name": ADDED, "lora_path": str(source)}, key=ADMIN_KEY)
    assert added.status_code == 200, added.text
    endpoint.ask(ADDED, PROMPTS["maths"], 16)
    refused = endpoint.post(add, {"lora_name": "lost", "lora_path": "/nowhere"}, key=ADMIN_KEY)
    assert refused.status_code == 404, refused.text
    assert json.loads(refused.text)["error"]["code"] == "source_not_found"
    removed = endpoint.post(remove, {"lora_name": ADDED}, key=ADMIN_KEY)
    assert removed.status_code == 200, removed.text
