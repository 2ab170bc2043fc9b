"""The pictures of boards: units, axes, and panels from a board's JSON."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from xloom_dashboards.board import Board
from xloom_dashboards.boards import BOARDS

from .drawing.page import page
from .drawing.series import Json, Line, Span, legend, lines_of, stacked
from .drawing.units import ticks, written

SPAN = Span(1_000_000, 1_000_120, 10)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.0123, "s", "12.3 ms"),
        (75, "s", "1.25 min"),
        (1500, "ms", "1.5 s"),
        (0.256, "percentunit", "25.6%"),
        (93.4, "percent", "93.4%"),
        (2_500_000, "bytes", "2.38 MiB"),
        (2_500_000, "Bps", "2.5 MB/s"),
        (12.5, "reqps", "12.5 req/s"),
        (1234, "suffix: tok/s", "1,234 tok/s"),
        (1234, "none", "1,234"),
        (3, "short", "3"),
        (float("nan"), "s", "NaN"),
    ],
)
def test_a_value_in_its_unit(value: float, unit: str, said: str) -> None:
    assert written(value, unit) == said


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError):
        written(1, "parsecs")


def test_every_unit_of_the_boards_is_known() -> None:
    for board in BOARDS:
        for panel in board.panels():
            assert written(1, panel.unit)


@pytest.mark.parametrize(("lowest", "highest"), [(0, 1), (0, 93), (0.2, 0.3), (5, 5), (0, 7e9)])
def test_an_axis_has_round_numbers_around_its_values(lowest: float, highest: float) -> None:
    found = ticks(lowest, highest)
    assert found[0] <= lowest
    assert found[-1] >= highest - 1e-9
    assert len(found) <= 8
    assert found == pytest.approx(sorted(found))


def test_a_legend_is_filled_in_from_labels() -> None:
    assert legend("{{model}} ({{ kind }})", {"model": "law", "kind": "lora"}) == "law (lora)"
    assert legend("__auto", {"__name__": "up", "job": "ray"}) == 'up{job="ray"}'


def test_stacked_lines_stand_on_each_other() -> None:
    lines = [Line("a", {}, [(0, 1), (1, 3)]), Line("b", {}, [(0, 3), (1, 1)])]
    assert [line.points for line in stacked(lines, shares=False)] == [[(0, 1), (1, 3)], [(0, 4), (1, 4)]]
    assert [line.points for line in stacked(lines, shares=True)] == [[(0, 0.25), (1, 0.75)], [(0, 1), (1, 1)]]


def answers(expression: str) -> list[Json]:
    """Two series of anything, with every label a board may ask for."""
    values = [[at, str((at % 7) / 7)] for at in range(int(SPAN.start), int(SPAN.end) + 1, int(SPAN.step))]
    labels: dict[str, Any] = {"model": "base", "kind": "<base>"}
    return [{"metric": labels | {"le": bound}, "values": values} for bound in ("0.5", "+Inf")]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
@pytest.mark.parametrize("ask", [answers, lambda expression: []], ids=["data", "none"])
def test_each_panel_of_a_board_is_drawn(board: Board, ask: Any) -> None:
    drawn = page(board.json(), ask, SPAN)
    body = drawn[drawn.index("<main") :]
    root = ET.fromstring(body)
    titles = {text.text for text in root.iter("text") if text.get("class") == "title"}
    assert titles == {panel.title for panel in board.panels()}
    panels = [panel for panel in board.json()["panels"] if "targets" in panel]
    said = [panel["fieldConfig"]["defaults"].get("noValue", "No data")[:7] for panel in panels]
    shown = [(text.text or "")[:7] for text in root.iter("text") if text.get("class") == "dim"]
    if ask is answers:
        assert not set(said) & set(shown)
    else:
        assert shown == said


def test_what_has_gone_is_in_a_graph_and_not_among_what_is_now() -> None:
    """As instant queries have it, which Grafana sends for numbers, bars and tables."""
    early = [[at, "1"] for at in range(int(SPAN.start), int(SPAN.start) + 50, int(SPAN.step))]
    [late] = [each for each in answers("") if each["metric"]["le"] == "+Inf"]
    found = [{"metric": {"replica": "gone"}, "values": early}, late]
    for instant, count in ((True, 1), (False, 2)):
        panel = {"targets": [{"expr": "", "instant": instant}]}
        assert len(lines_of(panel, lambda _: found, SPAN)) == count
