"""What Google's load balancers take of the chart's objects: limits that its API has and its CRDs do not say."""

from __future__ import annotations

from tests.unit.chart.rendering import Values, merged, one, render

GKE: Values = {"loadBalancer": {"provider": "gke"}, "settings": {"replicas": {"stuck_timeout_s": 120}}}
ROUTE: Values = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}
HOSTS: Values = {"ingress": {"enabled": True, "hosts": [{"host": "a.example.com"}]}}


def test_a_health_check_fails_after_ten_tries_at_most() -> None:
    """Google refuses more, where a router may be stuck for longer than ten checks."""
    check = one(render(merged(ROUTE, GKE)), "HealthCheckPolicy")["spec"]["default"]
    assert check["unhealthyThreshold"] == 10
    assert check["timeoutSec"] <= check["checkIntervalSec"]
    backend = one(render(merged(HOSTS, GKE)), "BackendConfig")["spec"]["healthCheck"]
    assert backend["unhealthyThreshold"] == 10
    usual = merged(ROUTE, {"loadBalancer": {"provider": "gke"}})
    assert one(render(usual), "HealthCheckPolicy")["spec"]["default"]["unhealthyThreshold"] == 3


def test_a_drain_lasts_an_hour_at_most_for_balancers() -> None:
    long = {"settings": {"replicas": {"drain_timeout_s": 7200}}}
    policy = one(render(merged(merged(ROUTE, GKE), long)), "GCPBackendPolicy")["spec"]["default"]
    assert policy["connectionDraining"] == {"drainingTimeoutSec": 3600}
    aws = merged(merged(HOSTS, {"loadBalancer": {"provider": "aws"}}), long)
    annotations = one(render(aws), "Ingress")["metadata"]["annotations"]
    delay = "deregistration_delay.timeout_seconds=3600"
    assert annotations["alb.ingress.kubernetes.io/target-group-attributes"] == delay


def test_googles_gateways_have_their_timeout_by_policy() -> None:
    [rule] = one(render(merged(ROUTE, GKE)), "HTTPRoute")["spec"]["rules"]
    assert "timeouts" not in rule
    [rule] = one(render(ROUTE), "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}
