"""Grammars are compiled aside: a hostile one is refused in time, and nobody's event loop waits for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import xgrammar
from vllm.sampling_params import StructuredOutputsParams

from tests.stalls import measured
from xloom.protocol import XloomError
from xloom.settings import LimitSettings
from xloom.vllm.front_end.grammars import GrammarCheck

STALL_S = 0.05
LIMITS = LimitSettings(grammar_timeout_s=1.0, schema_bytes=2**20)


def doubled(depth: int) -> dict[str, Any]:
    """A schema of 2^depth branches, in as few words as it takes: each level names the one below twice."""
    levels = {f"level{n}": {"anyOf": [{"$ref": f"#/$defs/level{n - 1}"}] * 2} for n in range(1, depth)}
    levels["level0"] = {"type": "object", "properties": {name: {"type": "string"} for name in "ab"}}
    return {"$ref": f"#/$defs/level{depth - 1}", "$defs": levels}


def written_out(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [{"type": "object", "properties": {name: schema}} for name in "ab"]}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "a schema of 4,096 branches": {"json": written_out(12)},
    "a regex of 1 MB": {"regex": "(ab|c)?" * 140_000},
    "a regex of many nested repetitions": {"regex": "((a{1,400}){1,400}b){1,400}"},
    "a grammar of 30,000 parentheses": {"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "a hostile schema in an older structural tag": {
        "structural_tag": json.dumps(
            {"structures": [{"begin": "<a>", "schema": written_out(12), "end": "</a>"}], "triggers": ["<a>"]}
        )
    },
}
GOOD: list[dict[str, Any]] = [
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"json": doubled(6)},
    {"regex": r"[a-z]{1,8}@[a-z]+\.com"},
    {"choice": ["red", "green"]},
    {"grammar": 'root ::= "a" | "b"'},
    {
        "structural_tag": json.dumps(
            {"structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a>"]}
        )
    },
]


def tokenizer_info() -> str:
    """Of a tokeniser of bytes."""
    info: str = xgrammar.TokenizerInfo([chr(byte) for byte in range(128)], stop_token_ids=[0]).serialize_json()
    return info


@pytest.fixture(params=["xgrammar", "guidance"])
async def grammars(request: pytest.FixtureRequest) -> AsyncIterator[GrammarCheck]:
    made = GrammarCheck(LIMITS, tokenizer_info, request.param)
    yield made
    made.close()


async def outcome(grammars: GrammarCheck, wanted: dict[str, Any]) -> str:
    try:
        await grammars.check(StructuredOutputsParams(**wanted))
    except XloomError as error:
        return error.code
    return ""


async def test_hostile_grammars_end_in_time_and_hold_up_no_event_loop(grammars: GrammarCheck) -> None:
    assert [await outcome(grammars, wanted) for wanted in GOOD] == [""] * len(GOOD)
    async with measured() as stalls, asyncio.timeout(60):
        for name, wanted in HOSTILE.items():
            told = await outcome(grammars, wanted)
            assert told in ("grammar_too_complex", ""), name  # or it was quick
            assert stalls.busy_s < STALL_S, (name, stalls)
        assert await outcome(grammars, {"choice": ["blue"]}) == ""  # others' grammars are compiled after them
