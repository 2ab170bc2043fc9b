"""Tokens a second, side by side."""

from __future__ import annotations

from tests.fakes import FakeBackend
from xloom.protocol import AdapterRef
from xloom.verification.engine import reading
from xloom.verification.speed import measure

CODE, BLEND = AdapterRef("code", "1", "lora"), AdapterRef("blend", "1", "xlora")
PROMPTS = [[number + 1] * 4 for number in range(4)]


async def test_every_case_is_measured_and_the_base_is_the_measure() -> None:
    backend = FakeBackend(step_s=0.001)
    async with reading(backend) as ask:
        found = await measure(ask, PROMPTS, CODE, BLEND, rows=4, longest=64, progress=lambda text: None)
    assert [case.case for case in found] == ["base", "code", "blend", "base beside one of blend"]
    assert [case.rows for case in found] == [4, 4, 4, 3]
    assert found[0].ratio == 1
    assert all(case.tokens_per_second > 0 for case in found)
    assert not backend.requests  # the mixture's row does not outlive the measurement


async def test_without_adapters_or_room_there_is_less_to_measure() -> None:
    async with reading(FakeBackend()) as ask:
        assert len(await measure(ask, PROMPTS, None, None, rows=4, longest=64, progress=lambda text: None)) == 1
        assert await measure(ask, PROMPTS, None, None, rows=4, longest=16, progress=lambda text: None) == []
