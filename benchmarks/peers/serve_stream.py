"""A peer: vLLM's engine in a Serve replica, one handle stream a request, one message a token, Serve's own proxy.

What one writes first: an ingress with FastAPI, an engine deployment, and `handle.options(stream=True)` between.
Usage: python -m benchmarks.peers.serve_stream ARGUMENTS.json
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve

from .cluster import run_until_interrupted

web = FastAPI()


@serve.deployment(name="engine", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Engine:
    """Owns one `AsyncLLM`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._count = 0

    async def stream(self, prompt: str, max_tokens: int) -> AsyncIterator[tuple[str, int, int]]:
        """Text, prompt tokens, output tokens so far: one message per token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        made = 0
        async for output in self._engine.generate(prompt, sampling, str(self._count)):
            made += len(output.outputs[0].token_ids)
            yield output.outputs[0].text, len(output.prompt_token_ids or ()), made

    def __del__(self) -> None:
        self._engine.shutdown()


@serve.deployment(name="ingress", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
@serve.ingress(web)
class Ingress:
    """The part of OpenAI's completions that the client uses."""

    def __init__(self, engine: serve.handle.DeploymentHandle) -> None:
        self._engine = engine.options(stream=True)

    @web.post("/v1/completions", response_model=None)
    async def complete(self, body: dict[str, Any]) -> StreamingResponse | JSONResponse:
        """A stream of server-sent events, or the whole text."""
        stream = self._engine.stream.remote(body["prompt"], body["max_tokens"])
        if body.get("stream"):
            return StreamingResponse(self._events(stream), media_type="text/event-stream")
        text = "".join([piece async for piece, _, _ in stream])
        return JSONResponse({"object": "text_completion", "choices": [{"index": 0, "text": text}]})

    async def _events(self, stream: Any) -> AsyncIterator[str]:
        prompt = made = 0
        async for text, prompt, made in stream:  # noqa: B007 - the last values are the usage
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
            yield f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n"
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        yield f"data: {json.dumps({'object': 'text_completion', 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def application(arguments: dict[str, Any]) -> serve.Application:
    """The Serve application."""
    ingress: Any = Ingress  # `serve.deployment` replaces the class by a `Deployment`
    engine: Any = Engine
    app: serve.Application = ingress.bind(engine.bind(arguments))
    return app


if __name__ == "__main__":
    run_until_interrupted(application)
