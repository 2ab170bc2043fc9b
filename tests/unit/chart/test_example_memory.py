"""The example for Mistral 7B fits the GPU it names, by the model's real shapes; docs/gpu.md has the same sums."""

from __future__ import annotations

from typing import Any

from tests.unit.chart.rendering import CHART, example
from xloom.engines.kv_size import pair_pages, token_bytes
from xloom.settings import Settings, parse_settings

GIB = 1024**3
# mistralai/Mistral-7B-Instruct-v0.3's config.json.
MISTRAL: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
}  # fmt: skip
HIDDEN, MLP, KV = MISTRAL["hidden_size"], MISTRAL["intermediate_size"], 8 * 128
# (in, out) of a layer's linears: q, k, v, o, gate, up, down.
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
CARD = 22.5 * GIB  # what cards of 24 GB, an L4 or an A10G, show to a program
STEP = 2 * GIB  # left free for a step's activations, CUDA graphs and the CUDA context
PAGE = (CHART.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_weights_slots_a_step_and_a_pair_of_the_full_length_fit_24_gb() -> None:
    file = CHART / "examples" / "values-mistral-7b-xlora.yaml"
    settings: Settings = parse_settings(example(file)["settings"], with_keys=False)
    assert "one GPU of 24 GB a replica" in file.read_text(encoding="utf-8").splitlines()[0]
    engine, layers = settings.engine, MISTRAL["num_hidden_layers"]
    assert engine.max_lora_rank != "auto"
    weights = 2 * (layers * sum(a * b for a, b in LINEARS) + 2 * MISTRAL["vocab_size"] * HIDDEN)
    a_rank = layers * sum(a + b for a, b in LINEARS)
    slots = 2 * engine.max_adapters * engine.max_lora_rank * a_rank
    token = token_bytes(MISTRAL.get, wide=False)
    size = engine.paged_attention.block_size
    pair = pair_pages(engine.max_model_len, size) * size * token
    share = engine.paged_attention.gpu_memory_fraction * CARD
    assert weights + slots + STEP + pair < share
    # The sums of docs/gpu.md.
    assert (round(weights / GIB, 1), slots / GIB, token, round(pair / GIB, 1)) == (13.5, 1.25, 128 * 1024, 2.0)
    assert f"{a_rank:,} numbers a rank" in PAGE
    assert f"0.9 are {share / GIB:.1f}: these parts take {(weights + slots + STEP + pair) / GIB:.1f}" in PAGE
