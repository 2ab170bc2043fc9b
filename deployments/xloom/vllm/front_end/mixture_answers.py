"""The `mixture` of an answer, put into what vLLM's front end makes of it: on each choice, or on the whole.

Relies on vLLM 0.32: `CompletionOutput.spec_decode_metrics` of the last output is what the last `EngineCoreOutput` with
one had, and routers have no speculative decoding; the parameters of the methods wrapped here, which serving objects
call on themselves; events of a stream are `data: {...}` with one choice each; responses take further fields, but
Anthropic's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.datastructures import State
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput

from xloom.protocol import MIXTURES
from xloom.router.weights import sent_weights
from xloom.vllm.front_end.mixture_record import Mixed

_DATA = "data: "

Make = Callable[..., Any]


def mixes(lora: LoRARequest | None) -> bool:
    """Whether the answer of the request that this task serves has a mixture, by its model or by its own weights."""
    return sent_weights() is not None or (lora is not None and lora.lora_path in MIXTURES)


async def with_mixtures(results: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    """An engine's results with the gates where no speculative decoding's figures are looked for."""
    async with aclosing(results):
        async for result in results:
            for output in result.outputs:
                if isinstance(found := output.spec_decode_metrics, Mixed):
                    output.spec_decode_metrics = None
                    output.mixture = found
            yield result


def tell_mixtures(state: State) -> None:
    """Have an application's serving objects say what mixtures did."""
    for name in ("openai_serving_chat", "openai_serving_chat_batch", "anthropic_serving_messages"):
        if (chat := getattr(state, name, None)) is not None:
            chat.chat_completion_stream_generator = _chat_stream(chat, chat.chat_completion_stream_generator)
            chat.chat_completion_full_generator = _chat(chat.chat_completion_full_generator)
    if (batch := getattr(state, "openai_serving_chat_batch", None)) is not None:
        batch.chat_completion_full_generator_batch = _chats(batch.chat_completion_full_generator_batch)
    if (messages := getattr(state, "anthropic_serving_messages", None)) is not None:
        messages.messages_full_converter = _message(messages.messages_full_converter)
        messages.message_stream_converter = _message_stream(messages.message_stream_converter)
    if (completions := getattr(state, "openai_serving_completion", None)) is not None:
        stream = _completion_stream(completions, completions.completion_stream_generator)
        completions.completion_stream_generator = stream
        whole = _completions(completions.request_output_to_completion_response)
        completions.request_output_to_completion_response = whole
    if (responses := getattr(state, "openai_serving_responses", None)) is not None:
        responses.responses_full_generator = _response(responses.responses_full_generator)


def _found(output: CompletionOutput) -> Mixed | None:
    return getattr(output, "mixture", None)


# Whole answers.


def _chat(make: Make) -> Make:
    async def wrapped(request: Any, results: AsyncIterator[RequestOutput], *arguments: Any, **options: Any) -> Any:
        last: list[RequestOutput] = []
        response = await make(request, _last_of(results, last), *arguments, **options)
        _tell_choices(response, [output for result in last for output in result.outputs])
        return response

    return wrapped


def _chats(make: Make) -> Make:
    async def wrapped(request: Any, several: list[Any], *arguments: Any, **options: Any) -> Any:
        lasts: list[list[RequestOutput]] = [[] for _ in several]
        watched = [_last_of(results, last) for results, last in zip(several, lasts, strict=True)]
        response = await make(request, watched, *arguments, **options)
        _tell_choices(response, [output for last in lasts for result in last for output in result.outputs])
        return response

    return wrapped


def _completions(make: Make) -> Make:
    def wrapped(results: list[RequestOutput], *arguments: Any, **options: Any) -> Any:
        response = make(results, *arguments, **options)
        _tell_choices(response, [output for result in results for output in result.outputs])
        return response

    return wrapped


def _response(make: Make) -> Make:
    async def wrapped(request: Any, params: Any, turns: Any, context: Any, *arguments: Any, **options: Any) -> Any:
        response = await make(request, params, turns, context, *arguments, **options)
        last = getattr(context, "last_output", None)
        outputs = [] if last is None else last.outputs
        if outputs and (mixed := _found(outputs[0])) is not None and hasattr(response, "output"):
            response.mixture = mixed.told(response.model)
        return response

    return wrapped


