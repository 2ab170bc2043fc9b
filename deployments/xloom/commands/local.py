"""The model of a settings file in this process, without Ray: for `xloom chat` and `xloom generate`."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from xloom.adapters.catalog import AdapterCatalog
from xloom.adapters.wanted import wanted
from xloom.app import own_rules
from xloom.commands.detokeniser import Detokeniser
from xloom.commands.text_model import Answer, Message, Options, TextModel
from xloom.engines.base import LLMBackend
from xloom.engines.registry import backend_for, lacking, load_backend, names
from xloom.protocol import AdapterRef, TokenChunk, TokenRequest, XloomError
from xloom.settings import Settings

PREFERRED = "transformers"  # in one process; a server prefers paging
CLOSE_TIMEOUT_S = 10.0

Result = TypeVar("Result")


def local_backend(settings: Settings) -> type[LLMBackend]:
    """The backend the settings name; for `auto` transformers, if it can, before others. Raises `XloomError`."""
    if settings.engine.backend == "auto" and PREFERRED in names():
        preferred = load_backend(PREFERRED)
        if preferred.missing() is None and not lacking(preferred, settings):
            return preferred
    return backend_for(settings)


class LocalModel(TextModel):
    """One backend on an event loop of its own. What a model needs is loaded when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        base = settings.model.served_name
        self.names = [base, *settings.names]
        mixtures = [*(entry.name for entry in settings.xlora), *(entry.name for entry in settings.mixtures)]
        self.default = mixtures[0] if mixtures else base
        self._kind = local_backend(settings)
        self._backend: LLMBackend | None = None
        self._refs: dict[str, AdapterRef | None] = {base: None}
        self._streams: dict[str, SimpleQueue[TokenChunk | BaseException]] = {}
        self._folder = TemporaryDirectory(prefix="xloom-")
        self._ended = asyncio.Event()
        opened: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live(opened)), name="xloom-local", daemon=True)
        self._thread.start()
        self._loop = opened.result()

    async def _live(self, opened: Future[asyncio.AbstractEventLoop]) -> None:
        """The loop lives until `close`; what then still runs on it is cancelled."""
        opened.set_result(asyncio.get_running_loop())
        await self._ended.wait()

    def prepare(self, model: str) -> None:
        if self._backend is None:
            settings = self._settings
            self._tokenizer = read_tokenizer(settings)
            self._sampling = sampling_defaults(settings, self._tokenizer)
            self._backend = self._call(
                self._kind.load(
                    settings.model,
                    settings.engine,
                    xlora=settings.xlora_enabled,
                    max_lora_rank=_max_rank(settings),
                    isq=settings.isq,
                )
            )
            asyncio.run_coroutine_threadsafe(self._read_steps(self._backend), self._loop)
        if model not in self._refs:
            self._refs[model] = self._load_adapter(self._backend, model)

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _read_steps(self, backend: LLMBackend) -> None:
        try:
            async for step in backend.steps():
                for chunk in step:
                    if chunk.request_id in self._streams:
                        self._streams[chunk.request_id].put(chunk)
        except Exception as error:
            for stream in list(self._streams.values()):
                stream.put(error)

    def chat(self, messages: Sequence[Message], model: str, options: Options) -> Answer:
        self.prepare(self.named(model))
        if not self._tokenizer.chat_template:
            cure = "Use `xloom generate`, or a model made for conversation."
            raise XloomError("no_chat_template", f"{self._settings.model.source} has no chat template.", cure)
        try:
            prompt = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # the template is the model's own program and raises what it likes
            message = f"The model's chat template refuses the conversation: {error}"
            raise XloomError("chat_template_failed", message, "Leave out --system, or use another model.") from None
        return self._answer(prompt, model, options)

    def complete(self, prompt: str, model: str, options: Options) -> Answer:
        self.prepare(self.named(model))
        return self._answer(self._tokenizer(prompt).input_ids, model, options)

    def _answer(self, prompt: list[int], model: str, options: Options) -> Answer:
        answer = Answer(model)
        answer.pieces = self._pieces(answer, prompt, self._refs[model], options)
        return answer

    def _pieces(
        self, answer: Answer, prompt: list[int], adapter: AdapterRef | None, options: Options
    ) -> Generator[str, None, None]:
        sampling = self._sampling | {"max_tokens": options.max_tokens}
        if options.temperature is not None:
            sampling["temperature"] = options.temperature
        request = TokenRequest(uuid.uuid4().hex, prompt, sampling, adapter)
        stream: SimpleQueue[TokenChunk | BaseException] = SimpleQueue()
        self._streams[request.request_id] = stream
        text = Detokeniser(self._tokenizer, prompt)
        assert self._backend is not None
        submitted = False
        try:
            self._call(self._backend.submit(request))
            submitted = True
            while answer.finish_reason is None:
                chunk = stream.get()
                if isinstance(chunk, BaseException):
                    submitted = False
                    raise chunk
                answer.num_tokens += len(chunk.token_ids)
                tokens = chunk.token_ids[:-1] if chunk.finish_reason == "stop" else chunk.token_ids
                piece = text.push(tokens, last=chunk.finish_reason is not None)
                answer.finish_reason = chunk.finish_reason
                if piece:
                    yield piece
            if answer.finish_reason == "error":
                cure = "The log above says why; out of memory, lower --max-tokens or engine.max_model_len."
                raise XloomError("generation_failed", "The engine gave the answer up.", cure, 500)
        finally:
            del self._streams[request.request_id]
            if submitted and answer.finish_reason is None:
                self._call(self._backend.abort([request.request_id]))

    def _load_adapter(self, backend: LLMBackend, name: str) -> AdapterRef:
        settings = self._settings
        folder = Path(self._folder.name)
        catalog = AdapterCatalog(
            folder,
            settings.model.source,
            settings.store.max_rank,
            [settings.model.served_name],
            settings.model.revision,
        )
        each = next(entry for entry in wanted(settings) if entry.name == name)
        rules = own_rules(settings)
        entry = catalog.add(name, each.source, each.kind, each.overrides, rules=rules, blend=each.blend)
        self._call(backend.add_adapter(entry.ref, folder / "prepared" / entry.generation))
        return entry.ref

    def close(self) -> None:
        if self._backend is not None:
            self._call(self._backend.close())
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._folder.cleanup()


