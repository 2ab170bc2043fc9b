"""vLLM's `AsyncLLM` over replicas: its renderer, detokeniser and output processor, none of its engine.

Relies on vLLM 0.32: `vllm.v1.engine.async_llm.AsyncLLM`, which makes its client with
`EngineCoreClient.make_async_mp_client`; `vllm.config.VllmConfig` built without a device as
`vllm.entrypoints.launchers.render.entry.run_launch_fastapi` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.executor import Executor
from vllm.v1.outputs import LogprobsTensors

from xloom.adapters.manifest import Manifest
from xloom.protocol import XloomError
from xloom.router.return_mixture import wanted_gates
from xloom.router.traffic import Ending
from xloom.router.weights import adapter_in_place
from xloom.settings import LimitSettings, Settings
from xloom.vllm.front_end.core_client import RoutedCoreClient
from xloom.vllm.front_end.grammars import GrammarCheck
from xloom.vllm.front_end.mixture_answers import mixes, with_mixtures
from xloom.vllm.lora import lora_request
from xloom.vllm.metrics import RequestStatLogger, ScrapedStatLogger


class RequestError(GracefulHTTPError):
    """An `XloomError` on its way through vLLM's front end, which passes this type to the client as it is."""

    def __init__(self, error: XloomError) -> None:
        super().__init__(f"{error.message} {error.cure}".strip(), HTTPStatus(error.status))
        self.code = error.code


# Outputs of a step that are processed in one go: a request's first takes 0.6 ms with a prompt of 4,000 tokens.
OUTPUTS_AT_ONCE = 32

# Engine arguments in `engine.extra_args` that the front end needs as well.
_SHARED_ARGS = frozenset(
    {"tokenizer", "tokenizer_mode", "tokenizer_revision", "reasoning_parser", "generation_config", "max_logprobs",
     "override_generation_config", "hf_config_path", "hf_token", "skip_tokenizer_init", "code_revision",
     "structured_outputs_config"}
)  # fmt: skip


def engine_args(settings: Settings) -> dict[str, Any]:
    """The arguments of `AsyncEngineArgs` that the front end and the engine must share."""
    shared = {key: value for key, value in settings.engine.extra_args.items() if key in _SHARED_ARGS}
    outputs = StructuredOutputsConfig(**shared.pop("structured_outputs_config", None) or {})
    if outputs.backend == "auto":
        # An engine takes the library of its first such request for all that follow: one client would choose for all.
        outputs.backend = "xgrammar"
    return {
        "model": settings.model.source,
        "revision": settings.model.revision,
        "served_model_name": [settings.model.served_name],
        "max_model_len": settings.engine.max_model_len,
        "dtype": settings.engine.dtype,
        "structured_outputs_config": outputs,
        **shared,
        "trust_remote_code": False,  # here too no code from a model's repository is run
    }


def front_end_config(settings: Settings) -> VllmConfig:
    """A configuration that needs neither weights nor a device; LoRA on, so that adapters are accepted."""
    args = AsyncEngineArgs(**engine_args(settings))
    model_config = args.create_model_config()
    model_config.quantization = None  # no kernels here: nothing to check
    envs.VLLM_CPU_KVCACHE_SPACE = 0  # no pages here: silences the CPU platform's warning
    envs.VLLM_V1_OUTPUT_PROC_CHUNK_SIZE = OUTPUTS_AT_ONCE
    return VllmConfig(
        model_config=model_config,
        lora_config=LoRAConfig(max_lora_rank=512, max_loras=1),
        structured_outputs_config=args.create_structured_outputs_config(),
    )


