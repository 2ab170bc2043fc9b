"""Distances between answers, and what may lie between two that are the same."""

from __future__ import annotations

import math

import pytest

from xloom.verification.comparison import (
    BASE_LIMIT,
    FACTOR,
    FLOOR,
    TYPICAL,
    Distance,
    Scores,
    agreement,
    distance,
    nearest,
    tolerance,
    within,
)

ONE = Scores((-1.0, -2.0), (5, 6, 7), (-0.5, -0.25, -3.0))


def moved(scores: Scores, by: float) -> Scores:
    return Scores(
        tuple(value + by for value in scores.prompt), scores.tokens, tuple(value - by for value in scores.answer)
    )


def test_equal_answers_are_nothing_apart() -> None:
    assert distance([ONE], [ONE]) == Distance(0, 0)


def test_a_distance_is_the_mean_over_all_tokens_of_a_part() -> None:
    longer = Scores((-1.0,) * 6, (1,), (-1.0,))
    found = distance([ONE, longer], [moved(ONE, 0.4), longer])
    assert found.prompt == pytest.approx(0.4 * 2 / 8)
    assert found.answer == pytest.approx(0.4 * 3 / 4)
    assert (found.worst, found.part) == (found.answer, "answer")


def test_tokens_after_two_answers_part_are_left_out() -> None:
    other = Scores(ONE.prompt, (5, 9, 1), (-0.5, -0.35, -90.0))
    assert agreement(ONE, other) == 1
    assert distance([ONE], [other]).answer == pytest.approx((0 + 0.1) / 2)


def test_where_answers_part_without_being_near_it_shows() -> None:
    other = Scores(ONE.prompt, (4, 6, 7), (-9.0, -0.25, -3.0))
    assert distance([ONE], [other]).answer == pytest.approx(8.5)


@pytest.mark.parametrize("wrong", [Scores((math.nan, -2.0), (5,), (-0.5,)), Scores((), (5,), (-0.5,))])
def test_what_can_not_be_compared_is_never_within_a_limit(wrong: Scores) -> None:
    found = distance([Scores(ONE.prompt, (5,), (-0.5,))], [wrong])
    assert not within(found.worst, 1e9)


def test_the_same_infinity_is_no_difference() -> None:
    impossible = Scores((-math.inf,), (1,), (0.0,))
    assert distance([impossible], [impossible]).worst == 0


def test_the_tolerance_follows_the_base() -> None:
    assert tolerance("bfloat16", Distance(0.002, 0.004)) == FACTOR * 0.004
    assert tolerance("float32", Distance(0, 0)) == FACTOR * FLOOR


@pytest.mark.parametrize("off", [3.0, math.nan])
def test_a_base_that_is_another_model_excuses_nothing(off: float) -> None:
    assert tolerance("float16", Distance(off, 0)) == FACTOR * BASE_LIMIT["float16"]


def test_without_a_reference_the_tolerance_is_the_dtypes() -> None:
    assert tolerance("float16", None) == FACTOR * TYPICAL["float16"]
    assert tolerance("auto", None) == FACTOR * TYPICAL["bfloat16"]


def test_the_nearest_model_is_named() -> None:
    found, off = nearest([ONE], {"far": [moved(ONE, 1)], "near": [moved(ONE, 0.1)], "broken": [moved(ONE, math.nan)]})
    assert (found, off) == ("near", pytest.approx(0.1))
