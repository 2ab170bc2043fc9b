"""Settings to vLLM engine arguments: names, units, and what differs on CPU."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import TYPE_CHECKING, Any

from xloom.engines.kv_size import pair_pages, token_bytes, too_few_pages
from xloom.engines.sizing import LORA_RANKS
from xloom.protocol import XloomError
from xloom.vllm.engine.architecture import check_experts, check_mixtures, dtype_for, target_modules, text_config
from xloom.vllm.engine.causes import brief, explained
from xloom.vllm.engine.lora_configs import VARIABLE, LoRAShapes, lora_shapes, tuned_folder
from xloom.vllm.engine.platform import device_of
from xloom.vllm.engine.refusals import check_dtype, check_environment, check_resolved, merged, no_wide_lora
from xloom.vllm.plugin import ASYNC_SCHEDULER, INPUT_GATES, SCHEDULER, WORKER_EXTENSION, activate

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from xloom.settings import EngineSettings, ModelSettings

logger = logging.getLogger(__name__)

CPU_PAGE_MULTIPLE = 32  # tokens: what vLLM's CPU attention needs
SPINS = "1000"  # of GNU's OpenMP: what it takes itself where it has more threads than cores
GRAPH_ROWS = 512  # vLLM captures full graphs of up to twice `max_num_seqs` rows, and no more than this
_GRAPH_SIZES = ("cudagraph_capture_sizes", "max_cudagraph_capture_size")


def engine_arguments(
    model: ModelSettings, engine: EngineSettings, *, xlora: bool, max_lora_rank: int, device: str
) -> dict[str, Any]:
    """The keyword arguments of vLLM's `AsyncEngineArgs`; `device` is cpu or cuda. Raises `XloomError`."""
    pages, extra = engine.paged_attention, engine.extra_args
    config = text_config(model)
    wanted = extra.get("dtype") or engine.dtype
    if device == "cuda" and wanted in ("float32", "float"):
        raise no_wide_lora()  # LoRA is always on
    arguments: dict[str, Any] = {
        "model": model.source,
        "revision": model.revision,
        "served_model_name": [model.served_name],
        "trust_remote_code": False,
        "dtype": dtype_for(wanted, device, config),
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enable_prefix_caching": pages.enable_prefix_caching,
        "enforce_eager": not engine.compile,
        "enable_lora": True,
        "max_loras": engine.max_adapters,
        "max_cpu_loras": max(2 * engine.max_adapters, 16),
        "max_lora_rank": _lora_rank(max_lora_rank),
        # Only linears of the decoder: embeddings and the head would cost every request, adapted or not.
        "lora_target_modules": target_modules(model),
        "worker_extension_cls": WORKER_EXTENSION,
    }
    block_size = pages.block_size
    if device == "cpu":
        block_size = math.ceil(pages.block_size / CPU_PAGE_MULTIPLE) * CPU_PAGE_MULTIPLE
        if block_size != pages.block_size:
            logger.warning("block_size %d rounded up to %d: CPU attention needs it", pages.block_size, block_size)
        num_pages = math.ceil(pages.max_blocks * pages.block_size / block_size)
        # gpu_memory_utilization would reserve that share of the machine's memory on CPU: bytes instead.
        arguments["num_gpu_blocks_override"] = num_pages
        arguments["kv_cache_memory_bytes"] = num_pages * page_bytes(config, block_size, arguments["dtype"])
    else:
        arguments["gpu_memory_utilization"] = pages.gpu_memory_fraction
        if "max_blocks" in pages.model_fields_set:  # the default is ADR-008's; a GPU is filled unless told otherwise
            arguments["num_gpu_blocks_override"] = pages.max_blocks
    arguments["block_size"] = block_size
    # The dtype is in there already, as this device has it.
    made = merged(arguments, {name: value for name, value in extra.items() if name != "dtype"}, mixtures=xlora)
    return _for_pairs(made, config, device, input_gates=engine.input_gates is True) if xlora else made


def _for_pairs(arguments: dict[str, Any], config: Any, device: str, *, input_gates: bool) -> dict[str, Any]:
    """Room for a scaling sequence beside each request: `max_num_seqs` counts requests until here, and rows from here.

    The scheduler reads the number of requests from `additional_config`, and the plugin whether gates may be made of a
    linear's input. Raises `XloomError` (too_few_pages).
    """
    requests = arguments["max_num_seqs"]
    budget = arguments.get("max_num_batched_tokens")  # vLLM wants no more rows than tokens in a step
    rows = 2 * requests if budget is None else max(requests, min(2 * requests, budget))
    own = {"max_num_seqs": requests} | ({INPUT_GATES: True} if input_gates else {})
    additional = {**arguments.get("additional_config", {}), "xloom": own}
    made = arguments | {"max_num_seqs": rows, "additional_config": additional}
    compilation = made.get("compilation_config", {})
    chosen = any(made.get(name) is not None or compilation.get(name) is not None for name in _GRAPH_SIZES)
    if device == "cuda" and not chosen and 2 * requests <= GRAPH_ROWS:
        # A pair takes turns while it decodes: a step has as many rows as requests, and needs no graphs of more.
        made["compilation_config"] = compilation | {"max_cudagraph_capture_size": 2 * requests}
    num_pages, length = arguments.get("num_gpu_blocks_override"), arguments["max_model_len"]
    if num_pages is not None and isinstance(length, int) and not _slides(config):  # else once the engine is up
        needed = pair_pages(length, arguments["block_size"])
        if num_pages < needed:
            raise too_few_pages(num_pages, needed, length)
    return made


