"""Alerts on Kubernetes: from KubeRay's own metrics and kube-state-metrics, where the chart's PrometheusRule is used.

Names and labels: KubeRay 1.7's `ray-operator/controllers/ray/metrics`, kube-state-metrics 2.17's documentation. A Ray
cluster without Kubernetes has none of them, and the plain rule file none of these.
"""

from __future__ import annotations

from xloom_dashboards.alerts import Alert

# Markers, in whose place the chart puts the release's own.
NAMESPACE_MARK = "NAMESPACE"
SERVICE_MARK = "RAYSERVICE"

_HERE = f'namespace="{NAMESPACE_MARK}"'
_GPU = f'kube_pod_container_resource_requests{{{_HERE},resource=~".*_com_(gpu|mig).*"}}'
_READY = f'kube_endpoint_address{{{_HERE},endpoint="{SERVICE_MARK}-serve-svc",ready="true"}}'
_UPGRADING = f'kuberay_service_condition_upgrade_in_progress{{{_HERE},name="{SERVICE_MARK}",condition="true"}}'

KUBERNETES_ALERTS: tuple[Alert, ...] = (
    Alert(
        # kube_service_info: it is looked at at all.
        "XloomNoEndpoint", f'kube_service_info{{{_HERE},service="{SERVICE_MARK}-serve-svc"}}',
        f"unless on () ({_READY})", "5m", "critical", "No pod is ready behind the service of the endpoint.",
        "no router's pod is ready",
    ),
    Alert(
        "XloomUpgradeStuck", f"max({_UPGRADING})", "== 1", "45m", "warning",
        "An upgrade has had two Ray clusters running for 45 minutes.", "a new cluster does not get ready",
    ),
    Alert(
        "XloomPodsPending",
        f"count(kube_pod_status_phase{{{_HERE},phase=\"Pending\"}} == 1 and on (namespace, pod) ({_GPU} > 0))",
        "> 0", "15m", "warning", "{{ $value }} pods wait for a node with a GPU.", "no node has the GPUs a pod asks for",
    ),
)  # fmt: skip
