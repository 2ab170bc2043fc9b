# ruff: noqa: E402 - the environment and the backend come before the imports that read them
"""Run as a program: vLLM's Triton LoRA kernels with our gate between them, in Triton's interpreter on the CPU.

Prints the largest error against plain torch. A process of its own, since vLLM and Triton decide at import.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace
from typing import Any

import triton.backends

# vllm.triton_utils.importing (0.32) uses Triton on a CPU build only when Triton names a CPU backend.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.triton_utils import HAS_TRITON

from tests.unit.vllm.plugin.routings import routing
from xloom.vllm.plugin.gates import BATCH, SlotRouting, segment_index
from xloom.vllm.plugin.punica_gpu import GatedPunicaGPU

TOKENS, WIDTH, OUT, RANK, SLOTS = 24, 64, (32, 16), 16, 2
NAMES = ["m.q_proj", "m.k_proj"]
SEGMENTS = [[(0, 4), (1, 8)], [(1, 8)]]
PLAIN, BUNDLE = 11, 12  # adapter ids, in slots 0 and 1


class Manager:
    """The part of vLLM's LoRAModelManager that the wrapper reads."""

    def __init__(self, a: tuple[torch.Tensor, ...], config: Any) -> None:
        def weights(ranks: list[int | None]) -> SimpleNamespace:
            return SimpleNamespace(lora_a=[None if rank is None else torch.zeros(rank, WIDTH) for rank in ranks])

        self.modules = {"m.qkv_proj": SimpleNamespace(lora_a_stacked=a)}
        self.packed_modules = {"m.qkv_proj": NAMES}
        self.lora_index_to_id: list[int | None] = [PLAIN, BUNDLE]
        self.lora_config = config
        plain = SimpleNamespace(loras={"m.qkv_proj": weights([8, None])})
        bundle = SimpleNamespace(
            loras={"m.qkv_proj": weights([12, 8])}, xloom_routing=SlotRouting(routing(NAMES, SEGMENTS))
        )
        self._registered_adapters = SimpleNamespace(cache={PLAIN: plain, BUNDLE: bundle})


def main() -> None:
    assert HAS_TRITON
    generator = torch.Generator().manual_seed(0)
    half = torch.float16  # what the kernels take
    a = tuple((torch.randn(SLOTS, 1, RANK, WIDTH, generator=generator) / 8).to(half) for _ in OUT)
    b = tuple((torch.randn(SLOTS, 1, out, RANK, generator=generator) / 4).to(half) for out in OUT)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(half)
    y = torch.randn(TOKENS, sum(OUT), generator=generator).to(half)
    config = SimpleNamespace(max_loras=SLOTS, max_lora_rank=RANK, specialize_active_lora=False)
    wrapper = GatedPunicaGPU(TOKENS, 8, "cpu", lora_config=config)
    manager = Manager(a, config)
    wrapper.attach(manager)
    ids = np.array([PLAIN] * 5 + [0] * 6 + [BUNDLE] * 9 + [PLAIN] * 4)
    mapping = LoRAMapping(tuple(ids.tolist()), tuple(ids.tolist()), is_prefill=True)
    wrapper.update_metadata(mapping, manager.lora_index_to_id, SLOTS + 1, 100)

    def expected(gates: torch.Tensor | None) -> torch.Tensor:
        wanted = y.float()
        for slot, adapter in enumerate((PLAIN, BUNDLE)):
            rows = torch.from_numpy(np.flatnonzero(ids == adapter))
            offset = 0
            for part, out in enumerate(OUT):
                shrunk = x[rows].float() @ a[part][slot, 0].float().T
                if adapter == BUNDLE:
                    if gates is None:
                        shrunk = shrunk * 0
                    else:
                        index = segment_index(SEGMENTS[part])
                        shrunk[:, : len(index)] *= gates[:, part][:, index]
                wanted[rows, offset : offset + out] += shrunk @ b[part][slot, 0].float().T
                offset += out
        return wanted

    # Ranks beyond an adapter's own are zero in vLLM's slots.
    for part, rank in enumerate((12, 8)):
        a[part][1, 0, rank:] = 0
    errors = []
    [entry] = BATCH.xlora()
    for gates in (torch.rand(9, len(NAMES), 2, generator=generator), None):
        if gates is None:
            wrapper.leave_out(entry)
        else:
            wrapper.set_gates(entry, gates)
        out = y.clone()
        wrapper.add_lora_linear(out, x, a, b, 1.0, OUT)
        errors.append((out.float() - expected(gates)).abs().max().item())
    print("largest error", max(errors))


if __name__ == "__main__":
    main()
