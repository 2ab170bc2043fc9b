"""Tiny random models, adapters and X-LoRA bundles, and PEFT's X-LoRA as the oracle they are compared with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from xloom.mixtures.linear_router import LinearRouter
from xloom.mixtures.modules import linear_modules

HIDDEN = 64
VOCAB = 288
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral")
MORE_ARCHITECTURES = ("gemma", "phi", "olmo2", "granite", "cohere", "starcoder2")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# The default mixture: ranks, scales and targets all differ; the last lacks modules the others have.
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 8, "alpha": 16, "targets": ATTENTION + MLP},
    {"rank": 4, "alpha": 4, "targets": ("q_proj", "v_proj", "down_proj"), "rslora": True},
    {"rank": 6, "alpha": 9, "targets": ("o_proj", "gate_proj", "up_proj")},
)
ATTENTION_ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 8, "alpha": 16, "targets": ATTENTION},
    {"rank": 4, "alpha": 4, "targets": ("q_proj", "v_proj"), "rslora": True},
    {"rank": 6, "alpha": 9, "targets": ("o_proj",)},
)
PHI3_ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 8, "alpha": 16, "targets": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")},
    {"rank": 4, "alpha": 4, "targets": ("qkv_proj", "down_proj"), "rslora": True},
    {"rank": 6, "alpha": 9, "targets": ("o_proj", "gate_up_proj")},
)

# The names of the default mixture's targets where an architecture has others.
OWN_NAMES: dict[str, dict[str, str]] = {
    "phi": {"o_proj": "dense", "gate_proj": "", "up_proj": "fc1", "down_proj": "fc2"},
    "starcoder2": {"gate_proj": "", "up_proj": "c_fc", "down_proj": "c_proj"},
}


def adapters_for(architecture: str) -> tuple[dict[str, Any], ...]:
    """The default mixture in the architecture's own module names."""
    found = {"phi3": PHI3_ADAPTERS, "mixtral": ATTENTION_ADAPTERS}.get(architecture, ADAPTERS)
    names = OWN_NAMES.get(architecture, {})
    return tuple(
        each | {"targets": tuple(name for target in each["targets"] if (name := names.get(target, target)))}
        for each in found
    )


def tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 bytes, then <s>, </s>, <pad>, and filler tokens up to `VOCAB`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>", *(f"<extra_{i}>" for i in range(VOCAB - 259))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def tiny_model(
    folder: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_layers: int = 2,
    tied: bool = False,
) -> Path:
    """Write a random model, with its tokenizer, of one of the architectures named; its greedy tokens are varied."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    special: dict[str, dict[str, Any]] = {
        "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64},
        "gemma3": {"query_pre_attn_scalar": 32, "sliding_window": 64},
        "mistral": {"sliding_window": None},
        "phi3": {"original_max_position_embeddings": 512, "sliding_window": None},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    }
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    if architecture in ("phi3", "qwen2", "phi", "olmo2", "granite", "cohere", "starcoder2"):  # always hidden / heads
        common |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **common, **special.get(architecture, {}))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start constant, which would hide mistakes in their use
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = 257
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_adapter(
    folder: Path,
    model_folder: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = ATTENTION + MLP,
    rslora: bool = False,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.6,
    leading: float = 1.0,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a random LoRA adapter, strong enough to change the model's tokens; `layers` limits it to some layers.

    `leading` stretches one direction of each A: where one singular value is far above the others, as training leaves
    it, PEFT's few steps of power iteration find its vector.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for name, (out_features, in_features) in linear_modules(str(model_folder)).items():
        parts = name.split(".")
        if parts[-1] not in targets or "experts" in parts:
            continue
        if layers is not None and not any(part.isdigit() and int(part) in layers for part in parts):
            continue
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        a[0] *= leading
        b = torch.randn(out_features, rank, generator=generator) * strength / rank**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    written: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "use_rslora": rslora,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    if layers is not None:
        written["layers_to_transform"] = list(layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(written | (config or {})))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_bundle(
    folder: Path,
    model_folder: Path,
    *,
    adapters: Sequence[dict[str, Any]] = ADAPTERS,
    depth: int = 1,
    layerwise: bool = True,
    softmax: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    softmax_topk: bool = False,
    scaling_pass_value: float = 0.0,
    global_scaling_weight: float = 1.0,
    size: int = 48,
    fmt: str = "peft",
    relu: bool = True,
    seed: int = 0,
    mixing_mode: str | None = None,
    projection: bool = False,
) -> Path:
    """Write an X-LoRA bundle with its adapters in sub-folders "0", "1", …, in PEFT's or the xlora package's format.

    `relu` False leaves out ReLU and dropout between the classifier's layers, which only `fmt="xlora"` can say.
    `projection` adds a learned projection, for `mixing_mode="concatenate"`.
    """
    paths = [
        tiny_adapter(folder / str(number), model_folder, **({"seed": 10 * seed + number} | spec))
        for number, spec in enumerate(adapters)
    ]
    adapted: dict[str, tuple[int, int]] = {}  # module -> out features, sum of ranks
    for path in paths:
        for key, tensor in load_file(path / "adapter_model.safetensors").items():
            if key.endswith(".lora_B.weight"):
                module = key.removesuffix(".lora_B.weight").removeprefix("base_model.model.")
                adapted[module] = (tensor.shape[0], adapted.get(module, (0, 0))[1] + tensor.shape[1])
    outputs = len(paths) * (len(adapted) if layerwise else 1)
    sizes = [HIDDEN, *[size] * (depth - 1), outputs]
    generator = torch.Generator().manual_seed(2000 + seed)
    linears = [
        (
            torch.randn(sizes[i + 1], sizes[i], generator=generator) * 2 / sizes[i] ** 0.5,
            torch.randn(sizes[i + 1], generator=generator) * 0.5,
        )
        for i in range(depth)
    ]
    config: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "adapters": {str(number): str(number) for number in range(len(paths))},
        "enable_softmax": softmax,
        "enable_softmax_topk": softmax_topk,
        "layerwise_scalings": layerwise,
        "xlora_depth": depth,
        "xlora_size": size,
        "xlora_dropout_p": 0.2,
        "use_trainable_adapters": False,
        "softmax_temperature": temperature,
        "top_k_lora": top_k,
        "scaling_pass_value": scaling_pass_value,
        "global_scaling_weight": global_scaling_weight,
    }
    if mixing_mode is not None:
        config["mixing_mode"] = mixing_mode
    if projection:
        learned = {f"{m}.weight": 0.3 * torch.randn(shape, generator=generator) for m, shape in sorted(adapted.items())}
        save_file(learned, folder / "xlora_projection.safetensors")
    tensors = {}
    for number, (weight, bias) in enumerate(linears):
        if fmt == "peft":
            key = f"base_model.internal_xlora_classifier.layers.{3 * number}"
        else:
            key = "last" if number == depth - 1 else f"inner.{number * (3 if relu else 1)}"
        tensors[f"{key}.weight"], tensors[f"{key}.bias"] = weight, bias
    if fmt == "peft":
        config |= {"peft_type": "XLORA", "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        config |= {"base_model_id": str(model_folder), "enable_relu_and_dropout": relu, "use_bias": True}
        config |= {"stop_token_id": None}
        (folder / "xlora_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "xlora_classifier.safetensors", metadata={"format": "pt"})
    return folder


def linear_router(model_folder: Path, adapters: Mapping[str, Path], **options: Any) -> LinearRouter:
    """A random linear router over adapters that lie in a folder with it."""
    generator = torch.Generator().manual_seed(8)
    count = len(adapters)
    layers = {
        name: (torch.randn(count, inputs, generator=generator), torch.randn(count, generator=generator))
        for name, (_, inputs) in linear_modules(str(model_folder)).items()
        if name != "lm_head"
    }
    return LinearRouter({name: folder.name for name, folder in adapters.items()}, layers, **options)


def load_model(folder: Path) -> PreTrainedModel:
    """The model in float32, without its KV cache."""
    options = {}
    if AutoConfig.from_pretrained(folder).model_type == "gemma2":  # transformers' sdpa leaves its softcap out
        options = {"attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.config.use_cache = False
    model.generation_config.use_cache = False
    model.eval()
    return model


def peft_xlora(model_folder: Path, bundle_folder: Path, **overrides: Any) -> PeftModel:
    """PEFT's own X-LoRA over the bundle (in PEFT's format), in float32; `overrides` are `XLoraConfig` fields.

    The configuration is passed by hand and the classifier's weights are loaded afterwards, since
    `PeftModel.from_pretrained` disregards the adapters' paths.
    """
    written = json.loads((bundle_folder / "adapter_config.json").read_text()) | overrides
    adapters = {name: str((bundle_folder / path).resolve()) for name, path in written.pop("adapters").items()}
    written.pop("peft_type")
    written.pop("mixing_mode", None)
    with warnings.catch_warnings():  # it warns of some combinations of options, which are compared all the same
        warnings.filterwarnings("ignore", message=".*enable_softmax.*")
        config = XLoraConfig(adapters=adapters, **written)
    model = get_peft_model(load_model(model_folder), config)
    assert isinstance(model, PeftModel)
    prefix = "base_model.internal_xlora_classifier."
    tensors = load_file(bundle_folder / "adapter_model.safetensors")
    classifier = model.base_model.internal_xlora_classifier
    classifier.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    model.eval()
    return model


def peft_lora(model_folder: Path, adapter_folder: Path) -> PeftModel:
    """PEFT's own LoRA, in float32."""
    model = PeftModel.from_pretrained(load_model(model_folder), adapter_folder)
    model.eval()
    return model


def peft_arrow(
    model_folder: Path,
    adapter_folders: Sequence[Path],
    top_k: int,
    temperature: float = 1.0,
    general: Sequence[Path] = (),
) -> torch.nn.Module:
    """PEFT's own Arrow over adapters of one rank and the same targets, in float32; `general` ones are subtracted."""
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0, use_gks=bool(general))
    folders, others = list(map(str, adapter_folders)), list(map(str, general))
    model = create_arrow_model(load_model(model_folder), folders, config, others or None)
    assert isinstance(model, PeftModel)
    model.eval()
    return model


@torch.no_grad()
def peft_logits(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """The logits `[num_tokens, vocab]` over one prompt; of a plain model too."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def peft_greedy(model: torch.nn.Module, prompt_ids: Sequence[int], n: int) -> list[int]:
    """The next `n` greedy tokens after the prompt, end-of-text ignored, each from a full forward pass."""
    ids = list(prompt_ids)
    for _ in range(n):
        ids.append(int(peft_logits(model, ids)[-1].argmax()))
    return ids[len(prompt_ids) :]
