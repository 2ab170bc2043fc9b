"""When two answers are the same, and when they are not: the one rule of tolerance, and distances between answers.

The rule. Two programs that compute the same model differ by how their dtype rounds, and how far that carries depends
on the model's depth and values, so no constant fits all. The base model says how far it is here: its log-probabilities
in the engine are off the reference's by rounding alone. An adapter adds to each linear one more product of the same
kind, so it is off by about as much (the sample on an H100 in float16: the base 0.0008, an adapter 0.0007, a mixture up
to 0.0010; in bfloat16 0.0055, 0.0059, 0.0068), while what is wrongly served is off by its effect: 0.09 for gates of
another token, 0.5 for the plain sum of a mixture's adapters. Hence

    tolerance = FACTOR x max(distance of the base from its reference, FLOOR)

and the base itself must lie within `BASE_LIMIT` of its dtype. Where no reference can be computed, the base's figures
above stand in for its distance (`TYPICAL`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FACTOR = 4.0  # the mean over some hundred tokens varies by a third; a mixture rounds in its gates too
FLOOR = 1e-5  # nats: float32's own, should a base of few, certain answers come out at 0
TYPICAL = {"float32": FLOOR, "float16": 0.0008, "bfloat16": 0.0055}  # nats, mean |difference|
BASE_LIMIT = {"float32": 0.002, "float16": 0.02, "bfloat16": 0.1}  # nats; beyond it, it is another model
LOOSEST = "bfloat16"  # what `auto` counts as, where nothing was measured
NOTHING = 1e-6  # nats: below it the reference itself sees no effect


@dataclass(frozen=True)
class Scores:
    """The log-probabilities (nats) of one prompt's tokens after the first, and of the tokens that followed it."""

    prompt: tuple[float, ...]
    tokens: tuple[int, ...]
    answer: tuple[float, ...]  # of `tokens`


@dataclass(frozen=True)
class Distance:
    """Mean |difference| of log-probabilities in nats: over prompts' tokens, and over those of the answers."""

    prompt: float
    answer: float

    @property
    def worst(self) -> float:
        """The larger; NaN if either is."""
        return math.nan if math.isnan(self.prompt + self.answer) else max(self.prompt, self.answer)

    @property
    def part(self) -> str:
        """Where it is larger: "prompt" or "answer"."""
        return "prompt" if self.prompt >= self.answer else "answer"

    def at(self, part: str) -> float:
        """One of the two."""
        return self.prompt if part == "prompt" else self.answer


def distance(some: Sequence[Scores], others: Sequence[Scores]) -> Distance:
    """How far apart answers to the same prompts are.

    Where the tokens of two answers part, those after that point follow different texts and are left out. The first
    two that differ count: the likeliest tokens of two equal models differ only where both are about as likely.
    """
    prompt: list[float] = []
    answer: list[float] = []
    for one, other in zip(some, others, strict=True):
        prompt += _differences(one.prompt, other.prompt)
        alike = agreement(one, other) + 1
        answer += _differences(one.answer[:alike], other.answer[:alike])
    return Distance(_mean(prompt), _mean(answer))


def agreement(one: Scores, other: Scores) -> int:
    """How many tokens two answers begin with in common."""
    pairs = list(zip(one.tokens, other.tokens, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _differences(some: Sequence[float], others: Sequence[float]) -> list[float]:
    if len(some) != len(others):
        return [math.nan]  # a log-probability is missing: no answer that can be compared
    return [0.0 if a == b else abs(a - b) for a, b in zip(some, others, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def tolerance(dtype: str, base: Distance | None) -> float:
    """What may lie between an answer and the one it must equal, in nats; `base` None: there is no reference."""
    if base is None:
        return FACTOR * TYPICAL.get(dtype, TYPICAL[LOOSEST])
    limit = base_limit(dtype)  # a base beyond it would excuse everything
    return FACTOR * max(base.worst if within(base.worst, limit) else limit, FLOOR)


def base_limit(dtype: str) -> float:
    """How far the base may be from its reference, in nats."""
    return BASE_LIMIT.get(dtype, BASE_LIMIT[LOOSEST])


def within(measured: float, limit: float) -> bool:
    """Whether a distance is within a limit; NaN never is."""
    return measured <= limit


def nearest(answers: Sequence[Scores], candidates: Mapping[str, Sequence[Scores]]) -> tuple[str, float]:
    """Which of several models the answers look most like, and how far they are from it."""
    distances = {name: distance(answers, scores).worst for name, scores in candidates.items()}
    found = min(distances, key=lambda name: math.inf if math.isnan(distances[name]) else distances[name])
    return found, distances[found]
