"""The GPU's gate tables, read as the kernel reads them: through fixed tensors alone."""

from __future__ import annotations

import gc

import pytest
import torch

from xloom.vllm.plugin.gate_tables import UNGATED, GateTables
from xloom.vllm.plugin.gates import SlotRouting, SlotRows

from .routings import routing

NAMES = ["m.q_proj", "m.k_proj"]
SEGMENTS = [[(0, 2), (1, 3)], [(1, 3)]]  # the first adapter lacks k_proj
RANK, LINEAR = 24, 1234


def tables(max_tokens: int = 16) -> GateTables:
    return GateTables({99: ["m.o_proj"], LINEAR: NAMES}, max_tokens, max_loras=3, max_rank=RANK, device="cpu")


def rows(of: slice | torch.Tensor, bundle: SlotRouting | None, slot: int = 2) -> SlotRows:
    return SlotRows(7, slot, of, {}, bundle)


def crowd(adapters: int) -> SlotRouting:
    return SlotRouting(routing(NAMES, [[(adapter, 1) for adapter in range(adapters)]] * 2, num_adapters=adapters))


def gate_of(held: GateTables, row: int, slot: int, part: int) -> torch.Tensor:
    """`[max_rank]`: what the kernel multiplies a row's shrunk vector by."""
    offsets = held.offsets[slot, held.first_linear[LINEAR] + part].long()
    found = held.gates[row, offsets.clamp(min=0)]
    return torch.where(offsets == UNGATED, 1.0, found)


@pytest.mark.parametrize("of", [slice(2, 5), torch.tensor([0, 3, 6])], ids=["contiguous", "scattered"])
def test_each_rank_of_a_bundles_rows_has_its_adapters_gate(of: slice | torch.Tensor) -> None:
    held = tables()
    entry = rows(of, SlotRouting(routing(NAMES, SEGMENTS)))
    held.describe_slot(entry)
    gates = torch.rand(3, 2, 2)
    held.put(entry, gates)
    for number, row in enumerate(torch.arange(16)[of].tolist()):
        first, second = gates[number]
        ones = torch.ones(RANK)
        torch.testing.assert_close(gate_of(held, row, 2, 0)[:5], first[[0, 0, 1, 1, 1]])
        torch.testing.assert_close(gate_of(held, row, 2, 1)[:3], second[[1, 1, 1]])
        assert torch.equal(gate_of(held, row, 2, 0)[5:], ones[5:])
        assert torch.equal(gate_of(held, row, 0, 0), ones)  # another slot: a plain adapter's


def test_a_larger_bundle_makes_room_and_the_kernel_finds_it_through_the_same_tensors() -> None:
    held = tables()
    fixed = held.place.data_ptr(), held.offsets.data_ptr()
    small, large = rows(slice(0, 2), crowd(3), slot=0), rows(slice(2, 4), crowd(20), slot=1)
    held.describe_slot(small)
    gates = torch.rand(2, 2, 3)
    held.put(small, gates)
    held.describe_slot(large)
    held.put(large, torch.full((2, 2, 20), 0.25))
    assert (held.place.data_ptr(), held.offsets.data_ptr()) == fixed
    assert held.place.tolist() == [held.gates.data_ptr(), held.gates.stride(0)]
    torch.testing.assert_close(gate_of(held, 1, 0, 1)[:3], gates[1, 1])
    torch.testing.assert_close(gate_of(held, 3, 1, 1)[:20], torch.full((20,), 0.25))


def test_room_made_for_a_bundle_stays() -> None:
    held = tables()
    held.reserve(crowd(20))
    address = held.gates.data_ptr()
    held.describe_slot(rows(slice(0, 1), crowd(20)))
    held.reserve(crowd(3))
    assert held.gates.data_ptr() == address


def test_a_slot_is_described_anew_for_another_bundle_under_the_same_id() -> None:
    held = tables()
    held.describe_slot(rows(slice(0, 1), None))  # a dummy's, before any bundle
    held.describe_slot(rows(slice(0, 1), crowd(3)))
    assert held.offsets[2, 1, :3].tolist() == [0, 1, 2]
    held.describe_slot(rows(slice(0, 1), None))
    assert bool((held.offsets == UNGATED).all())


def test_rows_without_gates_are_not_a_number() -> None:
    held = tables()
    entry = rows(slice(0, 1), crowd(3))
    held.describe_slot(entry)
    assert bool(gate_of(held, 0, 2, 0)[:3].isnan().all())


def test_tables_can_be_written_to_whichever_mode_made_them() -> None:
    with torch.inference_mode():
        held = tables()
        held.reserve(crowd(3))
    entry = rows(slice(0, 1), crowd(3))
    held.describe_slot(entry)
    held.put(entry, torch.ones(1, 2, 3))
    assert gate_of(held, 0, 2, 0)[:3].tolist() == [1, 1, 1]


def test_a_bundle_that_was_unloaded_is_not_kept() -> None:
    held = tables()
    held.describe_slot(rows(slice(0, 1), crowd(3)))
    held.describe_slot(rows(slice(0, 1), None))
    gc.collect()
    assert len(held._offsets) == 0


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 2, 2), (2, 1, 3)])
def test_gates_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    held = tables()
    entry = rows(slice(0, 2), crowd(3))
    held.describe_slot(entry)
    with pytest.raises(ValueError, match="not \\(2, 2, 3\\)"):
        held.put(entry, torch.ones(shape))
