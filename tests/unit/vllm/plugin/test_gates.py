"""The gated LoRA kernels against the formula, on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from xloom.vllm.plugin.gates import BATCH, SlotRouting, SlotRows, segment_index
from xloom.vllm.plugin.punica_cpu import lora_linear

from .routings import routing

TOKENS, WIDTH, OUT = 7, 16, (12, 8)
NAMES = ["m.q_proj", "m.k_proj"]
SEGMENTS = [[(0, 2), (1, 3)], [(1, 3)]]  # the first adapter lacks k_proj
RANK = 8


def weights() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """x, stacked A and B of three slots and two slices, and y."""
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(3, 1, RANK, WIDTH, generator=generator) for _ in OUT]
    b = [torch.randn(3, 1, out, RANK, generator=generator) for out in OUT]
    return torch.randn(TOKENS, WIDTH, generator=generator), a, b, torch.randn(TOKENS, sum(OUT), generator=generator)


def bundle_rows(rows: slice | torch.Tensor) -> SlotRows:
    return SlotRows(7, 2, rows, {"m.q_proj": 5, "m.k_proj": 3}, SlotRouting(routing(NAMES, SEGMENTS)))


def expected_delta(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rank: int, gate: torch.Tensor) -> torch.Tensor:
    return ((x @ a[0, :rank].T) * gate) @ b[0, :, :rank].T


@pytest.mark.parametrize("rows", [slice(2, 6), torch.tensor([0, 3, 6])], ids=["contiguous", "scattered"])
def test_gates_multiply_between_shrink_and_expand_of_the_right_rows(rows: slice | torch.Tensor) -> None:
    x, a, b, y = weights()
    entry = bundle_rows(rows)
    count = len(torch.arange(TOKENS)[rows])
    gates = torch.rand(count, len(NAMES), 2)
    entry.set_gates(gates)
    plain = SlotRows(5, 0, slice(1, 2), {"m.q_proj": 4}, None)
    BATCH.rows, BATCH.linears = [entry, plain], {a[0].data_ptr(): NAMES}
    expected = y.clone()
    expected[rows, :12] += expected_delta(x[rows], a[0][2], b[0][2], 5, gates[:, 0][:, segment_index(SEGMENTS[0])])
    expected[rows, 12:] += expected_delta(x[rows], a[1][2], b[1][2], 3, gates[:, 1][:, segment_index(SEGMENTS[1])])
    expected[1:2, :12] += expected_delta(x[1:2], a[0][0], b[0][0], 4, torch.ones(1))

    lora_linear(y, x, a, b)

    torch.testing.assert_close(y, expected)


def test_a_bundle_without_gates_is_never_served_as_the_sum_of_its_adapters() -> None:
    x, a, b, y = weights()
    BATCH.rows, BATCH.linears = [bundle_rows(slice(0, TOKENS))], {a[0].data_ptr(): NAMES}
    with pytest.raises(RuntimeError, match="no gates"):
        lora_linear(y, x, a, b)


def test_widened_and_narrow_gates_are_the_same() -> None:
    segments = [[(0, 2), (1, 3)], [(0, 2), (1, 3)]]
    gates = torch.rand(4, 2, 2)
    wide = SlotRows(7, 0, slice(0, 4), {}, SlotRouting(routing(NAMES, segments)))
    wide.set_gates(gates)
    narrow = SlotRows(7, 0, slice(0, 4), {}, SlotRouting(routing(NAMES, segments)))
    assert narrow.routing is not None
    narrow.routing.alike = False
    narrow.set_gates(gates)
    assert (wide.widened, narrow.widened) == (True, False)
    for name in NAMES:
        left, right = wide.gate_of(name), narrow.gate_of(name)
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)
