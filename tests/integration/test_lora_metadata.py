"""What the LoRA kernels are told of a batch: made on the host, it is what vLLM makes on the GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from xloom.vllm.plugin.lora_metadata import prepare_indices, prepare_kernels, slots_of

SLOTS, MOST, VOCABULARY = 4, 64, 1000
IN_SLOTS = [7, None, 12, 3]  # adapter ids
INDICES = ("_token_lora_indices", "_sampler_indices", "_sampler_indices_padded", "_embeddings_indices")


class Wrapper(SimpleNamespace):
    """The tensors of a punica wrapper that hold a batch's indices."""

    def __init__(self) -> None:
        filled = {name: torch.zeros(MOST, dtype=torch.long) for name in INDICES}
        super().__init__(device=torch.device("cpu"), indices_len=[None] * 4, **filled)


def batches() -> list[tuple[int, ...]]:
    """Adapter ids of rows: random ones, none, all of one, and the base model alone."""
    draw = np.random.default_rng(0)
    given = [0, *(each for each in IN_SLOTS if each)]
    found = [tuple(draw.choice(given, size=draw.integers(1, MOST)).tolist()) for _ in range(40)]
    return [*found, (), (0,) * 9, (12,) * 5, (0, 3)]


@pytest.mark.parametrize("captured", [None, [0, 1, 2, 4, 5]])
def test_it_is_what_vllm_makes(captured: list[int] | None) -> None:
    made: list[Any] = [LoRAKernelMeta.make(SLOTS, MOST, "cpu", captured) for _ in range(2)]
    for each in made:
        for tensor in (each.token_lora_mapping, each.token_indices_sorted_by_lora_ids):
            tensor.zero_()
    ours, theirs = made
    for rows in batches():
        slots = slots_of(np.array(rows, dtype=np.int64), IN_SLOTS)
        prepare_kernels(ours, slots)
        theirs.prepare_tensors(torch.from_numpy(slots))
        for name in vars(theirs):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, (name, rows)


def test_the_indices_are_what_vllm_makes() -> None:
    ours, theirs = Wrapper(), Wrapper()
    for rows in filter(None, batches()):
        samples = rows[::3]
        as_slots = [slots_of(np.array(each, dtype=np.int64), IN_SLOTS) for each in (rows, samples)]
        prepare_indices(ours, *as_slots, SLOTS + 1, VOCABULARY)
        mapping = LoRAMapping(rows, samples, is_prefill=True)
        PunicaWrapperBase._update_base_metadata(theirs, mapping, IN_SLOTS, SLOTS + 1, VOCABULARY)  # type: ignore[arg-type]
        assert ours.indices_len == theirs.indices_len
        for name, length in zip(INDICES, ours.indices_len, strict=True):
            assert torch.equal(getattr(ours, name)[:length], getattr(theirs, name)[:length]), (name, rows)


def test_an_adapter_without_a_slot_is_not_taken_for_the_base_model() -> None:
    with pytest.raises(KeyError, match="8"):
        slots_of(np.array([0, 8, 7]), IN_SLOTS)
