"""When an engine is asked for X-LoRA's figures, and how its ranks' answers are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from xloom.protocol import AdapterRef, BundleFigures, MixtureFigures
from xloom.vllm.engine.mixture import MixtureReader

BLEND, PLAIN = AdapterRef("blend", "1", "xlora"), AdapterRef("plain", "1", "lora")
FIGURES = MixtureFigures([BundleFigures("blend", 3, {"0": 1.0, "1": 2.0}, 1.5)], 1, 0.5, 0.2, 0.1)
NOTHING, SOME = [None, False], [msgspec.to_builtins(FIGURES), False]


@dataclass
class Output:
    """The part of vLLM's EngineCoreOutput that is looked at."""

    request_id: str
    finish_reason: object = None


class Core:
    """Answers what it was told to, of two ranks."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answer: list[Any] = NOTHING

    async def collective_rpc_async(self, method: str) -> list[Any]:
        self.calls.append(method)
        return [self.answer, None]


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def reader(core: Core) -> MixtureReader:
    return MixtureReader(core)


async def test_an_engine_without_xlora_requests_is_left_alone(core: Core, reader: MixtureReader) -> None:
    reader.began("a", PLAIN)
    reader.saw([Output("a", "stop")])
    assert await reader.growth() is None
    assert core.calls == []


async def test_it_is_asked_while_requests_run_and_until_all_is_read(core: Core, reader: MixtureReader) -> None:
    reader.began("a", BLEND)
    assert await reader.growth() is None  # it waits in the engine
    core.answer = SOME
    reader.saw([Output("a")])
    assert await reader.growth() == FIGURES
    reader.saw([Output("a", "length")])
    assert await reader.growth() == FIGURES  # of its last steps
    core.answer = NOTHING
    assert await reader.growth() is None
    asked = len(core.calls)
    assert await reader.growth() is None
    assert len(core.calls) == asked


async def test_it_is_asked_again_while_more_is_on_its_way(core: Core, reader: MixtureReader) -> None:
    reader.began("a", BLEND)
    reader.saw([Output("a", "stop")])
    core.answer = [None, True]
    assert await reader.growth() is None
    core.answer = SOME
    assert await reader.growth() == FIGURES


async def test_a_request_that_comes_and_goes_during_a_call_is_not_forgotten(core: Core, reader: MixtureReader) -> None:
    reader.began("a", BLEND)
    reader.ended(["a"])

    async def answer_late(method: str) -> list[Any]:
        reader.began("b", BLEND)
        reader.saw([Output("b", "stop")])
        return [NOTHING, None]

    core.collective_rpc_async, at_once = answer_late, core.collective_rpc_async  # type: ignore[method-assign]
    assert await reader.growth() is None
    core.collective_rpc_async = at_once  # type: ignore[method-assign]
    core.answer = SOME
    assert await reader.growth() == FIGURES


async def test_a_rank_that_failed_to_answer_counts_as_nothing(core: Core, reader: MixtureReader) -> None:
    reader.began("a", BLEND)
    core.answer = None  # type: ignore[assignment]
    assert await reader.growth() is None
