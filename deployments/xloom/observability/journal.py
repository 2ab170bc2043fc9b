"""What became of each request: a log line and a span at its end, in the router and in the replica.

A component keeps one only where the settings ask for either; without it its hot path asks `is None`, once a step.
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

logger = logging.getLogger(__name__)

Component = Literal["router", "replica"]

_CHAT = re.compile(r"(\d+_)?(chatcmpl|resp|msg)")  # how vLLM's ids of chat requests begin; n > 1 puts a number before
# Sampling parameters by their names in OpenTelemetry's GenAI conventions.
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")


@dataclass(eq=False)
class _RequestRecord:
    """One request in this component."""

    request: TokenRequest
    began: float  # monotonic
    replica: str
    first: float | None = None  # when its first tokens came
    cached: int = 0  # prompt tokens
    generated: int = 0  # tokens
    replays: int = 0
    span: Span | None = None
    placing: Span | None = None
    traced: dict[str, str] = field(default_factory=dict)


class Journal:
    """The requests of one component. `base` is the base model's name, `member` the router's or replica's id."""

    def __init__(self, component: Component, member: str, base: str, *, lines: bool, tracing: Tracing | None) -> None:
        self._component, self._member, self._base, self._lines, self._tracing = component, member, base, lines, tracing
        self._logger = logging.getLogger(f"xloom.{component}.requests")
        self._records: dict[str, _RequestRecord] = {}

    def begin(self, request: TokenRequest) -> TokenRequest:
        """A request came; returns it as it goes on from here, with the trace it belongs to."""
        try:
            return self._begin(request)
        except Exception:
            self._give_up(request.request_id)
            return request

    def _give_up(self, request_id: str) -> None:
        """What can't be recorded is no fault of the request's, and none of the others in its step."""
        self._records.pop(request_id, None)
        logger.exception("the record of request %s was given up", request_id)

    def _begin(self, request: TokenRequest) -> TokenRequest:
        in_replica = self._component == "replica"
        record = _RequestRecord(request, time.monotonic(), self._member if in_replica else "")
        self._records[request.request_id] = record
        if self._tracing is not None:
            about = self._attributes(request)
            name = f"{about['gen_ai.operation.name']} {about['gen_ai.request.model']}"
            context = self._tracing.context(request.trace) if in_replica else None
            record.span = self._tracing.request(name, context, about, remote=in_replica)
            record.traced = ids(record.span)
            if not in_replica:
                request = msgspec.structs.replace(request, trace=self._tracing.carrier(record.span))
                self._begin_placing(record)
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
        if self._component == "replica":
            about["xloom.replica.id"] = self._member
        given = request.sampling
        return about | {
            f"gen_ai.request.{name}": _attribute(given[name]) for name in _SAMPLING if given.get(name) is not None
        }

    def _model(self, request: TokenRequest) -> tuple[str, str]:
        return (request.adapter.label, request.adapter.kind) if request.adapter else (self._base, "base")

    # On its way.

    def sent(self, request_id: str, replica: str) -> None:
        """A replica was chosen."""
        record = self._records.get(request_id)
        if record is None:
            return
        record.replica = replica
        if record.placing is not None:
            record.placing.set_attribute("xloom.replica.id", replica)
            record.placing.end()
            record.placing = None

    def moved(self, request_id: str, reason: str) -> None:
        """Its replica lost or refused it: it goes on elsewhere."""
        record = self._records.get(request_id)
        if record is None:
            return
        record.replays += 1
        self.event(request_id, "replay", {"xloom.reason": reason, "xloom.replica.id": record.replica})
        self._begin_placing(record)

    def event(self, request_id: str, name: str, attributes: dict[str, Any] | None = None) -> None:
        """Something happened to it."""
        record = self._records.get(request_id)
        if record is not None and record.span is not None:
            record.span.add_event(name, {"xloom.generated_tokens": record.generated, **(attributes or {})})

    def _begin_placing(self, record: _RequestRecord) -> None:
        if self._tracing is not None and record.span is not None:
            record.placing = self._tracing.child(record.span, "place", {"xloom.attempt": record.replays + 1})

    def step(self, chunks: Sequence[TokenChunk]) -> None:
        """An engine step's chunks: the hot path of a component that keeps a journal."""
        for chunk in chunks:
            record = self._records.get(chunk.request_id)
            if record is None:
                continue
            try:
                self._take(record, chunk)
            except Exception:
                self._give_up(chunk.request_id)

    def _take(self, record: _RequestRecord, chunk: TokenChunk) -> None:
        if record.first is None and chunk.token_ids:
            record.first, record.cached = time.monotonic(), chunk.num_cached_tokens
            if record.span is not None:
                record.span.add_event("first_token")
        record.generated += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.end(chunk.request_id, chunk.finish_reason)

    # Its end.

    def end(self, request_id: str, outcome: str, error: str | None = None) -> None:
        """It is over: stop, length, abort or error, then with a code. The first end counts."""
        record = self._records.pop(request_id, None)
        if record is None:
            return
        try:
            self._end(record, request_id, outcome, error)
        except Exception:
            self._give_up(request_id)

    def _end(self, record: _RequestRecord, request_id: str, outcome: str, error: str | None) -> None:
        to_first = None if record.first is None else record.first - record.began
        if record.span is not None:
            self._end_span(record, record.span, outcome, error, to_first)
        if self._lines:
            request = record.request
            model, kind = self._model(request)
            told = {
                "request_id": request.client_id,
                "engine_request_id": request_id,
                "model": model,
                "kind": kind,
                "replica": record.replica,
                "prompt_tokens": len(request.prompt_token_ids),
                "cached_tokens": record.cached,
                "generated_tokens": record.generated,
                "ttft_s": None if to_first is None else round(to_first, 4),
                "seconds": round(time.monotonic() - record.began, 4),
                "outcome": outcome,
                **({"error": error} if error else {}),
                **({"replays": record.replays} if self._component == "router" else {}),
                **record.traced,
            }
            self._logger.info("request ended: %s", error or outcome, extra=fields(**told))

    @staticmethod
    def _end_span(record: _RequestRecord, span: Span, outcome: str, error: str | None, to_first: float | None) -> None:
        from opentelemetry.trace import StatusCode

        if record.placing is not None:
            record.placing.end()
        span.set_attributes(
            {
                "gen_ai.usage.output_tokens": record.generated,
                "gen_ai.usage.cache_read.input_tokens": record.cached,
                "gen_ai.response.finish_reasons": [outcome],
                "xloom.replica.id": record.replica,
                "xloom.replays": record.replays,
            }
        )
        if to_first is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", to_first)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR, error)
        span.end()


def _attribute(value: Any) -> Any:
    """An integer beyond 64 bits with a sign would cost every span of its batch: OTLP has no such attribute."""
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def journal_for(
    component: Component, member: str, base: str, *, lines: bool, tracing: Tracing | None
) -> Journal | None:
    """A journal where somebody reads it, else None."""
    return Journal(component, member, base, lines=lines, tracing=tracing) if lines or tracing is not None else None