def _slides(config: Any) -> bool:
    """Whether layers keep the pages of a window alone, so that a sequence may need fewer than its length."""
    layers = getattr(config, "layer_types", None) or ()
    return bool(getattr(config, "sliding_window", None)) or any("full" not in kind for kind in layers)


def page_bytes(config: Any, block_size: int, dtype: str) -> int:
    """Bytes of one KV page over all layers."""
    return block_size * token_bytes(lambda name: getattr(config, name, None), wide=dtype == "float32")


def kv_bytes(model: ModelSettings, engine: EngineSettings, *, device: str, xlora: bool) -> int:
    """Bytes of a replica's KV pages; on a GPU, which fills what is left, of one request of the full length."""
    pages = engine.paged_attention
    fixed = device == "cpu" or "max_blocks" in pages.model_fields_set
    # The least a GPU must have room for: with X-LoRA a scaling sequence too, with pages of its own.
    tokens = pages.max_blocks * pages.block_size if fixed else engine.max_model_len * (2 if xlora else 1)
    config = text_config(model)
    return tokens * page_bytes(config, 1, dtype_for(engine.dtype, device, config))


def _lora_rank(rank: int) -> int:
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise XloomError(
        "rank_too_large",
        f"A stacked rank of {rank} is above vLLM's limit of {LORA_RANKS[-1]}.",
        "Blend fewer adapters.",
    )


def engine_config(model: ModelSettings, engine: EngineSettings, *, xlora: bool, max_lora_rank: int) -> VllmConfig:
    """vLLM's whole configuration for one replica. Raises `XloomError` for arguments vLLM or xloom refuses."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    device = device_of(current_platform, mixtures=xlora)
    activate()
    if xlora:
        check_environment()
    if device == "cpu":
        bind_threads(engine.tensor_parallel_size)
    elif current_platform.is_cuda_alike():
        with contextlib.suppress(XloomError):  # of a model whose sizes are not known: vLLM's defaults serve it
            use_measured_kernels(current_platform.get_device_name(), shapes_of(model, engine, max_lora_rank))
    arguments = engine_arguments(model, engine, xlora=xlora, max_lora_rank=max_lora_rank, device=device)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        # The context chooses max_num_batched_tokens: as `vllm serve` has it.
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except TypeError as error:
        raise XloomError(
            "unknown_engine_argument", f"vLLM refuses engine.extra_args: {error}", "See vLLM's engine arguments."
        ) from error
    except (ValueError, NotImplementedError) as error:
        known = explained(type(error).__name__, str(error))
        raise known or XloomError(
            "invalid_engine_settings", f"vLLM refuses the settings: {brief(str(error))}.", "Mend the settings."
        ) from error
    check_dtype(config, device)
    check_experts(config, device)
    if xlora:
        check_mixtures(config)
        check_resolved(config)
        # Known only now: VllmConfig.__post_init__ and the platform's hook resolve `async_scheduling` (vLLM 0.32).
        scheduler = config.scheduler_config
        scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
    return config


def check_pages(config: VllmConfig) -> None:
    """Whether a request of the full length fits the empty pool beside its scaling sequence, for an engine that is up.

    vLLM's own arithmetic of what one request needs, windows included: `CacheConfig.kv_cache_max_concurrency`, which
    the engine core reports (`update_kv_cache_capacity`, 0.32). Raises `XloomError` (too_few_pages).
    """
    cache, length = config.cache_config, config.model_config.max_model_len
    if not cache.num_gpu_blocks or not cache.kv_cache_max_concurrency:
        return
    needed = 1 + 2 * round(cache.num_gpu_blocks / cache.kv_cache_max_concurrency)  # one page is vLLM's own
    if cache.num_gpu_blocks < needed:
        raise too_few_pages(cache.num_gpu_blocks, needed, length)


def bind_threads(ranks: int) -> None:
    """Give each rank of a CPU engine its share of the cores this process may use, unless the operator has chosen.

    vLLM's `auto` binds each replica on a machine to the same first core, and Ray sets OMP_NUM_THREADS to the
    actor's CPUs. GNU's OpenMP lets a thread that waits for another spin 300,000 times, on a core that the other, a
    router or a client may be waiting for: on two cores streams then stood still for seconds, and tokens came at half
    the rate (docs/settings.md).
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [cores[rank * share : (rank + 1) * share] or cores[-1:] for rank in range(ranks)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)


def use_measured_kernels(device_name: str, shapes: LoRAShapes) -> None:
    """Have vLLM look LoRA kernels' configurations up where some were measured for this GPU and model."""
    folder = tuned_folder(device_name, shapes)
    if folder is not None:
        os.environ[VARIABLE] = str(folder)  # read in the worker processes, which inherit it
        logger.info("LoRA kernels are configured by %s", folder)


def shapes_of(model: ModelSettings, engine: EngineSettings, max_lora_rank: int) -> LoRAShapes:
    """The LoRA products of an engine of these settings. Raises `XloomError`."""
    return lora_shapes(text_config(model), _lora_rank(max_lora_rank), engine.tensor_parallel_size)
