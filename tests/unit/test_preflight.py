"""What a deployment is refused for before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xloom.engines.registry import load_backend
from xloom.preflight import refusals, refuse
from xloom.protocol import XloomError
from xloom.settings import SAMPLE, load_settings, parse_settings

pytestmark = pytest.mark.skipif(load_backend("vllm").missing() is not None, reason="vLLM is not installed")
BASE = str(SAMPLE / "base")


def codes(**data: Any) -> list[str]:
    return [error.code for error in refusals(parse_settings({"model": {"source": BASE}, **data}))]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def test_the_sample_passes() -> None:
    refuse(load_settings(None))
    assert codes() == []


def test_a_hub_id_is_left_to_the_engine() -> None:
    assert codes(model={"source": "org/model"}) == []


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def without_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x01")


def without_a_shard(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def without_configuration(model: Path) -> None:
    (model / "config.json").unlink()


def with_broken_configuration(model: Path) -> None:
    (model / "config.json").write_text("[]")


DAMAGES = [
    without_weights,
    cut_short,
    without_header,
    without_a_shard,
    without_configuration,
    with_broken_configuration,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_a_whole_model_is_refused(model: Path, damage: Callable[[Path], None]) -> None:
    damage(model)
    with pytest.raises(XloomError) as caught:
        refuse(parse_settings({"model": {"source": str(model)}}))
    assert caught.value.code == "model_not_loadable"
    assert str(model) in caught.value.message


def test_an_architecture_that_nobody_has_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NoneSuchForCausalLM"]}))
    assert codes(model={"source": str(model)}) == ["unsupported_architecture"]


def test_pages_that_never_hold_a_request_are_refused_with_their_number() -> None:
    def pages(count: int, **data: Any) -> list[str]:
        engine = {"max_model_len": 1024, "paged_attention": {"block_size": 32, "max_blocks": count}}
        return [
            error.message for error in refusals(parse_settings({"model": {"source": BASE}, "engine": engine, **data}))
        ]

    assert pages(33) == []
    assert "at least 33 pages" in pages(32)[0]
    bundle = {"xlora": [{"name": "blend", "source": "./blend"}]}
    assert pages(65, **bundle) == []
    assert "at least 65 pages" in pages(64, **bundle)[0]


def test_a_length_beyond_the_models_is_refused() -> None:
    assert codes(engine={"max_model_len": 100_000, "paged_attention": {"max_blocks": 100_000}}) == [
        "invalid_engine_settings"
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [({"max_num_batch_tokens": 512}, "unknown_engine_argument"), ({"trust_remote_code": True}, "unsupported_setting")],
)
def test_engine_arguments_are_looked_at(arguments: dict[str, Any], code: str) -> None:
    assert codes(engine={"extra_args": arguments}) == [code]


def test_quantisation_is_looked_at(tmp_path: Path) -> None:
    assert codes(isq={"calibration": str(tmp_path / "none.txt")})[0] in ("no_calibration", "isq_missing")


def test_all_refusals_are_told_at_once() -> None:
    wrong = {"max_model_len": 1 << 20, "extra_args": {"nonsense": 1}}
    assert codes(engine=wrong) == ["invalid_engine_settings", "unknown_engine_argument"]


@pytest.mark.parametrize(
    ("router", "code"),
    [
        ({"host": "0.0.0.0"}, "endpoint_without_keys"),
        ({"api_key": "k", "admin_key": "k"}, "one_key_for_both"),
        ({"front_end_args": {"ssl_certfile": "cert.pem"}}, "unknown_front_end_argument"),
    ],
)
def test_an_endpoint_that_would_not_start_is_refused(
    monkeypatch: pytest.MonkeyPatch, router: dict[str, Any], code: str
) -> None:
    for name in ("XLOOM_API_KEY", "XLOOM_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert codes(router=router) == [code]
