"""What the vLLM backend makes of `isq` and of a quantised folder before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_model
from xloom.protocol import XloomError
from xloom.settings import EngineSettings, IsqSettings, ModelSettings
from xloom.vllm.engine.arguments import engine_arguments, kv_bytes
from xloom.vllm.engine.backend import VLLMBackend


def quantised(folder: Path, form: str) -> ModelSettings:
    tiny_model(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": "compressed-tensors", "format": form, "config_groups": {}, "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return ModelSettings(source=str(folder))


def arguments(model: ModelSettings, dtype: Any, device: str = "cpu") -> dict[str, Any]:
    return engine_arguments(model, EngineSettings(dtype=dtype), xlora=True, max_lora_rank=8, device=device)


def test_four_bit_weights_on_cpu_run_in_a_narrow_dtype(tmp_path: Path) -> None:
    model = quantised(tmp_path, "pack-quantized")
    assert arguments(model, "auto")["dtype"] == "bfloat16"
    assert arguments(model, "float16")["dtype"] == "float16"
    with pytest.raises(XloomError) as caught:
        arguments(model, "float32")
    assert caught.value.code == "unsupported_setting"


def test_eight_bit_weights_and_gpus_take_what_is_asked(tmp_path: Path) -> None:
    assert arguments(quantised(tmp_path / "int8", "int-quantized"), "float32")["dtype"] == "float32"
    assert arguments(quantised(tmp_path / "int4", "pack-quantized"), "auto", "cuda")["dtype"] == "auto"


def test_adapters_find_the_linears_of_a_quantised_folder(tmp_path: Path) -> None:
    found = arguments(quantised(tmp_path, "pack-quantized"), "auto")
    assert {"q_proj", "down_proj"} <= set(found["lora_target_modules"])


def test_pages_are_reckoned_before_the_engine_starts(tmp_path: Path) -> None:
    model = ModelSettings(source=str(tiny_model(tmp_path, "llama")))
    engine = EngineSettings(dtype="bfloat16")
    found = engine_arguments(model, engine, xlora=True, max_lora_rank=8, device="cpu")
    assert kv_bytes(model, engine, xlora=True, device="cpu") == found["kv_cache_memory_bytes"]


def test_a_gpu_must_have_room_for_one_request_and_its_scaling_sequence(tmp_path: Path) -> None:
    model, engine = ModelSettings(source=str(tiny_model(tmp_path, "llama"))), EngineSettings(max_model_len=512)
    plain = kv_bytes(model, engine, xlora=False, device="cuda")
    assert kv_bytes(model, engine, xlora=True, device="cuda") == 2 * plain


async def test_float32_with_four_bits_is_refused_before_the_work(tmp_path: Path) -> None:
    model, engine = ModelSettings(source=str(tmp_path)), EngineSettings(dtype="float32")
    with pytest.raises(XloomError) as caught:
        await VLLMBackend.load(model, engine, xlora=False, max_lora_rank=8, isq=IsqSettings(bits=4))
    assert caught.value.code == "unsupported_setting"


async def test_a_refused_case_is_refused_before_the_work(sample: ModelSettings) -> None:
    isq = IsqSettings(bits=2, method="smoothquant")
    with pytest.raises(XloomError) as caught:
        await VLLMBackend.load(sample, EngineSettings(), xlora=False, max_lora_rank=8, isq=isq)
    assert caught.value.code == "isq_unsupported"


@pytest.fixture
def sample() -> ModelSettings:
    return ModelSettings()
