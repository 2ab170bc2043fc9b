"""What the plugin and the backend rely on of vLLM 0.32: this fails when an upgrade takes it away."""

from __future__ import annotations

import inspect
import re

import vllm
from vllm import ModelRegistry
from vllm.forward_context import ForwardContext
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.triton_ops import lora_shrink_op
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.attention import attention
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils import torch_utils
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase
from xloom.vllm.plugin.figures import MixtureWorker

from xloom.vllm.plugin import ARCHITECTURES, XLORA_PREFIX


def test_version_is_the_one_the_seams_were_read_in() -> None:
    assert vllm.__version__.startswith("0.32.")


def test_the_plugin_is_loaded_and_names_its_wrapper_and_models() -> None:
    load_general_plugins()
    assert current_platform.get_punica_wrapper() == "xloom.vllm.plugin.punica_cpu.GatedPunicaCPU"
    registered = ModelRegistry.get_supported_archs()
    assert {XLORA_PREFIX + name for name in ARCHITECTURES} <= set(registered)


def test_every_xlora_class_is_made_from_vllms_own() -> None:
    from xloom.vllm.plugin import models

    for name in ARCHITECTURES:
        made = getattr(models, XLORA_PREFIX + name)
        assert made.__mro__[1].__name__ == name
        assert made.supports_lora


def test_attention_looks_its_layer_metadata_and_slots_up_by_name_in_the_forward_context() -> None:
    source = inspect.getsource(attention.get_attention_context)
    for part in ("no_compile_layers[layer_name]", "attn_metadata_raw[layer_name]", "slot_mapping.get(layer_name)"):
        assert part in source
    assert {"no_compile_layers", "attn_metadata", "slot_mapping"} <= set(ForwardContext.__dataclass_fields__)


def test_a_worker_method_of_ours_is_reached_through_the_engine_core() -> None:
    load = inspect.getsource(WorkerWrapperBase.init_worker)
    assert "parallel_config.worker_extension_cls" in load
    called = list(inspect.signature(AsyncMPClient.collective_rpc_async).parameters)
    assert called == ["self", "method", "timeout", "args", "kwargs"]
    for method in vars(MixtureWorker):
        assert method.startswith("__") or not hasattr(WorkerBase, method)


def test_lora_seams_keep_their_signatures() -> None:
    linear = list(inspect.signature(PunicaWrapperBase.add_lora_linear).parameters)
    assert linear[:7] == ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]
    for wrapper in (PunicaWrapperBase, PunicaWrapperCPU, PunicaWrapperGPU):
        metadata = list(inspect.signature(wrapper.update_metadata).parameters)
        assert metadata[:5] == ["self", "mapping", "lora_index_to_id", "max_loras", "vocab_size"]
    shrink = list(inspect.signature(PunicaWrapperGPU.add_shrink).parameters)
    assert shrink[:5] == ["self", "y", "x", "lora_a_stacked", "scale"]
    assert list(inspect.signature(WorkerLoRAManager._load_adapter).parameters) == ["self", "lora_request"]
    source = inspect.getsource(LoRAModelManager.__init__)
    for name in ("_registered_adapters", "lora_index_to_id", "packed_modules", "modules"):
        assert f"self.{name}" in source
    assert "self.punica_wrapper_mapping" in inspect.getsource(LoRAModelManager._init_punica_wrapper)


def test_what_the_gated_shrink_follows_is_as_it_was_read() -> None:
    taken = list(inspect.signature(lora_shrink_op._lora_shrink).parameters)
    given = re.findall(
        r"^            (?:self\.)?(\w+)(?:\[:token_nums\])?,$", inspect.getsource(LoRAKernelMeta.meta_args), re.M
    )
    names = ["token_lora_mapping", "token_indices_sorted_by_lora_ids", "num_tokens_per_lora", "lora_token_start_loc"]
    assert taken[3:] == [*names, "lora_ids", "no_lora_flag_cpu", "num_active_loras", "scaling"]
    assert given == [*names, "active_lora_ids", "no_lora_flag_cpu", "num_active_loras"]
    source = inspect.getsource(lora_shrink_op._lora_shrink)
    for part in ("if no_lora_flag_cpu.item():", "output_tensor.zero_()", 'kernel_config.get("group_size_m", 8)'):
        assert part in source
    assert "t.to(device=device, dtype=dtype, non_blocking=True)" in inspect.getsource(torch_utils.async_tensor_h2d)