def _tell_choices(response: Any, outputs: list[CompletionOutput]) -> None:
    """In the order of the choices. An error has none."""
    for choice, output in zip(getattr(response, "choices", ()), outputs, strict=False):
        if (mixed := _found(output)) is not None:
            choice.mixture = mixed.told(response.model)


async def _last_of(results: AsyncIterator[RequestOutput], last: list[RequestOutput]) -> AsyncIterator[RequestOutput]:
    async for result in results:
        last[:] = [result]
        yield result


class _MixedMessage(AnthropicMessagesResponse):
    mixture: dict[str, Any]


def _message(make: Make) -> Make:
    def wrapped(chat: Any) -> Any:
        message = make(chat)
        mixture = getattr(chat.choices[0], "mixture", None)
        if mixture is None:
            return message
        return _MixedMessage.model_construct(**message.__dict__, mixture=mixture)

    return wrapped


# Streams.


def _chat_stream(serving: Any, make: Make) -> Make:
    def wrapped(request: Any, results: AsyncGenerator[RequestOutput, None], *arguments: Any, **options: Any) -> Any:
        if not mixes(serving.models.lora_requests.get(request.model)):
            return make(request, results, *arguments, **options)
        found: dict[int, Mixed] = {}

        async def watched() -> AsyncIterator[RequestOutput]:
            async with aclosing(results):
                async for result in results:
                    _note(found, result, 0)
                    yield result

        return _told(make(request, watched(), *arguments, **options), found)

    return wrapped


def _completion_stream(serving: Any, make: Make) -> Make:
    def wrapped(request: Any, inputs: Any, results: AsyncGenerator[Any, None], *arguments: Any, **options: Any) -> Any:
        if not mixes(serving.models.lora_requests.get(request.model)):
            return make(request, inputs, results, *arguments, **options)
        found: dict[int, Mixed] = {}

        async def watched() -> AsyncIterator[tuple[int, RequestOutput]]:
            async with aclosing(results):
                async for prompt, result in results:
                    _note(found, result, prompt * (request.n or 1))
                    yield prompt, result

        return _told(make(request, inputs, watched(), *arguments, **options), found)

    return wrapped


def _note(found: dict[int, Mixed], result: RequestOutput, first: int) -> None:
    for output in result.outputs:
        if output.finish_reason is not None and (mixed := _found(output)) is not None:
            found[first + output.index] = mixed


async def _told(events: AsyncGenerator[str, None], found: dict[int, Mixed]) -> AsyncGenerator[str, None]:
    """A stream's events, with what was found on the last one of each choice."""
    async with aclosing(events):
        async for event in events:
            yield _with_mixture(event, found) if found else event


def _with_mixture(event: str, found: dict[int, Mixed]) -> str:
    if (chunk := _read(event, _DATA)) is None:
        return event
    for choice in chunk.get("choices", ()):
        if choice.get("finish_reason") is not None and choice["index"] in found:
            choice["mixture"] = found.pop(choice["index"]).told(chunk["model"])
            event = _written(_DATA, chunk)
    return event


def _message_stream(make: Make) -> Make:
    """Of a chat's events; the message's delta comes after the chunk that says why it ended."""

    def wrapped(chat: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        mixtures: list[Any] = []

        async def watched() -> AsyncGenerator[str, None]:
            async with aclosing(chat):
                async for event in chat:
                    if '"mixture":' in event and (chunk := _read(event, _DATA)) is not None:
                        mixtures.extend(choice["mixture"] for choice in chunk["choices"] if "mixture" in choice)
                    yield event

        return told(make(watched()), mixtures)

    async def told(events: AsyncGenerator[str, None], mixtures: list[Any]) -> AsyncGenerator[str, None]:
        head = "event: message_delta\n" + _DATA
        async with aclosing(events):
            async for event in events:
                if mixtures and (delta := _read(event, head)) is not None:
                    yield _written(head, delta | {"mixture": mixtures.pop()})
                else:
                    yield event

    return wrapped


def _read(event: str, head: str) -> dict[str, Any] | None:
    """The object in an event that begins so."""
    if not event.startswith(head + "{"):
        return None
    read: dict[str, Any] = msgspec.json.decode(event[len(head) :])
    return read


def _written(head: str, content: dict[str, Any]) -> str:
    return f"{head}{msgspec.json.encode(content).decode()}\n\n"
