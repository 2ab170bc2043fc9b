"""What the composition root makes of settings and of what the store already holds."""

from __future__ import annotations

from typing import Any

import pytest

from xloom.adapters.manifest import Entry
from xloom.app import for_stored
from xloom.protocol import XloomError
from xloom.settings import Settings

BUNDLE = Entry("blend", "xlora", "1" * 64, 8, ("q_proj",), 1, "./blend")
ADAPTER = Entry("plain", "lora", "2" * 64, 8, ("q_proj",), 1, "./plain")


def settings(**engine: Any) -> Settings:
    return Settings.model_validate({"model": {"source": "./model"}, "engine": engine})


def test_bundles_left_in_the_store_count_as_those_of_the_settings() -> None:
    plain = settings(backend="vllm")
    assert not for_stored(plain, (ADAPTER,)).xlora_enabled
    assert for_stored(plain, (ADAPTER, BUNDLE)).xlora_enabled


def test_bundles_left_in_the_store_are_refused_by_name_where_mixtures_are_off() -> None:
    with pytest.raises(XloomError, match="'blend'") as caught:
        for_stored(settings(backend="vllm", enable_xlora=False), (ADAPTER, BUNDLE))
    assert caught.value.code == "unsupported_by_backend"


def test_bundles_left_in_the_store_are_refused_by_name_for_a_backend_without_mixtures() -> None:
    pytest.importorskip("mistralrs")
    with pytest.raises(XloomError, match=r"'blend'.*X-LoRA") as caught:
        for_stored(settings(backend="mistralrs"), (BUNDLE,))
    assert caught.value.code == "unsupported_by_backend"
