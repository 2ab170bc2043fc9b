"""The small reader of PromQL finds what an expression selects."""

from __future__ import annotations

import pytest

from .promql import selectors, tokens, unconditional

RATIO = 'sum by (le, model) (rate(a_bucket{model=~"x|y", kind="{"}[1m])) / on (model) group_left (kind) b offset 5m'


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("up", ["up"]),
        (RATIO, ['a_bucket{model=~"x|y", kind="{"}', "b"]),
        ("topk(5, sum(rate(a:b_total[5m])) by (model)) > 1e3", ["a:b_total"]),
        ('{__name__=~"a_.+"}', ['{__name__=~"a_.+"}']),
        ("histogram_quantile(0.9, a) or vector(0) unless b == bool 1", ["a", "b"]),
        ('label_replace(a, "to", "$1", "from", "(.*)") + a', ["a"]),
    ],
)
def test_selectors_of_an_expression(expression: str, found: list[str]) -> None:
    assert selectors(expression) == found


def test_the_pieces_are_the_expression() -> None:
    assert "".join(token.text for token in tokens(RATIO)) == RATIO


@pytest.mark.parametrize(
    ("alert", "written"),
    [
        ("a / b > 0.95", "a / b > bool 0.95"),
        ("sum(a) == 0 and b >= 2", "sum(a) == bool 0 and b >= bool 2"),
        ('absent(a{b!="c"})', 'count(a{b!="c"})'),
        ("a > bool 1", "a > bool 1"),
        ("a == 0 unless on () b == 0", "a == bool 0 and on () b == bool 0"),
    ],
)
def test_an_alert_without_its_condition(alert: str, written: str) -> None:
    assert unconditional(alert) == written
