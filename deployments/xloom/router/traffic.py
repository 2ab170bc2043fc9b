"""What a router's requests amount to: counted per model and kind, a few hundred nanoseconds a chunk."""

from __future__ import annotations

import time
from typing import Literal

from xloom.observability import table
from xloom.observability.recorder import OTHER, Counter, Recorder
from xloom.protocol import AdapterRef, TokenRequest

Ending = Literal["stop", "abort", "error"]  # beside the engines' own finish reasons

OUTCOMES = frozenset({"stop", "length", "repetition", "abort", "error"})
# Why a request goes on elsewhere: `replica_lost`, or the code with which a replica refused it.
REASONS = frozenset({"replica_lost", "replica_draining", "engine_dead", "adapter_not_found"})


class _Model:
    """The series of one model, found once."""

    def __init__(self, recorder: Recorder, model: str, kind: str) -> None:
        labels = {"model": model, "kind": kind}
        self.prompt_tokens = recorder.counter(table.PROMPT_TOKENS, **labels)
        self.cached_tokens = recorder.counter(table.CACHED_TOKENS, **labels)
        self.generation_tokens = recorder.counter(table.GENERATION_TOKENS, **labels)
        self.first_token = recorder.histogram(table.TIME_TO_FIRST_TOKEN, **labels)
        self.inter_token = recorder.histogram(table.INTER_TOKEN, **labels)
        self.seconds = recorder.histogram(table.REQUEST_SECONDS, **labels)
        self._recorder, self._labels = recorder, labels
        self._outcomes: dict[str, Counter] = {}

    def ended(self, outcome: str) -> None:
        outcome = outcome if outcome in OUTCOMES else OTHER
        if outcome not in self._outcomes:
            self._outcomes[outcome] = self._recorder.counter(table.REQUESTS, outcome=outcome, **self._labels)
        self._outcomes[outcome].inc()


class RequestFigures:
    """One request, from its arrival to its end."""

    __slots__ = ("_arrived", "_last", "_model", "_prompt_tokens")

    def __init__(self, model: _Model, prompt_tokens: int) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._arrived = time.monotonic()
        self._last: float | None = None

    def tokens(self, count: int, cached: int, now: float) -> None:
        """A step brought tokens, at monotonic time `now`. The hot path."""
        if not count:
            return
        model = self._model
        if self._last is None:
            model.prompt_tokens.inc(self._prompt_tokens)
            model.cached_tokens.inc(cached)
            model.first_token.observe(now - self._arrived)
        else:
            model.inter_token.observe(now - self._last)
        self._last = now
        model.generation_tokens.inc(count)

    def end(self, outcome: str) -> None:
        """It has ended, by an engine's finish reason or an `Ending`."""
        self._model.ended(outcome)
        self._model.seconds.observe(time.monotonic() - self._arrived)


class Traffic:
    """The figures of one router. Names of models become labels only here: those of the base and of the store."""

    def __init__(self, recorder: Recorder, base: str) -> None:
        self._recorder, self._base = recorder, base
        self._models: dict[tuple[str, str], _Model] = {}
        self.in_flight = recorder.gauge(table.ROUTER_IN_FLIGHT)
        self.waiting = recorder.gauge(table.ROUTER_WAITING)
        self.replicas = recorder.gauge(table.ROUTER_REPLICAS)
        for gauge in (self.in_flight, self.waiting, self.replicas):
            gauge.set(0)

    def begin(self, request: TokenRequest) -> RequestFigures:
        """A request has arrived; of several answers to one prompt each is a request."""
        return RequestFigures(self._model(request.adapter), len(request.prompt_token_ids))

    def placed(self, replica_id: str, resident: bool) -> None:
        """A request goes to a replica."""
        self._recorder.inc(table.PLACEMENTS, replica=replica_id, resident="yes" if resident else "no")

    def replayed(self, reason: str) -> None:
        """A request goes on elsewhere."""
        self._recorder.inc(table.REPLAYS, reason=reason if reason in REASONS else OTHER)

    def _model(self, adapter: AdapterRef | None) -> _Model:
        key = (adapter.label, adapter.kind) if adapter else (self._base, "base")
        found = self._models.get(key)
        if found is None:
            found = self._models[key] = _Model(self._recorder, *key)
        return found
