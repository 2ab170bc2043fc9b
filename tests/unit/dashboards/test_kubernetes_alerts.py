"""The alerts from KubeRay's and kube-state-metrics' figures, on made-up series: no cluster is here to be scraped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.unit.chart.rendering import one, render
from tests.unit.dashboards.test_alerts import PROMTOOL, Series, try_rules
from xloom_dashboards.alerts import ALERTS
from xloom_dashboards.kubernetes import KUBERNETES_ALERTS, NAMESPACE_MARK, SERVICE_MARK
from xloom_dashboards.rules import chart_alerts

_SERVICE = 'kube_service_info{namespace="serving",service="xloom-serve-svc"}'
_ADDRESS = 'kube_endpoint_address{namespace="serving",endpoint="xloom-serve-svc",ready="%s",ip="10.0.0.%d"}'
_UPGRADE = 'kuberay_service_condition_upgrade_in_progress{namespace="serving",name="%s",condition="%s"}'


def pending(pod: str, resource: str, phase: str = "Pending") -> Series:
    """A pod that asks for a resource."""
    of = f'namespace="serving",pod="{pod}"'
    return {
        f'kube_pod_status_phase{{{of},phase="{phase}"}}': "1x60",
        f'kube_pod_container_resource_requests{{{of},resource="{resource}"}}': "1x60",
    }


FIRES: list[tuple[str, Series]] = [
    ("XloomNoEndpoint", {_SERVICE: "1x60"}),
    ("XloomNoEndpoint", {_SERVICE: "1x60", _ADDRESS % ("false", 1): "1x60"}),
    ("XloomUpgradeStuck", {_UPGRADE % ("xloom", "true"): "1x60"}),
    ("XloomPodsPending", pending("a", "nvidia_com_gpu") | pending("b", "nvidia_com_gpu")),
    ("XloomPodsPending", pending("a", "amd_com_gpu")),
    ("XloomPodsPending", pending("a", "nvidia_com_mig_1g_5gb") | pending("b", "nvidia_com_gpu_shared")),
]
QUIET: list[tuple[str, Series]] = [
    ("XloomNoEndpoint", {}),  # nobody scrapes kube-state-metrics
    ("XloomNoEndpoint", {_SERVICE: "1x60", _ADDRESS % ("true", 1): "1x60"}),
    ("XloomNoEndpoint", {_SERVICE: "1x60", _ADDRESS % ("true", 1): "1x27 _x30"}),  # for three minutes
    ("XloomUpgradeStuck", {_UPGRADE % ("xloom", "false"): "1x60"}),
    ("XloomUpgradeStuck", {_UPGRADE % ("other", "true"): "1x60"}),
    ("XloomUpgradeStuck", {_UPGRADE % ("xloom", "true"): "_x40 1x20"}),
    ("XloomPodsPending", pending("a", "cpu")),
    ("XloomPodsPending", pending("a", "nvidia_com_gpu", "Running")),
]


@PROMTOOL
def test_prometheus_fires_each_alert_when_it_should_and_only_then(tmp_path: Path) -> None:
    monitored = {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}
    [group] = one(render({"metrics": monitored}), "PrometheusRule")["spec"]["groups"]
    ours = [rule for rule in group["rules"] if rule["alert"] in {alert.name for alert in KUBERNETES_ALERTS}]
    try_rules(tmp_path, yaml.safe_dump({"groups": [group | {"rules": ours}]}), FIRES, QUIET)


def test_each_is_tried_both_ways_and_named_like_no_other() -> None:
    names = {alert.name for alert in KUBERNETES_ALERTS}
    assert names == {name for name, _ in FIRES} == {name for name, _ in QUIET}
    assert not names & {alert.name for alert in ALERTS}


@pytest.mark.parametrize("alert", KUBERNETES_ALERTS, ids=lambda alert: alert.name)
def test_each_is_narrowed_to_the_release(alert: object) -> None:
    [found] = [each for each in yaml.safe_load(chart_alerts())["kubernetes"] if each["name"] == alert.name]  # type: ignore[attr-defined]
    series = re.findall(r"kube(?:ray)?_\w+\{([^}]*)\}", found["expr"])
    assert series
    assert all(each.startswith(f'namespace="{NAMESPACE_MARK}"') for each in series)
    assert SERVICE_MARK in found["expr"] or "kube_pod_" in found["expr"]


def test_they_can_be_left_out() -> None:
    monitored = {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True, "kubernetes": False}}
    [group] = one(render({"metrics": monitored}), "PrometheusRule")["spec"]["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [alert.name for alert in ALERTS]
