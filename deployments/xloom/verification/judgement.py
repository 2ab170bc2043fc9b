"""From what an engine answered, and what it ought to have answered, to findings: plain functions of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from xloom.protocol import XloomError
from xloom.verification.comparison import (
    NOTHING,
    TYPICAL,
    Distance,
    Scores,
    base_limit,
    distance,
    nearest,
    tolerance,
    within,
)

Verdict = Literal["ok", "failed", "not compared"]
Answers = Sequence[Scores]  # one for each prompt

# What an answer may look like: right, or as what was served in its place.
RIGHT, BASE, SUM = "its reference", "the base model", "the plain sum of its adapters"
EVEN, HELD = "the mixture at even gates", "the mixture at the gates that the prompt ended with"

AGAIN = "Remove it and add it again; if that does not help, it is a fault of the engine: see docs/check.md."


@dataclass(frozen=True)
class Finding:
    """What one proof said of one model (base, adapter or mixture)."""

    subject: str
    proof: str  # loads, reference, effect, gates, unchanged, batch, eager
    verdict: Verdict
    measured: float | None = None  # nats
    limit: float | None = None  # nats: what `measured` is held against
    detail: str = ""
    cure: str = ""


@dataclass
class Observed:
    """What an engine answered, by name of adapter or mixture where there are several."""

    base: Answers  # before anything was loaded
    base_after: Answers = ()  # with all loaded
    base_mixed: Answers = ()  # in one batch with all
    alone: dict[str, Answers] = field(default_factory=dict)
    mixed: dict[str, Answers] = field(default_factory=dict)
    summed: dict[str, Answers] = field(default_factory=dict)  # mixtures served as plain adapters, where that was asked
    refused: dict[str, XloomError] = field(default_factory=dict)  # what the engine did not load, and why
    eager: dict[str | None, Answers] = field(default_factory=dict)  # of an engine that does not compile; None: base


@dataclass
class Expected:
    """What the reference says of the engine's own answers; `missing` says why there is none."""

    base: Answers = ()
    right: dict[str, Answers] = field(default_factory=dict)
    wrong: dict[str, dict[str, Answers]] = field(default_factory=dict)  # by fault: what it would look like
    missing: str | None = None
    broken: dict[str, str] = field(default_factory=dict)  # what the reference could not load, and why


def judge(
    observed: Observed, expected: Expected, mixtures: Mapping[str, int], empty: set[str], base: str, dtype: str
) -> list[Finding]:
    """All findings. `mixtures` is how many adapters each mixture has; `empty` are those whose files change nothing."""
    measured = None if expected.missing else distance(observed.base, expected.base)
    allowed = tolerance(dtype, measured)
    findings = [_base_reference(base, measured, dtype, expected.missing)]
    if observed.base_after:
        findings.append(_same(base, "unchanged", observed.base, observed.base_after, allowed, "with adapters loaded"))
    if observed.base_mixed:
        findings.append(_same(base, "batch", observed.base, observed.base_mixed, allowed, "beside adapters"))
    for name, why in observed.refused.items():
        findings.append(Finding(name, "loads", "failed", detail=f"{why.message} [{why.code}]", cure=why.cure))
    for name, answers in observed.alone.items():
        findings.append(_reference(name, answers, expected, allowed))
        findings.append(_effect(name, observed, expected, name in empty, allowed, dtype))
        if mixtures.get(name, 0) > 1:  # the one gate of a single adapter may rightly be 1 always
            findings.append(_gates(name, observed, expected, allowed, dtype))
        if name in observed.mixed:
            findings.append(_same(name, "batch", answers, observed.mixed[name], allowed, "in a mixed batch"))
    for key, answers in observed.eager.items():
        compiled = observed.base if key is None else observed.alone[key]
        findings.append(_same(key or base, "eager", compiled, answers, allowed, "without compilation and graphs"))
    return findings


def _base_reference(base: str, measured: Distance | None, dtype: str, missing: str | None) -> Finding:
    if measured is None:
        return Finding(base, "reference", "not compared", detail=missing or "")
    limit = base_limit(dtype)
    if within(measured.worst, limit):
        return Finding(base, "reference", "ok", measured.worst, limit)
    return Finding(
        base,
        "reference",
        "failed",
        measured.worst,
        limit,
        "The base model in the engine is not the model of the files.",
        "Look for engine.extra_args and quantisation that change the model; nothing below can be relied on.",
    )


