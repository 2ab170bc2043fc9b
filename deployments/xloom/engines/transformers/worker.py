"""The thread that owns the model of the `transformers` backend: which requests run, and one step after the other."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xloom.engines.transformers.batch import BatchRunner, Caches, Part
from xloom.engines.transformers.sampling import Sampler, top_logprobs
from xloom.engines.transformers.told_gates import ToldGates
from xloom.mixtures.hooks import Adapter
from xloom.protocol import Logprobs, TokenChunk, TokenRequest

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 2048  # prompt tokens in one step, over all requests; decoding ones wait no longer than that takes


@dataclass
class Job:
    """One request: its tokens so far, and how many of them its caches hold."""

    request: TokenRequest
    sampler: Sampler
    adapter: Adapter | None
    constant: Tensor | None = None  # [M, K]: the gates that the request brings
    caches: Caches | None = None
    tokens: list[int] = field(default_factory=list)  # prompt, then those made
    computed: int = 0
    suspect: bool = False  # it ran in a step that failed: next alone
    prompt_logits: list[Tensor] = field(default_factory=list)  # where prompt_logprobs are wanted
    gates: ToldGates | None = None  # of a mixture

    def __post_init__(self) -> None:
        if self.adapter is not None and self.adapter.mixture is not None:
            prompt, layers = len(self.request.prompt_token_ids), self.request.layer_gates
            self.gates = ToldGates(self.adapter.mixture, prompt, layers=layers)

    @property
    def name(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def longest(self) -> int:
        """Tokens it may come to."""
        return len(self.request.prompt_token_ids) + self.sampler.max_tokens


class Worker:
    """Runs requests in the order they came, up to `max_num_seqs` at a time, in one packed batch a step.

    There are no pages to take back: a request starts once the memory left holds it at its longest. `page` and `pages`
    are the size of that memory, in tokens and pages of them.
    """

    def __init__(
        self,
        runner: BatchRunner,
        *,
        max_num_seqs: int,
        page: int,
        pages: int,
        emit: Callable[[list[TokenChunk]], None],
        died: Callable[[BaseException], None],
    ) -> None:
        self._runner = runner
        self._max_num_seqs, self._page, self._pages = max_num_seqs, page, pages
        self._emit, self._died = emit, died
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._aborted: set[str] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="xloom-transformers", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a request."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests; those running, before the next step."""
        with self._changed:
            gone = set(request_ids)
            self._waiting = deque(job for job in self._waiting if job.name not in gone)
            self._aborted |= gone
            self._changed.notify()

    def close(self, timeout: float) -> None:
        """End the thread, after the step it is in."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def figures(self) -> tuple[int, int, int]:
        """Requests running and waiting, and the pages their tokens fill."""
        running = tuple(self._running)
        return len(running), len(self._waiting), sum(self._pages_for(job.computed) for job in running)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page)

    # The thread.

    def _run(self) -> None:
        try:
            while self._admit():
                chunks = self._step()
                if chunks:
                    self._emit(chunks)
        except BaseException as error:  # a mistake of ours: what fails in the model is the requests'
            logger.exception("the engine's thread has ended")
            self._died(error)

    def _admit(self) -> bool:
        """Wait for work and start what there is room for; False when it is time to end."""
        with self._changed:
            while True:
                if self._aborted:
                    self._running = [job for job in self._running if job.name not in self._aborted]
                    self._aborted.clear()
                if self._closing:
                    return False
                free = self._pages - sum(self._pages_for(job.longest) for job in self._running)
                while self._waiting and len(self._running) < self._max_num_seqs:
                    needed = self._pages_for(self._waiting[0].longest)
                    if needed > free and self._running:  # one that fits nowhere runs by itself
                        break
                    free -= needed
                    job = self._waiting.popleft()
                    job.tokens = list(job.request.prompt_token_ids)
                    try:
                        job.caches = self._runner.caches(job.adapter)
                    except Exception:
                        logger.exception("request %s could not be started", job.name)
                        self._emit([TokenChunk(job.name, [], "error")])
                        continue
                    self._running.append(job)
                if self._running:
                    return True
                self._changed.wait()

    def _step(self) -> list[TokenChunk]:
        """One forward pass over what each running request has new, and a token for each that is up to date."""
        suspects = [job for job in self._running if job.suspect]
        jobs = suspects[:1] or self._running
        parts = _parts(jobs)
        try:
            logits = self._runner.run([part for _, part in parts])
        except Exception as error:
            return self._survive([job for job, _ in parts], error)
        chunks = []
        for (job, part), rows in zip(parts, logits, strict=True):
            job.computed += len(part.tokens)
            gates = self._runner.gates(part)
            try:
                if job.gates is not None and gates is not None:
                    job.gates.add(part.start, gates)
                chunk = _take(job, part, rows)
            except Exception:
                logger.exception("sampling for request %s failed", job.name)
                chunk = TokenChunk(job.name, [], "error")
            if chunk is not None:
                job.suspect = False
                chunks.append(chunk)
        self._finish({chunk.request_id for chunk in chunks if chunk.finish_reason is not None})
        return chunks

    def _survive(self, jobs: list[Job], error: Exception) -> list[TokenChunk]:
        """A step has failed: a request that was alone in it ends; several are begun anew, one after the other."""
        # Not logged with its frames, which hold on to the step's tensors.
        logger.error("a step over %d requests failed: %s: %s", len(jobs), type(error).__name__, error)
        for job in jobs:
            job.caches, job.computed, job.prompt_logits = self._runner.caches(job.adapter), 0, []
            job.suspect = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(jobs) > 1:
            return []
        self._finish({jobs[0].name})
        return [TokenChunk(jobs[0].name, [], "error")]

    def _finish(self, names: set[str]) -> None:
        if names:
            with self._changed:
                self._running = [job for job in self._running if job.name not in names]


def _parts(jobs: Iterable[Job]) -> list[tuple[Job, Part]]:
    """What each request has that its caches have not; prompts in pieces, when they are long or many."""
    found = []
    budget = PREFILL_TOKENS
    for job in jobs:
        new = len(job.tokens) - job.computed
        count = new if new == 1 else min(new, budget)
        if not count:
            continue  # next time: the prompts before it fill the step
        budget -= count if new > 1 else 0
        assert job.caches is not None
        tokens = job.tokens[job.computed : job.computed + count]
        wanted = job.sampler.sampling.prompt_logprobs is not None
        in_prompt = job.computed < len(job.request.prompt_token_ids) and not job.sampler.made
        found.append((job, Part(tokens, job.computed, job.adapter, job.caches, wanted and in_prompt, job.constant)))
    return found


def _take(job: Job, part: Part, logits: Tensor) -> TokenChunk | None:
    """The next token of a request, once its caches are up to date."""
    if part.all_logits:
        job.prompt_logits.append(logits)
    if job.computed < len(job.tokens):
        return None
    token, logprobs = job.sampler.next(logits[-1])
    job.tokens.append(token)
    reason, stop = job.sampler.end()
    gates = None if job.gates is None else job.gates.take()
    return TokenChunk(job.name, [token], reason, stop, logprobs, _prompt_logprobs(job), gates=gates)


def _prompt_logprobs(job: Job) -> Logprobs | None:
    """Of the prompt's tokens from the second on, with the request's first token."""
    count = job.sampler.sampling.prompt_logprobs
    if count is None or not job.prompt_logits:
        return None
    rows, job.prompt_logits = torch.cat(job.prompt_logits), []
    prompt = job.request.prompt_token_ids
    return top_logprobs(rows[: len(prompt) - 1], prompt[1:], count) if len(prompt) > 1 else None
