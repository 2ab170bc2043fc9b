"""What of an adapter this worker's engine would not apply: its tensors, by name, against the linears that take LoRA.

vLLM loads an adapter whose linears it does not run LoRA on, and leaves them out: the head, linears that the model class
does not wrap or names otherwise, and linears whose weights attention has absorbed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Module:
    """One module of an adapter: the start of its tensors' keys, and vLLM's name for it; empty for what it skips."""

    stem: str
    engine_name: str


def unapplied(manager: Any, folder: Path) -> list[str]:
    """Modules of a prepared adapter, by its own names, that `manager`, vLLM's `LoRAModelManager`, has no linear for.

    Before it is loaded. A module that another rank holds (pipeline parallelism) is missing here as well.
    """
    held = modules_of(manager, folder)
    taken = set(slices_by_name(manager))
    times = Counter(module.engine_name for module in held.values())
    return sorted(
        name for name, module in held.items() if module.engine_name not in taken or times[module.engine_name] > 1
    )


def unattached(manager: Any, lora_id: int, folder: Path) -> list[str]:
    """Modules of a loaded adapter whose weights are not in its slot of the linears that have their names."""
    manager.activate_adapter(lora_id)  # does nothing for one that is in a slot
    slot = manager.lora_index_to_id.index(lora_id)
    slices, lost = slices_by_name(manager), []
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        for name, module in modules_of(manager, folder).items():
            for part, stacked in zip("AB", slices.get(module.engine_name, ((), ())), strict=True):
                wanted = bool(file.get_tensor(f"{module.stem}.lora_{part}.weight").any())
                if wanted and not any(bool(tensor[slot].any()) for tensor in stacked):
                    lost.append(name)
                    break
    return sorted(lost)


def modules_of(manager: Any, folder: Path) -> dict[str, Module]:
    """A prepared adapter's modules by their own names, as vLLM would load them.

    As `WorkerLoRAManager._load_adapter` and `LoRAModel.from_lora_tensors` do it, vLLM 0.32.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    skipped = getattr(manager.model, "lora_skip_prefixes", None) or []
    found = {}
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        keys = list(file.keys())
    for key in keys:
        stem, _, part = key.rpartition(".lora_")
        if part != "A.weight":
            continue
        try:
            name = "" if LoRAModel._should_skip_module(key, skipped) else parse_fine_tuned_lora_name(key, mapper)[0]
        except ValueError:
            name = ""
        found[parse_fine_tuned_lora_name(key)[0]] = Module(stem, name)
    return found


def slices_by_name(manager: Any) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Each name an adapter may use -> the stacked A and B of its slices, `[slots, 1, ...]` each.

    `LoRAModelManager.modules`, `.packed_modules`; `BaseLayerWithLoRA.{lora_a_stacked,lora_b_stacked}`, vLLM 0.32.
    """
    absorbed = _absorbed(manager.model)
    found = {}
    for name, module in manager.modules.items():
        a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
        if id(module) in absorbed or not isinstance(a, tuple) or not isinstance(b, tuple):
            continue
        parts = manager.packed_modules.get(name, [name])
        for number, part in enumerate(parts):
            own = slice(number, number + 1) if len(parts) == len(a) else slice(None)
            found[part] = (a[own], b[own])
    return found


def _absorbed(model: Any) -> set[int]:
    """The linears that latent attention reads the plain weights of while it decodes.

    `MLAAttention.process_weights_after_loading` splits kv_b_proj's weight before LoRA is there; vLLM 0.32.
    """
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    return {
        id(module)
        for owner in model.modules()
        if isinstance(owner, MLAAttention)
        for module in owner.modules()
        if isinstance(module, BaseLayerWithLoRA)
    }
