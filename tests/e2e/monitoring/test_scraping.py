"""Prometheus scrapes all of a cluster by Ray's discovery file, and evaluates the alerts; promtool finds no fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.unit.chart.rendering import one, render

from ..served import wait_until
from .conftest import Past
from .prometheus import PROMETHEUS, RULES, promtool

pytestmark = PROMETHEUS

EVALUATED_S = 30.0


def test_the_rules_pass_promtool() -> None:
    assert "SUCCESS" in promtool("check", "rules", RULES)


def test_the_charts_rules_pass_promtool(tmp_path: Path) -> None:
    rules = one(
        render({"metrics": {"prometheusRule": {"enabled": True}, "podMonitor": {"enabled": True}}}), "PrometheusRule"
    )
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rules["spec"]))
    assert "SUCCESS" in promtool("check", "rules", file)


@pytest.mark.slow
def test_every_target_is_scraped(past: Past) -> None:
    wait_until(lambda: set(past.watched.prometheus.targets().values()) == {"up"}, EVALUATED_S, "all targets", 0.5)
    jobs = {each["labels"]["job"] for each in past.watched.prometheus.get("targets")["activeTargets"]}
    assert jobs == {"ray", "xloom-router"}


@pytest.mark.slow
def test_both_nodes_export(past: Past) -> None:
    found = past.watched.prometheus.between("ray_node_cpu_count", past.start, past.end)
    assert len({series["metric"]["instance"] for series in found}) == 2


@pytest.mark.slow
def test_the_router_answers_scrapes_without_a_key(past: Past) -> None:
    [up] = past.watched.prometheus.between('up{job="xloom-router"}', past.start, past.end)
    assert float(up["values"][-1][1]) == 1


@pytest.mark.slow
def test_prometheus_evaluates_every_alert(past: Past) -> None:
    prometheus = past.watched.prometheus
    wait_until(
        lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"}, EVALUATED_S, "all rules evaluated", 0.5
    )
    written = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in prometheus.rules()] == written
