"""The base model as vLLM will run it: its configuration, dtype, the linears that take adapters, its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xloom.mixtures.modules import linear_modules
from xloom.protocol import XloomError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from xloom.settings import ModelSettings

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # Llama's, and most others'
_ROUTERS = ("gate", "router", "shared_expert_gate")  # of mixtures of experts; vLLM can't wrap each of them
_CURE = "Serve the adapters by name with engine.enable_xlora: false, or use another model."


def text_config(model: ModelSettings) -> Any:
    """The configuration of the model's decoder. Raises `XloomError` (model_not_loadable)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise XloomError(
            "model_not_loadable",
            f"No model could be read from {model.source!r}: {error}",
            "Name a local folder with config.json and safetensors, or a hub id.",
        ) from error
    return config.get_text_config()


def target_modules(model: ModelSettings) -> list[str]:
    """The names that adapters' linears end in: the decoder's, without embeddings, head, experts and their routers.

    Hugging Face's names: vLLM takes those of a fused linear's parts for the whole
    (`vllm.lora.utils.is_in_target_modules`, 0.32).
    """
    try:
        modules = linear_modules(model.source, model.revision)
    except XloomError:  # a model that Transformers has no causal language model for, such as one that sees
        return list(USUAL)
    names: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        in_layer = any(part.isdigit() for part in parts)
        if in_layer and "experts" not in parts and parts[-1] not in _ROUTERS:
            names[parts[-1]] = None
    return list(names) or list(USUAL)


def dtype_for(wanted: str, device: str, config: Any) -> str:
    """The engine's dtype for what the settings say. Raises `XloomError` (unsupported_setting)."""
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


def check_experts(config: VllmConfig, device: str) -> None:
    """Whether vLLM has kernels for the model's experts with LoRA on. Raises `XloomError` (unsupported_architecture).

    `select_unquantized_moe_backend` then takes TritonExperts whatever the device, which know no CPU (vLLM 0.32): the
    engine would end in the middle of its start.
    """
    model = config.model_config
    if device == "cpu" and config.lora_config is not None and model.is_moe:
        raise XloomError(
            "unsupported_architecture",
            f"{model.architectures[0]} is a mixture of experts, which vLLM does not run on CPU once adapters are on: "
            "its experts then want Triton and a GPU.",
            "Serve it on a GPU, or with engine.backend: transformers.",
        )


def check_mixtures(config: VllmConfig) -> None:
    """Whether the model can have a scaling sequence beside a request. Asks vLLM's registry, which loads no weights.

    Raises `XloomError` (unsupported_architecture).
    """
    # vllm.config.ModelConfig, vllm.model_executor.models.interfaces.supports_lora; vLLM 0.32.
    from vllm.model_executor.models.interfaces import supports_lora

    model = config.model_config
    kinds = {
        "does not generate text": model.runner_type != "generate",
        "is an encoder and a decoder": model.is_encoder_decoder,
        "takes more than text": model.is_multimodal_model,
        "does not compute its tokens once each, in order": model.is_diffusion,
        "keeps a state that is not in pages (a state-space model)": model.is_hybrid
        or model.has_inner_state
        or model.is_attention_free,
    }
    reason = next((kind for kind, true in kinds.items() if true), None)
    if reason is None:
        loaded, _ = model.registry.resolve_model_cls(model.architectures, model)
        if not supports_lora(loaded):
            reason = "takes no LoRA adapters in vLLM"
    if reason is not None:
        raise XloomError(
            "unsupported_architecture", f"X-LoRA does not run on {model.architectures[0]}: it {reason}.", _CURE
        )
