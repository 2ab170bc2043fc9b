"""What of a model's parameters its checkpoint did not write, by the pattern that is left in them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from xloom.vllm.plugin.weight_ledger import Taken, unwritten, watch

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class Method:
    """A `QuantizeMethodBase`: of a linear, whose parameters are memory as it was."""


class Linear(nn.Module):
    def __init__(self, rows: list[int], columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.quant_method = Method()
        self.output_partition_sizes = rows
        self.weight = nn.Parameter(torch.empty(sum(rows), columns, dtype=dtype), requires_grad=False)


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv_proj = Linear([4, 2, 2], 6, dtype)
        self.norm = nn.Parameter(torch.ones(6, dtype=dtype), requires_grad=False)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dtype) for _ in range(2))


def fill(model: nn.Module, value: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(value)


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.int64, torch.uint8]
)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


def test_a_filled_model_is_whole(model: Model) -> None:
    watched = watch(model, quantised=False)
    assert len(watched) == 4
    fill(model)
    assert unwritten(watched, set(), PACKED) == []


def test_a_part_of_a_fused_linear_is_named(model: Model) -> None:
    watched = watch(model, quantised=False)
    saved = model.layers[1].qkv_proj.weight.data[4:6].clone()  # type: ignore[union-attr, index]
    fill(model)
    model.layers[1].qkv_proj.weight.data[4:6] = saved  # type: ignore[union-attr, index]
    assert unwritten(watched, None, PACKED) == ["layers.1.k_proj.weight"]
    assert unwritten(watched, None, {}) == ["layers.1.qkv_proj.weight"]


def test_all_of_it_is_named(model: Model) -> None:
    watched = watch(model, quantised=False)
    for parameter in (model.layers[0].norm, model.layers[1].norm):
        parameter.data.fill_(1)  # type: ignore[union-attr]
    names = [f"layers.{number}.{part}_proj.weight" for number in (0, 1) for part in "qkv"]
    assert unwritten(watched, None, PACKED) == names


def test_columns_are_seen_where_parts_lie_beside_each_other(model: Model) -> None:
    watched = watch(model, quantised=False)
    saved = model.layers[0].qkv_proj.weight.data[:, 2:4].clone()  # type: ignore[union-attr, index]
    fill(model)
    model.layers[0].qkv_proj.weight.data[:, 2:4] = saved  # type: ignore[union-attr, index]
    assert unwritten(watched, None, PACKED) == ["layers.0.qkv_proj.weight"]


def test_a_norm_that_others_have_is_missed_and_a_constant_is_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(torch.float32)
    watched = watch(model, quantised=False)
    norms = [layer.norm for layer in model.layers]
    saved = norms[1].data.clone()  # type: ignore[operator]
    fill(model)
    norms[1].data.copy_(saved)  # type: ignore[operator]
    assert unwritten(watched, None, PACKED) == ["layers.1.norm"]
    norms[0].data.copy_(saved)  # type: ignore[operator]
    assert unwritten(watched, {"layers.0.qkv_proj.weight"}, PACKED) == ["layers.0.norm", "layers.1.norm"]
    with caplog.at_level(logging.WARNING):
        assert unwritten(watched, None, PACKED) == []  # a model that does not say what it has loaded
    assert all(bool((norm == 1).all()) for norm in norms)
    assert "layers.0.norm" in caplog.text


def test_what_nobody_reads_is_left_out() -> None:
    weights = {f"{name}.weight": torch.full((4,), float(number)) for number, name in enumerate("abcd")}
    weights |= {"lm_head.weight": torch.ones(4), "layers.0.rotary_emb.inv_freq": torch.ones(4)}
    into = torch.empty(8)
    taken = Taken()
    with taken:
        for name, tensor in taken.handed(weights.items()):
            if name == "a.weight":
                into[:4].copy_(tensor)
            if name == "c.weight":
                into[4:6] = tensor.narrow(0, 0, 2)
    assert taken.left_out(tied=True) == ["b.weight", "d.weight"]
    assert taken.left_out(tied=False) == ["b.weight", "d.weight", "lm_head.weight"]


def test_tensors_at_one_address_are_told_apart() -> None:
    storage = torch.zeros(4)
    weights: list[tuple[str, Any]] = [("first", storage.view(4)), ("second", storage.view(4))]
    taken = Taken()
    with taken:
        for name, tensor in taken.handed(weights):
            if name == "second":
                tensor.clone()
    assert taken.left_out(tied=False) == ["first"]
