"""LoRA's shrink with the gates in its epilogue: vLLM's kernel, each partial product times its gate as it is stored.

The gate multiplies every term of a sum, so splitting that sum over programs (split-K) changes nothing. A row
without LoRA has no program, a rank without a gate a masked load.
"""

from __future__ import annotations

import torch

# Relied on, vLLM 0.32: `lora_shrink_op._lora_shrink_kernel` and `_lora_shrink`, whose arguments, grid and order of
# programs these follow; `kernel_utils.mm_k`; the configurations and pointer tables of `utils`; `LoRAKernelMeta`.
from vllm import envs
from vllm.lora.ops.triton_ops import utils
from vllm.lora.ops.triton_ops.kernel_utils import mm_k
from vllm.triton_utils import tl, triton

from xloom.vllm.plugin.gate_tables import GateTables

# With VLLM_BATCH_INVARIANT a row's sum may not depend on the batch: one order of adding, whatever its size.
INVARIANT = {"block_k": 256, "split_k": 1}


@triton.jit(do_not_specialize=["first_linear"])  # type: ignore[untyped-decorator]
def gated_shrink_kernel(
    x: tl.tensor,  # [num_tokens, K]
    a: tl.tensor,  # [slots, 1, N, K], or the addresses of one such a slice
    out: tl.tensor,  # [slices, num_tokens, N] float32, zero when SPLIT_K > 1
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    tokens: tl.tensor,  # the batch's rows, sorted by slot
    counts: tl.tensor,  # of rows a slot
    starts: tl.tensor,  # of each slot in `tokens`
    slots: tl.tensor,  # in the batch; -1: no LoRA
    scaling: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    a_slot: tl.tensor,
    a_rank: tl.tensor,
    a_column: tl.tensor,
    out_slice: tl.tensor,
    out_row: tl.tensor,
    out_rank: tl.tensor,
    offsets: tl.tensor,
    offsets_slot: tl.tensor,
    offsets_linear: tl.tensor,
    first_linear: tl.tensor,
    place: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
    USE_GDC: tl.constexpr,
    launch_pdl: tl.constexpr,
) -> None:
    slot_number = tl.program_id(axis=2)
    slot = tl.load(slots + slot_number)
    if slot == -1:
        return
    programs_n = tl.cdiv(N, BLOCK_N)
    programs_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(axis=0)
    split = program % SPLIT_K
    program = program // SPLIT_K
    group = program // (GROUP_M * programs_n)
    first_m = group * GROUP_M
    group_m = min(programs_m - first_m, GROUP_M)
    block_m = first_m + (program % (GROUP_M * programs_n)) % group_m
    block_n = (program % (GROUP_M * programs_n)) // group_m
    count = tl.load(counts + slot_number) - block_m * BLOCK_M
    if count <= 0:
        return
    count = min(BLOCK_M, count)
    m = tl.arange(0, BLOCK_M)
    row = tl.load(tokens + tl.load(starts + slot_number) + block_m * BLOCK_M + m % count).to(tl.int64)
    part = tl.program_id(axis=1)
    if SLICES == 1:
        weights = a
    else:
        weights = tl.load(a + part).to(tl.pointer_type(x.dtype.element_ty))
    n = tl.arange(0, BLOCK_N) + block_n * BLOCK_N
    rank = tl.max_contiguous(tl.multiple_of(n % N, BLOCK_N), BLOCK_N)
    k = tl.arange(0, BLOCK_K) + split * BLOCK_K
    product = mm_k(
        x + row[:, None] * x_row + k[None, :] * x_column,
        weights + a_slot * slot + rank[None, :] * a_rank + k[:, None] * a_column,
        x_column,
        a_column,
        k,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        SPLIT_K,
        False,
        weights.dtype.element_ty,
        False,
        base_k=split * BLOCK_K,
    )
    if USE_GDC:
        tl.extra.cuda.gdc_launch_dependents()
    inside = (m[:, None] < count) & (n[None, :] < N)
    offset = tl.load(offsets + slot * offsets_slot + (first_linear + part) * offsets_linear + n, mask=n < N, other=-1)
    gates = tl.load(place).to(tl.pointer_type(tl.float32))
    stride = tl.load(place + 1)
    gate = tl.load(gates + row[:, None] * stride + offset[None, :], mask=inside & (offset >= 0)[None, :], other=1.0)
    product = product * scaling * gate
    target = out + part * out_slice + row[:, None] * out_row + n[None, :] * out_rank
    if SPLIT_K == 1:
        tl.store(target, product, mask=inside)
    else:
        tl.atomic_add(target, product, mask=inside, sem="relaxed")


@torch.inference_mode()
def gated_shrink(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    out: torch.Tensor,
    tables: GateTables,
    meta: tuple[torch.Tensor, ...],
    scaling: float,
) -> None:
    """`out[s, t] = scaling * gate * (lora_a[s] @ x[t])` for each row t with LoRA.

    `x [num_tokens, in]` in float16 or bfloat16; `lora_a`: one a slice, `[slots, 1, rank, in]`;
    `out [slices, num_tokens, rank]` float32; `meta`: `LoRAKernelMeta.meta_args`. Of these `no_lora` and `num_slots`
    alone lie on the host: vLLM captures a graph for each of their values that it tells apart.
    """
    _, tokens, counts, starts, slots, no_lora, num_slots = meta
    if x.size(0) == 0 or no_lora.item():
        return
    assert x.dtype == lora_a[0].dtype
    assert x.dtype in (torch.float16, torch.bfloat16)
    x = x.contiguous()
    out.zero_()
    num_tokens, (rank, width) = x.size(0), lora_a[0].shape[-2:]
    weights, a_slot, a_rank, a_column = utils._get_lora_a_ptr(lora_a, x.device)
    config = utils.get_lora_op_configs(
        "shrink", max_loras=slots.size(0), batch=num_tokens, hidden_size=width, rank=rank, num_slices=len(lora_a)
    )
    if utils.is_batch_invariant:
        config = config | INVARIANT
    split_k, block_k = config["split_k"], config["block_k"]
    grid = (
        split_k * triton.cdiv(num_tokens, config["block_m"]) * triton.cdiv(rank, config["block_n"]),
        len(lora_a),
        num_slots.item(),
    )
    use_gdc = utils.supports_pdl(x.device) and envs.VLLM_LORA_ENABLE_DUAL_STREAM
    gated_shrink_kernel[grid](
        x,
        weights,
        out,
        num_tokens,
        rank,
        width,
        tokens,
        counts,
        starts,
        slots,
        scaling,
        x.stride(0),
        x.stride(1),
        a_slot,
        a_rank,
        a_column,
        out.stride(0),
        out.stride(1),
        out.stride(2),
        tables.offsets,
        tables.offsets.stride(0),
        tables.offsets.stride(1),
        tables.first_linear[lora_a[0].data_ptr()],
        tables.place,
        config["block_m"],
        config["block_n"],
        block_k,
        width % (block_k * split_k) == 0,
        split_k,
        config.get("group_size_m", 8),
        len(lora_a),
        use_gdc,
        num_warps=config["num_warps"],
        num_ctas=config["num_ctas"],
        num_stages=config["num_stages"],
        launch_pdl=use_gdc,
    )
