"""A bundle given to a backend without mixtures is refused, whatever the way it came."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.fakes import FakeBackend
from xloom.engines.base import Capabilities
from xloom.engines.kinds import XLORA_FILE
from xloom.engines.registry import backend_for
from xloom.mixtures import options
from xloom.protocol import AdapterRef, XloomError
from xloom.settings import Settings

BUNDLE, ADAPTER = AdapterRef("blend", "1", "xlora"), AdapterRef("plain", "2", "lora")


class Plain(FakeBackend):
    """A backend of a third party that knows LoRA alone, and looks at no kind."""

    @classmethod
    def capabilities(cls) -> Capabilities:
        return Capabilities(paged_attention=True, xlora=(), devices=("cpu",))


def test_a_backend_without_mixtures_never_gets_to_load_a_bundle(tmp_path: Path) -> None:
    async def add() -> Plain:
        backend = Plain()
        await backend.add_adapter(ADAPTER, tmp_path)
        with pytest.raises(XloomError, match="blend") as caught:
            await backend.add_adapter(BUNDLE, tmp_path)
        assert caught.value.code == "unsupported_by_backend"
        return backend

    assert list(asyncio.run(add()).adapters) == ["plain@2"]


def test_a_backend_without_single_passes_refuses_a_bundle_that_is_routed_in_one(tmp_path: Path) -> None:
    assert XLORA_FILE == options.XLORA_FILE

    async def add(passes: int) -> None:
        (tmp_path / XLORA_FILE).write_text(json.dumps({"routing": {"routing_passes": passes}}))
        await FakeBackend().add_adapter(BUNDLE, tmp_path)

    asyncio.run(add(2))
    with pytest.raises(XloomError, match="one pass"):
        asyncio.run(add(1))


def test_bundles_with_mixtures_switched_off_are_refused_before_anything_starts() -> None:
    settings = Settings.model_validate(
        {
            "model": {"source": "x"},
            "engine": {"enable_xlora": False, "backend": "transformers"},
            "xlora": [{"name": "blend", "source": "./b"}],
        }
    )
    with pytest.raises(XloomError, match="enable_xlora") as caught:
        backend_for(settings)
    assert caught.value.code == "unsupported_by_backend"
