"""The twelve cases: each is done or refused with a reason, and the page says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from xloom.protocol import XloomError
from xloom.quantization.recipes import (
    BITS,
    DEVICES,
    METHODS,
    Recipe,
    Refusal,
    as_markdown,
    case,
    cases,
    group_sizes,
    memory_bytes,
    recipe_for,
    table,
)
from xloom.vllm.engine.backend import VLLMBackend

DOC = Path(__file__).parents[3] / "docs" / "quantisation.md"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_each_case_has_a_recipe_or_a_reason(method: str, bits: int, device: str) -> None:
    found = case(method, bits, device)  # type: ignore[arg-type]
    if isinstance(found, Recipe):
        assert (method, bits) in cases(device)
        assert found.bits == bits
    else:
        assert isinstance(found, Refusal)
        assert len(found.reason) > 20
        assert (method, bits) not in cases(device)


def test_the_page_has_the_generated_table() -> None:
    assert as_markdown() in DOC.read_text(encoding="utf-8")


def test_the_table_has_all_twelve_cases() -> None:
    assert [(row["method"], row["bits"]) for row in table()] == [(m, str(b)) for m in METHODS for b in BITS]


def test_the_backend_says_what_the_table_says() -> None:
    can = VLLMBackend.capabilities().isq
    assert {device: can[device] for device in DEVICES} == {device: cases(device) for device in DEVICES}  # type: ignore[index]
    assert can["metal"] == frozenset()


def test_a_refused_case_names_where_it_works_and_what_works_here() -> None:
    with pytest.raises(XloomError) as caught:
        recipe_for("smoothquant", 4, "cuda")
    assert caught.value.code == "isq_unsupported"
    assert "works on cpu" in caught.value.cure
    assert "awq at 4" in caught.value.cure
    with pytest.raises(XloomError) as caught:
        recipe_for("smoothquant", 2, "cpu")
    assert "smoothquant at 8" in caught.value.cure


def test_two_bits_take_the_memory_of_four() -> None:
    two, four = recipe_for("awq", 2, "cpu"), recipe_for("awq", 4, "cpu")
    assert memory_bytes(two, 1 << 20, 0, 128) == memory_bytes(four, 1 << 20, 0, 128)
    assert "memory of 4 bits" in two.note


def test_memory_counts_scales_and_what_is_not_quantised() -> None:
    assert memory_bytes(None, 1000, 200, 128) == 2400
    assert memory_bytes(recipe_for("rtn", 4, "cpu"), 128_000, 100, 128) == 64_000 + 2 * 1000 + 200
    assert memory_bytes(recipe_for("rtn", 8, "cpu"), 128_000, 100, 128) == 128_000 + 200


def test_group_size_is_the_largest_divisor_the_kernels_take() -> None:
    linears = {"a.q_proj": (64, 256), "a.down_proj": (64, 640), "a.o_proj": (64, 96), "a.up_proj": (64, 1408)}
    assert group_sizes(linears, 128, "cpu") == {"q_proj": 128, "down_proj": 128, "o_proj": 96, "up_proj": 128}
    assert group_sizes(linears, 64, "cpu")["down_proj"] == 64
    assert group_sizes(linears, 100, "cpu")["q_proj"] == 64
    assert group_sizes(linears, 128, "cuda")["o_proj"] == 32


def test_group_size_suits_all_layers_and_ranks() -> None:
    assert group_sizes({"0.q_proj": (64, 256), "1.q_proj": (64, 192)}, 128, "cpu") == {"q_proj": 64}
    assert group_sizes({"0.q_proj": (64, 256)}, 256, "cpu", ranks=2) == {"q_proj": 128}


def test_a_group_size_below_the_kernels_is_refused() -> None:
    with pytest.raises(XloomError) as caught:
        group_sizes({"a.q_proj": (64, 256)}, 16, "cpu")
    assert caught.value.code == "isq_group_size"


def test_a_model_whose_shapes_the_kernels_do_not_take_is_refused() -> None:
    with pytest.raises(XloomError) as caught:
        group_sizes({"a.q_proj": (64, 72)}, 128, "cpu")
    assert caught.value.code == "isq_unsupported_model"
    assert "a.q_proj" in caught.value.message