def _same(name: str, proof: str, some: Answers, others: Answers, allowed: float, when: str) -> Finding:
    found = distance(some, others)
    if within(found.worst, allowed):
        return Finding(name, proof, "ok", found.worst, allowed)
    detail = f"It answers otherwise {when}, most in the {found.part}."
    return Finding(name, proof, "failed", found.worst, allowed, detail, "A fault of the engine: see docs/check.md.")


def _reference(name: str, answers: Answers, expected: Expected, allowed: float) -> Finding:
    if expected.missing:
        return Finding(name, "reference", "not compared", detail=expected.missing)
    if name not in expected.right:
        return Finding(name, "reference", "not compared", detail=expected.broken.get(name, "The reference lacks it."))
    right = expected.right[name]
    found = distance(answers, right)
    if within(found.worst, allowed):
        return Finding(name, "reference", "ok", found.worst, allowed)
    likely, off = nearest(answers, {RIGHT: right, **expected.wrong.get(name, {})})
    detail = f"What is served is not what its files say, most in the {found.part}."
    if likely != RIGHT:
        detail += f" It is {likely} that is served ({off:.2g} off that)."
    return Finding(name, "reference", "failed", found.worst, allowed, detail, AGAIN)


def _effect(name: str, observed: Observed, expected: Expected, empty: bool, allowed: float, dtype: str) -> Finding:
    """Prompts alone are the same text for base and adapter."""
    found = distance(observed.alone[name], observed.base).prompt
    if empty:
        detail = "Its files change nothing: A or B is zero in every module."
        return Finding(name, "effect", "failed", found, allowed, detail, "Train it, or save it anew.")
    if found > allowed:
        return Finding(name, "effect", "ok", found, allowed)
    real = _reference_effect(name, expected)
    unseen = "Its effect is lost in the dtype's rounding"
    if real is None:  # then the dtype's own rounding has to tell nothing from little
        if not found > TYPICAL.get(dtype, TYPICAL["bfloat16"]):
            return Finding(name, "effect", "failed", found, allowed, "It answers as the base model does.", AGAIN)
        return Finding(name, "effect", "not compared", found, allowed, f"{unseen}.")
    if real <= NOTHING:
        detail = "Its files change nothing in any answer."
        return Finding(name, "effect", "failed", found, allowed, detail, "Train it, or save it anew.")
    if real > 2 * allowed:
        detail = f"It answers as the base model does; by its files it is {real:.2g} from it."
        return Finding(name, "effect", "failed", found, allowed, detail, AGAIN)
    detail = f"{unseen}: by its files it is {real:.2g} from the base."
    return Finding(name, "effect", "not compared", found, allowed, detail, "engine.dtype: float32 would show it.")


def _reference_effect(name: str, expected: Expected) -> float | None:
    if expected.missing or name not in expected.right:
        return None
    return distance(expected.right[name], expected.base).prompt


def _gates(name: str, observed: Observed, expected: Expected, allowed: float, dtype: str) -> Finding:
    """A mixture is nearer to its reference than to the plain sum, and to what other gates than its own would give."""
    answers = observed.alone[name]
    if expected.missing or name not in expected.right:
        if name not in observed.summed:
            return Finding(name, "gates", "not compared", detail=expected.missing or "The reference lacks it.")
        off = distance(answers, observed.summed[name]).prompt
        if off > allowed:
            return Finding(name, "gates", "ok", off, allowed)
        if not off > TYPICAL.get(dtype, TYPICAL["bfloat16"]):
            return Finding(name, "gates", "failed", off, allowed, f"It is {SUM} that is served.", AGAIN)
        return Finding(name, "gates", "not compared", off, allowed, f"It and {SUM} are too alike to tell.")
    right = expected.right[name]
    off_sum, alike = None, []
    for fault, wrong in expected.wrong.get(name, {}).items():
        apart = distance(right, wrong)
        part = apart.part
        off = distance(answers, wrong).at(part)
        if fault == SUM:
            off_sum = off
        if not apart.worst > 2 * allowed:
            alike.append(fault)
        elif not distance(answers, right).at(part) < off:
            detail = f"It is {fault} that is served, or nearer to it than to the mixture."
            return Finding(name, "gates", "failed", off, allowed, detail, AGAIN)
    if SUM in alike:
        return Finding(name, "gates", "not compared", off_sum, allowed, f"It and {SUM} are too alike to tell.")
    detail = f"Too alike to tell apart here: {', '.join(alike)}." if alike else ""
    return Finding(name, "gates", "ok", off_sum, allowed, detail)
