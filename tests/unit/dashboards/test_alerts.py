"""The alerts: what they ask for exists, each has a runbook, and Prometheus takes the rules."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.programs import needs
from tests.unit.dashboards.test_boards import known
from xloom_dashboards.alerts import ALERTS, QUEUE_LIMIT, QUEUE_MARK, SCOPE_MARK, Alert
from xloom_dashboards.expressions import expressions, metrics_in
from xloom_dashboards.rules import chart_alerts, plain_rules

PROMTOOL = needs("promtool", package="prometheus")

each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def test_each_has_its_own_name() -> None:
    names = [alert.name for alert in ALERTS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"Xloom[A-Z][A-Za-z]+", name) for name in names)


@each_alert
def test_an_alert_is_complete(alert: Alert) -> None:
    assert re.fullmatch(r"\d+m", alert.hold)
    assert alert.severity in ("critical", "warning")
    assert alert.summary.endswith(".")
    assert alert.on_event
    assert alert.condition or alert.signal_event


@each_alert
def test_an_alert_asks_for_metrics_that_exist(alert: Alert) -> None:
    assert metrics_in(alert.expr)
    assert {name for name in metrics_in(alert.expr) if not known(name)} == set()


@each_alert
def test_each_series_is_within_the_scope_which_plain_rules_leave_out(alert: Alert) -> None:
    assert set(re.findall(r"ray_\w+(.{6})", alert.expr)) == {f"{{{SCOPE_MARK}"}
    assert SCOPE_MARK not in alert.plain_expr
    assert QUEUE_MARK not in alert.plain_expr
    assert "{}" not in alert.plain_expr
    assert "{," not in alert.plain_expr
    assert "$" not in alert.plain_expr


@each_alert
def test_summaries_name_labels_that_the_expression_keeps(alert: Alert) -> None:
    kept = {label.strip() for by in re.findall(r"by \(([^)]*)\)", alert.expr) for label in by.split(",")}
    assert set(re.findall(r"\$labels\.(\w+)", alert.summary)) <= kept


def test_the_queue_limit_is_twice_the_default_target() -> None:
    from xloom.settings import ReplicaSettings

    assert float(QUEUE_LIMIT) == 2 * ReplicaSettings().target_queue_depth


def test_the_rule_file_has_every_alert_with_its_runbook() -> None:
    [group] = yaml.safe_load(plain_rules())["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [alert.name for alert in ALERTS]
    for rule in group["rules"]:
        assert rule["annotations"]["runbook_url"] == f"docs/monitoring.md#{rule['alert'].lower()}"


def test_the_charts_list_has_every_alert() -> None:
    assert [each["expr"] for each in yaml.safe_load(chart_alerts())["alerts"]] == [alert.expr for alert in ALERTS]


def test_expressions_have_each_alert_and_its_signal() -> None:
    titles = [each.title for each in expressions() if each.owner == "alerts"]
    assert [title for title in titles if ":" not in title] == [alert.name for alert in ALERTS]
    assert "XloomPagesExhausted: signal" in titles


@PROMTOOL
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "alerts.yaml"
    file.write_text(plain_rules(), encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout + done.stderr


Series = dict[str, str]  # a series, and its values minute by minute in promtool's notation

_ENGINE = 'ray_serve_deployment_status{application="xloom",deployment="engine"}'
_ERRORS, _STOPS = 'ray_xloom_requests_total{outcome="error"}', 'ray_xloom_requests_total{outcome="stop"}'
_FIRST = "ray_xloom_time_to_first_token_seconds_bucket"
_WANTED, _RUNNING = "ray_xloom_autoscaling_wanted_replicas", "ray_xloom_autoscaling_replicas"
_CONNECTED, _WAITING = "ray_xloom_router_replicas", "ray_xloom_router_waiting"
_QUEUE = 'ray_xloom_autoscaling_pressure_ratio{signal="queue"}'
_USED, _PAGES = "ray_xloom_replica_kv_pages_used", "ray_xloom_replica_kv_pages_total"
_REFUSED = 'ray_xloom_adapter_swaps_total{action="refused",model="code"}'

_UNANSWERED = 'ray_xloom_http_errors_total{status="503",code="no_replica_ready"}'

LOOKED_AT = {"XloomUpgradeStuck": "50m"}  # after what it holds for; others at half an hour

FIRES: list[tuple[str, Series]] = [
    ("XloomEndpointDown", {}),
    ("XloomNoReplica", {_CONNECTED: "0x60", _WAITING: "0x60", _WANTED: "1x60"}),
    ("XloomNoReplica", {_CONNECTED: "0x60", _WAITING: "2x60", _WANTED: "0x60"}),
    ("XloomNoReplica", {_CONNECTED: "0x60", _WAITING: "0x60"}),
    ("XloomReplicaUnhealthy", {_ENGINE: "2x60"}),
    ("XloomStoreDown", {}),
    ("XloomRequestsFailing", {_ERRORS: "0+6x60", _STOPS: "0+60x60"}),
    ("XloomServerErrors", {'ray_xloom_http_errors_total{status="503"}': "0+6x60", _STOPS: "0+60x60"}),
    ("XloomServerErrors", {_UNANSWERED: "0+6x60", _ERRORS: "0+6x60", _STOPS: "0+104x60"}),  # 6 of 110: counted once
    (
        "XloomFirstTokenSlow",
        {f'{_FIRST}{{le="10"}}': "0x60", f'{_FIRST}{{le="30"}}': "0+9x60", f'{_FIRST}{{le="+Inf"}}': "0+9x60"},
    ),
    ("XloomQueueGrowing", {f'ray_xloom_replica_waiting{{replica="{each}"}}': "20x60" for each in "ab"}),
    ("XloomPagesExhausted", {f'{_USED}{{replica="a"}}': "96x60", f'{_PAGES}{{replica="a"}}': "100x60"}),
    ("XloomPreemptions", {"ray_xloom_preemptions_total": "0+6x60", _STOPS: "0+60x60"}),
    ("XloomAtReplicaLimit", {_QUEUE: "1.5x60", _WANTED: "2x60", _RUNNING: "2x60"}),
    ("XloomReplicasPending", {_WANTED: "3x60", _RUNNING: "2x60"}),
    ("XloomReplays", {'ray_xloom_replays_total{reason="lost"}': "0+6x60", _STOPS: "0+60x60"}),
    ("XloomAdapterRefused", {_REFUSED: "_x25 1x35"}),  # a series that is new
    ("XloomAdapterRefused", {_REFUSED: "1x25 2x35"}),
]
QUIET: list[tuple[str, Series]] = [
    ("XloomEndpointDown", {"ray_xloom_router_in_flight": "0x60"}),
    ("XloomNoReplica", {_CONNECTED: "0x60", _WAITING: "0x60", _WANTED: "0x60"}),  # scaled to zero
    ("XloomNoReplica", {_CONNECTED: "1x60", _WAITING: "9x60", _WANTED: "1x60"}),
    ("XloomReplicaUnhealthy", {_ENGINE: "6x60"}),
    ("XloomReplicaUnhealthy", {_ENGINE: "6x28 2x32"}),  # a replica is being replaced
    ("XloomStoreDown", {"ray_xloom_store_version": "0x60"}),
    ("XloomRequestsFailing", {_ERRORS: "0+1x60", _STOPS: "0+60x60"}),
    ("XloomRequestsFailing", {_STOPS: "0x60"}),  # no traffic
    ("XloomServerErrors", {'ray_xloom_http_errors_total{status="404"}': "0+60x60", _STOPS: "0+60x60"}),
    ("XloomServerErrors", {_UNANSWERED: "0+6x60", _ERRORS: "0+6x60", _STOPS: "0+120x60"}),  # 6 of 126
    ("XloomFirstTokenSlow", {f'{_FIRST}{{le="10"}}': "0+9x60", f'{_FIRST}{{le="+Inf"}}': "0+9x60"}),
    (
        "XloomQueueGrowing",
        {'ray_xloom_replica_waiting{replica="a"}': "20x60", 'ray_xloom_replica_waiting{replica="b"}': "0x60"},
    ),
    (
        "XloomPagesExhausted",
        {f'{_USED}{{replica="a"}}': "100x60", f'{_USED}{{replica="b"}}': "1x60"}
        | {f'{_PAGES}{{replica="{each}"}}': "100x60" for each in "ab"},
    ),
    ("XloomPreemptions", {"ray_xloom_preemptions_total": "0+1x60", _STOPS: "0+60x60"}),
    ("XloomAtReplicaLimit", {_QUEUE: "1.5x60", _WANTED: "3x60", _RUNNING: "2x60"}),
    ("XloomAtReplicaLimit", {_QUEUE: "0.9x60", _WANTED: "2x60", _RUNNING: "2x60"}),
    ("XloomReplicasPending", {_WANTED: "2x60", _RUNNING: "2x60"}),
    ("XloomReplays", {'ray_xloom_replays_total{reason="lost"}': "0+1x60", _STOPS: "0+60x60"}),
    ("XloomAdapterRefused", {_REFUSED: "1x60"}),  # long ago
]


def test_each_alert_is_tried_both_ways() -> None:
    names = {alert.name for alert in ALERTS}
    assert {name for name, _ in FIRES} == names
    assert {name for name, _ in QUIET} == names


@PROMTOOL
def test_prometheus_fires_each_alert_when_it_should_and_only_then(tmp_path: Path) -> None:
    try_rules(tmp_path, plain_rules(), FIRES, QUIET)


def try_rules(folder: Path, rules: str, fires: list[tuple[str, Series]], quiet: list[tuple[str, Series]]) -> None:
    """Rules on made-up series of an hour, each looked at after most of it, by promtool."""
    cases = [(*case, [{"labels": "{}", "value": 1}]) for case in fires] + [(*case, []) for case in quiet]
    tests = [
        {
            "name": f"{name} {'fires' if expected else 'is quiet'} {series}",
            "interval": "1m",
            "input_series": [{"series": key, "values": values} for key, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                    "eval_time": LOOKED_AT.get(name, "30m"),
                    "exp_samples": expected,
                }
            ],
        }
        for name, series, expected in cases
    ]
    (folder / "alerts.yaml").write_text(rules, encoding="utf-8")
    file = folder / "tests.yaml"
    content = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
