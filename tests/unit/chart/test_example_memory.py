"""The example for Mistral 7B fits the GPU it names, by the model's real shapes; docs/gpu.md has the same sums."""

from __future__ import annotations

from tests.unit.chart.rendering import CHART, example
from xloom.engines.sizing import CARDS, GIB, MODELS, STEP, needed, plan
from xloom.settings import Settings, parse_settings

PAGE = (CHART.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_weights_slots_a_step_and_a_pair_of_the_full_length_fit_24_gb() -> None:
    file = CHART / "examples" / "values-mistral-7b-xlora.yaml"
    settings: Settings = parse_settings(example(file)["settings"], with_keys=False)
    assert "one GPU of 24 GB a replica" in file.read_text(encoding="utf-8").splitlines()[0]
    engine, shape = settings.engine, MODELS["7B"]
    assert engine.max_lora_rank != "auto"
    share = engine.paged_attention.gpu_memory_fraction
    found = plan(shape, CARDS["L4 24 GB"] * GIB, slots=engine.max_adapters, rank=engine.max_lora_rank, share=share)
    pages = needed(engine.max_model_len, found.page, mixture=True)
    assert found.pages >= pages
    # The sums of docs/gpu.md.
    pair = pages * found.page * found.token
    parts = (round(found.weights / GIB, 1), found.slots / GIB, found.token, round(pair / GIB, 1))
    assert parts == (13.5, 1.25, 128 * 1024, 2.0)
    assert f"{shape.rank_numbers():,} numbers a rank" in PAGE
    taken = (found.weights + found.slots + STEP + pair) / GIB
    assert f"0.9 are {found.share / GIB:.1f}: these parts take {taken:.1f}" in PAGE
