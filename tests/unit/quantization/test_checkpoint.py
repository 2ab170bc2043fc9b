"""Compressed-tensors weights read in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from xloom.quantization.checkpoint import dequantise, round_tokens, rounds_activations, stored_bytes, unpack


def pack(values: Tensor) -> Tensor:
    """Eight 4-bit integers a word, lowest first, as compressed-tensors packs them."""
    rows, columns = values.shape
    words = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for place in range(8):
        words |= (values[:, place::8].long() + 8) << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def test_unpacking_reverses_packing() -> None:
    values = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(values), (6, 64)), values.int())


@pytest.mark.parametrize("symmetric", [True, False])
def test_grouped_weights_are_the_integers_less_zero_times_scale(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 8, (16, 64), generator=generator)
    scale = torch.rand(16, 2, generator=generator) + 0.1
    zero = torch.zeros(16, 2) if symmetric else torch.randint(-8, 8, (16, 2), generator=generator)
    tensors = {
        "m.weight_packed": pack(values),
        "m.weight_scale": scale,
        "m.weight_shape": torch.tensor([16, 64]),
        "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    }
    if not symmetric:
        tensors["m.weight_zero_point"] = pack(zero.t()).t().contiguous()
    state = dequantise(tensors)
    expected = (values - zero.repeat_interleave(32, dim=1)) * scale.repeat_interleave(32, dim=1)
    torch.testing.assert_close(state["m.weight"], expected)
    assert set(state) == {"m.weight", "norm.weight"}
    assert state["norm.weight"].dtype == torch.float32


def test_int8_weights_have_a_scale_a_row() -> None:
    values = torch.randint(-128, 128, (4, 32), dtype=torch.int8)
    scale = torch.rand(4, 1)
    state = dequantise({"m.weight": values, "m.weight_scale": scale})
    torch.testing.assert_close(state["m.weight"], values.float() * scale)


def test_sizes_tell_the_linears_from_the_rest(tmp_path: Path) -> None:
    tensors = {
        "m.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
        "m.weight_scale": torch.zeros(4, 1, dtype=torch.bfloat16),
        "embed.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "xloom").mkdir()
    save_file({"m.input": torch.zeros(9)}, tmp_path / "xloom" / "folding.safetensors")
    assert stored_bytes(tmp_path, {"m": (4, 64)}) == (4 * 8 * 4 + 8, 4 * 8 * 4 + 8 + 80)


def test_tokens_are_rounded_to_127_steps_of_their_largest_value() -> None:
    x = torch.randn(3, 16)
    rounded = round_tokens(x)
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    assert torch.all((rounded - x).abs() <= scale / 2 + 1e-6)
    torch.testing.assert_close(rounded / scale, (rounded / scale).round())


def test_the_scheme_says_whether_activations_are_rounded(tmp_path: Path) -> None:
    config = '{"quantization_config": {"config_groups": {"g": {"input_activations": %s}}}}'
    for activations, expected in (("null", False), ('{"num_bits": 8}', True)):
        (tmp_path / "config.json").write_text(config % activations)
        assert rounds_activations(tmp_path) is expected
