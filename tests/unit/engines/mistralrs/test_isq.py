"""In-situ quantisation in mistral.rs's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xloom.engines.mistralrs.backend import MistralRsBackend
from xloom.engines.mistralrs.isq import fitting_bits, isq_name
from xloom.protocol import XloomError
from xloom.settings import IsqSettings


def test_rounding_to_nearest_is_its_affine_quantisation(tmp_path: Path) -> None:
    assert isq_name(None, tmp_path) is None
    names = [isq_name(IsqSettings(method="rtn", bits=bits), tmp_path) for bits in (2, 4, 8)]  # type: ignore[arg-type]
    assert names == ["AFQ2", "AFQ4", "AFQ8"]


@pytest.mark.parametrize("method", ["awq", "gptq", "smoothquant"])
def test_what_it_has_not_is_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        isq_name(IsqSettings(method=method, bits=4), tmp_path)
    assert caught.value.code == "unsupported_by_backend"
    assert (method, 4) not in MistralRsBackend.capabilities().isq["cpu"]


def test_a_group_size_it_does_not_have_is_refused(tmp_path: Path) -> None:
    assert isq_name(IsqSettings(method="rtn", bits=4, group_size=64), tmp_path) == "AFQ4"
    with pytest.raises(XloomError) as caught:
        isq_name(IsqSettings(method="rtn", bits=4, group_size=128), tmp_path)
    assert caught.value.code == "unsupported_setting"


def test_auto_takes_the_most_bits_that_fit(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1600))
    assert [fitting_bits(tmp_path, free) for free in (4000, 1600, 1599, 800, 799, 10)] == [8, 8, 4, 4, 2, 2]
