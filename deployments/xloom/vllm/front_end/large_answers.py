"""Answers with log-probabilities, put together in a thread: each takes 10 us, for which all other requests would wait.

Relies on vLLM 0.32. `OpenAIServingChat.chat_completion_full_generator`, `OpenAIServingChatBatch.
chat_completion_full_generator_batch` and `OpenAIServingResponses.responses_full_generator` take what their generators
give before they do anything else, and then await nothing of this event loop's. `OpenAIServingCompletion.
create_completion` returns what its `request_output_to_completion_response` made. The routes answer with
`JSONResponse(content=response.model_dump())`, by their own modules' name.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.openai.responses import api_router as responses_routes
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.serve.tokenize import api_router as tokenize_routes
from vllm.utils.async_utils import merge_async_iterators

_LARGE = ("choices", "output", "prompt_logprobs")  # what may be large in an answer
_ROUTES = (chat_routes, completion_routes, responses_routes, tokenize_routes)

T = TypeVar("T")
Make = Callable[..., Awaitable[Any]]

# One for the process: with each thread that computes, the event loop waits longer for its turn.
ASIDE = ThreadPoolExecutor(1, thread_name_prefix="answers")


class WrittenResponse(JSONResponse):
    """JSON by msgspec, in a tenth of the time that the standard library takes; `msgspec.Raw` is taken as it is."""

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


async def aside(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in the thread that puts large answers together."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(ASIDE, lambda: context.run(function, *arguments))


def put_together_aside(state: State) -> None:
    """Have an application's serving objects put answers with log-probabilities together in a thread."""
    for module in _ROUTES:
        module.JSONResponse = WrittenResponse
    _wrap(state, "openai_serving_chat", "chat_completion_full_generator", _after_its_results)
    _wrap(state, "openai_serving_chat_batch", "chat_completion_full_generator_batch", _after_all_results)
    _wrap(state, "openai_serving_responses", "responses_full_generator", _after_its_turns)
    if (completions := getattr(state, "openai_serving_completion", None)) is not None:
        completions.request_output_to_completion_response = _later(completions.request_output_to_completion_response)
        completions.create_completion = _now(completions.create_completion)


def _wrap(state: State, serving: str, method: str, wrap: Callable[[Make], Make]) -> None:
    if (found := getattr(state, serving, None)) is not None:
        setattr(found, method, wrap(getattr(found, method)))


def _after_its_results(make: Make) -> Make:
    async def wrapped(request: Any, results: AsyncIterator[Any], *arguments: Any, **options: Any) -> Any:
        if not asks_for_logprobs(request):
            return await make(request, results, *arguments, **options)
        last = await _last(results)
        return await aside(_written, lambda: make(request, _again(last), *arguments, **options))

    return wrapped


def _after_all_results(make: Make) -> Make:
    async def wrapped(request: Any, results: list[AsyncIterator[Any]], *arguments: Any, **options: Any) -> Any:
        if not asks_for_logprobs(request):
            return await make(request, results, *arguments, **options)
        lasts: list[list[Any]] = [[] for _ in results]
        async for number, result in merge_async_iterators(*results):
            lasts[number] = [result]
        return await aside(_written, lambda: make(request, list(map(_again, lasts)), *arguments, **options))

    return wrapped


def _after_its_turns(make: Make) -> Make:
    """A context keeps what each turn gave. One with tools begins their sessions first: it stays where it is."""

    async def wrapped(
        request: Any, params: Any, turns: AsyncIterator[Any], context: Any, *arguments: Any, **options: Any
    ) -> Any:
        if not request.is_include_output_logprobs() or request.store or not isinstance(context, SimpleContext):
            return await make(request, params, turns, context, *arguments, **options)
        await _last(turns)
        return await aside(_written, lambda: make(request, params, _again([]), context, *arguments, **options))

    return wrapped


class _Unmade:
    """A completion's answer that is yet to be put together."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def _later(make: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(results: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        if request.stream or not asks_for_logprobs(request):
            return make(results, request, *arguments, **options)
        return _Unmade(lambda: make(results, request, *arguments, **options))

    return wrapped


def _now(create: Make) -> Make:
    async def wrapped(*arguments: Any, **options: Any) -> Any:
        answer = await create(*arguments, **options)
        return await aside(write, answer.make) if isinstance(answer, _Unmade) else answer

    return wrapped


def asks_for_logprobs(request: Any) -> bool:
    """Of a vLLM request of any route but Responses'."""
    return any(getattr(request, name, None) not in (None, False) for name in ("logprobs", "prompt_logprobs"))


async def _last(results: AsyncIterator[Any]) -> list[Any]:
    """The last of what a generator gives, if any."""
    last: list[Any] = []
    async for result in results:
        last = [result]
    return last


async def _again(results: list[Any]) -> AsyncIterator[Any]:
    for result in results:
        yield result


def _written(make: Callable[[], Awaitable[Any]]) -> Any:
    async def answer() -> Any:
        return await make()

    return write(lambda: asyncio.run(answer()))


def write(make: Callable[[], Any]) -> Any:
    """Make a response, and give what stands for it: its `model_dump` gives JSON. An error stays what it is.

    pydantic would make it into plain data in one call, which holds the interpreter; so would a collection of garbage
    among hundreds of thousands of objects, of which there is none here.
    """
    gc.disable()
    try:
        response = make()
        large = {name for name in _LARGE if name in type(response).model_fields}
        if not large:
            return response
        fields = response.model_dump(mode="json", by_alias=True, exclude=large)
        fields |= {name: getattr(response, name) for name in large}
        raw = msgspec.Raw(msgspec.json.encode(fields, enc_hook=_plain))
        written = type(response).model_construct()
        written.__dict__["model_dump"] = lambda **options: raw
        del response, fields
        return written
    finally:
        gc.enable()


def _plain(value: Any) -> Any:
    if not isinstance(value, BaseModel):
        raise NotImplementedError(f"{type(value).__name__} is no JSON")
    if _is_shallow(type(value)):
        return value.__dict__ | (value.__pydantic_extra__ or {})
    return value.model_dump(mode="json", by_alias=True)


@functools.cache
def _is_shallow(model: type[BaseModel]) -> bool:
    """Whether a model's fields are its JSON."""
    decorators = model.__pydantic_decorators__
    own = decorators.model_serializers or decorators.field_serializers or decorators.computed_fields
    return not own and not any(
        field.exclude or field.alias or field.serialization_alias for field in model.model_fields.values()
    )
