"""The gated LoRA kernels against the formula, on CPU tensors."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from xloom.mixtures.routing.arrow import ArrowRouting
from xloom.mixtures.routing.inputs import with_absent
from xloom.vllm.plugin import gates as module
from xloom.vllm.plugin.gates import BATCH, Gater, SlotRouting, SlotRows, segment_index
from xloom.vllm.plugin.patches import check_kernels
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


PLACES = [slice(2, 6), torch.tensor([0, 3, 6]), slice(4, 5)]


@pytest.mark.parametrize("rows", PLACES, ids=["contiguous", "scattered", "single"])
def test_gates_multiply_between_shrink_and_expand_of_the_right_rows(rows: slice | torch.Tensor) -> None:
    x, a, b, y = weights()
    entry = bundle_rows(rows)
    count = len(torch.arange(TOKENS)[rows])
    gates = torch.rand(count, len(NAMES), 2)
    plain = SlotRows(5, 0, slice(1, 2), {"m.q_proj": 4}, None)
    BATCH.rows, BATCH.linears = [entry, plain], {a[0].data_ptr(): NAMES}
    entry.set_gates(gates)
    expected = y.clone()
    expected[rows, :12] += expected_delta(x[rows], a[0][2], b[0][2], 5, gates[:, 0][:, segment_index(SEGMENTS[0])])
    expected[rows, 12:] += expected_delta(x[rows], a[1][2], b[1][2], 3, gates[:, 1][:, segment_index(SEGMENTS[1])])
    expected[1:2, :12] += expected_delta(x[1:2], a[0][0], b[0][0], 4, torch.ones(1))

    lora_linear(y, x, a, b)

    torch.testing.assert_close(y, expected)


def of_inputs() -> ArrowRouting:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(2, WIDTH, generator=generator) for _ in NAMES]
    segments = tuple(tuple(segment) for segment in SEGMENTS)
    biases = [with_absent(torch.zeros(2), segment) for segment in segments]
    return ArrowRouting(
        num_adapters=2,
        adapter_names=("one", "two"),
        modules=tuple(NAMES),
        segments=segments,
        activation="softmax",
        top_k=None,
        temperature=0.7,
        routers=tuple(zip(drawn, biases, strict=True)),
    )


@pytest.mark.parametrize("rows", PLACES, ids=["contiguous", "scattered", "single"])
def test_gates_made_of_the_input_multiply_between_shrink_and_expand(rows: slice | torch.Tensor) -> None:
    x, a, b, y = weights()
    mixture = of_inputs()
    entry = SlotRows(7, 2, rows, {"m.q_proj": 5, "m.k_proj": 3}, SlotRouting(mixture))
    BATCH.rows, BATCH.linears = [entry], {a[0].data_ptr(): NAMES}
    expected = y.clone()
    for number, (place, rank) in enumerate(((slice(0, 12), 5), (slice(12, 20), 3))):
        gates = mixture.gates(number, x[rows])[:, segment_index(SEGMENTS[number])]
        expected[rows, place] += expected_delta(x[rows], a[number][2], b[number][2], rank, gates)

    lora_linear(y, x, a, b)

    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("makes_gates", [True, False])
def test_a_gpu_without_the_kernel_for_gates_of_inputs_refuses_such_a_mixture(makes_gates: bool) -> None:
    gater = cast("Gater", SimpleNamespace(makes_gates=makes_gates))
    check_kernels(routing(NAMES, SEGMENTS), gater)
    with nullcontext() if makes_gates else pytest.raises(RuntimeError, match=r"engine\.input_gates: true"):
        check_kernels(of_inputs(), gater)


@pytest.mark.parametrize("rows", PLACES, ids=["contiguous", "scattered", "single"])
def test_a_bundle_without_gates_is_never_served_as_the_sum_of_its_adapters(rows: slice | torch.Tensor) -> None:
    x, a, b, y = weights()
    entry = bundle_rows(rows)
    BATCH.rows, BATCH.linears = [entry], {a[0].data_ptr(): NAMES}
    with pytest.raises(RuntimeError, match="no gates"):
        lora_linear(y, x, a, b)
    entry.set_gates(torch.rand(len(torch.arange(TOKENS)[rows]), len(NAMES), 2))
    lora_linear(y, x, a, b)
    entry.gates = None  # as each step leaves it
    with pytest.raises(RuntimeError, match="no gates"):
        lora_linear(y, x, a, b)


def test_widened_and_narrow_gates_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    BATCH.linears = {1: [NAMES[1], "m.v_proj"], 2: [NAMES[0]], 3: ["m.o_proj"]}
    gates = torch.rand(4, 2, 2)
    wide = SlotRows(7, 0, slice(0, 4), {}, SlotRouting(routing(NAMES, SEGMENTS)))
    wide.set_gates(gates)
    row = SlotRows(7, 0, slice(2, 3), {}, SlotRouting(routing(NAMES, SEGMENTS)))
    row.set_gates(gates[2:3])
    monkeypatch.setattr(module, "WIDENED_GATE_BYTES", 0)
    narrow_row = SlotRows(7, 0, slice(2, 3), {}, SlotRouting(routing(NAMES, SEGMENTS)))
    narrow_row.set_gates(gates[2:3])
    narrow = SlotRows(7, 0, slice(0, 4), {}, SlotRouting(routing(NAMES, SEGMENTS)))
    narrow.set_gates(gates)
    assert (wide.widened, narrow.widened) == (True, False)
    for linear, expected in {1: gates[:, 1, [1, 1, 1]], 2: gates[:, 0, [0, 0, 1, 1, 1]], 3: gates[:, 0, :0]}.items():
        for entry in (wide, narrow):
            found = entry.gate_of(linear)
            assert found is not None
            assert torch.equal(found, expected)
        for entry in (row, narrow_row):
            found = entry.single_gate_of(linear)
            assert found is not None
            assert torch.equal(found, expected[2])


@pytest.mark.parametrize("rows", [TOKENS, 1])
def test_gates_for_other_ranks_than_the_weights_are_refused(rows: int) -> None:
    x, a, b, y = weights()
    entry = SlotRows(7, 2, slice(0, rows), {"m.q_proj": 5, "m.v_proj": 3}, SlotRouting(routing(NAMES, SEGMENTS)))
    BATCH.rows, BATCH.linears = [entry], {a[0].data_ptr(): ["m.q_proj", "m.v_proj"]}
    entry.set_gates(torch.rand(rows, len(NAMES), 2))
    with pytest.raises(RuntimeError, match="ranks"):
        lora_linear(y, x, a, b)