class RoutedEngineClient(AsyncLLM):
    """What vLLM's OpenAI front end takes for an engine."""

    def __init__(self, vllm_config: VllmConfig, core: RoutedCoreClient, limits: LimitSettings | None = None) -> None:
        with _core_client(core):
            super().__init__(
                vllm_config,
                Executor,
                log_stats=True,
                log_requests=False,
                # StatLoggerManager leaves its own Prometheus logger out once it is given one of its kind. Ours of that
                # kind last: each, as it is made, takes what /metrics had of vLLM out of the registry.
                stat_loggers=[RequestStatLogger, ScrapedStatLogger],
            )
        core.call_on_failure(self._fail)
        core.call_on_prompt_logprobs(self._take_prompt_logprobs)
        core.set_vocabulary(vllm_config.model_config.get_vocab_size())
        outputs = vllm_config.structured_outputs_config
        library, compact = outputs.backend, outputs.disable_any_whitespace
        limits = limits or LimitSettings()
        self._most_logprobs, self._most_gates = limits.logprob_values, limits.gate_values
        self._adapters: dict[str, int] = {}  # in each mixture, by the key of what is served
        self._grammars = GrammarCheck(limits, self._tokenizer_info, library, compact=compact)
        # Without it vLLM leaves structured output to us: `add_request` has it validated, and not on the event loop.
        self.input_processor.structured_outputs_config = None

    def take(self, manifest: Manifest) -> None:
        """Learn what is served."""
        self._adapters = {entry.key: len(entry.adapters) for entry in manifest.entries if entry.adapters}

    def generate(
        self, *arguments: Any, lora_request: LoRARequest | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`, with the gates of mixtures."""
        results = super().generate(*arguments, lora_request=lora_request, **options)
        return with_mixtures(results) if mixes(lora_request) else results

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
    ) -> RequestOutputCollector:
        """As `AsyncLLM.add_request`; a grammar is compiled aside first. Raises `RequestError`.

        `AsyncLLM.generate` gives the `lora_request` by name (vLLM 0.32); one with weights of its own has another.
        """
        if (adapter := adapter_in_place()) is not None:
            options["lora_request"] = lora_request(adapter)
        if isinstance(params, SamplingParams):
            _check_extra_args(params)
            bound_length(params, self._most_logprobs)
            self._bound_gates(params, options.get("lora_request"))
            if params.structured_outputs is not None:
                await self._check_grammar(params)
        return await super().add_request(request_id, prompt, params, *args, **options)

    def _bound_gates(self, params: SamplingParams, lora: LoRARequest | None) -> None:
        """As `bound_length`, for the gates of tokens. Raises `RequestError` where a greater length was asked for."""
        wanted = wanted_gates()
        if wanted is None or lora is None or params.max_tokens is None:
            return
        adapters = self._adapters.get(lora.lora_name, 0)
        layers = self.model_config.hf_text_config.num_hidden_layers if wanted.detail == "layers" else 1
        each = adapters * layers * wanted.sequences
        most = self._most_gates // max(1, each)
        if most < (params.max_tokens if wanted.has_length else 1):
            found = (
                f"Too many gates in one answer: {each * params.max_tokens}, in {layers} layers of {adapters} adapters."
            )
            cure = f"Ask for at most {self._most_gates}, or have the operator raise `router.limits.gate_values`."
            raise RequestError(XloomError("limit_exceeded", found, cure))
        params.max_tokens = min(params.max_tokens, most)

    async def _check_grammar(self, params: SamplingParams) -> None:
        assert params.structured_outputs is not None
        try:
            await self._grammars.check(params.structured_outputs)
        except XloomError as error:
            raise RequestError(error) from None
        config = self.vllm_config.structured_outputs_config
        tokenizer = self.input_processor.tokenizer
        try:
            await asyncio.to_thread(params._validate_structured_outputs, self.model_config, config, tokenizer)
        except (ValueError, VLLMClientError) as error:  # with vLLM's own reason
            if "not supported by xgrammar" not in str(error):
                raise
            key = "engine.extra_args.structured_outputs_config.backend"
            cure = f"Leave them out, or have the operator set {key} to guidance."
            raise RequestError(XloomError("unsupported_schema", str(error), cure)) from error
        except Exception as error:  # a compiler's own, such as xgrammar's: it says that the grammar is none
            what = f"The structured output can't be compiled: {str(error)[:200]}."
            raise RequestError(XloomError("invalid_request", what, "Mend or simplify it.")) from error

    def _tokenizer_info(self) -> str:
        """As `vllm.v1.structured_output.backend_xgrammar.XgrammarBackend.__post_init__` makes it."""
        import xgrammar

        vocab_size = self.model_config.get_vocab_size()
        info: str = xgrammar.TokenizerInfo.from_huggingface(
            self.input_processor.tokenizer, vocab_size=vocab_size
        ).serialize_json()
        return info

    def shutdown(self, timeout: float | None = None) -> None:
        """As `AsyncLLM.shutdown`, and the grammars' processes end."""
        if (grammars := getattr(self, "_grammars", None)) is not None:
            grammars.close()
        super().shutdown(timeout)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """As `AsyncLLM.abort`, told apart from what its output handler ends at a stop string."""
        request_ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        self._abort_in_core(self.output_processor.abort_requests(request_ids, internal), "abort")

    def _fail(self, request_id: str, error: XloomError) -> None:
        """End a request with an error; siblings of the same parallel sampling end with it."""
        state = self.output_processor.request_states.get(request_id)
        if state is None:
            return
        whole = state.parent_req.request_id if state.parent_req is not None else request_id
        others = self.output_processor.abort_requests([whole], internal=True)
        self._abort_in_core([other for other in others if other != request_id], "error")
        if state.queue is not None:
            state.queue.put(RequestError(error))

    def _take_prompt_logprobs(self, request_id: str, logprobs: LogprobsTensors) -> None:
        """As `OutputProcessor.process_outputs` would, in a thread: nothing else looks at a request without outputs."""
        state = self.output_processor.request_states.get(request_id)
        if state is not None and state.logprobs_processor is not None:
            state.logprobs_processor._update_prompt_logprobs(logprobs)

    def _abort_in_core(self, request_ids: list[str], ending: Ending) -> None:
        assert isinstance(self.engine_core, RoutedCoreClient)
        self.engine_core.abort_now(request_ids, ending)


def bound_length(params: SamplingParams, values: int) -> None:
    """End generation where an answer has as many log-probabilities as it may. A length that was asked for is less."""
    if params.max_tokens is not None and (params.logprobs is not None or params.logprob_token_ids):
        each = 1 + max(params.logprobs or 0, len(params.logprob_token_ids or ()))
        params.max_tokens = min(params.max_tokens, max(1, values // (each * params.n)))


def _check_extra_args(params: SamplingParams) -> None:
    """vLLM takes these out of what `vllm_xargs` may hold, and takes their type for granted. Raises `RequestError`."""
    for name in ("kv_transfer_params", "ec_transfer_params"):
        if not isinstance((params.extra_args or {}).get(name), (dict, type(None))):
            raise RequestError(XloomError("invalid_request", f"`{name}` must be an object.", "Leave it out."))


@contextmanager
def _core_client(core: RoutedCoreClient) -> Iterator[None]:
    """Have `AsyncLLM.__init__` take this client instead of starting an engine process."""
    original = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: core)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = staticmethod(original)
