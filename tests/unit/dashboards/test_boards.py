"""The boards keep Grafana's rules, and ask only for metrics and labels that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import needs
from xloom.observability.table import METRICS
from xloom_dashboards import upstream
from xloom_dashboards.alerts import ALERTS
from xloom_dashboards.board import COLUMNS, SCHEMA, TAG, Board
from xloom_dashboards.boards import BOARDS
from xloom_dashboards.expressions import expressions, family, metrics_in, variables_in
from xloom_dashboards.panel import Panel
from xloom_dashboards.serving import A_DAY

PROMTOOL = needs("promtool", package="prometheus")

Json = dict[str, Any]

OURS = {metric.exported: metric for metric in METRICS}
BUILT_IN = {"__rate_interval", "__range", "__interval"}  # Grafana's own variables
RAY_LABELS = {"SessionName", "ray_io_cluster"}  # Ray puts the first on every series, the PodMonitor the second
UNITS = {"short", "none", "percent", "percentunit", "s", "ms", "reqps", "ops", "bytes", "Bps"}  # of Grafana's list
OPTIONS = {  # what each kind of panel must be told
    "timeseries": {"legend", "tooltip"},
    "stat": {"reduceOptions", "colorMode", "graphMode", "textMode"},
    "bargauge": {"reduceOptions", "displayMode", "orientation"},
    "heatmap": {"calculate", "color", "yAxis", "tooltip", "rowsFrame"},
    "table": {"showHeader", "cellHeight"},
}
SERIES = re.compile(r"(ray_\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(?:=~|!~|!=|=)"')

each_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def panels(board: Board) -> Iterator[Json]:
    """All but the headings."""
    return (panel for panel in board.json()["panels"] if panel["type"] != "row")


def known(name: str) -> bool:
    """Whether Prometheus would have it: histograms by their parts, others by their name."""
    metric = OURS.get(family(name))
    histogram = family(name) in upstream.HISTOGRAMS if metric is None else metric.kind == "histogram"
    if histogram:
        return family(name) != name
    return name in OURS or name in upstream.GAUGES + upstream.COUNTERS


def test_there_are_four_boards_with_their_own_uids() -> None:
    assert [board.uid for board in BOARDS] == ["xloom-serving", "xloom-cluster", "xloom-xlora", "xloom-store"]
    assert len({board.title for board in BOARDS}) == len(BOARDS)
    assert all(re.fullmatch(r"[a-z0-9-]{1,40}", board.uid) for board in BOARDS)


@each_board
def test_a_board_has_what_grafana_asks_of_one(board: Board) -> None:
    found = board.json()
    assert found["schemaVersion"] == SCHEMA
    assert found["tags"] == [TAG]
    assert found["title"]
    assert found["description"]
    assert re.fullmatch(r"\d+[smh]", found["refresh"])
    assert "id" not in found
    assert "version" not in found
    assert json.loads(json.dumps(found)) == found


@each_board
def test_panels_have_their_own_ids_and_places(board: Board) -> None:
    found = board.json()["panels"]
    assert [panel["id"] for panel in found] == list(range(1, len(found) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in found:
        place = panel["gridPos"]
        assert place["w"] >= 1
        assert place["h"] >= 1
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= COLUMNS
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in lines}
        assert not cells & taken, panel["title"]
        taken |= cells


@each_board
def test_rows_leave_no_gap(board: Board) -> None:
    taken = {
        (x, y)
        for place in (panel["gridPos"] for panel in board.json()["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    }
    height = max(y for _, y in taken) + 1
    assert len(taken) == COLUMNS * height


@each_board
def test_every_panel_is_of_a_known_kind_and_complete(board: Board) -> None:
    for panel in panels(board):
        assert set(panel["options"]) >= OPTIONS[panel["type"]], panel["title"]
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        defaults = panel["fieldConfig"]["defaults"]
        unit = defaults["unit"]
        assert unit in UNITS or re.fullmatch(r"suffix: \S+", unit), unit
        if panel["type"] != "heatmap":
            steps = defaults["thresholds"]["steps"]
            assert steps[0]["value"] is None
            values = [step["value"] for step in steps[1:]]
            assert values == sorted(values)


@each_board
def test_every_target_is_complete(board: Board) -> None:
    for panel in panels(board):
        targets = panel["targets"]
        assert targets, panel["title"]
        assert [target["refId"] for target in targets] == [chr(ord("A") + index) for index in range(len(targets))]
        for target in targets:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"] == panel["datasource"]
            assert target["instant"] is not target["range"]
            assert target["format"] == ("heatmap" if panel["type"] == "heatmap" else target["format"])
            assert (target["format"] == "table") == (panel["type"] == "table")


@each_board
def test_legends_name_labels_the_expression_keeps(board: Board) -> None:
    for panel in board.panels():
        for query in panel.queries:
            kept = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query.expr) for label in by.split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= kept, (panel.title, query.legend)
            assert len(panel.queries) == 1 or query.legend, panel.title


@each_board
def test_variables_are_defined_before_they_are_used_and_are_used(board: Board) -> None:
    defined = {"datasource"}
    for variable in board.variables:
        assert variables_in(variable.json()["query"]["query"]) <= defined, variable.name
        assert variable.name not in defined
        defined.add(variable.name)
    used = {"datasource"}
    for panel in board.panels():
        for query in panel.queries:
            used |= variables_in(query.expr)
    for mark in board.marks:
        used |= variables_in(mark.expr)
    assert used - BUILT_IN == defined


@each_board
def test_rates_are_over_grafanas_own_interval(board: Board) -> None:
    for title, expr, _ in board.queries():
        windows = set(re.findall(r"\[([^]]*)\]", expr))
        assert windows <= {"$__rate_interval", "$__range", A_DAY}, title


@each_board
def test_only_metrics_that_exist_are_asked_for_with_labels_they_have(board: Board) -> None:
    for title, expr, _ in board.queries():
        assert metrics_in(expr), title
        for name in metrics_in(expr):
            assert known(name), f"{title}: {name}"
        for name, matchers in SERIES.findall(expr):
            labels = set(MATCHER.findall(matchers))
            if metric := OURS.get(family(name)):
                assert labels - RAY_LABELS <= set(metric.labels), f"{title}: {name}"
            elif not title.startswith("$"):
                assert labels >= RAY_LABELS


def shown() -> Iterator[tuple[Panel, str]]:
    """Every panel's expressions."""
    for board in BOARDS:
        for panel in board.panels():
            for query in panel.queries:
                yield panel, query.expr


