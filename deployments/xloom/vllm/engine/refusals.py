"""What would serve a mixture as something else is refused by name: in the arguments, and in what vLLM makes of them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xloom.protocol import XloomError
from xloom.vllm.engine.argument_table import KNOWN, MERGED, READ, REFUSED, Refusal

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def merged(ours: Mapping[str, Any], extra: Mapping[str, Any], *, mixtures: bool) -> dict[str, Any]:
    """Our arguments with the user's on top: mappings are merged, other values replaced.

    Raises `XloomError`: unknown_engine_argument, and unsupported_setting for what is refused (with `mixtures`: X-LoRA).
    """
    for name, value in extra.items():
        if name not in KNOWN:
            raise _unknown(name)
        refusal = REFUSED.get(name)
        if refusal is not None and (mixtures or refusal.always) and refusal.refuses(value):
            raise refused(f"engine.extra_args.{name}", refusal)
        if name in MERGED and value is not None:
            if not isinstance(value, Mapping):
                raise XloomError(
                    "unsupported_setting",
                    f"engine.extra_args.{name} is {type(value).__name__}, which xloom's own can't be merged with.",
                    f"Give {name} as a mapping.",
                )
            for part, reason in MERGED[name].items():
                if (mixtures or reason.always) and reason.refuses(_at(value, part)):
                    raise refused(f"engine.extra_args.{name}.{part}", reason)
    left_out = MERGED.keys() | READ  # where null means what xloom has
    return _merge(ours, {name: value for name, value in extra.items() if value is not None or name not in left_out})


def refused(name: str, refusal: Refusal) -> XloomError:
    """The error for one refused argument."""
    what = f"{name} is refused" if refusal.always else f"X-LoRA does not run with {name}"
    return XloomError("unsupported_setting", f"{what}: {refusal.why}.", refusal.cure or f"Leave {name} out.")


def _unknown(name: str) -> XloomError:
    plain = name.lstrip("-").replace("-", "_").split(".")[0]
    near = difflib.get_close_matches(plain, sorted(KNOWN), n=1)
    cure = f"Did you mean {near[0]}, as a mapping where it has parts?" if near else "See vLLM's engine arguments."
    return XloomError("unknown_engine_argument", f"vLLM has no engine argument {name!r} (engine.extra_args).", cure)


def _at(value: Mapping[str, Any], path: str) -> Any:
    """What lies at a dotted path; None for nothing."""
    found: Any = value
    for key in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for name, value in theirs.items():
        mine = both.get(name)
        both[name] = _merge(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return both


# Where the result says that something is on, however it got there: defaults, environment variables, the checkpoint.
# Paths in `VllmConfig` (0.32), each with the argument it is refused as.
_RESOLVED: Mapping[str, str] = {
    "speculative_config": "speculative_config",
    "diffusion_config": "diffusion_config",
    "kv_transfer_config": "kv_transfer_config",
    "ec_transfer_config": "ec_transfer_config",
    "weight_transfer_config": "weight_transfer_config",
    "aux_output_config.enable_return_routed_experts": "enable_return_routed_experts",
    "scheduler_config.enable_chunked_prefill": "enable_chunked_prefill",
    "scheduler_config.max_num_active_seqs": "max_num_active_seqs",
    "parallel_config.pipeline_parallel_size": "pipeline_parallel_size",
    "parallel_config.data_parallel_size": "data_parallel_size",
    "parallel_config.prefill_context_parallel_size": "prefill_context_parallel_size",
    "parallel_config.decode_context_parallel_size": "decode_context_parallel_size",
    "parallel_config.distributed_executor_backend": "distributed_executor_backend",
    "parallel_config.enable_batch_sharded_sampling": "enable_batch_sharded_sampling",
    "parallel_config.enable_dbo": "enable_dbo",
    "parallel_config.ubatch_size": "ubatch_size",
    "parallel_config.enable_elastic_ep": "enable_elastic_ep",
    "parallel_config.enable_fault_tolerance": "enable_fault_tolerance",
    "parallel_config.enable_hc_sp": "enable_hc_sp",
    "lora_config.fully_sharded_loras": "fully_sharded_loras",
    "lora_config.default_mm_loras": "default_mm_loras",
    "lora_config.enable_tower_connector_lora": "enable_tower_connector_lora",
    "lora_config.enable_mixed_moe_lora_format": "enable_mixed_moe_lora_format",
    "lora_config.enable_moe_shared_loras": "enable_moe_shared_loras",
    "model_config.enable_prompt_embeds": "enable_prompt_embeds",
    "model_config.enable_sleep_mode": "enable_sleep_mode",
    "cache_config.kv_sharing_fast_prefill": "kv_sharing_fast_prefill",
    "compilation_config.pass_config.fuse_attn_quant": "compilation_config.pass_config.fuse_attn_quant",
    "attention_config.hisparse_config": "attention_config.hisparse_config",
}
# Read by vLLM (0.32) where it is used, and in no configuration.
_ENVIRONMENT: Mapping[str, Refusal] = {
    "VLLM_LORA_ENABLE_DUAL_STREAM": Refusal(
        "LoRA would run on a stream of its own, beside the gates", ("0", "", "false", "False")
    ),
}


def check_resolved(config: VllmConfig) -> None:
    """Hold vLLM's resolved configuration against what mixtures need, however it came to be what it is.

    Raises `XloomError`: unsupported_setting.
    """
    if config.lora_config is None:
        raise refused("enable_lora: false", REFUSED["enable_lora"])
    for path, name in _RESOLVED.items():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part, None)
        refusal = _refusal(name)
        if refusal.refuses(value):
            raise refused(f"{name} (vLLM's {path} is {_shown(value)})", refusal)


def check_environment() -> None:
    """Hold the environment variables that vLLM reads where it uses them against what mixtures need.

    Raises `XloomError`: unsupported_setting.
    """
    for variable, refusal in _ENVIRONMENT.items():
        if refusal.refuses(os.environ.get(variable)):
            raise refused(f"the environment variable {variable}", refusal)


def _refusal(name: str) -> Refusal:
    if name in REFUSED:
        return REFUSED[name]
    whole, _, part = name.partition(".")
    return MERGED[whole][part]


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, str)) else type(value).__name__


def check_dtype(config: VllmConfig, device: str) -> None:
    """Refuse float32 with LoRA where vLLM's Triton kernels run, which assert on it without a cause.

    vllm/lora/ops/triton_ops/lora_shrink_op.py takes float16 and bfloat16 (0.32). Raises `XloomError`.
    """
    if device != "cuda" or config.lora_config is None:
        return
    wide = {
        "engine.dtype": config.model_config.dtype,
        "engine.extra_args.lora_dtype": config.lora_config.lora_dtype,
    }
    for name, dtype in wide.items():
        if str(dtype).removeprefix("torch.") == "float32":
            raise no_wide_lora(name)


def no_wide_lora(name: str = "engine.dtype") -> XloomError:
    """What is wrong with float32 for adapters on a GPU."""
    return XloomError(
        "unsupported_setting",
        f"{name} is float32, in which vLLM's LoRA kernels don't run on GPUs: they take float16 and bfloat16.",
        f"Set {name} to auto, bfloat16 or float16.",
    )
