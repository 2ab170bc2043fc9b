"""Requests on their way: placed on a replica, waiting for one, or going on elsewhere after a loss."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from xloom.observability.journal import Journal
from xloom.observability.logs import fields
from xloom.observability.recorder import Recorder
from xloom.protocol import Abort, AdapterRef, RequestFailed, Step, Submit, TokenChunk, TokenRequest, XloomError
from xloom.router.answer_size import check_answer_size
from xloom.router.directory import Directory, Discover, Link
from xloom.router.placement import Candidate, choose
from xloom.router.replay import replay
from xloom.router.traffic import Ending, RequestFigures, Traffic
from xloom.wire.requests import encode_request
from xloom.wire.silence import SILENCE_S

logger = logging.getLogger(__name__)

UNKNOWN_VOCABULARY = 1 << 20  # tokens; until the front end says how many there are
READY_TIMEOUT_S = 60.0  # how long a request waits for a first replica (a scale-up from zero takes this order)

OnStep = Callable[[list[TokenChunk]], None]
OnFailed = Callable[[str, XloomError], None]


@dataclass(eq=False)
class _RequestState:
    """One request, from its arrival to its end."""

    request: TokenRequest  # as it arrived
    figures: RequestFigures
    tokens: list[int] = field(default_factory=list)  # emitted so far, over all attempts
    attempts: int = 0  # replicas that have begun it
    link: Link | None = None
    wire_id: str = ""
    body: bytes | None = None  # the request as it arrived, encoded, until it is sent
    refused_by: set[str] = field(default_factory=set)
    refusal: XloomError | None = None
    timer: asyncio.TimerHandle | None = None


class Dispatcher:
    """Sends token requests to replicas and hands their tokens back, step by step."""

    def __init__(
        self,
        discover: Discover,
        token: str,
        router_id: str,
        *,
        ready_timeout_s: float = READY_TIMEOUT_S,
        silent_after_s: float = SILENCE_S,
        traffic: Traffic | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.router_id = router_id
        self._traffic = traffic or Traffic(Recorder(), "base")
        self._journal = journal
        self.directory = Directory(discover, token, router_id, self, silent_after_s)
        self.on_tokens: OnStep = lambda chunks: None
        self.on_failed: OnFailed = lambda request_id, error: None
        self.on_figures: Callable[[], None] = lambda: None  # a replica reported
        self.start_failure = ""  # why the last replica that did not start did not; cleared once one is there
        self.newest: Callable[[AdapterRef], AdapterRef | None] = lambda ref: ref  # what its name stands for now
        self.on_starved: Callable[[], None] = lambda: None  # requests wait and there is no replica
        self.draining = False  # the router is to end
        self.vocabulary = UNKNOWN_VOCABULARY
        self._ready_timeout_s = ready_timeout_s
        self._requests: dict[str, _RequestState] = {}
        self._on_wire: dict[str, _RequestState] = {}
        self._waiting: dict[str, _RequestState] = {}
        self._turn = 0

    def start(self) -> None:
        """Begin to connect to replicas."""
        self.directory.start()

    async def close(self) -> None:
        """Drop all connections; requests in state fail with their replicas."""
        for state in list(self._requests.values()):
            self._fail(state, XloomError("router_closing", "The router is shutting down.", "Retry.", 503))
        await self.directory.close()

    @property
    def in_flight(self) -> int:
        """Requests between arrival and end."""
        return len(self._requests)

    @property
    def is_ready(self) -> bool:
        """Whether a replica can take a request now."""
        return any(not link.draining for link in self.directory.links)

    def submit(self, request: TokenRequest) -> None:
        """Take a request; its chunks or its failure come through the callbacks.

        Raises `XloomError`, and then nothing here knows of it: unencodable_request, request_too_large,
        too_many_logprobs.
        """
        check_answer_size(request.sampling, len(request.prompt_token_ids), self.vocabulary)
        body = encode_request(request)
        told = request if self._journal is None else self._journal.begin(request)
        state = _RequestState(told, self._traffic.begin(request), body=body if told is request else None)
        self._requests[request.request_id] = state
        self._traffic.in_flight.set(len(self._requests))
        self._place(state)

    def abort(self, request_ids: list[str], ending: Ending = "abort") -> None:
        """Forget requests and free what they hold; unknown ids are ignored. `ending` is what they count as."""
        by_link: dict[Link, list[str]] = {}
        for request_id in request_ids:
            state = self._requests.get(request_id)
            if state is None:
                continue
            if state.link is not None:
                by_link.setdefault(state.link, []).append(state.wire_id)
            self._end(state, ending)
        for link, wire_ids in by_link.items():
            link.send(Abort(wire_ids))

    # Placement.

    def _place(self, state: _RequestState) -> None:
        """On a replica, or among those that wait for one. What goes wrong with it is its own affair."""
        try:
            self._send(state)
        except XloomError as error:
            self._fail(state, error)
        except Exception as error:
            logger.exception("request %s could not be placed", state.request.request_id)
            self._fail(state, _mistake(error))

    def _send(self, state: _RequestState) -> None:
        request = replay(state.request, state.tokens, state.attempts)
        adapter = state.request.adapter
        key = adapter.key if adapter else None
        links = {link.info.replica_id: link for link in self.directory.links}
        candidates = [
            Candidate(
                replica_id,
                link.stats,
                len(link.own),
                link.own_at_report,
                link.draining,
                key is None or key in link.stats.adapters,
            )
            for replica_id, link in links.items()
            if replica_id not in state.refused_by
        ]
        self._turn += 1
        chosen = choose(candidates, self._turn)
        if chosen is None:
            self._wait(state)
            return
        body = state.body or encode_request(request)
        link = links[chosen]
        self._stop_waiting(state)
        state.body = None
        state.link = link
        state.wire_id = f"{request.request_id}#{self._turn}" if state.attempts else request.request_id
        state.attempts += 1
        self._on_wire[state.wire_id] = state
        self._traffic.placed(chosen, key is None or key in link.stats.adapters)
        if self._journal is not None:
            self._journal.sent(state.request.request_id, chosen)
        link.own.add(state.wire_id)
        link.send(Submit(state.wire_id, body))

    def _wait(self, state: _RequestState) -> None:
        """No replica may take it now: wait for one, for so long."""
        if state.refusal is not None and self.is_ready:
            self._fail(state, state.refusal)  # all that are there have refused it for good
            return
        if state.timer is None:
            loop = asyncio.get_running_loop()
            state.timer = loop.call_later(self._ready_timeout_s, self._time_out, state)
        self._waiting[state.request.request_id] = state
        self._traffic.waiting.set(len(self._waiting))
        if not self.directory.links:
            self.on_starved()

    def _stop_waiting(self, state: _RequestState) -> None:
        self._waiting.pop(state.request.request_id, None)
        self._traffic.waiting.set(len(self._waiting))
        if state.timer is not None:
            state.timer.cancel()
            state.timer = None

    def _time_out(self, state: _RequestState) -> None:
        message = f"No replica was ready within {self._ready_timeout_s:g} s."
        self._fail(state, self.none_ready(message, "See `xloom status`; raise replicas.min to keep one warm."))

    def none_ready(self, message: str, cure: str) -> XloomError:
        """What a client is told when no replica can answer: with the cause, where one did not start."""
        if self.start_failure and not self.directory.links:
            message, cure = f"{message} The last one did not start: {self.start_failure}", ""
        return XloomError("no_replica_ready", message, cure, 503)

    # Ends.

    def _detach(self, state: _RequestState) -> None:
        """It is on no replica any more."""
        if state.link is not None:
            state.link.release(state.wire_id)
            self._on_wire.pop(state.wire_id, None)
            state.link = None

    def _drop(self, state: _RequestState) -> None:
        self._detach(state)
        self._stop_waiting(state)
        self._requests.pop(state.request.request_id, None)
        self._traffic.in_flight.set(len(self._requests))

    def _end(self, state: _RequestState, outcome: str, code: str | None = None) -> None:
        """It is over. What it is counted and logged as must not keep it from ending."""
        self._drop(state)
        try:
            state.figures.end(outcome)
        except Exception:
            logger.exception("request %s was not counted", state.request.request_id)
        if self._journal is not None:
            self._journal.end(state.request.request_id, outcome, code)

    def _fail(self, state: _RequestState, error: XloomError) -> None:
        if state.request.request_id not in self._requests:
            return
        self._end(state, "error", error.code)
        self._tell(state.request.request_id, error)

    def _tell(self, request_id: str, error: XloomError) -> None:
        try:
            self.on_failed(request_id, error)
        except Exception:
            logger.exception("the failure of request %s was not taken", request_id)

    def give_up(self, request_id: str, error: XloomError) -> None:
        """End a request whose answer can't be used, here and on its replica."""
        state = self._requests.get(request_id)
        if state is None:
            self._tell(request_id, error)
            return
        link, wire_id = state.link, state.wire_id
        self._fail(state, error)
        if link is not None:
            link.send(Abort([wire_id]))

    # What happens on the connections.

    def on_ready(self, link: Link) -> None:
        for state in list(self._waiting.values()):
            self._place(state)

    def on_step(self, link: Link, step: Step) -> None:
        """The hot path: one engine step's chunks."""
        chunks = []
        now = time.monotonic()
        for chunk in step.chunks:
            state = self._on_wire.get(chunk.request_id)
            if state is None:
                continue  # aborted, or an attempt that was given up
            try:
                state.tokens.extend(chunk.token_ids)
                state.figures.tokens(len(chunk.token_ids), chunk.num_cached_tokens, now)
                chunk.request_id = state.request.request_id
                if chunk.finish_reason is not None:
                    state.figures.end(chunk.finish_reason)
                    self._drop(state)
            except Exception as error:
                logger.exception("a chunk of request %s was not taken", state.request.request_id)
                self.give_up(state.request.request_id, _mistake(error))
                continue
            chunks.append(chunk)
        if not chunks:
            return
        if self._journal is not None:
            self._journal.step(chunks)
        try:
            self.on_tokens(chunks)
        except Exception as error:  # whoever takes the tokens answers for each request by itself: else all lack some
            logger.exception("the tokens of %d requests were not taken", len(chunks))
            for chunk in chunks:
                self.give_up(chunk.request_id, _mistake(error))

    def on_refused(self, link: Link, failure: RequestFailed) -> None:
        state = self._on_wire.get(failure.request_id)
        if state is None:
            return
        error = XloomError(failure.code, failure.message, failure.cure, failure.status)
        if not failure.retryable:
            self._fail(state, error)
            return
        told = fields(request_id=state.request.client_id, replica=link.info.replica_id)
        logger.info("request %s goes on elsewhere: %s", state.request.request_id, failure.code, extra=told)
        state.refused_by.add(link.info.replica_id)
        if failure.code == "replica_draining":
            link.draining = True
            state.attempts -= 1  # it was never begun there
        elif failure.code != "engine_dead":
            state.attempts -= 1
            state.refusal = error
            self._renew(state)
        self._detach(state)
        self._resume(state, failure.code)

    def on_report(self, link: Link) -> None:
        self._traffic.replicas.set(len(self.directory.links))
        if self._waiting and not link.draining:
            self.on_ready(link)
        self.on_figures()

    def on_lost(self, link: Link) -> None:
        lost = [self._on_wire[wire_id] for wire_id in list(link.own)]
        if lost:
            logger.warning("replica %s was lost with %d requests", link.info.replica_id, len(lost))
        for state in lost:
            self._detach(state)
        for state in lost:
            self._resume(state, "replica_lost")
        self._traffic.replicas.set(len(self.directory.links))
        self.on_figures()

    def _renew(self, state: _RequestState) -> None:
        """What was replaced on its way is served, before its first token, with what took its place."""
        adapter = state.request.adapter
        newest = self.newest(adapter) if adapter is not None and not state.tokens else None
        if newest is not None and newest != adapter:
            state.request = msgspec.structs.replace(state.request, adapter=newest)
            state.refused_by.clear()
            state.refusal = None

    def _resume(self, state: _RequestState, reason: str) -> None:
        """On another replica, now or when there is one."""
        if self._journal is not None:
            self._journal.moved(state.request.request_id, reason)
        self._place(state)
        if state.request.request_id in self._requests:  # else it could not, and has failed
            self._traffic.replayed(reason)


def _mistake(error: Exception) -> XloomError:
    """A mistake of ours, which one request pays for."""
    message = f"The router failed with this request: {type(error).__name__}."
    return XloomError("internal_error", message, "Look in the router's log and report it.", 500)
