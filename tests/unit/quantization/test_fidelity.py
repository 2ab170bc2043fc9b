"""A quantised model against its own base: what its bits explain passes, and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from tests.models import load_model
from xloom.protocol import XloomError
from xloom.quantization.calibration import documents, encoder
from xloom.quantization.fidelity import (
    FLOOR,
    Reference,
    read_reference,
    reference,
    reference_ids,
    round_weight,
    rounded,
    token_logprobs,
    write_reference,
)
from xloom.quantization.recipes import Recipe, case
from xloom.settings import SAMPLE

GROUPS = [(128, ["Linear"])]
IGNORED = ["lm_head"]


def recipe(bits: int) -> Recipe:
    found = case("gptq" if bits != 8 else "rtn", bits, "cpu")
    assert isinstance(found, Recipe)
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(SAMPLE / "base")


@pytest.fixture(scope="module")
def ids(model: Any) -> Tensor:
    encode = encoder(AutoTokenizer.from_pretrained(SAMPLE / "base"))
    found = reference_ids(documents("sample", held_out=True), encode, 64)
    assert found is not None
    assert found.shape == (4, 64)
    return found


def served(
    model: nn.Module, ids: Tensor, bits: int, damage: Callable[[Tensor], Tensor] = lambda weight: weight
) -> Tensor:
    """The log-probabilities of a quantised model, one of whose linears is damaged."""
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    plain = weight.data
    weight.data = damage(plain.clone())
    try:
        with rounded(model, recipe(bits), GROUPS, IGNORED):
            return token_logprobs(model, ids)
    finally:
        weight.data = plain


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_passes_and_leaves_the_model_as_it_was(model: Any, ids: Tensor, bits: int) -> None:
    before = token_logprobs(model, ids)
    found = reference(model, ids, recipe(bits), GROUPS, IGNORED)
    assert torch.equal(token_logprobs(model, ids), before)
    assert found.limit >= FLOOR[bits]
    assert 0 < found.check(served(model, ids, bits), "it") < found.limit


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "damage",
    [lambda weight: 1.5 * weight, lambda weight: weight.flip(0), lambda weight: weight.roll(128, 1), torch.zeros_like],
    ids=["scale", "rows", "groups", "zeros"],
)
def test_one_damaged_linear_is_refused(model: Any, ids: Tensor, bits: int, damage: Callable[[Tensor], Tensor]) -> None:
    found = reference(model, ids, recipe(bits), GROUPS, IGNORED)
    with pytest.raises(XloomError) as caught:
        found.check(served(model, ids, bits, damage), "it")
    assert caught.value.code == "isq_not_its_base"


def test_not_a_number_is_refused() -> None:
    found = Reference(torch.zeros(4, 64), torch.zeros(4, 63), 1.0)
    with pytest.raises(XloomError):
        found.check(torch.full((4, 63), float("nan")), "it")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_rounded_weight_is_within_half_a_step(bits: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    size = 32 if recipe(bits).grouped else 64
    grouped = weight.reshape(8, -1, size)
    steps = 2**bits - 1
    if recipe(bits).symmetric:
        step = 2 * grouped.abs().amax(-1, keepdim=True) / steps
    else:
        step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / steps
    off = (round_weight(weight, recipe(bits), 32).reshape_as(grouped) - grouped).abs()
    assert (off <= 1.01 * step * (0.5 if recipe(bits).symmetric else 1)).all()  # an offset is rounded as well
    assert all(len(row.unique()) <= steps + 1 for row in round_weight(weight, recipe(bits), 32)[:, :size])


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    ids = torch.arange(256).reshape(4, 64)
    assert read_reference(tmp_path) is None
    write_reference(tmp_path, Reference(ids, torch.randn(4, 63), 0.25))
    found = read_reference(tmp_path)
    assert found is not None
    assert found.limit == 0.25
    assert torch.equal(found.ids, ids)
    (tmp_path / "xloom" / "reference.safetensors").write_bytes(b"x")
    with pytest.raises(XloomError) as caught:
        read_reference(tmp_path)
    assert caught.value.code == "model_not_loadable"


def test_texts_begin_as_the_tokeniser_begins_them() -> None:
    def encode(text: str) -> list[int]:
        return [0, *map(ord, text)]

    texts = [["a" * 100, "b" * 20], ["c" * 50, "d" * 70]]
    found = reference_ids(texts, encode, 40)
    assert found is not None
    assert [chr(row[1]) for row in found.tolist()] == ["a", "c", "d"]
    assert (found[:, 0] == 0).all()
    assert found.shape == (3, 40)
    short = reference_ids([["abc"]], encode, 40)
    assert short is not None
    assert short.shape == (1, 4)
    assert reference_ids([[]], encode, 40) is None
