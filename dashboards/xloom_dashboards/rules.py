"""The table of alerts as files: Prometheus' own rules, and the list that the chart's template reads."""

from __future__ import annotations

from typing import Any

import yaml

from xloom_dashboards.alerts import ALERTS, QUEUE_MARK, SCOPE_MARK, Alert
from xloom_dashboards.kubernetes import KUBERNETES_ALERTS, NAMESPACE_MARK, SERVICE_MARK

RUNBOOKS = "docs/monitoring.md"  # each alert has a heading there
REGENERATE = "python -m xloom_dashboards.generate"

_PLAIN = f"# Prometheus rules for xloom, for `rule_files`. Written by `{REGENERATE}`: change alerts.py instead.\n"
_CHART = (
    f"# The alerts of templates/prometheusrule.yaml, which puts the release's labels for {SCOPE_MARK}, its limit for\n"
    f"# {QUEUE_MARK}, its names for {NAMESPACE_MARK} and {SERVICE_MARK}. Written by `{REGENERATE}`: change alerts.py\n"
    f"# and kubernetes.py in dashboards/xloom_dashboards/ instead.\n"
)


def plain_rules() -> str:
    """A rule file as Prometheus reads it (`promtool check rules`)."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.plain_expr,
            "for": alert.hold,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook_url": f"{RUNBOOKS}#{alert.anchor}"},
        }
        for alert in ALERTS
    ]
    return _PLAIN + _yaml({"groups": [{"name": "xloom", "rules": rules}]})


def chart_alerts() -> str:
    """The alerts with markers, for the chart."""
    return _CHART + _yaml({"alerts": _listed(ALERTS), "kubernetes": _listed(KUBERNETES_ALERTS)})


def _listed(alerts: tuple[Alert, ...]) -> list[dict[str, str]]:
    return [
        {
            "name": alert.name,
            "expr": alert.expr,
            "for": alert.hold,
            "severity": alert.severity,
            "summary": alert.summary,
        }
        for alert in alerts
    ]


def _yaml(data: Any) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, width=1_000_000, allow_unicode=True))
