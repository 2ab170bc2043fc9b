"""What can be refused before anything starts: seconds for what an engine would say after a minute."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xloom.adapters.source_rules import check_prefixes
from xloom.engines.kv_size import NULL_PAGES, pair_pages, too_few_pages
from xloom.engines.registry import backend_for
from xloom.observability import traces
from xloom.protocol import XloomError
from xloom.router.exposure import check_exposure
from xloom.settings import ModelSettings, Settings
from xloom.vllm.front_end.argument_table import check_names

CPU_PAGE_MULTIPLE = 32  # tokens: as xloom.vllm.engine.arguments rounds a page on CPU
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_MODEL_CURE = "Name a local folder with config.json and safetensors, or a hub id."


def refusals(settings: Settings) -> list[XloomError]:
    """All that is wrong with a deployment, as far as its settings and the files on this machine tell."""
    found: list[XloomError] = []
    for check in CHECKS:
        try:
            check(settings)
        except XloomError as error:
            found.append(error)
    return found


def refuse(settings: Settings) -> None:
    """Raise the first of `refusals`."""
    for check in CHECKS:
        check(settings)


def check_model(settings: Settings) -> None:
    """Raise `XloomError` (model_not_loadable) for a local folder without a whole model in it."""
    folder = _model_folder(settings.model)
    if folder is None:
        return  # a hub id: the engine will see
    config = model_config(folder)
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(f"{index} can't be read: {error!r}") from None
    missing = sorted(str(name) for name in shards if not (folder / str(name)).is_file())
    if missing:
        raise _no_model(f"{folder} lacks {len(missing)} of its {len(shards)} weight files: {missing[0]} for one")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise _no_model(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")
    for file in sorted(folder.glob("*.safetensors")):
        _check_whole(file)
    if not config.get("architectures") and not config.get("model_type"):
        raise _no_model(f"{folder / 'config.json'} names neither architectures nor a model_type")


def check_architecture(settings: Settings) -> None:
    """Raise `XloomError` (unsupported_architecture) for a local model that neither vLLM nor Transformers has."""
    folder = _model_folder(settings.model)
    if folder is None or not _is_vllm(settings) or "hf_overrides" in settings.engine.extra_args:
        return
    architectures = [str(name) for name in model_config(folder).get("architectures") or ()]
    known = [_text_of(*place) for place in _REGISTRIES]
    if not architectures or not all(known):
        return
    if not any(f'"{name}"' in text for name in architectures for text in known):
        raise XloomError(
            "unsupported_architecture",
            f"{folder} is a {', '.join(architectures)}, which neither vLLM nor Transformers here has.",
            "Use a model that vLLM supports: https://docs.vllm.ai/en/latest/models/supported_models.html",
        )


def check_length(settings: Settings) -> None:
    """Raise `XloomError` where no request of `max_model_len` could run: too_few_pages, invalid_engine_settings."""
    if not _is_vllm(settings):
        return
    engine, pages = settings.engine, settings.engine.paged_attention
    length = engine.extra_args.get("max_model_len", engine.max_model_len)
    folder = _model_folder(settings.model)
    config = model_config(folder) if folder is not None else {}
    text = config.get("text_config") or config
    if not isinstance(length, int) or isinstance(length, bool):
        return  # vLLM's own ways to write it
    trained, scaled = text.get("max_position_embeddings"), text.get("rope_scaling") or text.get("rope_parameters") or {}
    plain = scaled.get("rope_type", scaled.get("type", "default")) == "default" if isinstance(scaled, dict) else False
    longer = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") not in ("", "0")
    if isinstance(trained, int) and plain and not longer and length > trained:
        raise XloomError(
            "invalid_engine_settings",
            f"engine.max_model_len is {length}, and the model was made for {trained} tokens.",
            f"Set engine.max_model_len to {trained} or less.",
        )
    on_cpu = backend_for(settings).device() == "cpu" and not settings.replicas.gpus  # else of a cluster elsewhere
    windows = text.get("sliding_window") or any("full" not in kind for kind in text.get("layer_types") or ())
    if windows or not (on_cpu or "max_blocks" in pages.model_fields_set):
        return  # a GPU's memory, or what windows need, is known once the engine is up
    if {"num_gpu_blocks_override", "block_size", "kv_cache_memory_bytes"} & engine.extra_args.keys():
        return
    size = math.ceil(pages.block_size / CPU_PAGE_MULTIPLE) * CPU_PAGE_MULTIPLE if on_cpu else pages.block_size
    count = math.ceil(pages.max_blocks * pages.block_size / size)
    needed = pair_pages(length, size) if settings.xlora_enabled else NULL_PAGES + math.ceil(length / size)
    if count < needed:
        raise too_few_pages(count, needed, length, pair=settings.xlora_enabled, size=size)


def check_arguments(settings: Settings) -> None:
    """Raise `XloomError` for what `engine.extra_args` may not say: unknown_engine_argument, unsupported_setting."""
    if _is_vllm(settings):
        from xloom.vllm.engine.refusals import merged

        merged({}, settings.engine.extra_args, mixtures=settings.xlora_enabled)


def check_quantisation(settings: Settings) -> None:
    """Raise `XloomError` for what `isq` could not do: its packages, the model, and the calibration text."""
    isq = settings.isq
    if isq is None or not _is_vllm(settings):
        return
    from xloom.quantization import calibration, overlay, recipes

    overlay.overlay()
    calibrates = isq.method != "rtn"
    if isq.bits != "auto":
        calibrates = recipes.recipe_for(isq.method, isq.bits, backend_for(settings).device()).calibrates
    if calibrates and calibration.is_local(isq.calibration):
        calibration.documents(isq.calibration, held_out=False)


def check_backend(settings: Settings) -> None:
    """Raise `XloomError` for a backend that is missing, or can't do what is asked."""
    backend_for(settings)


