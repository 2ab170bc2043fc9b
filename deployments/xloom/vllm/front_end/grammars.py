"""Grammars of structured output, compiled aside before a request is registered: in time, in memory, or refused.

An engine compiles in threads, which nothing can end, and all its requests with a grammar wait behind them.
Relies on vLLM 0.32: `vllm.sampling_params.StructuredOutputsParams`, `vllm.v1.structured_output.utils.
{choice_as_grammar, grammar_is_likely_lark}`; on xgrammar 0.2 `TokenizerInfo.{from_huggingface, serialize_json}`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from xloom.protocol import XloomError
from xloom.settings import LimitSettings

WORKERS = 2
WAITING = 64  # grammars that may wait for a worker
REMEMBERED = 4096  # grammars whose outcome is known
REFUSED_S = 60.0  # how long one that was refused is: the machine may have been busy
START_S = 60.0
WALL = 10  # times the limit of processor time: for a machine that has others to run

Job = tuple[str, str]  # kind, spec


def job_of(wanted: StructuredOutputsParams) -> Job | None:
    """What must be compiled for structured output, or None. Raises `XloomError` on what can't be."""
    try:
        if wanted.json is not None:
            return "json", wanted.json if isinstance(wanted.json, str) else json.dumps(wanted.json)
        if wanted.regex is not None:
            return "regex", wanted.regex
        if wanted.choice:
            return "grammar", choice_as_grammar(wanted.choice)
        if wanted.grammar is not None:
            return ("lark" if grammar_is_likely_lark(wanted.grammar) else "grammar"), wanted.grammar
        if wanted.structural_tag is not None:
            return "structural_tag", wanted.structural_tag
    except (TypeError, AttributeError, RecursionError) as error:
        raise XloomError("invalid_request", f"The structured output can't be read: {error}.", "Mend it.") from None
    return None


class GrammarCheck:
    """The grammars a router has seen, and the processes that compile new ones.

    `tokenizer_info` gives xgrammar's serialised tokeniser; it is called in a thread. `library` is what the engines
    compile with, xgrammar or guidance; `compact`: without optional whitespace.
    """

    def __init__(
        self,
        limits: LimitSettings,
        tokenizer_info: Callable[[], str],
        library: str = "xgrammar",
        *,
        compact: bool = False,
    ) -> None:
        self._limits, self._tokenizer_info = limits, tokenizer_info
        self._library, self._compact = library, compact
        self._free: list[_Worker | None] = [None] * WORKERS
        self._slots = asyncio.Semaphore(WORKERS)
        self._outcomes: OrderedDict[bytes, tuple[XloomError | None, float]] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[XloomError | None]] = {}
        self._info: str | None = None

    async def check(self, wanted: StructuredOutputsParams) -> None:
        """Raises `XloomError` when a grammar is too large, or takes too long or too much memory to compile."""
        job = job_of(wanted)
        if job is None:
            return
        size = len(job[1].encode("utf-8", "surrogatepass"))
        if size > self._limits.schema_bytes:
            cure = f"At most {self._limits.schema_bytes} are taken: `router.limits.schema_bytes`."
            raise XloomError("limit_exceeded", f"The grammar has {size} bytes.", cure)
        key = hashlib.sha256(repr(job).encode("utf-8", "surrogatepass")).digest()
        error, until = self._outcomes.get(key, (None, 0.0))
        if time.monotonic() < until:
            self._outcomes.move_to_end(key)
        else:
            error = await self._outcome(key, job)
        if error is not None:
            raise XloomError(error.code, error.message, error.cure, error.status)

    def close(self) -> None:
        """End the processes."""
        for task in self._running.values():
            task.cancel()
        for worker in self._free:
            if worker is not None:
                worker.end()

    async def _outcome(self, key: bytes, job: Job) -> XloomError | None:
        task = self._running.get(key)
        if task is None:
            if len(self._running) >= WAITING:
                raise XloomError("grammars_busy", "Too many new grammars wait to be compiled.", "Retry later.", 429)
            task = self._running[key] = asyncio.create_task(self._compile(key, job))
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(task)  # the client of one of several requests may leave

    async def _compile(self, key: bytes, job: Job) -> XloomError | None:
        async with self._slots:
            self._free.sort(key=lambda worker: worker is not None)
            worker = self._free.pop()
            try:
                if worker is None:
                    worker = await self._start()
                outcome = await worker.compile(job, WALL * self._limits.grammar_timeout_s)
            except (OSError, TimeoutError, ValueError):
                if worker is not None:
                    worker.end()
                worker = None
                what = f"The grammar takes over {self._limits.grammar_timeout_s:g} s or too much memory to compile."
                outcome = XloomError("grammar_too_complex", what, "Simplify it.")
            except BaseException:
                if worker is not None:
                    worker.end()
                worker = None
                raise
            finally:
                self._free.append(worker)
        self._outcomes[key] = outcome, (math.inf if outcome is None else time.monotonic() + REFUSED_S)
        self._outcomes.move_to_end(key)
        while len(self._outcomes) > REMEMBERED:
            self._outcomes.popitem(last=False)
        return outcome

    async def _start(self) -> _Worker:
        if self._info is None:
            self._info = await asyncio.to_thread(self._tokenizer_info) if self._library == "xgrammar" else ""
        try:
            return await _Worker.start(self._info, self._library, self._compact, self._limits)
        except (OSError, TimeoutError, ValueError) as error:
            what = f"The process that compiles grammars did not start: {error!r}."
            raise XloomError("grammars_unavailable", what, "See the router's log.", 503) from None


class _Worker:
    """One process of `grammar_worker`, spoken to in a thread: event loops start none outside the main thread."""

    def __init__(self, library: str, compact: bool, limits: LimitSettings) -> None:
        module = "xloom.vllm.front_end.grammar_worker"
        most = str(limits.grammar_timeout_s), str(limits.grammar_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, library, "compact" if compact else "loose", *most],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @classmethod
    async def start(cls, info: str, library: str, compact: bool, limits: LimitSettings) -> _Worker:
        worker = await asyncio.to_thread(cls, library, compact, limits)
        try:
            async with asyncio.timeout(START_S):
                await asyncio.to_thread(worker._ask, info.encode())
        except BaseException:
            worker.end()
            raise
        return worker

    async def compile(self, job: Job, timeout_s: float) -> XloomError | None:
        """None, also where the library can't do it: vLLM then refuses it with its reason."""
        kind, spec = job
        line = json.dumps({"kind": kind, "spec": spec}).encode()
        async with asyncio.timeout(timeout_s):
            await asyncio.to_thread(self._ask, line)
        return None

    def _ask(self, line: bytes) -> None:
        """Raises `OSError` or `ValueError` when the process has ended: `end` ends a wait as well."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        json.loads(process.stdout.readline())

    def end(self) -> None:
        """Kill it; what waits for it goes on."""
        self._process.kill()
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
