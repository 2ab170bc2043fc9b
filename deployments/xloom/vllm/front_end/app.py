"""vLLM's OpenAI front end over our engine client: its routes, our model names, our error codes.

Relies on vLLM 0.32: `vllm.entrypoints.launchers.app.build_app`, `...launchers.api_server.app_state.init_app_state`
(which makes its `OpenAIServingModels` by that module's own name), `vllm.entrypoints.openai.models.serving.
OpenAIServingModels`, `vllm.entrypoints.serve.engine.serving.BaseServing.create_error_response`;
`vllm.entrypoints.launchers.cli_args.FrontendArgs` (a dataclass that checks its values), `validate_parsed_serve_args`.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from xloom.adapters.manifest import Entry, Manifest
from xloom.protocol import XloomError
from xloom.router.errors import code_for, error_body, error_type
from xloom.settings import Settings
from xloom.vllm.front_end.argument_table import check_names
from xloom.vllm.front_end.engine_client import RequestError, RoutedEngineClient
from xloom.vllm.front_end.first_fault import FirstFault
from xloom.vllm.front_end.large_answers import put_together_aside
from xloom.vllm.front_end.mixture_answers import tell_mixtures
from xloom.vllm.front_end.wording import in_settings
from xloom.vllm.lora import lora_request, plain_name

# JSON inside a string of the body, such as a tool call's arguments, is read by whoever comes to it.
_TOO_DEEP = XloomError("limit_exceeded", "JSON in one of the body's strings is nested too deep.", "Nest less.")


class ServedModels(OpenAIServingModels):
    """Model names: the base model, and what the store's manifest names."""

    _entries: tuple[Entry, ...] = ()

    def take(self, manifest: Manifest) -> None:
        """Serve a manifest's entries from now on."""
        self._entries = manifest.named
        self.lora_requests = {entry.name: lora_request(entry.ref) for entry in self._entries}

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name an answer carries: without the generation that the engine's name has."""
        return plain_name(lora_request.lora_name) if lora_request else self.base_model_paths[0].name

    async def show_available_models(self) -> ModelList:
        """The base model, adapters and bundles; each card says its kind."""
        models = await self.registry.show_available_models()
        base = self.base_model_paths[0].name
        for card in models.data:
            card.kind = "base"  # cards allow extra fields
            card.owned_by = "xloom"
        for entry in self._entries:
            limit = self.model_config.max_model_len
            card = ModelCard(id=entry.name, root=entry.source, parent=base, owned_by="xloom", max_model_len=limit)
            card.kind, card.generation = entry.kind, entry.generation
            if entry.adapters:
                card.adapters = list(entry.adapters)
            if entry.kind == "xlora":
                card.routing_passes = entry.overrides.routing_passes or 2
            models.data.append(card)
        return models


class _CodedErrorResponse(ErrorResponse):
    """vLLM's error, with our code when it becomes JSON (vLLM's own model wants the HTTP status there)."""

    stable_code: str

    def model_dump(self, **options: Any) -> dict[str, Any]:
        dumped: dict[str, Any] = super().model_dump(**options)
        del dumped["stable_code"]
        dumped["error"]["code"] = self.stable_code
        dumped["error"]["type"] = error_type(self.error.code)
        return dumped


def coded_error_response(
    message: str | Exception,
    err_type: str = "BadRequestError",
    status_code: HTTPStatus = HTTPStatus.BAD_REQUEST,
    param: str | None = None,
) -> ErrorResponse:
    """vLLM's `create_error_response`, with a stable code; streams end with it."""
    if isinstance(message, RecursionError):
        message = RequestError(_TOO_DEEP)
    plain = create_error_response(message, err_type, status_code, param)
    error = plain.error
    code = message.code if isinstance(message, RequestError) else code_for(error.code, error.message, error.param)
    error.message = in_settings(error.message)
    return _CodedErrorResponse(error=error, stable_code=code)


def front_end_arguments(settings: Settings) -> Namespace:
    """vLLM's own command-line defaults, with this deployment's names. Raises `XloomError`."""
    given = settings.router.front_end_args
    check_names(given)
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.model = settings.model.source
    args.served_model_name = [settings.model.served_name]
    args.disable_fastapi_docs = True  # the schema takes half a second to make, on the event loop
    fields = {field.name for field in dataclasses.fields(FrontendArgs)}
    try:
        typed = FrontendArgs(**{name: value for name, value in given.items() if name in fields})
        for name, value in given.items():
            setattr(args, name, getattr(typed, name) if name in fields else TypeAdapter(bool).validate_python(value))
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:  # pydantic's is a ValueError
        said = "; ".join(str(error).splitlines()[:4])
        cure = "Mend router.front_end_args."
        raise XloomError("invalid_settings", f"vLLM refuses router.front_end_args: {said}", cure) from None
    return args


async def build_front_end(engine: RoutedEngineClient, settings: Settings) -> tuple[FastAPI, ServedModels]:
    """The FastAPI app with vLLM's routes, and the models it serves."""
    args = front_end_arguments(settings)
    args.structured_outputs_config = engine.vllm_config.structured_outputs_config  # with the reasoning parser
    tasks = await engine.get_supported_tasks()
    with _without_sagemaker_overrides():
        app = launcher.build_app(args, tasks, engine.model_config)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(XloomError, _answer_xloom_error)
    app.add_exception_handler(RecursionError, _answer_too_deep)
    app.add_middleware(FirstFault)
    with _models_class(ServedModels):
        await app_state.init_app_state(engine, app.state, args, tasks)
    for serving in vars(app.state)["_state"].values():
        if isinstance(serving, BaseServing):
            serving.create_error_response = coded_error_response
    tell_mixtures(app.state)
    put_together_aside(app.state)
    models: ServedModels = app.state.openai_serving_models
    return app, models


async def _answer_request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    status = int(error.http_status)
    body = {"message": error.message, "type": error_type(status), "param": None, "code": error.code}
    return JSONResponse({"error": body}, status)


async def _answer_xloom_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, XloomError)
    return JSONResponse(error_body(error), error.status)


async def _answer_too_deep(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(_TOO_DEEP), _TOO_DEEP.status)


@contextmanager
def _models_class(cls: type[OpenAIServingModels]) -> Iterator[None]:
    """Have `init_app_state` make our models, which it hands to each of its serving objects."""
    original = app_state.OpenAIServingModels
    app_state.OpenAIServingModels = cls
    try:
        yield
    finally:
        app_state.OpenAIServingModels = original


@contextmanager
def _without_sagemaker_overrides() -> Iterator[None]:
    """Leave out what would take handlers and middleware from files and environment variables."""
    original = launcher.sagemaker_standards_bootstrap
    launcher.sagemaker_standards_bootstrap = lambda app: app
    try:
        yield
    finally:
        launcher.sagemaker_standards_bootstrap = original
