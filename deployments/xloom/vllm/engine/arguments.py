"""Settings to vLLM engine arguments: names, units, and what differs on CPU."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Any

from xloom.engines.kv_size import token_bytes
from xloom.protocol import XloomError
from xloom.vllm.engine.lora_configs import LoRAShapes, lora_shapes
from xloom.vllm.plugin import WORKER_EXTENSION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from xloom.settings import EngineSettings, ModelSettings

logger = logging.getLogger(__name__)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks, vLLM 0.32
CPU_PAGE_MULTIPLE = 32  # tokens: what vLLM's CPU attention needs


def engine_arguments(
    model: ModelSettings, engine: EngineSettings, *, xlora: bool, max_lora_rank: int, device: str
) -> dict[str, Any]:
    """The keyword arguments of vLLM's `AsyncEngineArgs`; `device` is cpu or cuda. Raises `XloomError`."""
    pages = engine.paged_attention
    architecture, config = _architecture(model)
    arguments: dict[str, Any] = {
        "model": model.source,
        "revision": model.revision,
        "served_model_name": [model.served_name],
        "trust_remote_code": False,
        "dtype": _dtype(engine.dtype, device, config),
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
        "lora_target_modules": _decoder_linears(config),
    }
    if engine.extra_args.get("trust_remote_code"):
        raise XloomError(
            "unsupported_setting", "Code from a model's repository is never run.", "Leave trust_remote_code out."
        )
    if xlora:
        arguments["hf_overrides"] = {"architectures": [_xlora_architecture(architecture)]}
        arguments["worker_extension_cls"] = WORKER_EXTENSION
        _refuse_with_xlora(engine.extra_args)
    block_size = pages.block_size
    if device == "cpu":
        block_size = math.ceil(pages.block_size / CPU_PAGE_MULTIPLE) * CPU_PAGE_MULTIPLE
        if block_size != pages.block_size:
            logger.warning("block_size %d rounded up to %d: CPU attention needs it", pages.block_size, block_size)
        num_pages = math.ceil(pages.max_blocks * pages.block_size / block_size)
        # gpu_memory_utilization would reserve that share of the machine's memory on CPU: bytes instead.
        arguments["num_gpu_blocks_override"] = num_pages
        arguments["kv_cache_memory_bytes"] = num_pages * page_bytes(config, block_size, arguments["dtype"], xlora)
    else:
        arguments["gpu_memory_utilization"] = pages.gpu_memory_fraction
        if "max_blocks" in pages.model_fields_set:  # the default is ADR-008's; a GPU is filled unless told otherwise
            arguments["num_gpu_blocks_override"] = pages.max_blocks
        if xlora:
            # Full graphs would capture one pass; piecewise ones are replayed in both.
            arguments["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    arguments["block_size"] = block_size
    return arguments | engine.extra_args


def page_bytes(config: Any, block_size: int, dtype: str, xlora: bool) -> int:
    """Bytes of one KV page over all layers; X-LoRA keeps a second set of keys and values for its scaling pass."""
    return block_size * token_bytes(lambda name: getattr(config, name, None), wide=dtype == "float32", xlora=xlora)


def kv_bytes(model: ModelSettings, engine: EngineSettings, *, xlora: bool, device: str) -> int:
    """Bytes of a replica's KV pages; on a GPU, which fills what is left, of one sequence of the full length."""
    pages = engine.paged_attention
    fixed = device == "cpu" or "max_blocks" in pages.model_fields_set
    tokens = pages.max_blocks * pages.block_size if fixed else engine.max_model_len
    config = _architecture(model)[1]
    return tokens * page_bytes(config, 1, _dtype(engine.dtype, device, config), xlora)


def _architecture(model: ModelSettings) -> tuple[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise XloomError(
            "model_not_loadable",
            f"No model could be read from {model.source!r}: {error}",
            "Name a local folder with config.json and safetensors, or a hub id.",
        ) from error
    names = getattr(config, "architectures", None) or ["unknown"]
    return str(names[0]), config.get_text_config()


def _refuse_with_xlora(extra_args: dict[str, Any]) -> None:
    """Raise `XloomError` for engine arguments under which the two passes or the gates would be wrong."""
    refused = {
        "fully_sharded_loras": bool(extra_args.get("fully_sharded_loras")),  # splits the rank axis the gates lie on
        "pipeline_parallel_size": int(extra_args.get("pipeline_parallel_size", 1)) > 1,  # routing needs the last stage
        "speculative_config": bool(extra_args.get("speculative_config")),
        "enable_dbo": bool(extra_args.get("enable_dbo")),
    }
    for name, wrong in refused.items():
        if wrong:
            raise XloomError(
                "unsupported_setting", f"X-LoRA does not run with {name}.", f"Leave {name} out of engine.extra_args."
            )


def _xlora_architecture(architecture: str) -> str:
    from xloom.vllm.plugin import ARCHITECTURES, XLORA_PREFIX

    if architecture not in ARCHITECTURES:
        raise XloomError(
            "unsupported_architecture",
            f"X-LoRA does not run on {architecture}; it runs on {', '.join(ARCHITECTURES)}.",
            "Serve the adapters by name with engine.enable_xlora: false, or use one of these models.",
        )
    return XLORA_PREFIX + architecture


def _dtype(wanted: str, device: str, config: Any) -> str:
    if device != "cpu":
        return wanted
    if _packed(config):
        # cpu_gemm_wna16, which multiplies with 4-bit weights, is "not implemented for 'Float'"; vLLM 0.32.
        if wanted == "float32":
            raise no_float32()
        return "bfloat16" if wanted == "auto" else wanted
    if wanted != "auto":
        return wanted
    import torch

    # A CPU without bfloat16 arithmetic emulates it, slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def no_float32() -> XloomError:
    """What is wrong with float32 for 4-bit weights on CPU."""
    return XloomError(
        "unsupported_setting",
        "On CPU 4-bit weights run in bfloat16 or float16, not in float32.",
        "Set engine.dtype to auto, or isq.bits to 8.",
    )


def _packed(config: Any) -> bool:
    """Whether the checkpoint's weights are 4-bit integers, and its activations are not quantised."""
    quantised = getattr(config, "quantization_config", None) or {}
    return isinstance(quantised, dict) and quantised.get("format") == "pack-quantized"


def _lora_rank(rank: int) -> int:
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise XloomError(
        "rank_too_large",
        f"A stacked rank of {rank} is above vLLM's limit of {LORA_RANKS[-1]}.",
        "Blend fewer adapters.",
    )


def _decoder_linears(config: Any) -> list[str]:
    attention = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]
    if getattr(config, "num_local_experts", None):
        return attention  # experts would need vLLM's fused MoE LoRA, which X-LoRA does not gate
    return [*attention, "gate_proj", "up_proj", "gate_up_proj", "down_proj"]


def engine_config(model: ModelSettings, engine: EngineSettings, *, xlora: bool, max_lora_rank: int) -> VllmConfig:
    """vLLM's whole configuration for one replica. Raises `XloomError` for arguments vLLM refuses."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    device = "cpu" if current_platform.is_cpu() else "cuda"
    if device == "cpu":
        bind_threads(engine.tensor_parallel_size)
    arguments = engine_arguments(model, engine, xlora=xlora, max_lora_rank=max_lora_rank, device=device)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        return AsyncEngineArgs(**arguments).create_engine_config()
    except TypeError as error:
        raise XloomError(
            "unknown_engine_argument", f"vLLM refuses engine.extra_args: {error}", "See vLLM's engine arguments."
        ) from error
    except ValueError as error:
        raise XloomError(
            "invalid_engine_settings", f"vLLM refuses the settings: {error}", "Mend the settings."
        ) from error


def bind_threads(ranks: int) -> None:
    """Give each rank of a CPU engine its share of the cores this process may use, unless the operator has chosen.

    vLLM's `auto` binds each replica on a machine to the same first core, and Ray sets OMP_NUM_THREADS to the
    actor's CPUs.
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [cores[rank * share : (rank + 1) * share] or cores[-1:] for rank in range(ranks)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)


def shapes_of(model: ModelSettings, engine: EngineSettings, max_lora_rank: int) -> LoRAShapes:
    """The LoRA products of an engine of these settings. Raises `XloomError`."""
    return lora_shapes(_architecture(model)[1], _lora_rank(max_lora_rank), engine.tensor_parallel_size)
