"""From answers to findings: what is right is proved, what is wrong is named, what can't be told is not called right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.verification.comparison import Scores
from xloom.verification.judgement import BASE, EVEN, HELD, SUM, Expected, Finding, Observed, judge

NOISE = 0.001  # nats: how far the engine is off the reference


def answers(prompt: float, answer: float | None = None) -> list[Scores]:
    """Two answers whose log-probabilities are all the same."""
    one = Scores((prompt,) * 8, (1, 2, 3), (prompt if answer is None else answer,) * 3)
    return [one, one]


def scene() -> tuple[Observed, Expected]:
    """A base, an adapter and a mixture, all served rightly, each `NOISE` off its reference."""
    base, code, blend = -2.0, -1.5, -1.7
    observed = Observed(
        base=answers(base + NOISE),
        base_after=answers(base + NOISE),
        base_mixed=answers(base),
        alone={"code": answers(code + NOISE), "blend": answers(blend - NOISE)},
        mixed={"code": answers(code), "blend": answers(blend)},
        eager={None: answers(base), "code": answers(code), "blend": answers(blend)},
    )
    wrong = {BASE: answers(base), SUM: answers(-1.1), EVEN: answers(-1.65), HELD: answers(blend, -1.75)}
    expected = Expected(
        answers(base),
        {"code": answers(code), "blend": answers(blend)},
        {"code": {BASE: answers(base)}, "blend": dict(wrong)},
    )
    return observed, expected


def findings(observed: Observed, expected: Expected, **options: Any) -> dict[tuple[str, str], Finding]:
    arguments: dict[str, Any] = {"mixtures": {"blend": 3}, "empty": set(), "base": "base", "dtype": "float16"} | options
    found = judge(observed, expected, **arguments)
    assert len({(finding.subject, finding.proof) for finding in found}) == len(found)
    return {(finding.subject, finding.proof): finding for finding in found}


def not_well(found: dict[tuple[str, str], Finding]) -> dict[tuple[str, str], str]:
    return {key: finding.verdict for key, finding in found.items() if finding.verdict != "ok"}


def test_what_is_served_rightly_is_proved() -> None:
    found = findings(*scene())
    assert not_well(found) == {}
    assert {proof for _, proof in found} == {"reference", "effect", "gates", "unchanged", "batch", "eager"}
    assert found["blend", "gates"].measured == pytest.approx(0.6 + NOISE)


def test_another_base_model_is_found_and_measures_nothing() -> None:
    observed, expected = scene()
    expected.base = answers(-2.5)
    assert findings(observed, expected)["base", "reference"].verdict == "failed"


def test_an_adapter_that_is_not_its_files_is_found() -> None:
    observed, expected = scene()
    observed.alone["code"] = observed.mixed["code"] = observed.eager["code"] = answers(-1.45)
    assert not_well(findings(observed, expected)) == {("code", "reference"): "failed"}


@pytest.mark.parametrize(
    ("served", "named"),
    [(answers(-1.1), SUM), (answers(-1.65), EVEN), (answers(-1.7, -1.75), HELD), (answers(-2.0), BASE)],
)
def test_a_mixture_with_other_gates_is_found_and_they_are_named(served: list[Scores], named: str) -> None:
    observed, expected = scene()
    observed.alone["blend"] = observed.mixed["blend"] = observed.eager["blend"] = served
    found = findings(observed, expected)
    assert found["blend", "reference"].verdict == found["blend", "gates"].verdict == "failed"
    assert named in found["blend", "reference"].detail
    assert not any(verdict for (name, _), verdict in not_well(found).items() if name != "blend")


def test_a_mixture_that_is_like_its_sum_is_not_called_gated() -> None:
    observed, expected = scene()
    expected.wrong["blend"][SUM] = answers(-1.7 + 2 * NOISE)
    assert not_well(findings(observed, expected)) == {("blend", "gates"): "not compared"}


def test_gates_that_are_alike_do_not_hide_that_the_sum_is_another() -> None:
    observed, expected = scene()
    expected.wrong["blend"][HELD] = answers(-1.7)
    found = findings(observed, expected)
    assert found["blend", "gates"].verdict == "ok"
    assert HELD in found["blend", "gates"].detail


def test_a_mixture_of_one_adapter_has_no_gates_to_prove() -> None:
    assert ("blend", "gates") not in findings(*scene(), mixtures={"blend": 1})


def test_files_without_effect_are_named() -> None:
    observed, expected = scene()
    observed.alone["code"] = observed.mixed["code"] = observed.eager["code"] = observed.base_mixed
    expected.right["code"] = expected.base
    found = findings(observed, expected, empty={"code"})
    assert not_well(found) == {("code", "effect"): "failed"}
    assert "zero" in found["code", "effect"].detail


def test_an_adapter_the_engine_does_not_apply_is_told_from_one_without_effect() -> None:
    observed, expected = scene()
    observed.alone["code"] = observed.mixed["code"] = observed.eager["code"] = observed.base_mixed
    found = findings(observed, expected)
    assert found["code", "effect"].verdict == found["code", "reference"].verdict == "failed"
    assert "by its files it is 0.5" in found["code", "effect"].detail
    assert BASE in found["code", "reference"].detail


def test_an_effect_below_the_rounding_is_not_called_none() -> None:
    observed, expected = scene()
    weak = -2.0 + 2 * NOISE
    observed.alone["code"] = observed.mixed["code"] = observed.eager["code"] = answers(weak + NOISE)
    expected.right["code"] = answers(weak)
    assert not_well(findings(observed, expected)) == {("code", "effect"): "not compared"}


@pytest.mark.parametrize(
    ("part", "key", "proof"),
    [("mixed", "code", "batch"), ("eager", "code", "eager"), ("eager", None, "eager")],
)
def test_an_answer_that_depends_on_how_it_is_served_is_found(part: str, key: str | None, proof: str) -> None:
    observed, expected = scene()
    getattr(observed, part)[key] = answers(-1.0)
    assert not_well(findings(observed, expected)) == {(key or "base", proof): "failed"}


@pytest.mark.parametrize(("part", "proof"), [("base_after", "unchanged"), ("base_mixed", "batch")])
def test_a_base_that_adapters_change_is_found(part: str, proof: str) -> None:
    observed, expected = scene()
    observed = replace(observed, **{part: answers(-1.9)})
    assert not_well(findings(observed, expected)) == {("base", proof): "failed"}


def test_without_a_reference_nothing_that_needs_it_is_called_right() -> None:
    observed, _ = scene()
    found = findings(observed, Expected(missing="no memory"))
    assert not_well(found) == {
        ("base", "reference"): "not compared",
        ("code", "reference"): "not compared",
        ("blend", "reference"): "not compared",
        ("blend", "gates"): "not compared",
    }
    assert found["code", "effect"].verdict == "ok"


@pytest.mark.parametrize(
    ("served", "verdict"), [(-1.1, "ok"), (-1.7 - NOISE, "failed"), (-1.7 + 2 * NOISE, "not compared")]
)
def test_without_a_reference_the_engines_own_sum_stands_in(served: float, verdict: str) -> None:
    observed, _ = scene()
    observed.summed["blend"] = answers(served)
    observed.alone["blend"] = answers(-1.7 - NOISE)
    assert findings(observed, Expected(missing="no memory"))["blend", "gates"].verdict == verdict


def test_an_adapter_that_did_not_load_has_its_reason() -> None:
    observed, expected = scene()
    observed.refused["odd"] = XloomError("wrong_shape", "It does not fit.", "Use another.")
    found = findings(observed, expected)["odd", "loads"]
    assert (found.verdict, found.detail, found.cure) == ("failed", "It does not fit. [wrong_shape]", "Use another.")


def test_one_the_reference_can_not_read_is_not_called_right() -> None:
    observed, expected = scene()
    del expected.right["code"]
    expected.broken["code"] = "no such module"
    found = findings(observed, expected)
    assert not_well(found) == {("code", "reference"): "not compared"}
    assert found["code", "reference"].detail == "no such module"
