"""Where a GPU's memory goes: the formula, the page's tables and the command say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xloom.commands.memory_plan import memory_size, plan_for, weight_bytes
from xloom.engines.sizing import BEGIN, CARDS, END, GIB, LORA_RANKS, MODELS, Shape, needed, padded, plan, written
from xloom.protocol import XloomError
from xloom.settings import IsqSettings, parse_settings

PAGE = Path(__file__).parents[3] / "docs" / "sizing.md"
CONFIG: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_the_page_has_the_tables_of_the_code() -> None:
    """After a change: python -m xloom.engines.sizing docs/sizing.md."""
    text = PAGE.read_text(encoding="utf-8")
    assert text == written(text)
    assert text.index(BEGIN) + 500 < text.index(END)
    assert ", ".join(map(str, LORA_RANKS)) in text


def test_ranks_are_those_that_vllm_has_kernels_for() -> None:
    arguments = pytest.importorskip("vllm.config.lora")
    assert arguments.MaxLoRARanks.__args__ == LORA_RANKS
    assert [padded(rank) for rank in (1, 2, 64, 65, 480, 513)] == [1, 8, 64, 128, 512, None]


def test_sizes_are_those_of_the_models_cards() -> None:
    seven, seventy = MODELS["7B"], MODELS["70B"]
    assert Shape.of(CONFIG.get) == seven
    assert round(seven.weights() / 1e9, 2) == 7.25
    assert round(seventy.weights() / 1e9, 1) == 70.6
    assert seven.rank_numbers() == 2_621_440
    assert seven.token() == 128 * 1024


def test_devices_share_weights_and_pages_and_half_of_each_slot() -> None:
    shape = MODELS["70B"]
    one, four = (plan(shape, 80 * GIB, slots=8, rank=64, devices=count) for count in (1, 4))
    assert four.weights * 4 == one.weights
    assert four.token * 4 == one.token
    assert one.slots / 4 < four.slots < one.slots
    assert one.pages == 0  # 131 GiB of weights
    # Each factor of a linear: one whole, one split.
    linears = 80 * sum(a + b for a, b, _ in shape.linears())
    assert 4 * shape.rank_numbers(4) - linears == 3 * 80 * (5 * 8192 + 2 * 8192)


def test_a_mixtures_request_takes_two_rows() -> None:
    found = plan(MODELS["7B"], CARDS["L4 24 GB"] * GIB, slots=4, rank=64)
    assert needed(8192, 16, mixture=True) == 2 * 512 + 1
    assert found.requests(8192, mixture=False) // 2 == found.requests(8192, mixture=True) == 1


def test_quantised_linears_take_four_bits_and_their_scales() -> None:
    shape = MODELS["7B"]
    assert weight_bytes(shape, None) == 2
    assert 0.5 < weight_bytes(shape, IsqSettings()) < 0.6
    assert weight_bytes(shape, IsqSettings(bits=2)) == weight_bytes(shape, IsqSettings())  # in a container of four
    assert 1 < weight_bytes(shape, IsqSettings(bits=8)) < 1.1


@pytest.mark.parametrize(("field", "value"), [("num_experts", 8), ("intermediate_size", None)])
def test_a_model_of_another_form_is_not_guessed_at(field: str, value: object) -> None:
    with pytest.raises(XloomError) as caught:
        Shape.of((CONFIG | {field: value}).get)
    assert caught.value.code == "unknown_shape"


def test_sizes_are_read_as_people_write_them() -> None:
    assert memory_size("24GiB") == memory_size("24") == 24 * GIB
    assert memory_size("24 gb") == 24_000_000_000
    for wrong in ("", "0", "much", "-1GiB"):
        with pytest.raises(ValueError):
            memory_size(wrong)


def doctor(tmp_path: Path, *arguments: str, **engine: Any) -> subprocess.CompletedProcess[str]:
    """The command, on the 7B's configuration alone."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = {"model": {"source": str(tmp_path)}, "engine": {"max_model_len": 8192, "dtype": "bfloat16", **engine}}
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(given))
    command = [sys.executable, "-m", "xloom.cli", "doctor", str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_doctor_says_whether_a_gpu_of_a_size_serves_the_settings(tmp_path: Path) -> None:
    fits = doctor(tmp_path, "--gpu-memory", "22.5GiB", "--json", max_adapters=4, max_lora_rank=64, enable_xlora=True)
    assert fits.returncode == 0, fits.stderr
    data = json.loads(fits.stdout)
    settings = parse_settings(json.loads((tmp_path / "settings.yaml").read_text()), with_keys=False)
    found, rank = plan_for(settings, int(22.5 * GIB))
    assert (data["weights"], data["slots"], data["pages"], rank) == (found.weights, found.slots, found.pages, 64)
    assert data["requests"] == {"plain": 3, "mixture": 1}
    small = doctor(tmp_path, "--gpu-memory", "16GiB", max_adapters=4, max_lora_rank=64)
    assert small.returncode == 1
    assert "A request of 8,192 tokens needs 513 pages." in " ".join(small.stdout.split())
