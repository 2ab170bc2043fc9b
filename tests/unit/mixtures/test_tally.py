"""The sums of gates and of their entropy, against a plain computation token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny_bundle
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.routing.base import Routing
from xloom.mixtures.routing.registry import load_routing
from xloom.mixtures.tally import BUFFER_ROWS, EVERY_TOKEN, STRIDE, MixtureTally
from xloom.protocol import BundleFigures

CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "one gate a token": {"layerwise": False},
    "top-2": {"top_k": 2},
    "top-2 renormalised": {"top_k": 2, "softmax_topk": True},
    "top-1": {"top_k": 1},
    "no softmax": {"softmax": False},
    "concatenate": {"mixing_mode": "concatenate", "projection": True},
    "gated": {"mixing_mode": "gated"},
    "gated top-2": {"mixing_mode": "gated", "top_k": 2},
    "gated, one gate a token": {"mixing_mode": "gated", "layerwise": False},
}


def routing_of(folder: Path, llama: Path, shapes: dict[str, tuple[int, int]], **options: Any) -> Routing:
    bundle = tiny_bundle(folder / "bundle", llama, **options)
    prepare_bundle(bundle, shapes, folder / "prepared", hidden_size=64, max_rank=64)
    return load_routing(folder / "prepared")


def hidden_states(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def plainly(gates: torch.Tensor, names: tuple[str, ...]) -> BundleFigures:
    """The figures of gates `[num_tokens, M, K]`, as docs/x-lora.md has them."""
    sums = [0.0] * len(names)
    entropy = 0.0
    modules = gates.shape[1]
    for token in gates.tolist():
        for row in token:
            whole = sum(abs(gate) for gate in row)
            for number, gate in enumerate(row):
                sums[number] += abs(gate) / modules
                if gate:
                    entropy -= abs(gate) / whole * math.log(abs(gate) / whole) / modules
    return BundleFigures("blend", len(gates), dict(zip(names, sums, strict=True)), entropy)


def only(tally: MixtureTally) -> BundleFigures:
    figures, more = tally.take()
    assert not more
    assert figures is not None
    assert len(figures.bundles) == 1
    return figures.bundles[0]


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_each_tokens_gates(
    case: str, tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    routing = routing_of(tmp_path, llama, shapes, **CASES[case])
    gates = routing.gates(hidden_states(EVERY_TOKEN))
    tally = MixtureTally("cpu")
    with torch.inference_mode():  # as engines run; figures are taken outside of it
        for part in gates.split([50, 1, EVERY_TOKEN - 51]):
            tally.add("blend@1", routing, part)
    found, expected = only(tally), plainly(gates, routing.adapter_names)
    assert (found.name, found.tokens) == ("blend", EVERY_TOKEN)
    assert found.gates == pytest.approx(expected.gates, rel=1e-4)
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-4, abs=1e-4)
    assert 0 <= found.entropy <= found.tokens * math.log(routing.num_adapters) * (1 + 1e-6)


def test_gates_by_softmax_add_up_to_the_tokens(tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]) -> None:
    routing = routing_of(tmp_path, llama, shapes)
    tally = MixtureTally("cpu")
    for seed in range(7):
        tally.add("blend@1", routing, routing.gates(hidden_states(333, seed)))
    found = only(tally)
    assert found.tokens == 7 * 333
    assert sum(found.gates.values()) == pytest.approx(found.tokens, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5, 10, 64, 300, 2 * STRIDE * BUFFER_ROWS])
def test_of_many_tokens_each_place_in_a_batch_is_met_equally_often(
    batch: int, tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    routing = routing_of(tmp_path, llama, shapes)
    # The first request of each batch has one mixture, the others another.
    gates = torch.tensor([0.2, 0.3, 0.5]).expand(batch, 14, 3).clone()
    gates[0] = torch.tensor([1.0, 0.0, 0.0])
    steps = max(20, 20_000 // batch)
    tally = MixtureTally("cpu")
    for _ in range(steps):
        tally.add("blend@1", routing, gates)
    found, expected = only(tally), plainly(gates, routing.adapter_names)
    assert found.tokens == steps * batch
    for name, total in expected.gates.items():
        assert found.gates[name] / found.tokens == pytest.approx(total / batch, abs=0.01)
    assert found.entropy / found.tokens == pytest.approx(expected.entropy / batch, abs=0.01)


def test_bundles_are_apart_and_what_was_taken_is_gone(
    tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    routing = routing_of(tmp_path, llama, shapes)
    tally = MixtureTally("cpu")
    assert tally.take() == (None, False)
    for number, name in enumerate(("blend@1", "other@1", "blend@2")):
        tally.add(name, routing, routing.gates(hidden_states(10 * (number + 1))))
    figures, _ = tally.take()
    assert figures is not None
    assert [(bundle.name, bundle.tokens) for bundle in figures.bundles] == [("blend", 10), ("other", 20), ("blend", 30)]
    assert tally.take() == (None, False)


def test_gates_that_are_not_numbers_are_left_out(
    tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    routing = routing_of(tmp_path, llama, shapes)
    tally = MixtureTally("cpu")
    tally.add("broken@1", routing, routing.gates(hidden_states(3) * float("nan")))
    tally.add("blend@1", routing, routing.gates(hidden_states(3)))
    assert only(tally).name == "blend"


def test_steps_are_timed_by_their_parts(tmp_path: Path) -> None:
    tally = MixtureTally("cpu")
    tally.start()  # a step that fails on its way
    tally.lap()
    for _ in range(3):
        tally.start()
        for _ in range(3):
            tally.lap()
    figures, _ = tally.take()
    assert figures is not None
    assert (figures.steps, figures.bundles) == (3, [])
    assert 0 < figures.scaling_seconds + figures.routing_seconds < figures.seconds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_the_sums_are_the_same(
    tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    routing = routing_of(tmp_path, llama, shapes)
    gates = routing.gates(hidden_states(4 * STRIDE * BUFFER_ROWS))
    on_host, on_device = MixtureTally("cpu"), MixtureTally("cuda")
    parts = [(part, part.cuda()) for part in gates.split(300)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for host, device in parts:
            on_device.start()
            on_host.add("blend@1", routing, host)
            on_device.add("blend@1", routing, device)
            for _ in range(3):
                on_device.lap()
        taken, more = on_device.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    if taken is None:
        assert more
        taken, more = on_device.take()
    assert taken is not None
    expected = only(on_host)
    assert taken.bundles[0].gates == pytest.approx(expected.gates, rel=1e-4)
    assert taken.bundles[0].entropy == pytest.approx(expected.entropy, rel=1e-4)


def test_constants_may_come_as_a_view_or_in_full(
    tmp_path: Path, llama: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    routing = routing_of(tmp_path, llama, shapes)
    tally = MixtureTally("cpu")
    constants = torch.tensor([0.5, 0.25, 0.25]).expand(3, len(routing.modules), -1)
    for gates in (constants, constants.contiguous(), constants):
        tally.add("blend", routing, gates)
    assert only(tally).gates == pytest.approx(plainly(torch.cat([constants] * 3), routing.adapter_names).gates)
