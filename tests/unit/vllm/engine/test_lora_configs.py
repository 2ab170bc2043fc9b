"""Kernel configurations: which files an engine may be given, asked of vLLM's own lookup."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.ops.triton_ops import utils

from xloom.protocol import XloomError
from xloom.vllm.engine.lora_configs import (
    SHIPPED,
    SLICES,
    SUFFIXES,
    VARIABLE,
    LoRAShapes,
    Shape,
    fault,
    file_name,
    lora_shapes,
    tuned_folder,
    write_configs,
)

H100 = "NVIDIA H100 80GB HBM3"
MISTRAL_7B = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=None
)
SHAPES = lora_shapes(MISTRAL_7B, 64)
LEAF = {"block_m": 16, "block_n": 16, "block_k": 128, "split_k": 8, "num_warps": 4, "num_stages": 2, "num_ctas": 1}
Lookup = Callable[..., dict[str, Any]]


def made(operator: str, shapes: LoRAShapes = SHAPES, leaf: dict[str, int] = LEAF) -> dict[str, Any]:
    """A complete file."""
    config: dict[str, Any] = {"5": {}}
    for shape in shapes.of(operator):
        for m in ("8", "2048"):
            level = config["5"].setdefault(str(shape.slices), {}).setdefault(m, {})
            level.setdefault(str(shape.k), {})[str(shape.n)] = leaf
    return config


@pytest.fixture
def lookup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lookup]:
    """vLLM's lookup, as on an H100, in a folder."""

    def found(folder: Path, operator: str, **of: Any) -> dict[str, Any]:
        monkeypatch.setenv(VARIABLE, str(folder))
        utils.load_lora_op_config.cache_clear()
        config: dict[str, Any] = utils.get_lora_op_configs.__wrapped__(operator, **of)
        return config

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)
    yield found
    utils.load_lora_op_config.cache_clear()


def test_shapes_are_those_of_one_rank() -> None:
    assert SHAPES.shrink == (Shape(3, 4096, 64), Shape(1, 4096, 64), Shape(2, 4096, 64), Shape(1, 14336, 64))
    assert SHAPES.expand == (Shape(3, 64, 4096, 1024), Shape(1, 64, 4096), Shape(2, 64, 14336))
    half = lora_shapes(MISTRAL_7B, 32, tensor_parallel=2)
    assert half.shrink == (Shape(3, 4096, 32), Shape(1, 2048, 32), Shape(2, 4096, 32), Shape(1, 7168, 32))
    assert half.expand[0].widths == [2048, 512, 512]


def test_what_is_shipped_is_used_on_its_gpu_for_its_shapes_alone(tmp_path: Path) -> None:
    roots = (tmp_path / "none", SHIPPED)
    assert tuned_folder(H100, SHAPES, roots, {}) == SHIPPED / SHAPES.name
    assert tuned_folder("NVIDIA H200", SHAPES, roots, {}) is None
    assert tuned_folder(H100, lora_shapes(MISTRAL_7B, 32), roots, {}) is None
    assert tuned_folder(H100, lora_shapes(MISTRAL_7B, 64, tensor_parallel=2), roots, {}) is None


def test_an_operators_own_folder_is_left_to_him() -> None:
    assert tuned_folder(H100, SHAPES, (SHIPPED,), {VARIABLE: "/mine"}) is None


@pytest.mark.parametrize("max_loras", [2, 5, 17])
@pytest.mark.parametrize("suffix", ["SHRINK", "EXPAND_TRUE"])
def test_vllm_finds_a_shipped_configuration_for_every_batch(lookup: Lookup, max_loras: int, suffix: str) -> None:
    operator = SUFFIXES[suffix]
    folder = tuned_folder(H100, SHAPES, (SHIPPED,), {})
    assert folder is not None
    shipped = json.loads((folder / file_name(H100, suffix)).read_text(encoding="utf-8"))
    assert fault(shipped, operator, SHAPES) is None
    for shape in SHAPES.of(operator):
        for batch in (1, 8, 31, 64, 65, 256, 2048, 16384):
            found = lookup(
                folder,
                operator,
                max_loras=max_loras,
                batch=batch,
                hidden_size=shape.k if operator == "shrink" else shape.n,
                rank=shape.n if operator == "shrink" else shape.k,
                num_slices=shape.slices,
                add_inputs=True,
            )
            nearest = min(("8", "32", "64", "256", "2048"), key=lambda m: abs(int(m) - batch))
            assert found == shipped["5"][str(shape.slices)][nearest][str(shape.k)][str(shape.n)]


