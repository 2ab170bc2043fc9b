"""What became of each request: a log line and a span at its end, in the router and in the replica.

A room keeps a journal only where the settings ask for either; without one its hot path asks `is None`, once a step.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from xloom.observability.logs import fields
from xloom.observability.traces import Tracing, ids
from xloom.protocol import TokenChunk, TokenRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Room = Literal["router", "replica"]

_CHAT = re.compile(r"(\d+_)?(chatcmpl|resp|msg)")  # how vLLM's ids of chat requests begin; n > 1 puts a number before
# Sampling parameters by their names in OpenTelemetry's GenAI conventions.
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")


@dataclass(eq=False)
class _Story:
    """One request in this room."""

    request: TokenRequest
    began: float  # monotonic
    replica: str
    first: float | None = None  # when its first tokens came
    cached: int = 0  # prompt tokens
    generated: int = 0  # tokens
    replays: int = 0
    span: Span | None = None
    place: Span | None = None
    traced: dict[str, str] = field(default_factory=dict)


class Journal:
    """The requests of one room. `base` is the base model's name, `member` the router's or replica's id."""

    def __init__(self, room: Room, member: str, base: str, *, lines: bool, tracing: Tracing | None) -> None:
        self._room, self._member, self._base, self._lines, self._tracing = room, member, base, lines, tracing
        self._logger = logging.getLogger(f"xloom.{room}.requests")
        self._stories: dict[str, _Story] = {}

    def begin(self, request: TokenRequest) -> TokenRequest:
        """A request came; returns it as it goes on from here, with the trace it belongs to."""
        in_replica = self._room == "replica"
        story = _Story(request, time.monotonic(), self._member if in_replica else "")
        self._stories[request.request_id] = story
        if self._tracing is not None:
            about = self._attributes(request)
            name = f"{about['gen_ai.operation.name']} {about['gen_ai.request.model']}"
            context = self._tracing.context(request.trace) if in_replica else None
            story.span = self._tracing.request(name, context, about, remote=in_replica)
            story.traced = ids(story.span)
            if not in_replica:
                request = msgspec.structs.replace(request, trace=self._tracing.carrier(story.span))
                self._seek(story)
        return request

    def _attributes(self, request: TokenRequest) -> dict[str, Any]:
        model, kind = self._model(request)
        about: dict[str, Any] = {
            "gen_ai.operation.name": "chat" if _CHAT.match(request.request_id) else "text_completion",
            "gen_ai.provider.name": "xloom",
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "xloom.request.id": request.client_id,
            "xloom.adapter.kind": kind,
        }
        if request.adapter is not None:
            about["xloom.adapter.generation"] = request.adapter.generation
        if self._room == "replica":
            about["xloom.replica.id"] = self._member
        given = request.sampling
        return about | {f"gen_ai.request.{name}": given[name] for name in _SAMPLING if given.get(name) is not None}

    def _model(self, request: TokenRequest) -> tuple[str, str]:
        return (request.adapter.name, request.adapter.kind) if request.adapter else (self._base, "base")

    # On its way.

    def sent(self, request_id: str, replica: str) -> None:
        """A replica was chosen."""
        story = self._stories.get(request_id)
        if story is None:
            return
        story.replica = replica
        if story.place is not None:
            story.place.set_attribute("xloom.replica.id", replica)
            story.place.end()
            story.place = None

    def moved(self, request_id: str, reason: str) -> None:
        """Its replica lost or refused it: it goes on elsewhere."""
        story = self._stories.get(request_id)
        if story is None:
            return
        story.replays += 1
        self.event(request_id, "replay", {"xloom.reason": reason, "xloom.replica.id": story.replica})
        self._seek(story)

    def event(self, request_id: str, name: str, attributes: dict[str, Any] | None = None) -> None:
        """Something happened to it."""
        story = self._stories.get(request_id)
        if story is not None and story.span is not None:
            story.span.add_event(name, {"xloom.generated_tokens": story.generated, **(attributes or {})})

    def _seek(self, story: _Story) -> None:
        if self._tracing is not None and story.span is not None:
            story.place = self._tracing.child(story.span, "place", {"xloom.attempt": story.replays + 1})

    def step(self, chunks: Sequence[TokenChunk]) -> None:
        """An engine step's chunks: the hot path of a room that keeps a journal."""
        for chunk in chunks:
            story = self._stories.get(chunk.request_id)
            if story is None:
                continue
            if story.first is None and chunk.token_ids:
                story.first, story.cached = time.monotonic(), chunk.num_cached_tokens
                if story.span is not None:
                    story.span.add_event("first_token")
            story.generated += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                self.end(chunk.request_id, chunk.finish_reason)

    # Its end.

    def end(self, request_id: str, outcome: str, error: str | None = None) -> None:
        """It is over: stop, length, abort or error, then with a code. The first end counts."""
        story = self._stories.pop(request_id, None)
        if story is None:
            return
        to_first = None if story.first is None else story.first - story.began
        if story.span is not None:
            self._end_span(story, story.span, outcome, error, to_first)
        if self._lines:
            request = story.request
            model, kind = self._model(request)
            told = {
                "request_id": request.client_id,
                "engine_request_id": request_id,
                "model": model,
                "kind": kind,
                "replica": story.replica,
                "prompt_tokens": len(request.prompt_token_ids),
                "cached_tokens": story.cached,
                "generated_tokens": story.generated,
                "ttft_s": None if to_first is None else round(to_first, 4),
                "seconds": round(time.monotonic() - story.began, 4),
                "outcome": outcome,
                **({"error": error} if error else {}),
                **({"replays": story.replays} if self._room == "router" else {}),
                **story.traced,
            }
            self._logger.info("request ended: %s", error or outcome, extra=fields(**told))

    @staticmethod
    def _end_span(story: _Story, span: Span, outcome: str, error: str | None, to_first: float | None) -> None:
        from opentelemetry.trace import StatusCode

        if story.place is not None:
            story.place.end()
        span.set_attributes(
            {
                "gen_ai.usage.output_tokens": story.generated,
                "gen_ai.usage.cache_read.input_tokens": story.cached,
                "gen_ai.response.finish_reasons": [outcome],
                "xloom.replica.id": story.replica,
                "xloom.replays": story.replays,
            }
        )
        if to_first is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", to_first)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR, error)
        span.end()


def journal_for(room: Room, member: str, base: str, *, lines: bool, tracing: Tracing | None) -> Journal | None:
    """A journal where somebody reads it, else None."""
    return Journal(room, member, base, lines=lines, tracing=tracing) if lines or tracing is not None else None
