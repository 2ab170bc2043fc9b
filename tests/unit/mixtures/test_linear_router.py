from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xloom.mixtures.linear_router import LinearRouter, is_linear_router, load_linear_router, save_linear_router
from xloom.protocol import XloomError

Q = "model.layers.0.self_attn.q_proj"


def router(**options: object) -> LinearRouter:
    layers = {Q: (torch.randn(2, 16), torch.randn(2))}
    return LinearRouter({"code": "code", "docs": "../docs"}, layers, **options)  # type: ignore[arg-type]


def test_a_router_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = router(activation="sigmoid", top_k=1, temperature=0.5)
    assert not is_linear_router(tmp_path)
    save_linear_router(tmp_path, saved)
    assert is_linear_router(tmp_path)
    found = load_linear_router(tmp_path)
    assert list(found.adapters.items()) == list(saved.adapters.items())
    assert (found.activation, found.top_k, found.temperature) == ("sigmoid", 1, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(found.layers[Q], saved.layers[Q], strict=True))
    assert set(load_file(tmp_path / "router.safetensors")) == {f"{Q}.router.weight", f"{Q}.router.bias"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["router.safetensors", "router_config.json"]


@pytest.mark.parametrize(
    "options", [{"activation": "relu"}, {"top_k": 3}, {"top_k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}]
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(XloomError) as failure:
        save_linear_router(tmp_path, router(**options))
    assert failure.value.code == "broken_bundle"
    assert not is_linear_router(tmp_path)


@pytest.mark.parametrize(
    "change", [{"kind": "xlora"}, {"adapters": ["code", "docs"]}, {"adapters": {"code": "code"}}, {"top_k": "all"}]
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    save_linear_router(tmp_path, router())
    file = tmp_path / "router_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(XloomError) as failure:
        load_linear_router(tmp_path)
    assert failure.value.code == "broken_bundle"
    assert str(tmp_path) in failure.value.message