def test_a_file_that_would_end_vllms_start_is_refused(tmp_path: Path, lookup: Lookup) -> None:
    config = made("shrink")
    del config["5"]["2"]
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / file_name(H100, "SHRINK")).write_text(json.dumps(config))
    with pytest.raises(KeyError):
        lookup(folder, "shrink", max_loras=5, batch=8, hidden_size=4096, rank=64, num_slices=2)
    assert tuned_folder(H100, SHAPES, (tmp_path,), {}) is None


def spoilt(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(made("shrink"))
    level = config
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "no configurations"),
        ([], "no configurations"),
        (spoilt(("many",), {}), "not a number of adapters"),
        (spoilt(("17",), {"1": made("shrink")["5"]["1"]}), "lacks 2 slices"),
        (spoilt(("5", "3"), {}), "lacks 3 slices"),
        (spoilt(("5", "1", "8"), {}), "nothing for 1 slices of 8 rows"),
        (spoilt(("5", "1", "8", "4096"), {}), "nothing for 1 slices of 8 rows"),
        (spoilt(("5", "1", "8"), {"4096": {"64": LEAF}}), "14336 by 64 were not measured"),
        (spoilt(("5", "1", "8", "4096", "64"), {"block_m": 16}), "not one of this kernel's"),
        (spoilt(("5", "1", "8", "4096", "64"), LEAF | {"block_k": 96}), "not one of this kernel's"),
        (spoilt(("5", "1", "8", "4096", "64"), LEAF | {"split_k": "8"}), "not one of this kernel's"),
    ],
)
def test_incomplete_files_are_told_apart(config: Any, why: str) -> None:
    assert fault(made("shrink"), "shrink", SHAPES) is None
    assert why in str(fault(config, "shrink", SHAPES))


@pytest.mark.parametrize("spoil", ["{", "[]", '{"5": {}}'])
def test_a_folder_is_taken_whole_or_not_at_all(tmp_path: Path, spoil: str) -> None:
    written = write_configs(tmp_path, H100, SHAPES, {"SHRINK": made("shrink"), "EXPAND_TRUE": made("expand")})
    assert tuned_folder(H100, SHAPES, (tmp_path,), {}) == written
    (written / file_name(H100, "EXPAND_TRUE")).write_text(spoil)
    assert tuned_folder(H100, SHAPES, (tmp_path, SHIPPED), {}) == SHIPPED / SHAPES.name


def test_what_this_machine_measured_comes_before_what_is_shipped(tmp_path: Path, lookup: Lookup) -> None:
    leaf = LEAF | {"split_k": 4}
    configs = {"SHRINK": made("shrink", leaf=leaf), "EXPAND_TRUE": made("expand", leaf=leaf)}
    folder = write_configs(tmp_path, H100, SHAPES, configs)
    assert tuned_folder(H100, SHAPES, (tmp_path, SHIPPED), {}) == folder
    for slices in SLICES:
        of = {"max_loras": 9, "batch": 700, "rank": 64, "num_slices": slices}
        assert lookup(folder, "shrink", hidden_size=4096, **of) == leaf
        assert lookup(folder, "expand", hidden_size=14336, add_inputs=True, **of) == leaf


def test_an_incomplete_measurement_leaves_no_file(tmp_path: Path) -> None:
    short = made("expand")
    del short["5"]["3"]
    with pytest.raises(XloomError) as caught:
        write_configs(tmp_path, H100, SHAPES, {"SHRINK": made("shrink"), "EXPAND_TRUE": short})
    assert caught.value.code == "tuning_incomplete"
    assert list(tmp_path.rglob("*.json")) == []


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(XloomError) as caught:
        write_configs(tmp_path / "file", H100, SHAPES, {"SHRINK": made("shrink")})
    assert caught.value.code == "tuning_unwritable"


def test_a_model_without_sizes_is_refused() -> None:
    with pytest.raises(XloomError) as caught:
        lora_shapes(SimpleNamespace(hidden_size=64), 8)
    assert caught.value.code == "unsupported_architecture"
