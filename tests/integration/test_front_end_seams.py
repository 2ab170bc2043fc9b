"""What the router's front end relies on of vLLM 0.32: this fails when an upgrade takes it away or changes it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args

import msgspec
import pytest
import vllm
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm import envs, platforms
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.chat_completion import api_router
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, ModelCard, ModelList
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tasks import SupportedTask
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine import (
    FINISH_REASON_STRINGS,
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.executor import Executor
from vllm.v1.metrics import ray_wrappers
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from tests.models import tiny_model
from xloom.protocol import XloomError
from xloom.router.dispatch import Dispatcher
from xloom.settings import Settings, parse_settings
from xloom.vllm import front_end
from xloom.vllm.front_end.app import ServedModels, build_front_end, coded_error_response
from xloom.vllm.front_end.core_client import RoutedCoreClient
from xloom.vllm.front_end.engine_client import _SHARED_ARGS, RequestError, RoutedEngineClient, front_end_config
from xloom.vllm.front_end.large_answers import _ROUTES, WrittenResponse
from xloom.vllm.metrics import _UNKNOWN_TO_ROUTERS, LEFT_OUT, RequestStatLogger

# What `AsyncLLM` asks of its core client besides, in methods that no route of ours reaches.
UNREACHED = {
    "pause_scheduler_async", "resume_scheduler_async", "is_scheduler_paused_async", "profile_async",
    "reset_prefix_cache_async", "reset_encoder_cache_async", "sleep_async", "release_kv_cache_memory_async",
    "wake_up_async", "compute_weight_checksums_async", "pin_lora_async", "collective_rpc_async",
    "prepare_elastic_ep", "commit_elastic_ep", "handle_fault", "get_status", "set_weight_version_async",
    "get_weight_version_async", "get_kv_event_sources",
}  # fmt: skip

# Called or overridden by the front end: the parameters, in order.
SIGNATURES: dict[Any, list[str]] = {
    app_state.init_app_state: ["engine_client", "state", "args", "supported_tasks"],
    launcher.build_app: ["args", "supported_tasks", "model_config"],
    make_arg_parser: ["parser"],
    validate_parsed_serve_args: ["args"],
    ToolParserManager.import_tool_parser: ["plugin_path"],
    merge_async_iterators: ["iterators"],
    CpuPlatform.is_unspecified: ["self"],
    create_error_response: ["message", "err_type", "status_code", "param"],
    SamplingParams._validate_structured_outputs: ["self", "model_config", "structured_outputs_config", "tokenizer"],
    choice_as_grammar: ["choice"],
    grammar_is_likely_lark: ["grammar_str"],
    BaseServing.create_error_response: ["message", "err_type", "status_code", "param"],
    OpenAIServingModels.model_name: ["self", "lora_request"],
    OpenAIServingModels.show_available_models: ["self"],
    OpenAIModelRegistry.show_available_models: ["self"],
    GracefulHTTPError.__init__: ["self", "message", "http_status"],
    AsyncEngineArgs.create_structured_outputs_config: ["self"],
    AsyncLLM.abort: ["self", "request_id", "internal"],
    AsyncLLM.check_health: ["self"],
    AsyncLLM.get_supported_tasks: ["self"],
    AsyncLLM.shutdown: ["self", "timeout"],
    OutputProcessor.abort_requests: ["self", "request_ids", "internal"],
    RequestOutputCollector.put: ["self", "output"],
    EngineCoreClient.add_request_async: ["self", "request"],
    EngineCoreClient.abort_requests_async: ["self", "request_ids"],
    EngineCoreClient.get_output_async: ["self"],
    EngineCoreClient.get_supported_tasks_async: ["self"],
    EngineCoreClient.add_lora_async: ["self", "lora_request"],
    EngineCoreClient.remove_lora_async: ["self", "lora_id"],
    EngineCoreClient.list_loras_async: ["self"],
    EngineCoreClient.reset_mm_cache_async: ["self"],
    EngineCoreClient.is_sleeping_async: ["self"],
    EngineCoreClient.dp_engines_running: ["self"],
    EngineCoreClient.shutdown: ["self", "timeout"],
    RayPrometheusStatLogger.__init__: ["self", "vllm_config", "engine_indexes"],
    RayPrometheusStatLogger.record: ["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"],
    RayPrometheusStatLogger.record_sleep_state: ["self", "sleep", "level"],
    RayPrometheusStatLogger.log_engine_initialized: ["self"],
    ray_wrappers._get_replica_id: [],
    LogprobsProcessor._update_prompt_logprobs: ["self", "prompt_logprobs_tensors"],
    PrefixCacheStats.record: ["self", "num_tokens", "num_hits", "preempted", "hits_by_source"],
}

# Made by position, or read and set by name.
FIRST_FIELDS: dict[type, list[str]] = {
    EngineCoreOutput: ["request_id", "new_token_ids"],
    EngineCoreEvent: ["type", "timestamp"],
    LoRARequest: ["lora_name", "lora_int_id", "lora_path"],
    LogprobsLists: ["logprob_token_ids", "logprobs", "sampled_token_ranks"],
    LogprobsTensors: ["logprob_token_ids", "logprobs", "selected_token_ranks"],
    PrefillStats: ["num_prompt_tokens", "num_computed_tokens", "num_cached_tokens", "num_local_cached_tokens"],
}
FIELDS: dict[type, set[str]] = {
    EngineCoreRequest: {"request_id", "prompt_token_ids", "mm_features", "sampling_params", "arrival_time",
                        "lora_request", "cache_salt", "priority", "reasoning_ended", "abort_immediately"},
    EngineCoreOutput: {"finish_reason", "stop_reason", "new_logprobs", "new_prompt_logprobs_tensors",
                       "prefill_stats", "events", "spec_decode_metrics"},
    CompletionOutput: {"index", "finish_reason", "spec_decode_metrics"},
    AnthropicMessagesResponse: {"model"},
    EngineCoreOutputs: {"outputs", "scheduler_stats"},
    SchedulerStats: {"num_running_reqs", "num_waiting_reqs", "kv_cache_usage", "prefix_cache_stats"},
    SamplingParams: {"_eos_token_id", "_all_stop_token_ids", "_bad_words_token_ids"},
    StructuredOutputsParams: {"json", "regex", "choice", "grammar", "structural_tag", "disable_any_whitespace"},
    ErrorResponse: {"error"},
    ErrorInfo: {"message", "type", "param", "code"},
    ModelList: {"data"},
    ModelCard: {"id", "root", "parent", "owned_by", "max_model_len"},
    ResponsesRequest: {"input"},
    VllmConfig: {"model_config", "lora_config", "structured_outputs_config"},
    LoRAConfig: {"max_lora_rank", "max_loras"},
    StructuredOutputsConfig: {"backend", "disable_any_whitespace"},
    FrontendArgs: {"enable_auto_tool_choice", "tool_call_parser"},
    AsyncEngineArgs: {"model", "revision", "served_model_name", "max_model_len", "dtype", *_SHARED_ARGS},
}  # fmt: skip


def fields_of(kind: Any) -> list[str]:
    """The fields of a msgspec struct, a named tuple, a pydantic model or a dataclass, in order."""
    if issubclass(kind, msgspec.Struct):
        return list(kind.__struct_fields__)
    if hasattr(kind, "model_fields"):
        return list(kind.model_fields)
    return list(kind._fields) if hasattr(kind, "_fields") else [field.name for field in dataclasses.fields(kind)]


def test_version_is_the_one_the_seams_were_read_in() -> None:
    assert vllm.__version__.startswith("0.32.")


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_what_is_called_or_overridden_keeps_its_signature(function: Any) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


@pytest.mark.parametrize("kind", [*FIRST_FIELDS, *FIELDS], ids=lambda kind: kind.__name__)
def test_what_is_made_or_read_keeps_its_fields(kind: type) -> None:
    fields, first = fields_of(kind), FIRST_FIELDS.get(kind, [])
    assert fields[: len(first)] == first
    assert FIELDS.get(kind, set()) <= set(fields)


def test_another_platform_may_be_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    other = CpuPlatform()
    monkeypatch.setattr(platforms, "current_platform", other)
    from vllm.platforms import current_platform

    assert current_platform is other


def test_every_symbol_the_front_end_imports_is_pinned_here() -> None:
    def imported(file: Path) -> set[str]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return {name.name for node in nodes if (node.module or "").split(".")[0] == "vllm" for name in node.names}

    theirs = {name for file in Path(front_end.__path__[0]).glob("*.py") for name in imported(file)}
    assert sorted(theirs - imported(Path(__file__))) == []  # an import that no test uses is an error of ruff's


def test_finish_reasons_have_the_names_that_replicas_send() -> None:
    assert {"stop", "length", "abort", "error", "repetition"} <= set(FINISH_REASON_STRINGS)
    assert [str(FinishReason(number)) for number in range(len(FINISH_REASON_STRINGS))] == list(FINISH_REASON_STRINGS)
    assert {"QUEUED", "SCHEDULED"} <= set(EngineCoreEventType.__members__)
    assert "generate" in get_args(SupportedTask)


def test_the_core_client_has_all_that_async_llm_asks_of_it() -> None:
    asked = set(re.findall(r"\bengine_core\.(\w+)", inspect.getsource(AsyncLLM)))
    attributes = set(re.findall(r"self\.(\w+)\b[^=\n]*=", inspect.getsource(RoutedCoreClient.__init__)))
    assert sorted(asked - UNREACHED - set(vars(RoutedCoreClient)) - attributes) == []
    assert asked >= UNREACHED  # none is named that is asked no more
    assert "return self.engine_core.resources.engine_dead" in inspect.getsource(AsyncLLM.errored.fget)


def test_async_llm_makes_its_client_where_ours_is_put() -> None:
    source = inspect.getsource(AsyncLLM.__init__)
    [call] = [
        node
        for node in ast.walk(ast.parse(dedent(source)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "EngineCoreClient.make_async_mp_client"
    ]
    assert call.args == []  # ours takes keywords alone
    parameters = inspect.signature(AsyncLLM.__init__).parameters
    assert list(parameters)[:4] == ["self", "vllm_config", "executor_class", "log_stats"]
    assert {"log_requests", "stat_loggers"} <= set(parameters)
    assert inspect.isclass(Executor)


def test_the_output_handler_ends_in_the_core_what_met_a_stop_string_and_nothing_else_does() -> None:
    calls = re.findall(r"engine_core\.abort_requests_async\(\s*([\w.]+)", inspect.getsource(AsyncLLM))
    assert sorted(calls) == ["all_request_ids", "processed_outputs.reqs_to_abort"]  # the first in `abort`, overridden
    assert "all_request_ids" in AsyncLLM.abort.__code__.co_varnames


def test_a_failed_request_is_found_by_its_state_its_parent_and_its_queue() -> None:
    assert "self.request_states" in inspect.getsource(OutputProcessor.__init__)
    assert {"parent_req", "queue"} <= set(inspect.signature(RequestState.__init__).parameters)
    assert "request_id" in inspect.get_annotations(ParentRequest)
    # An exception in the queue reaches the client.
    assert "raise output" in inspect.getsource(RequestOutputCollector.get)


def test_what_vllm_refuses_is_told_from_what_broke() -> None:
    assert issubclass(VLLMValidationError, VLLMClientError)


def test_an_error_of_ours_passes_as_it_is() -> None:
    error = RequestError(XloomError("no_replica_ready", "None was.", "Wait.", 503))
    assert isinstance(error, GracefulHTTPError)
    plain = create_error_response(error).error
    assert (plain.code, plain.message, plain.param) == (503, "None was. Wait.", None)
    coded = coded_error_response(error)
    assert coded.model_dump()["error"]["code"] == "no_replica_ready"
    assert coded.error.code == 503  # vLLM answers with this status
    assert create_error_response("no", "NotFoundError", HTTPStatus.NOT_FOUND, "model").error.param == "model"


def test_statistics_have_the_parts_that_are_replaced() -> None:
    assert {"_gauge_cls", "_counter_cls", "_histogram_cls"} <= set(vars(RayPrometheusStatLogger))
    assert {"_gauge_cls", "_counter_cls", "_histogram_cls"} <= set(vars(PrometheusStatLogger))
    source = inspect.getsource(PrometheusStatLogger.__init__)
    assert [name for name in LEFT_OUT if f'name="{name}"' not in source] == []
    assert [name for name in (*_UNKNOWN_TO_ROUTERS, "gauge_lora_info") if f"self.{name}" not in source] == []
    # Only without one of its kind does the manager add its own, which is why both are named.
    assert "isinstance(global_stat_logger, PrometheusStatLogger)" in inspect.getsource(StatLoggerManager)
    assert issubclass(RequestStatLogger, PrometheusStatLogger)
    assert '"ReplicaId"' in inspect.getsource(ray_wrappers)


def test_vllms_own_command_line_has_the_names_that_are_set() -> None:
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert {"model", "served_model_name"} <= set(vars(arguments))


def test_no_device_is_needed_for_the_configuration(settings: Settings) -> None:
    assert "VLLM_CPU_KVCACHE_SPACE" in envs.environment_variables
    assert "quantization" in fields_of(type(front_end_config(settings).model_config))


# The front end itself, over no replica.


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = tiny_model(tmp_path_factory.mktemp("seams") / "base", "llama")
    data = {"model": {"source": str(model), "served_name": "sample"}, "engine": {"max_model_len": 256}}
    return parse_settings(data, with_keys=False)


async def nobody() -> list[Any]:
    return []


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[RoutedEngineClient]:
    made = RoutedEngineClient(front_end_config(settings), RoutedCoreClient(Dispatcher(nobody, "secret", "router")))
    yield made
    made.shutdown()


async def test_structured_output_is_validated_by_us_alone(engine: RoutedEngineClient) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    engine.input_processor._validate_params(params, ("generate",))  # on the event loop: passes whatever it is
    with pytest.raises(VLLMValidationError, match="regex"):
        await engine._check_grammar(params)


async def test_the_application_serves_our_models_and_our_errors(engine: RoutedEngineClient, settings: Settings) -> None:
    assert "OpenAIServingModels" in app_state.init_app_state.__code__.co_names  # by the module's own name
    app, models = await build_front_end(engine, settings)
    assert app_state.OpenAIServingModels is OpenAIServingModels
    assert type(models) is ServedModels
    assert {"lora_requests", "base_model_paths", "registry", "model_config"} <= set(vars(models))
    assert set(vars(State())) == {"_state"}
    serving = [each for each in vars(app.state)["_state"].values() if isinstance(each, BaseServing)]
    assert len(serving) >= 3  # completions, chat, responses
    for each in serving:
        assert each.models is models
        assert each.create_error_response is coded_error_response
    [card] = (await models.show_available_models()).data
    assert card.model_dump()["kind"] == "base"  # cards keep extra fields
    assert "sagemaker_standards_bootstrap" in launcher.build_app.__code__.co_names


@pytest.mark.parametrize(
    ("make", "results"),
    [
        (OpenAIServingChat.chat_completion_full_generator, ["request", "result_generator"]),
        (OpenAIServingChatBatch.chat_completion_full_generator_batch, ["request", "generators"]),
        (
            OpenAIServingResponses.responses_full_generator,
            ["request", "sampling_params", "result_generator", "context"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_answer_awaits_nothing_once_its_results_are_there(make: Any, results: list[str]) -> None:
    """But, of Responses, the sessions of tools before them and the lock of answers that are stored."""
    assert list(inspect.signature(make).parameters)[1 : 1 + len(results)] == results
    source = inspect.getsource(make)
    assert source.count("async for ") == 1
    allowed = (
        "await self._initialize_tool_sessions(",
        "async with AsyncExitStack()",
        "async with self.response_store_lock",
    )
    for known in allowed if make is OpenAIServingResponses.responses_full_generator else ():
        source = source.replace(known, "")
    assert "await " not in source
    assert "async with " not in source


def test_a_context_without_tools_begins_no_session() -> None:
    source = inspect.getsource(SimpleContext.init_tool_sessions)
    assert source.rstrip().endswith("pass")


def test_a_completion_is_what_its_results_were_made_into() -> None:
    source = inspect.getsource(OpenAIServingCompletion._create_completion)
    assert source.count("response = self.request_output_to_completion_response(") == 1
    assert source.rstrip().endswith("return response")
    handed_on = inspect.getsource(OpenAIServingCompletion.create_completion)
    assert "return await self._with_kv_transfer_rejection_cleanup(" in handed_on


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (OpenAIServingChat.chat_completion_stream_generator, ["request", "result_generator"]),
        (OpenAIServingChat.chat_completion_full_generator, ["request", "result_generator"]),
        (OpenAIServingChatBatch.chat_completion_full_generator_batch, ["request", "generators"]),
        (OpenAIServingCompletion.completion_stream_generator, ["request", "engine_inputs", "result_generator"]),
        (OpenAIServingCompletion.request_output_to_completion_response, ["final_res_batch"]),
        (
            OpenAIServingResponses.responses_full_generator,
            ["request", "sampling_params", "result_generator", "context"],
        ),
        (AnthropicServingMessages.messages_full_converter, ["generator"]),
        (AnthropicServingMessages.message_stream_converter, ["generator"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_answers_are_made_where_mixtures_are_told(make: Any, taken: list[str]) -> None:
    assert list(inspect.signature(make).parameters)[1 : 1 + len(taken)] == taken
    module = inspect.getmodule(make)
    assert module is not None
    assert f"self.{make.__name__}(" in inspect.getsource(module)


def test_what_comes_with_a_requests_last_output_reaches_its_completion() -> None:
    processed = inspect.getsource(OutputProcessor.process_outputs)
    assert "req_state.spec_decode_metrics = engine_core_output.spec_decode_metrics" in processed
    made = inspect.getsource(RequestState._new_completion_output)
    assert "spec_decode_metrics=self.spec_decode_metrics if finished else None" in made
    joined = " ".join(inspect.getsource(RequestOutput.add).split())
    assert "completion.spec_decode_metrics = ( next_completion.spec_decode_metrics )" in joined
    assert inspect.signature(AsyncLLM.generate).parameters["lora_request"].kind is inspect.Parameter.KEYWORD_ONLY


def test_answers_are_written_by_the_routes_own_name() -> None:
    assert api_router in _ROUTES
    for module in _ROUTES:
        assert module.JSONResponse in (JSONResponse, WrittenResponse)
        assert "return JSONResponse(" in inspect.getsource(module)


def test_a_router_says_how_many_outputs_are_processed_at_once() -> None:
    assert "chunk_size = envs.VLLM_V1_OUTPUT_PROC_CHUNK_SIZE" in inspect.getsource(AsyncLLM._run_output_handler)
    assert "self._update_prompt_logprobs(" in inspect.getsource(LogprobsProcessor.update_from_output)