def _max_rank(settings: Settings) -> int:
    rank = settings.engine.max_lora_rank
    return settings.store.max_rank if rank == "auto" else rank


def read_tokenizer(settings: Settings) -> Any:
    """The model's tokenizer. Raises `XloomError` (tokenizer_not_loadable)."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the terminal shows ours
    model = settings.model
    try:
        return AutoTokenizer.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise XloomError(
            "tokenizer_not_loadable",
            f"No tokenizer could be read from {model.source!r}: {error}",
            "Name a model that comes with its tokenizer.",
        ) from error


def sampling_defaults(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """What vLLM's front end fills in from the model's generation_config.json, and the tokens that end a text.

    As `ModelConfig.get_diff_sampling_param` and `SamplingParams.update_from_generation_config`, vLLM 0.32.
    """
    from transformers import GenerationConfig

    try:
        model = settings.model
        written = GenerationConfig.from_pretrained(model.source, revision=model.revision).to_diff_dict()
    except OSError:  # it has none
        written = {}
    taken = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: written[name] for name in taken if written.get(name) is not None}
    ends = written.get("eos_token_id")
    others = {ends} if isinstance(ends, int) else set(ends or ())
    eos = tokenizer.eos_token_id
    if eos is not None:
        sampling["_eos_token_id"] = eos
    sampling["stop_token_ids"] = sorted(others - {eos})
    sampling["_all_stop_token_ids"] = sorted(others | ({eos} if eos is not None else set()))
    return sampling
