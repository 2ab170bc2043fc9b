"""Gates made of a linear's own input on a GPU: R x, and softmax or sigmoid of its largest, into the table of gates.

It runs before the shrink, which reads them there as it reads all gates. A slot without such a mixture has no program's
work; what each slot has lies in tensors of fixed address, so that captured graphs see it.
"""

from __future__ import annotations

import torch

# Relied on: `LoRAKernelMeta.meta_args`; vLLM 0.32.
from vllm.triton_utils import tl, triton

from xloom.mixtures.weights import MOST_ADAPTERS
from xloom.vllm.plugin.gate_tables import ABSOLUTE, SIGMOID, GateTables

BLOCK_M, BLOCK_K = 16, 128


@triton.jit(do_not_specialize=["first_linear"])  # type: ignore[untyped-decorator]
def input_gates_kernel(
    x: tl.tensor,  # [num_tokens, K]
    K: tl.tensor,
    tokens: tl.tensor,  # the batch's rows, sorted by slot
    counts: tl.tensor,  # of rows a slot
    starts: tl.tensor,  # of each slot in `tokens`
    slots: tl.tensor,  # in the batch; -1: no LoRA
    x_row: tl.tensor,
    x_column: tl.tensor,
    routers: tl.tensor,
    routers_slot: tl.tensor,
    routers_linear: tl.tensor,
    temperatures: tl.tensor,
    first_linear: tl.tensor,
    place: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SIGMOID: tl.constexpr,
) -> None:
    slot_number = tl.program_id(axis=2)
    slot = tl.load(slots + slot_number)
    if slot == -1:
        return
    entry = routers + slot * routers_slot + (first_linear + tl.program_id(axis=1)) * routers_linear
    address = tl.load(entry)
    if address == 0:
        return
    first_m = tl.program_id(axis=0) * BLOCK_M
    count = tl.load(counts + slot_number) - first_m
    if count <= 0:
        return
    count = min(BLOCK_M, count)
    m = tl.arange(0, BLOCK_M)
    row = tl.load(tokens + tl.load(starts + slot_number) + first_m + m % count).to(tl.int64)
    adapter = tl.arange(0, ADAPTERS)
    held = adapter < tl.load(entry + 3)
    weights = address.to(tl.pointer_type(tl.float32))
    logits = tl.zeros([BLOCK_M, ADAPTERS], dtype=tl.float32)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + row[:, None] * x_row + k[None, :] * x_column, mask=(k < K)[None, :], other=0.0)
        mask = (k < K)[:, None] & held[None, :]
        part = tl.load(weights + adapter[None, :] * K + k[:, None], mask=mask, other=0.0)
        logits += tl.dot(inputs.to(tl.float32), part)
    kind = tl.load(entry + 5)
    logits = tl.where((kind & ABSOLUTE) != 0, tl.abs(logits), logits)
    biases = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    logits += tl.load(biases + adapter, mask=held, other=float("-inf"))[None, :]
    kept = tl.zeros([BLOCK_M, ADAPTERS], dtype=tl.int32)
    rest = logits
    for _ in range(tl.load(entry + 4)):
        largest = adapter[None, :] == tl.argmax(rest, axis=1)[:, None]
        kept = tl.where(largest, 1, kept)
        rest = tl.where(largest, float("-inf"), rest)
    logits = tl.where(kept == 1, logits, float("-inf")) / tl.load(temperatures + slot)
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    gates = tl.where((kind & SIGMOID) != 0, 1 / (1 + tl.exp(-logits)), powers / tl.sum(powers, axis=1)[:, None])
    table = tl.load(place).to(tl.pointer_type(tl.float32)) + tl.load(entry + 2)
    target = table + row[:, None] * tl.load(place + 1) + adapter[None, :]
    tl.store(target, gates, mask=(m < count)[:, None] & held[None, :])


@torch.inference_mode()
def input_gates(
    x: torch.Tensor, lora_a: list[torch.Tensor], tables: GateTables, meta: tuple[torch.Tensor, ...]
) -> None:
    """Write the gates of each row t whose slot's mixture makes them of `x [num_tokens, in]`; as for `gated_shrink`."""
    _, tokens, counts, starts, slots, no_lora, num_slots = meta
    if x.size(0) == 0 or no_lora.item():
        return
    x = x.contiguous()
    input_gates_kernel[(triton.cdiv(x.size(0), BLOCK_M), len(lora_a), num_slots.item())](
        x,
        x.size(1),
        tokens,
        counts,
        starts,
        slots,
        x.stride(0),
        x.stride(1),
        tables.routers,
        tables.routers.stride(0),
        tables.routers.stride(1),
        tables.temperatures,
        tables.first_linear[lora_a[0].data_ptr()],
        tables.place,
        BLOCK_M,
        BLOCK_K,
        MOST_ADAPTERS,
        ABSOLUTE,
        SIGMOID,
        num_warps=4,
        num_stages=2,
    )