def test_histograms_are_shown_as_quantiles_and_buckets_never_by_their_sum() -> None:
    for panel, expr in shown():
        assert "_sum" not in expr, panel.title
        for name in metrics_in(expr):
            if family(name) != name and name not in upstream.GAUGES:
                assert name.endswith("_bucket"), panel.title
                assert re.search(r"sum by \(le\b", expr), panel.title


def test_counters_are_shown_as_rates_or_as_totals_in_tables_and_bars() -> None:
    gauges = {name for name, metric in OURS.items() if metric.kind == "gauge"} | set(upstream.GAUGES)
    for panel, expr in shown():
        if panel.kind in ("timeseries", "heatmap"):
            for name in metrics_in(expr) - gauges:
                if name.endswith(("_total", "_bucket")):
                    assert re.search(rf"(rate|increase)\({name}\b", expr), panel.title


def test_every_metric_of_the_table_is_on_a_board() -> None:
    asked = {family(name) for board in BOARDS for _, expr, _ in board.queries() for name in metrics_in(expr)}
    assert set(OURS) - asked == set()


def test_boards_link_to_one_another_and_keep_what_is_chosen() -> None:
    for board in BOARDS:
        [link] = board.json()["links"]
        assert link["type"] == "dashboards"
        assert link["tags"] == board.json()["tags"]
        assert link["keepTime"]
        assert link["includeVars"]


@each_board
def test_deployments_and_adapters_are_marked(board: Board) -> None:
    built_in, *marks = board.json()["annotations"]["list"]
    assert built_in["builtIn"] == 1
    assert [mark["name"] for mark in marks] == ["Deploy", "Replicas", "Adapters"]
    assert all(mark["datasource"]["uid"] == "${datasource}" for mark in marks)


def test_expressions_have_no_variables_left() -> None:
    found = list(expressions())
    assert {each.owner for each in found} == {*(board.uid for board in BOARDS), "alerts"}
    assert all("$" not in each.expr for each in found)
    assert all("[1m]" not in each.expr for each in expressions(rate_interval="20s"))
    chosen = [each.expr for each in expressions(values={"model": "base"}) if 'model=~"base"' in each.expr]
    assert len(chosen) > 10


def test_expressions_say_what_must_happen_first() -> None:
    events = {(each.title, each.on_event) for each in expressions()}
    assert ("Replays by reason", "a replica dies, drains or refuses while it has requests") in events
    assert ("Requests by model", "") in events
    assert ("GPU", "a node has a GPU") in events


@pytest.mark.parametrize("name", upstream.NAMES)
def test_upstreams_metrics_are_in_their_source(name: str) -> None:
    package = "vllm" if name.startswith("ray_vllm_") else "ray"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    if package == "vllm":
        files = [root / "v1" / "metrics" / "loggers.py"]
        quoted = [f'"vllm:{name.removeprefix("ray_vllm_")}"']
    else:
        files = [
            *(root / "serve" / "_private").glob("*_state.py"),
            root / "dashboard/modules/reporter/reporter_agent.py",
        ]
        stem = name.removeprefix("ray_")
        quoted = [f'"{stem}"', f'"{stem.removesuffix("_total")}"']
    assert any(text in file.read_text(encoding="utf-8") for file in files for text in quoted)


@PROMTOOL
def test_prometheus_can_read_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"expression:{index}", "expr": each.expr} for index, each in enumerate(expressions())]
    file = tmp_path / "expressions.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_gone_is_not_shown_as_if_it_were_there() -> None:
    """The last value of a range is that of a replica long gone; an instant query has none."""
    for board in BOARDS:
        for panel in panels(board):
            if panel["type"] in ("stat", "bargauge", "table"):
                assert all(target["instant"] for target in panel["targets"]), panel["title"]
            elif panel["type"] == "timeseries":
                assert "lastNotNull" not in panel["options"]["legend"]["calcs"]


def test_a_panel_without_data_says_what_that_means() -> None:
    shown = {panel["title"]: panel["fieldConfig"]["defaults"].get("noValue") for panel in panels(BOARDS[0])}
    assert shown["Errors by code"] == "None until a request is refused."
    assert shown["Requests in flight"] == "No router"
    for title in ("Requests", "Failed requests", "Tokens out"):  # 0 is meant
        [expr] = [query.expr for panel in BOARDS[0].panels() if panel.title == title for query in panel.queries]
        assert expr.endswith("or vector(0))")


def test_boards_and_alerts_reckon_failures_alike() -> None:
    [errors] = [panel for panel in BOARDS[0].panels() if panel.title == "Failed share"]
    scoped = [re.sub(r'SessionName=~"[^"]*",ray_io_cluster=~"[^"]*"', "SCOPE", query.expr) for query in errors.queries]
    scoped = [expr.replace(',model=~"$model"', "").replace("$__rate_interval", "5m") for expr in scoped]
    signals = {alert.name: alert.signal for alert in ALERTS}
    assert scoped == [signals["XloomRequestsFailing"], signals["XloomServerErrors"]]
