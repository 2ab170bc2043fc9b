"""Tokens a second of base, adapter and mixture, and of base rows beside a mixture, side by side."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from xloom.protocol import AdapterRef, TokenRequest
from xloom.verification.engine import Ask, request_name
from xloom.verification.proof import Progress

ROWS = 8  # requests at once
ROUNDS = 5  # each measures all cases, one after the other; the first, which warms up, is not counted
ROUND_S = 1.0  # what one case should take
FEWEST, MOST = 16, 256  # new tokens of a row

Row = AdapterRef | None


@dataclass(frozen=True)
class Speed:
    """One case, as medians over the rounds; the ratio is to the base of the same round, row by row."""

    case: str
    rows: int
    tokens_per_second: float  # of the rows measured, together
    ratio: float


async def measure(
    ask: Ask,
    prompts: Sequence[Sequence[int]],
    adapter: AdapterRef | None,
    mixture: AdapterRef | None,
    *,
    rows: int,
    longest: int,
    progress: Progress,
) -> list[Speed]:
    """Measure what there is: `rows` prompts at once, of up to `longest` tokens with their answers.

    The case of base rows beside a mixture needs two rows or more. Nothing is measured where no answer has room.
    """
    remaining = longest - max(len(prompt) for prompt in prompts)
    if remaining < FEWEST:
        return []
    cases: dict[str, tuple[list[Row], Row]] = {"base": ([None] * rows, None)}
    if adapter is not None:
        cases[adapter.name] = ([adapter] * rows, None)
    if mixture is not None:
        cases[mixture.name] = ([mixture] * rows, None)
        if rows > 1:
            cases[f"base beside one of {mixture.name}"] = ([None] * (rows - 1), mixture)
    progress("speed: warming up")
    rate = await _rate(ask, prompts, *cases["base"], FEWEST)
    count = max(FEWEST, min(MOST, remaining // 3, int(rate / rows * ROUND_S)))
    rates: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(ROUNDS):
        progress(f"speed: round {number} of {ROUNDS - 1}")
        for case, (measured, beside) in cases.items():
            rates[case].append(await _rate(ask, prompts, measured, beside, count))
    found = []
    for case, (measured, _) in cases.items():
        ratios = [
            (rate / len(measured)) / (base / rows)
            for rate, base in zip(rates[case][1:], rates["base"][1:], strict=True)
        ]
        found.append(Speed(case, len(measured), statistics.median(rates[case][1:]), statistics.median(ratios)))
    return found


async def _rate(ask: Ask, prompts: Sequence[Sequence[int]], rows: Sequence[Row], beside: Row, count: int) -> float:
    """Tokens a second of the rows together, while `beside`, if any, runs on for as long as they do."""
    neighbour = None
    if beside is not None:
        neighbour = asyncio.create_task(_run(ask, prompts[len(rows)], beside, 3 * count))
    began = time.perf_counter()
    try:
        await asyncio.gather(*(_run(ask, prompt, row, count) for prompt, row in zip(prompts, rows, strict=False)))
        return len(rows) * count / (time.perf_counter() - began)
    finally:
        if neighbour is not None:
            neighbour.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await neighbour


async def _run(ask: Ask, prompt: Sequence[int], adapter: Row, count: int) -> None:
    sampling = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True}
    await ask(TokenRequest(request_name(), list(prompt), sampling, adapter))
