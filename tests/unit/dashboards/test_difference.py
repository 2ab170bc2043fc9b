"""Differences between boards, in lines a person can read."""

from __future__ import annotations

from typing import Any

from xloom_dashboards.difference import differences


def board(*panels: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"title": "A", "panels": list(panels), **fields}


def test_what_is_the_servers_is_no_difference() -> None:
    assert differences(board(id=1, version=7, iteration=3), board(version=2)) == []


def test_panels_are_named_by_their_titles() -> None:
    old = board({"title": "Requests", "type": "stat"}, {"title": "Gone"})
    new = board({"title": "Requests", "type": "timeseries"}, {"title": "New", "targets": []})
    assert differences(old, new) == [
        '~ panels[Requests].type: "stat" -> "timeseries"',
        "- panels[Gone]",
        "+ panels[New]",
    ]


def test_targets_are_named_by_their_letters_and_scalars_shown() -> None:
    old = board({"title": "P", "targets": [{"refId": "A", "expr": "up"}]})
    new = board({"title": "P", "targets": [{"refId": "A", "expr": "down", "legendFormat": "x"}]})
    assert differences(old, new) == [
        '~ panels[P].targets[A].expr: "up" -> "down"',
        '+ panels[P].targets[A].legendFormat: "x"',
    ]


def test_two_panels_of_a_title_are_told_apart() -> None:
    old = board({"title": "P", "unit": "s"}, {"title": "P", "unit": "s"})
    new = board({"title": "P", "unit": "s"}, {"title": "P", "unit": "ms"})
    assert differences(old, new) == ['~ panels[P #2].unit: "s" -> "ms"']


def test_an_order_that_changed_is_said() -> None:
    one, two = {"title": "one"}, {"title": "two"}
    assert differences(board(one, two), board(two, one)) == ["~ panels: in another order"]


def test_long_values_are_cut_and_lists_of_scalars_compared_whole() -> None:
    [line] = differences({"tags": ["a"], "text": "x" * 500}, {"tags": ["a"], "text": ""})
    assert len(line) < 200
    assert differences({"tags": ["a"]}, {"tags": ["a", "b"]}) == ['~ tags: ["a"] -> ["a", "b"]']
