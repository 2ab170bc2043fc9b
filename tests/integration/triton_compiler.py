# ruff: noqa: E402 - the backend comes before the imports that read it
"""Run as a program, `CAPABILITY`: compile the LoRA kernels for a GPU of this compute capability, to its machine code.

Prints `compiled KERNEL VARIANT BYTES` for each. A process of its own, since vLLM decides at import whether there
is Triton.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import triton
import triton.backends

# vllm.triton_utils.importing (0.32) uses Triton on a CPU build only when Triton names a CPU backend.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand_kernel
from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink_kernel

from xloom.mixtures.weights import MOST_ADAPTERS
from xloom.vllm.plugin.gate_tables import ABSOLUTE, SIGMOID
from xloom.vllm.plugin.gated_shrink import gated_shrink_kernel
from xloom.vllm.plugin.input_gates import BLOCK_K, BLOCK_M, input_gates_kernel

del triton.backends.backends["cpu"]  # it compiles nothing
NUMBER, FLOAT = "i32", "fp32"
# The arguments of each kernel that are neither numbers (i32) nor constants, by type.
OURS = {"x": "*bf16", "out": "*fp32", "offsets": "*i32", "place": "*i64", "scaling": FLOAT}
OURS |= dict.fromkeys(("tokens", "counts", "starts", "slots"), "*i32")
INPUTS = OURS | {"routers": "*i64", "temperatures": "*fp32"}
SHRINK = {"input_ptr": "*bf16", "out_ptr": "*fp32", "scaling": FLOAT}
EXPAND = {"input_ptr": "*fp32", "out_ptr": "*bf16"}
META = ("token_indices_sorted_by_lora_ids", "num_tokens_per_lora", "lora_token_start_loc", "lora_ids")
SHRINK |= dict.fromkeys(META, "*i32")
EXPAND |= dict.fromkeys(META, "*i32")
DECODE = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256, "SPLIT_K": 16, "EVEN_K": True}
PREFILL = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 1, "EVEN_K": False}
PARTIAL = {"STORE_PARTIALS": False, "PARTIAL_N": 0, "PARTIAL_K": 0}


def variants(capability: int) -> list[tuple[Any, str, dict[str, Any], dict[str, str]]]:
    """Kernel, name of the variant, constants, types of arguments."""
    gdc = {"USE_GDC": capability >= 90, "launch_pdl": capability >= 90}  # utils.supports_pdl
    found: list[tuple[Any, str, dict[str, Any], dict[str, str]]] = []
    for shape, blocks, slices in (("decode", DECODE, 3), ("prefill", PREFILL, 1)):
        pointer = "*bf16" if slices == 1 else "*u64"
        shrink = blocks | gdc
        ours = shrink | {"GROUP_M": 8, "SLICES": slices, "x_column": 1, "a_column": 1, "out_rank": 1}
        found.append((gated_shrink_kernel, f"{shape}-{slices}", ours, OURS | {"a": pointer}))
        theirs = shrink | PARTIAL | {"GROUP_SIZE_M": 8, "SLICE_NUM": slices}
        theirs |= {"input_d1_stride": 1, "lora_d2_stride": 1, "output_d2_stride": 1}
        found.append((_lora_shrink_kernel, f"{shape}-{slices}", theirs, SHRINK | {"lora_ptr": pointer}))
        expand = {name: value for name, value in blocks.items() if name != "SPLIT_K"} | gdc
        expand |= {"BLOCK_K": 64, "ADD_INPUTS": True, "CAST_TYPE": True, "SLICE_NUM": slices}
        expand |= {"SAME_STRIDE": slices == 1, "input_d2_stride": 1, "output_d1_stride": 1}
        types = EXPAND | {"lora_ptr": pointer}
        if slices == 1:
            expand["ls_d2_ptr"] = 1
        else:  # key and value are narrower than the query: a table for each
            types |= dict.fromkeys(("ls_d0_ptr", "ls_d1_ptr", "ls_d2_ptr", "output_hs_ptr"), "*i64")
            types["slice_start_loc"] = "*u64"
        found.append((_lora_expand_kernel, f"{shape}-{slices}", expand, types))
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K, "ADAPTERS": MOST_ADAPTERS, "ABSOLUTE": ABSOLUTE}
    found.append((input_gates_kernel, "all", blocks | {"SIGMOID": SIGMOID, "x_column": 1}, INPUTS))
    return found


def main() -> None:
    capability = int(sys.argv[1])
    for kernel, variant, constants, types in variants(capability):
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: types.get(name, NUMBER) for name in names} | dict.fromkeys(constants, "constexpr")
        ordered = {name: signature[name] for name in kernel.arg_names}
        made = triton.compile(
            ASTSource(kernel, signature=ordered, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "num_stages": 2},
        )
        print("compiled", kernel.fn.__name__, variant, len(made.asm["cubin"]), flush=True)


if __name__ == "__main__":
    main()
