"""The places where vLLM 0.32 has no hook and is patched: each names the symbol and says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xloom.mixtures.routing.base import Routing, Source
from xloom.mixtures.routing.registry import load_routing, read_description
from xloom.vllm.plugin import INPUT_GATES
from xloom.vllm.plugin.weight_ledger import with_ledger

if TYPE_CHECKING:
    from xloom.vllm.plugin.gates import Gater

HOOKED = "xloom_hooked"  # set on model runners whose methods are wrapped

_applied = False


def apply() -> None:
    """Patch this process once."""
    global _applied
    if _applied:
        return
    _applied = True
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import current_platform

    # It looks for weights that the checkpoint lacks among few layers of a few models.
    DefaultModelLoader.load_weights = with_ledger(DefaultModelLoader.load_weights)
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        return  # LoRA there has kernels of its own, and no gate
    from vllm.lora.layers import base_linear
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from xloom.vllm.plugin import runner_v1

    _patch_punica(current_platform)
    setattr(runner_v1.patch(), HOOKED, True)
    if HAS_TRITON:  # the V2 runner needs it
        from xloom.vllm.plugin import runner_v2

        setattr(runner_v2.patch(), HOOKED, True)
    LoRAModelRunnerMixin.load_lora_model = _then(LoRAModelRunnerMixin.load_lora_model, _remember_runner)
    # A LoRA manager's own punica wrapper does not know it, and ours reads slots, ranks and routing from it.
    LoRAModelManager.__init__ = _then(LoRAModelManager.__init__, lambda manager, *_: _attach(manager))
    # A bundle is loaded by vLLM as the LoRA adapter it is stacked into; its routing comes along.
    WorkerLoRAManager._load_adapter = _with_routing(WorkerLoRAManager._load_adapter)
    if current_platform.is_cpu():
        # _get_lora_device asks the base layer's weight, which CPUInt8ScaledMMLinearKernel has set to None once oneDNN
        # holds a packed copy: LoRA on int8 weights would end in "'NoneType' object has no attribute 'device'".
        base_linear._get_lora_device = _known_without_weight(base_linear._get_lora_device)


def _patch_punica(platform: Any) -> None:
    if platform.is_cpu():
        # CpuPlatform.get_punica_wrapper names the class that every LoRA linear calls.
        type(platform).get_punica_wrapper = classmethod(lambda cls: "xloom.vllm.plugin.punica_cpu.GatedPunicaCPU")
        # CpuPlatform.check_and_update_config turns compilation off when LoRA is on, because vLLM's own CPU
        # LoRA kernels can't be traced; ours is one opaque operator.
        original = type(platform).check_and_update_config.__func__
        type(platform).check_and_update_config = classmethod(_compiled_with_lora(original))
        # vllm.compilation.decorators._try_load_aot_compiled_fn asks each cached graph to finish its loading, and
        # compiles anew when it can't. What plain Inductor makes, as on CPU, has nothing to finish.
        torch.compiler.load_compiled_function = _finalizable(torch.compiler.load_compiled_function)
    else:
        type(platform).get_punica_wrapper = classmethod(lambda cls: "xloom.vllm.plugin.punica_gpu.GatedPunicaGPU")


def _compiled_with_lora(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    return check_and_update_config


def _finalizable(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda vllm_config: None
        return loaded

    return load_compiled_function


def _known_without_weight(original: Callable[[Any], torch.device]) -> Callable[[Any], torch.device]:
    @functools.wraps(original)
    def _get_lora_device(base_layer: Any) -> torch.device:
        if getattr(base_layer, "weight", base_layer) is None:
            return torch.device("cpu")
        return original(base_layer)

    return _get_lora_device


def _then(original: Callable[..., Any], after: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        after(self, *args)
        return result

    return patched


def _attach(manager: Any) -> None:
    for wrapper in manager.punica_wrapper_mapping.values():
        if hasattr(wrapper, "attach"):
            wrapper.attach(manager)


def _remember_runner(runner: Any, model: Any, config: Any, *args: Any) -> None:
    from xloom.vllm.plugin.gates import BATCH
    from xloom.vllm.plugin.scheduler import PairScheduling

    BATCH.scheduler, BATCH.runner = config.scheduler_config.get_scheduler_cls(), type(runner)
    BATCH.mixtures = issubclass(BATCH.scheduler, PairScheduling)
    BATCH.input_gates = bool((config.additional_config or {}).get("xloom", {}).get(INPUT_GATES))


def _with_routing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        model = original(self, lora_request)
        folder = Path(lora_request.lora_path)
        if read_description(folder) is not None:
            from xloom.vllm.plugin.gates import SlotRouting

            gater, routing = gater_of(self._adapter_manager), load_routing(folder)
            _check_ranks(routing)
            check_kernels(routing, gater)
            model.xloom_routing = SlotRouting(routing.to(self.device), lora_request.lora_name)
            gater.reserve(model.xloom_routing)
        return model

    return load_adapter


def _check_ranks(routing: Routing) -> None:
    """With tensor parallelism each rank sees a part of some linears' input, and of no use is a part of R x."""
    from vllm.distributed.parallel_state import get_tp_group  # vLLM 0.32

    if routing.source is Source.INPUT and get_tp_group().world_size > 1:
        raise RuntimeError(f"gates of the kind {routing.kind!r} can't be made with tensor parallelism")


def check_kernels(routing: Routing, gater: Gater) -> None:
    """A GPU's captured graphs have the kernel that makes such gates, or lack it for good."""
    if routing.source is Source.INPUT and not gater.makes_gates:
        raise RuntimeError(
            f"gates of the kind {routing.kind!r} are made by a kernel that this engine was started without: "
            "set engine.input_gates: true and start again"
        )


def gater_of(manager: Any) -> Gater:
    """Where gates of this LoRA manager's bundles go. Raises `RuntimeError` where a bundle would be served ungated.

    Scheduler, model runner and punica wrapper must all be ours: one that is not knows nothing of gates.
    """
    from xloom.vllm.plugin.gates import BATCH

    gater, lacking = BATCH.gater, []
    if gater is None or gater.manager is not manager:
        lacking.append("its LoRA kernels")
    if not BATCH.mixtures:
        lacking.append("its scheduler")
    if not getattr(BATCH.runner, HOOKED, False):
        lacking.append("its model runner")
    if lacking or gater is None:
        raise RuntimeError(f"this engine was not started for mixtures: {', '.join(lacking)} would leave the gates out")
    return gater
