"""What boards show when something is wrong or under way: values from made-up series, by Prometheus itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from tests.programs import needs
from xloom_dashboards import upstream
from xloom_dashboards.boards import BOARDS
from xloom_dashboards.expressions import metrics_in, substituted

PROMTOOL = needs("promtool", package="prometheus")


def expressions_of(title: str) -> list[str]:
    """Those of a panel, with everything chosen in its variables."""
    found = [panel for board in BOARDS for panel in board.panels() if panel.title == title]
    return [substituted(query.expr, {"__rate_interval": "5m", "__range": "1h"}) for query in found[0].queries]


def values(folder: Path, expr: str, series: dict[str, str], expected: list[float]) -> None:
    """Half an hour on, an expression has these values."""
    asked = {"expr": expr, "eval_time": "30m", "exp_samples": [{"labels": "{}", "value": each} for each in expected]}
    given = [{"series": key, "values": value} for key, value in series.items()]
    content = {
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": [asked]}],
    }
    file = folder / "tests.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def connected(session: str, node: str, replicas: str) -> dict[str, str]:
    return {f'ray_xloom_router_replicas{{SessionName="{session}",ray_io_cluster="{session}",pod="{node}"}}': replicas}


@PROMTOOL
def test_a_new_cluster_that_is_coming_up_does_not_hide_the_one_that_serves(tmp_path: Path) -> None:
    [expr] = expressions_of("Replicas connected")
    old = connected("old", "a", "3x60") | connected("old", "b", "2x60")
    values(tmp_path, expr, old, [2])  # the fewest that any router knows
    values(tmp_path, expr, old | connected("new", "c", "0x60"), [2])
    values(tmp_path, expr, connected("old", "a", "0x60"), [0])
    values(tmp_path, expr, connected("old", "a", "3x20 _x40"), [])  # gone: nothing, not its last value


@PROMTOOL
def test_no_traffic_is_zero_and_no_gap(tmp_path: Path) -> None:
    for title in ("Requests", "Failed requests", "Tokens out"):
        [expr] = expressions_of(title)
        values(tmp_path, expr, {}, [0])


def test_each_wait_is_asked_for_by_its_own_metric() -> None:
    waits = {"Time in queue": upstream.QUEUE_TIME, "Prefill": upstream.PREFILL_TIME, "Decode": upstream.DECODE_TIME}
    for title, metric in waits.items():
        assert {name for expr in expressions_of(title) for name in metrics_in(expr)} == {f"{metric}_bucket"}
