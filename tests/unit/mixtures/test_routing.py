from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import tiny_bundle
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.routing.registry import load_routing
from xloom.mixtures.routing.xlora import XLoraRouting, select
from xloom.protocol import Overrides, XloomError


def routing(bundle: Path, shapes: dict[str, tuple[int, int]], mode: str | None = None) -> XLoraRouting:
    out = bundle.with_name("out")
    prepare_bundle(bundle, shapes, out, hidden_size=64, max_rank=64, overrides=Overrides(mixing_mode=mode))
    found = load_routing(out)
    assert isinstance(found, XLoraRouting)
    return found


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def test_gates_have_one_row_per_module(bundle: Path, shapes: dict[str, tuple[int, int]], hidden: torch.Tensor) -> None:
    gates = routing(bundle, shapes).gates(hidden.bfloat16())
    assert gates.shape == (5, 14, 3)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(-1), torch.ones(5, 14))
    assert not torch.equal(gates[:, 0], gates[:, 1])


def test_gates_are_the_same_for_every_module_without_layerwise_scalings(
    llama: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, hidden: torch.Tensor
) -> None:
    gates = routing(tiny_bundle(tmp_path / "bundle", llama, layerwise=False), shapes).gates(hidden)
    assert gates.shape == (5, 14, 3)
    assert torch.equal(gates[:, 0], gates[:, 13])


def test_gates_of_no_tokens_are_empty(bundle: Path, shapes: dict[str, tuple[int, int]]) -> None:
    assert routing(bundle, shapes).gates(torch.empty(0, 64)).shape == (0, 14, 3)


def test_a_tokens_gates_do_not_depend_on_its_neighbours(
    bundle: Path, shapes: dict[str, tuple[int, int]], hidden: torch.Tensor
) -> None:
    router = routing(bundle, shapes)
    torch.testing.assert_close(router.gates(hidden)[3:4], router.gates(hidden[3:4]))


def test_gated_ignores_softmax_and_keeps_top_k(
    llama: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, hidden: torch.Tensor
) -> None:
    router = routing(tiny_bundle(tmp_path / "bundle", llama, top_k=2, softmax_topk=True), shapes, mode="gated")
    gates = router.gates(hidden)
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates.amax(-1), torch.sigmoid(router.logits(hidden)).amax(-1))


def test_the_scaling_pass_is_the_base_model_by_default(bundle: Path, shapes: dict[str, tuple[int, int]]) -> None:
    assert not routing(bundle, shapes).scaling_pass_gates().any()


def test_top_k_applies_to_the_scaling_pass(llama: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    gates = routing(tiny_bundle(tmp_path / "b", llama, top_k=2, scaling_pass_value=0.3), shapes).scaling_pass_gates()
    assert gates.shape == (14, 3)
    torch.testing.assert_close(gates.sum(-1), torch.full((14,), 0.6))


def test_select_keeps_the_largest_and_renormalises_them() -> None:
    gates = torch.tensor([[0.2, 0.5, 0.3]])
    assert select(gates, 2, False).tolist() == [pytest.approx([0.0, 0.5, 0.3])]
    kept = torch.softmax(torch.tensor([0.5, 0.3]), 0).tolist()
    assert select(gates, 2, True).tolist() == [pytest.approx([0.0, *kept])]
    assert select(torch.zeros(1, 3), None, True).tolist() == [[0.0, 0.0, 0.0]]


def test_moving_to_a_device_moves_the_classifier(bundle: Path, shapes: dict[str, tuple[int, int]]) -> None:
    moved = routing(bundle, shapes).to("meta")
    assert moved.gates(torch.empty(2, 64, device="meta")).device.type == "meta"
    assert moved.scaling_pass_gates().device.type == "meta"


def test_a_folder_that_is_not_prepared_is_a_clear_error(
    bundle: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    routing(bundle, shapes)
    file = tmp_path / "out" / "xlora.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    for folder in (tmp_path / "out", bundle):
        with pytest.raises(XloomError) as raised:
            load_routing(folder)
        assert raised.value.code == "broken_bundle"