def check_traces(settings: Settings) -> None:
    """Raise `XloomError` (traces_not_installed)."""
    traces.require(settings.observability.traces)


def check_front_end(settings: Settings) -> None:
    """Raise `XloomError` (unknown_front_end_argument)."""
    check_names(settings.router.front_end_args)


def check_endpoint(settings: Settings) -> None:
    """Raise `XloomError` for keys that do not suit the endpoint's address: endpoint_without_keys, one_key_for_both."""
    check_exposure(settings.router)


def check_sources(settings: Settings) -> None:
    """Raise `XloomError` (invalid_settings) for a prefix under which no source could lie."""
    check_prefixes(settings.store.sources)


CHECKS: tuple[Callable[[Settings], None], ...] = (
    check_backend,
    check_model,
    check_architecture,
    check_length,
    check_arguments,
    check_quantisation,
    check_traces,
    check_front_end,
    check_endpoint,
    check_sources,
)


def model_config(folder: Path) -> dict[str, Any]:
    """A local model's configuration. Raises `XloomError` (model_not_loadable)."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise _no_model(f"There is no model at {folder}: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _no_model(f"{file} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise _no_model(f"{file} is no JSON object")
    return config


def _model_folder(model: ModelSettings) -> Path | None:
    """Where a model lies on this machine; None for one that is named by a hub id."""
    folder = Path(model.source)
    return folder if folder.is_absolute() or folder.is_dir() else None


def _no_model(what: str) -> XloomError:
    return XloomError("model_not_loadable", f"{what}.", _MODEL_CURE)


def _check_whole(file: Path) -> None:
    """A safetensors file's header says how long the file is: eight bytes, the header, and its tensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= size else {}
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(f"{file} is damaged: {error!r}") from None
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise _no_model(f"{file} is {'cut short' if size < whole else 'damaged'}: {size} bytes of {whole}")


# Where the names of model classes stand, as text: importing them takes ten seconds. vLLM 0.32, Transformers 5.19.
_REGISTRIES = (
    ("vllm", "model_executor/models/registry.py"),
    ("transformers", "models/auto/modeling_auto.py"),
)


def _text_of(package: str, path: str) -> str:
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / path if spec is not None and spec.origin else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""


def _is_vllm(settings: Settings) -> bool:
    try:
        return backend_for(settings).__module__.startswith("xloom.vllm.")
    except XloomError:
        return False  # another check says so
